"""The programs on CUDA: every DeepSpeed file trains, the benchmark gives an MFU, resuming is exact."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.test_engine import on_one_gpu
from vlscale import build, config, train
from vlscale.errors import DONE
from vlscale.flops import peak_flops

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "ds_configs").glob("*.json"))


def launch(program: str, *arguments: str) -> str:
    command = [sys.executable, str(ROOT / "launchers" / program), *arguments]
    done = subprocess.run(command, env={**os.environ, "CUDA_VISIBLE_DEVICES": "0"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def metrics(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def for_one_gpu(path: Path, folder: Path) -> Path:
    """The file, with ZeRO++'s second shard as wide as one GPU."""
    tree = json.loads(path.read_text())
    if "zero_hpz_partition_size" in tree.get("zero_optimization", {}):
        tree["zero_optimization"]["zero_hpz_partition_size"] = 1
    copy = folder / path.name
    copy.write_text(json.dumps(tree))
    return copy


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_quickstart_runs_with_every_file(path: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    keys = ("steps=6", "logging.every=1", "evaluation.limit=32")
    launch("pretrain.py", "--ds_config", str(for_one_gpu(path, tmp_path)), "--out", str(out), *keys)
    found = metrics(out)
    assert [line["step"] for line in found] == [1, 2, 3, 4, 5, 6]
    assert all(math.isfinite(line["loss"]) for line in found)
    assert ("loss_scale" in found[0]) == path.stem.endswith("fp16")
    assert (out / "checkpoints" / "latest").is_file()


@pytest.mark.parametrize("mode", ["none", "full"])
def test_the_benchmark_gives_an_mfu(mode: str, tmp_path: Path) -> None:
    path = tmp_path / "speed.json"
    zero2 = str(ROOT / "ds_configs" / "zero2.json")
    arguments = ("--ds_config", zero2, "--steps", "10", "--warmup", "3", "--against", "bare", "--json", str(path))
    launch("benchmark.py", *arguments, f"activation_checkpointing={mode}")
    found = json.loads(path.read_text())
    if peak_flops(found["machine"]["device"], "bf16") is None:
        pytest.skip(f"the peak of {found['machine']['device']} is unknown")
    assert 0 < found["mfu"]["median"] <= found["hfu"]["median"] < 1
    assert (found["mfu"]["median"] < found["hfu"]["median"]) == (mode == "full")
    assert found["memory_peak_bytes"] > found["memory_before_bytes"] > 0


def train_to(out: str, steps: int, name: str) -> int:
    """With deterministic kernels."""
    torch.use_deterministic_algorithms(True)
    keys = ["optim.schedule=constant", "checkpoint.every=4", "logging.every=1", "evaluation.limit=32"]
    keys += ["objectives.itc={queue: 256, soften: 0.4}", "objectives.itm={keys: momentum}", "family.dropout=0.1"]
    run = config.load("quickstart", [f"steps={steps}", *keys])
    return train.train(build.Request(run, str(ROOT / "ds_configs" / f"{name}.json"), Path(out)))


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3"])
def test_resuming_is_exact(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic matrix products
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for out, steps in ((whole, 8), (parts, 4), (parts, 8)):
        assert on_one_gpu(train_to, str(out), steps, name) == DONE
    for expected, found in zip(metrics(whole), metrics(parts), strict=True):
        for key in ("step", "loss", "grad_norm", "temperature"):
            assert found.get(key) == expected.get(key), (expected["step"], key)


def test_a_dry_run(tmp_path: Path) -> None:
    """Its probe runs where the ranks' messages do."""
    said = launch("pretrain.py", "--dry_run", "--out", str(tmp_path / "run"), "steps=40")
    assert "activations of a micro-batch" in said
    assert "of the GPU's peak" in said
