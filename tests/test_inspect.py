"""verify and describe: each fault that training would stumble over is found, counted and named."""

from __future__ import annotations

import json
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.shard_files import Members, png, sample, shared, write_samples, write_tar
from vlscale.data import inspect
from vlscale.data.arrays import read_arrays
from vlscale.data.detections import Detections, read_regions, write_regions
from vlscale.errors import DataError


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
        ([("s.png", png(1)), ("s.json", b"{")], "json"),
        ([("s.png", png(1)), ("s.json", b"[1]")], "json"),
        ([("s.png", png(1)), ("s.json", b'{"tags": "cat"}')], "json"),
        ([("s.png", png(1)), ("s.json", b'{"qa": [{"q": "what?"}]}')], "json"),
        ([("s.png", png(1)), ("s.json", b'{"width": "wide"}')], "json"),
        ([("s.png", png(1)), ("s.json", b'{"caption": " "}')], "caption"),
        ([("s.png", png(1)), ("s.json", b'{"caption": ["a", 2]}')], "caption"),
        ([("s.png", png(1)), ("s.txt", b"")], "caption"),
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


def test_describe_counts_what_is_there(tmp_path: Path) -> None:
    record = {"caption": ["one two three", "four"], "qa": [{"q": "what colour?", "a": "red"}], "tags": ["cat"]}
    special = {
        0: [("s000.png", png(0, 32)), ("s000.json", json.dumps(record).encode())],
        1: [*sample(1), ("s001.regions.npz", write_regions(found(3)))],
        2: [*sample(2), ("s002.regions.npz", write_regions(found(7)))],
    }
    figures = inspect.describe(write_samples(tmp_path, 5, 3, special))
    assert (figures["samples"], figures["shards"], figures["captions"]) == (5, 2, 6)
    assert figures["fields"] == {"png": 5, "json": 5, "regions.npz": 2}
    assert figures["caption_words"] == {"min": 1, "median": 5, "p95": 5, "max": 5}
    assert figures["picture_width"]["max"] == 32
    assert (figures["regions_per_sample"]["min"], figures["regions_per_sample"]["max"]) == (3, 7)
    assert (figures["feature_width"], figures["classes"]) == ({"8": 2}, 5)
    assert (figures["questions"], figures["commonest_answers"]) == (1, {"red": 1})
    assert figures["examples"][0]["tags"] == ["cat"]
    json.dumps(figures)


def test_real_shards_are_sound() -> None:
    folder = shared()
    for name, samples in (("open/coco_by/coco_by-val-*.tar", 13), ("research_only/butd_regions/*.tar", 8)):
        report = inspect.verify(str(folder / name))
        assert (report.samples, report.counts) == (samples, {})
