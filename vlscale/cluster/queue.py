"""Jobs handed to Slurm through submitit, or shown as the script that it would get."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from vlscale import run_folder
from vlscale.cluster import environment, records, slurm
from vlscale.cluster.options import JobOptions
from vlscale.cluster.records import Job
from vlscale.cluster.srun import conduct
from vlscale.errors import ConfigError

SOCKETS = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME")


class Executor(submitit.SlurmExecutor):
    """submitit's, which can also show its script where there is no Slurm."""

    @classmethod
    def affinity(cls) -> int:
        """Can be made anywhere."""
        return 1

    def script(self, runs: int = 1) -> str:
        """What sbatch is given for so many runs."""
        array = {"map_count": runs} if runs > 1 else {}
        before = dict(self.parameters)
        self.parameters.update(array)
        try:
            return str(self._make_submission_file_text(self._submitit_command_str, ""))
        finally:
            self.parameters = before


def executor(home: Path, code: Path, python: str, options: JobOptions) -> Executor:
    """One that writes its files to `home`, and whose jobs run the code of the snapshot `code`."""
    made = Executor(home, python=f"exec {shlex.quote(python)}")  # else Slurm's signals end with bash
    further: dict[str, Any] = {
        "signal": f"{options.signal}@{options.lead_seconds}",
        "chdir": str(code),  # where the job's Python finds vlscale, before the one that is installed
        "requeue" if options.requeue else "no-requeue": True,
    }
    if options.reservation:
        further["reservation"] = options.reservation
    for word in options.sbatch:
        key, equals, value = word.partition("=")
        further[key] = value if equals else True
    asked: dict[str, Any] = {
        **{name: getattr(options, name) for name in ("partition", "account", "qos", "constraint", "mem", "comment")},
        **{name: getattr(options, name) for name in ("nodelist", "exclude", "cpus_per_task", "nodes", "job_name")},
        "exclusive": options.exclusive or None,
        "gpus_per_node": options.gpus,
        "ntasks_per_node": options.ranks_per_node,
        "time": options.minutes,
        "setup": setup_lines(options),
        "stderr_to_stdout": True,
        "use_srun": False,
        "wckey": None,
        "array_parallelism": options.parallel or 10_000,
        "additional_parameters": further,
    }
    made.update_parameters(**asked)
    return made


def setup_lines(options: JobOptions) -> list[str]:
    """What the batch script does before anything else."""
    environment = {**{name: options.interface for name in SOCKETS if options.interface}, **options.environment}
    return [
        *(f"module load {shlex.quote(module)}" for module in options.modules),
        *(f"export {name}={shlex.quote(str(value))}" for name, value in environment.items()),
        *options.setup,
    ]


def submit(jobs: Sequence[Job], home: Path) -> list[Job]:
    """Queue them, several as one array, and keep how each is called; all ask for the same.

    Raises:
        ConfigError: Slurm refuses, or `home` cannot be written; nothing is queued then, and no `job.json` changed.
    """
    first = jobs[0]
    before = [records.read_job(Path(job.out)) if (job.home / records.JOB).is_file() else None for job in jobs]
    try:
        for job in jobs:
            job.write()
        made = executor(home, Path(first.code), first.python, first.options)
        files = [str(job.home / records.JOB) for job in jobs]
        with _own_environment(made.script()), contextlib.redirect_stderr(io.StringIO()):  # a refusal is told below
            queued = made.map_array(conduct, files) if len(files) > 1 else [made.submit(conduct, files[0])]
    except (FailedJobError, FailedSubmissionError) as error:
        for job, earlier in zip(jobs, before, strict=True):
            (job.home / records.JOB).unlink()
            if earlier is not None:
                earlier.write()
        said = re.findall(r"^sbatch: error: (?:Batch job submission failed: )?(.*)", str(error), re.MULTILINE)
        raise ConfigError(f"sbatch refuses the job: {'; '.join(said) or ' '.join(str(error).split())}") from None
    except OSError as error:
        raise ConfigError(f"--out {first.out} cannot be written ({error}); give another one") from None
    return [job.queued_as(each.job_id, str(each.paths.stdout)) for job, each in zip(jobs, queued, strict=True)]


@contextlib.contextmanager
def _own_environment(script: str) -> Iterator[None]:
    """While sbatch is called: variables go over what stands in its script, and a job's own go into the next job."""
    asked = re.findall(r"^#SBATCH --([\w-]+)", script, re.MULTILINE)
    names = ["timelimit" if each == "time" else each.replace("-", "_") for each in asked]
    before = dict(os.environ)
    kept = environment.for_sbatch(before, names)
    try:
        for name in set(before) - set(kept):
            del os.environ[name]
        yield
    finally:
        os.environ.update(before)


def check_free(out: Path) -> None:
    """ConfigError if a job of this run is in the queue already."""
    if not (out / run_folder.SLURM / records.JOB).is_file():
        return
    job = records.read_job(out)
    state = slurm.state(job.number) if job.number and slurm.is_here() else ""
    if state and state not in slurm.OVER:
        raise ConfigError(
            f"--out {out} is job {job.number} already ({state}); `slurm/submit.py cancel {out}` ends that one, "
            f"or give another --out"
        )
