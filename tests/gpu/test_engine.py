"""The optimizer step on CUDA: every stage against plain PyTorch, fp16 with its loss scale, the fused update."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed.spawn import run_ranks
from tests.states import whole_weights
from tests.test_engine import (
    FP32,
    NOISE,
    OPTIM,
    batch_of,
    configuration,
    deepspeed_series,
    local_series,
    series,
    tiny_model,
)
from vlscale import distributed
from vlscale.engine import DeepSpeedEngine
from vlscale.local_engine import LocalEngine
from vlscale.types import Moment

pytestmark = pytest.mark.gpu

HUGE = (11, 12, 13)  # steps whose loss overflows
FIRST_SCALE = 2.0**16


def on_cuda(function: Any, *args: Any) -> Any:
    """On one rank per GPU, two at most; what each returned."""
    return run_ranks(function, min(2, torch.cuda.device_count()), *args, timeout=280.0, cuda=True)


def on_one_gpu(function: Any, *args: Any) -> Any:
    (found,) = run_ranks(function, 1, *args, timeout=280.0, cuda=True)
    return found


@pytest.mark.parametrize("name", FP32)
def test_every_stage_equals_plain_pytorch_in_fp32(name: str) -> None:
    expected = on_one_gpu(local_series, [0], "cuda")
    found = on_one_gpu(deepspeed_series, name, "fp32")
    for key, values in expected.items():
        assert found[key] == pytest.approx(values, rel=1e-4, abs=NOISE["fp32"]), key


@pytest.mark.parametrize("name", FP32)
def test_stages_agree_in_bf16(name: str) -> None:
    found = on_cuda(deepspeed_series, name, "bf16")
    reference = on_cuda(deepspeed_series, "zero0", "fp32")[0]
    for key in ("loss", "twin"):
        assert found[0][key] == found[-1][key]
        assert found[0][key] == pytest.approx(reference[key], rel=2e-2, abs=NOISE["bf16"]), key


def scaled_series(name: str) -> dict[str, list[float]]:
    """63 steps on one batch, three of which overflow."""
    engine = DeepSpeedEngine(tiny_model(), configuration(name, "fp16"), OPTIM, distributed.init())
    out: dict[str, list[float]] = {"loss": [], "scale": [], "applied": [], "weights": []}
    for step in range(1, 64):
        batch = batch_of(engine.model, 1, distributed.rank()).to(engine.device)
        made = engine.forward(batch, Moment(step))
        loss = engine.model.total(made.losses, {})
        engine.backward(loss * (1e30 if step in HUGE else 1.0), last=True)
        engine.model.commit([made.keys], step, "step")
        report = engine.step(1e-3)
        if report.applied:
            engine.after_step(0.9)
        out["loss"].append(float(loss.detach()))
        out["scale"].append(report.loss_scale or 0.0)
        out["applied"].append(float(report.applied))
        whole = (weight.double().norm() for name, weight in whole_weights(engine).items() if name.startswith("family."))
        out["weights"].append(float(torch.stack(list(whole)).sum()))
    return out


@pytest.mark.parametrize("name", ["zero2_fp16", "zero3_fp16"])
def test_fp16_scales_its_loss(name: str) -> None:
    ranks = on_cuda(scaled_series, name)
    for found in ranks:
        assert found["scale"][0] == FIRST_SCALE
        before, first, last = HUGE[0] - 2, HUGE[0] - 1, HUGE[-1] - 1  # places of steps counted from 1
        assert found["applied"][first : last + 1] == [0.0] * len(HUGE)
        assert found["weights"][first : last + 1] == [found["weights"][before]] * len(HUGE)
        assert found["scale"][last] <= found["scale"][before] / 2
        assert found["applied"][last + 1 :].count(1.0) > 40  # it recovers
        assert found["weights"][-1] != found["weights"][before]
        assert sum(found["loss"][-5:]) / 5 < 0.8 * sum(found["loss"][:5]) / 5
    assert ranks[0]["applied"] == ranks[-1]["applied"]
    assert ranks[0]["scale"] == ranks[-1]["scale"]


def optimizer_calls(name: str) -> tuple[bool, list[str]]:
    """Whether the groups ask for the fused update, and the operations of a step that name it."""
    engine = DeepSpeedEngine(tiny_model(), configuration(name, "bf16"), OPTIM, distributed.init())
    batch = batch_of(engine.model, 1, 0).to(engine.device)
    engine.backward(engine.model.total(engine.forward(batch, Moment(1)).losses, {}), last=True)
    with torch.profiler.profile() as profile:
        engine.step(1e-3)
    calls = [event.key for event in profile.key_averages() if "adamw" in event.key]
    return all(group["fused"] for group in engine.deepspeed.optimizer.param_groups), calls


@pytest.mark.parametrize("name", ["zero0", "zero2", "zero3"])
def test_the_update_is_fused(name: str) -> None:
    asked, calls = on_one_gpu(optimizer_calls, name)
    assert asked
    assert any("_fused_adamw_" in call for call in calls), calls


def compiled_series(compiled: bool) -> dict[str, list[float]]:
    """Plain PyTorch in fp32 with every trained block compiled, or not."""
    from vlscale.nn.transformer import Stack

    model = tiny_model()
    for stack in model.family.modules():
        if compiled and isinstance(stack, Stack):
            for block in stack.blocks.values():
                block.compile()
    return series(LocalEngine(model, OPTIM, distributed.init()), [0])


def test_compiled_blocks_give_the_same() -> None:
    plain, compiled = on_one_gpu(compiled_series, False), on_one_gpu(compiled_series, True)
    for key, values in plain.items():
        assert compiled[key] == pytest.approx(values, rel=1e-3, abs=1e-5), key
