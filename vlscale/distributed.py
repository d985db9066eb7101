"""Everything that crosses ranks; the only user of torch.distributed. One process needs no process group."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from vlscale.errors import ConfigError, TrainingError

TIMEOUT = timedelta(minutes=30)  # a first compilation or a large checkpoint may keep a rank away


def rank() -> int:
    """This process among all ranks; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """This process on its own machine, from the launcher's environment."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def init() -> torch.device:
    """Join the process group that the launcher's environment describes and return this rank's device.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT (deepspeed, torchrun); without them it
    makes a group of one.

    Raises:
        ConfigError: the environment is incomplete, or names a GPU that this machine does not have.
    """
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
    if not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", timeout=TIMEOUT, device_id=device if cuda else None)
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


def shutdown() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait for every rank."""
    if world_size() > 1:
        dist.barrier()


def gather_no_grad(tensor: Tensor) -> Tensor:
    """[b, ...] of every rank -> [W * b, ...] in rank order, without gradient. Every rank gives the same b."""
    tensor = tensor.detach().contiguous()
    if world_size() == 1:
        return tensor
    out = tensor.new_empty((world_size() * tensor.shape[0], *tensor.shape[1:]))
    dist.all_gather_into_tensor(out, tensor)
    return out


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


def same_on_all_ranks(name: str, digest: str) -> None:
    """Check that every rank holds the same text (a configuration, a task, a digest of tensors).

    Raises:
        TrainingError: it differs; the sentence names the ranks.
    """
    digests = gather_objects(digest)
    odd = [rank for rank, other in enumerate(digests) if other != digests[0]]
    if odd:
        raise TrainingError(f"{name} differs between rank 0 and rank(s) {odd}; start every rank the same way")


class StopVote:
    """Whether some rank wants to stop, agreed without making a GPU wait: the answer is one step old.

    Every rank calls `agreed` once per step and gets the same answer. On a CPU the answer is of this step.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pending: Tensor | None = None

    def agreed(self, wish: bool) -> bool:
        """Cast this rank's wish; True once any rank has wished to stop."""
        if world_size() == 1:
            return wish
        message = torch.tensor([float(wish)], device=self._device)
        dist.all_reduce(message, op=dist.ReduceOp.MAX)
        if self._device.type == "cpu":
            return bool(message.item() > 0)
        answer = self._pending is not None and bool(self._pending.item() > 0)
        self._pending = message
        return answer
