"""Host memory for a copy of what a rank saves."""

from __future__ import annotations

import mmap
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlscale import distributed
from vlscale.errors import ConfigError
from vlscale.saving.pieces import Piece

ALIGN = 64  # bytes
GROUPS = Path("/sys/fs/cgroup")  # of Linux, version 2
INSTEAD = "write checkpoint.background=false, which needs none but waits for the disk"


class HostMemory:
    """Room for one copy of this rank's pieces, used again by every save; page-locked where there is a GPU."""

    def __init__(self, warn: Callable[[str], None] = lambda message: None) -> None:
        """`warn` hears, once, that the room cannot be page-locked."""
        self._room = torch.empty(0, dtype=torch.uint8)
        self._locked = False
        self._warn, self._warned = warn, False

    def reserve(self, live: Sequence[Piece]) -> None:
        """Take the room for these pieces, if there is enough for all ranks of this machine. All ranks take part.

        Raises:
            ConfigError: there is not; nothing was taken.
        """
        machine = (socket.gethostname(), _read(Path("/proc/sys/kernel/random/boot_id")))
        more = max(0, _layout(live)[1] - self._room.numel())
        everyone: list[Any] = distributed.gather_objects((machine, more))
        wanted = sum(size for other, size in everyone if other == machine)
        problem = f"on {machine[0]}: {_short(wanted)}" if wanted > available() else ""
        for each in distributed.gather_objects(problem):
            if each:
                raise ConfigError(str(each))
        self._grow(_layout(live)[1])

    def hold(self, live: Sequence[Piece]) -> list[Piece]:
        """The same pieces with values of their own, until the next call.

        Raises:
            ConfigError: there is no memory for them.
        """
        starts, size = _layout(live)
        self._grow(size)
        held = []
        for piece, start in zip(live, starts, strict=True):
            place = self._room[start : start + piece.values.nbytes].view(piece.values.dtype)
            place.copy_(piece.values.detach(), non_blocking=True)
            held.append(replace(piece, values=place))
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
        return held

    def _grow(self, size: int) -> None:
        if size <= self._room.numel():
            return
        if self._locked:
            self._locked = not _succeeds(_cuda().cudaHostUnregister(self._room.data_ptr()))
        self._room = torch.empty(0, dtype=torch.uint8)  # before there is another
        if size > available():
            raise ConfigError(_short(size))
        self._room = _host_memory(size)
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            self._lock()

    def _lock(self) -> None:
        """Not by torch's own page-locked memory, which rounds up to a power of 2."""
        self._locked = _succeeds(_cuda().cudaHostRegister(self._room.data_ptr(), self._room.numel(), 0))
        if not self._locked and not self._warned:
            self._warned = True
            size = self._room.numel() / 2**30
            self._warn(
                f"{size:.1f} GiB of host memory cannot be page-locked, so the run waits longer for the copy at each "
                "save; raise the limit of locked memory (ulimit -l)"
            )


def available() -> int:
    """Bytes of host memory that can still be taken: what the kernel tells, and what this process's groups may have."""
    told = [line.split() for line in _read(Path("/proc/meminfo")).splitlines()]
    free = [int(words[1]) * 1024 for words in told if words[0] == "MemAvailable:"]
    return max(0, min([*free, *_left_to_groups()], default=1 << 62))


def _left_to_groups() -> Iterator[int]:
    """Of the control group that this process is in, and of those around it, where they have a limit."""
    own = next((line[3:] for line in _read(Path("/proc/self/cgroup")).splitlines() if line.startswith("0::")), "/")
    group = GROUPS / own.lstrip("/")
    for folder in (group, *group.parents):
        limit, used = _read(folder / "memory.max").strip(), _read(folder / "memory.current").strip()
        if limit.isdigit() and used.isdigit():
            cached = [line.split() for line in _read(folder / "memory.stat").splitlines() if line]
            freed = sum(int(words[1]) for words in cached if words[0] in ("inactive_file", "active_file"))
            yield int(limit) - int(used) + freed


def _read(path: Path) -> str:
    """A file of the kernel; empty where it has none."""
    try:
        return path.read_text()
    except OSError:
        return ""


def _layout(live: Sequence[Piece]) -> tuple[list[int], int]:
    """(the first byte of each piece in the room, bytes of all)."""
    starts, size = [], 0
    for piece in live:
        starts.append(size)
        size += -(-piece.values.nbytes // ALIGN) * ALIGN
    return starts, size


def _short(size: int) -> str:
    return (
        f"there is no host memory for a copy of what is saved ({size / 2**30:.1f} GiB, and {available() / 2**30:.1f} "
        f"GiB are left); {INSTEAD}"
    )


def _host_memory(size: int) -> Tensor:
    """[size] uint8, which forked children do not have: they would make every later copy one of pages as well.

    Raises:
        ConfigError: there is no such memory.
    """
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise ConfigError(f"{_short(size)} ({error.strerror})") from error
    for advice in ("MADV_DONTFORK", "MADV_HUGEPAGE"):
        if hasattr(mmap, advice):
            with suppress(OSError):
                memory.madvise(getattr(mmap, advice))
    return torch.frombuffer(memory, dtype=torch.uint8)


def _cuda() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _succeeds(code: Any) -> bool:
    """Whether a call of CUDA's runtime went well; else the error that it left for the next kernel is taken away."""
    if int(code) == 0:
        return True
    with suppress(RuntimeError):
        torch.zeros(1, device="cuda")
    return False
