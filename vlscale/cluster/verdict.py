"""What becomes of a run when its ranks have ended: the rules of a conductor, without its deeds."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from typing import Literal

from vlscale.errors import DONE, STOPPED, CheckpointError, ConfigError, DataError

Then = Literal["done", "failed", "stopped", "requeue", "again"]
Ending = Literal["", "limit", "other"]  # why the scheduler ends a job; empty = it does not
ASKED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)  # to stop
UNHEARD = tuple(128 + number for number in ASKED)  # codes of ranks that were asked before they listened
HOPELESS = (ConfigError.exit_code, DataError.exit_code, CheckpointError.exit_code)  # nothing another node would mend


@dataclass(frozen=True)
class Ended:
    """How a start of the ranks ended."""

    code: int  # 0, one of ours, or 128 + the signal that ended a rank
    lost: tuple[str, ...] = ()  # nodes that do not answer any more
    ending: Ending = ""  # other: it was cancelled, or is preempted and put back
    cancelled: bool = False  # the scheduler has ended the ranks alone, not the job
    headway: bool = True  # it came further than the start before it


@dataclass(frozen=True)
class Left:
    """What the job still may do."""

    requeues: int
    nodes: int  # on which the ranks can start again at once; 0 = none
    on_node_loss: str  # replace, shrink or end


@dataclass(frozen=True)
class Verdict:
    """What to do now, and why in words. `again`: in this job, on fewer nodes."""

    then: Then
    why: str


def meaning(code: int) -> int:
    """The exit code of ranks as one of a run: asked to stop before they listened, they lost nothing."""
    return STOPPED if code in UNHEARD else code


def judge(ended: Ended, left: Left) -> Verdict:
    """The next thing to do."""
    if ended.code == DONE:
        return Verdict("done", "all steps are done")
    if ended.ending and ended.lost:
        if left.on_node_loss == "end":
            return Verdict("failed", f"lost {', '.join(ended.lost)}, and --on_node_loss end was given")
        return Verdict("stopped", f"lost {', '.join(ended.lost)}; Slurm puts the job back into the queue")
    if ended.ending == "other":
        saved = "saved and stopped" if ended.code == STOPPED else f"ended with {ended.code}"
        return Verdict("stopped", f"{saved}: it was cancelled, or is put back into the queue by Slurm")
    if ended.code == STOPPED:
        return _back("saved and stopped" + (" at the time limit" if ended.ending else ""), ended, left)
    if ended.code in HOPELESS or not (ended.lost or ended.ending or ended.cancelled):
        return Verdict("failed", f"the ranks ended with {ended.code}")
    what = f"ended with {ended.code} at the time limit" if ended.ending else "Slurm ended the ranks, but not the job"
    if ended.lost:
        what = f"lost {', '.join(ended.lost)}"
    if ended.lost and left.on_node_loss == "end":
        return Verdict("failed", f"{what}, and --on_node_loss end was given")
    if ended.lost and left.on_node_loss == "shrink" and left.nodes:
        return Verdict("again", f"{what}; going on with {left.nodes} node(s)")
    return _back(what, ended, left)


def _back(what: str, ended: Ended, left: Left) -> Verdict:
    """Into the queue, if that is allowed and of use."""
    if not (ended.headway or ended.lost):
        return Verdict("failed", f"{what}, and came no further than the start before it: a checkpoint takes too long")
    if left.requeues <= 0:
        return Verdict("stopped", f"{what}; no --requeue is left")
    return Verdict("requeue", f"{what}; back into the queue, {left.requeues - 1} more time(s) allowed")
