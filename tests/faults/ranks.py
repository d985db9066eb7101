"""A start of a run: its ranks, forked from a process that has imported everything, and their ends."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import math
import mmap
import os
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import psutil

from tests.distributed.spawn import free_port
from tests.faults.fault import EVERYONE, Fault
from tests.faults.harm import STEP, Harm
from tests.faults.setting import STEPS
from tests.runs import LAUNCHED_BY, ROOT

COUNTS = 4  # numbers that a rank tells the harness: those of `Disk`, and the step that it has begun

GRACE = 1.0  # seconds that the others have when a rank has failed, before a launcher would send SIGTERM
PATIENCE = 6.0  # seconds from that SIGTERM to a SIGKILL
TIMEOUT = 150.0  # seconds for a whole start on a busy machine
AFTER = 30.0  # seconds after which no process of an ended start may be left
DIE_WITH_PARENT, ADOPT = 1, 36  # PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER


@dataclass(frozen=True)
class Ended:
    """How a start ended."""

    codes: list[int]  # by rank; negative = by that signal
    first: int  # the code of the rank that was the first to end other than well, or 0
    seconds: float
    counts: list[list[int]]  # by rank
    said: str  # of all ranks
    hung: bool
    left: list[str]  # processes that outlived it


def warm() -> None:
    """Import what every rank needs, so that a rank starts in milliseconds. No thread may have begun."""
    import tests.distributed.warm  # noqa: F401

    assert len(os.listdir("/proc/self/task")) == 1, "a fork of several threads may hang"


def start(
    command: Sequence[str],
    ranks: int,
    out: Path,
    log: Path,
    faults: Sequence[Fault] = (),
    poisoned: Sequence[int] = (),
    usual: float = 10.0,
) -> Ended:
    """Run `command` (the arguments of a launcher, itself first) on some ranks to its end, whatever it is.

    `usual` is how many seconds it takes undisturbed.
    """
    ctypes.CDLL(None).prctl(ADOPT, 1)  # who loses his parent becomes a child of this process
    table = mmap.mmap(-1, 8 * COUNTS * ranks)
    counts = memoryview(table).cast("B").cast("q")
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHED_BY}
    environment |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    pids: list[int] = []
    began = time.monotonic()
    for rank in range(ranks):
        row = counts[COUNTS * rank : COUNTS * (rank + 1)]
        harm = Harm(rank, out, faults, poisoned if rank == ranks - 1 else (), row)
        group = pids[0] if pids else 0
        own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        pid = os.fork()
        if not pid:
            _be_a_rank(command, own, group, log, harm)
        with contextlib.suppress(OSError):
            os.setpgid(pid, group)
        pids.append(pid)
    steps = counts[STEP::COUNTS]
    codes, first, hung = _watch(pids, [_Timed(fault, usual, steps) for fault in faults if fault.timed], began)
    left = _left_behind()
    told = [list(counts[COUNTS * rank : COUNTS * (rank + 1)]) for rank in range(ranks)]
    said = log.read_text(errors="replace") if log.is_file() else ""
    return Ended([codes[pid] for pid in pids], first, time.monotonic() - began, told, said, hung, left)


def asked(function: Callable[..., Any], *args: Any) -> Any:
    """What `function` answers in a process of its own, so that this one stays fit to fork; as JSON would have it."""
    ear, mouth = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(ear)
        try:
            answer = function(*args)
        except Exception:
            answer = {"error": traceback.format_exc()}
        with os.fdopen(mouth, "w") as file:
            json.dump(answer, file)
        os._exit(0)
    os.close(mouth)
    with os.fdopen(ear) as file:
        answer = json.load(file)
    os.waitpid(pid, 0)
    return answer


def _be_a_rank(command: Sequence[str], environment: dict[str, str], group: int, log: Path, harm: Harm) -> NoReturn:
    ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)
    with contextlib.suppress(OSError):
        os.setpgid(0, group)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(file, number)
    try:
        harm.install()
        faulthandler.enable()
        sys.argv = list(command)
        runpy.run_path(command[0], run_name="__main__")  # a launcher's end is os._exit
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(1)


class _Timed:
    """A signal that comes some time after a start's beginning, or after that of a step."""

    def __init__(self, fault: Fault, usual: float, steps: memoryview) -> None:
        self.fault = fault
        self._steps = steps
        self._step = int(fault.number)
        share = fault.number - self._step
        self._wait = usual / 2 * share / (STEPS if self._step else 1)  # a half is the start's, a half the steps'
        self._since = math.inf

    def due(self, now: float, began: float) -> bool:
        if self._since == math.inf and (not self._step or max(self._steps) >= self._step):
            self._since = now if self._step else began
        return now >= self._since + self._wait


def _watch(pids: Sequence[int], timed: Sequence[_Timed], began: float) -> tuple[dict[int, int], int, bool]:
    """The codes of all ranks, the first that was no good one, and whether they had to be ended for time."""
    codes: dict[int, int] = {}
    waiting = list(timed)
    first, failed, told, hung = 0, math.inf, False, False
    while len(codes) < len(pids):
        now = time.monotonic()
        for pid in [each for each in pids if each not in codes]:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                codes[pid] = os.waitstatus_to_exitcode(status)
                if codes[pid] and failed == math.inf:
                    first, failed = codes[pid], now
        alive = [pid for pid in pids if pid not in codes]
        for each in [each for each in waiting if each.due(now, began)]:
            waiting.remove(each)
            rank = each.fault.rank
            targets = alive if rank == EVERYONE else [pid for pid in alive if pid == pids[rank]]
            _send(targets, signal.SIGTERM if each.fault.kind == "stop" else signal.SIGKILL)
        if now > failed + GRACE and not told:
            told = True
            _send(alive, signal.SIGTERM)
        if now > failed + GRACE + PATIENCE:
            _send(alive, signal.SIGKILL)
        if now > began + TIMEOUT and alive and not hung:
            hung = True
            _send(alive, signal.SIGABRT)  # faulthandler shows where they stand
            failed = min(failed, now)
        time.sleep(0.005)
    return codes, first, hung


def _send(pids: Sequence[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _left_behind() -> list[str]:
    """What is still there when all ranks are gone and had their time; it is ended."""
    end = time.monotonic() + AFTER
    while (left := _living()) and time.monotonic() < end:
        time.sleep(0.02)
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.kill()
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    return [f"{' '.join(process.info['cmdline'])[:80]} ({process.pid})" for process in left]


def _living() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE:
                process.info = process.as_dict(["cmdline"])
                found.append(process)
    return found
