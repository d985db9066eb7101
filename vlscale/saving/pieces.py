"""The state of a run by name: flat pieces of named tensors in plain safetensors files, whoever wrote or reads them.

    rank_00000.safetensors    what rank 0 holds: keys `NAME@START`, each a stretch [n] of the flat tensor NAME
                              that begins at element START; the metadata `shapes` tells the whole shapes

Names say what a tensor is: `master/P` is parameter P in fp32 (a frozen one as it is trained with; a momentum twin's
is its average), `KEY/P` the optimizer's KEY of it, `buffer/B` a buffer that is alike on all ranks, `ring/B` [parts,
places, ...] one of a key queue, `ranks/B` [ranks, ...] what each rank has of its own. The stretches of a name tile
it once over all files, so any number of ranks at any ZeRO stage reads what it needs.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vlscale.errors import CheckpointError

FILES = "rank_*.safetensors"
CHUNK = 1 << 24  # bytes that are hashed and written at a time
MASTER, BUFFER, RING, RANKS = "master/", "buffer/", "ring/", "ranks/"
NAMES = {  # safetensors' of types
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Piece:
    """A stretch of a named tensor."""

    name: str
    shape: tuple[int, ...]  # of the whole tensor
    start: int  # the stretch's first element in the whole, flat
    values: Tensor  # [n], on whatever device


class Writable(Protocol):
    """What `write` needs of a file."""

    def write(self, data: memoryview, /) -> Any:
        """Take bytes; no more is asked of a file than to take them in order."""
        ...


def file_of(rank: int) -> str:
    """The name of the file with a rank's pieces."""
    return f"rank_{rank:05d}.safetensors"


def write(file: Writable, pieces: Sequence[Piece]) -> tuple[int, str]:
    """Stream pieces as one safetensors file; returns (its size in bytes, its sha256).

    Nothing is copied but, of what is not on the host, one piece at a time.
    """
    ordered = sorted(pieces, key=lambda piece: -piece.values.element_size())  # so that each lies aligned
    header: dict[str, Any] = {
        "__metadata__": {"format": "pt", "shapes": json.dumps({piece.name: piece.shape for piece in pieces})}
    }
    size = 0
    for piece in ordered:
        end = size + piece.values.numel() * piece.values.element_size()
        dtype, shape = NAMES[piece.values.dtype], [piece.values.numel()]
        header[f"{piece.name}@{piece.start}"] = {"dtype": dtype, "shape": shape, "data_offsets": [size, end]}
        size = end
    assert len(header) == len(pieces) + 1, "a stretch stands once"
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    for part in (memoryview(len(text).to_bytes(8, "little")), memoryview(text), *_bytes(ordered)):
        digest.update(part)
        file.write(part)
    return 8 + len(text) + size, digest.hexdigest()


def _bytes(pieces: Iterable[Piece]) -> Iterator[memoryview]:
    for piece in pieces:
        if piece.values.numel():
            whole = memoryview(piece.values.detach().cpu().contiguous().view(torch.uint8).numpy())  # type: ignore[arg-type]
            for first in range(0, len(whole), CHUNK):
                yield whole[first : first + CHUNK]


class Stretch(NamedTuple):
    """Where some elements of a tensor lie."""

    start: int
    length: int
    file: Path
    key: str


