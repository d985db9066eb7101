"""verify: each fault that training would stumble over is found, counted and named."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.shard_files import Members, png, sample, shared, write_samples, write_tar
from vlscale.data.arrays import read_arrays
from vlscale.data.detections import Detections, read_regions, write_regions
from vlscale.data.looking import inspect
from vlscale.data.looking.cards import cards
from vlscale.data.looking.describe import describe
from vlscale.data.looking.page import page
from vlscale.data.making.checksums import read_sums
from vlscale.data.shards import Shards
from vlscale.errors import ConfigError, DataError


def found(regions: int = 3, width: int = 8, classes: int = 5) -> Detections:
    """Sound detections."""
    rng = np.random.default_rng(regions)
    features = rng.standard_normal((regions, width)).astype(np.float32)
    boxes = np.sort(rng.uniform(0, 40, (regions, 2, 2)).astype(np.float32), axis=1).reshape(regions, 4)
    probs = rng.dirichlet(np.ones(classes), regions).astype(np.float32)
    return Detections(features, boxes, 64, 48, probs.argmax(axis=1), probs.max(axis=1), probs)


def npz(**arrays: Any) -> bytes:
    out = BytesIO()
    np.savez(out, **arrays)
    return out.getvalue()


def with_regions(data: bytes) -> Members:
    return [("s000.regions.npz", data), ("s000.json", b'{"caption": "a red thing"}')]


def verified(folder: Path, members: Members, quick: bool = False) -> dict[str, int]:
    return inspect.verify(write_tar(folder / "part-000.tar", members), quick).counts


def test_regions_come_back_as_they_were_written() -> None:
    wrote = found()
    read = read_regions(write_regions(wrote, "float32"))
    for name, value in wrote._asdict().items():
        np.testing.assert_array_equal(getattr(read, name), value)
    assert read_arrays(write_regions(wrote))["features"].dtype == np.float16
    assert write_regions(wrote) == write_regions(wrote)


def test_features_that_half_precision_cannot_hold_are_refused() -> None:
    large = found()._replace(features=np.full((3, 8), 1e5, dtype=np.float32))
    with pytest.raises(ValueError, match="too large for float16; write them as float32"):
        write_regions(large)
    assert read_regions(write_regions(large, "float32")).features.max() == 1e5


def test_sound_shards_have_no_problem(tmp_path: Path) -> None:
    special = {n: [*sample(n), (f"s00{n}.regions.npz", write_regions(found(n)))] for n in (0, 1)}
    report = inspect.verify(write_samples(tmp_path, 6, 4, special))
    assert (report.shards, report.samples, report.members, report.counts) == (2, 6, 14, {})


FAULTY_REGIONS: dict[str, Callable[[Detections], Detections]] = {
    "a feature is not finite": lambda d: d._replace(features=d.features * np.float32("nan")),
    "a box is not finite": lambda d: d._replace(boxes=d.boxes + np.float32("inf")),
    "a box lies outside": lambda d: d._replace(boxes=d.boxes + 60),
    "a box is turned": lambda d: d._replace(boxes=d.boxes[:, ::-1]),
    "features of one dimension": lambda d: d._replace(features=d.features[0]),
    "boxes of five": lambda d: d._replace(boxes=np.zeros((3, 5), dtype=np.float32)),
    "fewer boxes than features": lambda d: d._replace(boxes=d.boxes[:2]),
    "fewer classes than features": lambda d: d._replace(classes=d.classes[:2]),
    "features of no width": lambda d: d._replace(features=d.features[:, :0]),
    "probabilities above one": lambda d: d._replace(class_probs=d.class_probs * 9),
    "confidence below zero": lambda d: d._replace(class_confidence=-d.class_confidence),
    "classes with a fraction": lambda d: d._replace(classes=d.classes + 0.5),
    "a picture of no pixels": lambda d: d._replace(width=0),
}


@pytest.mark.parametrize("spoil", FAULTY_REGIONS.values(), ids=FAULTY_REGIONS)
def test_faulty_regions_are_found(tmp_path: Path, spoil: Callable[[Detections], Detections]) -> None:
    arrays = {name: value for name, value in spoil(found())._asdict().items() if value is not None}
    assert verified(tmp_path, with_regions(npz(**arrays))) == {"regions": 1}


def test_faulty_members_are_found(tmp_path: Path) -> None:
    pickled = np.array([{"a": 1}], dtype=object)
    regions = write_regions(found())
    for members, kind in (
        ([("s.png", png(1)[:200])], "picture"),
        ([("s.jpg", b"no picture")], "picture"),
        ([("s.png", png(1)), ("s.1.png", b"")], "picture"),
        ([("s.gif", b"no clip")], "video"),
        ([("s.gif", b"GIF89a\x08\x00\x08\x00 cut short")], "video"),
        ([("s.gif", b"GIF89a" + b"\xff" * 20)], "video"),
        ([("s.mp4", b"no clip")], "video"),
        ([("s.png", png(1)), ("s.json", b'{"objects": [{"box": [1, 2, 3]}]}')], "json"),
        ([("s.png", png(1)), ("s.json", b'{"expressions": [{"box": [1, 2, 3, NaN]}]}')], "json"),
        ([("s.png", png(1)), ("s.json", b'{"objects": "cat"}')], "json"),
        ([("s.png", png(1)), ("s.json", b"{")], "json"),
        ([("s.png", png(1)), ("s.json", b"[1]")], "json"),
        ([("s.png", png(1)), ("s.json", b'{"tags": "cat"}')], "json"),
        ([("s.png", png(1)), ("s.json", b'{"qa": [{"q": "what?"}]}')], "json"),
        ([("s.png", png(1)), ("s.json", b'{"width": "wide"}')], "json"),
        ([("s.png", png(1)), ("s.json", b'{"caption": " "}')], "caption"),
        ([("s.png", png(1)), ("s.json", b'{"caption": ["a", 2]}')], "caption"),
        ([("s.png", png(1)), ("s.txt", b"")], "caption"),
        ([("s.png", png(1)), ("s.txt", b"\xff")], "txt"),
        ([("s.png", png(1)), ("s.json", b"{"), ("s.txt", b"a text")], "json"),
        ([("s.regions.npz", b"PK no zip")], "regions"),
        ([("s.regions.npz", regions[: len(regions) // 2])], "regions"),
        ([("s.regions.npz", npz(features=pickled, boxes=np.zeros((1, 4)), width=1, height=1))], "regions"),
        ([("s.regions.npz", npz(features=np.zeros((1, 4))))], "regions"),
        ([("s.frames.npz", npz(features=np.zeros((2, 4)), times=np.zeros(3)))], "frames"),
        ([("s.json", b'{"caption": "a text alone"}')], "no visual"),
    ):
        assert verified(tmp_path, members) == {kind: 1}, members[-1]


def test_the_size_may_stand_in_the_json(tmp_path: Path) -> None:
    arrays = npz(features=found().features, boxes=found().boxes)
    sized = json.dumps({"caption": "a", "width": 64, "height": 48}).encode()
    assert verified(tmp_path, [("s.regions.npz", arrays), ("s.json", sized)]) == {}
    assert verified(tmp_path, [("s.regions.npz", arrays)]) == {"regions": 1}


def test_one_bad_shard_does_not_hide_another(tmp_path: Path) -> None:
    write_samples(tmp_path, 4, 2, {3: sample(3, picture=b"broken")})
    (tmp_path / "part-000.tar").write_bytes(b"no tar at all")
    report = inspect.verify(str(tmp_path / "*.tar"))
    assert report.counts == {"shard": 1, "picture": 1}
    assert (report.problems[1].key, Path(report.problems[1].shard).name) == ("s003", "part-001.tar")
    with pytest.raises(DataError, match="no shard matches"):
        inspect.verify(str(tmp_path / "nothing-*.tar"))


def test_quick_reads_headers_only(tmp_path: Path) -> None:
    cut = [("s.png", png(1)[:200]), ("s.json", b'{"caption": "a"}')]
    assert verified(tmp_path, cut) == {"picture": 1}
    assert verified(tmp_path, cut, quick=True) == {}
    assert verified(tmp_path, [("s.png", b"no picture")], quick=True) == {"picture": 1}


def change(path: Path, old: bytes, new: bytes) -> None:
    """Other bytes in the same place, and no sign of it in the file's time of change."""
    before, data = path.stat(), path.read_bytes()
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, new))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_checksums_tell_what_nothing_else_does(tmp_path: Path) -> None:
    write_samples(tmp_path, 6, 2, {})
    shards = str(tmp_path / "*.tar")
    assert inspect.verify(shards).checksums == 0
    inspect.verify(shards, write_checksums=True)
    report = inspect.verify(shards)
    assert (report.checksums, report.counts) == (3, {})
    change(tmp_path / "part-001.tar", b"number 3", b"number 7")
    report = inspect.verify(shards)
    assert (report.checksums, report.counts) == (2, {"checksum": 1})
    assert Path(report.problems[0].shard).name == "part-001.tar"
    assert inspect.verify(shards, quick=True).counts == {}


