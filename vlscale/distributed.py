"""Everything that crosses ranks; the only user of torch.distributed. One process needs no process group."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlscale.collectives import NAMES, Collectives
from vlscale.errors import ConfigError, TrainingError, differences

TIMEOUT = timedelta(minutes=30)  # a first compilation or a large checkpoint may keep a rank away
ANSWER = 3.0  # seconds in which a rank that lives says something


def rank() -> int:
    """This process among all ranks; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """This process on its own machine, from the launcher's environment."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def init(timeout: timedelta = TIMEOUT) -> torch.device:
    """Join the process group that the launcher's environment describes and return this rank's device.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT (deepspeed, torchrun); without them it
    makes a group of one. A collective that takes longer than `timeout` fails.

    Raises:
        ConfigError: the environment is incomplete, or names a GPU that this machine does not have, or a port that
            is taken.
    """
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):  # torch 2.13 says so at every call
        warnings.filterwarnings("ignore", rf"`torch.distributed.{name}` is deprecated", FutureWarning)
    _one_process_defaults()
    cuda = torch.cuda.is_available()
    if cuda and local_rank() >= torch.cuda.device_count():
        raise ConfigError(
            f"LOCAL_RANK is {local_rank()}, but this machine shows {torch.cuda.device_count()} GPU(s); "
            f"start at most that many processes per machine"
        )
    device = torch.device("cuda", local_rank()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if dist.is_initialized():
        return device
    try:
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timeout, device_id=device if cuda else None)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise ConfigError(
            f"port {os.environ['MASTER_PORT']} of {os.environ['MASTER_ADDR']}, where the ranks were to meet, is taken; "
            f"give another one as --master_port to the launcher, or as MASTER_PORT"
        ) from None
    return device


def _one_process_defaults() -> None:
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    given = [name for name in names if name in os.environ]
    if given and len(given) < len(names):
        missing = [name for name in names if name not in given]
        raise ConfigError(
            f"the environment sets {', '.join(given)} but not {', '.join(missing)}; "
            f"start with deepspeed or torchrun, or unset them all for one process"
        )
    if not given:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    os.environ.setdefault("LOCAL_RANK", os.environ["RANK"])


def record(into: Collectives, timeout: timedelta = TIMEOUT) -> Callable[[], None]:
    """Note every collective, ours and DeepSpeed's, from now on; returns what ends that.

    Groups that are made without a time-out, as DeepSpeed makes its own, get this one: NCCL's would be 10 minutes.
    """
    plain = {name: getattr(dist, name) for name in NAMES}
    for name, function in plain.items():
        setattr(dist, name, into.recorded(name, function))
    make = dist.new_group

    def _new_group(ranks: Any = None, timeout: timedelta | None = timeout, *rest: Any, **options: Any) -> Any:
        return make(ranks, timeout, *rest, **options)

    dist.new_group = _new_group
    return lambda: vars(dist).update(plain)


def first_to_say(message: str) -> bool:
    """Whether this rank is the first to say so; False too if nobody can be asked any more."""
    if world_size() == 1:
        return True
    answers: list[int] = []
    key = hashlib.blake2b(message.encode()).hexdigest()
    store = dist.distributed_c10d._get_default_store()

    def ask() -> None:
        with contextlib.suppress(RuntimeError):  # of torch's: the rank that keeps the store has ended
            answers.append(store.add(f"vlscale/said/{key}", 1))

    asking = threading.Thread(target=ask, daemon=True)  # a rank that hangs would keep us for ever
    asking.start()
    asking.join(ANSWER)
    return answers == [1]


def shutdown() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait for every rank."""
    if world_size() > 1:
        dist.barrier()


