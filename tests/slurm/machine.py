"""One daemon and all that it starts, which end together: `python machine.py FOLDER COMMAND ...`.

Whatever comes from COMMAND is adopted here when its parent has gone. All of it is killed as soon as COMMAND ends or
standard input says so; an input that closes without a word means that who started this was killed, and FOLDER goes too.
"""

from __future__ import annotations

import ctypes
import os
import select
import shutil
import sys

import psutil

PR_SET_CHILD_SUBREAPER = 36


def main() -> None:
    """Run the command."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    parent, orphaned = os.getppid(), False
    folder, *command = sys.argv[1:]
    no_input = (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)
    daemon = os.posix_spawn(command[0], command, os.environ, file_actions=[no_input])
    while not orphaned and not bury(daemon):
        if select.select([sys.stdin], [], [], 0.3)[0]:
            orphaned = not sys.stdin.read(1)
            break
        orphaned = os.getppid() != parent  # a fork of its may hold the input open
    kill_all()
    if orphaned:
        shutil.rmtree(folder, ignore_errors=True)


def bury(daemon: int) -> bool:
    """The dead, most of them adopted; whether the daemon was one of them."""
    while (dead := os.waitpid(-1, os.WNOHANG)[0]) not in (0, daemon):
        continue
    return dead == daemon


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
    main()
