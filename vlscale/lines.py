"""Files that grow by lines, on disks that may be full for a while."""

from __future__ import annotations

from io import FileIO
from pathlib import Path


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
            self._file.close()
        self._file = None
