"""`make` goes on where it was ended: whatever ends it, the shards become those of one run."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import simplejpeg

from launchers import shards as launcher
from tests.runs import ROOT, environment
from tests.shard_files import png
from tests.unlucky import Numbered
from vlscale.data.decode import decode, picture_size
from vlscale.data.looking import inspect
from vlscale.data.making.checksums import read_sums, sha256
from vlscale.data.making.manifest import Manifest
from vlscale.data.making.shrink import Shrink
from vlscale.data.making.write import Layout, Sample, make
from vlscale.data.shards import Shards
from vlscale.errors import DONE, ConfigError, DataError

SAMPLES = 10  # of `Numbered`, two of them broken


def layout(folder: Path, **options: Any) -> Layout:
    return Layout(folder, "data", **{"samples": 3, **options})


def shards_of(folder: Path) -> dict[str, bytes]:
    """What a user takes away: shards, checksums and the list of broken samples."""
    names = ("*.tar", "SHA256SUMS", "*.broken.jsonl")
    return {path.name: path.read_bytes() for name in names for path in sorted(folder.glob(name))}


def test_killed_at_any_step_and_run_again(tmp_path: Path) -> None:
    """Each fsync and each rename in turn is the last thing that the process does."""
    make(Numbered(SAMPLES), layout(tmp_path / "whole"))
    wanted = shards_of(tmp_path / "whole")
    assert list(wanted) == ["data-000000.tar", "data-000001.tar", "data-000002.tar", "SHA256SUMS", "data.broken.jsonl"]
    command = [sys.executable, "-m", "tests.unlucky", str(tmp_path / "killed"), str(SAMPLES)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    folders = sorted((tmp_path / "killed").iterdir())
    assert len(folders) > 12
    for folder in folders:
        assert shards_of(folder) == wanted, folder
        assert sorted(path.name for path in folder.iterdir()) == sorted([*wanted, "data.made.jsonl"]), folder


def test_what_was_finished_is_not_made_again(tmp_path: Path) -> None:
    make(Numbered(SAMPLES), layout(tmp_path))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.tar")}
    again = make(Numbered(SAMPLES), layout(tmp_path, processes=2))
    assert (again.samples, again.broken, again.before, len(again.shards)) == (8, 2, 8, 3)
    assert again.named == [("n3", "it is number 3"), ("n6", "it is number 6")]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.tar")} == before


def test_checksums_are_those_of_sha256sum(tmp_path: Path) -> None:
    for prefix in ("train", "val"):
        make(Numbered(4), Layout(tmp_path, prefix, samples=2))
    done = subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=tmp_path, check=False, timeout=20)
    assert done.returncode == 0
    assert len(read_sums(tmp_path)) == 4


def stopped(folder: Path, **options: Any) -> Path:
    """A folder whose `make` was ended after its first shard."""
    with pytest.raises(DataError, match="goes on after the 1 shard"):
        make(Numbered(SAMPLES, fails_at=5), layout(folder, **options))
    assert [path.name for path in folder.glob("*.tar")] == ["data-000000.tar"]
    return folder


MISTAKES: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "another size of shards": (
        lambda folder: make(Numbered(SAMPLES), layout(folder, samples=4)),
        ConfigError,
        r"holds data shards made with samples_per_shard 3, not 4; go on with that, write another --to",
    ),
    "another source": (
        lambda folder: make(Numbered(SAMPLES), layout(folder), origin={"source": ["elsewhere"]}),
        ConfigError,
        r'made with source null, not \["elsewhere"\]',
    ),
    "a source that holds something else by now": (
        lambda folder: make(Numbered(SAMPLES, name="m"), layout(folder)),
        DataError,
        "the source no longer holds what the data shards in .* were made of",
    ),
    "a shard that is gone": (
        lambda folder: [(folder / "data-000000.tar").unlink(), make(Numbered(SAMPLES), layout(folder))],
        DataError,
        r"data-000000.tar is gone; remove .*data\.made\.jsonl",
    ),
    "a shard that shrank": (
        lambda folder: [os.truncate(folder / "data-000000.tar", 512), make(Numbered(SAMPLES), layout(folder))],
        DataError,
        "data-000000.tar has 512 bytes instead of 10240",
    ),
    "a shard that somebody put there": (
        lambda folder: [(folder / "data-000007.tar").touch(), make(Numbered(SAMPLES), layout(folder))],
        ConfigError,
        "data-000007.tar is not one of these",
    ),
    "a source with more, once all is done": (
        lambda folder: [make(Numbered(SAMPLES), layout(folder)), make(Numbered(SAMPLES + 1), layout(folder))],
        DataError,
        "the source no longer holds what the data shards in .* were made of",
    ),
    "a damaged list": (
        lambda folder: [
            make(Numbered(SAMPLES), layout(folder)),
            (folder / "data.broken.jsonl").write_text("x\n"),
            make(Numbered(SAMPLES), layout(folder)),
        ],
        DataError,
        "data.broken.jsonl is damaged",
    ),
    "a damaged record": (
        lambda folder: [(folder / "data.made.jsonl").write_text("{}\nno json\n"), make(Numbered(1), layout(folder))],
        DataError,
        "data.made.jsonl is damaged",
    ),
    "shards without a record": (
        lambda folder: [(folder / "data.made.jsonl").unlink(), make(Numbered(SAMPLES), layout(folder))],
        ConfigError,
        "data-000000.tar is there already; write another --to or --prefix",
    ),
}


@pytest.mark.parametrize(("mistake", "kind", "says"), MISTAKES.values(), ids=MISTAKES)
def test_going_on_with_something_else_is_refused(
    tmp_path: Path, mistake: Callable[[Path], Any], kind: type[Exception], says: str
) -> None:
    folder = stopped(tmp_path)
    with pytest.raises(kind, match=says):
        mistake(folder)


def test_captions_that_changed_meanwhile_are_refused(tmp_path: Path) -> None:
    source = write_pictures(tmp_path / "in", 12)
    captions = tmp_path / "c.json"
    captions.write_text(json.dumps({f"p{n:04d}": "first" for n in range(12)}))
    argv = command(source, tmp_path / "out", "--captions", captions)[2:]
    assert launcher.main(argv) == DONE
    assert launcher.main(argv) == DONE
    captions.write_text(json.dumps({f"p{n:04d}": "other" for n in range(12)}))
    with pytest.raises(ConfigError, match=r"made with .*c\.json \"\d+ bytes of 20.*\", not \"\d+ bytes of 20"):
        launcher.main(argv)


def test_a_folder_that_changed_meanwhile_is_refused(tmp_path: Path) -> None:
    source = write_pictures(tmp_path / "in", 3)
    argv = ["make", "--from", "folder", "--source", str(source), "--to", str(source / "out")]
    assert launcher.main(argv) == DONE
    assert launcher.main(argv) == DONE  # what it has written itself is no change
    (source / "p0001.txt").write_text("another text")
    with pytest.raises(ConfigError, match=r'made with .*/in "6 files of .*", not "6 files of'):
        launcher.main(argv)


def test_names_that_are_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / os.fsdecode(b"in \xff")
    source = write_pictures(folder, 2)
    (folder / os.fsdecode(b"\xfe.png")).write_bytes(b"no picture")
    (folder / os.fsdecode(b"\xfe.txt")).write_text("a")
    for before in (0, 2):
        assert launcher.main(command(source, tmp_path / "out")[2:]) == DONE
        said = capsys.readouterr().out
        assert "1 broken and left out" in said
        assert ("2 of them were there already" in said) == bool(before)


def test_only_one_process_writes(tmp_path: Path) -> None:
    stopped(tmp_path)
    with Manifest(tmp_path, "data", layout(tmp_path).options()):
        with pytest.raises(ConfigError, match=r"another process is writing data-\*.tar"):
            make(Numbered(SAMPLES), layout(tmp_path))
        assert make(Numbered(2), Layout(tmp_path, "other")).samples == 2


def write_pictures(folder: Path, count: int, side: int = 24) -> Path:
    folder.mkdir()
    for n in range(count):
        (folder / f"p{n:04d}.png").write_bytes(png(n, side))
        (folder / f"p{n:04d}.txt").write_text(f"picture number {n}")
    return folder


def command(source: Path, to: Path, *options: object) -> list[str]:
    given = ["make", "--from", "folder", "--source", source, "--to", to, "--samples_per_shard", 5, *options]
    return [sys.executable, "launchers/shards.py", *map(str, given)]


def end_when(to: Path, shards: int, number: signal.Signals, argv: list[str]) -> tuple[int, str]:
    """Run a command, and send it a signal once there are so many shards; its code and what it said."""
    with subprocess.Popen(
        argv, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        end = time.monotonic() + 60
        while process.poll() is None and len(list(to.glob("*.tar"))) < shards and time.monotonic() < end:
            time.sleep(0.002)
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.send_signal(number)
        _, said = process.communicate(timeout=30)
        assert psutil.wait_procs(children, timeout=10)[1] == []  # they end with the one that started them
    return process.returncode, said


def test_the_command_killed_and_run_again(tmp_path: Path) -> None:
    source = write_pictures(tmp_path / "in", 60)
    code, _ = end_when(tmp_path / "a", 2, signal.SIGKILL, command(source, tmp_path / "a", "--processes", 2))
    assert code == -signal.SIGKILL
    assert 2 <= len(list((tmp_path / "a").glob("*.tar"))) < 12
    for folder in ("a", "b"):
        assert launcher.main(command(source, tmp_path / folder, "--processes", 1)[2:]) == DONE
    assert shards_of(tmp_path / "a") == shards_of(tmp_path / "b")
    assert len(shards_of(tmp_path / "b")) == 13


@pytest.mark.slow
def test_the_command_killed_again_and_again(tmp_path: Path) -> None:
    source = write_pictures(tmp_path / "in", 400)
    rng = np.random.default_rng(0)
    for n in range(12):
        argv = command(source, tmp_path / "a", "--processes", 1 + n % 3)
        end_when(tmp_path / "a", int(rng.integers(0, 7)) + 5 * n, signal.SIGKILL, argv)
    code, said = end_when(tmp_path / "a", 70, signal.SIGTERM, command(source, tmp_path / "a", "--processes", 2))
    assert (code, said) == (75, "\nstopped; the same command goes on after the shards that are whole\n")
    for folder in ("a", "b"):
        assert launcher.main(command(source, tmp_path / folder)[2:]) == DONE
    assert shards_of(tmp_path / "a") == shards_of(tmp_path / "b")


def test_a_full_disk_is_said_and_then_gone_on_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_pictures(tmp_path / "in", 8)
    (source / "p0006.png").write_bytes(png(6, 200))

    def small_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    argv = command(source, tmp_path / "out")
    full = subprocess.run(
        argv, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False, preexec_fn=small_disk
    )
    assert full.returncode == 3
    assert len(full.stderr.splitlines()) == 1
    assert "File too large" in full.stderr
    assert "run it again, it goes on after the 1 shard(s) that are whole" in full.stderr
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")] == []
    assert launcher.main(argv[2:]) == DONE
    assert "5 of them were there already" in capsys.readouterr().out
    assert inspect.verify(str(tmp_path / "out" / "*.tar")).counts == {}


def test_large_pictures_are_made_smaller() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    jpeg, small = simplejpeg.encode_jpeg(pixels), png(1, 16)
    record = {
        "width": 60,
        "height": 40,
        "objects": [{"label": "cat", "box": [6, 4, 60, 40]}, {"boxes": [[0, 0, 3, 2], [3, 2, 6, 4]]}],
    }
    shrunk = Shrink(20)(
        Sample(dict(record), ("jpeg", jpeg), more=(("1.png", png(2)), ("2.png", small), ("mp4", b"clip")))
    )
    assert shrunk.picture is not None
    assert (shrunk.picture[0], picture_size(shrunk.picture[1])) == ("jpg", (30, 20))
    assert [(field, len(data)) for field, data in shrunk.more[1:]] == [("2.png", len(small)), ("mp4", 4)]
    assert (shrunk.more[0][0], decode(shrunk.more[0][1]).shape) == ("1.jpg", (20, 20, 3))
    assert shrunk.record == {
        "width": 30,
        "height": 20,
        "objects": [{"label": "cat", "box": [3, 2, 30, 20]}, {"boxes": [[0, 0, 1.5, 1], [1.5, 1, 3, 2]]}],
    }
    assert record["objects"] == [{"label": "cat", "box": [6, 4, 60, 40]}, {"boxes": [[0, 0, 3, 2], [3, 2, 6, 4]]}]
    elsewhere = {"width": 1000, "height": 1000, "box": [0, 0, 500, 500]}  # of a detector that told no size
    assert Shrink(20)(Sample(dict(elsewhere), ("jpeg", jpeg))).record == elsewhere


def test_shrunk_shards_by_the_command(tmp_path: Path) -> None:
    source = write_pictures(tmp_path / "in", 3, side=64)
    argv = command(source, tmp_path / "out", "--resize", 32, "--quality", 80)
    assert launcher.main(argv[2:]) == DONE
    shards = Shards(str(tmp_path / "out" / "*.tar"))
    raw = shards.read(0)
    assert (list(raw), picture_size(raw["jpg"])) == (["jpg", "json"], (32, 32))
    assert json.loads(raw["json"]) == {"caption": "picture number 0", "width": 32, "height": 32}
    assert sha256(tmp_path / "out" / "data-000000.tar") == read_sums(tmp_path / "out")["data-000000.tar"]


@pytest.mark.parametrize("wrong", [{"resize": 0}, {"resize": 9, "quality": 0}, {"processes": 0}])
def test_layouts_that_cannot_be(tmp_path: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"--(resize|quality|processes) is 0; write"):
        layout(tmp_path, **wrong)
