"""W ranks at every ZeRO stage equal one process on the joined batch: losses, gradients, twin, queues."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.spawn import run_ranks
from tests.models import batch_for
from tests.runs import losses, run_whole
from vlscale import distributed, ds_config, two_pass
from vlscale.engine import DeepSpeedEngine, Engine, LocalEngine
from vlscale.families import albef
from vlscale.model import PretrainModel
from vlscale.objectives import itc, itm, mlm
from vlscale.optim import OptimConfig
from vlscale.types import Batch, Moment, Text, Visual

FILES = Path(__file__).parents[2] / "ds_configs"
OPTIM = OptimConfig(lr=1e-2, weight_decay=0.1, clip=1.0, eps=1e-2)  # a small eps turns rounding into moves of lr
TOGETHER = 8  # samples per step
NOISE = 1e-7  # a key's bias adds the same to every score of a query: its gradient is rounding and no more
CANCELS = 3e-5  # the temperature's gradient is a difference of sums of about 100 each


def albef_like(**options: Any) -> PretrainModel:
    family = _family()
    objectives = {
        "itc": itc.build(itc.Config(queue=20, scope="global", **options), family),
        "itm": itm.build(itm.Config(scope="global"), family),
        "mlm": mlm.build(mlm.Config(), family),
    }
    return PretrainModel(family, objectives)


def clip_like() -> PretrainModel:
    family = _family()
    return PretrainModel(family, {"itc": itc.build(itc.Config(queue=0, soften=0.0, scope="global"), family)})


MODELS: dict[str, Callable[[], PretrainModel]] = {
    "albef": albef_like,
    "albef, sharded queue": lambda: albef_like(queue_store="sharded", queue_start="empty"),
    "albef, same pictures apart": lambda: albef_like(queue_store="sharded", same_picture="excluded"),
    "albef, same pictures shared": lambda: albef_like(queue_store="sharded", same_picture="positive"),
    "clip": clip_like,
}


def _family() -> albef.Albef:
    torch.manual_seed(0)
    return albef.build(replace(albef.tiny(), dropout=0.0))


def part(batch: Batch, rows: slice) -> Batch:
    def cut(value: Any) -> Any:
        return value[rows] if isinstance(value, Tensor) else value

    return replace(
        batch,
        text={view: Text(*map(cut, fields)) for view, fields in batch.text.items()},
        visual={view: Visual(*map(cut, fields)) for view, fields in batch.visual.items()},
        pair_id=batch.pair_id[rows],
    )


def micro_batches(step: int, number: int) -> list[Batch]:
    """This rank's micro-batches of a step, in global order: micro-batch by micro-batch, rank by rank."""
    config = albef.tiny()
    whole = batch_for(config.inputs, config.vocab, TOGETHER, seed=step)
    whole = replace(whole, pair_id=torch.randint(0, 9, (TOGETHER,), generator=torch.Generator().manual_seed(step)))
    ranks, size = distributed.world_size(), TOGETHER // number // distributed.world_size()
    first = [(each * ranks + distributed.rank()) * size for each in range(number)]
    return [part(whole, slice(start, start + size)) for start in first]


def one_step(engine: Engine, step: int, number: int) -> tuple[float, dict[str, Tensor]]:
    """(mean loss over ranks and micro-batches, gradient of every parameter)."""
    model, batches = engine.model, micro_batches(step, number)
    moments = [Moment(step, 5, each, number) for each in range(number)]
    counts = [model.counts(batch) for batch in batches]
    whole = distributed.sum_over_ranks({name: sum(count[name] for count in counts) for name in counts[0]})  # type: ignore[misc]
    passes = number * distributed.world_size()
    shares = [{name: (value * passes / whole[name]).float() for name, value in count.items()} for count in counts]
    if number > 1:
        made = two_pass.passes(model, engine, batches, moments, shares)
    else:
        made = [engine.forward(batches[0], moments[0])]
        engine.backward(model.total(made[0].losses, shares[0]), last=True)
    total = sum(model.total(each.losses, share).detach().double() for each, share in zip(made, shares, strict=True))
    found = gradients(engine)
    engine.step(1e-2)
    model.commit([each.keys for each in made], step, "step")
    engine.after_step(0.9)
    return float(distributed.sum_over_ranks({"loss": total})["loss"]) / passes, found  # type: ignore[dict-item]


