"""The copy of the code that a job runs: later edits do not touch it, and what it was is on record."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from vlscale import run_folder
from vlscale.cluster import snapshot
from vlscale.errors import ConfigError

FILES = {
    "vlscale/train.py": "one",
    "vlscale/größe.py": "a name that git quotes",
    "launchers/pretrain.py": "start",
    "ds_configs/zero2.json": "{}",
    "pyproject.toml": "",
    "runs/mine/log.txt": "no code",
    "README.md": "no code",
}
CODE = {name for name in FILES if name not in ("runs/mine/log.txt", "README.md")}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = tmp_path / "checkout"
    for name, text in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "vlscale" / "__pycache__").mkdir()
    (root / "vlscale" / "__pycache__" / "train.pyc").write_text("made by Python")
    return root


def git(folder: Path, *words: str) -> str:
    who = ("-c", "user.name=me", "-c", "user.email=me@localhost", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def repository(checkout: Path) -> Path:
    (checkout / ".gitignore").write_text("__pycache__\n*.log\n")
    git(checkout, "init", "--quiet")
    git(checkout, "add", ".")
    git(checkout, "commit", "--quiet", "-m", "first")
    return checkout


def held(code: Path) -> set[str]:
    return {str(path.relative_to(code)) for path in code.rglob("*") if path.is_file()} - {run_folder.SNAPSHOT}


@pytest.mark.parametrize("kind", ["checkout", "repository"])
def test_it_holds_the_code_and_no_later_edit(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    root: Path = request.getfixturevalue(kind)
    code = snapshot.take(root, tmp_path)
    assert held(code) == CODE
    (root / "vlscale" / "train.py").write_text("two")
    (root / "launchers" / "pretrain.py").unlink()
    assert (code / "vlscale" / "train.py").read_text() == "one"
    assert (code / "launchers" / "pretrain.py").read_text() == "start"
    assert snapshot.take(root, tmp_path) != code


def test_what_git_does_not_track_yet_is_in_it_and_what_it_ignores_is_not(repository: Path, tmp_path: Path) -> None:
    (repository / "vlscale" / "new.py").write_text("not added")
    (repository / "vlscale" / "debug.log").write_text("ignored")
    assert held(snapshot.take(repository, tmp_path)) == CODE | {"vlscale/new.py"}


def test_the_same_code_is_the_same_folder(repository: Path, tmp_path: Path) -> None:
    code = snapshot.take(repository, tmp_path)
    assert snapshot.folder_of(repository, tmp_path) == code
    before = (code / run_folder.SNAPSHOT).stat().st_mtime_ns
    (repository / "README.md").write_text("other words")
    assert snapshot.take(repository, tmp_path) == code
    assert (code / run_folder.SNAPSHOT).stat().st_mtime_ns == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []  # nothing half done


def test_a_copy_that_was_ended_is_made_again(checkout: Path, tmp_path: Path) -> None:
    code = snapshot.folder_of(checkout, tmp_path)
    partial = tmp_path / f".{code.name}.partial"
    (partial / "vlscale").mkdir(parents=True)
    (partial / "vlscale" / "of_another_time.py").touch()
    assert held(snapshot.take(checkout, tmp_path)) == CODE
    assert not partial.exists()


def test_commit_and_diff_are_those_of_a_run_that_starts_from_it(repository: Path, tmp_path: Path) -> None:
    (repository / "vlscale" / "train.py").write_text("edited before it was queued")
    code = snapshot.take(repository, tmp_path)
    (repository / "vlscale" / "train.py").write_text("edited afterwards")
    git(repository, "commit", "--quiet", "--all", "-m", "second")

    record = run_folder._commit(code)  # what environment.json gets
    assert record == json.loads((code / run_folder.SNAPSHOT).read_text())
    assert record["git_commit"] == git(repository, "rev-parse", "HEAD~1")
    assert "+edited before it was queued" in record["git_diff"]
    assert "afterwards" not in record["git_diff"]


def test_without_git_it_says_so(checkout: Path, tmp_path: Path) -> None:
    code = snapshot.take(checkout, tmp_path)
    assert json.loads((code / run_folder.SNAPSHOT).read_text()) == {"git_commit": None, "git_diff": None}


def test_where_nothing_can_be_written(checkout: Path) -> None:
    with pytest.raises(ConfigError, match="the code cannot be copied to /proc/self"):
        snapshot.take(checkout, Path("/proc/self"))


def test_a_file_that_the_command_line_names_is_kept_by_what_is_in_it(tmp_path: Path) -> None:
    given = tmp_path / "mine.json"
    given.write_text("{}")
    first = snapshot.keep(str(given), tmp_path / "home")
    assert snapshot.keep(str(given), tmp_path / "home") == first
    given.write_text("[]")
    assert snapshot.keep(str(given), tmp_path / "home") != first
    assert Path(first).read_text() == "{}"
    assert Path(first).name == "mine.json"
