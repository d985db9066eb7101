"""Small shards for the tests, and where the real ones are."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
import pytest

from vlscale.data.text import SPECIAL_TOKENS, Tokenizer
from vlscale.types import Inputs

Members = list[tuple[str, bytes]]
WORDS = ("a", "red", "blue", "green", "thing", "number", *(str(n) for n in range(64)))
INPUTS = Inputs(image_size=16, text_length=12, separator=False)


def shared() -> Path:
    """The folder of real shards; where it is absent the test is skipped, but in CI it fails."""
    return _beside("data", "the real shards are")


def reference_folder(system: str) -> Path:
    """The folder of a system's reference tensors; where it is absent the test is skipped, but in CI it fails."""
    return _beside(f"reference/{system}", f"the reference tensors of {system} are")


def _beside(name: str, what: str) -> Path:
    root = Path(os.environ.get("VLSCALE_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if (root / name).is_dir():
        return root / name
    message = f"{what} not beside the project; set VLSCALE_SHARED"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    """A plain tar of (name, bytes)."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, BytesIO(data))
    return path


def png(number: int, side: int = 24) -> bytes:
    """A picture of its own for every number."""
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
    encoded = cv2.imencode(".png", pixels)[1]
    return bytes(encoded.tobytes())


def sample(number: int, caption: object = None, picture: bytes | None = None) -> Members:
    """The members of sample `number`."""
    record = {"caption": f"a red thing number {number}" if caption is None else caption}
    return [
        (f"s{number:03d}.png", png(number) if picture is None else picture),
        (f"s{number:03d}.json", json.dumps(record).encode()),
    ]


def write_samples(folder: Path, count: int, per_shard: int, special: Mapping[int, Members]) -> str:
    """Shards of `count` samples, some of them `special`; the glob that names them."""
    folder.mkdir(parents=True, exist_ok=True)
    for n, start in enumerate(range(0, count, per_shard)):
        numbers = range(start, min(start + per_shard, count))
        members = [member for i in numbers for member in special.get(i, sample(i))]
        write_tar(folder / f"part-{n:03d}.tar", members)
    return str(folder / "part-*.tar")


def write_vocabulary(tokens: Iterable[str], path: Path) -> None:
    """Write `vocab.txt`, one token per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{token}\n" for token in tokens), encoding="utf-8")


def make_tokenizer(folder: Path, inputs: Inputs = INPUTS) -> Tokenizer:
    """A tokenizer that knows `WORDS`."""
    write_vocabulary([*SPECIAL_TOKENS, *WORDS], folder / "vocab.txt")
    return Tokenizer(folder, inputs)
