"""What makes an optimizer step: the contract, and DeepSpeed at ZeRO 0-3. The only importer of deepspeed.

One rule holds at every stage, and in `local_engine`: **a trainable parameter that a step does not use has gradient
zero in that step** (AdamW then moves it by its moments and its decay). Plain PyTorch would skip it, ZeRO 1 and 2
feed zeros, and ZeRO 3 would apply the gradient of an earlier step again.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from vlscale import averages, distributed, ds_config, optim, optimizers
from vlscale.averages import Averages
from vlscale.errors import ConfigError, TrainingError
from vlscale.model import PretrainModel
from vlscale.saving import state
from vlscale.saving.pieces import Piece, Reader
from vlscale.saving.state import Span, State
from vlscale.types import Batch, Moment, Pass

COUNTERS = frozenset({"global_steps", "global_samples", "skipped_steps"})  # of DeepSpeed
LOSS_SCALE = frozenset({"cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis"})  # what moves in a dynamic one


@dataclass(frozen=True)
class StepReport:
    """How an optimizer step went."""

    grad_norm: float  # global L2 norm before clipping; nan where it is not finite
    applied: bool  # False = a non-finite gradient: every rank skipped the update, and nothing else may move either
    loss_scale: float | None  # fp16 only
    answered: bool = False  # skipped, and the dynamic loss scale of fp16 falls for it


class Engine(Protocol):
    """One model, its optimizer and its place in the process group."""

    model: PretrainModel
    device: torch.device
    dtype: torch.dtype

    def forward(self, batch: Batch, at: Moment, phase: object | None = None) -> Pass:
        """One pass of the model over a micro-batch (already on the device); see `PretrainModel.forward`."""
        ...

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulate gradients of `loss` over the number of micro-batches; `last` marks the step's last call."""
        ...

    def step(self, lr: float) -> StepReport:
        """Average over micro-batches and ranks, clip, update, forget the gradients.

        Where the norm of the gradients is not finite, on whatever rank it began, all ranks leave everything as it is.

        Raises:
            TrainingError: the loss scale of fp16 cannot fall any further.
        """
        ...

    def after_step(self, coefficient: float) -> None:
        """Keep bounded parameters in bounds and move the momentum twin; only after an applied step."""
        ...

    def pieces(self) -> list[Piece]:
        """What this rank writes of the state that a run goes on from: live tensors, and no rank waits for another."""
        ...

    def scalars(self) -> dict[str, Any]:
        """The small part of it, the same on all ranks; JSON."""
        ...

    def restore(self, reader: Reader, scalars: Mapping[str, Any]) -> None:
        """Go on from what all ranks of a run wrote, on whatever number of ranks and at whatever ZeRO stage.

        All ranks take part.

        Raises:
            CheckpointError: it is of another model, or some of it is missing.
        """
        ...


