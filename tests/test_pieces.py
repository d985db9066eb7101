"""Pieces of named tensors: written as a stream, read back by anyone, and what is missing is named."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from vlscale.errors import CheckpointError
from vlscale.saving import pieces
from vlscale.saving.pieces import Piece, Reader


def put(folder: Path, rank: int, held: Sequence[Piece]) -> bytes:
    """A rank's file; its bytes."""
    with (folder / pieces.file_of(rank)).open("wb") as file:
        size, digest = pieces.write(file, held)
    written = (folder / pieces.file_of(rank)).read_bytes()
    assert (len(written), hashlib.sha256(written).hexdigest()) == (size, digest)
    return written


def cut(name: str, whole: Tensor, *ends: int) -> list[Piece]:
    """A tensor in pieces that end where told."""
    flat = whole.flatten()
    starts = (0, *ends)
    return [
        Piece(name, tuple(whole.shape), start, flat[start:end])
        for start, end in zip(starts, (*ends, len(flat)), strict=True)
    ]


EVERY = [
    torch.randn(3, 5, dtype=torch.float64),
    torch.randn(3, 5),
    torch.randn(3, 5).bfloat16(),
    torch.randn(3, 5).half(),
    torch.randint(-9, 9, (3, 5)),
    torch.randint(0, 2, (3, 5)).bool(),
    torch.randint(0, 255, (3, 5), dtype=torch.uint8),
]


@pytest.mark.parametrize("whole", EVERY, ids=lambda whole: str(whole.dtype))
def test_any_stretch_comes_back_to_the_bit(whole: Tensor, tmp_path: Path) -> None:
    first, second, third = cut("master/a.b@c/d", whole, 4, 11)
    put(tmp_path, 1, [second, Piece("step/x", (), 0, torch.tensor([7.0]))])
    put(tmp_path, 0, [third, first])
    reader = Reader(tmp_path)
    assert reader.names() == ["master/a.b@c/d", "step/x"]
    assert reader.shape("master/a.b@c/d") == (3, 5)
    for start in range(15):
        for count in range(16 - start):
            found = reader.read("master/a.b@c/d", start, count)
            assert found.dtype == whole.dtype
            assert torch.equal(found, whole.flatten()[start : start + count])
    assert torch.equal(reader.whole("master/a.b@c/d"), whole)
    assert torch.equal(reader.whole("step/x"), torch.tensor(7.0))


def test_a_file_is_plain_safetensors_with_each_value_aligned(tmp_path: Path) -> None:
    held = [Piece(f"n/{number}", (15,), 0, whole.flatten()) for number, whole in enumerate(EVERY)]
    held.insert(0, Piece("n/view", (4,), 0, torch.arange(8)[::2]))  # not contiguous
    held.insert(0, Piece("n/none", (0, 3), 0, torch.zeros(0)))
    written = put(tmp_path, 0, held)
    assert (8 + int.from_bytes(written[:8], "little")) % 8 == 0
    found = load_file(tmp_path / pieces.file_of(0))
    assert found.keys() == {f"{piece.name}@0" for piece in held}
    assert all(torch.equal(found[f"{piece.name}@0"], piece.values) for piece in held)
    assert Reader(tmp_path).whole("n/none").shape == (0, 3)


def test_a_large_piece_is_written_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "CHUNK", 64)
    whole = torch.randn(100)

    class Watched(io.BytesIO):
        longest = 0

        def write(self, data: memoryview) -> int:  # type: ignore[override]
            if self.tell() > 8 + 256:
                self.longest = max(self.longest, len(data))
            return super().write(data)

    file = Watched()
    pieces.write(file, cut("a/b", whole))
    assert file.longest == 64
    (tmp_path / pieces.file_of(0)).write_bytes(file.getvalue())
    assert torch.equal(Reader(tmp_path).whole("a/b"), whole)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no rank_\*\.safetensors"):
        Reader(tmp_path)
    first, second, third = cut("master/a", torch.randn(10), 3, 7)
    put(tmp_path, 0, [first, third])
    reader = Reader(tmp_path)
    assert len(reader.read("master/a", 7, 3)) == 3
    for start, count in ((0, 10), (3, 1), (2, 3)):
        with pytest.raises(CheckpointError, match=r"lacks the elements 3 to \d of 'master/a'"):
            reader.read("master/a", start, count)
    with pytest.raises(CheckpointError, match="lacks the elements 10 to 10 of 'master/a'"):
        reader.read("master/a", 8, 3)
    with pytest.raises(CheckpointError, match="holds no tensor 'master/b'"):
        reader.whole("master/b")
    put(tmp_path, 1, [Piece("master/a", (2, 5), 3, second.values)])
    with pytest.raises(CheckpointError, match=r"rank_00001.*'master/a' of shape \(2, 5\), other files \(10,\)"):
        Reader(tmp_path)


@pytest.mark.parametrize("harm", ["cut", "foreign", "empty"])
def test_a_broken_file_is_named(harm: str, tmp_path: Path) -> None:
    written = put(tmp_path, 0, cut("master/a", torch.randn(10)))
    other = {"cut": written[:-1], "foreign": b"PK" + written, "empty": b""}[harm]
    (tmp_path / pieces.file_of(0)).write_bytes(other)
    with pytest.raises(CheckpointError, match=r"rank_00000\.safetensors is not readable"):
        Reader(tmp_path)


def test_a_foreign_safetensors_file_is_named(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, tmp_path / pieces.file_of(0))
    with pytest.raises(CheckpointError, match=r"rank_00000\.safetensors is not readable"):
        Reader(tmp_path)


def test_weights_are_rounded_masters_and_buffers_in_their_places(tmp_path: Path) -> None:
    master, ring = torch.randn(4, 3), torch.arange(12).view(6, 2)
    ranks = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 9.0]])
    held = [
        *cut("master/family.a", master, 5),
        *cut("exp_avg/family.a", master),
        *cut("buffer/queues.text.pointer", torch.tensor([3])),
        *cut("ring/queues.text.ids", torch.stack([ring[0::2], ring[1::2]])),
        *cut("ranks/norm.mean", ranks, 2, 4),
        *cut("ranks/norm.batches", torch.tensor([7, 9, 8])),
    ]
    put(tmp_path, 0, held[::2])
    put(tmp_path, 1, held[1::2])
    reader = Reader(tmp_path)
    found = pieces.weights(reader, torch.bfloat16)
    expected = {
        "family.a": master.bfloat16(),
        "queues.text.pointer": torch.tensor([3]),
        "queues.text.ids": ring,
        "norm.mean": torch.tensor([3.0, 5.0]),
        "norm.batches": torch.tensor(9),
    }
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    assert torch.equal(pieces.weights(reader)["family.a"], master)
