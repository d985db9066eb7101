"""Checkpoints are whole or absent: whatever is done to the files, the run goes on from the last whole one."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models import albef_batch, albef_model
from vlscale.errors import CheckpointError, ConfigError
from vlscale.local_engine import LocalEngine
from vlscale.optim import OptimConfig
from vlscale.options import CheckpointConfig
from vlscale.saving import checkpoint
from vlscale.saving.background import Saver
from vlscale.saving.pieces import Piece
from vlscale.saving.targets import Folder
from vlscale.types import Moment

PIECES = "rank_00000.safetensors"


def engine(seed: int = 0) -> LocalEngine:
    return LocalEngine(albef_model(seed=seed), OptimConfig(), torch.device("cpu"))


def save(run: Path, machine: LocalEngine | Small, step: int, keep: int = 2, keep_every: int = 0) -> Path:
    """A checkpoint of the run in `run`; its folder."""
    options = CheckpointConfig(keep=keep, keep_every=keep_every, background=False)
    state: dict[str, Any] = {"step": step, "precision": "fp32", "engine": machine.scalars()}
    Saver(Folder(run / "checkpoints"), options).start(step, machine.pieces(), state)
    return of(run, step)


@pytest.fixture(scope="module")
def machine() -> LocalEngine:
    return engine()


@pytest.fixture
def run(tmp_path: Path, machine: LocalEngine) -> Path:
    """A run folder with the checkpoints of steps 10 and 20."""
    for step in (10, 20):
        save(tmp_path, machine, step)
    return tmp_path


def of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}"


def newest(run: Path) -> tuple[int, list[str]]:
    warnings: list[str] = []
    found = checkpoint.newest(Folder(run / "checkpoints"), warnings.append)
    return (found.step if found else 0), warnings


def test_the_manifest_lists_every_file(run: Path) -> None:
    folder = of(run, 20)
    listed = json.loads((folder / "manifest.json").read_text())["files"]
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    assert set(listed) == set(files) - {"manifest.json"}
    assert set(listed) == {"state.json", PIECES}
    for name, (size, digest) in listed.items():
        assert files[name].stat().st_size == size
        assert hashlib.sha256(files[name].read_bytes()).hexdigest() == digest
    assert all(files["manifest.json"].stat().st_mtime_ns >= path.stat().st_mtime_ns for path in files.values())


def test_latest_names_the_newest(run: Path) -> None:
    assert (run / "checkpoints" / "latest").read_text().strip() == "step_00000020"
    assert checkpoint.last_step(Folder(run / "checkpoints")) == 20
    assert newest(run) == (20, [])
    assert checkpoint.run_of(checkpoint.find(str(run))) == run


def test_the_newest_are_kept(run: Path, machine: LocalEngine) -> None:
    save(run, machine, 30)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        *("latest", "step_00000020", "step_00000030"),
    ]
    save(run, machine, 40, keep=1)
    assert [path.name for path in (run / "checkpoints").glob("step_*")] == ["step_00000040"]


def test_weights_are_whole_and_by_our_names(run: Path, machine: LocalEngine) -> None:
    weights = checkpoint.weights(checkpoint.find(str(run)))
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
    save(tmp_path, first, 3)
    expected = steps(first, range(4, 7))
    second = engine(seed=1)
    checkpoint.find(str(tmp_path)).restore(second)
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
@pytest.mark.parametrize("name", [PIECES, "state.json"])
def test_a_harmed_file_leads_to_the_one_before(run: Path, harm: Callable[[Path], None], name: str) -> None:
    harm(of(run, 20) / name)
    step, warnings = newest(run)
    assert step == 10
    assert len(warnings) == 1
    assert str(of(run, 20) / name) in warnings[0]
    assert "going back to step_00000010" in warnings[0]


@pytest.mark.parametrize("number", range(1, 5))
def test_a_disk_that_cannot_be_read(run: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever of its files is asked for: the manifest, each to be hashed, the state."""
    asked = []
    opened = Path.open

    def failing(path: Path, *rest: Any, **named: Any) -> Any:
        if path.parent == of(run, 20):
            asked.append(path.name)
            if len(asked) == number:
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return opened(path, *rest, **named)

    monkeypatch.setattr(Path, "open", failing)
    step, warnings = newest(run)
    assert (step, len(warnings)) == (10, 1)
    assert str(of(run, 20)) in warnings[0]


