"""Visual words: the tree by hand, k-means over shards that may end anywhere, and shards with each frame's word."""

from __future__ import annotations

import importlib.util
import io
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.shard_files import reference_folder, write_tar
from vlscale.data.making import codebook as making
from vlscale.data.making import words
from vlscale.data.making.codebook import Growth, grow
from vlscale.data.shards import Shards
from vlscale.data.visual_words import Codebook, read_codebook, write_codebook
from vlscale.errors import DONE, STOPPED, ConfigError, DataError

pytest.importorskip("sklearn")
GROWTH = Growth(branches=3, levels=2, rows=300, seed=5)
LAUNCHER = Path(__file__).parents[1] / "launchers" / "visual_words.py"


def frames(features: Any) -> bytes:
    out = io.BytesIO()
    np.savez(out, features=np.asarray(features, dtype=np.float16), times=np.arange(len(features)) / 2)
    return out.getvalue()


def write_shards(folder: Path, broken: bool = True, samples: int = 20, width: int = 8) -> Shards:
    """Two shards of clips with features around 12 places; one sample of them cannot be read."""
    rng = np.random.default_rng(0)
    places = 4 * rng.normal(size=(12, width))
    folder.mkdir(exist_ok=True)
    for part in range(2):
        members = []
        for i in range(samples):
            count = int(rng.integers(1, 30))
            features = places[rng.integers(12, size=count)] + rng.normal(size=(count, width))
            data = b"nothing" if broken and (part, i) == (1, 3) else frames(features)
            members += [(f"{part}_{i:03d}.json", b'{"caption": "a"}'), (f"{part}_{i:03d}.frames.npz", data)]
        write_tar(folder / f"x-{part}.tar", members)
    return Shards([folder / f"x-{part}.tar" for part in range(2)])


@pytest.fixture
def shards(tmp_path: Path) -> Shards:
    return write_shards(tmp_path / "shards")


def features_of(shards: Shards, i: int) -> np.ndarray:
    return np.load(io.BytesIO(shards.read(i)["frames.npz"]))["features"]


def tree(branches: int = 3, depth: int = 2, width: int = 4) -> Codebook:
    rng = np.random.default_rng(1)
    levels = tuple(rng.normal(size=(branches**n, branches, width)).astype(np.float32) for n in range(depth))
    return Codebook(levels, tuple(np.ones(level.shape[:2], dtype=np.int64) for level in levels))


def test_assignment_walks_the_tree() -> None:
    """The nearest child at each level, whatever leaf would be nearest of all; first level's digit first."""
    codebook = tree()
    rows = np.random.default_rng(2).normal(size=(50, 4))
    found = codebook(rows)
    squares = np.zeros(2)
    for row, code in zip(rows, found.codes, strict=True):
        node = 0
        for level, centroids in enumerate(codebook.levels):
            distances = ((centroids[node].astype(float) - row) ** 2).sum(axis=1)
            squares[level] += distances.min()
            node = node * 3 + int(distances.argmin())
        assert code == node
    np.testing.assert_allclose(found.squares, squares)
    nearest = ((rows[:, None] - codebook.leaves) ** 2).sum(axis=2).argmin(axis=1)
    assert (nearest != found.codes).any()
    with pytest.raises(ValueError, match=r"\[50, 3\]; the codebook's are \[T, 4\]"):
        codebook(rows[:, :3])


def test_assignment_agrees_with_the_reference() -> None:
    stored = reference_folder("videobert")
    inputs, outputs = load_file(stored / "batch.safetensors"), load_file(stored / "outputs.safetensors")
    levels = tuple(inputs[f"centroids/level{number}"] for number in range(3))
    assert np.array_equal(Codebook(levels, ())(inputs["features"]).codes, outputs["visual_tokens"])


