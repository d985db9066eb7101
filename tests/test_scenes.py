from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import Counter
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from vlscale.data.samples import picture
from vlscale.data.scenes import drawing
from vlscale.data.scenes import embedded as scenes
from vlscale.data.scenes import regions as scene_regions
from vlscale.data.scenes.drawing import COLOURS, SHAPES, SIZES, Group
from vlscale.data.scenes.embedded import Embedded, ensure, samples
from vlscale.data.scenes.questions import NUMBERS
from vlscale.data.shards import Shards
from vlscale.errors import ConfigError

PHRASE = r"(a small|a large|two|three) (\w+) (\w+?)(?:e?s)?"
CAPTION = re.compile(rf"{PHRASE} (left of|right of|above|below) {PHRASE}")


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Embedded:
    return ensure(tmp_path_factory.mktemp("scenes"))


def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "NUM_TRAIN", 32)
    monkeypatch.setattr(drawing, "NUM_VAL", 8)


def meaning(caption: str) -> tuple[object, ...]:
    """What a caption says, whichever of its two directions it takes."""
    found = CAPTION.fullmatch(caption)
    assert found, caption
    first, relation, second = found.groups()[:3], found.group(4), found.groups()[4:]
    if relation in ("right of", "below"):
        first, second = second, first
    return first, "beside" if relation.endswith("of") else "over", second


def test_splits_share_no_scene_and_no_caption_fits_two(embedded: Embedded, tmp_path: Path) -> None:
    train, val = Shards(embedded.train, tmp_path), Shards(embedded.val, tmp_path)
    assert (len(train), len(val)) == (16_384, 512)
    said = [
        [json.loads(shards.read(i, ("json",))["json"])["caption"] for i in range(len(shards))]
        for shards in (train, val)
    ]
    meant = [meaning(caption) for split in said for caption in split]
    assert len(set(meant)) == 16_384 + 512
    assert len({train.key(0), val.key(0)}) == 2


def test_the_record_tells_what_is_drawn(embedded: Embedded, tmp_path: Path) -> None:
    shards = Shards(embedded.val, tmp_path)
    for i in range(0, 512, 16):
        pixels = picture(shards, i).astype(int)
        assert pixels.shape == (64, 64, 3)
        record = json.loads(shards.read(i)["json"])
        assert record["tags"] == [thing["name"] for thing in record["objects"]]
        ground = np.median(pixels.reshape(-1, 3), axis=0)
        assert ground.min() >= 225
        drawn = (np.abs(pixels - ground).max(axis=2) > 60).copy()
        for thing in record["objects"]:
            x1, y1, x2, y2 = thing["box"]
            assert 0 <= x1 < x2 < 64
            assert 0 <= y1 < y2 < 64
            colour, shape = thing["name"].split()
            assert colour in record["caption"]
            assert shape in record["caption"]
            painted = drawn[y1 : y2 + 1, x1 : x2 + 1].mean()
            assert 0.25 < painted <= 1
        for thing in record["objects"]:
            x1, y1, x2, y2 = thing["box"]
            drawn[max(0, y1 - 1) : y2 + 2, max(0, x1 - 1) : x2 + 2] = False
        assert not drawn.any()


def test_the_relation_holds_for_all_things() -> None:
    for number, scene in enumerate(drawing.scenes(train=False)):
        first, second = ([t.box for t in scene.things if t.group == g] for g in (scene.first, scene.second))
        assert max(box[2 + scene.axis] for box in first) < min(box[scene.axis] for box in second), scene.caption
        assert (len(first), len(second)) == (scene.first.count, scene.second.count)
        if number == 100:
            break


def test_phrases() -> None:
    assert Group(shape=0, colour=0, size=1, count=1).phrase == "a large red circle"
    assert Group(shape=4, colour=2, size=0, count=3).phrase == "three blue crosses"
    assert len(drawing.descriptions()) == 38_080


DRAWN = {  # SHA-256 of the first 64 captions and pictures of scenes-1, which later numbers keep
    False: "c643fdfa7b8f645630e1e208205ea61d8463e36ef313695022ff0a72c8124a9f",
    True: "2c832618a14ebd942376a9e000931a3b71e2f6bbd71e2e765b57bd38925fdc1a",
}


