"""A job watched from where it was submitted: its state, what the run says, and how it ends."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vlscale.cluster import records, slurm
from vlscale.cluster.conductor import LAST_LINES, last_lines
from vlscale.cluster.records import Job
from vlscale.errors import DONE, STOPPED, ConfigError, TrainingError
from vlscale.run_folder import LOG

PAUSE = 1.0  # seconds between two looks at the files
ASK = 4.0  # seconds between two questions to Slurm
SETTLE = 15.0  # seconds for the last words of a job to be seen on a shared file system


@dataclass
class Tail:
    """A file that grows, from where it ends now."""

    path: Path
    place: int = field(init=False)

    def __post_init__(self) -> None:
        self.place = self.path.stat().st_size if self.path.exists() else 0

    def lines(self) -> list[str]:
        """Those that are new and whole."""
        try:
            with self.path.open("rb") as file:
                if file.seek(0, 2) < self.place:
                    self.place = 0  # another file of that name
                file.seek(self.place)
                whole, end, _ = file.read().rpartition(b"\n")
        except OSError:
            return []
        self.place += len(whole) + len(end)
        return whole.decode(errors="replace").splitlines() if end else []


def follow(jobs: Sequence[Job], say: Callable[[str], None] = print, so_far: bool = False) -> int:
    """Wait for all jobs to end, and show how they do: the greatest exit code.

    One job alone also says what it says from now on, and `so_far` what it said last; of several, those that fail do.
    """
    tails = [Tail(Path(jobs[0].out) / LOG), Tail(Path(jobs[0].log))] if len(jobs) == 1 else []
    for tail in tails if so_far else ():
        for line in last_lines(tail.path, LAST_LINES):
            say(line)
    seen: dict[str, str] = {}
    codes: dict[str, int] = {}
    asked = 0.0
    while len(codes) < len(jobs):
        for tail in tails:
            for line in tail.lines():
                say(line)
        sys.stdout.flush()
        if time.monotonic() - asked >= max(ASK, len(jobs) - len(codes)):  # one question a second is enough for Slurm
            for job in jobs:
                if job.number not in codes:
                    _look(job, seen, codes, say)
                    if len(jobs) > 1 and codes.get(job.number):
                        say("\n".join(f"    {line}" for line in last_lines(Path(job.log))))
            asked = time.monotonic()
        time.sleep(PAUSE)
    for tail in tails:
        for line in tail.lines():
            say(line)
    return max(codes.values())


def _look(job: Job, seen: dict[str, str], codes: dict[str, int], say: Callable[[str], None]) -> None:
    """Say where a job has got to, and note its code once it is over."""
    try:
        state, why = _state(job)
    except ConfigError:  # Slurm is away; the job is not
        return
    if state != seen.get(job.number):
        seen[job.number] = state
        say(f"job {job.number} ({Path(job.out).name}): {state or 'no longer known to Slurm'}{why}")
    if not state or state in slurm.OVER:  # forgotten, or over
        codes[job.number] = code(job, state)


def _state(job: Job) -> tuple[str, str]:
    """Slurm's word for a job, and the reason why it waits or where it runs."""
    shown = slurm.job(job.number)
    state = shown.get("JobState") or slurm.state(job.number)
    reason, nodes = shown.get("Reason", "None"), shown.get("NodeList", "")
    if state == "PENDING":
        return state, f", {reason}" if reason not in ("None", "") else ""
    return state, f" on {nodes}" if state == "RUNNING" and nodes else ""


def code(job: Job, state: str) -> int:
    """The exit code of a job that is over: that of its ranks, where they have ended by themselves."""
    until = time.monotonic() + SETTLE
    while True:
        lines = records.starts(job.home)
        own = [line for line in lines if line.get("job") == job.number]
        if own and own[-1]["event"] == "ended":
            return int(own[-1]["code"])
        if time.monotonic() > until:
            return {"COMPLETED": DONE, "CANCELLED": STOPPED}.get(state, TrainingError.exit_code)
        time.sleep(PAUSE)
