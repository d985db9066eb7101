"""Locks on files, by which processes wait for one another. They end with whoever holds them, however that ends.

Some file systems have none (Lustre mounted without `flock`), others only among the processes of one node: what is
written under a lock must stay right without it, if need be by more work.
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

Taken = Literal["ours", "another's", "no locks"]


def take(descriptor: int, wait: bool = True) -> Taken:
    """Lock an open file or folder until it is closed; tells whose the lock is, or that the file system has none.

    It is another's only where we do not `wait`.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return "ours"
    except BlockingIOError:
        return "another's"
    except OSError:
        return "no locks"


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """While no other process or thread is `alone` with `path`: a folder, or an empty file that is made if absent.

    OSError if there is no such folder, or no such file and none can be made.
    """
    descriptor = _opened(path)
    try:
        take(descriptor)
        yield
    finally:
        os.close(descriptor)


def hold(path: Path, patience: float) -> str:
    """Lock a file until this process ends, and note in it who has it; or, after `patience` seconds, who has it instead.

    Empty: it is ours, or nobody can lock there. A process may take it again; its children do not have it.
    """
    until = time.monotonic() + patience
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o664)  # closed by the end of the process
    except OSError:
        return ""
    while True:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > until:
                holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
                os.close(descriptor)
                return holder or "another process"
        except OSError:
            return ""
        time.sleep(0.2)
    with suppress(OSError):
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".ljust(100).encode(), 0)
    return ""


def _opened(path: Path) -> int:
    """A file that every user may lock, or a folder."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except (IsADirectoryError, PermissionError):  # in a folder like /tmp, another's file may not be opened to make it
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    with suppress(OSError):  # another's; it has these rights
        os.fchmod(descriptor, 0o666)  # whatever our umask
    return descriptor
