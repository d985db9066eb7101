"""A step of several micro-batches whose objectives look at the step's whole batch: as exact as one large batch.

Three kinds of passes (Gao et al. 2021, GradCache, section 3, here also for features that meet in fusion layers):

1. *look*: every micro-batch is encoded (and fused, where fused states are shared) without a graph; what the
   objectives share is gathered once.
2. *contrast*: micro-batch by micro-batch, the objectives that look at the whole batch make their losses from
   the kept streams; backward reaches their own parameters, the fusion layers, and the streams.
3. *deliver*: micro-batch by micro-batch, the encoders run again under the random state of the first time and
   receive the streams' gradients; objectives that look at their own micro-batch alone train here as ever.

The cost is one more pass of the encoders; activations are held for one micro-batch at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from vlscale import distributed
from vlscale.engine import Engine
from vlscale.model import Encodings, MomentumEncodings, PretrainModel, everyones, global_order
from vlscale.types import Batch, Fused, Moment, Pass, Stream, lengthened

T = TypeVar("T")
S = TypeVar("S", Stream, Fused)
Key = tuple[str, ...]  # (text or visual, view), or (fused, both)
E = TypeVar("E", "_Looking", "_Leaves", "_Again")


def passes(
    model: PretrainModel,
    machine: Engine,
    batches: Sequence[Batch],
    moments: Sequence[Moment],
    shares: Sequence[Mapping[str, Tensor]],
) -> list[Pass]:
    """Forward and backward of a whole step; one `Pass` per micro-batch."""
    cache = Cache(len(batches))
    for batch, at in zip(batches, moments, strict=True):
        machine.forward(batch, at, Look(cache))
    cache.join()
    contrasted = []
    for number, (batch, at) in enumerate(zip(batches, moments, strict=True)):
        made = machine.forward(batch, at, Contrast(cache))
        machine.backward(model.total(made.losses, shares[number]), last=False)
        contrasted.append(made)
    cache.bring_home()
    out = []
    for number, (batch, at) in enumerate(zip(batches, moments, strict=True)):
        made = machine.forward(batch, at, Deliver(cache))
        assert made.delivered is not None
        loss = made.delivered
        if made.losses:
            loss = loss + model.total(made.losses, shares[number])
        machine.backward(loss, last=number == len(batches) - 1)
        first = contrasted[number]
        out.append(Pass({**first.losses, **made.losses}, {**first.keys, **made.keys}))
    return out


@dataclass
class Cache:
    """What a step keeps between its passes."""

    number: int  # micro-batches
    streams: dict[Key, list[Stream]] = field(default_factory=dict)  # one per micro-batch, without graph
    random: dict[Key, list[Any]] = field(default_factory=dict)  # random states before each was made
    twins: list[MomentumEncodings | None] = field(default_factory=list)
    shared: list[dict[str, tuple[Tensor, ...]]] = field(default_factory=list)  # of each micro-batch
    joined: dict[Key, Stream] = field(default_factory=dict)  # leaves: [number * b, ...]
    everyone: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)  # leaves: [G, ...] in global order
    home: dict[str, tuple[Tensor | None, ...]] = field(default_factory=dict)  # gradients of `shared`, all of ours

    def join(self) -> None:
        """Make leaves of the streams, and gather what is shared."""
        for key, streams in self.streams.items():
            self.joined[key] = _join(streams)
        together: dict[tuple[int, ...], Tensor] = {}  # what two objectives share travels once
        wanted: dict[str, tuple[Tensor, ...]] = {}
        for name, share in self.shared[0].items():
            parts = [[each[name][place] for each in self.shared] for place in range(len(share))]
            wanted[name] = tuple(together.setdefault(tuple(map(id, part)), torch.cat(part).detach()) for part in parts)
        for name, tensors in everyones(wanted).items():
            needs = [part.requires_grad for part in self.shared[0][name]]
            ordered = [global_order(tensor, self.number) for tensor in tensors]
            self.everyone[name] = tuple(
                tensor.detach().requires_grad_(need) for tensor, need in zip(ordered, needs, strict=True)
            )

    def rows(self, key: Key, number: int) -> slice:
        """Where a micro-batch's rows lie in the joined stream."""
        first = sum(len(stream.hidden) for stream in self.streams[key][:number])
        return slice(first, first + len(self.streams[key][number].hidden))

    def bring_home(self) -> None:
        """Sum what all ranks' losses made of the shared tensors; each rank keeps the gradients of its own."""
        for name, tensors in self.everyone.items():
            self.home[name] = tuple(
                distributed.sum_scatter(_rank_order(tensor.grad.float(), self.number))
                if tensor.grad is not None
                else None
                for tensor in tensors
            )


class _Looking(Encodings):
    """Passes are made without a graph and kept, as leaves, with the random state that they were made in."""

    cache: Cache

    def _once(self, key: Key, make: Callable[[], T]) -> T:
        if key not in self._kept:
            self.cache.random.setdefault(key, []).append(_random_state(self._batch.pair_id.device))
            with torch.no_grad():
                made: Any = make()
            self._kept[key] = _each(made, _leaf)
            if key[0] != "fused":  # what becomes of fused states travels by `share` alone
                self.cache.streams.setdefault(key, []).append(self._kept[key])
        kept: T = self._kept[key]
        return kept


