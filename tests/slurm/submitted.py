"""`slurm/submit.py` as a user gives it, and what its jobs leave."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from tests import runs
from tests.slurm.cluster import Cluster


def command(*words: str) -> list[str]:
    return [sys.executable, "slurm/submit.py", *words]


def environment(slurm: Cluster) -> dict[str, str]:
    kept = {name: value for name, value in runs.environment().items() if not name.startswith("SLURM")}
    return {**kept, "SLURM_CONF": slurm.environment()["SLURM_CONF"]}


def submit(slurm: Cluster, *words: str, code: int = 0, cwd: Path = runs.ROOT) -> str:
    """What `slurm/submit.py` printed to its end, which the test expects to have this exit code."""
    done = subprocess.run(
        command(*words),
        cwd=cwd,
        env=environment(slurm),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == code, done.stdout
    return done.stdout


def follow(slurm: Cluster, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(*words),
        cwd=runs.ROOT,
        env=environment(slurm),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def tiny(out: Path, *words: str) -> list[str]:
    """What comes after the options of submit.py."""
    return ["--", "--out", str(out), *runs.TINY, *words]


def until(true: Callable[[], object], timeout: float = 120) -> None:
    end = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def job_of(out: Path) -> str:
    return str(json.loads((out / "slurm" / "job.json").read_text())["number"])


def events(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / "slurm" / "starts.jsonl").read_text().splitlines()]


def ranks(slurm: Cluster) -> list[psutil.Process]:
    """The processes that train."""
    return [each for each in slurm.processes() if _trains(each)]


def _trains(process: psutil.Process) -> bool:
    try:
        return process.name().startswith("python") and process.cmdline()[1:2][0].endswith("launchers/pretrain.py")
    except (psutil.Error, IndexError):  # it has just ended
        return False
