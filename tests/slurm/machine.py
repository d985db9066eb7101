"""One daemon and all that it starts, which end together: `python machine.py COMMAND ...`.

Whatever comes from COMMAND is adopted here when its parent has gone. All of it is killed as soon as COMMAND ends,
standard input closes or the process that started this one is no more.
"""

from __future__ import annotations

import ctypes
import os
import select
import subprocess
import sys

import psutil

PR_SET_CHILD_SUBREAPER = 36


def main() -> int:
    """Run the command; its exit code."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    parent = os.getppid()
    daemon = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    try:
        while daemon.poll() is None and os.getppid() == parent:
            if select.select([sys.stdin], [], [], 0.1)[0]:
                break
            reap(daemon.pid)
    finally:
        kill_all()
    return daemon.wait()


def reap(daemon: int) -> None:
    """Bury the adopted."""
    for child in psutil.Process().children():
        if child.pid != daemon and child.status() == psutil.STATUS_ZOMBIE:
            os.waitpid(child.pid, 0)


def kill_all() -> None:
    """Until nothing is left: what is killed leaves orphans, which arrive here."""
    while below := psutil.Process().children(recursive=True):
        for process in below:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(below, timeout=0.1)


if __name__ == "__main__":
    sys.exit(main())
