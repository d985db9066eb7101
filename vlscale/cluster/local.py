"""The ranks of a job as processes of this machine: what `slurm/submit.py --local N` runs."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence

from vlscale.cluster import environment
from vlscale.cluster.conductor import ALONE, First, Start, exit_code
from vlscale.cluster.verdict import Ending
from vlscale.errors import DONE, STOPPED


class Here:
    """This machine; see `conductor.Machines`."""

    def __init__(self) -> None:
        self.restart = 0
        self._ranks: list[subprocess.Popen[bytes]] = []
        self._until = float("inf")  # when the others are waited for no longer, one having failed

    def nodes(self) -> tuple[str, ...]:
        """This one."""
        return (socket.gethostname(),)

    def begin(self, start: Start) -> Here:
        """One process per rank."""
        world = start.ranks_per_node
        shared = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "PYTHONUNBUFFERED": "1"}
        port = environment.free(environment.port(os.getpid(), 0, self.restart))
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        self._ranks, self._until = [], float("inf")
        for rank in range(world):
            with (start.logs / f"rank_{rank:05d}.txt").open("wb") as said:
                told = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                self._ranks.append(
                    subprocess.Popen(start.command, env=told, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
                )
        return self

    def wait(self, timeout: float) -> int:
        """See `conductor.Running`."""
        until = time.monotonic() + timeout
        try:
            return max(exit_code(rank.wait(max(0.01, until - time.monotonic()))) for rank in self._ranks)
        except subprocess.TimeoutExpired:
            now, codes = time.monotonic(), [rank.poll() for rank in self._ranks]
            if any(code not in (None, DONE, STOPPED) for code in codes):
                self._until = min(self._until, now + ALONE)
            if now > self._until:
                self.tell(signal.SIGKILL)
            raise

    def first(self, start: Start) -> First | None:
        """Which rank that was cannot be told; one that did not end for another's end."""
        codes = [exit_code(rank.returncode) for rank in self._ranks]
        failed = [First(rank, f"exit code {code}") for rank, code in enumerate(codes) if code not in (0, 75)]
        return next((each for each in failed if codes[each.rank] != 1), next(iter(failed), None))

    def cancelled(self, start: Start) -> bool:
        """Never: there is no scheduler."""
        return False

    def lost(self, nodes: Sequence[str], ask: bool) -> tuple[str, ...]:
        """None: we are here."""
        return ()

    def keep(self, nodes: Sequence[str], queued: bool) -> None:
        """There is but one."""

    def give_up(self) -> None:
        """There is no queue."""

    def tell(self, number: int) -> None:
        """Pass it on to the ranks."""
        for rank in self._ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    def ending(self) -> Ending:
        """Who signals us ends the run."""
        return "other"

    def requeue(self, lost: Sequence[str]) -> bool:
        """At once, here."""
        self.restart += 1
        return True
