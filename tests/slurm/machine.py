"""One daemon and all that it starts, which end together: `python machine.py FOLDER COMMAND ...`.

Whatever comes from COMMAND is adopted here when its parent has gone. All of it is killed as soon as COMMAND ends or
standard input says so; an input that closes without a word means that who started this was killed, and FOLDER goes too.
"""

from __future__ import annotations

import ctypes
import os
import select
import shutil
import subprocess
import sys

import psutil

PR_SET_CHILD_SUBREAPER = 36


def main() -> int:
    """Run the command; its exit code."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    folder, *command = sys.argv[1:]
    daemon = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    parent, orphaned = os.getppid(), False
    while daemon.poll() is None and not orphaned:
        if select.select([sys.stdin], [], [], 0.1)[0]:
            orphaned = not sys.stdin.read(1)
            break
        orphaned = os.getppid() != parent  # a fork of its may hold the input open
        reap(daemon.pid)
    kill_all()
    if orphaned:
        shutil.rmtree(folder, ignore_errors=True)
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
