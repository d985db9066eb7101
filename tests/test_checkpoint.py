"""Checkpoints are whole or absent: whatever is done to the files, the run goes on from the last whole one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.models import albef_batch, albef_model
from vlscale import checkpoint
from vlscale.errors import CheckpointError, ConfigError
from vlscale.local_engine import LocalEngine
from vlscale.optim import OptimConfig
from vlscale.types import Moment


def engine(seed: int = 0) -> LocalEngine:
    return LocalEngine(albef_model(seed=seed), OptimConfig(), torch.device("cpu"))


def state(step: int) -> dict[str, Any]:
    return {"step": step, "world_size": 1, "zero_stage": 2, "precision": "bf16"}


@pytest.fixture(scope="module")
def machine() -> LocalEngine:
    return engine()


@pytest.fixture
def run(tmp_path: Path, machine: LocalEngine) -> Path:
    """A run folder with the checkpoints of steps 10 and 20."""
    for step in (10, 20):
        checkpoint.save(tmp_path, machine, state(step), keep=2)
    return tmp_path


def of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}"


def newest(run: Path) -> tuple[int, list[str]]:
    warnings: list[str] = []
    found = checkpoint.newest(run, warnings.append)
    return (found.step if found else 0), warnings


def test_the_manifest_lists_every_file(run: Path) -> None:
    folder = of(run, 20)
    listed = json.loads((folder / "manifest.json").read_text())["files"]
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    assert set(listed) == set(files) - {"manifest.json"}
    assert {"weights.safetensors", "state.json", "local.pt"} <= set(listed)
    for name, (size, digest) in listed.items():
        assert files[name].stat().st_size == size
        assert hashlib.sha256(files[name].read_bytes()).hexdigest() == digest
    assert all(files["manifest.json"].stat().st_mtime_ns >= path.stat().st_mtime_ns for path in files.values())


def test_latest_names_the_newest(run: Path) -> None:
    assert (run / "checkpoints" / "latest").read_text().strip() == "step_00000020"
    assert checkpoint.latest_step(run) == 20
    assert newest(run) == (20, [])
    assert checkpoint.run_folder(checkpoint.find(str(run))) == run


def test_the_newest_are_kept(run: Path, machine: LocalEngine) -> None:
    checkpoint.save(run, machine, state(30), keep=2)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        *("latest", "step_00000020", "step_00000030"),
    ]
    checkpoint.save(run, machine, state(40), keep=1)
    assert [path.name for path in (run / "checkpoints").glob("step_*")] == ["step_00000040"]


def test_weights_are_whole_and_by_our_names(run: Path, machine: LocalEngine) -> None:
    weights = load_file(of(run, 20) / "weights.safetensors")
    expected = {**dict(machine.model.named_parameters()), **dict(machine.model.named_buffers())}
    assert set(weights) == set(expected)
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    def steps(machine: LocalEngine, numbers: range) -> list[float]:
        losses = []
        for step in numbers:
            torch.manual_seed(step)
            made = machine.forward(albef_batch(seed=step), Moment(step))
            loss = machine.model.total(made.losses, {})
            machine.backward(loss, last=True)
            machine.model.commit([made.keys], step, "step")
            machine.step(1e-3)
            machine.after_step(0.9)
            losses.append(float(loss.detach()))
        return losses

    first = engine()
    steps(first, range(1, 4))
    folder = checkpoint.save(tmp_path, first, state(3), keep=1)
    expected = steps(first, range(4, 7))
    second = engine(seed=1)
    second.load(folder)
    assert steps(second, range(4, 7)) == expected


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_text("{}")


@pytest.mark.parametrize("harm", [flip_a_byte, cut_short, Path.unlink])
@pytest.mark.parametrize("name", ["weights.safetensors", "local.pt", "state.json"])
def test_a_harmed_file_leads_to_the_one_before(run: Path, harm: Callable[[Path], None], name: str) -> None:
    harm(of(run, 20) / name)
    step, warnings = newest(run)
    assert step == 10
    assert len(warnings) == 1
    assert str(of(run, 20) / name) in warnings[0]
    assert "going back to step_00000010" in warnings[0]


@pytest.mark.parametrize("harm", [cut_short, Path.unlink, empty, lambda path: path.write_text('{"files": [3]}')])
def test_a_harmed_manifest_leads_to_the_one_before(run: Path, harm: Callable[[Path], None]) -> None:
    path = of(run, 20) / "manifest.json"
    if harm is cut_short:
        path.write_text(path.read_text()[:-20])
    else:
        harm(path)
    step, warnings = newest(run)
    assert step == 10
    assert str(of(run, 20)) in warnings[0]


def test_all_broken(run: Path) -> None:
    for step in (10, 20):
        flip_a_byte(of(run, step) / "local.pt")
    with pytest.raises(CheckpointError, match=r"holds 2 checkpoint\(s\), and none is usable: .*local.pt") as caught:
        checkpoint.newest(run)
    assert caught.value.exit_code == 5


def test_a_broken_one_is_overtaken(run: Path, machine: LocalEngine) -> None:
    """Going on from 10, the save at 15 counts: it is neither pruned nor hidden behind the broken 20."""
    flip_a_byte(of(run, 20) / "local.pt")
    checkpoint.save(run, machine, state(15), keep=1)
    assert newest(run) == (15, [])
    assert (run / "checkpoints" / "latest").read_text().strip() == "step_00000015"


def test_what_a_kill_left_is_ignored_and_removed(run: Path, machine: LocalEngine) -> None:
    for step in (25, 30):
        partial = run / "checkpoints" / f".step_{step:08d}.partial"
        partial.mkdir()
        (partial / "local.pt").write_bytes(b"half")
    assert newest(run) == (20, [])
    checkpoint.save(run, machine, state(30), keep=2)
    assert not list((run / "checkpoints").glob(".*"))
    assert newest(run) == (30, [])
    assert set(json.loads((of(run, 30) / "manifest.json").read_text())["files"]) == {
        *("local.pt", "state.json", "weights.safetensors"),
    }


def test_a_kill_between_the_rename_and_latest(run: Path) -> None:
    (run / "checkpoints" / "latest").write_text("step_00000010\n")
    assert newest(run)[0] == 20
    (run / "checkpoints" / "latest").unlink()
    assert newest(run)[0] == 20
    assert checkpoint.latest_step(run) == 0


def test_a_run_without_checkpoints(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path) is None
    assert checkpoint.latest_step(tmp_path) == 0


def test_find(run: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert checkpoint.find(str(run)).step == 20
    assert checkpoint.find(str(of(run, 10))).step == 10
    for path in ("", str(run / "nowhere"), str(run / "checkpoints" / "latest")):
        with pytest.raises(ConfigError, match="give a run folder or one of its checkpoints"):
            checkpoint.find(path)
    fresh = tmp_path_factory.mktemp("fresh")
    with pytest.raises(CheckpointError, match="has no readable manifest"):
        checkpoint.find(str(fresh))
    (fresh / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="holds no checkpoint yet"):
        checkpoint.find(str(fresh))


def test_find_says_when_it_takes_an_older_one(run: Path) -> None:
    flip_a_byte(of(run, 20) / "state.json")
    warnings: list[str] = []
    assert checkpoint.find(str(run), warnings.append).step == 10
    assert len(warnings) == 1
    with pytest.raises(CheckpointError, match=r"state.json has changed since it was written"):
        checkpoint.find(str(of(run, 20)))


@pytest.mark.parametrize(
    ("here", "says"),
    [
        ((2, 2, "bf16"), r"was saved with world_size 1 \(here 2\)"),
        ((1, 3, "bf16"), r"was saved with zero_stage 2 \(here 3\)"),
        ((1, 2, "fp32"), r"was saved with precision bf16 \(here fp32\)"),
    ],
)
def test_a_run_of_another_shape(run: Path, here: tuple[int, int, str], says: str) -> None:
    found = checkpoint.find(str(run))
    checkpoint.check_fits(found, 1, 2, "bf16")
    with pytest.raises(CheckpointError, match=says):
        checkpoint.check_fits(found, *here)
