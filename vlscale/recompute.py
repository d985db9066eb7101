"""Activation checkpointing: which activations wait for the backward pass, where, and which are made again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from vlscale.errors import ConfigError, did_you_mean
from vlscale.nn.transformer import RunBlock, Stack, call_block

MODES = ("none", "full", "selective", "offload", "deepspeed")

aten = torch.ops.aten
# Not `mm`: in a linear layer the bias is then added to its result in place (DeepSpeed's linear at ZeRO-3, torch's
# for some layouts), and a kept result would have it added twice.
PRODUCTS = frozenset({aten.addmm.default, aten.bmm.default, aten.baddbmm.default})
ATTENTIONS = frozenset(
    {
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
    }
)


def set_activation_checkpointing(
    model: nn.Module, mode: str, deepspeed_checkpoint: Callable[..., Any] | None = None
) -> None:
    """Apply `mode` to every trained `Stack` of the model; a frozen one, as a momentum twin's, is left alone.

    Args:
        model: e.g. a `PretrainModel`. Calling again replaces the mode.
        mode: `none` keeps all; `full` keeps each block's input and makes the rest again; `selective` keeps
            biased products and attention and makes the cheap rest again; `offload` is `full` with the inputs
            waiting in host memory; `deepspeed` is `full` by `deepspeed_checkpoint`.
        deepspeed_checkpoint: `deepspeed.checkpointing.non_reentrant_checkpoint`, from the engine.

    Raises:
        ConfigError: an unknown mode, or `deepspeed` without its callable.
    """
    if mode not in MODES:
        raise ConfigError(f"no activation_checkpointing mode '{mode}'{did_you_mean(mode, MODES)}")
    if mode == "deepspeed" and deepspeed_checkpoint is None:
        raise ConfigError("activation_checkpointing: deepspeed needs DeepSpeed's engine; write 'full'")
    single = _one_picture_view(model)
    for stack in model.modules():
        if isinstance(stack, Stack) and any(parameter.requires_grad for parameter in stack.parameters()):
            _reset(stack)
            if mode == "offload" and stack.once and single:
                _wrap_with_fairscale(stack)
            else:
                stack.run_block = _run_block(mode, deepspeed_checkpoint)


def _run_block(mode: str, deepspeed_checkpoint: Callable[..., Any] | None) -> RunBlock:
    if mode == "full":
        return _when_training(partial(checkpoint, use_reentrant=False))
    if mode == "selective":
        contexts = partial(create_selective_checkpoint_contexts, _keep)
        return _when_training(partial(checkpoint, use_reentrant=False, context_fn=contexts))
    if mode == "offload":
        return _when_training(_offload)
    if mode == "deepspeed" and deepspeed_checkpoint is not None:
        return _when_training(partial(_anchored, deepspeed_checkpoint))
    return call_block


def _when_training(run: Callable[..., Any]) -> RunBlock:
    """`run` where a gradient is recorded, a plain call elsewhere."""

    def run_block(block: nn.Module, *inputs: Tensor | None) -> Tensor:
        out: Tensor = run(block, *inputs) if torch.is_grad_enabled() else call_block(block, *inputs)
        return out

    return run_block


def _keep(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep products, and attention unless it drops weights.

    A kept attention would not draw its random numbers again, and later dropout in the block would differ from
    the forward pass.
    """
    if operation in PRODUCTS:
        return CheckpointPolicy.MUST_SAVE
    if operation in ATTENTIONS and _attention_dropout(operation, args, kwargs) == 0.0:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _attention_dropout(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    for argument, value in zip(operation._schema.arguments, args, strict=False):
        if argument.name == "dropout_p":
            return float(value)
    return float(kwargs.get("dropout_p", 0.0))


def _offload(block: nn.Module, *inputs: Tensor | None) -> Any:
    """`full`, with what the checkpoint saves (the block's inputs) copied to host memory and back."""
    pinned = any(part is not None and part.is_cuda for part in inputs)
    with save_on_cpu(pin_memory=pinned):
        return checkpoint(block, *inputs, use_reentrant=False)


class _Anchor(torch.autograd.Function):
    """The identity; it asks for its input in the backward pass, and so starts the second run."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        ctx.save_for_backward(hidden)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        _ = ctx.saved_tensors
        return gradient


def _anchored(run: Callable[..., Any], block: nn.Module, *inputs: Tensor | None) -> Any:
    """DeepSpeed runs the whole block again, and ZeRO-3 frees each module's parameters as it leaves the module.

    If the block's last module started that in its own backward pass, its parameters would be gone in the middle
    of it; the anchor starts it before.
    """
    return run(lambda *given: _Anchor.apply(block(*given)), *inputs)  # type: ignore[no-untyped-call]


def _one_picture_view(model: nn.Module) -> bool:
    """Whether the objectives read pictures in one view only, so that an image stack runs once per step."""
    views = getattr(model, "views", None)
    return views is not None and sum(view.startswith("visual.") for view in views()) == 1


def _wrap_with_fairscale(stack: Stack) -> None:
    """fairscale's wrapper keeps each block's input in host memory.

    It is re-entrant: a block that runs twice in a step would reduce its gradients twice under ZeRO, so only
    for stacks that run `once`.
    """
    from fairscale.nn.checkpoint import checkpoint_wrapper

    for block in stack.blocks.values():
        checkpoint_wrapper(block, offload_to_cpu=True)


def _reset(stack: Stack) -> None:
    stack.run_block = call_block
    for block in stack.blocks.values():
        block.__dict__.pop("forward", None)  # what fairscale's wrapper set on the instance
