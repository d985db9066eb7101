"""A step whose gradients are not finite: skipped by all ranks, without a trace, told and counted."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.distributed.spawn import run_ranks
from tests.engines import configuration
from tests.models import albef_model, batch_for
from tests.test_contracts import PAIRS, batch_of, built, short
from vlscale import config, distributed
from vlscale.config import RunConfig
from vlscale.engine import DeepSpeedEngine, StepReport
from vlscale.errors import TrainingError
from vlscale.families import albef, soho
from vlscale.local_engine import LocalEngine
from vlscale.model import PretrainModel
from vlscale.nn import moving
from vlscale.non_finite import Window, is_bad, message, suspicions
from vlscale.objectives import itm, mlm, mvm
from vlscale.options import NonFiniteConfig
from vlscale.saving.pieces import Reader, file_of, write
from vlscale.train import one_step
from vlscale.types import Batch, Loss, Moment, Stream, Visual

STAGES = ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
MICRO_BATCHES = 2  # per rank and step
HYPER = ("optim.warmup=0", "steps=10", "momentum.coefficient=0.9", "optim.lr=0.001", "optim.scale={}")
State = dict[str, Tensor]


def with_twin_and_queues() -> tuple[PretrainModel, Any]:
    """Keys enter the queue between the micro-batches of a step."""
    model = albef_model(queue=12)
    for queue in model.key_queues().values():
        queue.options = replace(queue.options, queue_push="micro_batch")
    return model, albef.tiny()


def with_dictionary() -> tuple[PretrainModel, Any]:
    torch.manual_seed(0)
    shape = replace(soho.tiny(), live_statistics=True)
    family = soho.build(shape)
    objectives = {"mlm": mlm.build(mlm.Config(soften=0.0), family), "mvm": mvm.build(mvm.Config(), family)}
    objectives["itm"] = itm.build(itm.Config(negatives="loader"), family)
    return PretrainModel(family, objectives), shape


MODELS = {"twin and queues": with_twin_and_queues, "dictionary": with_dictionary}


def micro_batches(shape: Any, step: int, poisoned: bool) -> list[Batch]:
    """This rank's; poisoned: one sample of the last rank's last micro-batch holds a NaN."""
    ranks, rank = distributed.world_size(), distributed.rank()
    out = []
    for number in range(MICRO_BATCHES):
        batch = batch_for(shape.inputs, shape.vocab, 4, seed=100 * step + number * ranks + rank)
        pixels = batch.visual["clean"].feats.float() / 128 - 1
        if poisoned and rank == ranks - 1 and number == MICRO_BATCHES - 1:
            pixels[1, 0, 3, 5] = torch.nan
        views = {view: visual._replace(feats=pixels) for view, visual in batch.visual.items()}
        matched = torch.arange(4) % 2 == 0
        ids = torch.arange(4) + 4 * (number * ranks + rank)
        out.append(replace(batch, visual=views, matched=matched, pair_id=ids))
    return out


def engine_of(name: str, precision: str, model: PretrainModel, run: RunConfig) -> Any:
    if name == "local":
        return LocalEngine(model, run.optim, torch.device("cpu"), accumulation=MICRO_BATCHES)
    batch = 4 * MICRO_BATCHES * distributed.world_size()
    config = configuration(name, batch, 4, run.optim.clip, precision)
    return DeepSpeedEngine(model, config, run.optim, distributed.init())


def state_of(machine: Any) -> State:
    """Everything of this rank that a step may move."""
    model: PretrainModel = machine.model
    found = dict(model.named_buffers())
    found |= {name: machine._part(parameter) for name, parameter in model.named_parameters()}
    found |= {f"{piece.name} from {piece.start}": piece.values for piece in machine.pieces()}
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def moved(one: State, other: State) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def check_skip(name: str, precision: str, kind: str) -> None:
    """Steps 1 and 3 end as steps 1 to 3 do if 2 is poisoned, which itself moves nothing."""
    run = config.load("quickstart", HYPER)
    ends, norms = [], []
    for poisoned in (True, False):
        model, shape = MODELS[kind]()
        machine = engine_of(name, precision, model, run)
        plans = distributed.StepPlans()
        for step in (1, 2, 3) if poisoned else (1, 3):
            before = state_of(machine)
            batches = micro_batches(shape, step, poisoned=step == 2)
            result = one_step(run, model, machine, plans, step, batches)
            assert result.report.applied == (step != 2), (name, precision, kind, step)
            assert result.report.answered is False
            changes = moved(before, state_of(machine)) if step > 1 else []
            if step == 2:
                assert not changes, (name, precision, kind, changes)
                assert not math.isfinite(result.report.grad_norm)
            elif step > 2:
                assert len(changes) > 20, (name, precision, kind)
            norms.append(result.report.grad_norm)
        ends.append(state_of(machine))
    assert not moved(*ends), (name, precision, kind, moved(*ends))
    assert norms[2] == norms[4]


def check_all(cases: tuple[tuple[str, str], ...], kind: str) -> None:
    for name, precision in cases:
        check_skip(name, precision, kind)


def check_going_back(root: str, name: str, precision: str, kind: str) -> None:
    """An engine that has gone on takes up an earlier state as a new one does."""
    run = config.load("quickstart", HYPER)
    model, shape = MODELS[kind]()
    machine, plans = engine_of(name, precision, model, run), distributed.StepPlans()
    folder, ends = Path(root) / f"{name} {precision}", []

    def make(*steps: int) -> None:
        for step in steps:
            one_step(run, model, machine, plans, step, micro_batches(shape, step, poisoned=step == 3))

    make(1, 2)
    folder.mkdir(exist_ok=True)
    with (folder / file_of(distributed.rank())).open("wb") as file:
        write(file, machine.pieces())
    scalars = machine.scalars()
    distributed.barrier()
    for _ in range(2):
        make(3, 4, 5)
        ends.append(state_of(machine))
        make(6)
        machine.restore(Reader(folder), scalars)
    assert not moved(*ends), (name, precision, kind, moved(*ends))


def check_all_going_back(root: str, cases: tuple[tuple[str, str], ...], kind: str) -> None:
    for name, precision in cases:
        check_going_back(root, name, precision, kind)


ALL = tuple((name, precision) for name in STAGES for precision in ("fp32", "bf16"))
FEW = (("zero0", "fp32"), ("zero1", "bf16"), ("zero3", "bf16"), ("zero2_offload", "bf16"))


def test_a_skipped_step_changes_nothing() -> None:
    run_ranks(check_all, 2, FEW, "twin and queues")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "world"), [("twin and queues", 2), ("dictionary", 1)])
def test_a_skipped_step_changes_nothing_at_any_stage(kind: str, world: int) -> None:
    run_ranks(check_all, world, tuple(set(ALL) - set(FEW)) if world > 1 else ALL, kind, timeout=240.0)


@pytest.mark.parametrize(
    ("kind", "world", "cases"),
    [
        ("twin and queues", 2, (("zero3", "bf16"),)),
        pytest.param("twin and queues", 1, ALL, marks=pytest.mark.slow),
        pytest.param("dictionary", 1, FEW, marks=pytest.mark.slow),
    ],
    ids=["few", "all", "dictionary"],
)
def test_a_live_engine_goes_back(tmp_path: Path, kind: str, world: int, cases: tuple[tuple[str, str], ...]) -> None:
    run_ranks(check_all_going_back, world, str(tmp_path), cases, kind, timeout=300.0)


@pytest.mark.parametrize("kind", MODELS)
def test_nor_in_plain_pytorch(kind: str) -> None:
    check_skip("local", "fp32", kind)


@pytest.mark.parametrize(("family", "objective"), PAIRS, ids=short)
def test_no_objective_ends_the_run_by_itself(
    family: ModuleType, objective: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not a number reaches the gradients, where all ranks see it."""
    _, model = built(family, objective)
    encode = model.family.encode_visual

    def spoilt(visual: Visual) -> Stream:
        stream = encode(visual)
        rows = torch.arange(len(stream.hidden))[:, None, None]
        return stream._replace(hidden=stream.hidden.masked_fill(rows == 1, torch.nan))

    if model.family.inputs.codes:  # visual words are whole numbers, so what is made of one is spoilt
        monkeypatch.setattr(model.family, "encode_visual", spoilt)
    batch = batch_of(model.family.config)  # type: ignore[arg-type]
    views = {view: visual._replace(feats=visual.feats.float()) for view, visual in batch.visual.items()}
    for visual in views.values():
        for tensor in (visual.feats, visual.boxes, visual.targets):
            if tensor is not None:
                tensor[1] = torch.nan
    made = model(replace(batch, visual=views), Moment(1))
    model.total(made.losses, {}).backward()
    norm = nn.utils.get_total_norm([each.grad for each in model.parameters() if each.grad is not None])
    assert not norm.isfinite()


