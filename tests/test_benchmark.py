from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlscale import benchmark

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = ROOT / "launchers" / "benchmark.py"
TINY = (
    "family.visual_layers=1",
    "family.text_layers=1",
    "family.fusion_layers=1",
    "family.visual_width=32",
    "family.hidden=32",
    "family.intermediate=64",
    "family.visual_intermediate=64",
    "objectives.itc.queue=16",
    "data.batch=4",
    "logging.every=2",
)


def launch(folder: Path, *arguments: str, world: int = 1) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable]
    if world > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)]
    command += [str(PROGRAM), "--ds_config", str(ROOT / "ds_configs" / "zero2.json"), *arguments]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=200)


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("benchmark")
    done = launch(folder, "--steps", "3", "--warmup", "1", "--against", "bare", "--json", "speed.json", *TINY)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in folder.iterdir()] == ["speed.json"]  # no run folder
    assert "ours / bare" in done.stdout
    found: dict[str, Any] = json.loads((folder / "speed.json").read_text())
    return found


def test_speed(figures: dict[str, Any]) -> None:
    took = figures["seconds_per_step"]
    assert 0 < took["p10"] <= took["median"] <= took["p90"]
    assert figures["samples_per_second"]["median"] == pytest.approx(4 / took["median"], rel=0.5)
    for name in ("tokens_per_second", "model_tflops_per_second", "cpu_seconds_per_step"):
        assert figures[name]["median"] > 0
    assert 0 <= figures["data_wait_fraction"]["median"] < 1
    assert figures["mfu"] is figures["hfu"] is None  # a CPU's peak is unknown
    assert figures["hardware_tflops_per_step"] == figures["model_tflops_per_step"] > 0


def test_memory_and_conditions(figures: dict[str, Any]) -> None:
    assert figures["memory_growth_bytes"] == figures["memory_peak_bytes"] - figures["memory_before_bytes"]
    assert figures["memory_peak_bytes"] > 1e8
    assert (figures["ranks"], figures["batch"], figures["zero_stage"], figures["precision"]) == (1, 4, 2, "bf16")
    assert figures["machine"]["versions"].keys() == {"python", "torch", "deepspeed"}
    assert figures["command"][0] == "benchmark.py"


def test_ratio_to_the_bare_loop(figures: dict[str, Any]) -> None:
    found = figures["against"]
    assert (found["pairs"], found["steps_per_block"], figures["steps"]) == (2, 2, 4)  # whole blocks
    assert 0.1 < found["ratio"] < 10
    assert found["ratio_of_pairs"]["p10"] <= found["ratio_of_pairs"]["p90"]


def test_two_ranks_and_recomputation(tmp_path: Path) -> None:
    mode = "activation_checkpointing=full"
    done = launch(tmp_path, "--steps", "2", "--warmup", "1", "--json", "speed.json", mode, *TINY, world=2)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "speed.json").read_text())
    assert (found["ranks"], found["micro_batch"], found["against"]) == (2, 2, None)
    assert found["hardware_tflops_per_step"] > found["model_tflops_per_step"]
    assert done.stdout.count("memory peak") == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--against", "bear"), "did you mean 'bare'"),
        (("--steps", "0"), "--steps and --warmup should be at least 1"),
        (("--stepps", "3"), "did you mean '--steps'"),
        (("--json", "nowhere/speed.json"), "there is no such folder"),
        (("data.bach=3",), "did you mean 'batch'"),
    ],
)
def test_mistakes(arguments: tuple[str, ...], says: str, tmp_path: Path) -> None:
    done = launch(tmp_path, *arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stdout == ""


def test_spread() -> None:
    found = benchmark.spread(np.arange(101.0))
    assert found == {"median": 50.0, "p10": 10.0, "p90": 90.0}