@pytest.mark.parametrize("number", range(1, 5))
@pytest.mark.parametrize("fault", [errno.ETIMEDOUT, errno.ESTALE, errno.EACCES])
def test_what_cannot_be_got_at_is_not_given_up(
    run: Path, number: int, fault: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next save of a run that went on from 10 would take the 20 away."""
    asked = []
    opened = Path.open

    def failing(path: Path, *rest: Any, **named: Any) -> Any:
        asked.append(path.parent == of(run, 20))
        if sum(asked) == number and asked[-1]:
            raise OSError(fault, os.strerror(fault), str(path))
        return opened(path, *rest, **named)

    monkeypatch.setattr(Path, "open", failing)
    with pytest.raises(CheckpointError, match=f"{os.strerror(fault)}.; no older one is taken") as caught:
        newest(run)
    assert str(of(run, 20)) in str(caught.value)
    assert newest(run) == (20, [])


def test_a_run_prunes_while_another_looks(run: Path, machine: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each that is opened is just being taken away, until the run rests."""
    opened, steps = checkpoint.open_checkpoint, iter((30, 40, 50))

    def opening(folder: Path) -> checkpoint.Checkpoint:
        if step := next(steps, 0):
            save(run, machine, step, keep=1)
        return opened(folder)

    monkeypatch.setattr(checkpoint, "open_checkpoint", opening)
    assert newest(run) == (50, [])


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
        flip_a_byte(of(run, step) / PIECES)
    with pytest.raises(
        CheckpointError, match=r"holds 2 checkpoint\(s\), and none is usable: .*rank_00000.safetensors"
    ) as caught:
        checkpoint.newest(Folder(run / "checkpoints"))
    assert caught.value.exit_code == 5


def test_a_broken_one_is_overtaken(run: Path, machine: LocalEngine) -> None:
    """Going on from 10, the save at 15 counts: it is neither pruned nor hidden behind the broken 20."""
    flip_a_byte(of(run, 20) / PIECES)
    save(run, machine, 15, keep=1)
    assert newest(run) == (15, [])
    assert (run / "checkpoints" / "latest").read_text().strip() == "step_00000015"


def test_what_a_kill_left_is_ignored_and_removed(run: Path, machine: LocalEngine) -> None:
    for step in (25, 30):
        partial = run / "checkpoints" / f".step_{step:08d}.partial"
        partial.mkdir()
        (partial / PIECES).write_bytes(b"half")
    assert newest(run) == (20, [])
    save(run, machine, 30)
    assert not list((run / "checkpoints").glob(".*"))
    assert newest(run) == (30, [])
    assert set(json.loads((of(run, 30) / "manifest.json").read_text())["files"]) == {
        *(PIECES, "state.json"),
    }


def test_a_kill_between_the_rename_and_latest(run: Path) -> None:
    (run / "checkpoints" / "latest").write_text("step_00000010\n")
    assert newest(run)[0] == 20
    (run / "checkpoints" / "latest").unlink()
    assert newest(run)[0] == 20


def test_what_a_run_does_not_go_on_from_is_given_up(run: Path) -> None:
    place, latest = Folder(run / "checkpoints"), run / "checkpoints" / "latest"
    checkpoint.begin_at(place, 30)  # of another run
    assert place.steps() == [10, 20]
    flip_a_byte(of(run, 20) / PIECES)
    checkpoint.begin_at(place, newest(run)[0])
    assert latest.read_text() == "step_00000010\n"
    assert place.steps() == [10]


def test_a_run_without_checkpoints(tmp_path: Path) -> None:
    assert checkpoint.newest(Folder(tmp_path)) is None
    assert checkpoint.last_step(Folder(tmp_path)) == 0


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


def test_those_of_every_nth_step_are_kept_for_ever(tmp_path: Path, machine: LocalEngine) -> None:
    for step in range(10, 80, 10):
        save(tmp_path, machine, step, keep=2, keep_every=30)
    kept = [int(path.name[-8:]) for path in sorted((tmp_path / "checkpoints").glob("step_*"))]
    assert kept == [30, 60, 70]


def test_the_newest_until_a_step(run: Path) -> None:
    place = Folder(run / "checkpoints")
    for until, step in ((25, 20), (20, 20), (19, 10)):
        found = checkpoint.newest(place, until=until)
        assert found is not None
        assert found.step == step
    assert checkpoint.newest(place, until=9) is None


def test_a_finished_run_is_known_without_reading_it(run: Path) -> None:
    place = Folder(run / "checkpoints")
    flip_a_byte(of(run, 20) / PIECES)
    assert checkpoint.last_step(place) == 20
    cut_short(of(run, 20) / PIECES)
    assert checkpoint.last_step(place) == 0


def test_nobody_else_may_write(tmp_path: Path, machine: LocalEngine) -> None:
    before = os.umask(0)
    try:
        save(tmp_path, machine, 10)
    finally:
        os.umask(before)
    made = [path for path in tmp_path.rglob("*") if not path.is_symlink()]
    assert len(made) == 6
    assert not [path for path in made if path.stat().st_mode & 0o002]


class Small:
    """An engine with next to nothing in it."""

    def pieces(self) -> list[Piece]:
        values = torch.arange(300.0)
        return [Piece("master/weight", (30, 10), 0, values), Piece("step/weight", (1,), 0, torch.tensor([3]))]

    def scalars(self) -> dict[str, Any]:
        return {"loss_scale": {}}


def test_whichever_byte_changes_is_noticed(tmp_path: Path) -> None:
    """300 places, each once with a flipped bit and once as the end of the file: every file, every part of it."""
    for step in (10, 20):
        save(tmp_path, Small(), step)
    files = sorted(of(tmp_path, 20).iterdir())
    contents = {path: path.read_bytes() for path in files}
    draw = random.Random(0)
    places = [(path, draw.randrange(len(contents[path]))) for path in files for _ in range(100)]
    assert len(places) == 300
    for path, place in places:
        whole = contents[path]
        flipped = bytes([whole[place] ^ (1 << draw.randrange(8))])
        for harmed in (whole[:place] + flipped + whole[place + 1 :], whole[:place]):
            path.write_bytes(harmed)
            step, warnings = newest(tmp_path)
            assert (step, len(warnings)) == (10, 1), (path.name, place)
            assert str(of(tmp_path, 20)) in warnings[0]
        path.write_bytes(whole)
    assert newest(tmp_path) == (20, [])
