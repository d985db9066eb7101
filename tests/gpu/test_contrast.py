"""The contrastive core on CUDA: similarities, queues, and steps of several micro-batches in every precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.distributed.test_whole_batch import CASES, OPTIM, series
from tests.engines import FILES
from tests.gpu.test_engine import on_one_gpu
from vlscale import distributed, ds_config
from vlscale.engine import DeepSpeedEngine
from vlscale.nn import contrast
from vlscale.nn.queue import KeyQueue, QueueOptions

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_sum_exp_and_its_gradients(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rows = F.normalize(torch.randn(256, 128, device="cuda"), dim=1).requires_grad_()
    columns = F.normalize(torch.randn(40000, 128, device="cuda"), dim=1).to(dtype).requires_grad_()
    temperature = torch.full((1,), 0.07, device="cuda", requires_grad=True)
    inputs = [rows, columns, temperature]
    found, best = contrast.log_sum_exp(rows, columns, temperature)
    wide = [each.detach().double().requires_grad_() for each in inputs]
    logits = wide[0] @ wide[1].T / wide[2]
    torch.testing.assert_close(found.double(), logits.logsumexp(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(best.double(), logits.amax(1), rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(found.sum(), inputs)
    expected = torch.autograd.grad(logits.logsumexp(1).sum(), wide)
    for ours, theirs in zip(gradients, expected, strict=True):
        bound = (1e-2 if ours.dtype == torch.bfloat16 else 1e-4) * float(theirs.norm())
        assert float((ours.double() - theirs).norm()) <= bound


def test_a_global_batch_takes_little_memory() -> None:
    rows = F.normalize(torch.randn(512, 512, device="cuda"), dim=1).requires_grad_()
    columns = F.normalize(torch.randn(32768, 512, device="cuda"), dim=1).requires_grad_()
    temperature = torch.full((1,), 0.07, device="cuda", requires_grad=True)
    torch.autograd.grad(contrast.log_sum_exp(rows, columns, temperature)[0].sum(), [rows, columns, temperature])
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    made = torch.autograd.grad(contrast.log_sum_exp(rows, columns, temperature)[0].sum(), [rows, columns, temperature])
    kept = sum(each.numel() * each.element_size() for each in made)
    assert torch.cuda.max_memory_allocated() - before - kept <= 64 * 2**20


def test_a_queue_moves_on_the_device() -> None:
    options = QueueOptions(queue=100, queue_start="empty", queue_dtype="bf16")
    here, there = KeyQueue(options, 8), KeyQueue(options, 8).cuda()
    for step, size in enumerate((30, 30, 60, 7), start=1):
        keys = F.normalize(torch.randn(size, 8), dim=1)
        here.push(keys, torch.arange(size), step)
        there.push(keys.cuda(), torch.arange(size).cuda(), step)
    for name, buffer in here.named_buffers():
        assert torch.equal(buffer, there.get_buffer(name).cpu()), name
    assert here.digest() == there.digest()


def steps_of(stage: str, precision: str, number: int) -> dict[str, dict[str, Any]]:
    path = str(FILES / f"{stage}.json")
    tree = ds_config.load(path)
    tree.pop("bf16", None)
    if precision != "bf16":
        tree.pop("data_types", None)
    if precision != "fp32":
        tree[precision] = {"enabled": True}
    decided = ds_config.Decided("test", 8, 8 // number, OPTIM.clip)
    config = ds_config.merge(tree, path, decided, 1)
    out = {}
    for name in ("tcl", "clip", "siglip"):
        engine = DeepSpeedEngine(CASES[name].model(), config, OPTIM, distributed.init())
        out[name] = series(CASES[name], engine, 4, number)
    return out


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("stage", ["zero0", "zero2", "zero3"])
def test_micro_batches_make_the_losses_of_one_batch(stage: str, precision: str) -> None:
    whole, parts = (on_one_gpu(steps_of, stage, precision, number) for number in (1, 2))
    for name, made in whole.items():
        bound = 1e-4 if precision == "fp32" else 2e-2
        assert parts[name]["loss"] == pytest.approx(made["loss"], rel=bound), name
