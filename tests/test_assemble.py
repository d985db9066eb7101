from __future__ import annotations

import json
from collections import Counter
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.shard_files import Members, make_tokenizer, png, write_samples
from tests.test_regions import npz
from vlscale.data.answers import common_answers, normal_answer, read_answers
from vlscale.data.assemble import Assembler
from vlscale.data.collate import Sample, collate
from vlscale.data.micro_batches import MicroBatches, Preprocessing
from vlscale.data.order import Draws, TaskOrder
from vlscale.data.phrases import Texts
from vlscale.data.samples import BrokenSampleError, sentences, tags
from vlscale.data.shards import Shards
from vlscale.data.tags import join
from vlscale.data.text import Tokenizer
from vlscale.data.views import parse
from vlscale.errors import ConfigError
from vlscale.types import IGNORE, Inputs

COUNT, DRAWS = 6, 600
REGIONS = Inputs(0, 12, True, regions=4, feats=3, boxes=4, geometry="corners")
TAGGED = Inputs(0, 12, True, regions=4, feats=3, boxes=6, geometry="corners_size", tags=True)


def members(number: int, **more: Any) -> Members:
    """Sample `number` says its number in words, tags and features."""
    record = {"caption": f"a thing number {number}", "tags": ["green", str(number)], "width": 9, "height": 9, **more}
    boxes = np.array([[0, 0, 4, 4], [1, 1, 8, 8]])
    return [
        (f"s{number}.png", png(number)),
        (f"s{number}.json", json.dumps(record).encode()),
        (f"s{number}.regions.npz", npz(features=np.full((2, 3), number + 1.0), boxes=boxes)),
    ]


def shards_of(folder: Path, special: dict[int, Members] | None = None) -> Shards:
    made = {number: members(number) for number in range(COUNT)} | (special or {})
    return Shards(write_samples(folder / "shards", COUNT, COUNT, made), folder / "cache")


def assembler(shards: Shards, tokenizer: Tokenizer, inputs: Inputs, answers: Any = None) -> Assembler:
    return Assembler(shards, inputs, tokenizer, Texts(shards, tokenizer, 0, answers), frozenset({"targets"}))


def draw_all(shards: Shards, folder: Path, inputs: Inputs, views: dict[str, Any], **more: Any) -> list[Sample]:
    """Sample 2 at many positions."""
    make, draws = assembler(shards, make_tokenizer(folder, inputs), inputs, **more), Draws(5)
    parsed = parse(views, inputs)
    return [make(2, parsed, partial(draws, position)).sample for position in range(DRAWS)]


tokenizer_in = lru_cache(make_tokenizer)


def said(sample: Sample, folder: Path) -> str:
    return tokenizer_in(folder).decode(sample.text["clean"][0].tolist())


def shown(sample: Sample) -> int:
    """The number of the sample whose regions these are."""
    assert sample.regions is not None
    return int(sample.regions.feats[0, 0]) - 1


VIEWS: dict[str, Any] = {
    "text.clean": {},
    "text.masked": {"mask_tokens": {}},
    "visual.clean": {},
    "visual.masked": {"mask_regions": {"prob": 0.5}},
}


@pytest.mark.parametrize("replaced", ["text", "picture"])
def test_mismatched_pairs(replaced: str, tmp_path: Path) -> None:
    views = VIEWS | {"pairs.mismatch": {"prob": 0.4, "replace": replaced}}
    samples = draw_all(shards_of(tmp_path), tmp_path, REGIONS, views)
    others: Counter[int] = Counter()
    for sample in samples:
        words, picture = int(said(sample, tmp_path).split()[-1]), shown(sample)
        assert sample.number == 2
        if sample.matched:
            assert (words, picture) == (2, 2)
        else:
            other = words if replaced == "text" else picture
            assert other != 2
            assert {words, picture} == {2, other}
            others[other] += 1
        assert (sample.text["masked"][1] != IGNORE).any()  # type: ignore[operator]
    assert abs(1 - sum(others.values()) / DRAWS - 0.6) < 0.06
    assert set(others) == {0, 1, 3, 4, 5}


def test_blanked_labels_of_mismatched_pairs(tmp_path: Path) -> None:
    views = VIEWS | {"pairs.mismatch": {"prob": 0.5, "labels": "blanked"}}
    for sample in draw_all(shards_of(tmp_path), tmp_path, REGIONS, views):
        labels, regions = sample.text["masked"][1], sample.regions
        assert labels is not None
        assert regions is not None
        picked = regions.views["masked"][1]
        assert picked is not None
        assert bool((labels != IGNORE).any()) == sample.matched
        assert bool(picked.any()) == sample.matched


