"""Clips from shards to batches: which rows they have, what is masked, and which samples cannot be used."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from io import BytesIO
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.clip_files import clip, counting, number
from tests.shard_files import Members, make_tokenizer, write_samples
from vlscale import preflight
from vlscale.data.clip_files import check_footage
from vlscale.data.frames import Frames, FrameView, MaskFrames, RandomCrop
from vlscale.data.micro_batches import Loaded, MicroBatches, Preprocessing
from vlscale.data.order import TaskOrder
from vlscale.data.samples import BrokenSampleError, timed_sentences
from vlscale.data.shards import Shards
from vlscale.data.views import example, parse
from vlscale.errors import ConfigError, DataError
from vlscale.types import Batch, Inputs, Text

COUNT = 6
SAID = [(0.0, 2.0, "a red thing"), (2.0, 3.0, "a blue thing"), (4.0, 8.0, "green green green")]
FEATURES = Inputs(0, 8, True, feats=3, frames=16)
PIXELS = Inputs(16, 8, True, frames=4)
WHOLE = Inputs(0, 8, True, feats=3, frames=16, sentences=4)
CODES = Inputs(0, 8, True, frames=16, codes=40)
EVERYTHING = {"text.clean": {}, "visual.clean": {}, "visual.masked": {"mask_frames": {"prob": 0.3}}}


def npz(**arrays: Any) -> bytes:
    out = BytesIO()
    np.savez(out, **arrays)
    return out.getvalue()


def timed(*said: tuple[float, float, str]) -> dict[str, Any]:
    return {"sentences": [{"start": start, "end": end, "text": text} for start, end, text in said or SAID]}


def features(i: int, seconds: int = 10) -> bytes:
    """A frame a second, which tells its sample, its second, and 1."""
    rows = np.stack([np.full(seconds, i), np.arange(seconds), np.ones(seconds)], axis=1)
    return npz(features=rows.astype(np.float16), times=np.arange(seconds, dtype=np.float32))


def members(i: int, record: Mapping[str, Any] | None = None, **fields: bytes | None) -> Members:
    """A sample with a clip of ten seconds, its features and its words; a field that is None is left out."""
    words = npz(codes=np.arange(10) + i, times=np.arange(10.0))
    made: dict[str, bytes | None] = {"gif": CLIP, "frames.npz": features(i), "visual_words.npz": words}
    made["json"] = json.dumps(timed() if record is None else record).encode()
    made |= {name.replace("_npz", ".npz"): data for name, data in fields.items()}
    return [(f"s{i:03d}.{name}", data) for name, data in made.items() if data is not None]


CLIP = clip(counting(20), "gif", rate=2)  # picture 2 s + 0 and 1 at second s


def shards_of(folder: Path, special: Mapping[int, Members] | None = None) -> Shards:
    made = {i: members(i) for i in range(COUNT)} | dict(special or {})
    return Shards(write_samples(folder / "shards", COUNT, COUNT, made), folder / "cache")


def load(folder: Path, inputs: Inputs, views: dict[str, Any], shards: Shards | None = None, seed: int = 3) -> Loaded:
    tokenizer = make_tokenizer(folder, inputs)
    preprocessing = Preprocessing({"all": parse(views, inputs)}, TaskOrder({"all": 1.0}, 0), seed)
    preprocessing = Preprocessing(preprocessing.views, preprocessing.tasks, seed, fields=frozenset({"targets"}))
    make = MicroBatches(
        shards or shards_of(folder), tokenizer, inputs, preprocessing, lambda positions: positions % COUNT
    )
    return make(np.arange(COUNT), "all")


def batch_of(folder: Path, inputs: Inputs, views: dict[str, Any], shards: Shards | None = None, seed: int = 3) -> Batch:
    loaded = load(folder, inputs, views, shards, seed)
    assert loaded.batch is not None, loaded.error
    return loaded.batch


def spoken(text: Text, folder: Path, inputs: Inputs) -> list[str]:
    tokenizer = make_tokenizer(folder, inputs)
    return [tokenizer.decode(ids[mask].tolist()) for ids, mask in zip(text.ids, text.mask, strict=True)]


def test_clips_of_features_have_the_rows_of_their_sentence(tmp_path: Path) -> None:
    batch = batch_of(tmp_path, FEATURES, {**EVERYTHING, "pairs.clips": {"number": 2}})
    texts, visual = spoken(batch.text["clean"], tmp_path, FEATURES), batch.visual["clean"]
    assert len(batch) == COUNT
    assert len(texts) == len(visual.feats) == 2 * COUNT
    assert visual.mask is not None
    assert len(set(texts)) == 3
    for row, text in enumerate(texts):
        start, end, _ = next(each for each in SAID if each[2] in text)
        seen = visual.feats[row][visual.mask[row]]
        assert seen[:, 0].tolist() == [row // 2] * len(seen)  # rows of a sample stand together
        assert seen[:, 1].tolist() == list(range(int(start), int(end) + 1))
        assert (visual.feats[row][~visual.mask[row]] == 0).all()


def test_hidden_frames_are_zero_and_keep_their_targets(tmp_path: Path) -> None:
    batch = batch_of(tmp_path, FEATURES, EVERYTHING)
    clean, masked = batch.visual["clean"], batch.visual["masked"]
    assert masked.picked is not None
    assert masked.mask is not None
    assert masked.targets is not None
    assert torch.equal(masked.targets, clean.feats)
    assert (masked.feats[masked.picked] == 0).all()
    assert torch.equal(masked.feats[~masked.picked], clean.feats[~masked.picked])
    assert masked.picked.any(dim=1).all()  # at least one of each clip
    assert not (masked.picked & ~masked.mask).any()


def test_candidates_are_rows_of_text_beside_one_of_frames(tmp_path: Path) -> None:
    batch = batch_of(tmp_path, FEATURES, {**EVERYTHING, "pairs.clips": {"candidates": 3}})
    assert len(batch.text["clean"].ids) == 3 * COUNT
    assert len(batch.visual["clean"].feats) == COUNT
    texts = spoken(batch.text["clean"], tmp_path, FEATURES)
    assert all(said[2] in texts[3 * i + k] for i in range(COUNT) for k, said in enumerate(SAID))


def test_pixels_are_the_frames_of_the_window(tmp_path: Path) -> None:
    said = timed((4.0, 5.5, "a red thing"))
    shards = shards_of(tmp_path, {i: members(i, said) for i in range(COUNT)})
    batch = batch_of(tmp_path, PIXELS, {**EVERYTHING, "pairs.clips": {"fps": 2}}, shards)
    visual = batch.visual["clean"]
    assert visual.feats.shape == (COUNT, 4, 3, 16, 16)
    assert visual.feats.dtype == torch.uint8
    assert visual.mask is not None
    assert visual.mask.tolist() == [[True, True, True, False]] * COUNT
    assert [number(each.numpy()) for each in visual.feats[0, :3]] == [8, 9, 10]
    assert (visual.feats[:, 3] == 0).all()  # black
    masked = batch.visual["masked"]
    assert masked.picked is not None
    assert torch.equal(masked.feats, visual.feats)  # the family hides what it makes of them


def test_a_random_start_lies_within_the_window(tmp_path: Path) -> None:
    shards = shards_of(tmp_path, {i: members(i, timed((4.0, 9.0, "a red thing"))) for i in range(COUNT)})
    options = {**EVERYTHING, "pairs.clips": {"fps": 2, "start": "random"}}
    starts = set()
    for seed in range(4):
        feats = batch_of(tmp_path, PIXELS, options, shards, seed).visual["clean"].feats
        shown = [[number(each.numpy()) for each in row] for row in feats]
        assert all(row == list(range(row[0], row[0] + 4)) for row in shown)
        starts |= {row[0] for row in shown}
    assert starts <= set(range(8, 15))
    assert len(starts) > 3


def test_all_sentences_beside_all_frames(tmp_path: Path) -> None:
    few = members(2, timed((0.5, 1.5, "a blue thing")))
    batch = batch_of(tmp_path, WHOLE, EVERYTHING, shards_of(tmp_path, {2: few}))
    text = batch.text["clean"]
    assert text.spans is not None
    assert len(text.ids) == 3 * COUNT
    assert len(batch.visual["clean"].feats) == COUNT
    assert text.spans[:3].tolist() == [[0, 2], [2, 3], [4, 8]]
    assert text.spans[6:9].tolist() == [[0, 2], [0, 0], [0, 0]]
    assert text.mask[6:9].any(dim=1).tolist() == [True, False, False]  # missing rows are padding


def test_queries_are_taken_out_of_the_text(tmp_path: Path) -> None:
    views = {**EVERYTHING, "text.query": {"queries": {"number": 2}}}
    batch = batch_of(tmp_path, WHOLE, views, shards_of(tmp_path, {2: members(2, timed((0.5, 1.5, "a blue thing")))}))
    query, clean = batch.text["query"], batch.text["clean"]
    assert len(query.ids) == 2 * COUNT
    assert len(clean.ids) == 3 * COUNT
    asked, left = spoken(query, tmp_path, WHOLE), spoken(clean, tmp_path, WHOLE)
    for i in (0, 1, 3, 4, 5):
        texts = [*asked[2 * i : 2 * i + 2], *left[3 * i : 3 * i + 3]]
        assert all(sum(said[2] in text for text in texts) == 1 for said in SAID)
    assert asked[4] == asked[5]  # too few: the last one again
    assert clean.mask[6:9].sum(dim=1).tolist() == [2, 0, 0]  # its frames stay, its words do not
    assert query.spans is not None
    assert query.spans[4:6].tolist() == [[0, 2], [0, 2]]


def test_sentences_without_frames_are_not_asked_for(tmp_path: Path) -> None:
    few, views = replace(WHOLE, frames=2), {**EVERYTHING, "text.query": {"queries": {"number": 2}}}
    query = batch_of(tmp_path, few, views).text["query"]
    assert set(spoken(query, tmp_path, few)) == {"a red thing"}  # the others lie behind the two frames that are read


def test_sentences_may_begin_with_the_separator(tmp_path: Path) -> None:
    views = {"text.clean": {"start": "sep"}, "text.masked": {"mask_tokens": {"prob": 0.5}}, "visual.clean": {}}
    batch = batch_of(tmp_path, WHOLE, views)
    clean, masked = batch.text["clean"], batch.text["masked"]
    tokenizer = make_tokenizer(tmp_path, WHOLE)
    assert set(clean.ids[:, 0].tolist()) == {tokenizer.sep}
    assert set(masked.ids[:, 0].tolist()) == {tokenizer.cls}
    assert torch.equal(clean.mask, masked.mask)


def test_queries_have_a_view_of_their_own() -> None:
    with pytest.raises(ConfigError, match=r"views\.text\.clean\.queries is for the view text\.query"):
        parse({"text.clean": {"queries": {}}}, WHOLE)


@pytest.mark.parametrize(
    ("view", "inputs", "operation"),
    [
        ("text.query", WHOLE, "queries"),
        ("text.masked", FEATURES, "mask_tokens"),
        ("text.target", FEATURES, "write"),
        ("visual.masked", FEATURES, "mask_frames"),
        ("visual.masked", CODES, "mask_words"),
        ("visual.shuffled", WHOLE, "shuffle_frames"),
        ("visual.masked", Inputs(0, 12, True, regions=4, feats=8, boxes=4), "mask_regions"),
    ],
)
def test_a_view_that_does_not_what_it_is_for(view: str, inputs: Inputs, operation: str) -> None:
    with pytest.raises(ConfigError, match=rf"views\.{view} leaves all as it is; write {{{operation}: {{}}}}"):
        parse({view: {}}, inputs)
    assert example(view, inputs) == f"{{{operation}: {{}}}}"
    parse({view: {operation: {}}}, inputs)


def test_visual_words_stand_in_the_place_of_features(tmp_path: Path) -> None:
    batch = batch_of(tmp_path, CODES, {"text.clean": {}, "visual.clean": {}})
    visual, texts = batch.visual["clean"], spoken(batch.text["clean"], tmp_path, CODES)
    assert visual.codes is not None
    assert visual.mask is not None
    assert visual.feats.shape == (*visual.codes.shape, 0)
    for i, text in enumerate(texts):
        start, end, _ = next(each for each in SAID if each[2] in text)
        assert visual.codes[i][visual.mask[i]].tolist() == [i + t for t in range(int(start), int(end) + 1)]


@pytest.mark.parametrize("silent", [{}, {"sentences": []}, {"start": [], "end": [], "text": []}, timed((0.0, 1.0, ""))])
def test_a_video_without_timed_text_shows_a_run_of_frames(tmp_path: Path, silent: dict[str, Any]) -> None:
    shards = shards_of(tmp_path, {i: members(i, silent) for i in range(COUNT)})
    views = {"visual.clean": {}, "pairs.clips": {"untimed_frames": 4, "start": "random"}}
    codes = batch_of(tmp_path, CODES, views, shards).visual["clean"].codes
    assert codes is not None
    assert codes.shape == (COUNT, 4)
    assert (codes.diff(dim=1) == 1).all()
    assert len({int(row[0]) - i for i, row in enumerate(codes)}) > 1
    loaded = load(tmp_path, CODES, {"text.clean": {}}, shards)
    assert loaded.batch is None
    assert "has no caption" in loaded.bad[0].reason


def test_questions_with_their_answers_are_sentences_of_a_clip(tmp_path: Path) -> None:
    record = {"qa": [{"q": "which thing", "a": "red"}]}
    shards = shards_of(tmp_path, {i: members(i, record) for i in range(COUNT)})
    batch = batch_of(tmp_path, FEATURES, EVERYTHING, shards)
    assert all("thing red" in text for text in spoken(batch.text["clean"], tmp_path, FEATURES))
    assert batch.visual["clean"].feats.shape[1] == 10  # the whole of it


def test_tracks_of_several_rates_stand_beside_one_another(tmp_path: Path) -> None:
    slow, fast = np.arange(10.0)[:, None], np.arange(15.0)[:, None] / 1.5
    data = npz(
        features=slow.astype(np.float32),
        times=slow[:, 0],
        features_3d=np.repeat(fast, 2, axis=1).astype(np.float32),
        times_3d=fast[:, 0],
    )
    shards = shards_of(
        tmp_path, {i: members(i, timed((2.0, 4.0, "a red thing")), frames_npz=data) for i in range(COUNT)}
    )
    visual = batch_of(tmp_path, FEATURES, EVERYTHING, shards).visual["clean"]
    assert sorted(set(visual.feats[0, :, 0].tolist())) == [2, 3, 4]  # each row of the slower one is there
    assert visual.feats[0, :, 1].tolist() == pytest.approx([2, 2 + 2 / 3, 2 + 4 / 3, 4])


def test_texts_may_be_left_out_but_for_what_a_decoder_writes(tmp_path: Path) -> None:
    views = {"text.target": {"write": {}}, "pairs.clips": {"no_text": 0.5, "number": 2}}
    batch = batch_of(tmp_path, FEATURES, {"text.clean": {}, "visual.clean": {}, **views})
    lengths, kept = batch.text["clean"].mask.sum(dim=1).view(-1, 2), batch.text["target"].mask.sum(dim=1).view(-1, 2)
    left_out = (lengths == 2).all(dim=1)  # [CLS] [SEP]
    assert 0 < int(left_out.sum()) < COUNT
    assert torch.equal(lengths[~left_out] - 1, kept[~left_out])  # the last is written, not read
    assert (kept > 1).all()


def test_a_mismatched_pair_has_the_sentence_of_another_video(tmp_path: Path) -> None:
    records = {i: members(i, timed((0.0, 2.0, f"number {i}"))) for i in range(COUNT)}
    views = {**EVERYTHING, "pairs.mismatch": {"prob": 0.5, "labels": "blanked"}}
    batch = batch_of(tmp_path, FEATURES, views, shards_of(tmp_path, records), seed=5)
    assert batch.matched is not None
    assert 0 < int(batch.matched.sum()) < COUNT
    said = [f"number {i}" in text for i, text in enumerate(spoken(batch.text["clean"], tmp_path, FEATURES))]
    assert said == batch.matched.tolist()
    masked = batch.visual["masked"]
    assert masked.picked is not None
    assert masked.picked.any(dim=1).tolist() == said  # nothing is left to restore of the others
    assert batch.visual["clean"].feats[:, 0, 0].tolist() == list(range(COUNT))


TRUNCATED = clip(counting(12), "mp4")[:-200]


@pytest.mark.parametrize(
    ("inputs", "broken", "reason"),
    [
        (PIXELS, members(1, gif=None, mp4=TRUNCATED), "its 'mp4': it is cut short"),
        (PIXELS, members(1, gif=None), "has no mp4 or gif or webm but"),
        (PIXELS, members(1, gif=b"GIF89a"), "its 'gif': "),
        (PIXELS, members(1, timed((10.0, 12.0, "a red thing"))), "from 10 s to 12 s, but its 'gif' ends at 10 s"),
        (FEATURES, members(1, timed((10.0, 12.0, "a red thing"))), "its 'frames.npz' ends at 10 s"),
        (WHOLE, members(1, timed(*SAID, (11.0, 12.0, "a red thing"))), "from 11 s to 12 s"),
        (FEATURES, members(1, timed((3.0, 2.0, "a red thing"))), "sentence 0 is from 3 s to 2 s"),
        (FEATURES, members(1, {"sentences": [{"start": 0, "text": "a"}]}), "sentence 0 is from 0 to None"),
        (FEATURES, members(1, timed((0.0, 10**400, "a red thing"))), "write seconds"),
        (FEATURES, members(1, {"caption": "a", "sentences": [*timed()["sentences"], {"end": 9}]}), "from None to 9"),
        (FEATURES, members(1, {"caption": "a", "sub": {"start": [0], "end": [9]}}), "its 'sub' are no list of"),
        (FEATURES, members(1, {"start": [0, 1], "end": [1], "text": ["a"]}), "has 2 starts, 1 ends and 1 texts"),
        (FEATURES, members(1, timed((3.0, 4.0, "?!"))), "is nothing but punctuation"),
        (FEATURES, members(1, {}), "has no caption"),
        (FEATURES, members(1, frames_npz=npz(features=np.ones((2, 3)))), "it lacks 'times'"),
        (FEATURES, members(1, frames_npz=npz(features=np.ones((2, 4)), times=[0, 1])), "features of 4 numbers, not"),
        (FEATURES, members(1, frames_npz=npz(features=np.ones((2, 3)), times=[1, 0])), "'times' should rise"),
        (FEATURES, members(1, frames_npz=npz(features=np.ones((0, 3)), times=[])), "'features' has 0 rows"),
        (
            FEATURES,
            members(1, frames_npz=npz(features=np.full((9, 3), np.nan), times=np.arange(9))),
            "no finite numbers",
        ),
        (FEATURES, members(1, frames_npz=npz(features=np.array([{}]), times=[0])), "pickled objects"),
        (CODES, members(1, visual_words_npz=npz(codes=np.array([40]), times=[0])), "visual words from 40 to 40"),
    ],
)
def test_a_sample_that_cannot_be_used_is_skipped_and_named(
    tmp_path: Path, inputs: Inputs, broken: Members, reason: str
) -> None:
    shards = shards_of(tmp_path, {1: broken})
    loaded = load(tmp_path, inputs, EVERYTHING if not inputs.codes else {"text.clean": {}, "visual.clean": {}}, shards)
    assert loaded.batch is not None
    assert loaded.batch.keys == ("s000", "s002", "s002", "s003", "s004", "s005")
    assert [bad.key for bad in loaded.bad] == ["s001"]
    assert reason in loaded.bad[0].reason


def test_damage_is_named_and_nothing_else_happens(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    special = {}
    for i in range(1, 200):
        sound = members(i)
        name, data = sound[int(rng.integers(1, 4))]
        broken = bytearray(data[: int(rng.integers(1, len(data) + 1))] if rng.random() < 0.3 else data)
        for place in rng.integers(len(broken), size=int(rng.integers(1, 9))):
            broken[place] = rng.integers(256)
        special[i] = [(each, bytes(broken) if each == name else data) for each, data in sound]
    shards = Shards(write_samples(tmp_path / "shards", 200, 200, {0: members(0), **special}), tmp_path / "cache")
    named = []
    for i, inputs in product(range(200), (FEATURES, CODES, WHOLE)):
        try:
            check_footage(shards, i, inputs)
            timed_sentences(shards, i)
        except BrokenSampleError as error:
            named.append((error.key, 5 < len(error.reason) < 500))
    assert 200 < len(named) < 600
    assert ("s000", True) not in named
    assert all(told for _, told in named)


def test_a_clip_shorter_than_its_window_is_padded(tmp_path: Path) -> None:
    shards = shards_of(tmp_path, {i: members(i, timed((9.0, 99.0, "a red thing"))) for i in range(COUNT)})
    visual = batch_of(tmp_path, PIXELS, {**EVERYTHING, "pairs.clips": {"fps": 2}}, shards).visual["clean"]
    assert visual.mask is not None
    assert visual.mask[0].tolist() == [True, True, False, False]
    assert (visual.feats[:, 2:] == 0).all()


def test_the_asr_layout_is_read(tmp_path: Path) -> None:
    record = {"start": [4, 0], "end": [8, 2], "text": ["green", "red"]}
    shards = shards_of(tmp_path, {i: members(i, record) for i in range(COUNT)})
    batch = batch_of(tmp_path, WHOLE, EVERYTHING, shards)
    assert batch.text["clean"].spans is not None
    assert batch.text["clean"].spans[:2].tolist() == [[0, 2], [4, 8]]  # in the order of their starts


def test_draws_depend_on_the_position_alone(tmp_path: Path) -> None:
    views = {**EVERYTHING, "pairs.clips": {"number": 2, "start": "random", "fps": 2}}
    first, again = (batch_of(tmp_path, PIXELS, views) for _ in range(2))
    other = batch_of(tmp_path, PIXELS, views, seed=4)
    assert torch.equal(first.visual["clean"].feats, again.visual["clean"].feats)
    assert torch.equal(first.text["clean"].ids, again.text["clean"].ids)
    assert not torch.equal(first.visual["clean"].feats, other.visual["clean"].feats)


def test_a_changed_view_leaves_the_frames_to_the_others() -> None:
    """Views that show the same part of a clip are given the same frames."""
    flip = parse({"visual.clean": {"flip": {"prob": 1.0}}}).visual["clean"].flip
    given = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    before = given.copy()
    shown = FrameView(flip=flip)(Frames(given), np.random.default_rng(0))
    assert np.array_equal(shown.feats, before[:, :, ::-1])
    assert np.array_equal(given, before)


def test_a_crop_and_a_flip_are_the_same_in_all_frames() -> None:
    view = FrameView(
        random_crop=RandomCrop(), flip=parse({"visual.clean": {"flip": {"prob": 0.5}}}).visual["clean"].flip
    )
    ramp = np.tile(np.arange(8, dtype=np.uint8), (8, 1))
    frames = np.stack([np.stack([ramp + 10 * t] * 3, axis=-1) for t in range(5)])
    turned = set()
    for seed in range(20):
        rng = np.random.default_rng(seed)
        crop = view.crop(20, 30, 8, rng)
        assert (crop.height, crop.width, crop.size) == (8, 8, (8, 8))
        changed = view(Frames(frames), rng).feats
        turned.add(bool(changed[0, 0, 0, 0]))
        assert all((changed[t] - 10 * t == changed[0]).all() for t in range(5))
    assert turned == {True, False}
    assert view.crop(6, 30, 8, np.random.default_rng(0)).height == 6  # smaller than what is read


def test_masked_frames() -> None:
    frames = Frames(np.ones((400, 2), np.float32))
    hidden = MaskFrames(0.15)(frames, np.random.default_rng(0))
    assert hidden.picked is not None
    assert 30 < hidden.picked.sum() < 90
    none = MaskFrames(0.001, at_least_one=False)(Frames(np.ones((3, 2), np.float32)), np.random.default_rng(0))
    assert none.picked is not None
    assert not none.picked.any()


def test_frames_of_a_window_are_hidden_together() -> None:
    pixels = Frames(np.zeros((7, 2, 2, 3), np.uint8), window=3)
    found = {tuple(MaskFrames(0.3)(pixels, np.random.default_rng(seed)).picked.tolist()) for seed in range(50)}  # type: ignore[union-attr]
    assert found == {
        (*[a] * 3, *[b] * 3, c) for a in (True, False) for b in (True, False) for c in (True, False) if a or b or c
    }


def test_clips_are_for_families_that_read_them() -> None:
    with pytest.raises(ConfigError, match=r"views\.pairs\.clips is for families that read clips"):
        parse({"pairs.clips": {}})
    with pytest.raises(ConfigError, match=r"views\.pairs\.answers is for families that read pictures"):
        parse({"pairs.answers": {}}, FEATURES)
    with pytest.raises(ConfigError, match=r"views\.pairs\.clips\.number: should be a whole number from 1 \(got 0\)"):
        parse({"pairs.clips": {"number": 0}}, FEATURES)


@pytest.mark.parametrize(
    ("inputs", "view", "name", "reason"),
    [
        (FEATURES, "visual.clean", "flip", "is of pixels"),
        (CODES, "visual.clean", "random_crop", "is of pixels"),
        (FEATURES, "visual.clean", "mask_words", "of frames write mask_frames"),
        (PIXELS, "visual.clean", "pool_frames", "is of features"),
        (WHOLE, "visual.clean", "skip_frames", "takes frames away that sentences go with"),
        (WHOLE, "pairs.clips", "number", "reads a video with all its sentences"),
        (FEATURES, "pairs.clips", "fps", "is of pixels"),
    ],
)
def test_what_would_do_nothing_is_refused(inputs: Inputs, view: str, name: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=rf"^views\.{view}\.{name} .*{reason}"):
        parse({view: {name: 3 if view == "pairs.clips" else {}}}, inputs)


@pytest.mark.parametrize("inputs", [FEATURES, PIXELS, CODES, WHOLE])
def test_preflight_looks_at_clips(tmp_path: Path, inputs: Inputs) -> None:
    options: dict[str, Any] = {"batch": 2, "max_words": 0, "out": tmp_path, "disk": 0}
    tokenizer = make_tokenizer(tmp_path, inputs)
    assert preflight.check(shards_of(tmp_path / "sound"), tokenizer, inputs, **options).samples == COUNT
    field = {0: "frames_npz", 16: "gif"}[inputs.image_size] if not inputs.codes else "visual_words_npz"
    lost = shards_of(tmp_path / "lost", {1: members(1, **{field: None})})  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"sample 's001' .*has no "):
        preflight.check(lost, tokenizer, inputs, **options)
    silent = shards_of(tmp_path / "silent", {i: members(i, {}) for i in range(COUNT)})
    assert preflight.check(silent, tokenizer, inputs, **options, texts=False).samples == COUNT
    with pytest.raises(DataError, match="has no caption"):
        preflight.check(silent, tokenizer, inputs, **options)
    early = {i: members(i, timed((30.0, 31.0, "a red thing"))) for i in range(COUNT)}
    with pytest.raises(DataError, match=r"none of the first 6 samples .* from 30 s to 31 s, but its"):
        preflight.check(shards_of(tmp_path / "early", early), tokenizer, inputs, **options)
