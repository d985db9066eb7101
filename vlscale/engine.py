"""What makes an optimizer step: DeepSpeed at ZeRO 0-3, or plain PyTorch. The only importer of deepspeed.

One rule holds in both, at every stage: **a trainable parameter that a step does not use has gradient zero in
that step** (AdamW then moves it by its moments and its decay). Plain PyTorch would skip it, ZeRO 1 and 2 feed
zeros, and ZeRO 3 would apply the gradient of an earlier step again.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from vlscale import distributed, ds_config, optim
from vlscale.errors import ConfigError
from vlscale.model import PretrainModel
from vlscale.nn import momentum
from vlscale.types import Batch, Loss


@dataclass(frozen=True)
class StepReport:
    """How an optimizer step went."""

    grad_norm: float  # global L2 norm before clipping; nan where it is not finite
    applied: bool  # False = a non-finite gradient: every rank skipped the update
    loss_scale: float | None  # fp16 only


class Engine(Protocol):
    """One model, its optimizer and its place in the process group."""

    model: PretrainModel
    device: torch.device
    dtype: torch.dtype

    def forward(self, batch: Batch, step: int) -> dict[str, Loss]:
        """The losses of one micro-batch (already on the device)."""
        ...

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulate gradients; `last` marks the step's last micro-batch. Once per micro-batch."""
        ...

    def step(self, lr: float) -> StepReport:
        """Average over micro-batches and ranks, clip, update, forget the gradients."""
        ...

    def after_step(self, coefficient: float) -> None:
        """Keep bounded parameters in bounds and move the momentum twin; only after an applied step."""
        ...

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter and buffer, whole, on the host, in training precision. All ranks take part."""
        ...

    def save(self, folder: Path) -> None:
        """Write this rank's part of the state into `folder`. All ranks take part."""
        ...

    def load(self, folder: Path) -> None:
        """Read back what `save` wrote, on the same number of ranks."""
        ...


class _Engine:
    """What both engines share: the momentum twin and the bounds, on whatever part of a tensor lives here."""

    model: PretrainModel

    def _prepare_momentum(self) -> None:
        self._pairs = self.model.momentum_pairs()
        self._averages = [
            part if part.dtype == torch.float32 else part.float()  # an fp32 twin is its own average
            for part in (self._part(twin) for _, twin in self._pairs)
        ]

    def _part(self, parameter: nn.Parameter) -> Tensor:
        """The storage, in training precision, that holds this rank's part of a parameter."""
        return parameter.data

    def _source(self, parameter: nn.Parameter) -> Tensor:
        """The same part in fp32, as precise as it is kept here."""
        return parameter.data.float()

    def _masters(self, parameter: nn.Parameter) -> list[Tensor]:
        """fp32 masters of (parts of) the parameter on this rank, other than its own storage."""
        return []

    def _refresh(self, parameters: list[nn.Parameter]) -> None:
        """Make whole copies that are kept beside the parts follow them."""

    @torch.no_grad()
    def after_step(self, coefficient: float) -> None:
        """See `Engine.after_step`."""
        limits = [limit for _, objective in self.model.asked() for limit in objective.limits()]
        for parameter, least, greatest in limits:
            for tensor in (self._part(parameter), parameter.data, *self._masters(parameter)):
                tensor.clamp_(least, greatest)
        if not self._pairs:
            return
        twins = [twin for _, twin in self._pairs]
        momentum.update(self._averages, [self._source(online) for online, _ in self._pairs], coefficient)
        for average, twin in zip(self._averages, twins, strict=True):
            part = self._part(twin)
            if average is not part:
                part.copy_(average)
        self._refresh(twins)
        for online, buffer in self.model.momentum_buffers():
            buffer.copy_(online)

    def _save_averages(self, path: Path) -> None:
        torch.save([average.cpu() for average in self._averages], path)

    def _load_averages(self, path: Path) -> None:
        kept = torch.load(path, weights_only=True)
        for average, value in zip(self._averages, kept, strict=True):
            average.copy_(value)


