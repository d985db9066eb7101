"""Runs that are broken and resumed end as if nothing had happened; and the harness would see it if they did not."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.faults import fault, setting, trial
from tests.faults.disk import Disk
from tests.faults.fault import Fault
from tests.runs import ROOT
from tests.states import unlike
from vlscale.saving import pieces
from vlscale.saving.pieces import Piece

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="orphans are adopted and files named as Linux does")
SEED = int(os.environ.get("VLSCALE_FAULTS_SEED", "0"))  # of the first trial: always the same ones, but where one asks


def run(*arguments: str, timeout: float = 900) -> str:
    """`python -m tests.faults`, which is to end well; what it said."""
    command = [sys.executable, "-m", "tests.faults", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_twenty_trials() -> None:
    said = run("--trials", "20", "--seed", str(SEED), "--jobs", "2")
    assert f"20 of 20 trials (seeds {SEED} to {SEED + 19})" in said
    assert "all bit-identical" in said


def test_a_trial() -> None:
    said = run("--only", "14", "--recipes", "uniter", "--zero", "1", "--ranks", "1", timeout=200)
    kills = re.search(r"(\d+) kills that hit", said)
    assert kills is not None, said
    assert int(kills[1]) >= 1, said


def test_a_seed_is_a_trial() -> None:
    asked = (list(setting.RECIPES), (0, 1, 2, 3), (1, 2))
    drawn = [trial.draw(seed, *asked) for seed in range(200)]
    assert drawn == [trial.draw(seed, *asked) for seed in range(200)]
    assert len({(each.setting.recipe, each.setting.ds[:5], each.setting.ranks) for each in drawn}) >= 32
    kinds = {each.kind for one in drawn for start in one.starts for each in start}
    assert kinds == {
        *("kill", "stop", "disk", "full", "read", "clock", "slow", "worker", "flip", "truncate", "latest"),
    }
    assert all(any(each.kind in ("kill", "stop") for each in one.starts[0]) for one in drawn)
    places = {each.where for one in drawn for start in one.starts for each in start if each.kind == "kill"}
    assert places == {"time", "file", *fault.PHASES}


def in_a_child(root: Path, *faults: Fault) -> int:
    """What a process with this disk ends with that writes and replaces a file of two lines."""
    counts = memoryview(bytearray(32)).cast("q")
    child = os.fork()
    if not child:
        try:
            Disk(root, counts, faults).install()
            (root / "checkpoints").mkdir()
            with (root / "checkpoints" / "half").open("w", buffering=1) as file:
                file.write("one\n")
                file.write("two\n")
                os.fsync(file.fileno())
            (root / "checkpoints" / "half").replace(root / "checkpoints" / "whole")
            (root / "checkpoints" / "whole").read_text()
        except OSError as error:
            os._exit(error.errno or 1)
        os._exit(0 if list(counts) == [6, 6, 1, 0] else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_operations_are_counted(tmp_path: Path) -> None:
    assert in_a_child(tmp_path) == 0
    assert (tmp_path / "checkpoints" / "whole").read_text() == "one\ntwo\n"


@pytest.mark.parametrize(
    ("number", "how", "left"),
    [
        *((2, "before", None), (2, "after", ""), (4, "torn", "one\ntw"), (4, "after", "one\ntwo\n")),
        *((4, "power", "one\n"), (5, "power", "one\ntwo\n")),
    ],
)
def test_a_kill_hits_the_operation(number: int, how: str, left: str | None, tmp_path: Path) -> None:
    assert in_a_child(tmp_path, Fault("kill", "file", how, 0, number)) == -9
    file = tmp_path / "checkpoints" / "half"
    assert (file.read_text() if file.exists() else None) == left


def test_errors_come_and_go(tmp_path: Path) -> None:
    assert in_a_child(tmp_path, Fault("disk", "", "ENOSPC", 0, 3)) == errno.ENOSPC
    assert in_a_child(tmp_path / "checkpoints", Fault("disk", "", "EROFS", 0, 7, 9)) == 0
    (tmp_path / "other").mkdir()
    assert in_a_child(tmp_path / "other", Fault("read", "", "EIO", 0, 1)) == errno.EIO


def test_a_bit_is_seen(tmp_path: Path) -> None:
    for name, value in (("one", 1.0), ("two", 1.0), ("three", 1.0000001)):
        (tmp_path / name).mkdir()
        with (tmp_path / name / "rank_00000.safetensors").open("wb") as file:
            pieces.write(file, [Piece("master/a", (2,), 0, torch.tensor([float("nan"), value]))])
        (tmp_path / name / "state.json").write_text(f'{{"step": {len(name)}}}')
    assert unlike(tmp_path / "one", tmp_path / "two") == []
    assert unlike(tmp_path / "three", tmp_path / "two") == [
        *("1 of 1 tensors differ, master/a", "state.json differs in step"),
    ]