def test_swapped_tags_and_words(tmp_path: Path) -> None:
    views = VIEWS | {"pairs.swap_tags": {"tags": 0.25, "words": 0.25}}
    kinds: Counter[int] = Counter()
    for sample in draw_all(shards_of(tmp_path), tmp_path, TAGGED, views):
        words = said(sample, tmp_path).split()
        assert words[:3] == ["a", "thing", "number"]
        assert words[4] == "green"
        kind = {(True, True): 0, (True, False): 1, (False, True): 2}[words[3] == "2", words[5] == "2"]
        assert sample.tags_swapped == kind
        assert shown(sample) == 2
        assert sample.segments is not None
        assert sample.segments.tolist() == [0] * 6 + [1] * 3
        kinds[kind] += 1
    assert all(abs(kinds[kind] / DRAWS - share) < 0.06 for kind, share in enumerate((0.5, 0.25, 0.25)))


def test_foreign_words_in_the_place_of_tags(tmp_path: Path) -> None:
    views = VIEWS | {"pairs.swap_tags": {"tags": 1.0, "source": "either"}}
    behind = [said(sample, tmp_path).split()[4:] for sample in draw_all(shards_of(tmp_path), tmp_path, TAGGED, views)]
    sentence = [words[0] == "a" for words in behind]
    assert abs(np.mean(sentence) - 0.5) < 0.06
    assert all(words[-1] != "2" for words in behind)


def test_questions_stand_beside_captions(tmp_path: Path) -> None:
    asked = [{"q": "a red number", "a": "Two."}, {"q": "a blue number", "a": "the sky"}]
    shards = shards_of(tmp_path, {2: members(2, qa=asked)})
    views = VIEWS | {"pairs.answers": {}, "pairs.mismatch": {"prob": 0.3}}
    samples = draw_all(shards, tmp_path, REGIONS, views, answers={"2": 7})
    seen = Counter((said(sample, tmp_path), sample.answer) for sample in samples if sample.matched)
    assert set(seen) == {("a red number", 7), ("a blue number", IGNORE), ("a thing number 2", IGNORE)}
    assert min(seen.values()) > DRAWS * 0.7 / 3 * 0.7
    assert {sample.answer for sample in samples if not sample.matched} == {IGNORE}
    assert [each.text for each in sentences(shards, 2)] == ["a thing number 2"]
    silent = draw_all(shards, tmp_path, REGIONS, VIEWS, answers={"2": 7})  # of a task that asks nothing
    assert {(said(sample, tmp_path), sample.answer) for sample in silent} == {("a thing number 2", None)}


def test_a_region_of_another_picture(tmp_path: Path) -> None:
    views = VIEWS | {"visual.masked": {"mask_regions": {"prob": 1.0, "zero_share": 0.0, "random_share": 1.0}}}
    samples = draw_all(shards_of(tmp_path), tmp_path, REGIONS, views)
    foreign = {float(value) for s in samples if s.regions for value in s.regions.views["masked"][0][:, 0]}
    assert foreign == {1, 2, 4, 5, 6}


def test_a_batch(tmp_path: Path) -> None:
    views = VIEWS | {"pairs.swap_tags": {}, "pairs.mismatch": {}, "pairs.answers": {}}
    samples = draw_all(shards_of(tmp_path), tmp_path, TAGGED, views, answers={})[:5]
    batch = collate(samples, 0, "pairs", targets=True)
    assert batch.task == "pairs"
    assert batch.matched is not None
    assert batch.matched.tolist() == [sample.matched for sample in samples]
    assert batch.tags_swapped is not None
    assert batch.tags_swapped.tolist() == [sample.tags_swapped for sample in samples]
    assert batch.answers is not None
    assert batch.answers.tolist() == [IGNORE] * 5
    segments = batch.text["masked"].segments
    assert segments is not None
    assert segments.shape == batch.text["masked"].ids.shape
    assert batch.visual["masked"].feats.shape == (5, 2, 3)
    assert len(batch.first(2)) == len(batch.first(2).keys) == 2


def test_a_sample_without_regions_is_named(tmp_path: Path) -> None:
    shards = shards_of(tmp_path, {2: members(2)[:2]})
    make = assembler(shards, make_tokenizer(tmp_path, REGIONS), REGIONS)
    with pytest.raises(BrokenSampleError, match=r"sample 's2' .* has no 'regions.npz' but png, json"):
        make(2, parse({"visual.clean": {}}, REGIONS), partial(Draws(0), 0))


def test_a_broken_partner_costs_a_try_and_not_the_run(tmp_path: Path) -> None:
    count = 150  # more than may be broken in a row, so that walking on does not help
    special = {number: members(number) for number in range(count)} | {7: members(7)[:1]}
    shards = Shards(write_samples(tmp_path / "shards", count, count, special), tmp_path / "cache")
    views = {"all": parse({"text.clean": {}, "pairs.mismatch": {"prob": 1.0}}, REGIONS)}
    preprocessing = Preprocessing(views, TaskOrder({"all": 1.0}, 0), 0)
    make = MicroBatches(
        shards, make_tokenizer(tmp_path, REGIONS), REGIONS, preprocessing, lambda positions: positions % count
    )
    for start in range(0, 600, 50):
        made = make(np.arange(start, start + 50), "all")
        assert made.batch is not None, made.error
        assert len(made.batch) == 50
        assert {bad.key for bad in made.bad} <= {"s7"}


