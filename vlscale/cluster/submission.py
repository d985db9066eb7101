"""`slurm/submit.py`: a run, or the runs of a sweep, checked here and handed to Slurm; or run on this machine."""

from __future__ import annotations

import shlex
import shutil
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vlscale import config, run_folder
from vlscale.build import Request
from vlscale.cluster import conductor, follow, queue, records, slurm, snapshot, status, sweep
from vlscale.cluster.check import check, check_fewer
from vlscale.cluster.local import Here
from vlscale.cluster.options import JobOptions
from vlscale.cluster.records import Job
from vlscale.cluster.srun import command
from vlscale.cluster.sweep import Variant
from vlscale.errors import DONE, ConfigError
from vlscale.saving import begin


@dataclass(frozen=True)
class Asked:
    """What the command line says."""

    options: JobOptions
    checkout: Path
    recipe: str
    overrides: tuple[str, ...]
    ds_config: str
    out: str | None
    resume: str
    sweep: tuple[str, ...] = ()
    local: bool = False
    dry_run: bool = False
    follow: bool = False


@dataclass(frozen=True)
class Checked:
    """A run that can start."""

    variant: Variant
    out: Path
    batch: int
    micro_batch: int


def submit(asked: Asked) -> int:
    """Check the runs and queue them; returns the exit code.

    Raises:
        ConfigError, DataError, CheckpointError: something cannot be; nothing is queued then.
    """
    variants = sweep.variants(asked.sweep) if asked.sweep else [Variant("", ())]
    runs = [config.load(asked.recipe, (*asked.overrides, *variant.overrides)) for variant in variants]  # typos first
    if asked.local and asked.sweep:
        raise ConfigError("--local runs one run at a time; leave out --sweep")
    if not (asked.local or asked.dry_run):
        slurm.check(asked.options.partition, asked.options.nodes)
    root = Path(asked.out or run_folder.default_name(runs[0].recipe)).absolute()
    if asked.sweep and (root / run_folder.CONFIG).exists():
        raise ConfigError(f"--out {asked.out} holds a run; give a sweep a folder of its own")
    checked = [_checked(asked, each, root / each.name) for each in variants]
    waiting = [each for each in checked if each is not None]
    if not waiting:
        return DONE
    options = replace(asked.options, job_name=asked.options.job_name or runs[0].recipe)
    home = root / run_folder.SLURM
    if asked.dry_run:
        _show(asked, options, waiting, home)
        return DONE
    fresh = [path for path in (root, home, *(each.out for each in waiting)) if not path.exists()]
    try:
        home.mkdir(parents=True, exist_ok=True)
        if asked.sweep:
            sweep.write(root, variants)
        jobs = _jobs(asked, options, waiting, snapshot.take(asked.checkout, home), home)
        queued = [] if asked.local else queue.submit(jobs, home)
    except (OSError, ConfigError) as error:
        for path in fresh:
            shutil.rmtree(path, ignore_errors=True)
        if isinstance(error, OSError):
            raise ConfigError(f"--out {root} cannot be written ({error}); give another one") from None
        raise
    if asked.local:
        return _run_here(jobs[0])
    for job in queued:
        print(f"job {job.number}: {job.out} (`slurm/submit.py status|logs|cancel|requeue {_near(root)}`)")
    if not asked.follow:
        return DONE
    sys.stdout.flush()
    try:
        code = follow.follow(queued)
    except KeyboardInterrupt:
        print(f"\nnot followed any more; the job goes on: `slurm/submit.py status {_near(root)}`")
        return DONE
    if asked.sweep:
        print(status.table(status.jobs_of(root)))
    return code


def _checked(asked: Asked, variant: Variant, out: Path) -> Checked | None:
    """None if there is nothing left to do for it."""
    run = config.load(asked.recipe, (*asked.overrides, *variant.overrides))
    if not asked.dry_run:
        queue.check_free(out)
    done = begin.done(out, run.checkpoint.to, config.dump(run), asked.resume, run.steps)
    if done:
        print(done)
        return None
    request = Request(run, asked.ds_config, out, asked.resume)
    if asked.options.on_node_loss == "shrink":
        check_fewer(request)
    batch, micro_batch = check(request, asked.options.ranks, None if asked.local else asked.options.gpus_per_node > 0)
    return Checked(variant, out, batch, micro_batch)


def _jobs(asked: Asked, options: JobOptions, runs: Sequence[Checked], code: Path, home: Path) -> list[Job]:
    """Jobs that need nothing more of the checkout, or of the files that the command line names."""
    recipe = asked.recipe if config.find_recipe(asked.recipe).parent == config.RECIPES else ""
    recipe = recipe or snapshot.keep(asked.recipe, home)
    ds_config = snapshot.keep(asked.ds_config, home)
    resume = asked.resume
    if resume not in ("auto", "never") and Path(resume).exists():
        resume = str(Path(resume).absolute())

    def job(run: Checked) -> Job:
        kept = options.on_node_loss == "shrink" and not asked.local
        cut = (f"data.micro_batch={run.micro_batch}",) if kept else ()
        words = ("--recipe", recipe, "--ds_config", ds_config, "--out", str(run.out), "--resume", resume)
        return Job(
            out=str(run.out),
            code=str(code),
            folder=str(Path.cwd()),
            python=sys.executable,
            arguments=(*words, *asked.overrides, *run.variant.overrides, *cut),
            options=options,
            batch=run.batch,
            micro_batch=run.micro_batch,
        )

    return [job(run) for run in runs]


def _show(asked: Asked, options: JobOptions, runs: Sequence[Checked], home: Path) -> None:
    """The script, and what it starts on each node."""
    code = snapshot.folder_of(asked.checkout, home)
    print(queue.executor(home, code, sys.executable, options).script(len(runs)))
    first = runs[0]
    words: tuple[str, ...] = ("--recipe", asked.recipe, "--ds_config", asked.ds_config, "--out", str(first.out))
    words = (*words, "--resume", asked.resume, *asked.overrides, *first.variant.overrides)
    job = Job(str(first.out), str(code), str(Path.cwd()), sys.executable, words, options, first.batch, 1)
    start = conductor.Start(("NODES",) * options.nodes, options.ranks_per_node, 0, home / records.LOGS, job.command())
    print(f"# which starts, on its first node (NODES: those that Slurm gives):\n# {shlex.join(command(job, start))}")


def _run_here(job: Job) -> int:
    """Now, with what rank 0 prints shown as it comes."""
    ended = threading.Event()
    tail = follow.Tail(Path(job.out) / follow.LOG)

    def show() -> None:
        while not ended.wait(0.3):
            for line in tail.lines():
                print(line, flush=True)

    job.write()
    showing = threading.Thread(target=show, daemon=True)
    showing.start()
    try:
        return conductor.run(job, Here())
    finally:
        ended.set()
        showing.join()
        for line in tail.lines():
            print(line, flush=True)


def _near(folder: Path) -> Path:
    """As one would type it from here."""
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