class DeepSpeedEngine(_Engine):
    """DeepSpeed around a `PretrainModel`.

    `config` is a complete DeepSpeed configuration (`ds_config.merge`); the optimizer is torch's AdamW over
    `optim.groups`, so DeepSpeed keeps no policy of its own. No op is compiled: collectives are gloo or NCCL,
    the optimizer is torch's fused one.
    """

    def __init__(
        self,
        model: PretrainModel,
        config: Mapping[str, Any],
        optim_config: optim.OptimConfig,
        device: torch.device,
    ) -> None:
        deepspeed = _import_deepspeed()
        self.model = model
        self.device = device
        self.stage = ds_config.stage(config)
        self._fp16 = ds_config.precision(config) == "fp16"
        self._clip = float(config["gradient_clipping"])
        self._accumulation = int(config["gradient_accumulation_steps"])
        self._offload = bool(config.get("zero_optimization", {}).get("offload_optimizer"))
        model.to(device)
        with contextlib.redirect_stdout(io.StringIO()):  # one of its optimizers prints its memory
            try:
                self._ds, self._optimizer, _, _ = deepspeed.initialize(
                    model=model,
                    optimizer=_adamw(model, optim_config),
                    config=dict(config),
                    dist_init_required=False,
                )
            except ValidationError as error:
                first = error.errors()[0]
                where = ".".join(str(part) for part in first["loc"])
                raise ConfigError(f"DeepSpeed refuses the ds_config at {where}: {first['msg']}") from None
        self.dtype = next(iter(model.parameters())).dtype
        if self.stage == 0 and self.dtype != torch.float32:
            # this wrapper has made a step with zero gradients by now: harmless at learning rate 0, but counted
            self._optimizer.optimizer.state.clear()
        for buffer in model.buffers():  # DeepSpeed broadcasts parameters, not buffers
            distributed.broadcast_(buffer)
        self._clear_padding()
        self._prepare_momentum()

    @property
    def deepspeed(self) -> Any:
        """DeepSpeed's own engine, to measure what this class and the loop add to it."""
        return self._ds

    def forward(self, batch: Batch, step: int) -> dict[str, Loss]:
        """See `Engine.forward`."""
        losses: dict[str, Loss] = self._ds(batch, step)
        return losses

    def backward(self, loss: Tensor, last: bool) -> None:
        """See `Engine.backward`."""
        self._ds.backward(loss)
        if not last:
            self._ds.step()  # off the boundary this only counts the micro-batch

    def step(self, lr: float) -> StepReport:
        """See `Engine.step`."""
        for group in self._ds.optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        norm = self._plain_gradients() if self.stage == 0 else None
        skipped = self._ds.skipped_steps
        self._ds.step()
        if norm is None:
            norm = float(self._ds.get_global_grad_norm() or math.nan)
        self._forget_gradients()
        scale = float(self._ds.optimizer.cur_scale) if self._fp16 else None
        return StepReport(norm, self._ds.skipped_steps == skipped, scale)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """See `Engine.weights`."""
        deepspeed = _import_deepspeed()
        for name, parameter in self.model.named_parameters(remove_duplicate=True):
            whole: Any = contextlib.nullcontext()
            if self.stage == 3:
                whole = deepspeed.zero.GatheredParameters([parameter])
            with whole:
                yield name, parameter.detach().cpu().clone()
        for name, buffer in self.model.named_buffers():
            yield name, buffer.detach().cpu().clone()

    def save(self, folder: Path) -> None:
        """See `Engine.save`."""
        self._ds.save_checkpoint(str(folder), tag="deepspeed", save_latest=False)
        if self._pairs and (self.stage == 3 or distributed.rank() == 0):
            self._save_averages(folder / self._averages_name())

    def load(self, folder: Path) -> None:
        """See `Engine.load`."""
        self._ds.load_checkpoint(str(folder), tag="deepspeed")
        if self._pairs:
            self._load_averages(folder / self._averages_name())

    def _averages_name(self) -> str:
        part = distributed.rank() if self.stage == 3 else 0
        return f"momentum_{part:05d}.pt"

    def _plain_gradients(self) -> float | None:
        """At stage 0 gradients are plain: zero where there is none; the norm, where DeepSpeed keeps none."""
        own = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        for parameter in own:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.dtype != torch.float32:
            return None
        return float(nn.utils.get_total_norm([parameter.grad for parameter in own if parameter.grad is not None]))

    def _forget_gradients(self) -> None:
        """ZeRO keeps a gradient until the next backward overwrites it; what no backward reaches must be zero."""
        if self.stage == 3:
            self._optimizer.grad_partitions_flat_buffer.zero_()
            for flat in self._optimizer.fp32_partitioned_groups_flat:
                if flat.grad is not None:
                    flat.grad.zero_()
        if self._offload:
            self._optimizer.norm_for_param_grads.clear()
            for flat in getattr(self._optimizer, "single_partition_of_fp32_groups", ()):
                if flat.grad is not None:
                    flat.grad.zero_()

    def _part(self, parameter: nn.Parameter) -> Tensor:
        part: Tensor = parameter.ds_tensor.data.view(-1) if self.stage == 3 else parameter.data  # type: ignore[attr-defined]
        return part

    def _source(self, parameter: nn.Parameter) -> Tensor:
        part = self._part(parameter)
        if self.stage < 3 or not parameter.requires_grad:
            return part.float()
        source = part.float()
        for master in self._masters(parameter):
            source[: master.numel()] = master.reshape(-1)
        return source

    @torch.no_grad()
    def _clear_padding(self) -> None:
        """At stage 3 the last part may reach beyond its parameter; what DeepSpeed leaves there is chance, yet saved."""
        if self.stage < 3:
            return
        for parameter in self.model.parameters():
            part = self._part(parameter)
            own = max(0, parameter.ds_numel - distributed.rank() * part.numel())  # type: ignore[attr-defined]
            for tensor in (part, *self._masters(parameter)):
                tensor.view(-1)[own:].zero_()

    def _masters(self, parameter: nn.Parameter) -> list[Tensor]:
        if not parameter.requires_grad or (self.dtype == torch.float32 and self.stage == 0):
            return []
        if self.stage == 3:
            from deepspeed.utils import safe_get_local_fp32_param

            return [safe_get_local_fp32_param(parameter)]
        if self.stage == 0:
            pairs = zip(self._optimizer.fp16_groups, self._optimizer.fp32_groups, strict=True)
            return [hp for lps, hps in pairs for lp, hp in zip(lps, hps, strict=True) if lp is parameter]
        mapping = getattr(parameter, "_hp_mapping", None)  # this rank's fragment of the fp32 master, if any
        return [] if mapping is None else [mapping.get_hp_fragment()]

    def _refresh(self, parameters: list[nn.Parameter]) -> None:
        persistent: list[Any] = [each for each in parameters if getattr(each, "ds_persist", False)]
        if persistent:
            for parameter in persistent:
                parameter.partition()
            persistent[0].all_gather(persistent)


