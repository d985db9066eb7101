"""No process outlives its run: a stop is a flag, is carried out at a step boundary, and has a deadline.

DeepSpeed's launcher passes a signal to one rank after the other, and when it is killed itself it leaves every
rank behind. So each rank watches the processes that started it, and treats their death as a request to stop.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import select
import signal
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable
from multiprocessing import forkserver
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

import psutil

from vlscale.errors import TrainingError

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext
    from multiprocessing.process import BaseProcess

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
POLL = 0.5  # seconds between two looks at the launcher
DEEPSPEED_RUNNER = ("deepspeed", "deepspeed.pt", "ds", "deepspeed.launcher.runner")
DEEPSPEED_LAUNCH = ("deepspeed.launcher.launch",)
TORCH_LAUNCHERS = ("torchrun", "torch.distributed.run", "torch.distributed.launch", "accelerate")
OTHER_LAUNCHERS = (*TORCH_LAUNCHERS, "submitit.core._submit")
SUBMIT = {"submit.py", "--local"}  # `slurm/submit.py --local`: its ranks are its own children
SLURM_STEP, SSH_SERVER = "slurmstepd", "sshd"  # names of processes; newer: sshd-session
TRACKER = "multiprocessing.resource_tracker"  # ends by itself, after it has taken away what others leave in /dev/shm
SET_BY_LAUNCHERS = ("CROSS_RANK", "TORCHELASTIC_RUN_ID")  # environment of a rank: deepspeed, torchrun


class StopGuard:
    """Turns signals, and the death of the launcher, into `requested`; ends the process when nobody reacts.

    The loop asks `distributed.StopVote` once per step with `guard.requested`, saves, and exits with STOPPED.
    From the request on it has `deadline` seconds to begin with that, and says so with `heed`; a rank that does not
    (stuck in a collective whose partner is gone) says where it stands and is ended hard, with its worker processes
    and the exit code of a `TrainingError`. The launchers of DeepSpeed and torch kill 30 s after SIGTERM, hence the
    default; a request that comes otherwise leaves `patience` seconds, if they are more. Once heeded it is ended no
    more: a save takes the time that it takes. A second Ctrl-C interrupts at once.

    A program started from a shell has no launcher to watch: it goes on when the shell ends (nohup).
    Make it in the main thread, before anything slow, and leave it open until the process ends.
    """

    def __init__(self, *, deadline: float = 25.0, patience: float = 0.0) -> None:
        self.requested = False
        self.reason = ""
        self._deadline, self._patience = deadline, max(deadline, patience)
        self._began = time.monotonic()
        self._over = float("inf")
        self._heeded = False
        self._closed = threading.Event()
        self._launcher = Launcher()
        self._ear, self._mouth = socket.socketpair()
        self._ear.setblocking(False)
        self._mouth.setblocking(False)
        if not faulthandler.is_enabled():
            faulthandler.enable()
        # the C-level handler writes the signal's number: seen even if the main thread hangs in a collective
        self._wakeup_before = signal.set_wakeup_fd(self._mouth.fileno(), warn_on_full_buffer=False)
        self._handlers_before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        _let_go_in_children(self)
        threading.Thread(target=self._watch, name="stop-guard", daemon=True).start()

    def request(self, reason: str, hurry: bool = False) -> None:
        """Ask for a stop; the first reason stays. `hurry`: whoever asks will kill, or other ranks are gone."""
        now = time.monotonic()
        over = now + (self._deadline if hurry else self._patience)
        if over < self._over:
            self._began, self._over = now, over
        if not self.requested:
            self.reason = reason
            self.requested = True

    def heed(self) -> None:
        """What was asked for is being done; from now on a hang is the watchdog's business."""
        self._heeded = True

    def close(self) -> None:
        """Put the former signal handlers back and stop watching."""
        if self._closed.is_set():
            return
        self._closed.set()
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        self._mouth.send(b"\0")

    def __enter__(self) -> StopGuard:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        again = self.requested and self.reason == "SIGINT"
        self._request(number)
        if number == signal.SIGINT and again and os.isatty(0):
            raise KeyboardInterrupt

    def _request(self, number: int) -> None:
        self.request(signal.Signals(number).name, hurry=self._launcher.kills and number == signal.SIGTERM)

    def _watch(self) -> None:
        with self._ear, self._mouth:
            while not self._closed.is_set():
                self._hear()
                if gone := self._launcher.gone():
                    self.request(gone, hurry=True)
                if time.monotonic() > self._over and not (self._heeded or self._closed.is_set()):
                    seconds = self._over - self._began
                    _end_hard(f"{self.reason}: no stop within {seconds:.0f} s, ending this process unsaved")

    def _hear(self) -> None:
        if not select.select([self._ear], [], [], POLL)[0]:
            return
        for number in self._ear.recv(64):
            if number in SIGNALS:
                self._request(number)
            if number == signal.SIGTERM:
                self._launcher.tell_siblings()


def requested() -> bool:
    """Whether this process has been asked to stop."""
    guard = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    return isinstance(guard, StopGuard) and guard.requested


