"""What a job leaves in the run folder, under `slurm/`: how it was submitted, and how each start of its ranks went."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from vlscale import config
from vlscale.cluster.options import JobOptions
from vlscale.errors import ConfigError
from vlscale.run_folder import CHECKPOINTS, CONFIG, SLURM
from vlscale.saving.targets import LATEST, write_atomically

JOB, STARTS, LOGS = "job.json", "starts.jsonl", "logs"


@dataclass(frozen=True)
class Job:
    """A submitted run, as `job.json` keeps it."""

    out: str  # the run folder; absolute, as all paths here
    code: str  # snapshot that the ranks run
    folder: str  # that paths in `arguments` are relative to
    python: str  # of the one who submitted
    arguments: tuple[str, ...]  # of launchers/pretrain.py
    options: JobOptions
    batch: int  # samples per optimizer step
    micro_batch: int  # samples per rank and forward pass
    number: str = ""  # Slurm's of the job, 12 or 12_3 in an array; empty until it is queued
    log: str = ""  # file of the batch script's words

    @property
    def home(self) -> Path:
        """Where a job's records are."""
        return Path(self.out) / SLURM

    def fewer(self, nodes: int) -> int:
        """The most nodes, up to so many, on which the batch divides into micro-batches; 0 = none."""
        fits = [
            n for n in range(1, nodes + 1) if self.batch % (n * self.options.ranks_per_node * self.micro_batch) == 0
        ]
        return max(fits, default=0)

    def command(self, again: bool = False) -> tuple[str, ...]:
        """Python and its words for a rank; started `again` it goes on, also after `--resume never`."""
        words = list(self.arguments)
        if again and "--resume" in words:
            place = words.index("--resume") + 1
            words[place] = "auto" if words[place] == "never" else words[place]
        python = self.options.python or self.python
        return (*self.options.container, python, f"{self.code}/launchers/pretrain.py", *words)

    def write(self) -> None:
        """Keep it; replaces what an earlier submission of the run has left."""
        self.home.mkdir(parents=True, exist_ok=True)
        write_atomically(self.home / JOB, json.dumps(asdict(self), indent=2) + "\n")

    def queued_as(self, number: str, log: str) -> Job:
        """The same with its number and log file, kept; a disk that does not take them is not worth a run."""
        queued = replace(self, number=number, log=log)
        with suppress(OSError):
            queued.write()
        return queued


def read_job(out: Path) -> Job:
    """The job of a run folder.

    Raises:
        ConfigError: there is none.
    """
    path = out / SLURM / JOB
    try:
        tree = json.loads(path.read_text())
        tree["arguments"] = tuple(tree["arguments"])
        lists = {name: tuple(value) for name, value in tree["options"].items() if isinstance(value, list)}
        job = Job(**{**tree, "options": config.build(JobOptions, {**tree["options"], **lists}, str(path))})
    except FileNotFoundError:
        raise ConfigError(f"{out} holds no job of slurm/submit.py ({path} is missing); give a run folder") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path} cannot be read as a job ({error}); submit the run again") from None
    return job


def append(home: Path, event: str, values: Mapping[str, Any]) -> None:
    """Add a line to `starts.jsonl`; what cannot be written is not worth a run."""
    with suppress(OSError), (home / STARTS).open("a") as file:
        file.write(json.dumps({"event": event, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **values}) + "\n")


def starts(home: Path) -> list[dict[str, Any]]:
    """The lines of `starts.jsonl`; none where there is no such file."""
    lines = []
    with suppress(OSError):
        for line in (home / STARTS).read_text().splitlines():
            with suppress(ValueError):
                lines.append(json.loads(line))
    return lines


def configuration(out: Path) -> dict[str, Any]:
    """That of a run which has begun; else empty."""
    with suppress(OSError, ValueError, yaml.YAMLError):
        tree = yaml.safe_load((out / CONFIG).read_text())
        return tree if isinstance(tree, dict) else {}
    return {}


def last_checkpoint(out: Path) -> str:
    """The name of the run's newest checkpoint in its folder; empty = none, or it is in a store."""
    with suppress(OSError):
        return (out / CHECKPOINTS / LATEST).read_text().strip()
    return ""