def gradients(engine: Engine) -> dict[str, Tensor]:
    """Averaged over ranks and micro-batches, before clipping."""
    from deepspeed.utils import safe_get_full_grad

    found = {}
    for name, parameter in engine.model.named_parameters():
        if parameter.requires_grad:
            gradient = safe_get_full_grad(parameter) if isinstance(engine, DeepSpeedEngine) else parameter.grad
            found[name] = torch.zeros(1) if gradient is None else gradient.detach().clone()
    return found


def series(engine: Engine, steps: int, number: int = 1) -> dict[str, Any]:
    """Losses of all steps, the last step's gradients, and the weights, twin and queues after it."""
    losses, found = zip(*(one_step(engine, step, number) for step in range(1, steps + 1)), strict=True)
    return {"loss": losses, "gradients": found[-1], "state": dict(engine.weights())}


def on_a_rank(stage: str, steps: int, names: list[str], number: int = 1) -> dict[str, dict[str, Any]]:
    path = str(FILES / f"{stage}.json")
    tree = ds_config.for_device(ds_config.load(path), path, cuda=False)
    tree.pop("bf16", None)
    tree.pop("data_types", None)
    ranks = distributed.world_size()
    decided = ds_config.Decided("test", TOGETHER, TOGETHER // ranks // number, OPTIM.clip)
    config = ds_config.merge(tree, path, decided, ranks)
    device = torch.device("cpu")
    return {name: series(DeepSpeedEngine(MODELS[name](), config, OPTIM, device), steps, number) for name in names}


def check(world: int, stage: str, steps: int, names: list[str], number: int = 1) -> None:
    found = run_ranks(on_a_rank, world, stage, steps, names, number, timeout=400)
    for name in names:
        expected = series(LocalEngine(MODELS[name](), OPTIM, torch.device("cpu")), steps)
        for each in found:
            assert each[name]["loss"] == pytest.approx(expected["loss"], rel=1e-6), name
            assert each[name]["gradients"].keys() == expected["gradients"].keys()
            for key, value in expected["gradients"].items():
                difference = float((each[name]["gradients"][key] - value).norm())
                slack = CANCELS if "temperature" in key else NOISE
                assert difference <= 1e-5 * float(value.norm()) + slack, f"{name}: {key}"
            assert each[name]["state"].keys() == expected["state"].keys()
            for key, value in expected["state"].items():
                torch.testing.assert_close(each[name]["state"][key], value, rtol=1e-5, atol=2e-6, msg=f"{name}: {key}")


@pytest.mark.parametrize("stage", ["zero0", "zero3"])
def test_two_ranks_equal_one(stage: str) -> None:
    check(2, stage, 5, list(MODELS))


@pytest.mark.parametrize("stage", ["zero1", "zero2", "zero3"])
def test_two_micro_batches_on_two_ranks_equal_one_batch(stage: str) -> None:
    check(2, stage, 4, ["albef", "clip"], number=2)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero0", "zero1", "zero2", "zero3"])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_fifty_steps_on_any_number_of_ranks_equal_one_process(world: int, stage: str) -> None:
    check(world, stage, 50, list(MODELS))


@pytest.mark.slow
def test_quickstart_makes_one_series_on_one_two_and_four_processes(tmp_path: Path) -> None:
    options = ("steps=20", "logging.every=1", "evaluation.every=0", "evaluation.limit=16")
    series = []
    for world in (1, 2, 4):
        out = tmp_path / str(world)
        run_whole(world, out, "--ds_config", "ds_configs/fp32.json", *options, shrunk=False)
        series.append(losses(out))
    assert len(series[0]) == 20
    for other in series[1:]:
        assert other == pytest.approx(series[0], abs=1e-4)
