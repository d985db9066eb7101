"""The FLOP count against torch's own counter, and the table of peaks."""

from __future__ import annotations

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.models import albef_batch, albef_model
from vlscale.flops import peak_flops, step_flops
from vlscale.types import Moment


@pytest.mark.parametrize(("queue", "soften"), [(8, 0.4), (0, 0.0), (64, 0.0)])
def test_forward_equals_torchs_counter(queue: int, soften: float) -> None:
    model, batch = albef_model(queue=queue, soften=soften, layers=2), albef_batch()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(batch, Moment(2))
    assert step_flops(model, batch).forward == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_training_and_recomputation() -> None:
    model, batch = albef_model(), albef_batch()
    plain, full = step_flops(model, batch), step_flops(model, batch, "full")
    assert plain.hardware == plain.model
    assert plain.forward < plain.model < 3 * plain.forward  # the twin has no backward pass
    assert full.model < full.hardware < full.model + full.forward
    alone = albef_model(queue=0, soften=0.0)
    cheap = step_flops(alone, batch)
    assert 2.9 * cheap.forward < cheap.model <= 3 * cheap.forward


@pytest.mark.parametrize(
    ("device", "precision", "tera"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312.0),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 PCIe", "fp16", 756.0),
        ("NVIDIA H200", "fp32", 66.9),
        ("Tesla V100-SXM2-32GB", "fp16", 125.0),
        ("Tesla V100-SXM2-32GB", "bf16", None),
        ("NVIDIA L4", "bf16", 121.0),
        ("cpu", "fp32", None),
    ],
)
def test_peaks(device: str, precision: str, tera: float | None) -> None:
    assert peak_flops(device, precision) == (None if tera is None else tera * 1e12)