class TwinEngine:
    """What every engine has: the momentum twin and the bounds, on whatever part of a tensor lives here."""

    model: PretrainModel

    _spans: Sequence[Span]  # where the fp32 masters lie
    _averages: Averages

    def _followed(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """(online, twin) parameters of which an average is kept: a frozen one's twin stays as it is."""
        return [(online, twin) for online, twin in self.model.momentum_pairs() if online.requires_grad]

    def _part(self, parameter: nn.Parameter) -> Tensor:
        """The storage, in training precision, that holds this rank's part of a parameter."""
        return parameter.data

    def _masters(self, parameter: nn.Parameter) -> list[Tensor]:
        """[n] each: the fp32 masters of what this rank has of the parameter."""
        return [span.of(span.flat) for span in self._spans if span.parameter is parameter]

    @torch.no_grad()
    def after_step(self, coefficient: float) -> None:
        """See `Engine.after_step`."""
        limits = [limit for _, objective in self.model.asked() for limit in objective.limits()]
        for parameter, least, greatest in limits:
            for tensor in (self._part(parameter), parameter.data, *self._masters(parameter)):
                tensor.clamp_(least, greatest)
        self._averages.update(coefficient)
        for online, buffer in self.model.momentum_buffers():
            buffer.copy_(online)


class DeepSpeedEngine(TwinEngine):
    """DeepSpeed around a `PretrainModel`.

    `config` is a complete DeepSpeed configuration (`ds_config.merge`); the optimizer is that of
    `optimizers.build`, so DeepSpeed keeps no policy of its own. No op is compiled: collectives are gloo or NCCL,
    the optimizer is made of torch's own.
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
        optimizer = optimizers.build(model.named_parameters(), optim_config)
        optimizers.check_offload(optimizer, config)
        with contextlib.redirect_stdout(io.StringIO()):  # one of its optimizers prints its memory
            try:
                self._ds, self._optimizer, _, _ = deepspeed.initialize(
                    model=model,
                    optimizer=optimizer,
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
        own = model.sharded_buffers()
        for name, buffer in model.named_buffers():  # DeepSpeed broadcasts parameters, not buffers
            if name not in own:
                distributed.broadcast_(buffer)
        self._spans = self._where_masters_lie()
        self._clear_padding()
        if isinstance(optimizer, optimizers.ByGroup) and self.stage > 0:
            optimizer.pieces = optimizers.Pieces(self._flat_masters(), self._spans, self._trainable(), self.device)
        self._averages = self._prepare_averages()
        self._state = State(model, self._spans, self._averages, self._mover)

    @property
    def deepspeed(self) -> Any:
        """DeepSpeed's own engine, to measure what this class and the loop add to it."""
        return self._ds

    def forward(self, batch: Batch, at: Moment, phase: object | None = None) -> Pass:
        """See `Engine.forward`."""
        made: Pass = self._ds(batch, at, phase)
        return made

    def backward(self, loss: Tensor, last: bool) -> None:
        """See `Engine.backward`."""
        self._ds.set_gradient_accumulation_boundary(last)  # two-pass steps call more often than it would count
        if self.stage == 2:
            self._optimizer.setup_buckets()  # which it does at the first parameter, and a loss may reach none
        self._ds.backward(loss)
        if not last:
            self._ds.step()  # off the boundary this only counts the call

    def step(self, lr: float) -> StepReport:
        """See `Engine.step`."""
        for group in self._ds.optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        norm = self._plain_gradients() if self.stage == 0 else None
        if norm is not None and not math.isfinite(norm):  # the same on all ranks, and DeepSpeed would not look
            self._ds.zero_grad()
            return StepReport(math.nan, False, None)
        scaler = self._scaler()  # stage 0 names its least scale otherwise
        answered = bool(scaler) and scaler["cur_scale"] > scaler.get("min_scale", scaler.get("min_loss_scale"))
        skipped = self._ds.skipped_steps
        if self._offload and self._accumulation > 1:  # the last backward brings home no more than it has reached
            self._optimizer.finalize_gradient_accumulation_boundary()
        self._ds_step()
        applied = self._ds.skipped_steps == skipped
        if norm is None:
            found = self._ds.get_global_grad_norm() if applied else None  # of a skipped step it tells an earlier one
            norm = math.nan if found is None else float(found)
        self._forget_gradients()
        scale = float(self._ds.optimizer.cur_scale) if self._fp16 else None
        return StepReport(norm, applied, scale, answered=answered and not applied)

    def _ds_step(self) -> None:
        try:
            self._ds.step()
        except Exception as error:
            if "loss scale already at minimum" not in str(error):
                raise
            raise TrainingError(
                f"the gradients overflow fp16 even at the smallest loss scale ({self._ds.optimizer.cur_scale:g}); go "
                "on from the last checkpoint in bf16 or fp32 (another --ds_config), or with a smaller optim.lr"
            ) from None

    def pieces(self) -> list[Piece]:
        """See `Engine.pieces`."""
        return self._state.pieces(alike=self.stage == 0)

    def scalars(self) -> dict[str, Any]:
        """See `Engine.scalars`."""
        scaler = self._scaler()
        return {
            "deepspeed": {name: getattr(self._ds, name) for name in sorted(COUNTERS)},
            "loss_scale": {name: scaler[name] for name in sorted(LOSS_SCALE & scaler.keys())},
        }

    @torch.no_grad()
    def restore(self, reader: Reader, scalars: Mapping[str, Any]) -> None:
        """See `Engine.restore`."""
        if self.stage == 3:
            self._optimizer.checkpoint_event_prologue()  # nothing is whole
        self._state.restore(reader)
        if self.stage == 3:
            for number in range(len(self._flat_masters())):
                self._optimizer._reassign_or_swap_out_partitioned_parameters(number)
            self._optimizer.checkpoint_event_epilogue()  # what it keeps whole is so again
        elif self.stage > 0:
            self._optimizer.update_lp_params()
        else:
            for span in self._spans:
                span.parameter.copy_(span.flat)
        self._averages.show()
        for name in COUNTERS & scalars.get("deepspeed", {}).keys():
            setattr(self._ds, name, scalars["deepspeed"][name])
        for name in LOSS_SCALE & self._scaler().keys() & scalars.get("loss_scale", {}).keys():
            self._scaler()[name] = scalars["loss_scale"][name]

    def _prepare_averages(self) -> Averages:
        pairs = self._followed()
        if self.stage == 0:
            return averages.whole(pairs, self._spans)
        if self.stage == 3:
            return averages.sharded(pairs, self._spans)
        return averages.partitioned(pairs, self._flat_weights(), self._flat_masters())

    def _where_masters_lie(self) -> list[Span]:
        trainable = self._trainable()
        if self.stage == 3:
            return state.sharded(trainable, self._optimizer)
        if self.stage > 0:
            return state.partitioned(trainable, self._flat_weights(), self._flat_masters())
        if self.dtype == torch.float32:
            return state.whole((parameter, parameter) for parameter in trainable)
        pairs = zip(self._optimizer.fp16_groups, self._optimizer.fp32_groups, strict=True)
        return state.whole(pair for lps, hps in pairs for pair in zip(lps, hps, strict=True))

    def _scaler(self) -> dict[str, Any]:
        """What DeepSpeed scales an fp16 loss by, live; empty where that stays as it is."""
        if not self._fp16:
            return {}
        own = self._optimizer
        scaler = vars(own.loss_scaler if hasattr(own, "loss_scaler") else own.loss_scale_config)
        return scaler if scaler.get("dynamic", scaler.get("dynamic_loss_scale")) else {}

    def _trainable(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def _flat_weights(self) -> list[Tensor]:
        """The weights in training precision, flat, one for each group; stages 1 and 2."""
        own = vars(self._optimizer)  # stage 1 in bf16 without offload has a class and names of its own
        weights: list[Tensor] = own.get("bit16_groups_flat") or own["bf16_groups_flat"]
        return weights

    def _flat_masters(self) -> list[Tensor]:
        """This rank's part of the fp32 masters, flat, as the optimizer is handed them; stages 1 to 3."""
        own = vars(self._optimizer)
        names = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
        return next(own[name] for name in names if own.get(name))

    def _mover(self, flat: Tensor) -> torch.optim.Optimizer:
        """The optimizer that moves one of the flat masters; at stage 3 an offload `ratio` leaves some to another."""
        own = vars(self._optimizer)
        for number, device in own.get("subgroup_to_device", {}).items():
            if device != "cpu" and own["fp32_partitioned_groups_flat"][number] is flat:
                other: torch.optim.Optimizer = own["backup_optimizer"]
                return other
        mover: torch.optim.Optimizer = own.get("optimizer", self._optimizer)
        return mover

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
            for kept in getattr(self._optimizer, "accumulated_grads_in_cpu", {}).values():
                kept.zero_()
            if self.stage < 3:  # a skipped step keeps its sums, and would make the next ones skip too
                self._optimizer.averaged_gradients.update(dict.fromkeys(self._optimizer.averaged_gradients))
            for flat in getattr(self._optimizer, "single_partition_of_fp32_groups", ()):
                if flat.grad is not None:
                    flat.grad.zero_()

    def _part(self, parameter: nn.Parameter) -> Tensor:
        part: Tensor = parameter.ds_tensor.data.view(-1) if self.stage == 3 else parameter.data  # type: ignore[attr-defined]
        return part

    @torch.no_grad()
    def _clear_padding(self) -> None:
        """At stage 3 the last part may reach beyond its parameter, and what DeepSpeed leaves there is chance."""
        if self.stage < 3:
            return
        for parameter in self.model.parameters():
            part = self._part(parameter)
            part[max(0, parameter.ds_numel - distributed.rank() * part.numel()) :].zero_()  # type: ignore[attr-defined]
        for flat in self._flat_masters():
            end = 0
            for span in sorted((span for span in self._spans if span.flat is flat), key=lambda span: span.start):
                flat[end : span.start].zero_()
                end = span.start + span.length
            flat[end:].zero_()


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
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else built with a C++ compiler at start-up
    tested = deepspeed.runtime.zero.utils.ZERO_SUPPORTED_OPTIMIZERS  # others it warns of, or refuses
    if optimizers.ByGroup not in tested:
        tested.append(optimizers.ByGroup)
    return deepspeed