class _Leaves(Encodings):
    """Streams are the kept ones, and gather gradients."""

    cache: Cache

    def _once(self, key: Key, make: Callable[[], T]) -> T:
        make_or_take: Any = make if key[0] == "fused" else lambda: self._rows(key)
        kept: T = super()._once(key, make_or_take)
        return kept

    def _rows(self, key: Key) -> Any:
        joined, own = self._everyone(*key), self.cache.streams[key][self.at.number]
        rows = self.cache.rows(key, self.at.number)
        pairs = zip(joined, own, strict=True)
        parts = (None if part is None or like is None else _cut(part[rows], like) for part, like in pairs)
        return type(joined)(*parts)  # type: ignore[arg-type]

    def _everyone(self, kind: str, view: str) -> Stream:
        assert (kind, view) in self.cache.joined, f"`share` asks for the {kind} stream '{view}' if `forward` does"
        return self.cache.joined[kind, view]


class _Again(Encodings):
    """Kept passes are made again, with a graph, as they were made the first time."""

    cache: Cache

    def _once(self, key: Key, make: Callable[[], T]) -> T:
        if key in self._kept or key not in self.cache.random:
            return super()._once(key, make)
        with _random(self.cache.random[key][self.at.number], self._batch.pair_id.device):
            return super()._once(key, make)


@dataclass(frozen=True)
class Look:
    """Encode, keep, and note what is shared."""

    cache: Cache

    def run(self, model: PretrainModel, batch: Batch, at: Moment) -> Pass:
        """See `Phase`."""
        self.cache.twins.append(model.momentum_encodings(batch, at))
        enc = _begin(_Looking, self.cache, model, batch, at)
        asked = model.asked(batch.task)
        self.cache.shared.append({name: each.share(enc, batch) for name, each in asked if each.whole})
        return Pass({}, {})


@dataclass(frozen=True)
class Contrast:
    """The losses of the objectives that look at the whole batch."""

    cache: Cache

    def run(self, model: PretrainModel, batch: Batch, at: Moment) -> Pass:
        """See `Phase`."""
        enc = _begin(_Leaves, self.cache, model, batch, at)
        asked = {name: each for name, each in model.asked(batch.task) if each.whole}
        return model.ask(asked, enc, batch, self.cache.everyone)


@dataclass(frozen=True)
class Deliver:
    """The streams again, their gradients, and the other objectives' losses."""

    cache: Cache

    def run(self, model: PretrainModel, batch: Batch, at: Moment) -> Pass:
        """See `Phase`."""
        enc = _begin(_Again, self.cache, model, batch, at)
        own = slice(at.number * len(batch), (at.number + 1) * len(batch))
        meets: list[tuple[Tensor, Tensor | None]] = []
        asked = dict(model.asked(batch.task))
        for name, gradients in self.cache.home.items():
            again = asked[name].share(enc, batch)
            meets += [(part, None if g is None else g[own]) for part, g in zip(again, gradients, strict=True)]
        for (kind, view), leaves in self.cache.joined.items():
            rows = self.cache.rows((kind, view), at.number)
            stream = enc.text(view) if kind == "text" else enc.visual(view)
            for part, leaf in zip(stream, leaves, strict=True):
                if part is not None and leaf is not None and leaf.grad is not None:
                    meets.append((part, _cut(leaf.grad[rows], part)))
        wanted = [(part, g.to(part.dtype)) for part, g in meets if g is not None and part.requires_grad]
        delivered: Tensor = _Bring.apply(*(part for pair in wanted for part in pair))  # type: ignore[no-untyped-call]
        others = {name: each for name, each in asked.items() if not each.whole}
        made = model.ask(others, enc, batch, {})
        return made._replace(delivered=delivered)


class _Bring(torch.autograd.Function):
    """tensor, gradient, tensor, gradient, ... -> zero; backward gives each tensor its gradient.

    The gradients come from an earlier backward of the same step, so they hold the engine's scale already.
    """

    @staticmethod
    def forward(ctx: Any, *pairs: Tensor) -> Tensor:
        ctx.gradients = pairs[1::2]
        return pairs[0].new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        return tuple(part for gradient in ctx.gradients for part in (gradient, None))


def _begin(kind: type[E], cache: Cache, model: PretrainModel, batch: Batch, at: Moment) -> E:
    """Encodings of a micro-batch with its twin's, which are made once for all passes."""
    enc = kind(model.family, batch, at, model.key_queues(), cache.twins[at.number])
    enc.cache = cache
    return enc


def _join(streams: Sequence[Stream]) -> Stream:
    """One stream of all micro-batches, as leaves; lengths differ from micro-batch to micro-batch."""
    length = max(stream.hidden.shape[1] for stream in streams)
    even = [
        stream._replace(
            **{
                name: lengthened(part, length)
                for name in ("hidden", "mask", "codes", "picked", "order", "skip", "keys")
                if (part := getattr(stream, name)) is not None
            }
        )
        for stream in streams
    ]
    parts = (None if each[0] is None else _leaf(torch.cat(each)) for each in zip(*even, strict=True))
    return Stream(*parts)  # type: ignore[arg-type]


def _each(states: S, change: Callable[[Tensor], Tensor]) -> S:
    return type(states)(*(None if part is None else change(part) for part in states))  # type: ignore[arg-type]


def _leaf(part: Tensor) -> Tensor:
    return part.detach().requires_grad_(part.is_floating_point())


def _cut(part: Tensor, like: Tensor) -> Tensor:
    """Without the padding that joining added."""
    return part[:, : like.shape[1]] if part.ndim > 1 else part


def _rank_order(everyone: Tensor, number: int) -> Tensor:
    """The reverse of `model.global_order`."""
    blocks = everyone.view(number, distributed.world_size(), -1, *everyone.shape[1:])
    return blocks.transpose(0, 1).reshape(everyone.shape)


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


@contextmanager
def _random(state: tuple[Tensor, Tensor | None], device: torch.device) -> Iterator[None]:
    """Draws inside go on from `state`; outside they do not notice."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state(state[1], device)
        yield
