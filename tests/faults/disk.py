"""Between a rank and the files of its run: counts what is done to them, and lets it go wrong."""

from __future__ import annotations

import builtins
import errno
import io
import os
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.faults.fault import EVERYONE, Fault

BY_PATH = ("mkdir", "rmdir", "unlink", "remove", "rename", "replace", "link", "symlink", "truncate", "chmod")
BY_DESCRIPTOR = ("write", "pwrite", "writev", "fsync", "fdatasync", "ftruncate", "posix_fallocate")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHECKPOINTS = "checkpoints"


class Disk:
    """The file operations of one process on `root` and below it, by whatever thread.

    `counts` is this rank's row of a table that the harness reads: changes under `root`, those among them under
    its checkpoints, and reads there.
    """

    def __init__(self, root: Path, counts: memoryview, faults: Sequence[Fault]) -> None:
        self._root = str(root)
        self._counts = counts
        self._kills = [fault for fault in faults if fault.kind == "kill" and fault.where == "file"]
        self._errors = [fault for fault in faults if fault.kind == "disk"]
        self._read_errors = [fault for fault in faults if fault.kind == "read"]
        self._lock = threading.RLock()
        self._unsynced: set[str] = set()
        self._truncate = os.truncate

    def install(self) -> None:
        """Take the place of the functions that change files, for the rest of this process."""
        for name in BY_PATH:
            setattr(os, name, self._by_path(getattr(os, name)))
        for name in BY_DESCRIPTOR:
            setattr(os, name, self._by_descriptor(getattr(os, name)))
        os.open = self._os_open(os.open)
        io.open = builtins.open = self._open(io.open)  # type: ignore[assignment]

    def done(self, kind: str, path: str, act: Callable[[], Any], half: Callable[[], Any] | None = None) -> Any:
        """Do it, count it, and let happen what is due."""
        if not self._within(path):
            return act()
        with self._lock:
            self._counts[0] += 1
            if in_checkpoints := self._within(path, CHECKPOINTS):
                self._counts[1] += 1
                self._fail(self._errors, self._counts[1], path)
            due = next((kill for kill in self._kills if self._counts[0] >= kill.number), None)
            if due is not None and due.how == "before":
                die(due)
            if due is not None and due.how == "torn" and half is not None:
                half()
                die(due)
            result = act()
            if in_checkpoints:
                self._note(kind, path)
            if due is not None:
                if due.how == "power":
                    self._lose_unsynced()
                die(due)
            return result

    def read(self, path: str) -> None:
        """Before something is read."""
        if self._within(path, CHECKPOINTS):
            with self._lock:
                self._counts[2] += 1
                self._fail(self._read_errors, self._counts[2], path)

    def _fail(self, faults: Sequence[Fault], number: int, path: str) -> None:
        for fault in faults:
            if fault.number <= number < fault.number + fault.count:
                code = getattr(errno, fault.how)
                raise OSError(code, os.strerror(code), path)

    def _note(self, kind: str, path: str) -> None:
        if kind in ("fsync", "fdatasync", "unlink", "remove"):
            self._unsynced.discard(path)
        elif "write" in kind:
            self._unsynced.add(path)

    def _moved(self, source: str, target: str) -> None:
        for path in [each for each in self._unsynced if f"{each}/".startswith(f"{source}/")]:
            self._unsynced.discard(path)
            self._unsynced.add(target + path[len(source) :])

    def _lose_unsynced(self) -> None:
        """What a power cut may leave of files that were never synced."""
        for path in self._unsynced:
            if os.path.isfile(path):
                self._truncate(path, os.path.getsize(path) // 2)

    def _within(self, path: str, folder: str = "") -> bool:
        root = os.path.join(self._root, folder) if folder else self._root
        return path == root or path.startswith(f"{root}/")

    def _by_path(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(path: Any, *rest: Any, **named: Any) -> Any:
            where = _where(path, named.get("dir_fd", named.get("src_dir_fd")))
            result = self.done(function.__name__, where, lambda: function(path, *rest, **named))
            if function.__name__ in ("rename", "replace"):
                self._moved(where, _where(rest[0] if rest else named["dst"], named.get("dst_dir_fd")))
            return result

        return wrapped

    def _by_descriptor(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(descriptor: Any, *rest: Any) -> Any:
            def half() -> None:
                if function.__name__ == "write":
                    function(descriptor, memoryview(rest[0]).cast("B")[: memoryview(rest[0]).nbytes // 2])

            number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
            return self.done(function.__name__, _where(number), lambda: function(descriptor, *rest), half)

        return wrapped

    def _os_open(self, function: Callable[..., int]) -> Callable[..., int]:
        def wrapped(path: Any, flags: int, *rest: Any, **named: Any) -> int:
            if not flags & WRITING:
                return function(path, flags, *rest, **named)
            opened: int = self.done(
                "open", _where(path, named.get("dir_fd")), lambda: function(path, flags, *rest, **named)
            )
            return opened

        return wrapped

    def _open(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(
            file: Any,
            mode: str = "r",
            buffering: int = -1,
            encoding: str | None = None,
            errors: str | None = None,
            newline: str | None = None,
            closefd: bool = True,
            opener: Any = None,
        ) -> Any:
            where = _where(file)
            if not self._within(where):
                return function(file, mode, buffering, encoding, errors, newline, closefd, opener)

            def make() -> _File:
                return _File(self, file, mode.replace("b", "").replace("t", ""), closefd, opener)

            raw = make() if mode.strip("bt") == "r" else self.done("open", where, make)
            return _dressed(raw, mode, buffering, encoding, errors, newline)

        return wrapped


class _File(io.FileIO):
    """A file whose writes and reads the disk hears of."""

    def __init__(self, disk: Disk, file: Any, mode: str, closefd: bool, opener: Any) -> None:
        super().__init__(file, mode, closefd, opener)
        self._disk = disk

    def write(self, data: Any, /) -> int:
        view = memoryview(data).cast("B")
        written: int = self._disk.done(
            "write",
            _where(self.fileno()),
            lambda: super(_File, self).write(view),
            lambda: super(_File, self).write(view[: len(view) // 2]),
        )
        return written

    def readinto(self, buffer: Any, /) -> int:
        self._disk.read(_where(self.fileno()))
        return super().readinto(buffer)

    def readall(self) -> bytes:
        self._disk.read(_where(self.fileno()))
        return super().readall()


def _dressed(raw: _File, mode: str, buffering: int, encoding: Any, errors: Any, newline: Any) -> Any:
    """What `open` puts around a raw file."""
    if buffering == 0:
        return raw
    size = buffering if buffering > 1 else io.DEFAULT_BUFFER_SIZE
    binary: Any
    if "+" in mode:
        binary = io.BufferedRandom(raw, size)
    else:
        binary = (io.BufferedReader if mode.strip("bt") == "r" else io.BufferedWriter)(raw, size)
    if "b" in mode:
        return binary
    return io.TextIOWrapper(binary, encoding, errors, newline, line_buffering=buffering == 1)


def _where(path: Any, folder: int | None = None) -> str:
    """The full name of what a function was given: a path, or a descriptor."""
    if isinstance(path, int):
        try:
            return os.readlink(f"/proc/self/fd/{path}")
        except OSError:
            return ""
    name = os.fsdecode(path)
    start = os.getcwd() if folder is None else _where(folder)
    return os.path.normpath(os.path.join(start, name))


def die(fault: Fault) -> None:
    """At once and without any cleaning up: this process, or all of the run."""
    if fault.rank == EVERYONE:
        os.killpg(0, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
