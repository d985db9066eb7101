"""The folder of a run: who may write there, and what is written before step 1."""

from __future__ import annotations

import itertools
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from vlscale import __version__
from vlscale.data.storage import locks
from vlscale.errors import ConfigError
from vlscale.saving.targets import write_atomically

CONFIG, DS_CONFIG, ENVIRONMENT = "config.yaml", "ds_config.json", "environment.json"
METRICS, LOG, CHECKPOINTS = "metrics.jsonl", "log.txt", "checkpoints"
HANGS = "hangs"  # what a hang left behind: `watchdog`
SLURM = "slurm"  # what a job of a cluster leaves: `vlscale.cluster`
SNAPSHOT = "snapshot.json"  # beside a copy of the code: what it was
LOCK = ".lock"
PATIENCE = 20.0  # seconds for the end of a process that is being ended
RETURNED = 180.0  # for a job that was put back: a file server keeps the lock of a node that died for a while
STORES = ("data.cache", "data.cache_gigabytes", "data.store_patience", "data.store_timeout", "data.pipe")
LOADING = ("data.workers", "data.bad_budget", "data.bad_always", *STORES)
SAVING = tuple(f"checkpoint.{key}" for key in ("every", "keep", "keep_every", "failures", "background"))
MAY_CHANGE = (
    "steps",
    "logging",
    "evaluation",
    "watchdog",
    "non_finite",
    "spikes",
    *SAVING,
    *LOADING,
)  # leave a run the same

CUT = "data.micro_batch"


def default_name(recipe: str) -> Path:
    """`runs/<recipe>-<date>-<time>`."""
    return Path("runs") / f"{recipe}-{time.strftime('%Y%m%d-%H%M%S')}"


def check(out: Path, configuration: Mapping[str, Any], resume: str) -> None:
    """Whether this run may use the folder.

    Raises:
        ConfigError: it holds another run (names the keys that differ), or any run with `--resume never`.
    """
    if not (out / CONFIG).is_file():
        early = (HANGS, LOCK, SLURM, f".{CONFIG}.")  # what is left of a start that was ended before it had written any
        if out.exists() and (not out.is_dir() or any(not each.name.startswith(early) for each in out.iterdir())):
            raise ConfigError(f"--out {out} exists and is not a run folder; give another one")
        return
    if resume == "never":
        raise ConfigError(f"--out {out} holds a run already and --resume never was given; give another --out")
    differ = differing(out, configuration)
    if differ:
        cut = "; to cut its steps otherwise, go on with --resume CHECKPOINT --out NEW" if CUT in differ else ""
        raise ConfigError(f"--out {out} holds another run: {differ}; give another --out or the same keys{cut}")


def differing(out: Path, configuration: Mapping[str, Any], among: tuple[str, ...] = ()) -> str:
    """The keys in which the run in `out` is another one, in words; empty = the same. `among`: keys or sections."""
    try:
        old = yaml.safe_load((out / CONFIG).read_text())
    except (OSError, ValueError, yaml.YAMLError):
        old = None
    if not isinstance(old, dict):
        raise ConfigError(f"{out / CONFIG} cannot be read as a run's configuration; give another folder")
    found = [each for each in _differing(old, configuration) if not _may_change(each[0])]
    found = [each for each in found if not among or f"{each[0]}.".startswith(tuple(f"{key}." for key in among))]
    shown = ", ".join(f"{key} ({before!r} there, {after!r} here)" for key, before, after in found[:4])
    more = f" and {len(found) - 4} more" if len(found) > 4 else ""
    return f"{shown}{more} differ" if found else ""


def hold(out: Path) -> None:
    """Have the folder to ourselves until this process ends, where its file system has locks.

    Raises:
        ConfigError: another process writes there.
    """
    if holder := locks.hold(out / LOCK, RETURNED if "SLURM_RESTART_COUNT" in os.environ else PATIENCE):
        raise ConfigError(
            f"--out {out} is written by {holder}; stop that one, or give another --out "
            f"(if it is gone with its machine: remove {out / LOCK})"
        )


def write(out: Path, configuration: Mapping[str, Any], ds: Mapping[str, Any], hosts: Sequence[str]) -> None:
    """config.yaml, ds_config.json and environment.json; `hosts` names the machine of each rank. Holds the folder."""
    out.mkdir(parents=True, exist_ok=True)
    hold(out)
    _put_aside(out / HANGS)
    write_atomically(out / CONFIG, yaml.safe_dump(dict(configuration), sort_keys=False))
    write_atomically(out / DS_CONFIG, json.dumps(dict(ds), indent=2) + "\n")
    write_atomically(out / ENVIRONMENT, json.dumps(_environment(hosts), indent=2) + "\n")


def _put_aside(folder: Path) -> None:
    """Rename what an earlier start left: `hangs_1`, `hangs_2`, ..."""
    if folder.exists():
        number = next(each for each in itertools.count(1) if not folder.with_name(f"{folder.name}_{each}").exists())
        folder.rename(folder.with_name(f"{folder.name}_{number}"))


def _environment(hosts: Sequence[str]) -> dict[str, Any]:
    here = Path(__file__).parent
    packages = ("torch", "deepspeed", "transformers", "webdataset", "fairscale", "numpy")
    return {
        "command": sys.argv,
        "world_size": len(hosts),
        "hosts": list(dict.fromkeys(hosts)),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": {"vlscale": __version__} | {name: _version(name) for name in packages},
        **_commit(here.parent),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit(code: Path) -> dict[str, Any]:
    """`git_commit` and `git_diff` of the code that runs."""
    try:
        record: dict[str, Any] = json.loads((code / SNAPSHOT).read_text())
        return record
    except (OSError, ValueError):
        return {"git_commit": git(code, "rev-parse", "HEAD"), "git_diff": git(code, "diff", "HEAD")}


def git(folder: Path, *arguments: str) -> str | None:
    """What git says, or None where there is no git or no repository."""
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace").strip()


def _may_change(key: str) -> bool:
    return f"{key}.".startswith(tuple(f"{each}." for each in MAY_CHANGE))


def _differing(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted key, old value, new value) wherever they differ."""
    out: list[tuple[str, Any, Any]] = []
    for key in dict.fromkeys((*old, *new)):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            out.extend(_differing(before, after, f"{prefix}{key}."))
        elif before != after:
            out.append((f"{prefix}{key}", before, after))
    return out
