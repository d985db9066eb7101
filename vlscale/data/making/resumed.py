"""Copies of shards that take long to make: ended early, the same call goes on after the copies that are whole."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from vlscale.data.making.write import Member, Written, rewrite
from vlscale.data.shards import Shards
from vlscale.errors import ConfigError, DataError

BEGUN = ".begun.json"  # what the copies are made of, beside them until all are whole


def rewrite_resumed(
    shards: Shards, folder: Path, change: Callable[[range], Iterator[Member]], made_of: Mapping[str, str | float]
) -> Written:
    """As `rewrite`, going on after copies that an earlier call has made of the same shards and of `made_of`.

    ConfigError if `folder` holds shards of these names that another call has made, DataError if no sample could be
    written.
    """
    note, whole = _begin(shards, folder, {**made_of, "shards": shards.fingerprint()})
    try:
        written = rewrite(shards, folder, change, whole=whole)
    except DataError:
        if not any(folder.glob("*.tar")):
            note.unlink(missing_ok=True)
            with suppress(OSError):  # it held something before
                folder.rmdir()
        raise
    note.unlink()
    return written


def _begin(shards: Shards, folder: Path, made_of: Mapping[str, str | float]) -> tuple[Path, list[str]]:
    """The note of what is being made, and the copies that an earlier call has made of the same."""
    note, told = folder / BEGUN, json.dumps(made_of)
    names = [os.path.basename(path) for path in shards.paths]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        there = [name for name in names if (folder / name).exists()]
        if note.exists() and note.read_text(encoding="utf-8") == told:
            return note, there
        if not there:
            note.write_text(told, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--to {folder} cannot be written ({error.strerror}); write a folder that can") from error
    if there:
        raise ConfigError(f"{folder / there[0]} is there already; write another --to, or remove the old shards")
    return note, []
