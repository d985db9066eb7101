"""The folder of a run: who may write there, and what is written before step 1."""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from vlscale.checkpoint import write_atomically
from vlscale.errors import ConfigError

CONFIG = "config.yaml"
MAY_CHANGE = ("steps", "logging.", "evaluation.")  # keys that leave a run the same


def default_name(recipe: str) -> Path:
    """`runs/<recipe>-<date>-<time>`."""
    return Path("runs") / f"{recipe}-{time.strftime('%Y%m%d-%H%M%S')}"


def check(out: Path, configuration: Mapping[str, Any], resume: str) -> None:
    """Whether this run may use the folder.

    Raises:
        ConfigError: it holds another run (names the keys that differ), or any run with `--resume never`.
    """
    if not (out / CONFIG).is_file():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ConfigError(f"--out {out} exists and is not a run folder; give another one")
        return
    if resume == "never":
        raise ConfigError(f"--out {out} holds a run already and --resume never was given; give another --out")
    old = yaml.safe_load((out / CONFIG).read_text())
    differing = [key for key in _differing(old, configuration) if not key.startswith(MAY_CHANGE)]
    if differing:
        shown = ", ".join(f"{key} ({_at(old, key)!r} there, {_at(configuration, key)!r} here)" for key in differing[:4])
        more = f" and {len(differing) - 4} more" if len(differing) > 4 else ""
        raise ConfigError(f"--out {out} holds another run: {shown}{more} differ; give another --out or the same keys")


def write(out: Path, configuration: Mapping[str, Any], ds: Mapping[str, Any], world: int) -> None:
    """config.yaml, ds_config.json and environment.json."""
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / CONFIG, yaml.safe_dump(dict(configuration), sort_keys=False))
    write_atomically(out / "ds_config.json", json.dumps(dict(ds), indent=2) + "\n")
    write_atomically(out / "environment.json", json.dumps(_environment(world), indent=2) + "\n")


def _environment(world: int) -> dict[str, Any]:
    here = Path(__file__).parent
    packages = ("vlscale", "torch", "deepspeed", "transformers", "webdataset", "fairscale", "numpy")
    return {
        "command": sys.argv,
        "world_size": world,
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in packages},
        "git_commit": _git(here, "rev-parse", "HEAD"),
        "git_diff": _git(here, "diff", "HEAD"),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _differing(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    out: list[str] = []
    for key in dict.fromkeys((*old, *new)):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            out.extend(_differing(before, after, f"{prefix}{key}."))
        elif before != after:
            out.append(f"{prefix}{key}")
    return out


def _at(tree: Any, path: str) -> Any:
    for key in path.split("."):
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree
