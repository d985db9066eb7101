"""`SHA256SUMS` beside the shards, in the form that `sha256sum --check` reads."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from vlscale.data.storage.locks import alone
from vlscale.data.storage.stores import Stores, scheme, shown
from vlscale.errors import DataError

SUMS = "SHA256SUMS"
BLOCK = 2**20
LARGEST = 2**26  # bytes of a `SHA256SUMS` that are read


def sha256(path: Path) -> str:
    """64 hex digits of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def read_sums(folder: Path) -> dict[str, str]:
    """{name: sha256} of a folder's shards; empty where no `SHA256SUMS` is. DataError if it is damaged."""
    file = folder / SUMS
    try:
        return _parse(file.read_bytes(), str(file))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error}); mend or remove it") from error


def _parse(data: bytes, name: str) -> dict[str, str]:
    sums: dict[str, str] = {}
    for line in data.decode(errors="replace").splitlines():
        digest, _, shard = line.partition(" ")
        if len(digest) != 64 or shard[:1] not in (" ", "*"):
            raise DataError(f"{name} holds the line '{line[:80]}'; write a sha256, two spaces and a name, or remove it")
        sums[shard[1:]] = digest.lower()
    return sums


def told(url: str, stores: Stores) -> str | None:
    """What the `SHA256SUMS` beside a shard says of it; None where there is none. DataError if it is damaged."""
    if not scheme(url):
        return read_sums(Path(url).parent).get(os.path.basename(url))
    folder, _, name = shown(url).rpartition("/")
    beside = f"{folder}/{SUMS}"
    try:
        stat = stores.stat(beside)
        data = stores.read(beside, 0, min(stat.size, LARGEST), stat)
    except DataError:
        return None
    return _parse(data, beside).get(name)


def sha256_of(url: str, stores: Stores) -> str:
    """64 hex digits of a shard's bytes, wherever it lies."""
    if not scheme(url):
        return sha256(Path(url))
    digest, stat = hashlib.sha256(), stores.stat(url)
    for piece in stores.pieces(url, 0, stat.size, stat):
        digest.update(piece)
    return digest.hexdigest()


def add_sums(folder: Path, sums: Mapping[str, str]) -> None:
    """Put `sums` into the folder's `SHA256SUMS`, in place of older ones of the same names."""
    with alone(folder):
        merged = {**read_sums(folder), **sums}
        scratch = folder / f".{SUMS}.part"
        scratch.write_text("".join(f"{digest}  {name}\n" for name, digest in sorted(merged.items())), encoding="utf-8")
        os.replace(scratch, folder / SUMS)
