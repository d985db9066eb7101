"""Jobs, and slurm/submit.py itself, for tests that need no Slurm."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.runs import ROOT
from vlscale.cluster.options import JobOptions
from vlscale.cluster.records import Job


def load_submit() -> ModuleType:
    """slurm/submit.py as a module."""
    spec = importlib.util.spec_from_file_location("submit", ROOT / "slurm" / "submit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def job(out: Path, batch: int = 24, micro_batch: int = 3, **options: Any) -> Job:
    """A run in `out` that nobody has queued."""
    words = ("--recipe", "quickstart", "--out", str(out), "--resume", "never", "steps=4")
    return Job(str(out), "/code", "/here", "/bin/python", words, JobOptions(**options), batch, micro_batch)