@pytest.mark.parametrize("train", [False, True])
def test_pictures_and_captions_are_those_of_scenes_1(train: bool) -> None:
    digest = hashlib.sha256()
    for scene in islice(drawing.scenes(train), 64):
        digest.update(scene.caption.encode())
        digest.update(scene.draw().tobytes())
    assert digest.hexdigest() == DRAWN[train]


SINGULAR = {"circles": "circle", "squares": "square", "triangles": "triangle", "stars": "star", "crosses": "cross"}
NO_KIND = {"a", "an", "one", "ones", "two", "three", "shapes"}


def named(objects: list[dict[str, Any]], words: str) -> list[dict[str, Any]]:
    """The objects that a noun phrase such as `red stars` fits."""
    wanted = {SINGULAR.get(word, word) for word in words.split()} - NO_KIND
    return [thing for thing in objects if wanted <= set(thing["name"].split())]


def holds(objects: list[dict[str, Any]], question: str, answer: str) -> bool:
    """Whether an answer is right, worked out from nothing but the objects' names and boxes."""
    if found := re.fullmatch(r"is there an? (\w+ \w+)\?", question):
        return answer == ("yes" if named(objects, found[1]) else "no")
    if found := re.fullmatch(r"how many (.+) are there\?", question):
        return answer == NUMBERS[len(named(objects, found[1]))]
    if found := re.fullmatch(r"what (color|shape) (is|are) the (.+)\?", question):
        asked = named(objects, found[3])
        place = ("color", "shape").index(found[1])
        return {thing["name"].split()[place] for thing in asked} == {answer} and (len(asked) > 1) == (found[2] == "are")
    found = re.fullmatch(r"what is (left of|right of|above|below) the (.+)\?", question)
    assert found, question
    asked, others = named(objects, found[2]), named(objects, answer)
    near, far = (others, asked) if found[1] in ("left of", "above") else (asked, others)
    axis = 0 if found[1].endswith("of") else 1
    count = NUMBERS.index(answer.split()[0]) if answer.split()[0] in NUMBERS else 1
    apart = max(thing["box"][2 + axis] for thing in near) < min(thing["box"][axis] for thing in far)
    return apart and len(others) == count and len(asked) + len(others) == len(objects)


def test_answers_are_right_and_yes_is_as_common_as_no() -> None:
    answers: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    for sample in samples(train=False, regions=False):
        record = json.loads(sample["json"])
        assert 3 <= len(record["qa"]) <= 4
        for pair in record["qa"]:
            assert holds(record["objects"], pair["q"], pair["a"]), (record["caption"], pair)
            answers[pair["a"]] += 1
            kinds[" ".join(pair["q"].split()[:2])] += 1
    assert answers["yes"] + answers["no"] == 512
    assert 205 < answers["yes"] < 307  # 4.5 standard deviations of a fair coin
    assert {"what color", "what shape", "how many", "what is", "is there"} == set(kinds)
    assert "an orange circle" in answers or "an orange star" in answers
    assert not any("a orange" in answer for answer in answers)


def regions_of(sample: dict[str, bytes]) -> dict[str, NDArray[Any]]:
    with np.load(BytesIO(sample["regions.npz"]), allow_pickle=False) as saved:
        return dict(saved)


Detected = list[tuple[dict[str, Any], dict[str, NDArray[Any]]]]


@pytest.fixture(scope="module")
def detected() -> Detected:
    """(json, regions) of every validation sample."""
    return [(json.loads(sample["json"]), regions_of(sample)) for sample in samples(train=False, regions=True)]


def test_regions_have_the_stated_types_and_ranges(detected: Detected) -> None:
    stated = {
        "features": ("float16", (scene_regions.FEATURES,)),
        "boxes": ("float32", (4,)),
        "classes": ("int64", ()),
        "class_confidence": ("float32", ()),
        "class_probs": ("float16", (scene_regions.NUM_CLASSES,)),
        "attributes": ("int64", ()),
        "attribute_confidence": ("float32", ()),
    }
    numbers = set()
    for _, regions in detected:
        r = len(regions["boxes"])
        numbers.add(r)
        assert {name: (str(array.dtype), array.shape) for name, array in regions.items() if array.ndim} == {
            name: (dtype, (r, *rest)) for name, (dtype, rest) in stated.items()
        }
        assert (int(regions["width"]), int(regions["height"])) == (64, 64)
        assert all(np.isfinite(array).all() for array in regions.values())
        assert regions["boxes"].min() >= 0
        assert regions["boxes"].max() <= 64
        assert (regions["boxes"][:, 2:] - regions["boxes"][:, :2] > 4).all()
        assert (np.diff(regions["class_confidence"]) <= 0).all()
        assert (regions["class_probs"].argmax(axis=1) == regions["classes"]).all()
        np.testing.assert_allclose(regions["class_probs"].astype(float).sum(axis=1), 1, atol=2e-3)
        np.testing.assert_allclose(regions["class_probs"].max(axis=1), regions["class_confidence"], atol=1e-3)
    assert numbers == set(range(4, scene_regions.MOST_REGIONS + 1))


