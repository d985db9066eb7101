"""Every ZeRO stage makes the series that plain PyTorch makes, momentum twin, bounds and unused parameters included."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests import engines
from tests.distributed.spawn import run_ranks
from tests.models import batch_for
from tests.states import whole_weights
from vlscale import distributed, two_pass
from vlscale.engine import DeepSpeedEngine
from vlscale.families import albef, howto100m
from vlscale.local_engine import LocalEngine
from vlscale.model import PretrainModel, Task
from vlscale.objectives import itc, margin, mlm
from vlscale.optim import OptimConfig
from vlscale.types import IGNORE, Batch, Moment, Text, Visual

OPTIM = OptimConfig(lr=1e-2, weight_decay=0.1, clip=1.0)
STEPS = ("all", "words", "words", "contrast", "words", "all")  # tasks that leave parameters unused


def tiny_model() -> PretrainModel:
    torch.manual_seed(0)
    family = albef.build(replace(albef.tiny(), dropout=0.0))
    objectives = {
        "itc": itc.build(itc.Config(queue=12, soften=0.4), family),
        "mlm": mlm.build(mlm.Config(soften=0.4), family),
    }
    tasks = {"all": Task(("itc", "mlm")), "words": Task(("mlm",)), "contrast": Task(("itc",))}
    return PretrainModel(family, objectives, tasks)


def batch_of(model: PretrainModel, step: int, rank: int, size: int = 4) -> Batch:
    config = model.family.config  # type: ignore[attr-defined]
    draw = torch.Generator().manual_seed(100 * step + rank)
    ids = torch.randint(5, config.vocab, (size, 6), generator=draw)
    labels = torch.full_like(ids, IGNORE)
    labels[:, 2] = ids[:, 2]
    mask = torch.ones_like(ids, dtype=torch.bool)
    pixels = torch.randint(0, 256, (size, 3, config.image_size, config.image_size), generator=draw)
    return Batch(
        text={"clean": Text(ids, mask), "masked": Text(ids, mask, labels)},
        visual={"clean": Visual(pixels.to(torch.uint8))},
        pair_id=torch.arange(size) + size * rank,
        task=STEPS[step - 1],
    )


def series(engine: Any, ranks: list[int]) -> dict[str, list[float]]:
    """Losses, norms and twin of six steps; `ranks` are the micro-batches that this process takes."""
    out: dict[str, list[float]] = {"loss": [], "norm": [], "twin": []}
    for step in range(1, len(STEPS) + 1):
        losses, keys = [], []
        for number, rank in enumerate(ranks):
            batch = batch_of(engine.model, step, rank).to(engine.device)
            made = engine.forward(batch, Moment(step))
            loss = engine.model.total(made.losses, {})
            engine.backward(loss, last=number == len(ranks) - 1)
            losses.append(loss.detach())
            keys.append(made.keys)
        report = engine.step(1e-2)
        engine.model.commit(keys, step, "step")
        engine.after_step(0.9)
        total = distributed.sum_over_ranks({"loss": torch.stack(losses).mean()})["loss"]
        out["loss"].append(float(total) / distributed.world_size())
        out["norm"].append(report.grad_norm)
    weights = whole_weights(engine)
    out["twin"] = [float(w.float().norm()) for name, w in weights.items() if name.startswith("twin.")]
    out["online"] = [float(w.float().norm()) for name, w in weights.items() if name.startswith("family.")]
    return out


def configuration(name: str, precision: str, accumulation: int = 1) -> dict[str, Any]:
    batch = 4 * accumulation * distributed.world_size()
    return engines.configuration(name, batch, 4, OPTIM.clip, precision)


def deepspeed_series(name: str, precision: str) -> dict[str, list[float]]:
    engine = DeepSpeedEngine(tiny_model(), configuration(name, precision), OPTIM, distributed.init())
    return series(engine, [distributed.rank()])


def local_series(ranks: list[int], device: str = "cpu") -> dict[str, list[float]]:
    return series(LocalEngine(tiny_model(), OPTIM, torch.device(device), accumulation=len(ranks)), ranks)


def series_in_parts(name: str | None) -> list[list[float]]:
    """Losses and norms of three steps of two micro-batches, whose objectives see the whole step's batch. Those of
    HowTo100M have no parameter, and ALBEF's one."""
    out = []
    for family, objectives in (howto100m_parts(), albef_parts()):
        model = PretrainModel(family, objectives)
        accumulation = configuration(name, "fp32", accumulation=2) if name else {}
        if name:
            engine: Any = DeepSpeedEngine(model, accumulation, OPTIM, distributed.init())
        else:
            engine = LocalEngine(model, OPTIM, torch.device("cpu"), accumulation=2)
        found = []
        for step in range(1, 4):
            config = family.config
            batches = [batch_for(config.inputs, config.vocab, seed=10 * step + number) for number in range(2)]
            moments = [Moment(step, number=number, of=2) for number in range(2)]
            batches = [each.to(engine.device) for each in batches]
            made = two_pass.passes(model, engine, batches, moments, [{}, {}])
            found += [float(model.total(each.losses, {}).detach()) for each in made]
            found.append(engine.step(1e-2).grad_norm)
        out.append(found)
    return out


def howto100m_parts() -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    family = howto100m.build(howto100m.tiny())
    return family, {"margin": margin.build(margin.Config(scope="global"), family)}


def albef_parts() -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    family = albef.build(replace(albef.tiny(), dropout=0.0))
    own = {"mlm": mlm.build(mlm.Config(soften=0.0, scope="rank"), family)}
    return family, {"itc": itc.build(itc.Config(queue=0, soften=0.0, scope="global"), family), **own}


NOISE = {"fp32": 1e-5, "bf16": 1e-2}  # norms: AdamW moves a key's bias, whose gradient is rounding and no more
FP32 = ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")


@pytest.mark.parametrize("name", FP32)
def test_every_stage_equals_plain_pytorch_in_fp32(name: str) -> None:
    expected = local_series([0])
    (found,) = run_ranks(deepspeed_series, 1, name, "fp32")
    for key, values in expected.items():
        assert found[key] == pytest.approx(values, rel=1e-4, abs=NOISE["fp32"]), key


def test_a_step_in_parts_equals_plain_pytorch_at_every_stage() -> None:
    run_ranks(check_parts, 1)


def check_parts() -> None:
    expected = series_in_parts(None)
    for name in FP32:
        for found, right in zip(series_in_parts(name), expected, strict=True):
            assert found == pytest.approx(right, rel=1e-4), name


@pytest.mark.parametrize("name", FP32)
def test_two_ranks_agree_across_stages_and_in_bf16(name: str) -> None:
    first, second = run_ranks(deepspeed_series, 2, name, "bf16")
    assert first == second
    (reference, _) = run_ranks(deepspeed_series, 2, "zero0", "fp32")
    assert first["loss"] == pytest.approx(reference["loss"], rel=2e-2)
    assert first["twin"] == pytest.approx(reference["twin"], rel=2e-2, abs=NOISE["bf16"])
