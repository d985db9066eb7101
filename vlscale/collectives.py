"""The last collectives that this rank began, noted as they pass; a microsecond each."""

from __future__ import annotations

import contextlib
import functools
import time
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

KEPT = 16
NAMES = (  # by torch.distributed's names
    *("all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "all_to_all", "all_to_all_single"),
    *("barrier", "batch_isend_irecv", "broadcast", "broadcast_object_list", "gather", "new_group", "reduce"),
    *("reduce_scatter", "reduce_scatter_tensor", "scatter"),
)


@dataclass
class Begun:
    """One of them; times by the monotonic clock."""

    number: int  # from 1, in the order in which this rank began them
    name: str
    what: tuple[Any, ...]  # shape and type of the first tensor
    began: float
    ended: float | None = None  # when the call came back
    work: Callable[[], Any] | None = None  # of one that goes on in the background, as long as someone waits for it

    @property
    def under_way(self) -> bool:
        """Whether it has not come to its end yet; on a GPU a call comes back once it is queued."""
        work = self.work() if self.work is not None else None
        with contextlib.suppress(RuntimeError):  # it has failed
            return self.ended is None or (work is not None and not work.is_completed())
        return False

    def describe(self, now: float) -> str:
        """In one line."""
        shape, dtype = self.what or ("objects", "")
        fate = "not back" if self.ended is None else f"back after {self.ended - self.began:.3f} s"
        if self.ended is not None and self.under_way:
            fate = "under way in the background"
        return f"{self.number:>9} {self.name} {shape} {dtype}, began {now - self.began:.1f} s ago, {fate}"


class Collectives:
    """What this rank has begun of what all ranks do together.

    `begun` counts them: they are the same on all ranks, so that a rank with fewer is behind. `seconds` were spent
    inside, most of them waiting for others; `moved` is when the last one began or came back.
    """

    def __init__(self) -> None:
        self.begun = 0
        self.seconds = 0.0
        self.moved = time.monotonic()
        self._last: deque[Begun] = deque(maxlen=KEPT)

    def recorded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, which leaves a note here."""

        @functools.wraps(function)
        def _call(*arguments: Any, **options: Any) -> Any:
            self.begun += 1
            self.moved = began = time.monotonic()
            note = Begun(self.begun, name, _what(arguments, options), began)
            self._last.append(note)
            try:
                answer = function(*arguments, **options)
                if answer is not None and hasattr(answer, "is_completed"):
                    note.work = weakref.ref(answer)
                return answer
            finally:
                note.ended = self.moved = time.monotonic()
                self.seconds += note.ended - began

        return _call

    def last(self) -> list[Begun]:
        """The last few, newest last."""
        return list(self._last)

    def waiting(self) -> str:
        """The name of the one that has not come to its end, empty if there is none."""
        return next((each.name for each in reversed(self.last()) if each.under_way), "")


class Volume(Collectives):
    """Also how many bytes each kind of collective was given: `bytes`, by its name.

    Counted is the whole tensor: what an all-reduce sums, an all-gather makes, a reduce-scatter takes, what this rank
    hands to an all-to-all or to a neighbour. Objects are not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = {}

    def recorded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, which leaves a note here."""
        noted = super().recorded(name, function)

        @functools.wraps(function)
        def _call(*arguments: Any, **options: Any) -> Any:
            size = max(map(_size, (*arguments, *options.values())), default=0)
            self.bytes[name] = self.bytes.get(name, 0) + size
            return noted(*arguments, **options)

        return _call


def _size(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, list):  # of tensors, or of a send and a receipt to and from neighbours
        sends = any(hasattr(each, "tensor") for each in value)
        return sum(_size(getattr(each, "tensor", each)) for each in value) // (2 if sends else 1)
    return 0


def _what(arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, ...]:
    for each in (*arguments, *options.values()):
        if isinstance(each, Tensor):
            return tuple(each.shape), each.dtype
    return ()
