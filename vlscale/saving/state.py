"""What this rank holds of a run's state: where its parts of the parameters lie, and all tensors by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from vlscale import agreement, distributed
from vlscale.errors import CheckpointError
from vlscale.nn.moving import Moving
from vlscale.nn.queue import KeyQueue
from vlscale.saving.pieces import BUFFER, MASTER, RANKS, RING, Piece, Reader, over_ranks

if TYPE_CHECKING:
    from vlscale.averages import Averages
    from vlscale.model import PretrainModel


class Span(NamedTuple):
    """A stretch of a trainable parameter and where its fp32 master lies on this rank."""

    parameter: nn.Parameter
    first: int  # element of the whole parameter, flat
    flat: Tensor  # the tensor that the optimizer is handed
    start: int  # element of it
    length: int

    def of(self, values: Tensor) -> Tensor:
        """The stretch [length] of `values`, a tensor of the shape of `flat`: a view."""
        return values.detach().view(-1)[self.start : self.start + self.length]


def whole(masters: Iterable[tuple[nn.Parameter, Tensor]]) -> list[Span]:
    """Every rank keeps all of it: plain PyTorch and ZeRO 0; (parameter, its fp32 master) each."""
    return [Span(parameter, 0, master, 0, master.numel()) for parameter, master in masters]


def partitioned(parameters: Iterable[nn.Parameter], weights: Sequence[Tensor], masters: Sequence[Tensor]) -> list[Span]:
    """Each rank keeps its part of each group: ZeRO 1 and 2.

    Args:
        parameters: trainable, whole on every rank.
        weights: [n] each, flat training-precision weights of each group, of which the parameters are views.
        masters: [n / W] each, this rank's part of each group's fp32 masters.
    """
    spans = []
    for parameter in parameters:
        group, at = place(parameter, weights)
        size = masters[group].numel()
        begin = distributed.rank() * size
        first, stop = max(0, begin - at), min(parameter.numel(), begin + size - at)
        if stop > first:
            spans.append(Span(parameter, first, masters[group], at + first - begin, stop - first))
    return spans


def sharded(parameters: Iterable[nn.Parameter], optimizer: Any) -> list[Span]:
    """Each rank keeps its part of each parameter: ZeRO 3.

    Args:
        parameters: trainable, partitioned.
        optimizer: DeepSpeed's, with `fp32_partitioned_groups_flat` (this rank's part of the masters, one flat
            tensor per sub-group) and `grad_position` (where a parameter's part lies in them).
    """
    spans = []
    for parameter in parameters:
        group, start, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
        first = distributed.rank() * size
        count = min(size, torch.Size(whole_shape(parameter)).numel() - first)
        if count > 0:  # the rest is padding
            spans.append(Span(parameter, first, optimizer.fp32_partitioned_groups_flat[group], start, count))
    return spans


def place(tensor: Tensor, flats: Sequence[Tensor]) -> tuple[int, int]:
    """(number of the flat buffer that `tensor` is a view of, its first element there)."""
    for number, flat in enumerate(flats):
        start = (tensor.data_ptr() - flat.data_ptr()) // flat.element_size()
        if start >= 0 and start + tensor.numel() <= flat.numel() and tensor.device == flat.device:
            return number, start
    raise AssertionError("a trainable parameter is in one of the optimizer's flat buffers")


class State:
    """Every tensor that a run goes on from, as far as it lives on this rank; all live.

    Args:
        model: whose names they have.
        spans: of all trainable parameters.
        averages: of the momentum twin.
        mover: the torch optimizer that moves a span's flat tensor.
    """

    def __init__(
        self,
        model: PretrainModel,
        spans: Sequence[Span],
        averages: Averages,
        mover: Callable[[Tensor], torch.optim.Optimizer],
    ) -> None:
        self._model, self._spans, self._averages, self._mover = model, spans, averages, mover
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        self._twins = {online: twin for online, twin in model.momentum_pairs() if online.requires_grad}

    def pieces(self, alike: bool) -> list[Piece]:
        """What this rank writes; `alike`: masters and optimizer are the same on every rank (`whole`)."""
        moved = [piece for span, piece in self._moved() if piece.shape or span.first == 0]
        own, everyones = buffers(self._model)
        for piece, is_part in self._frozen():
            (own if is_part else everyones).append(piece)
        (everyones if alike else own).extend(moved)
        return [*own, *deal(everyones)]

    def restore(self, reader: Reader) -> None:
        """Read back what all ranks' `pieces` were, whatever their number and ZeRO stage. All ranks take part.

        Raises:
            CheckpointError: what was written does not fit this run's model; on all ranks, though one alone may lack it.
        """
        agreement.together(lambda: self._restore(reader))

    @torch.no_grad()
    def _restore(self, reader: Reader) -> None:
        names = {MASTER + name for name in self._names.values()}
        surplus = [name for name in reader.names() if name.startswith(MASTER) and name not in names]
        if surplus:
            raise CheckpointError(
                f"{reader.folder} holds '{surplus[0]}', for which this run's model has no place ({len(surplus)} such); "
                f"start the run with the recipe that the checkpoint was written with"
            )
        self._make_room(reader)
        for _, piece in self._moved():
            fill(piece, reader)
        for piece, _ in self._frozen():
            fill(piece, reader)
        restore_buffers(self._model, reader)

    def _moved(self) -> Iterator[tuple[Span, Piece]]:
        """What moves with the steps: masters, the optimizer's state of them, and the twin's averages."""
        pairs = zip(self._averages.masters, self._averages.averages, strict=True)
        followed = {master.data_ptr(): average for master, average in pairs}
        for span in self._spans:
            name, shape = self._names[span.parameter], whole_shape(span.parameter)
            yield span, Piece(MASTER + name, shape, span.first, span.of(span.flat))
            if span.parameter in self._twins:
                average, twin = followed[span.flat.data_ptr()], self._names[self._twins[span.parameter]]
                yield span, Piece(MASTER + twin, shape, span.first, span.of(average))
            for key, value in self._mover(span.flat).state.get(span.flat, {}).items():
                if value.dim() == 0:
                    yield span, Piece(f"{key}/{name}", (), 0, value.detach().view(1))
                else:
                    yield span, Piece(f"{key}/{name}", shape, span.first, span.of(value))

    def _frozen(self) -> Iterator[tuple[Piece, bool]]:
        """(piece, whether other ranks have other parts) of what no step moves."""
        moved = {*(span.parameter for span in self._spans), *self._twins.values()}
        for parameter, name in self._names.items():
            if parameter.requires_grad or parameter in moved:
                continue
            shape = whole_shape(parameter)
            shard = getattr(parameter, "ds_tensor", None)
            if shard is None:
                yield Piece(MASTER + name, shape, 0, parameter.detach().view(-1)), False
            else:
                first = distributed.rank() * shard.numel()
                count = min(shard.numel(), torch.Size(shape).numel() - first)
                if count > 0:
                    yield Piece(MASTER + name, shape, first, shard.detach().view(-1)[:count]), True

    def _make_room(self, reader: Reader) -> None:
        """The optimizer's state has the entries that were written, as the optimizer itself makes them."""
        kept: dict[str, list[str]] = {}
        for name in reader.names():
            key, own = name.split("/", 1)
            kept.setdefault(own, []).append(key)
        wanted: dict[Tensor, dict[str, bool]] = {}  # for each flat tensor, whether an entry is one number
        for span in self._spans:
            name = self._names[span.parameter]
            keys = {key: not reader.shape(f"{key}/{name}") for key in kept.get(name, ()) if f"{key}/" != MASTER}
            wanted.setdefault(span.flat, {}).update(keys)
        for flat, keys in wanted.items():
            mover = self._mover(flat)
            state: dict[str, Any] = mover.state[flat]
            for key in set(state) - set(keys):
                del state[key]
            for key in set(keys) - set(state):
                if keys[key]:  # a count, which torch keeps on the host unless its kernel is the fused one
                    device = flat.device if mover.defaults.get("fused") else None
                    state[key] = torch.zeros((), dtype=torch.float32, device=device)
                else:
                    state[key] = torch.zeros_like(flat, requires_grad=False)


def whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """A parameter's shape, also where ZeRO 3 has cut it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def deal(alike: Sequence[Piece]) -> Iterator[Piece]:
    """This rank's share of whole tensors that all ranks hold alike: as many bytes as the others', each tensor once."""
    sizes = [piece.values.numel() * piece.values.element_size() for piece in alike]
    rank, ranks = distributed.rank(), distributed.world_size()
    low, high = sum(sizes) * rank // ranks, sum(sizes) * (rank + 1) // ranks
    at = 0
    for piece, size in zip(alike, sizes, strict=True):
        each = piece.values.element_size()
        start, stop = (min(size, max(0, limit - at)) // each for limit in (low, high))
        if stop > start or (size == 0 and rank == 0):
            yield Piece(piece.name, piece.shape, start, piece.values[start:stop])
        at += size


def buffers(model: nn.Module) -> tuple[list[Piece], list[Piece]]:
    """(what differs from rank to rank, what is alike on all) of a model's buffers.

    Key queues are alike or lie in parts on the ranks; the figures of `nn.moving` are alike; what any other layer
    keeps (BatchNorm's statistics) is each rank's own.
    """
    own: list[Piece] = []
    alike: list[Piece] = []
    ranks = distributed.world_size()
    for path, module in model.named_modules():
        for key, buffer in module.named_buffers(path, recurse=False):
            flat = buffer.detach().view(-1)
            if isinstance(module, KeyQueue) and key.rpartition(".")[2] in KeyQueue.RINGS:
                parts, part = (ranks, distributed.rank()) if module.sharded else (1, 0)
                piece = Piece(RING + key, (parts, *buffer.shape), part * flat.numel(), flat)
                (own if module.sharded else alike).append(piece)
            elif isinstance(module, KeyQueue | Moving):
                alike.append(Piece(BUFFER + key, tuple(buffer.shape), 0, flat))
            else:
                own.append(Piece(RANKS + key, (ranks, *buffer.shape), distributed.rank() * flat.numel(), flat))
    return own, alike


def restore_buffers(model: nn.Module, reader: Reader) -> None:
    """Read back what `buffers` names, whatever the number of ranks that wrote it.

    Raises:
        CheckpointError: a buffer is missing or of another shape.
    """
    queues = {f"{path}.{key}": module for path, module in model.named_modules() for key in _rings(module)}
    for piece in (each for side in buffers(model) for each in side):
        kind, name = piece.name.split("/", 1)
        there = reader.shape(piece.name)
        if there == piece.shape:
            fill(piece, reader)
        elif f"{kind}/" == RANKS and there[1:] == piece.shape[1:]:
            piece.values.copy_(over_ranks(reader.whole(piece.name)).view(-1))
        elif f"{kind}/" == RING and there[2:] == piece.shape[2:] and there[0] * there[1] == queues[name].capacity:
            size = torch.Size(there[1:]).numel()
            for part in range(there[0]):
                rows = reader.read(piece.name, part * size, size).view(there[1:])
                queues[name].take(name.rpartition(".")[2], rows, part, there[0])
        else:
            fill(piece, reader)  # says what is wrong


def fill(piece: Piece, reader: Reader) -> None:
    """Read a stretch into its place.

    Raises:
        CheckpointError: there is no such tensor, or it is of another shape.
    """
    there = reader.shape(piece.name)
    if there != piece.shape:
        raise CheckpointError(
            f"{reader.folder} holds '{piece.name}' of shape {there}, but in this run it is {piece.shape}; "
            f"start the run with the recipe and data that the checkpoint was written with"
        )
    piece.values.copy_(reader.read(piece.name, piece.start, piece.values.numel()))


def _rings(module: nn.Module) -> tuple[str, ...]:
    return KeyQueue.RINGS if isinstance(module, KeyQueue) else ()