# --- who may have done it ----------------------------------------------------------------------------------


def with_a_nan_from(model: PretrainModel, row: int) -> None:
    """Every linear map of the visual tower gives a NaN for one picture: no input is to blame."""

    def spoil(module: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> Tensor:
        spoilt = made.clone()
        spoilt[row] = torch.nan
        return spoilt

    convolution = next(part for part in model.family.modules() if isinstance(part, nn.Conv2d))
    convolution.register_forward_hook(spoil)


@pytest.mark.parametrize("kind", MODELS)
def test_the_sample_is_found_by_its_own_encoding(kind: str) -> None:
    model, shape = MODELS[kind]()
    batch = batch_for(shape.inputs, shape.vocab, 4)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert suspicions(model, batch, Moment(1)) == {}
    with_a_nan_from(model, row=2)
    reason = "the encoder makes of its visual.clean what is not finite"
    assert suspicions(model, batch, Moment(1)) == {2: reason}
    assert model.training
    moving.move(model.family)  # nothing was noted
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_what_a_sample_is_fed_comes_first() -> None:
    model, shape = with_twin_and_queues()
    (batch,) = micro_batches(shape, 1, poisoned=True)[1:]
    assert suspicions(model, batch, Moment(1)) == {1: "what it is fed holds nan"}
    pixels = batch.visual["clean"].feats.nan_to_num(nan=1e6)
    huge = replace(batch, visual={"clean": Visual(pixels)})
    assert suspicions(model, huge, Moment(1)) == {1: "what it is fed holds 1e+06"}


def test_a_message_names_a_few() -> None:
    suspect = {"key": "s\x1b1", "shard": "part.tar", "reason": "what it is fed holds nan"}
    found = [{"rank": 1, "micro_batch": 3, "losses": {"mlm": None}, "suspects": [suspect] * 6}]
    assert message(7, found) == (
        "step 7 is skipped: its gradients are not finite; suspected: "
        + "; ".join([r"sample 's\x1b1' of shard part.tar: what it is fed holds nan"] * 4)
        + " and 2 more; bad_steps.jsonl has the details"
    )
    found[0]["suspects"] = []
    assert "no sample stands out, but losses of micro-batch 3 of rank 1 are not finite;" in message(7, found)
    found[0]["losses"] = {"mlm": 1.0}
    assert "all losses are finite;" in message(7, found)


# --- how many a run stands ---------------------------------------------------------------------------------


def test_a_window_of_bad_steps() -> None:
    window = Window(NonFiniteConfig(budget=3, window=10))
    spent = []
    for step in (1, 5, 11, 14, 15, 30, 31):
        window.add(step)
        spent.append(window.spent())
        window = Window(NonFiniteConfig(budget=3, window=10), json.loads(json.dumps(window.state())))
    assert spent == [False, False, False, True, True, False, False]
    assert Window(NonFiniteConfig(budget=1)).spent() is False
    sentence = window.refusal(Path("runs/a/bad_steps.jsonl"))
    assert sentence.startswith("2 of the last 10 steps had gradients that are not finite")
    assert "the last was step 31; runs/a/bad_steps.jsonl names" in sentence


# --- fp16, whose loss scale answers ------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_is_not_answered() -> None:
    run_ranks(check_answers, 2)


def check_answers() -> None:
    """The NaN is another rank's."""

    def bad(loss: float, answered: bool, applied: bool = False) -> bool:
        value = loss if distributed.rank() else 1.0
        report = StepReport(math.nan, applied, 128.0, answered)
        return is_bad(report, [{"mlm": Loss(torch.tensor(1.0), {})}, {"mlm": Loss(torch.tensor(value), {})}])

    assert [bad(loss, True) for loss in (1.0, math.nan, math.inf)] == [False, True, True]
    assert bad(1.0, answered=False)
    assert not bad(math.nan, answered=False, applied=True)


class Scaled:
    """As much of an engine with dynamic loss scaling as `step` asks for; there is no fp16 on a CPU."""

    def __init__(self, scale: float, dynamic: bool = True, least: float = 1.0) -> None:
        self.optimizer = self
        self.param_groups: list[Any] = []
        self.skipped_steps = 0
        self.cur_scale = scale
        self.loss_scaler = SimpleNamespace(dynamic=dynamic, cur_scale=scale, min_scale=least)

    def step(self) -> None:
        if self.loss_scaler.dynamic and self.cur_scale == self.loss_scaler.min_scale:
            raise Exception("Current loss scale already at minimum - cannot decrease scale anymore. Exiting run.")
        self.skipped_steps += 1


@pytest.mark.parametrize(("scale", "dynamic", "answered"), [(2.0**16, True, True), (128.0, False, False)])
def test_an_overflow_that_the_loss_scale_answers_is_no_bad_step(scale: float, dynamic: bool, answered: bool) -> None:
    report = fp16_engine(Scaled(scale, dynamic)).step(0.1)
    assert (report.applied, report.answered, report.loss_scale) == (False, answered, scale)


def test_an_overflow_at_the_smallest_scale_ends_the_run() -> None:
    with pytest.raises(TrainingError, match=r"overflow fp16 even at the smallest loss scale \(1\)"):
        fp16_engine(Scaled(1.0)).step(0.1)


def fp16_engine(inner: Scaled) -> DeepSpeedEngine:
    engine = object.__new__(DeepSpeedEngine)
    vars(engine).update(_ds=inner, _optimizer=inner, stage=2, _fp16=True, _offload=False, dtype=torch.float16)
    return engine