def test_checksums_of_faulty_shards_are_not_written(tmp_path: Path) -> None:
    write_samples(tmp_path, 6, 2, {1: sample(1, picture=b"broken")})
    (tmp_path / "part-001.tar").write_bytes(b"no tar at all")
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  elsewhere.tar\n")
    inspect.verify(str(tmp_path / "*.tar"), write_checksums=True)
    assert list(read_sums(tmp_path)) == ["elsewhere.tar", "part-002.tar"]
    for options in ({"quick": True}, {"patterns": "https://example.org/a.tar"}):
        with pytest.raises(ConfigError, match="--write_checksums is for whole reads of local shards"):
            inspect.verify(**{"patterns": str(tmp_path / "*.tar"), "write_checksums": True, **options})  # type: ignore[arg-type]


def test_damaged_checksums_are_told(tmp_path: Path) -> None:
    write_samples(tmp_path, 2, 2, {})
    (tmp_path / "SHA256SUMS").write_text("part-000.tar 77\n")
    report = inspect.verify(str(tmp_path / "*.tar"))
    assert report.counts == {"shard": 1}
    assert "SHA256SUMS holds the line 'part-000.tar 77'" in report.problems[0].reason


def test_headers_are_scanned_whatever_index_there_is(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "part-000.tar", [member for n in range(4) for member in sample(n)])
    assert inspect.verify(path).counts == {}
    Shards(path)
    change(path, b"s002.png", b"s\xff02.png")
    report = inspect.verify(path)
    assert report.counts == {"shard": 1}
    damaged = re.search(r"damaged at byte (\d+)", report.problems[0].reason)
    assert damaged is not None
    assert path.read_bytes()[int(damaged[1]) :].startswith(b"s\xff02.png")