@pytest.mark.parametrize("held", [0, 4000, 1 << 20])  # bytes: of one picture, of three, of all
@pytest.mark.parametrize("side", [24, 16])  # of the model's pictures: as the shards', and smaller
def test_a_micro_batch_holds_each_samples_own_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: int, held: int
) -> None:
    """What is drawn in the batch's memory is what a sample alone has, though one was broken and the next took over."""
    monkeypatch.setattr("vlscale.data.micro_batches.HELD", held)
    inputs = Inputs(side, 12, True)
    shards = shards_of(tmp_path, {1: [("s1.png", png(1)[:40]), ("s1.json", b'{"caption": "a thing"}')]})
    crop = {"random_resized_crop": {}}
    changed = crop | {"color_jitter": {}, "flip": {"prob": 0.5}, "rand_augment": {}}
    views = parse({"visual.clean": {}, "visual.masked": crop, "visual.augmented": changed, "text.clean": {}})
    tokenizer = make_tokenizer(tmp_path, inputs)
    make = MicroBatches(
        shards, tokenizer, inputs, Preprocessing({"all": views}, TaskOrder({"all": 1.0}, 0), 3), lambda places: places
    )
    made = make(np.arange(COUNT), "all")
    assert made.batch is not None
    assert made.batch.keys == ("s0", "s2", "s2", "s3", "s4", "s5")
    alone = Assembler(shards, inputs, tokenizer, Texts(shards, tokenizer, 0, None), frozenset())
    for place, number in enumerate([0, 2, 2, 3, 4, 5]):
        draw = partial(Draws(3), place, attempt=int(place == 1))
        sample = alone.show(alone(number, views, draw), views, draw, {})
        assert list(sample.visual) == list(views.visual)
        for view, pixels in sample.visual.items():
            assert np.array_equal(made.batch.visual[view].feats[place].permute(1, 2, 0).numpy(), pixels)


def test_tags_of_objects(tmp_path: Path) -> None:
    special = {
        0: members(0, tags=None, objects=[{"name": "red"}, {"label": "blue", "box": [0, 0, 1, 1]}]),
        1: members(1, tags="a dog"),
        3: members(3, tags=None),
    }
    shards = shards_of(tmp_path, special)
    assert [tags(shards, i) for i in range(4)] == ["red blue", "a dog", "green 2", ""]


@pytest.mark.parametrize(
    ("words", "named", "kept"), [(2, 3, (2, 3)), (9, 2, (7, 2)), (2, 9, (2, 7)), (9, 9, (5, 4)), (5, 9, (5, 4))]
)
def test_the_longer_part_is_cut(words: int, named: int, kept: tuple[int, int]) -> None:
    made = join(np.array([1, *[7] * words, 2]), np.array([1, *[8] * named, 2]), 12)
    assert made.ids.tolist() == [1, *[7] * kept[0], 2, *[8] * kept[1], 2]
    assert made.segments.tolist() == [0] * (kept[0] + 2) + [1] * (kept[1] + 1)


def test_answers(tmp_path: Path) -> None:
    assert [normal_answer(each) for each in (" The Dog. ", "two", "a grey", "An", "none")] == [
        "dog",
        "2",
        "gray",
        "an",
        "0",
    ]
    assert common_answers(["yes", "no", "Yes.", "2", "two", "blue"], 3) == ["2", "yes", "blue"]
    (tmp_path / "all.json").write_text('[{"ans": "yes"}, {"ans": "two"}, {"ans": "2"}]')
    (tmp_path / "all.txt").write_text("yes\nno\n")
    assert read_answers(tmp_path / "all.json") == ["yes", "2"]
    assert read_answers(tmp_path / "all.txt") == ["yes", "no"]
    with pytest.raises(ConfigError, match=r"text.answers=.* cannot be read"):
        read_answers(tmp_path / "none.txt")


def test_tasks_come_by_their_shares() -> None:
    order = TaskOrder({"a": 1.0, "b": 3.0}, seed=4)
    drawn = [order(step) for step in range(1, 2001)]
    assert abs(drawn.count("b") / 2000 - 0.75) < 0.03
    assert drawn == [TaskOrder({"a": 1.0, "b": 3.0}, seed=4)(step) for step in range(1, 2001)]
    assert drawn != [TaskOrder({"a": 1.0, "b": 3.0}, seed=5)(step) for step in range(1, 2001)]
    assert {TaskOrder({"a": 2.0}, seed=0)(step) for step in range(1, 9)} == {"a"}