class Launcher:
    """The processes that started this rank and must outlive it; empty for a program started by a person."""

    def __init__(self) -> None:
        self._parent = os.getppid()
        self._told = False
        self._missing = ""
        self.kills = False  # 30 s after it has passed on a TERM; Slurm does so in its own time, which we do not know
        self.watched: list[psutil.Process] = []
        self.siblings_of: psutil.Process | None = None
        try:
            self._find(psutil.Process().parents())
        except psutil.Error:  # one of them died while we looked
            self._missing = "the launcher is gone" if _started_by_launcher() else ""

    def _find(self, ancestors: list[psutil.Process]) -> None:
        kinds = [_kind(process) for process in ancestors]
        nearest = next((place for place, kind in enumerate(kinds) if kind in ("launch", "other", "step")), None)
        if nearest is None:
            self._missing = "the launcher is gone" if _started_by_launcher() else ""
            return
        step = kinds.index("step") if "step" in kinds else nearest  # of Slurm, around any other launcher
        self.watched = ancestors[: max(nearest, step) + 1]
        self.kills = kinds[nearest] != "step"
        if kinds[nearest] == "launch":
            self._find_above(ancestors[nearest], ancestors[nearest + 1 :])

    def _find_above(self, launch: psutil.Process, above: list[psutil.Process]) -> None:
        """Who started DeepSpeed's launch.py: the `deepspeed` command, or ssh, which it may have been reached by."""
        self.siblings_of = launch
        if above and _kind(above[0]) == "runner":
            self.watched += above[:1]
        elif not any(word.startswith("--node_rank") for word in launch.cmdline()):
            if _is_orphaned(above[:1]):  # on one machine `deepspeed` starts launch.py without a node's rank
                self._missing = "the deepspeed process is gone"
        else:
            names = [process.name() for process in above] if launch.terminal() is None else []  # else a person's
            session = next((place for place, name in enumerate(names) if name.startswith(SSH_SERVER)), -1)
            self.watched += above[: session + 1]
            if (pdsh := _pdsh(launch)) is not None:  # `deepspeed` was typed on this very machine
                runner = pdsh.parents()[:1]
                self.watched += [pdsh, *runner]
                if _is_orphaned(runner):
                    self._missing = "the deepspeed process is gone"

    def gone(self) -> str:
        """Which of them has died, as the reason of a stop; empty while all live."""
        if self._missing:
            return self._missing
        if self.watched and os.getppid() != self._parent:
            return "the launcher of this rank is gone"
        dead = [process.pid for process in self.watched if not _lives(process)]
        return f"process {dead[0]}, which started this run, is gone" if dead else ""

    def tell_siblings(self) -> None:
        """Pass SIGTERM on to this machine's other ranks at once: DeepSpeed waits 30 s for each in turn."""
        if self.siblings_of is None or self._told:
            return
        self._told = True
        try:
            for process in self.siblings_of.children():
                if process.pid != os.getpid() and process not in self.watched:
                    process.terminate()
        except psutil.Error:
            pass  # the launcher or a rank has just ended


def worker_processes(preload: str) -> ForkServerContext:
    """Where worker processes come from: a server that has imported `preload`, and that SIGTERM passes by.

    They are not forked from here: a fork inherits locks that threads of torch or OpenCV may hold, and hangs on them.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # the server inherits it
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def shield_worker(worker: int) -> None:
    """A DataLoader's `worker_init_fn`: a worker is stopped by its own rank only, and never outlives it.

    DeepSpeed's launcher signals a rank's whole process tree; a worker that obeyed would break the loop before
    it can save.
    """
    for number in SIGNALS:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is None:  # not a worker process at all
        return
    if hasattr(signal, "sigwaitinfo"):  # Linux; elsewhere a worker obeys everybody
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey, args=(parent.pid,), name="obey-parent", daemon=True).start()
    threading.Thread(target=_end_with, args=(parent,), name="parent-watch", daemon=True).start()


def _obey(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass  # from the launcher, meant for the rank
    os._exit(0)


def _end_with(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _let_go_in_children(guard: StopGuard) -> None:
    """A forked child must not report its signals to the parent's guard."""
    alive = weakref.ref(guard)

    def let_go() -> None:
        kept = alive()
        if kept is not None and not kept._closed.is_set():
            signal.set_wakeup_fd(-1)
            for number in SIGNALS:
                signal.signal(number, signal.SIG_DFL)

    os.register_at_fork(after_in_child=let_go)


def _end_hard(message: str) -> None:
    try:
        sys.stderr.write(f"{message}\n")
        faulthandler.dump_traceback(all_threads=True)
        sys.stderr.flush()
    except (OSError, ValueError, RuntimeError, AttributeError):
        pass  # a closed or replaced stderr keeps nobody alive
    end(TrainingError.exit_code)


def end(code: int) -> NoReturn:
    """End this process at once, and what it started."""
    try:
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if not any(TRACKER in word for word in process.cmdline()):
                    process.kill()
    finally:
        os._exit(code)


def within(seconds: float, work: Callable[[], object]) -> bool:
    """Whether `work`, which may hang, came back in time; it has a thread of its own, which is left behind if not."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


def _started_by_launcher() -> bool:
    return any(name in os.environ for name in SET_BY_LAUNCHERS)


def _kind(process: psutil.Process) -> str:
    if process.name() == SLURM_STEP:
        return "step"
    try:
        line = [os.path.basename(word) for word in process.cmdline()]
    except psutil.AccessDenied:
        return ""
    words = set(line[:4])  # python -u -m MODULE
    if set(line) >= SUBMIT:
        return "other"
    kinds = {"launch": DEEPSPEED_LAUNCH, "runner": DEEPSPEED_RUNNER, "other": OTHER_LAUNCHERS}
    return next((kind for kind, names in kinds.items() if words & set(names)), "")


def _is_orphaned(parent: list[psutil.Process]) -> bool:
    """Whether who started a process is gone: an orphan belongs to init."""
    return not parent or parent[0].pid == 1 or parent[0].name() == "systemd"


def _pdsh(launch: psutil.Process) -> psutil.Process | None:
    """The pdsh on this machine that has reached its hosts with this very launch.py."""
    told = {word for word in launch.cmdline() if word.startswith(("--world_info=", "--master_addr=", "--master_port="))}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.name().startswith("pdsh") and told <= set(process.cmdline()):
                return process
    return None


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