def gather(tensors: Sequence[Tensor]) -> list[Tensor]:
    """[b, ...] each, of any types, -> [W * b, ...] each in rank order, in ONE all-gather.

    Every rank gives the same shapes. The gradients of all ranks' rows go home summed, in ONE reduce-scatter
    of fp32: the mean over ranks of what each rank's own loss makes of them is then the gradient of the mean
    loss. A tensor that stands twice travels once; without gradient nothing comes back.
    """
    if world_size() == 1:
        return list(tensors)
    distinct = list({id(tensor): tensor for tensor in tensors}.values())
    out: Sequence[Tensor] = _Gather.apply(*distinct)  # type: ignore[no-untyped-call]
    gathered = {id(tensor): whole for tensor, whole in zip(distinct, out, strict=True)}
    return [gathered[id(tensor)] for tensor in tensors]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.shapes = [(tensor.shape, tensor.dtype) for tensor in tensors]
        rows = tensors[0].shape[0]
        flat = [tensor.detach().contiguous().view(rows, -1).view(torch.uint8) for tensor in tensors]
        message = torch.cat(flat, dim=1)
        whole = message.new_empty((world_size() * rows, message.shape[1]))
        dist.all_gather_into_tensor(whole, message)
        parts = torch.split(whole, [part.shape[1] for part in flat], dim=1)
        out = tuple(
            part.contiguous().view(dtype).view(-1, *shape[1:])
            for part, (shape, dtype) in zip(parts, ctx.shapes, strict=True)
        )
        ctx.mark_non_differentiable(*(o for o, need in zip(out, ctx.needs_input_grad, strict=True) if not need))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        wanted = [number for number, need in enumerate(ctx.needs_input_grad) if need]
        rows = ctx.shapes[0][0][0]
        message = torch.cat([gradients[number].reshape(world_size() * rows, -1).float() for number in wanted], dim=1)
        own = message.new_empty((rows, message.shape[1]))
        dist.reduce_scatter_tensor(own, message)
        widths = [ctx.shapes[number][0][1:].numel() for number in wanted]
        out: list[Tensor | None] = [None] * len(ctx.shapes)
        for number, part in zip(wanted, torch.split(own, widths, dim=1), strict=True):
            shape, dtype = ctx.shapes[number]
            out[number] = part.reshape(shape).to(dtype)
        return tuple(out)


def sum_(tensor: Tensor) -> None:
    """Overwrite `tensor` with its sum over ranks, in place and without gradient; the same bits on every rank."""
    if world_size() > 1:
        dist.all_reduce(tensor)


def sum_scatter(tensor: Tensor) -> Tensor:
    """[W * b, ...] -> [b, ...]: this rank's rows (in rank order) of the sum over ranks, without gradient."""
    if world_size() == 1:
        return tensor
    own = tensor.new_empty((tensor.shape[0] // world_size(), *tensor.shape[1:]))
    dist.reduce_scatter_tensor(own, tensor.contiguous())
    return own


def fetch_rows(rows: Tensor, owner: Tensor, place: Tensor) -> Tensor:
    """Chosen rows of other ranks: out[i] = the row `place[i]` of rank `owner[i]`, with gradient to that rank.

    Only the chosen rows travel. Every rank takes part, each with as many wishes as it likes.

    Args:
        rows: [n, ...] of this rank, the same trailing shape on all ranks.
        owner: [k] int64 ranks.
        place: [k] int64 places among that rank's rows.

    Returns:
        [k, ...]
    """
    if world_size() == 1:
        return rows[place]
    order = owner.argsort(stable=True)
    wishes = torch.bincount(owner, minlength=world_size())
    (everyone,) = gather([wishes[None]])  # [W, W]: how many rows each rank wants of each
    asked, sent = everyone[rank()].tolist(), everyone[:, rank()].tolist()
    wanted = torch.empty(sum(sent), dtype=torch.int64, device=place.device)
    dist.all_to_all_single(wanted, place[order], sent, asked)
    out: Tensor = _Exchange.apply(rows[wanted], sent, asked)  # type: ignore[no-untyped-call]
    return out[order.argsort()]


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], asked: list[int]) -> Tensor:
        ctx.sent, ctx.asked = sent, asked
        out = rows.new_empty((sum(asked), *rows.shape[1:]))
        dist.all_to_all_single(out, rows.contiguous(), asked, sent)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        home = gradient.new_empty((sum(ctx.sent), *gradient.shape[1:]))
        dist.all_to_all_single(home, gradient.contiguous(), ctx.sent, ctx.asked)
        return home, None, None


def pass_on(tensor: Tensor) -> Tensor:
    """This rank's tensor goes to the next rank of the ring; returns the one of the rank before. No gradient."""
    if world_size() == 1:
        return tensor
    tensor, received = tensor.contiguous(), torch.empty_like(tensor)
    behind, ahead = (rank() - 1) % world_size(), (rank() + 1) % world_size()
    ways = [dist.P2POp(dist.isend, tensor, ahead), dist.P2POp(dist.irecv, received, behind)]
    for way in dist.batch_isend_irecv(ways):
        way.wait()
    return received


