"""How the jobs of a run folder do: read from what they left there, and from Slurm."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from vlscale import run_folder
from vlscale.cluster import follow, queue, records, slurm, sweep
from vlscale.cluster.conductor import last_lines
from vlscale.cluster.records import Job
from vlscale.errors import DONE, ConfigError

INTERRUPTED = 130  # as a shell shows Ctrl-C
FIGURES = ("i2t_r1", "t2i_r1", "accuracy")  # last parts of the names of evaluations that a table shows


def jobs_of(out: Path) -> list[Job]:
    """Of a run, or of all runs of a sweep.

    Raises:
        ConfigError: there is none.
    """
    runs = sweep.read(out)
    return [records.read_job(out / run.name) for run in runs] if runs else [records.read_job(out)]


def state(job: Job) -> str:
    """In one word: Slurm's for a job that it still has, else what its last start came to."""
    known = slurm.state(job.number) if job.number and slurm.is_here() else ""
    lines = records.starts(job.home)
    last = lines[-1] if lines else {}
    if known and known not in slurm.OVER:
        return known
    if last.get("event") == "ended" and (last["then"] != "requeue" or not known) and last.get("job") == job.number:
        return str(last["then"])
    return known or ("unknown" if lines else "never started")


def row(job: Job) -> dict[str, Any]:
    """What a table says of a run."""
    out = Path(job.out)
    lines = records.starts(job.home)
    metrics = figures(out / run_folder.METRICS)
    ended = [line for line in lines if line["event"] == "ended"]
    steps = records.configuration(out).get("steps")
    values: dict[str, Any] = {"run": out.name, "job": job.number or None, "state": state(job)}
    values["starts"] = sum(line["event"] == "began" for line in lines)
    values["step"] = f"{metrics.get('step', 0)}" + (f"/{steps}" if steps else "")
    values["loss"] = metrics.get("loss")
    for name, value in metrics.items():
        if name.startswith("eval/") and name.rsplit("/", 1)[-1] in FIGURES:
            values[name.removeprefix("eval/")] = value
    values["code"] = ended[-1]["code"] if ended else None
    return values


def table(jobs: Sequence[Job]) -> str:
    """A line for each run."""
    return sweep.table([row(job) for job in jobs])


def status(out: Path) -> int:
    """Print a table of the run or runs, and for a run alone how each of its starts went."""
    jobs = jobs_of(out)
    print(table(jobs))
    for line in records.starts(jobs[0].home) if len(jobs) == 1 else ():
        if line["event"] == "began":
            print(f"{line['time']} start {line['start']} on {', '.join(line['nodes'])}")
        else:
            rank = f", rank {line['rank']} first ({line['said']})" if "rank" in line else ""
            print(f"{line['time']} start {line['start']} ended with {line['code']}{rank}: {line['why']}")
    return DONE


def logs(out: Path, rank: int | None, lines: int) -> int:
    """Print the end of the job's log, or of what a rank printed in its newest start; of a sweep, of each run."""
    jobs = jobs_of(out)
    for job in jobs:
        try:
            path = log_of(job, rank)
        except ConfigError as error:
            if len(jobs) == 1:
                raise
            print(f"==> {error}")
            continue
        print(f"==> {path}")
        print("\n".join(last_lines(path, lines)))
    return DONE


def watch(out: Path) -> int:
    """Follow the jobs of a run folder, or of a sweep's, to their end; returns the exit code."""
    jobs = jobs_of(out)
    slurm.need()
    if never := next((job for job in jobs if not job.number), None):
        raise ConfigError(f"{never.out} has no job on Slurm that could be followed; `logs` shows what it said")
    return follow_to_end(out, jobs, so_far=True)


def follow_to_end(out: Path, jobs: Sequence[Job], so_far: bool = False) -> int:
    """`follow.follow`, with a table at the end of several; Ctrl-C ends the watching alone, with 130."""
    try:
        code = follow.follow(jobs, so_far=so_far)
    except KeyboardInterrupt:
        print(f"\nnot followed any more, and goes on; again: `slurm/submit.py follow {near(out)}`")
        return INTERRUPTED
    if len(jobs) > 1:
        print(table(jobs_of(out)))
    return code


def cancel(out: Path) -> int:
    """End the jobs that are in the queue; their ranks save first."""
    jobs = jobs_of(out)
    slurm.need()
    jobs = [job for job in jobs if _in_queue(job)]
    if not jobs:
        raise ConfigError(f"{out} has no job in the queue")
    slurm.ask(["scancel", *(job.number for job in jobs)])
    print(f"cancelled: {', '.join(job.number for job in jobs)}; the ranks save, `requeue` goes on")
    return DONE


def requeue(out: Path) -> int:
    """Queue again what has ended before its last step; let what runs save and go back into the queue."""
    jobs = jobs_of(out)
    slurm.need()
    running = [job for job in jobs if _in_queue(job)]
    over = [job for job in jobs if job not in running and not _done(job)]
    told = [job for job in running if slurm.state(job.number) == "RUNNING"]
    spent = [job for job in told if int(slurm.job(job.number).get("Restarts", "0")) >= job.options.requeue]
    told = [job for job in told if job not in spent]
    for job in told:
        slurm.ask(["scancel", f"--signal={job.options.signal}", job.number])
    alike = itertools.groupby(over, lambda job: (job.code, job.python, job.options))
    queued = [job for _, group in alike for job in queue.submit(list(group), out / run_folder.SLURM)]
    for job in (*told, *queued):
        how = "saves, and goes back into the queue" if job in told else "is in the queue again"
        print(f"job {job.number} of {job.out} {how}")
    for job in spent:
        said = (
            f"job {job.number} of {job.out} was put back as often as --requeue {job.options.requeue} allows, and runs "
            f"on; `cancel` lets it save and end, and `requeue` then queues it again"
        )
        if not (told or queued):
            raise ConfigError(said)
        print(said)
    if not (told or queued):
        if ending := next((job.number for job in running if slurm.state(job.number) == "COMPLETING"), None):
            raise ConfigError(f"job {ending} of {out} is ending; give the same command again in a minute")
        raise ConfigError(f"{out} has nothing to put back: its job waits in the queue already, or all steps are done")
    return DONE


def _in_queue(job: Job) -> bool:
    known = slurm.state(job.number) if job.number else ""
    return bool(known) and known not in slurm.OVER


def _done(job: Job) -> bool:
    lines = records.starts(job.home)
    return bool(lines) and lines[-1].get("then") == "done"


def figures(path: Path) -> dict[str, Any]:
    """The newest value of each key of a metrics.jsonl."""
    values: dict[str, Any] = {}
    with suppress(OSError):
        for line in path.read_text().splitlines():
            with suppress(ValueError):
                values.update(json.loads(line))
    return values


def log_of(job: Job, rank: int | None) -> Path:
    """The file of what the job, or one of its ranks in its newest start, has printed; a run here has ranks alone.

    Raises:
        ConfigError: there is none yet.
    """
    if rank is None and job.log:
        path = Path(job.log)
    else:
        began = [line["start"] for line in records.starts(job.home) if line["event"] == "began"]
        path = job.home / records.LOGS / (began[-1] if began else "") / f"rank_{rank or 0:05d}.txt"
    if not path.is_file():
        raise ConfigError(f"{path} is not there: the job has not started yet, or has no such rank")
    return path


def near(folder: Path) -> Path:
    """As one would type it from here."""
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
