"""Folders for what comes out of a store; they do not outlive who fetched it."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import weakref
from contextlib import suppress
from pathlib import Path

from vlscale.data.storage import locks

PREFIX = "vlscale-checkpoint-"
YOUNG = 60.0  # seconds


class Fetched:
    """A folder for what comes out of a store; it lasts as long as this. Those of processes that were killed go."""

    def __init__(self) -> None:
        for left in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
            _remove_left(left)
        self.path = tempfile.mkdtemp(prefix=PREFIX)
        descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        locks.take(descriptor, wait=False)
        self.remove = weakref.finalize(self, _remove, self.path, descriptor)


def _remove(path: str, descriptor: int) -> None:
    shutil.rmtree(path, ignore_errors=True)
    os.close(descriptor)


def _remove_left(folder: Path) -> None:
    """Unless a process has it, or may just be about to lock it."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            young = time.time() - os.fstat(descriptor).st_mtime < YOUNG
            if not young and locks.take(descriptor, wait=False) == "ours":
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(descriptor)