def log_sum_exp_over_ranks(partial: Tensor) -> Tensor:
    """[N] on each rank -> [N]: log of the sum over ranks of exp, the same everywhere, with gradient.

    The gradient is that of the sum over ranks of every rank's loss.
    """
    if world_size() == 1:
        return partial
    out: Tensor = _LogSumExp.apply(partial)  # type: ignore[no-untyped-call]
    return out


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor) -> Tensor:
        greatest = partial.clone()
        dist.all_reduce(greatest, op=dist.ReduceOp.MAX)
        total = (partial - greatest).exp()
        dist.all_reduce(total)
        whole = greatest + total.log()
        ctx.save_for_backward((partial - whole).exp())
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (share,) = ctx.saved_tensors
        everyone = gradient.clone()
        dist.all_reduce(everyone)
        out: Tensor = everyone * share
        return out


def greatest(value: int) -> int:
    """The greatest of all ranks' numbers."""
    if world_size() == 1:
        return value
    box = torch.tensor([value], device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return int(box.item())


def gather_objects(value: object) -> list[object]:
    """One small picklable object of every rank, in rank order; for reports, not for tensors."""
    if world_size() == 1:
        return [value]
    out: list[object] = [None] * world_size()
    dist.all_gather_object(out, value)
    return out


def from_rank_0(value: str) -> str:
    """The text that rank 0 holds, on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def broadcast_(tensor: Tensor) -> None:
    """Overwrite `tensor` with rank 0's, in place."""
    if world_size() > 1:
        dist.broadcast(tensor, src=0)


def sum_over_ranks(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """{name: scalar} summed over ranks in one message, fp64; the names must be the same on all ranks."""
    if not values:
        return {}
    packed = torch.stack([value.detach().double().reshape(()) for value in values.values()])
    if world_size() > 1:
        dist.all_reduce(packed)
    return dict(zip(values, packed.unbind(), strict=True))


def _between_processors() -> Any:
    """A group of all ranks, whose messages no GPU waits for; None = the usual one. All ranks take part."""
    nccl = world_size() > 1 and dist.get_backend() == "nccl"
    return dist.new_group(backend="gloo") if nccl else None


class StopVote:
    """Who wants to stop, and what else ranks tell one another at each step, in one message between the processors.

    Every rank calls `agreed` once per step, with as many numbers as all others, and gets the same answer.
    """

    def __init__(self) -> None:
        self._group = _between_processors()

    def agreed(self, *numbers: int) -> tuple[int, ...]:
        """The greatest of all ranks' numbers, each for itself."""
        if world_size() == 1:
            return numbers
        message = torch.tensor(numbers)
        dist.all_reduce(message, op=dist.ReduceOp.MAX, group=self._group)
        return tuple(int(number) for number in message.tolist())


def gather_parts_(whole: Tensor, part: Tensor) -> None:
    """Fill `whole` [W * n] with every rank's `part` [n] in rank order; `part` may be this rank's place in it."""
    if world_size() > 1:
        dist.all_gather_into_tensor(whole, part)
    elif whole.data_ptr() != part.data_ptr():
        whole.copy_(part)


class StepPlans:
    """Ranks that are about to do different things would wait for each other for ever: they are stopped before.

    Every rank calls `check` at the start of each step. The comparison is one all-reduce of 16 bytes between the
    processors of the machines, so that no GPU waits for it.
    """

    def __init__(self) -> None:
        self._group = _between_processors()

    def check(self, step: int, plan: Mapping[str, str]) -> None:
        """Compare what this rank is about to do with all others.

        Raises:
            TrainingError: it differs; names the ranks and what differs.
        """
        if world_size() == 1:
            return
        text = json.dumps([step, plan], sort_keys=True).encode()
        number = int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "big")
        box = torch.tensor([number, -number])
        dist.all_reduce(box, op=dist.ReduceOp.MAX, group=self._group)
        if int(box[0]) != -int(box[1]):
            self._refuse({"step": str(step), **plan})

    def _refuse(self, plan: dict[str, str]) -> None:
        everyone: list[dict[str, str]] = [{}] * world_size()
        dist.all_gather_object(everyone, plan, group=self._group)
        raise TrainingError(
            f"ranks disagree about the step to make: {differences(everyone)}; "
            f"start every rank with the same recipe, data and code"
        )
