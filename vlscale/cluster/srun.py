"""The nodes of a Slurm job, seen from its batch script: ranks start as the tasks of a step of `srun`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import submitit

from vlscale.cluster import conductor, environment, records, slurm
from vlscale.cluster.conductor import ALONE, First, Start
from vlscale.cluster.records import Job
from vlscale.cluster.verdict import Ending

WAIT = 60  # seconds for the others once a rank has ended; they leave by themselves, or hang
ANSWER = 30  # seconds for a node to start nothing
NOTICE = 900  # seconds for Slurm to notice that a node is gone; its SlurmdTimeout is 300 by default
AWAY, PAUSE = 1800, 10  # seconds for Slurm's controller to come back, and between two questions
WORDS = "srun.txt"  # what srun says
TASK = re.compile(r"(?:error: )?\S+: tasks? (\d+)[\d,-]*: (.+)")
CANCELLED = "Job step aborted"
ENDED = re.compile(f"forcing job termination|Terminating StepId|{CANCELLED}|CANCELLED AT")  # tasks, by others


def conduct(file: str) -> NoReturn:
    """The whole life of a job on Slurm, by its `job.json`; ends this process with the run's exit code."""
    here = submitit.JobEnvironment()
    job = records.read_job(Path(file).parent.parent)
    job = job.queued_as(here.job_id, str(here.paths.stdout))  # we may be faster than who has queued us
    sys.exit(conductor.run(job, Allocation(job)))


