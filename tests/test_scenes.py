from __future__ import annotations

import re
import threading
from pathlib import Path

import numpy as np
import pytest

from vlscale.data import scenes
from vlscale.data.samples import captions, picture
from vlscale.data.scenes import Embedded, Group, ensure
from vlscale.data.shards import Shards
from vlscale.errors import ConfigError

PHRASE = r"(a small|a large|two|three) (\w+) (\w+?)(?:e?s)?"
CAPTION = re.compile(rf"{PHRASE} (left of|right of|above|below) {PHRASE}")


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Embedded:
    return ensure(tmp_path_factory.mktemp("scenes"))


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
    said = [[captions(shards, i)[0] for i in range(len(shards))] for shards in (train, val)]
    meant = [meaning(caption) for split in said for caption in split]
    assert len(set(meant)) == 16_384 + 512
    assert len({train.key(0), val.key(0)}) == 2


def test_the_record_tells_what_is_drawn(embedded: Embedded, tmp_path: Path) -> None:
    import json

    shards = Shards(embedded.val, tmp_path)
    for i in range(0, 512, 16):
        pixels = picture(shards, i).astype(int)
        assert pixels.shape == (64, 64, 3)
        record = json.loads(shards.read(i)["json"])
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
    for number, scene in enumerate(scenes.scenes(train=False)):
        first, second = ([t.box for t in scene.things if t.group == g] for g in (scene.first, scene.second))
        assert max(box[2 + scene.axis] for box in first) < min(box[scene.axis] for box in second), scene.caption
        assert (len(first), len(second)) == (scene.first.count, scene.second.count)
        if number == 100:
            break


def test_phrases() -> None:
    assert Group(shape=0, colour=0, size=1, count=1).phrase == "a large red circle"
    assert Group(shape=4, colour=2, size=0, count=3).phrase == "three blue crosses"
    assert len(scenes.descriptions()) == 38_080


def test_the_shards_are_byte_identical(embedded: Embedded, tmp_path: Path) -> None:
    scenes._write(scenes.scenes(train=False), tmp_path, "val")
    assert (tmp_path / embedded.val[0].name).read_bytes() == embedded.val[0].read_bytes()
    assert len(embedded.train) == 4


def test_several_processes_may_start_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenes, "NUM_TRAIN", 32)
    monkeypatch.setattr(scenes, "NUM_VAL", 8)
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
