"""A run goes on from what another number of ranks wrote at another ZeRO stage: every tensor equal to the bit."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests import test_soho, test_uniter
from tests.distributed import toy_twin
from tests.distributed.spawn import run_ranks
from tests.distributed.toy_twin import Agree, Options, Toy
from tests.models import albef_batch, albef_model
from tests.states import equal, whole, whole_weights, write
from vlscale import distributed, ds_config
from vlscale.engine import DeepSpeedEngine, Engine
from vlscale.errors import CheckpointError
from vlscale.local_engine import LocalEngine
from vlscale.model import PretrainModel
from vlscale.nn.queue import QueueOptions
from vlscale.optim import OptimConfig
from vlscale.saving import disk, pieces
from vlscale.saving.pieces import Piece, Reader
from vlscale.train import one_step
from vlscale.types import DTYPES, Batch, Keys, Moment

TOY = Options()
STAGES = ("zero0", "zero1", "zero2", "zero3")
OPTIM = OptimConfig(weight_decay=0.1, eps=1e-4, clip=1.0)
LAMB = OptimConfig("lamb", weight_decay=0.1, clip=1.0)
slow = pytest.mark.slow


class Remembers(Agree):
    """Two queues, one of them in parts on the ranks, and figures that each rank has of its own."""

    seen: Tensor  # [] fp32
    steps: Tensor  # [2] int64

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.width = width
        self.register_buffer("seen", torch.rand(()))
        self.register_buffer("steps", torch.zeros(2, dtype=torch.int64))

    def queues(self) -> dict[str, tuple[QueueOptions, int]]:
        sharded = QueueOptions(20, "empty", "sharded")
        return {"sharded": (sharded, self.width), "replicated": (QueueOptions(12, "random"), self.width)}

    def keys(self, enc: Any, batch: Batch, shared: tuple[Tensor, ...] = ()) -> dict[str, Keys]:
        keys = F.normalize(enc.momentum.visual("clean").hidden.detach().float(), dim=1)
        return {"sharded": Keys(keys, batch.pair_id, False), "replicated": Keys(keys, None, False)}


def model_of(frozen: bool = False, seed: int = 0) -> PretrainModel:
    torch.manual_seed(10 * seed + distributed.world_size())  # what is not handed over differs
    return PretrainModel(Toy(replace(TOY, frozen=frozen)), {"agree": Remembers(TOY.width)})


def engine_of(
    stage: str, precision: str, optim: OptimConfig = OPTIM, frozen: bool = False, seed: int = 0
) -> DeepSpeedEngine:
    config = toy_twin.configuration(stage, precision)
    if ds_config.stage(config) == 3:  # matrices are cut, biases are kept whole on every rank
        zero = {**config["zero_optimization"], "stage3_param_persistence_threshold": 4 * TOY.width}
        config["zero_optimization"] = zero
    return DeepSpeedEngine(model_of(frozen, seed), config, optim, distributed.init())


def train(engine: Engine, steps: range) -> list[float]:
    """Losses of this rank."""
    losses = []
    for step in steps:
        batch = toy_twin.batch_of(TOY, step, distributed.rank(), distributed.world_size())
        made = engine.forward(batch, Moment(step))
        loss = engine.model.total(made.losses, {})
        losses.append(float(loss.detach()))
        engine.backward(loss, last=True)
        assert engine.step(1e-2).applied
        engine.model.commit([made.keys], step, "step")
        engine.after_step(0.9)
        agree: Any = engine.model.objectives["agree"]
        agree.seen.add_(distributed.rank() + 0.1)
        agree.steps.add_(distributed.rank() + 1)
    return losses


def weights_are_rounded_masters(engine: DeepSpeedEngine, folder: Path, dtype: torch.dtype) -> None:
    """On this rank, each whole parameter."""
    wanted = pieces.weights(Reader(folder), dtype)
    own = dict(engine.model.named_parameters())
    for name, found in whole_weights(engine).items():
        assert name not in own or (found.dtype == dtype and torch.equal(found, wanted[name])), name


def begin(root: Path, precision: str) -> None:
    """Each stage trains two steps and writes what it has."""
    for stage in STAGES:
        engine = engine_of(stage, precision)
        train(engine, range(1, 3))
        write(engine, root / f"{stage}_{distributed.world_size()}")


def go_on(root: Path, precision: str) -> None:
    """Each stage goes on from everything that was written, and writes it again."""
    for stage in STAGES:
        engine = engine_of(stage, precision)
        for folder in sorted(root.glob("zero?_?")):
            engine.restore(Reader(folder), {})
            again = root / f"{folder.name}_to_{stage}_{distributed.world_size()}"
            write(engine, again)
            weights_are_rounded_masters(engine, folder, DTYPES[precision])


def check_matrix(root: Path, first: str, second: str, worlds: tuple[int, ...]) -> None:
    for world in worlds:
        run_ranks(begin, world, root, first, timeout=300)
    for world in worlds:
        run_ranks(go_on, world, root, second, timeout=300)
    origins = {folder.name: whole(folder) for folder in root.glob("zero?_?")}
    handed = list(root.glob("*_to_*"))
    assert len(handed) == (len(STAGES) * len(worlds)) ** 2
    for folder in handed:
        equal(whole(folder), origins[folder.name.split("_to_")[0]])


def test_every_stage_and_number_of_ranks_goes_on_from_every_other(tmp_path: Path) -> None:
    check_matrix(tmp_path, "bf16", "bf16", (1, 2))


@slow
@pytest.mark.parametrize(("first", "second"), [("fp32", "fp32"), ("bf16", "fp32"), ("fp32", "bf16")])
def test_precisions_too(first: str, second: str, tmp_path: Path) -> None:
    check_matrix(tmp_path, first, second, (2,))


def leg(root: Path, stage: str, before: str | None, name: str, steps: int) -> list[float]:
    """Go on from one folder and write it again; after some more steps write the next; the losses."""
    engine = engine_of(stage, "bf16")
    done = 0
    if before:
        engine.restore(Reader(root / before), {})
        write(engine, root / f"{before}_again")
        done = int(engine.model.get_buffer("queues.replicated.entered").max())
    losses = train(engine, range(done + 1, done + 1 + steps))
    write(engine, root / name)
    return losses


@slow
def test_four_ranks_then_two_then_one_then_four(tmp_path: Path) -> None:
    run_ranks(leg, 4, tmp_path, "zero3", None, "start", 0)
    (through,) = run_ranks(leg, 1, tmp_path, "zero0", "start", "end", 12)
    legs = (("zero3", 4, "start", "a"), ("zero1", 2, "a", "b"), ("zero0", 1, "b", "c"), ("zero3", 4, "c", "d"))
    joined = []
    for stage, world, before, name in legs:
        losses = run_ranks(leg, world, tmp_path, stage, before, name, 3)
        joined += [sum(ranks) / world for ranks in zip(*losses, strict=True)]
        equal(whole(tmp_path / f"{before}_again"), whole(tmp_path / before))
    assert joined == pytest.approx(through, rel=1e-2)  # as if nothing had happened, but for roundings


def resumed(root: Path, stage: str, precision: str, optim: OptimConfig, frozen: bool) -> None:
    """Six steps; and three, a new engine and three more."""
    first = engine_of(stage, precision, optim, frozen)
    train(first, range(1, 4))
    scalars = write(first, root / "half")
    losses = train(first, range(4, 7))
    write(first, root / "through")
    second = engine_of(stage, precision, optim, frozen, seed=1)
    second.restore(Reader(root / "half"), scalars)
    assert second.deepspeed.global_steps == 3
    assert train(second, range(4, 7)) == losses
    assert write(second, root / "again") == first.scalars()


@pytest.mark.parametrize(
    ("stage", "precision", "optim", "frozen"),
    [
        ("zero3", "bf16", LAMB, False),
        ("zero1", "bf16", OPTIM, True),
        *(pytest.param(stage, "bf16", OPTIM, False, marks=slow) for stage in STAGES),
        pytest.param("zero2_offload", "bf16", OPTIM, False, marks=slow),
        pytest.param("zero3_offload", "bf16", LAMB, False, marks=slow),
        pytest.param("zero3", "fp32", OPTIM, True, marks=slow),
        pytest.param("zero2", "fp32", LAMB, False, marks=slow),
    ],
)
def test_a_new_engine_goes_on_as_if_nothing_had_happened(
    stage: str, precision: str, optim: OptimConfig, frozen: bool, tmp_path: Path
) -> None:
    run_ranks(resumed, 2, tmp_path, stage, precision, optim, frozen)
    equal(whole(tmp_path / "again"), whole(tmp_path / "through"))


def no_step_made(root: Path) -> dict[str, tuple[list[float], list[float]]]:
    """{stage: (its losses from what ZeRO 0 wrote before any step counted, its own from the same start)}."""
    first = engine_of("zero0", "bf16")
    write(first, root / "zero0")
    for step in (1, 2):
        skipped(first, step)
    write(first, root / "skipped")
    losses = {}
    for stage in STAGES[1:]:
        skips, handed, own = (engine_of(stage, "bf16", seed=seed) for seed in (1, 1, 0))
        skips.restore(Reader(root / "skipped"), {})
        skipped(skips, 1)
        write(skips, root / f"{stage}_skipped")
        handed.restore(Reader(root / f"{stage}_skipped"), {})
        write(handed, root / stage)
        losses[stage] = train(handed, range(1, 4)), train(own, range(1, 4))
    return losses


def skipped(engine: DeepSpeedEngine, step: int) -> None:
    """A step whose gradients are not finite."""
    batch = toy_twin.batch_of(TOY, step, distributed.rank(), distributed.world_size())
    made = engine.forward(batch, Moment(step))
    engine.backward(engine.model.total(made.losses, {}) * torch.nan, last=True)
    assert not engine.step(1e-2).applied


@slow
def test_before_any_step_counted(tmp_path: Path) -> None:
    for losses in run_ranks(no_step_made, 2, tmp_path):
        for stage, (handed, own) in losses.items():
            assert handed == own, stage
    for name in ("skipped", *(f"{stage}{kind}" for stage in STAGES[1:] for kind in ("_skipped", ""))):
        equal(whole(tmp_path / name), whole(tmp_path / "zero0"))


MODELS: dict[str, tuple[Callable[[], PretrainModel], Callable[..., Batch], tuple[str, ...]]] = {
    "albef": (lambda: albef_model(dropout=0.1), albef_batch, ("all",)),  # twin and queues
    "soho": (lambda: test_soho.model_of(live_statistics=True), test_soho.batch_of, ("all",)),  # dictionary, BatchNorm
    "uniter": (test_uniter.task_model, test_uniter.batch_of, test_uniter.STEPS),  # one task per step
}


def family_steps(engine: Engine, name: str, steps: range) -> list[float]:
    """Gradient norms of steps of the loop."""
    _, batch_of, tasks = MODELS[name]
    moves = SimpleNamespace(coefficient=0.9, schedule="constant", drop_layers=0.0)
    run: Any = SimpleNamespace(seed=0, steps=9, optim=replace(OPTIM, lr=1e-2), momentum=moves)
    norms = []
    for step in steps:
        batch = replace(batch_of(seed=10 * step + distributed.rank()), task=tasks[step % len(tasks)])
        norms.append(one_step(run, engine.model, engine, distributed.StepPlans(), step, [batch]).report.grad_norm)
    return norms


def family_resumed(root: Path, name: str, stage: str) -> None:
    """Six steps; and three, a new engine and three more."""

    def engine() -> DeepSpeedEngine:
        return DeepSpeedEngine(MODELS[name][0](), toy_twin.configuration(stage, "bf16"), OPTIM, distributed.init())

    first = engine()
    family_steps(first, name, range(1, 4))
    scalars = write(first, root / "half")
    norms = family_steps(first, name, range(4, 7))
    write(first, root / "through")
    second = engine()
    second.restore(Reader(root / "half"), scalars)
    assert family_steps(second, name, range(4, 7)) == norms
    write(second, root / "again")


@slow
@pytest.mark.parametrize(("name", "stage"), [("albef", "zero3"), ("soho", "zero2"), ("uniter", "zero3")])
def test_a_family_goes_on_as_if_nothing_had_happened(name: str, stage: str, tmp_path: Path) -> None:
    run_ranks(family_resumed, 2, tmp_path, name, stage)
    found = whole(tmp_path / "again")
    equal(found, whole(tmp_path / "through"))
    kinds = {each.split("/")[0] for each in found}
    assert kinds >= {"master", "exp_avg", "exp_avg_sq", "step"}
    assert ("ring" in kinds) == (name == "albef")
    assert ("buffer/family.dictionary.table" in found) == (name == "soho")


def test_plain_pytorch_and_deepspeed_go_on_from_each_other(tmp_path: Path) -> None:
    local = LocalEngine(model_of(), OPTIM, torch.device("cpu"))
    train(local, range(1, 4))
    write(local, tmp_path / "local")
    run_ranks(passed_on, 2, tmp_path / "local", tmp_path / "zero2")
    again = LocalEngine(model_of(), OPTIM, torch.device("cpu"))
    again.restore(Reader(tmp_path / "zero2"), {})
    write(again, tmp_path / "again")
    for name in ("zero2", "again"):
        equal(whole(tmp_path / name), whole(tmp_path / "local"))


def passed_on(before: Path, after: Path) -> None:
    engine = engine_of("zero2", "bf16")
    engine.restore(Reader(before), {})
    write(engine, after)


def local_checkpoint(folder: Path, change: Callable[[Piece], Piece | None] = lambda piece: piece) -> Reader:
    """One step of plain PyTorch, written with something wrong in it."""
    engine = LocalEngine(model_of(), OPTIM, torch.device("cpu"))
    train(engine, range(1, 2))
    folder.mkdir(exist_ok=True)
    with (folder / pieces.file_of(0)).open("wb") as file:
        pieces.write(file, [changed for piece in engine.pieces() if (changed := change(piece))])
    return Reader(folder)


@pytest.mark.parametrize(
    ("gone", "says"),
    [
        ("master/family.entry.weight", "holds no tensor 'master/family.entry.weight'; it is of another model"),
        ("ring/queues.sharded.ids", "holds no tensor"),
        ("ranks/objectives.agree.seen", "holds no tensor"),
    ],
)
def test_what_is_gone_is_named(gone: str, says: str, tmp_path: Path) -> None:
    reader = local_checkpoint(tmp_path, lambda piece: None if piece.name == gone else piece)
    with pytest.raises(CheckpointError, match=says):
        LocalEngine(model_of(), OPTIM, torch.device("cpu")).restore(reader, {})


def test_what_the_optimizer_lacks_is_named(tmp_path: Path) -> None:
    """On both ranks, though one alone wants it."""
    local_checkpoint(tmp_path, lambda piece: None if piece.name == "exp_avg/family.exit.bias" else piece)
    for says in run_ranks(refused, 2, tmp_path):
        assert "holds no tensor 'exp_avg/family.exit.bias'" in says


def refused(before: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        engine_of("zero2", "bf16").restore(Reader(before), {})
    return str(caught.value)


def test_what_is_of_another_shape_or_model_is_named(tmp_path: Path) -> None:
    engine = LocalEngine(model_of(), OPTIM, torch.device("cpu"))

    def cut(piece: Piece) -> Piece:
        return replace(piece, shape=(1, 49)) if piece.name == "master/family.entry.weight" else piece

    with pytest.raises(CheckpointError, match=r"of shape \(1, 49\), but in this run it is \(7, 7\)"):
        engine.restore(local_checkpoint(tmp_path, cut), {})

    def named(piece: Piece) -> Piece:
        return replace(piece, name="master/family.other") if piece.name == "master/family.entry.bias" else piece

    with pytest.raises(CheckpointError, match=r"'master/family.other', for which this run's model has no place"):
        engine.restore(local_checkpoint(tmp_path, named), {})


def test_nothing_is_copied_and_equal_shares_are_written(tmp_path: Path) -> None:
    for held in run_ranks(shares, 2):
        assert held["copied"] == []
        assert held["bytes"] == pytest.approx(held["whole"] / 2, rel=0.02)
        assert held["whole"] - held["counts"] == held["planned"]


def shares() -> dict[str, Any]:
    engine = engine_of("zero0", "bf16")
    train(engine, range(1, 2))
    own = engine.pieces()
    live = [*engine.model.parameters(), *engine.model.buffers(), *(span.flat for span in engine._spans)]
    live += [each for state in engine._optimizer.optimizer.state.values() for each in state.values()]
    live += engine._averages.averages
    storages = {each.untyped_storage().data_ptr() for each in live}
    sizes = [piece.values.nbytes for piece in own]
    counts = sum(piece.values.nbytes for piece in own if piece.name.startswith("step/"))
    whole = distributed.sum_over_ranks({"all": torch.tensor(float(sum(sizes))), "counts": torch.tensor(float(counts))})
    return {
        "copied": [piece.name for piece in own if piece.values.untyped_storage().data_ptr() not in storages],
        "bytes": sum(sizes),
        "whole": float(whole["all"]),
        "counts": float(whole["counts"]),
        "planned": disk.checkpoint_bytes(engine.model, OPTIM),
    }


@pytest.mark.parametrize("stage", ["zero2", "zero0"])
def test_the_loss_scale_of_fp16_is_kept(stage: str) -> None:
    """DeepSpeed refuses fp16 on a CPU: its scalers, in the place where it has them on a GPU."""
    run_ranks(scaled, 1, stage)


def scaled(stage: str) -> None:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaleConfig

    settings = {"init_scale": 1024.0, "scale_window": 2, "min_scale": 1.0, "delayed_shift": 2}

    def engine() -> DeepSpeedEngine:
        made = engine_of(stage, "bf16")
        made._fp16 = True
        own = made._optimizer
        if stage == "zero0":
            own.loss_scale_config = LossScaleConfig(torch.float16, True, 1.0, settings)
        else:
            own.loss_scaler = DynamicLossScaler(**settings, consecutive_hysteresis=False)
        return made

    first, second = engine(), engine()
    first._scaler().update(cur_scale=64.0, cur_iter=7, last_overflow_iter=5)
    scalars = json.loads(json.dumps(first.scalars()))
    write(first, folder := Path(tempfile.mkdtemp()))
    second.restore(Reader(folder), scalars)
    shutil.rmtree(folder)
    assert second._scaler() == first._scaler()
    assert second.scalars() == first.scalars()
    assert first.scalars()["loss_scale"]["cur_scale"] == 64.0
