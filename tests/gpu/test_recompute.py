"""Activation checkpointing on CUDA: the gradients of `none`, in less memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.gpu.test_engine import on_one_gpu
from tests.models import batch_for
from vlscale import distributed
from vlscale.engine import deepspeed_recompute
from vlscale.families import albef
from vlscale.model import PretrainModel
from vlscale.objectives import itm, mlm
from vlscale.recompute import MODES, set_activation_checkpointing
from vlscale.types import Moment

pytestmark = pytest.mark.gpu

SIZES = {"image_size": 64, "visual_width": 256, "visual_layers": 6, "visual_heads": 4, "visual_intermediate": 1024}
SIZES |= {"hidden": 256, "heads": 4, "intermediate": 1024, "text_layers": 3, "fusion_layers": 3}


def passes(mode: str, dropout: float, size: int = 64) -> tuple[int, dict[str, float]]:
    """Bytes that a forward and backward pass take on top of the weights, and the gradients' norms."""
    device = distributed.init()
    torch.manual_seed(0)
    config = replace(albef.tiny(), dropout=dropout, **SIZES)  # type: ignore[arg-type]
    family = albef.build(config)
    objectives = {"itm": itm.build(itm.Config(keys="online"), family), "mlm": mlm.build(mlm.Config(), family)}
    model = PretrainModel(family, objectives).to(device)
    set_activation_checkpointing(model, mode, deepspeed_recompute() if mode == "deepspeed" else None)
    batch = batch_for(config.inputs, config.vocab, size).to(device)
    for _ in range(2):  # the gradients exist before the second pass is measured
        model.zero_grad(set_to_none=False)
        torch.manual_seed(5)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        model.total(model(batch, Moment(2)).losses, {}).backward()  # type: ignore[no-untyped-call]
    peak = torch.cuda.max_memory_allocated(device) - before
    return peak, {name: float(each.grad.norm()) for name, each in model.named_parameters() if each.grad is not None}


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("mode", MODES[1:])
def test_the_gradients_of_none_in_less_memory(mode: str, dropout: float) -> None:
    most, expected = on_one_gpu(passes, "none", dropout)
    peak, found = on_one_gpu(passes, mode, dropout)
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert peak < (0.9 if mode == "selective" else 0.7) * most


def test_offload_keeps_least() -> None:
    assert on_one_gpu(passes, "offload", 0.0)[0] <= on_one_gpu(passes, "full", 0.0)[0]