class Reader:
    """Named tensors out of all ranks' files in a folder; nothing is read before it is asked for.

    Args:
        folder: of a checkpoint.
        names: of its files; None = all that are there.

    Raises:
        CheckpointError: there is no such file, or one is not readable.
    """

    def __init__(self, folder: Path, names: Sequence[str] | None = None) -> None:
        self.folder = folder
        files = sorted(folder.glob(FILES) if names is None else (folder / name for name in names))
        if not files:
            raise CheckpointError(f"{folder} holds no {FILES}; give a checkpoint's folder")
        self._files: dict[Path, Any] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._stretches: dict[str, list[Stretch]] = {}
        for file in files:
            self._list(file)
        for stretches in self._stretches.values():
            stretches.sort()

    def names(self) -> list[str]:
        """Of all tensors, sorted."""
        return sorted(self._shapes)

    def __contains__(self, name: object) -> bool:
        return name in self._shapes

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a whole tensor.

        Raises:
            CheckpointError: there is no such tensor.
        """
        if name not in self._shapes:
            raise CheckpointError(f"{self.folder} holds no tensor '{name}'; it is of another model")
        return self._shapes[name]

    def read(self, name: str, start: int, count: int) -> Tensor:
        """`count` elements from `start` on of a tensor, flat: [count], in memory of its own.

        Raises:
            CheckpointError: some of them are in no file, or a file is not readable.
        """
        self.shape(name)
        stretches = self._stretches[name]
        parts: list[Tensor] = []
        at, end = start, start + count
        place = max(0, bisect_right(stretches, start, key=lambda stretch: stretch.start) - 1)
        for stretch in stretches[place:]:
            stop = min(end, stretch.start + stretch.length)
            if stretch.start > at or (at >= end and parts):
                break
            if stop >= at:
                parts.append(self._slice(stretch, at - stretch.start, stop - stretch.start))
                at = stop
        if at < end or not parts:
            raise CheckpointError(f"{self.folder} lacks the elements {at} to {end - 1} of '{name}'")
        return torch.cat(parts)

    def whole(self, name: str) -> Tensor:
        """A tensor in its own shape.

        Raises:
            CheckpointError: as `read`.
        """
        shape = self.shape(name)
        return self.read(name, 0, torch.Size(shape).numel()).view(shape)

    def _list(self, file: Path) -> None:
        try:
            opened: Any = safe_open(file, framework="pt")
            self._files[file] = opened
            for name, shape in json.loads(opened.metadata()["shapes"]).items():
                known = self._shapes.setdefault(name, tuple(shape))
                if known != tuple(shape):
                    raise CheckpointError(f"{file} has '{name}' of shape {tuple(shape)}, other files {known}")
            for key in opened.keys():  # noqa: SIM118 - it is no mapping
                name, start = key.rsplit("@", 1)
                length = opened.get_slice(key).get_shape()[0]
                self._stretches.setdefault(name, []).append(Stretch(int(start), length, file, key))
        except (SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{file} is not readable as pieces of a run's state ({error})") from error

    def _slice(self, stretch: Stretch, start: int, stop: int) -> Tensor:
        try:
            found: Tensor = self._files[stretch.file].get_slice(stretch.key)[start:stop]
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{stretch.file} is not readable at '{stretch.key}' ({error})") from error
        return found


def weights(reader: Reader, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """{our name: whole tensor} of every parameter and buffer, on the host.

    Args:
        reader: of a checkpoint.
        dtype: parameters are rounded to it; None = as they are kept, in fp32 where there are masters.

    Returns:
        Buffers keep their type. What each rank had of its own is the mean over ranks, or the greatest of integers.

    Raises:
        CheckpointError: as `Reader.read`.
    """
    found = {}
    for name in reader.names():
        kind, own = name.split("/", 1)
        if f"{kind}/" == MASTER:
            whole = reader.whole(name)
            found[own] = whole if dtype is None or not whole.is_floating_point() else whole.to(dtype)
        elif f"{kind}/" == BUFFER:
            found[own] = reader.whole(name)
        elif f"{kind}/" == RING:
            found[own] = reader.whole(name).transpose(0, 1).flatten(0, 1)
        elif f"{kind}/" == RANKS:
            found[own] = over_ranks(reader.whole(name))
    return found


def over_ranks(everyone: Tensor) -> Tensor:
    """[W, ...] -> [...]: what stands for all ranks' own, the mean, or of integers the greatest."""
    if everyone.is_floating_point():
        return everyone.double().mean(dim=0).to(everyone.dtype)
    return everyone.amax(dim=0)
