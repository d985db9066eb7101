"""Where a run goes on from, and that no two runs write to the same places."""

from __future__ import annotations

import multiprocessing
import os
import time
import uuid
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.test_background import save
from vlscale import config, run_folder
from vlscale.errors import CheckpointError, ConfigError
from vlscale.options import CheckpointConfig
from vlscale.saving import begin
from vlscale.saving.background import Saver
from vlscale.saving.remote import Remote
from vlscale.saving.targets import Folder


def tree(*overrides: str) -> dict[str, Any]:
    return config.dump(config.load("quickstart", overrides))


def run_of(folder: Path, *steps: int) -> Path:
    """A run folder with checkpoints of these steps."""
    run_folder.write(folder, tree(), {}, ["here"])
    saver = Saver(Folder(folder / "checkpoints"), CheckpointConfig(background=False, keep=9))
    for step in steps:
        save(saver, step)
    return folder


def found(out: Path | None, resume: str, to: str | None = None) -> tuple[int, list[str]]:
    """The step that a run goes on after, and what it warns of."""
    warnings: list[str] = []
    checkpoint = begin.find(out, to, tree(), resume, warnings.append)
    return (checkpoint.step if checkpoint else 0), warnings


def test_a_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    assert found(tmp_path / "new", "auto") == (0, [])
    assert found(None, "auto") == (0, [])
    assert found(run_of(tmp_path / "a", 10, 20), "auto") == (20, [])


def test_the_same_command_with_a_checkpoint_to_start_from_goes_on_with_what_it_did(tmp_path: Path) -> None:
    """As a scheduler gives it again: all that it had made since would else be made again, and pruned."""
    old, new = run_of(tmp_path / "old", 10, 20), tmp_path / "new"
    assert found(new, str(old)) == (20, [])
    assert found(new, str(old / "checkpoints" / "step_00000010")) == (10, [])
    assert found(run_of(new), str(old)) == (20, [])  # stopped before its first save
    run_of(new, 21, 25)
    for resume in (str(old), str(old / "checkpoints" / "step_00000010")):
        step, warnings = found(new, resume)
        assert step == 25
        assert warnings == [
            f"{new}/checkpoints holds this run at step 25: it goes on from there, not from --resume {resume} again"
        ]
    assert "finished at step 25" in begin.finished(new, None, tree(), str(old), steps=24)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    old = run_of(tmp_path / "old", 10)
    with pytest.raises(CheckpointError, match=r"holds another model: family.hidden \(\d+ there, 64 here\) differ"):
        begin.find(tmp_path / "new", None, tree("family.hidden=64"), str(old), print)


@pytest.fixture
def url() -> str:
    """A store that holds this run, at step 51000."""
    to = f"memory://{uuid.uuid4().hex}/run"
    Remote(to).keep("config.yaml", yaml.safe_dump(tree(f"checkpoint.to={to}")))
    save(Saver(Remote(to), CheckpointConfig(background=False)), 51000)
    return to


def test_a_store_has_one_run(url: str, tmp_path: Path) -> None:
    """Another one would take what is there for its own, and its first save would prune it."""
    mine, out = f"checkpoint.to={url}", tmp_path / "b"
    for other, what in (("optim.lr=0.5", "optim.lr"), ("objectives.itc.queue=8", "objectives.itc.queue")):
        with pytest.raises(ConfigError, match=f"^{mine} holds another run: {what} .* differ; write another URL$"):
            begin.check(out, url, tree(mine, other), "auto")
    for place, resume in ((None, "auto"), (out, "never")):
        with pytest.raises(ConfigError, match=f"^{mine} holds a run already; write another URL"):
            begin.check(place, url, tree(mine), resume)
    assert Remote(url).steps() == [51000]


def test_a_run_goes_on_in_its_store_from_another_machine(url: str, tmp_path: Path) -> None:
    assert begin.check(tmp_path / "b", url, tree(f"checkpoint.to={url}"), "auto") == ""
    assert found(tmp_path / "b", "auto", url) == (51000, [])
    step, warnings = found(tmp_path / "b", str(run_of(tmp_path / "old", 10)), url)
    assert (step, len(warnings)) == (51000, 1)


def test_checkpoints_of_an_unknown_run(tmp_path: Path) -> None:
    to = f"memory://{uuid.uuid4().hex}"
    assert begin.check(None, to, tree(f"checkpoint.to={to}"), "auto") == ""  # nothing is there yet
    save(Saver(Remote(to), CheckpointConfig(background=False)), 10)
    with pytest.raises(ConfigError, match=r"holds another run: there is no config.yaml beside it"):
        begin.check(tmp_path / "b", to, tree(f"checkpoint.to={to}"), "auto")


def hold(out: Path, held: Event) -> None:
    run_folder.hold(out)
    run_folder.hold(out)  # again, as a run does
    held.set()
    time.sleep(60)


def test_a_folder_has_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "PATIENCE", 0.1)
    out = run_of(tmp_path / "a", 10)
    fork = multiprocessing.get_context("fork")
    (out / run_folder.LOCK).unlink()  # this process has it, too
    held = fork.Event()
    other = fork.Process(target=hold, args=(out, held))
    other.start()
    assert held.wait(60)
    for start in (lambda: run_of(out), lambda: begin.finished(out, None, tree(), "auto", steps=20)):
        with pytest.raises(ConfigError, match=f"^--out {out} is written by process {other.pid} on .*; stop that one"):
            start()
    assert begin.finished(out, None, tree(), "auto", steps=9)  # nothing will be written
    os.kill(other.pid or 0, 9)
    other.join()
    run_of(out)  # the lock has ended with it
