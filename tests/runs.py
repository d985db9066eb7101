"""Real runs of a very small model, for tests of what happens around it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from tests.distributed.spawn import free_port

ROOT = Path(__file__).resolve().parent.parent
TINY = (
    *("data.batch=8", "family.visual_width=32", "family.visual_heads=2", "family.visual_intermediate=64"),
    *("family.visual_layers=1", "family.text_layers=1", "family.fusion_layers=1", "family.hidden=32"),
    *("family.heads=2", "family.intermediate=64", "family.patch=16", "objectives.itc.queue=32"),
    *("seed=1", "evaluation.limit=32", "evaluation.every=0", "logging.every=1", "family.dropout=0.1"),
)
MEASURED = {  # what differs from run to run, being time and memory
    *("seconds_per_step", "data_wait_fraction", "samples_per_second", "tokens_per_second", "model_tflops_per_second"),
    *("memory_peak_bytes", "memory_allocated_bytes", "straggler/rank", "straggler/max_over_median"),
}
LAUNCHED_BY = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_SIZE", "LOCAL_WORLD_SIZE")


def environment() -> dict[str, str]:
    """Of a single process on a CPU, whatever this one was started by."""
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHED_BY}
    return {**kept, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def launch(launcher: str, *arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """`python launchers/<launcher>.py ...`, to its end."""
    command = [sys.executable, f"launchers/{launcher}.py", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout, check=False
    )


def pretrain_command(world: int, out: Path, *arguments: str, shrunk: bool = True) -> list[str]:
    """The tiny run in one process, or on several ranks under torchrun; not `shrunk`: the recipe's own sizes."""
    run = ["launchers/pretrain.py", "--out", str(out), *(TINY if shrunk else ()), *arguments]
    if world == 1:
        return [sys.executable, *run]
    several = ["-m", "torch.distributed.run", f"--nproc_per_node={world}", f"--master_port={free_port()}"]
    return [sys.executable, *several, *run]


def run_whole(world: int, out: Path, *arguments: str, shrunk: bool = True) -> str:
    """The tiny run to its end, which the test expects to be a good one; what it printed."""
    command = pretrain_command(world, out, *arguments, shrunk=shrunk)
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert world > 1 or done.stderr == "", done.stderr
    return done.stdout


def stop_at(world: int, out: Path, step: int, number: signal.Signals, *arguments: str) -> tuple[int, str]:
    """The tiny run, sent a signal (a KILL: each of its processes) once it has logged `step`; code and output."""
    before = last_step(out)
    with subprocess.Popen(
        pretrain_command(world, out, *arguments),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        end = time.monotonic() + 100
        while process.poll() is None and time.monotonic() < end and not before < last_step(out) >= step:
            time.sleep(0.005)
        if number == signal.SIGKILL:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
        process.send_signal(number)
        said = process.communicate(timeout=60)[0]
    return process.returncode, said


def metrics(out: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    path = out / "metrics.jsonl"
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def figures(out: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what is measured by the clock."""
    lines = [line for line in metrics(out) if "checkpoint/seconds" not in line]
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]


def last_step(out: Path) -> int:
    """The last step that was logged, 0 before the first."""
    return max((line["step"] for line in metrics(out)), default=0)


def losses(out: Path) -> list[float]:
    """The loss of each logged step."""
    return [line["loss"] for line in metrics(out) if "loss" in line]
