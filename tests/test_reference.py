"""The reference runner: agrees with the authors' tensors, and notices where something does not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.reference.__main__ import main
from tests.reference.compare import compare
from tests.reference_folders import copied, spoilt
from tests.shard_files import reference_folder


@pytest.fixture
def albef() -> Path:
    return reference_folder("albef")


def test_albef_agrees_with_the_authors(albef: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    assert main([str(albef), "--json", str(report)]) == 0
    found = json.loads(report.read_text())
    assert found["ok"] is True
    assert found["system"] == "albef"
    assert all(row["ok"] and set(row) == {"name", "max_abs", "rel", "tolerance", "ok"} for row in found["compared"])
    names = {row["name"] for row in found["compared"]}
    stored = {"outputs": "", "ddp2_outputs": "ddp2_outputs:"}
    for file, prefix in stored.items():
        assert {prefix + name for name in load_file(albef / f"{file}.safetensors")} <= names
    assert all("param_norm_after[" in row["name"] for row in found["not_compared"])


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("outputs", "s1/sim_i2t"),
        ("outputs", "s2/param_norm_after"),
        ("ddp2_outputs", "r1/s1/text_queue_after"),
    ],
)
def test_a_changed_output_fails(albef: Path, tmp_path: Path, file: str, name: str) -> None:
    folder = spoilt(albef, tmp_path, name, file)
    report = tmp_path / "report.json"
    assert main([str(folder), "--json", str(report)]) == 1
    failed = [row["name"] for row in json.loads(report.read_text())["compared"] if not row["ok"]]
    assert len(failed) == 1
    assert name in failed[0]


def test_a_changed_weight_and_an_unknown_output_fail(albef: Path, tmp_path: Path) -> None:
    folder = copied(albef, tmp_path)
    weights = load_file(folder / "weights.safetensors")
    weights["text_proj.bias"] += 0.01
    save_file(weights, folder / "weights.safetensors")
    outputs = load_file(folder / "outputs.safetensors")
    save_file({**outputs, "s0/loss_new": torch.ones(1)}, folder / "outputs.safetensors")
    report = tmp_path / "report.json"
    assert main([str(folder), "--json", str(report)]) == 1
    found = json.loads(report.read_text())
    assert not all(row["ok"] for row in found["compared"])
    assert "s0/loss_new" in [row["name"] for row in found["not_compared"]]


def test_outputs_are_not_needed_to_compute(albef: Path, tmp_path: Path) -> None:
    from tests.reference import albef as system
    from tests.reference.compare import Folder

    folder = copied(albef, tmp_path)
    for file in folder.glob("*outputs*"):
        file.unlink()
    computed = system.run(Folder.open(folder))
    assert set(computed) == {"outputs.safetensors", "ddp2_outputs.safetensors"}
    assert main([str(folder)]) == 1  # nothing compared is no success


def test_unknown_system(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "albeff"
    folder.mkdir()
    assert main([str(folder)]) == 2
    assert "did you mean 'albef'?" in capsys.readouterr().err
    shutil.move(folder, tmp_path / "albef")
    assert main([str(tmp_path / "albef")]) == 2
    assert "config.json" in capsys.readouterr().err


def test_comparing() -> None:
    ones = torch.ones(3)
    assert compare("a", ones + 9e-5, ones).ok
    assert not compare("a", ones + 2e-4, ones).ok
    assert compare("a", ones * 5e-6, ones * 0).ok
    assert not compare("a", ones * float("nan"), ones).ok
    assert not compare("a", torch.ones(2), ones).ok
    assert not compare("a", torch.tensor([1]), torch.tensor([2])).ok
