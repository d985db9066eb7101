"""Activation checkpointing: every mode gives the gradients of `none`, with dropout and stacks that run
several times in a step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed.spawn import run_ranks
from tests.engines import configuration
from tests.models import albef_batch, albef_model
from vlscale.engine import DeepSpeedEngine, deepspeed_recompute
from vlscale.errors import ConfigError
from vlscale.model import PretrainModel
from vlscale.nn.transformer import PreNormBlock, Stack, call_block
from vlscale.optim import OptimConfig
from vlscale.recompute import MODES, set_activation_checkpointing
from vlscale.types import Moment


def non_reentrant(function: torch.nn.Module, *inputs: Tensor | None) -> Tensor:
    """In place of DeepSpeed's callable."""
    out: Tensor = torch.utils.checkpoint.checkpoint(function, *inputs, use_reentrant=False)
    return out


def gradients(model: PretrainModel) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(5)
    batch = albef_batch()
    model.total(model(batch, Moment(2)).losses, model.counts(batch)).backward()  # type: ignore[no-untyped-call]
    return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


@pytest.mark.parametrize("mode", MODES[1:])
def test_gradients_equal_those_without(mode: str) -> None:
    model = albef_model(dropout=0.1, layers=2)
    want = gradients(model)
    set_activation_checkpointing(model, mode, non_reentrant)
    found = gradients(model)
    assert found.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6, msg=name)
    set_activation_checkpointing(model, "none")
    assert all(stack.run_block is call_block for stack in stacks(model))
    torch.testing.assert_close(gradients(model), want, rtol=0, atol=0)


def stacks(model: torch.nn.Module) -> list[Stack]:
    return [module for module in model.modules() if isinstance(module, Stack)]


class Counted(PreNormBlock):
    """Counts its forward passes."""

    runs = 0

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        self.runs += 1
        return super().forward(hidden, mask)


@pytest.mark.parametrize(("mode", "once", "runs"), [("none", 1, 1), ("full", 1, 2), ("offload", 1, 2)])
def test_full_and_offload_run_a_block_again(mode: str, once: int, runs: int) -> None:
    block = Counted(8, 2, 16, 1e-6)
    stack = Stack([block])
    set_activation_checkpointing(stack, mode)
    with torch.no_grad():
        stack(torch.randn(1, 3, 8))
    assert block.runs == once
    stack(torch.randn(1, 3, 8)).sum().backward()  # an input without gradient
    assert block.runs - once == runs
    assert block.mlp.fc1.weight.grad is not None


def test_selective_keeps_products_only() -> None:
    stack = Stack([PreNormBlock(8, 2, 16, 1e-6)])
    set_activation_checkpointing(stack, "selective")
    seen = []

    class Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    out = stack(torch.randn(1, 3, 8, requires_grad=True)).sum()
    with Products():  # type: ignore[no-untyped-call]
        out.backward()
    assert sum("gelu.default" in name for name in seen) == 1  # made again
    assert not any("addmm" in name or "dot_product_flash_attention_for_cpu.default" in name for name in seen)


def test_fairscale_takes_the_picture_stack_only() -> None:
    model = albef_model()
    set_activation_checkpointing(model, "offload")
    wrapped = {name for name, module in model.named_modules() if "forward" in module.__dict__ and "blocks" in name}
    assert wrapped == {"family.image_encoder.stack.blocks.0", "family.image_encoder.stack.blocks.1"}
    assert all(stack.run_block is call_block for stack in stacks(model.twin))  # type: ignore[arg-type]


def test_mistakes() -> None:
    with pytest.raises(ConfigError, match="did you mean 'selective'"):
        set_activation_checkpointing(torch.nn.Module(), "selektive")
    with pytest.raises(ConfigError, match="deepspeed"):
        set_activation_checkpointing(torch.nn.Module(), "deepspeed")


def zero_series(stage: str, dropout: float) -> dict[str, list[float]]:
    """{mode: losses and gradient norms of two steps} under DeepSpeed, all modes in one process."""
    found = {}
    for mode in MODES:
        settings = configuration(stage, 4, 4, 0.0)
        model = albef_model(dropout=dropout, layers=2)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # as after training: a bias that counts twice shows
                torch.nn.init.constant_(parameter, 0.3)
        set_activation_checkpointing(model, mode, deepspeed_recompute() if mode == "deepspeed" else None)
        engine = DeepSpeedEngine(model, settings, OptimConfig(), torch.device("cpu"))
        numbers = []
        for step in (1, 2):
            torch.manual_seed(step)
            loss = model.total(engine.forward(albef_batch(seed=step), Moment(step)).losses, {})
            engine.backward(loss, last=True)
            numbers += [float(loss.detach()), float(engine.step(1e-2).grad_norm)]
            engine.after_step(0.9)
        found[mode] = numbers
    return found


@pytest.mark.parametrize("stage", ["zero2", pytest.param("zero3", marks=pytest.mark.slow)])
def test_every_mode_is_exact_under_zero(stage: str) -> None:
    (found,) = run_ranks(zero_series, 1, stage, 0.1)
    for mode in MODES[1:]:
        assert found[mode] == pytest.approx(found["none"], rel=1e-6), mode
