"""describe: figures that add up, and a page that anyone's captions can stand on."""

from __future__ import annotations

import json
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from tests.shard_files import Members, png, sample, shared, write_samples, write_tar
from tests.test_inspect import found, npz
from vlscale.data.detections import write_regions
from vlscale.data.looking.cards import cards
from vlscale.data.looking.describe import describe, histogram, spread
from vlscale.data.looking.page import page
from vlscale.data.shards import Shards
from vlscale.errors import ConfigError


def test_describe_counts_what_is_there(tmp_path: Path) -> None:
    record = {"caption": ["one two three", "four"], "qa": [{"q": "what colour?", "a": "red"}], "tags": ["cat"]}
    pair = {"sentence": "both are red", "label": True}
    special = {
        0: [("s000.png", png(0, 32)), ("s000.json", json.dumps(record).encode())],
        1: [*sample(1), ("s001.regions.npz", write_regions(found(3)))],
        2: [*sample(2), ("s002.regions.npz", write_regions(found(7)))],
        5: [("s005.0.png", png(5, 30)), ("s005.1.png", png(6, 20)), ("s005.json", json.dumps(pair).encode())],
    }
    figures = describe(write_samples(tmp_path, 6, 3, special))
    assert (figures["samples"], figures["described"], figures["shards"], figures["captions"]) == (6, 6, 2, 6)
    assert figures["bytes"] == sum(path.stat().st_size for path in tmp_path.glob("*.tar"))
    assert figures["fields"] == {"json": 6, "png": 5, "regions.npz": 2, "0.png": 1, "1.png": 1}
    assert figures["field_bytes"]["1.png"] == len(png(6, 20))
    assert figures["caption_words"] == {"min": 1, "median": 5, "p95": 5, "max": 5}
    assert (figures["picture_width"]["min"], figures["picture_width"]["max"]) == (20, 32)
    assert (figures["regions_per_sample"]["min"], figures["regions_per_sample"]["max"]) == (3, 7)
    assert (figures["feature_width"], figures["classes"]) == ({"8": 2}, 5)
    assert (figures["questions"], figures["commonest_answers"], figures["statements"]) == (1, {"red": 1}, 1)
    assert figures["examples"][0]["tags"] == ["cat"]
    for name, total in (("caption_words", 6), ("picture_short_side", 7), ("aspect_ratio", 7)):
        assert sum(each["count"] for each in figures["histograms"][name]) == total
    json.dumps(figures, allow_nan=False)


def test_some_samples_stand_for_all(tmp_path: Path) -> None:
    pattern = write_samples(tmp_path, 40, 7, {n: sample(n, caption="a " * n) for n in range(1, 40)})
    figures = describe(pattern, limit=10)
    assert (figures["samples"], figures["described"]) == (40, 10)
    assert figures["caption_words"] == pytest.approx({"min": 4, "median": 18, "p95": 34.2, "max": 36})  # 0 has 5 words
    assert describe(pattern, limit=99)["described"] == 40
    with pytest.raises(ConfigError, match="--limit is 0; write 1 or more"):
        describe(pattern, limit=0)


def test_spreads_are_those_of_numpy() -> None:
    rng = np.random.default_rng(0)
    for size in (1, 2, 3, 10, 1_000):
        values = rng.integers(0, 50, size).tolist()
        wanted = np.percentile(values, [0, 50, 95, 100])
        told = spread(Counter(values))
        assert told is not None
        np.testing.assert_allclose(list(told.values()), wanted)
    assert spread({}) is None


@pytest.mark.parametrize("values", [[5], [0, 1, 2], [3, 900], list(range(100)), [*range(1_000), 10**9]])
def test_bins_hold_every_value_once(values: list[int]) -> None:
    bins = histogram(Counter(values))
    assert len(bins) <= 25
    for each in bins:
        assert each["from"] is not None
        assert each["to"] is not None
        assert each["count"] == sum(each["from"] <= value <= each["to"] for value in values)
    assert sum(each["count"] or 0 for each in bins) == len(values)


# --- the page ----------------------------------------------------------------------------------------------


