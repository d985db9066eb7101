"""`slurm/submit.py`: a run, or the runs of a sweep, checked here and handed to Slurm; or run on this machine."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vlscale import config, run_folder
from vlscale.build import Request
from vlscale.cluster import conductor, follow, queue, records, slurm, snapshot, status, sweep
from vlscale.cluster.check import check, kept_micro_batch
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
    warnings: tuple[str, ...]
    tokens: int | None  # data.tokens, by which the ranks find their micro-batches


def submit(asked: Asked) -> int:
    """Check the runs and queue them; returns the exit code.

    Raises:
        ConfigError, DataError, CheckpointError: something cannot be; nothing is queued then.
    """
    variants = sweep.variants(asked.sweep) if asked.sweep else [Variant("", ())]
    runs = [config.load(asked.recipe, (*asked.overrides, *variant.overrides)) for variant in variants]  # typos first
    if asked.local and asked.sweep:
        raise ConfigError("--local runs one run at a time; leave out --sweep")
    note = "" if asked.local else _check_slurm(asked)
    root = Path(asked.out or run_folder.default_name(runs[0].recipe)).absolute()
    _check_writable(root)
    if asked.sweep and (root / run_folder.CONFIG).exists():
        raise ConfigError(f"--out {asked.out} holds a run; give a sweep a folder of its own")
    checked = [_checked(asked, each, root / each.name) for each in variants]
    waiting = [each for each in checked if each is not None]
    if not waiting:
        return DONE
    options = replace(asked.options, job_name=asked.options.job_name or runs[0].recipe)
    home = root / run_folder.SLURM
    if not asked.local:
        for said in dict.fromkeys(said for each in waiting for said in each.warnings):
            print(f"warning: {said}", file=sys.stderr)
    if asked.dry_run:
        _show(asked, options, waiting, home, note)
        return DONE
    fresh = [path for path in (root, home, *(each.out for each in waiting)) if not path.exists()]
    try:
        home.mkdir(parents=True, exist_ok=True)
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
    print(_summary(options, waiting[0]))
    for job in queued:
        print(f"job {job.number}: {job.out} (`slurm/submit.py status|logs|follow|cancel|requeue {status.near(root)}`)")
    sys.stdout.flush()
    if asked.sweep:
        _keep_sweep(root, variants)
    return status.follow_to_end(root, queued) if asked.follow else DONE


def _check_slurm(asked: Asked) -> str:
    """What Slurm has; a dry run asks it where it is, and can do without: why it had to."""
    options = asked.options
    try:
        if not asked.dry_run:
            slurm.need(", or give --local N to run here, or --dry_run to see the script")
        if slurm.is_here():
            slurm.check(options.partition, options.nodes)
            if not options.gpus_per_node and slurm.has_gpus(options.partition):
                where = f"partition {options.partition}" if options.partition else "the default partition"
                said = f"{where} has GPUs, and without --gpus_per_node N the ranks train on CPUs, one per node"
                print(f"warning: {said}", file=sys.stderr)
    except slurm.SlurmError as error:
        if not asked.dry_run:
            raise
        return f"# not checked with Slurm: {error}\n"
    return ""


def _check_writable(out: Path) -> None:
    """ConfigError unless a folder can be made there, of a name that Slurm takes as it is."""
    if "%" in str(out):
        raise ConfigError(f"--out {out}: Slurm reads % in the names of files as its own; give another one")
    parent = next(each for each in (out, *out.parents) if os.path.exists(each))
    if not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
        raise ConfigError(f"--out {out}: {parent} is no folder that can be written; give another one")


def _keep_sweep(root: Path, variants: Sequence[Variant]) -> None:
    try:
        sweep.write(root, variants)
    except OSError as error:
        raise ConfigError(f"the jobs are queued, but {root / sweep.SWEEP} cannot be written ({error})") from None


def _summary(options: JobOptions, run: Checked) -> str:
    """How the batch is cut."""
    gpus = f", {options.gpus} GPU(s) each" if options.gpus else ""
    batch = f"{options.ranks} rank(s) on {options.nodes} node(s){gpus}: a batch of {run.batch}"
    if run.tokens is not None:
        return f"{batch}, in micro-batches of up to {run.tokens} tokens"
    times = run.batch // (options.ranks * run.micro_batch)
    return f"{batch} = {options.ranks} rank(s) x {times} micro-batch(es) of {run.micro_batch}"


def _checked(asked: Asked, variant: Variant, out: Path) -> Checked | None:
    """None if there is nothing left to do for it."""
    run = config.load(asked.recipe, (*asked.overrides, *variant.overrides))
    if asked.options.on_node_loss == "shrink" and not asked.local:
        request = Request(run, asked.ds_config, out, asked.resume)
        if (kept := kept_micro_batch(request, asked.options.ranks)) is not None:
            variant = replace(variant, overrides=(*variant.overrides, f"data.micro_batch={kept}"))
            run = config.load(asked.recipe, (*asked.overrides, *variant.overrides))
    if not asked.dry_run:
        queue.check_free(out)
    done = begin.done(out, run.checkpoint.to, config.dump(run), asked.resume, run.steps)
    if done:
        print(done)
        return None
    request = Request(run, asked.ds_config, out, asked.resume)
    checked = check(request, asked.options.ranks, None if asked.local else asked.options.gpus_per_node > 0)
    return Checked(variant, out, *checked, run.data.tokens)


def _jobs(
    asked: Asked,
    options: JobOptions,
    runs: Sequence[Checked],
    code: Path,
    home: Path,
    keep: Callable[[str, Path], str] = snapshot.keep,
) -> list[Job]:
    """Jobs that need nothing more of the checkout, or of the files that the command line names."""
    recipe = asked.recipe if config.find_recipe(asked.recipe).parent == config.RECIPES else ""
    recipe = recipe or keep(asked.recipe, home)
    ds_config = keep(asked.ds_config, home)
    resume = asked.resume
    if resume not in ("auto", "never") and Path(resume).exists():
        resume = str(Path(resume).absolute())

    def job(run: Checked) -> Job:
        words = ("--recipe", recipe, "--ds_config", ds_config, "--out", str(run.out), "--resume", resume)
        return Job(
            out=str(run.out),
            code=str(code),
            folder=str(Path.cwd()),
            python=sys.executable,
            arguments=(*words, *asked.overrides, *run.variant.overrides),
            options=options,
            batch=run.batch,
            micro_batch=run.micro_batch,
        )

    return [job(run) for run in runs]


def _show(asked: Asked, options: JobOptions, runs: Sequence[Checked], home: Path, note: str) -> None:
    """The script, and what it starts on each node; or what would be started here."""
    code = snapshot.folder_of(asked.checkout, home)
    job = _jobs(asked, options, runs, code, home, snapshot.place_of)[0]
    if asked.local:
        print(f"# here, {_summary(options, runs[0])}; each:\n{shlex.join(job.command())}")
        return
    print(queue.executor(home, code, sys.executable, options).script(len(runs)))
    number = "NUMBER_INDEX" if len(runs) > 1 else "NUMBER"
    nodes = ("NODES",) * options.nodes
    start = conductor.Start(nodes, options.ranks_per_node, 0, job.home / records.LOGS / f"{number}_0_0", job.command())
    words = shlex.join(command(job, start)).replace(",".join(nodes), "NODES")
    print(
        f"{note}# {_summary(options, runs[0])}\n# which starts, on its first node (NODES, NUMBER: Slurm's):\n# {words}"
    )


def _run_here(job: Job) -> int:
    """Now, with what rank 0 prints shown as it comes."""
    ended = threading.Event()
    tail = follow.Tail(Path(job.out) / run_folder.LOG)

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
