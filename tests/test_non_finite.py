"""A step whose gradients are not finite: skipped by all ranks, without a trace, told and counted."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.spawn import run_ranks
from tests.models import albef_model, batch_for
from vlscale import config, distributed, ds_config
from vlscale.config import RunConfig
from vlscale.engine import DeepSpeedEngine
from vlscale.families import albef, soho
from vlscale.local_engine import LocalEngine
from vlscale.model import PretrainModel
from vlscale.objectives import itm, mlm, mvm
from vlscale.train import one_step
from vlscale.types import Batch

FILES = Path(__file__).parent.parent / "ds_configs"
STAGES = ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
MICRO_BATCHES = 2  # per rank and step
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
    path = str(FILES / f"{name}.json")
    tree = ds_config.for_device(ds_config.load(path), path, torch.cuda.is_available())
    if precision == "fp32":
        tree = {key: value for key, value in tree.items() if key not in ("bf16", "data_types")}
    ranks = distributed.world_size()
    decided = ds_config.Decided("test", 4 * MICRO_BATCHES * ranks, 4, run.optim.clip)
    return DeepSpeedEngine(model, ds_config.merge(tree, path, decided, ranks), run.optim, distributed.init())


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
    run = config.load(
        "quickstart", ["optim.warmup=0", "steps=10", "momentum.coefficient=0.9", "optim.lr=0.001", "optim.scale={}"]
    )
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


ALL = tuple((name, precision) for name in STAGES for precision in ("fp32", "bf16"))
FEW = (("zero0", "fp32"), ("zero1", "bf16"), ("zero3", "bf16"), ("zero2_offload", "bf16"))


def test_a_skipped_step_changes_nothing() -> None:
    run_ranks(check_all, 2, FEW, "twin and queues")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "world"), [("twin and queues", 2), ("dictionary", 1)])
def test_a_skipped_step_changes_nothing_at_any_stage(kind: str, world: int) -> None:
    run_ranks(check_all, world, tuple(set(ALL) - set(FEW)) if world > 1 else ALL, kind, timeout=240.0)


@pytest.mark.parametrize("kind", MODELS)
def test_nor_in_plain_pytorch(kind: str) -> None:
    check_skip("local", "fp32", kind)