class LocalEngine(_Engine):
    """One process of plain PyTorch in fp32: the measure that every ZeRO stage is held to."""

    def __init__(
        self,
        model: PretrainModel,
        optim_config: optim.OptimConfig,
        device: torch.device,
        accumulation: int = 1,
    ) -> None:
        self.model = model.to(device)
        self.device = device
        self.dtype = torch.float32
        self._clip = optim_config.clip
        self._accumulation = accumulation
        self._optimizer = _adamw(model, optim_config)
        self._prepare_momentum()

    def forward(self, batch: Batch, step: int) -> dict[str, Loss]:
        """See `Engine.forward`."""
        losses: dict[str, Loss] = self.model(batch, step)
        return losses

    def backward(self, loss: Tensor, last: bool) -> None:
        """See `Engine.backward`."""
        torch.autograd.backward(loss / self._accumulation)

    def step(self, lr: float) -> StepReport:
        """See `Engine.step`."""
        own = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        for parameter in own:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        norm = nn.utils.get_total_norm([parameter.grad for parameter in own])
        if self._clip > 0:
            nn.utils.clip_grads_with_norm_(own, self._clip, norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return StepReport(float(norm), True, None)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """See `Engine.weights`."""
        for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()):
            yield name, tensor.detach().cpu().clone()

    def save(self, folder: Path) -> None:
        """See `Engine.save`."""
        state = {"model": self.model.state_dict(), "optimizer": self._optimizer.state_dict()}
        torch.save(state, folder / "local.pt")

    def load(self, folder: Path) -> None:
        """See `Engine.load`."""
        state = torch.load(folder / "local.pt", weights_only=True)
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])


def _adamw(model: PretrainModel, config: optim.OptimConfig) -> torch.optim.AdamW:
    groups: Any = [{**group, "lr": 0.0} for group in optim.groups(model.named_parameters(), config)]
    return torch.optim.AdamW(groups, betas=config.betas, eps=config.eps, fused=True)  # `step` sets the rate


def deepspeed_recompute() -> Callable[..., Any]:
    """DeepSpeed's activation checkpointing, the non-reentrant form (the reentrant one fails on shared blocks)."""
    checkpoint: Callable[..., Any] = _import_deepspeed().checkpointing.non_reentrant_checkpoint
    return checkpoint


def _import_deepspeed() -> Any:
    """deepspeed, quiet, on the right accelerator, and without the op that it would compile on a CPU."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):  # torch 2.13 says so at every call
        warnings.filterwarnings("ignore", rf"`torch.distributed.{name}` is deprecated", FutureWarning)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else built with a C++ compiler at start-up
    return deepspeed