class Allocation:
    """The nodes that this process was given by Slurm; see `conductor.Machines`."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._number = job.number  # 12_3 in an array, whose 12 would mean all its jobs
        self.restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))

    def nodes(self) -> tuple[str, ...]:
        """Their names, this one first."""
        return tuple(submitit.JobEnvironment().hostnames)

    def begin(self, start: Start) -> Step:
        """One step of `srun` with a task per rank."""
        with (start.logs / WORDS).open("wb") as said:
            words, told = command(self._job, start), self._environment(start)
            srun = subprocess.Popen(  # in a session of its own: TERM to srun alone kills its tasks at once
                words, env=told, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True
            )
        return Step(srun, start.logs / WORDS)

    def first(self, start: Start) -> First | None:
        """By what srun said of its tasks."""
        return first_to_fail(_read(start.logs / WORDS))

    def cancelled(self, start: Start) -> bool:
        """By what srun said: a task's failure comes before the end of a step that ends for it."""
        return was_cancelled(_read(start.logs / WORDS))

    def lost(self, nodes: Sequence[str], ask: bool) -> tuple[str, ...]:
        """Those that Slurm would not give any more; if asked, those on which nothing starts."""
        with ThreadPoolExecutor(max_workers=64) as asking:
            until = time.monotonic() + AWAY
            while ask and _is_silent(nodes[0]) and time.monotonic() < until:
                time.sleep(PAUSE)  # that is this node, so Slurm is away, and nobody can be asked
            gone = list(asking.map(_is_silent if ask else slurm.is_gone, nodes))
        return tuple(node for node, lost in zip(nodes, gone, strict=True) if lost)

    def tell(self, number: int) -> None:
        """Slurm tells the ranks itself."""

    def ending(self) -> Ending:
        """By what Slurm says of the job."""
        shown = slurm.job(self._number)
        if "TimeLimit" in shown.get("Reason", "") or shown.get("JobState") == "TIMEOUT":
            return "limit"
        return "" if shown.get("JobState") == "RUNNING" else "other"

    def keep(self, nodes: Sequence[str], queued: bool) -> None:
        """See `conductor.Machines`. Slurm lets a user make a job smaller while it runs, and while it waits."""
        ranks = len(nodes) * self._job.options.ranks_per_node
        fewer = (
            (f"NumTasks={ranks}", f"NumNodes={len(nodes)}-{len(nodes)}") if queued else (f"NodeList={','.join(nodes)}",)
        )
        self._control("update", f"JobId={self._number}", *fewer)

    def give_up(self) -> None:
        """See `conductor.Machines`; nothing to do where Slurm has not noticed the loss yet: the job just ends."""
        if self.ending():
            subprocess.run(["scancel", self._number], check=True, timeout=60, capture_output=True)

    def requeue(self, lost: Sequence[str]) -> bool:
        """Into the queue; not before Slurm knows that the lost nodes are, or it would give them again."""
        until = time.monotonic() + NOTICE
        while not all(slurm.is_gone(node) for node in lost) and time.monotonic() < until:
            time.sleep(2)
        until = time.monotonic() + AWAY
        while self.ending() != "other" or not slurm.job(self._number):  # else it was cancelled, or is put back already
            try:
                self._control("requeue", self._number)
                return False
            except subprocess.SubprocessError:
                if time.monotonic() > until:
                    raise
                time.sleep(PAUSE)
        return False

    def _control(self, *words: str) -> None:
        """In the job's own folder: Slurm writes a file there when a job gets smaller."""
        subprocess.run(
            ["scontrol", *words],
            cwd=self._job.home,
            check=True,
            timeout=60,
            capture_output=True,
            stdin=subprocess.DEVNULL,
        )

    def _environment(self, start: Start) -> dict[str, str]:
        """What the ranks are told beside what Slurm tells them; nothing of what the submitting shell was a rank of."""
        options, job = self._job.options, int(os.environ["SLURM_JOB_ID"])
        told = {name: value for name, value in os.environ.items() if name not in environment.OF_A_RANK} | {
            "PYTHONUNBUFFERED": "1"
        }
        if len(start.nodes) * start.ranks_per_node > 1:  # one process alone needs no meeting place
            told["MASTER_PORT"] = str(environment.free(environment.port(job, start.attempt, self.restart)))
        if options.cpus_per_task and not options.gpus_per_node:
            told["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(options.cpus_per_task))
        return told


class Step:
    """Ranks as tasks of srun, which waits for a lost node's as long as Slurm does; see `conductor.Running`."""

    def __init__(self, srun: subprocess.Popen[bytes], words: Path) -> None:
        self._srun, self._words = srun, words
        self._until = float("inf")  # when srun, which has said that a task ended, is waited for no longer
        self._code: int | None = None  # of that task, where the others had to be ended

    def wait(self, timeout: float) -> int:
        """See `conductor.Running`. Once a task has failed, the others are ended if they do not end by themselves."""
        try:
            code = self._srun.wait(timeout)
            return code if self._code is None else self._code
        except subprocess.TimeoutExpired:
            now, said = time.monotonic(), _read(self._words)
            failed, ended = first_to_fail(said), TASK.search(said)
            if ended is not None:
                self._until = min(self._until, now + (ALONE if failed else WAIT + ALONE))
            if ended is not None and now > self._until:
                self._end(failed or First(int(ended[1]), ended[2]))
            raise

    def _end(self, first: First) -> None:
        exited = re.search(r"exit code (\d+)", first.said)
        self._code = int(exited.group(1)) if exited else None
        self._srun.terminate()  # Slurm kills the tasks of the step at once
        try:
            self._srun.wait(ALONE / 2)
        except subprocess.TimeoutExpired:  # for a task on a node that is gone
            self._srun.kill()


def command(job: Job, start: Start) -> list[str]:
    """The words of srun, and then those of a rank."""
    options, nodes = job.options, len(start.nodes)
    words = [
        *("srun", f"--nodes={nodes}", f"--ntasks={nodes * start.ranks_per_node}"),
        *(f"--ntasks-per-node={start.ranks_per_node}", f"--nodelist={','.join(start.nodes)}"),
        *("--kill-on-bad-exit=0", f"--wait={WAIT}", "--unbuffered", "--export=ALL", f"--chdir={job.folder}"),
        f"--output={start.logs}/rank_%5t.txt",
    ]
    if start.attempt:
        words += ["--overlap", "--mem=0"]  # Slurm keeps the step that lost a node as long as that one does not answer
    if options.cpus_per_task:
        words.append(f"--cpus-per-task={options.cpus_per_task}")  # not passed on by sbatch since Slurm 22.05
    if options.gpus_per_node:
        words.append(f"--gpus-per-node={options.gpus_per_node}")
    if options.cpu_bind:
        words.append(f"--cpu-bind={options.cpu_bind}")
    return [*words, *options.srun, *start.command]


def first_to_fail(said: str) -> First | None:
    """The first task of which srun says that it failed, unless it only says after it that another one was lost."""
    tasks = TASK.findall(ENDED.split(said, maxsplit=1)[0]) or TASK.findall(said)
    found = [First(int(rank), how.strip()) for rank, how in tasks]
    failed = [each for each in found if not each.said.endswith("exit code 75")]
    causes = [each for each in failed if not each.said.endswith("exit code 1")]
    return next(iter(causes or failed), None)


def was_cancelled(said: str) -> bool:
    """Whether srun says that Slurm has ended its step, before it says of any task that it ended."""
    before, cancelled, _ = said.partition(CANCELLED)
    return bool(cancelled) and not TASK.search(before)


def _read(path: Path) -> str:
    """A text, or nothing where a shared file system has a moment of its own."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _is_silent(node: str) -> bool:
    """Whether not even `true` starts there."""
    ask = ["srun", "--overlap", "--nodes=1", "--ntasks=1", "--mem=0", f"--nodelist={node}", "--quiet", "true"]
    try:
        done = subprocess.run(ask, timeout=ANSWER, capture_output=True, stdin=subprocess.DEVNULL, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return True
    return done.returncode != 0