class Seen(HTMLParser):
    """Tags, attributes and texts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []  # tag, name, value
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def values(self, tag: str, name: str) -> list[str]:
        return [value for found, attribute, value in self.attributes if (found, attribute) == (tag, name)]


def page_of(members: Members, folder: Path) -> Seen:
    shards = Shards(write_tar(folder / "part-000.tar", members))
    return Seen(page("some shards", describe(shards), cards(shards)))


HOSTILE = (
    "<script>alert(1)</script>",
    "\"'><img src=x onerror=alert(1)>",
    "</li></svg></style><iframe src='https://example.org'>",
    "&lt;b&gt; &amp;",
    "<!-- comment",
    "javascript:alert(1)",
)


def test_nobodys_words_become_markup(tmp_path: Path) -> None:
    plain = Seen(page("t", describe(p := write_tar(tmp_path / "a.tar", sample(0))), cards(Shards(p))))
    members = []
    for n, text in enumerate(HOSTILE):
        box = {"label": text, "box": [1, 1, 20, 20]}
        record = {"caption": [text], "qa": [{"q": text, "a": text}], "tags": [text], "objects": [box]}
        members += [
            (f"<b>{n}\"'&.png", png(n)),
            (f"<b>{n}\"'&.<i>", b""),
            (f"<b>{n}\"'&.json", json.dumps(record).encode()),
        ]
    seen = page_of(members, tmp_path)
    assert set(seen.tags) <= set(plain.tags) | {"ul", "li", "b", "span", "rect", "text", "title"}
    assert not [name for _, name, _ in seen.attributes if name.startswith("on") or name in ("src", "srcset", "style")]
    assert all(value.startswith("data:image/jpeg;base64,") for value in seen.values("image", "href"))
    assert len(seen.values("image", "href")) == len(HOSTILE)
    assert not [value for tag, name, value in seen.attributes if name == "href" and tag != "image"]
    for text in HOSTILE:
        assert text in seen.texts  # as it is, for the eye
    assert "default-src 'none'" in seen.values("meta", "content")[1]


def test_letters_that_are_none_are_shown_as_such(tmp_path: Path) -> None:
    record = {"caption": "a", "tags": ["half \ud800 bell \x07 turn \u202e end", "שלום"]}
    seen = page_of([("s.png", png(1)), ("s.json", json.dumps(record).encode())], tmp_path)
    assert "half \ufffd bell \ufffd turn \ufffd end" in seen.texts
    assert "שלום" in seen.texts
    " ".join(seen.texts).encode()


def noise(side: int) -> bytes:
    pixels = np.random.default_rng(side).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return bytes(cv2.imencode(".jpg", pixels)[1].tobytes())


def test_a_page_is_not_too_large(tmp_path: Path) -> None:
    many = {
        "caption": ["word " * 2_000] * 50,
        "tags": ["tag" * 100] * 500,
        "objects": [{"label": "thing" * 50, "box": [0, 0, 9, 9]}] * 500,
        "qa": [{"q": "q" * 5_000, "a": "a" * 5_000}] * 50,
    }
    picture = noise(300)
    members = [
        member
        for n in range(50)
        for member in [(f"s{n}.0.jpg", picture), (f"s{n}.1.jpg", picture), (f"s{n}.json", json.dumps(many).encode())]
    ]
    shards = Shards(write_tar(tmp_path / "a.tar", members))
    text = page("t", describe(shards, limit=2), cards(shards))
    assert 500_000 < len(text.encode()) < 5_000_000
    assert text.count("<image ") == 96


def test_a_page_is_drawn_by_its_seed(tmp_path: Path) -> None:
    shards = Shards(write_samples(tmp_path, 30, 10, {}))
    first, again, other = (cards(shards, count=5, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert {card.key for card in first} != {card.key for card in other}
    assert [card.key for card in first] == sorted(card.key for card in first)
    assert len(cards(shards, count=99)) == 30


def test_boxes_lie_where_the_objects_are(tmp_path: Path) -> None:
    record = {"caption": "a", "objects": [{"label": "cat", "box": [100, 50, 300, 100]}], "width": 400, "height": 200}
    pixels = np.zeros((200, 400, 3), dtype=np.uint8)
    picture = bytes(cv2.imencode(".png", pixels)[1].tobytes())
    seen = page_of([("s.png", picture), ("s.json", json.dumps(record).encode())], tmp_path)
    assert "0 0 240 120" in seen.values("svg", "viewbox")
    box = {name: seen.values("rect", name)[-1] for name in ("x", "y", "width", "height")}
    assert box == {"x": "60.0", "y": "30.0", "width": "120.0", "height": "30.0"}
    assert "cat" in seen.texts


def test_all_kinds_of_samples_are_shown(tmp_path: Path) -> None:
    record = json.dumps({"caption": "a", "tags": ["dog", "cat", "cow"]}).encode()
    pair = b'{"sentence": "alike", "label": false}'
    clip = b"\0\0\0\x18ftypisom"
    for members, pictures, boxes, says in (
        ([("s.regions.npz", write_regions(found(3))), ("s.json", record)], 1, 3, "dog"),
        ([("s.png", png(1)), ("s.regions.npz", write_regions(found(3)))], 1, 3, "s"),
        ([("s.0.png", png(1)), ("s.1.png", png(2)), ("s.json", pair)], 2, 0, "alike (False)"),
        ([("s.mp4", clip), ("s.txt", b"a clip")], 0, 0, "mp4: it is damaged or cut short"),
        ([("s.png", b"broken"), ("s.txt", b"a")], 0, 0, "png: it is not a JPEG, PNG or WebP picture"),
        ([("s.regions.npz", npz(features=np.zeros((1, 2))))], 0, 0, "regions.npz"),
        ([("s.frames.npz", b"broken"), ("s.json", b"{")], 0, 0, "not valid JSON"),
        ([("s.json", b'{"hypotheses": [{"text": "it rains", "label": "neutral"}]}')], 0, 0, "it rains (neutral)"),
    ):  # fmt: skip
        seen = page_of(members, tmp_path)
        assert (seen.tags["image"], seen.values("rect", "class").count("box")) == (pictures, boxes), members
        assert any(says in text for text in seen.texts), members


def test_a_clip_is_shown_by_three_of_its_frames() -> None:
    shards = Shards(shared() / "research_only" / "easy_vqa_video" / "easy_vqa_video-test-000000.tar")
    drawn: list[Any] = cards(shards, count=3)
    assert [(card.pictures[0].width, card.pictures[0].height, card.notes) for card in drawn] == [(192, 64, ())] * 3