def test_keys_that_two_shards_have(tmp_path: Path) -> None:
    write_samples(tmp_path, 6, 2, {5: sample(0)})
    report = inspect.verify(str(tmp_path / "*.tar"))
    assert report.counts == {"key": 1}
    problem = report.problems[0]
    assert (Path(problem.shard).name, problem.key) == ("part-002.tar", "s000")
    assert problem.reason == f"its key is that of a sample of {tmp_path}/part-000.tar too"


def test_a_problem_tells_the_byte(tmp_path: Path) -> None:
    broken = [("s001.png", png(1)), ("s001.1.png", b"no picture"), ("s001.json", b'{"caption": ""}')]
    shards = write_samples(tmp_path, 4, 4, {1: broken})
    problems = inspect.verify(shards).problems
    data = (tmp_path / "part-000.tar").read_bytes()
    assert [problem.kind for problem in problems] == ["picture", "caption"]
    assert data[problems[0].byte :].startswith(b"no picture")
    assert data[problems[1].byte :].startswith(b'{"caption": ""}')


def test_members_that_are_too_large_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect, "MAX_MEMBER_BYTES", 100)
    report = inspect.verify(write_tar(tmp_path / "a.tar", [("s.png", png(1)), ("s.json", b'{"caption": "a"}')]))
    assert report.counts == {"picture": 1}
    assert report.problems[0].reason == f"png: it has {len(png(1))} bytes; at most 100 are read"


def test_real_shards_are_sound() -> None:
    folder = shared()
    for name, samples in (("open/coco_by/coco_by-val-*.tar", 13), ("research_only/butd_regions/*.tar", 8)):
        report = inspect.verify(str(folder / name))
        assert (report.samples, report.counts) == (samples, {})


FOREIGN = {"compressed.tar": 3, "mpdata.tar": 100, "sample.tgz": 90, "tendata.tar": 100, "testgz.tar": 1_000}


@pytest.mark.parametrize("name", FOREIGN)
def test_shards_that_others_made(name: str) -> None:
    path = shared() / "open" / "foreign_tars" / name
    report = inspect.verify(path, quick=True)
    assert report.samples == FOREIGN[name]
    assert set(report.counts) <= {"no visual"}
    assert describe(path, limit=20)["described"] == 20 if FOREIGN[name] > 20 else FOREIGN[name]


@pytest.mark.slow
def test_every_real_set_is_sound_and_described() -> None:
    """Against the counts that were taken when the sets were gathered."""
    folder = shared()
    for each in json.loads((folder / "index.json").read_text())["sets"]:
        parts = [part for part in each["splits"].values() if part["shards"]]
        shards = [folder / shard["file"] for part in parts for shard in part["shards"]]
        report = inspect.verify(shards, processes=2)
        samples = sum(part["samples"] for part in parts)
        assert (report.shards, report.samples, report.counts) == (len(shards), samples, {}), each["name"]
        figures = describe(shards, processes=2)
        assert (figures["samples"], figures["unreadable_members"]) == (samples, 0)
        assert figures["questions"] == sum(part["questions"] for part in parts)
        assert figures["captions"] + figures["statements"] == sum(part["captions"] for part in parts)
        assert len(page(each["name"], figures, cards(Shards(shards)))) < 5_000_000


@pytest.mark.slow
def test_several_processes_find_what_one_does(tmp_path: Path) -> None:
    special = {n: sample(n, picture=b"broken") for n in range(0, 1_000, 7)}
    shards = write_samples(tmp_path, 1_000, 90, {999: sample(3), 500: sample(1), **special})
    assert inspect.verify(shards, processes=3) == inspect.verify(shards)
    assert describe(shards, processes=3) == describe(shards)