def overlap(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Intersection over union."""
    both = (np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])).clip(0).prod()
    return float(both / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - both))


def test_regions_agree_with_the_scene(detected: Detected) -> None:
    names = ["background", *(f"{colour} {shape}" for shape, _ in SHAPES for colour, _ in COLOURS)]
    offsets = []
    for record, regions in detected:
        for box, class_, size in zip(regions["boxes"], regions["classes"], regions["attributes"], strict=True):
            nearest = max(record["objects"], key=lambda thing: overlap(box, np.array(thing["box"])))
            found = overlap(box, np.array(nearest["box"]))
            if class_:
                assert found > 0.5
                assert nearest["name"] == names[class_]
                assert 2 * SIZES[size][1] == nearest["box"][2] - nearest["box"][0]
                offsets.append(np.abs(box - nearest["box"]).max())
            else:
                assert found < 0.2
                assert size == scene_regions.NUM_ATTRIBUTES - 1
        assert (regions["classes"] > 0).sum() == len(record["objects"])
        assert names[regions["classes"][0]] in record["tags"]
    assert max(offsets) < 2
    assert float(np.mean(offsets)) > 0.5  # boxes are not copied


def test_features_tell_kinds_and_sizes_apart(detected: Detected) -> None:
    features, classes, sizes = (
        np.concatenate([regions[name] for _, regions in detected]) for name in ("features", "classes", "attributes")
    )
    known, asked = features[:2000].astype(float), features[2000:].astype(float)
    nearest = ((known**2).sum(axis=1) - 2 * asked @ known.T).argmin(axis=1)
    assert (classes[nearest] == classes[2000:]).mean() > 0.9
    assert (sizes[nearest] == sizes[2000:]).mean() > 0.95
    assert len(np.unique(features, axis=0)) == len(features)


def test_shards_with_regions_hold_the_same_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few(monkeypatch)
    plain, rich = ensure(tmp_path), ensure(tmp_path, regions=True)
    assert {path.name for path in tmp_path.iterdir()} == {scenes.FOLDER, f"{scenes.FOLDER}-regions"}
    for ours, theirs, number in ((plain.train, rich.train, 32), (plain.val, rich.val, 8)):
        a, b = Shards(ours, tmp_path / "a"), Shards(theirs, tmp_path / "b")
        assert len(a) == len(b) == number
        for i in range(number):
            fields = b.read(i)
            assert a.key(i) == b.key(i)
            assert regions_of(fields).keys() >= {"features", "boxes"}
            assert a.read(i) == {name: data for name, data in fields.items() if name != "regions.npz"}
    again = ensure(tmp_path / "again", regions=True)
    assert again.val[0].read_bytes() == rich.val[0].read_bytes()
    assert again.train[0].read_bytes() == rich.train[0].read_bytes()


def test_the_shards_are_byte_identical(embedded: Embedded, tmp_path: Path) -> None:
    scenes._write(samples(train=False, regions=False), tmp_path, "val")
    assert (tmp_path / embedded.val[0].name).read_bytes() == embedded.val[0].read_bytes()
    assert len(embedded.train) == 4


def test_several_processes_may_start_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few(monkeypatch)
    made: list[Embedded] = []
    threads = [threading.Thread(target=lambda: made.append(ensure(tmp_path))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [made[0]] * 4
    assert [path.name for path in tmp_path.iterdir()] == [scenes.FOLDER]
    assert len(Shards(made[0].train, tmp_path / "cache")) == 32


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ConfigError, match=r"cannot be written to .*; set VLSCALE_CACHE"):
        ensure(tmp_path / "file")