def test_a_codebook_is_read_as_it_was_written(tmp_path: Path) -> None:
    path, codebook = tmp_path / "words.safetensors", tree()
    write_codebook(codebook, path)
    found = read_codebook(path)
    assert (found.branches, found.width, found.words) == (3, 4, 9)
    assert all(np.array_equal(*pair) for pair in zip(found.levels, codebook.levels, strict=True))
    assert [each.name for each in tmp_path.iterdir()] == ["words.safetensors"]
    for broken in ({"leaves": np.zeros((3, 3, 4), np.float32)}, {"leaves": np.zeros((2, 3, 4), np.float32)}):
        save_file(broken | {"counts/leaves": np.zeros((3, 3), np.int64)}, path)
        with pytest.raises(DataError, match="is no codebook"):
            read_codebook(path)
    with pytest.raises(DataError, match=r"visual_words\.py grow"):
        read_codebook(tmp_path / "none")


def test_grown_by_k_means(shards: Shards, tmp_path: Path) -> None:
    """Each centroid is the mean of what comes to it, further down they are nearer, and nothing is left out."""
    path = tmp_path / "words.safetensors"
    grown = grow(shards, path, Growth(branches=3, levels=3, rows=10**6))
    readable = [i for i in range(len(shards)) if shards.key(i) != "1_003"]
    rows = np.concatenate([features_of(shards, i).reshape(-1, 8) for i in readable]).astype(np.float64)
    assert (grown.frames, grown.rows, grown.words) == (len(rows), len(rows), 27)
    assert grown.named == (("1_003", "it is no npz"),)
    assert grown.broken == 1
    assert grown.inertia[0] > grown.inertia[1] > grown.inertia[2]
    codebook = read_codebook(path)
    codes = codebook(rows).codes
    counts = np.bincount(codes, minlength=27)
    assert np.array_equal(codebook.counts[-1].ravel(), counts)
    assert np.array_equal(codebook.counts[0].ravel(), np.bincount(codes // 9, minlength=3))
    assert grown.leaves == (counts > 0).sum()
    means = np.stack([rows[codes // 9 == branch].mean(axis=0) for branch in range(3)])
    np.testing.assert_allclose(codebook.levels[0][0], means, rtol=1e-3, atol=1e-3)
    assert not list(tmp_path.glob("*.work"))


def test_few_and_equal_frames_keep_the_whole_vocabulary(tmp_path: Path) -> None:
    rows = np.repeat(np.eye(4), 3, axis=0)[:10]
    write_tar(tmp_path / "a.tar", [("a.frames.npz", frames(rows))])
    grown = grow(Shards(tmp_path / "a.tar"), tmp_path / "words.safetensors", Growth(branches=3, levels=3))
    codebook = read_codebook(tmp_path / "words.safetensors")
    assert (grown.words, grown.leaves) == (27, 4)
    assert np.isfinite(codebook.leaves).all()
    codes = codebook(rows).codes
    assert [len(set(codes[np.flatnonzero(rows[:, n])])) for n in range(4)] == [1] * 4
    assert np.array_equal(codebook.leaves[codes], rows.astype(np.float32))


class Killed(BaseException):
    """What nothing catches."""


def steps_of(monkeypatch: pytest.MonkeyPatch, end: int, cut: bool) -> Callable[[], int]:
    """Ends the work before (or in the middle of) the `end`-th thing that it notes; tells how many there were."""
    seen = [0]

    def noting(write: Callable[..., None]) -> Callable[..., None]:
        def wrapped(*arguments: Any) -> None:
            seen[0] += 1
            if seen[0] == end:
                if cut and write is append:
                    arguments[0].write(b'{"cut": ')
                    arguments[0].flush()
                raise Killed
            write(*arguments)

        return wrapped

    append = making._append
    for name in ("_append", "_save_array"):
        monkeypatch.setattr(making, name, noting(getattr(making, name)))
    return lambda: seen[0]


def test_ended_anywhere_it_goes_on_to_the_same_codebook(
    shards: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tmp_path / "whole.safetensors"
    monkeypatch.setattr(making, "NODES", 2)
    with monkeypatch.context() as patched:
        count = steps_of(patched, 0, False)
        grow(shards, whole, GROWTH)
    assert count() == 2 + 2 + 1 + 2  # shards counted and drawn, nodes of two levels in pairs
    for end in range(1, count() + 1):
        path = tmp_path / f"{end}.safetensors"
        with monkeypatch.context() as patched:
            steps_of(patched, end, bool(end % 2))
            with pytest.raises(Killed):
                grow(shards, path, GROWTH)
        assert not path.exists()
        grow(shards, path, GROWTH)
        assert path.read_bytes() == whole.read_bytes(), end


def test_what_an_end_leaves_is_taken_up(shards: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No frame is read twice for what is done; other options, and another process, are refused."""
    path = tmp_path / "words.safetensors"
    with monkeypatch.context() as patched:
        steps_of(patched, 5, False)
        with pytest.raises(Killed):
            grow(shards, path, GROWTH)
    with pytest.raises(ConfigError, match=r"was begun with seed 5, not 6; go on with that"):
        grow(shards, path, Growth(branches=3, levels=2, rows=300, seed=6))
    monkeypatch.setattr(Shards, "read", lambda *_: pytest.fail("it read the shards again"))
    grow(shards, path, GROWTH)
    with pytest.raises(ConfigError, match=r"is there already"):
        grow(shards, path, GROWTH)


def test_mistakes_of_options_and_data(shards: Shards, tmp_path: Path) -> None:
    for wrong in ({"branches": 1}, {"levels": 0}, {"rows": 2}, {"branches": 100}):
        with pytest.raises(ConfigError, match=r"--\w+"):
            Growth(**wrong)
    write_tar(tmp_path / "a.tar", [("a.json", b"{}"), ("b.frames.npz", frames(np.full((3, 2), np.inf)))])
    with pytest.raises(DataError, match=r"hold 0 frames, too few .* 'a': it has no 'frames\.npz' but json"):
        grow(Shards(tmp_path / "a.tar"), tmp_path / "words.safetensors", GROWTH)
    write_tar(tmp_path / "b.tar", [("a.frames.npz", frames(np.eye(4))), ("b.frames.npz", frames(np.eye(3)))])
    grown = grow(Shards(tmp_path / "b.tar"), tmp_path / "b.safetensors", Growth(branches=2, levels=1))
    assert grown.named == (("b", "its frames have 3 numbers, others 4"),)
    several = io.BytesIO()
    np.savez(several, features=np.eye(4), times=np.arange(4), features_2=np.eye(4), times_2=np.arange(4))
    broken = [("b.frames.npz", frames(np.eye(4, dtype=int)[:0])), ("c.frames.npz", several.getvalue())]
    write_tar(tmp_path / "c.tar", [("a.frames.npz", frames(np.eye(4))), *broken])
    grown = grow(Shards(tmp_path / "c.tar"), tmp_path / "c.safetensors", Growth(branches=2, levels=1))
    assert [reason[:30] for _, reason in grown.named] == [
        "'features' has 0 rows; from 1 ",
        "it has features of 2 rates; vi",
    ]


def test_shards_with_words(shards: Shards, tmp_path: Path) -> None:
    codebook = tree(width=8)
    written, spread = words.add_words(shards, tmp_path / "new", codebook)
    assert (written.samples, written.broken) == (39, 1)
    assert written.named == [("1_003", "it is no npz")]
    new = Shards(written.shards)
    old = {shards.key(i): shards.read(i) for i in range(len(shards))}
    used, frames_seen = set(), 0
    for i in range(len(new)):
        found = new.read(i)
        with np.load(io.BytesIO(found.pop("visual_words.npz"))) as arrays:
            features = np.load(io.BytesIO(found["frames.npz"]))
            assert np.array_equal(arrays["codes"], codebook(features["features"]).codes)
            assert np.array_equal(arrays["times"], features["times"])
            used |= set(arrays["codes"].tolist())
            frames_seen += len(arrays["codes"])
        assert found == old[new.key(i)]
    assert (spread.frames, spread.used) == (frames_seen, len(used))
    assert sorted(each.name for each in (tmp_path / "new").iterdir()) == ["SHA256SUMS", "x-0.tar", "x-1.tar"]


def test_copies_go_on_after_those_that_are_whole(
    shards: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codebook, folder = tree(width=8), tmp_path / "new"
    words.add_words(shards, tmp_path / "whole", codebook)
    read = Shards.read
    with monkeypatch.context() as patched:
        patched.setattr(Shards, "read", lambda self, i, *rest: read(self, i, *rest) if i != 30 else pytest.fail("end"))
        with pytest.raises(pytest.fail.Exception):
            words.add_words(shards, folder, codebook)
    assert [each.name for each in folder.glob("*.tar")] == ["x-0.tar"]
    with pytest.raises(ConfigError, match=r"x-0\.tar is there already"):
        words.add_words(shards, folder, Codebook(tuple(2 * level for level in codebook.levels), codebook.counts))
    before = (folder / "x-0.tar").stat().st_mtime_ns
    written, _ = words.add_words(shards, folder, codebook)
    assert (folder / "x-0.tar").stat().st_mtime_ns == before
    assert written.samples == 39
    for each in (tmp_path / "whole").iterdir():
        assert (folder / each.name).read_bytes() == each.read_bytes()
    with pytest.raises(ConfigError, match=r"is there already"):
        words.add_words(shards, folder, codebook)
    with pytest.raises(DataError, match="no sample could be written"):
        words.add_words(shards, tmp_path / "none", tree(width=3))
    assert not (tmp_path / "none").exists()


def launcher() -> ModuleType:
    spec = importlib.util.spec_from_file_location("visual_words_launcher", LAUNCHER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_launcher(shards: Shards, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pattern, path = str(tmp_path / "shards" / "*.tar"), tmp_path / "words.safetensors"
    options = ["--branches", "3", "--levels", "2", "--processes", "1", "--json", str(tmp_path / "told.json")]
    assert launcher().main(["grow", pattern, "--to", str(path), *options]) == DONE
    told, figures = capsys.readouterr().out, json.loads((tmp_path / "told.json").read_text())
    assert "9 visual words of" in told
    assert "1_003: it is no npz" in told
    assert figures["words"] == 9
    assert launcher().main(["assign", pattern, "--codebook", str(path), "--to", str(tmp_path / "new")]) == DONE
    assert "39 samples in 2 shard(s)" in capsys.readouterr().out
    again = ["grow", pattern, "--to", str(tmp_path / "again"), "--branches", "3", "--levels", "2"]
    for wrong in (["plant"], ["grow", pattern, "--to", str(path)], [], [*again, "data.seed=1"], [*again, "data.pip=1"]):
        with pytest.raises(ConfigError):
            launcher().main(wrong)
    with pytest.raises(ConfigError, match="it is a folder"):
        launcher().main([*again, "--json", str(tmp_path)])
    assert launcher().main([*again, "data.store_timeout=9"]) == DONE


@pytest.mark.slow
def test_killed_in_the_work_and_in_several_processes(tmp_path: Path) -> None:
    """By TERM, which is told (75), and by KILL; two processes make the codebook of one."""
    shards = write_shards(tmp_path / "shards", samples=150, width=64)
    growth = Growth(branches=6, levels=3, rows=3000)
    grow(shards, tmp_path / "whole.safetensors", growth)
    path = tmp_path / "words.safetensors"
    options = ["--branches", "6", "--levels", "3", "--rows", "3000", "--processes", "2"]
    command = [sys.executable, str(LAUNCHER), "grow", str(tmp_path / "shards" / "*.tar"), "--to", str(path), *options]
    work = path.with_name(f"{path.name}.work")
    for number, waits, code in (
        (signal.SIGTERM, lambda: (work / "origin.json").exists(), STOPPED),
        (signal.SIGKILL, lambda: (work / "level0.npy").exists(), -signal.SIGKILL),
    ):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until = time.monotonic() + 60
        while not waits() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        process.send_signal(number)
        assert process.wait(60) in (code, DONE)
    if not path.exists():
        assert subprocess.run(command, capture_output=True, timeout=120).returncode == DONE
    assert path.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
