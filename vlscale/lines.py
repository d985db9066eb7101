"""Files that grow by lines, on disks that may be full for a while."""

from __future__ import annotations

import json
import math
import os
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any


class Lines:
    """Adds lines to a file. Those that the disk does not take are kept, and tried again with the next."""

    def __init__(self, path: Path) -> None:
        """The file is made with the first line."""
        self._path = path
        self._file: FileIO | None = None
        self._waiting = b""

    def add(self, lines: str = "") -> str:
        """Write them, each with its line end, and what waits; returns why some still wait, empty = none does."""
        self._waiting += lines.encode("utf-8")
        try:
            if self._file is None and self._waiting:
                self._file = self._path.open("ab", buffering=0)
            while self._file is not None and self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            return f"{self._path} cannot be written ({error.strerror}); its lines are kept until it can"
        return ""

    def close(self) -> None:
        """Try once more, and let go of the file until the next line."""
        self.add()
        if self._file is not None:
            with suppress(OSError):  # a server may tell only now that its disk is full
                self._file.close()
        self._file = None

    def forget_after(self, step: int) -> str:
        """Drop the JSON lines of later steps, and one that was cut off in writing; returns why they stay, empty = not.

        The file is replaced whole, or where the disk has no room for that, changed where it lies.
        """
        self.close()
        try:
            before = self._path.read_bytes() if self._path.exists() else b""
            lines = (before + self._waiting).splitlines(keepends=True)
            kept = b"".join(line for line in lines if _step_of(line) <= step)
            if kept == before:
                self._waiting = b""
                return ""
            fresh = self._path.with_name(self._path.name + ".tmp")
            try:
                fresh.write_bytes(kept)
                os.replace(fresh, self._path)
                self._waiting = b""
            except OSError:
                with suppress(OSError):
                    fresh.unlink()
                with self._path.open("r+b") as file:
                    file.write(kept[: len(before)])
                    file.truncate()
                self._waiting = kept[len(before) :]
        except OSError as error:
            return f"{self._path} cannot be written ({error.strerror}); it still has lines of steps that are made again"
        return ""


def read(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file about steps, but for one that was cut off in writing; none if there is no file."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if _step_of(line) < math.inf]


def _step_of(line: bytes) -> float:
    try:
        return float(json.loads(line)["step"]) if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf
