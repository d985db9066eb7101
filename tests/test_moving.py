"""The drawn videos of the embedded data set, and what a network and k-means would tell of them."""

from __future__ import annotations

import hashlib
import json
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from vlscale.data.scenes import embedded as scenes
from vlscale.data.scenes import frames as network
from vlscale.data.scenes import moving
from vlscale.data.scenes.drawing import COLOURS, Group
from vlscale.data.scenes.moving import ACTIONS, Description, Stretch
from vlscale.data.shards import Shards
from vlscale.data.visual_words import read_codebook

DRAWN = {  # SHA-256 of the sentences and frames of the first 16 videos of clips-1
    False: "ef6dbf7f41872c73abc9d35d2fd8d24e61ddb4fe78b68972cb9b47b21867fbbd",
    True: "31a91e2a5f1f0b068278b36409c8801a822a1f7ae2417d0a8adcbc31c3fc6eb2",
}
SWAP = -1


def stretch_of(action: int, other: Group | None = None, size: int = 1, seed: int = 0) -> Stretch:
    """A blue square that does something."""
    return moving.compose(Description(Group(1, 2, size, 1), action, other), np.random.Generator(np.random.PCG64(seed)))


def drawn(frame: NDArray[np.uint8]) -> NDArray[np.int64]:
    """(x, y) of the pixels [N, 2] that are not ground."""
    return np.argwhere((frame[0, 0].astype(int) - frame).max(axis=2) > 60)[:, ::-1]


@pytest.mark.parametrize("train", [False, True])
def test_videos_are_those_of_clips_1(train: bool) -> None:
    digest = hashlib.sha256()
    for video in islice(moving.videos(train), 16):
        digest.update(json.dumps(video.record()).encode())
        for frame in video.draw():
            digest.update(frame.tobytes())
    assert digest.hexdigest() == DRAWN[train]


def test_no_sentence_fits_two_descriptions_and_splits_share_none() -> None:
    alone, beside, swaps = moving.descriptions()
    everything = [*alone, *beside, *swaps]
    assert [len(alone), len(beside), len(swaps)] == [616, 20_944, 595]
    forward, backward = ({each.sentence(way) for each in everything} for way in (False, True))
    assert len(forward) == len(backward) == len(everything)
    assert len(forward | backward) == len(everything) + len(swaps)
    said = [{s.sentence for video in moving.videos(train) for s in video.stretches} for train in (False, True)]
    meant = [{frozenset(sentence.removesuffix(" swap places").split(" and ")) for sentence in split} for split in said]
    assert not meant[0] & meant[1]
    assert len(said[1]) > 4_000
    assert len(said[0]) > 600
    assert {word for sentence in said[0] for word in sentence.split()} <= {w for s in said[1] for w in s.split()}


def test_sentences() -> None:
    actor, star = Group(0, 5, 0, 1), Group(3, 0, 0, 1)
    assert Description(actor, 0, None).sentence(False) == "a small orange circle moves left"
    assert (
        Description(actor, ACTIONS.index("grows"), star).sentence(False) == "an orange circle grows beside a red star"
    )
    assert Description(star, SWAP, actor).sentence(True) == "an orange circle and a red star swap places"


@pytest.mark.parametrize(("action", "way"), [(n, way) for n, way in enumerate(moving.MOVES.values())])
def test_what_moves_moves_so(action: int, way: tuple[int, int]) -> None:
    for seed in range(5):
        middles = np.array([drawn(frame).mean(axis=0) for frame in stretch_of(action, seed=seed).draw()])
        steps = np.diff(middles, axis=0) @ np.array(way)
        assert steps.min() > 0
        assert np.ptp(middles @ np.array(way)[::-1]) < 1  # and no other way
        assert (middles[-1] - middles[0]) @ way == pytest.approx(22, abs=1)


def test_what_else_things_do() -> None:
    sizes = {
        name: [len(drawn(frame)) for frame in stretch_of(ACTIONS.index(name), seed=3).draw()] for name in ACTIONS[4:]
    }
    assert np.diff(sizes["grows"]).min() > -4
    assert sizes["grows"][-1] > 2.5 * sizes["grows"][0]
    assert sizes["shrinks"][0] > 2.5 * sizes["shrinks"][-1]
    assert min(sizes["turns"]) > 0.9 * max(sizes["turns"])
    assert (sizes["appears"][0], sizes["vanishes"][-1]) == (0, 0)
    assert min(sizes["appears"][-1], sizes["vanishes"][0]) > 200
    assert [size > 0 for size in sizes["blinks"][:9]] == [True] * 3 + [False] * 3 + [True] * 3
    turning = list(stretch_of(ACTIONS.index("turns")).draw())
    assert (turning[0] != turning[3]).mean() > 0.05


def test_two_things_swap_and_others_stay_apart() -> None:
    star = Group(3, 0, 0, 1)
    swap = stretch_of(SWAP, star)
    first, second = swap.actors
    for a, b in ((first, second), (second, first)):
        np.testing.assert_allclose((a.poses[0].x, a.poses[0].y), (b.poses[-1].x, b.poses[-1].y))
    for action in range(len(ACTIONS)):
        for seed in range(10):
            actor, other = stretch_of(action, star, seed=seed).actors
            assert len(set(other.poses)) == 1
            apart = [max(abs(p.x - other.poses[0].x), abs(p.y - other.poses[0].y)) for p in actor.poses]
            assert min(apart) > actor.poses[0].half + other.poses[0].half, ACTIONS[action]


@pytest.fixture(scope="module")
def samples() -> list[dict[str, bytes]]:
    return list(scenes.clip_samples(False, 12))


def arrays(sample: dict[str, bytes], field: str) -> dict[str, NDArray[Any]]:
    with np.load(BytesIO(sample[field]), allow_pickle=False) as saved:
        return dict(saved)


def test_the_fields_of_a_sample_agree(samples: list[dict[str, bytes]]) -> None:
    for sample, video in zip(samples, moving.videos(False), strict=False):
        record, seen, words = (
            json.loads(sample["json"]),
            arrays(sample, "frames.npz"),
            arrays(sample, "visual_words.npz"),
        )
        with av.open(BytesIO(sample["mp4"])) as container:
            decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]).astype(int)
        frames = np.stack(list(video.draw()))
        assert decoded.shape == frames.shape
        assert np.abs(decoded - frames).mean() < 6
        sentences = record["sentences"]
        assert 4 <= len(sentences) <= 5
        assert [each["start"] for each in sentences[1:]] == [each["end"] for each in sentences[:-1]]
        assert sentences[-1]["end"] == record["duration"] == len(frames) / moving.FPS
        assert all(1.5 <= each["end"] - each["start"] <= 2.5 for each in sentences)
        assert seen["features"].shape == (len(frames) // 2, network.FEATURES)
        assert seen["features"].dtype == np.float16
        np.testing.assert_array_equal(seen["times"], np.arange(len(frames) // 2) / 4)
        np.testing.assert_array_equal(words["times"], seen["times"])
        assert words["codes"].shape == seen["times"].shape


def test_features_tell_colour_and_action() -> None:
    """Nearest neighbour between two draws of each of some descriptions."""
    alone = moving.descriptions()[0]
    chosen = [alone[number] for number in np.random.Generator(np.random.PCG64(0)).permutation(len(alone))[:120]]
    sides = []
    for seed in range(2):
        rng = np.random.Generator(np.random.PCG64(seed))
        videos = [moving.Video((moving.compose(description, rng),)) for description in chosen]
        seen = [network.features(video, list(video.draw()), rng)["features"].astype(float) for video in videos]
        sides.append(np.stack([np.concatenate([each.mean(axis=0), each.max(axis=0)]) for each in seen]))
    nearest = ((sides[0][:, None] - sides[1]) ** 2).sum(axis=2).argmin(axis=1)
    colours = np.array([description.actor.colour for description in chosen])
    actions = np.array([description.action for description in chosen])
    assert (colours[nearest] == colours).mean() > 0.75 > 3 / len(COLOURS)
    assert (actions[nearest] == actions).mean() > 0.75 > 3 / len(ACTIONS)


def test_visual_words_are_many_and_last(samples: list[dict[str, bytes]]) -> None:
    tree = scenes.visual_words()
    assert tree.words == 64
    assert (tree.counts[-1] > 0).all()
    assert tree.counts[-1].max() < 0.1 * tree.counts[-1].sum()
    codes = [arrays(sample, "visual_words.npz")["codes"] for sample in samples]
    assert max(each.max() for each in codes) < 64
    same = np.concatenate([each[1:] == each[:-1] for each in codes]).mean()
    assert 0.4 < same < 0.9  # a word of its surroundings can be told, but not copied


def test_clips_are_shards_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moving, "NUM_TRAIN", 6)
    monkeypatch.setattr(moving, "NUM_VAL", 3)
    made = [scenes.ensure(tmp_path / str(n), clips=True) for n in range(2)]
    shards = Shards(made[0].train, tmp_path / "cache")
    assert len(shards) == 6
    assert len(Shards(made[0].val, tmp_path / "cache")) == 3
    assert set(shards.read(0)) == {"mp4", "json", "frames.npz", "visual_words.npz"}
    for first, second in zip(made[0].train + made[0].val, made[1].train + made[1].val, strict=True):
        assert first.read_bytes() == second.read_bytes()
    codebook = read_codebook(made[0].train[0].parent / scenes.CODEBOOK)
    np.testing.assert_array_equal(codebook.leaves, scenes.visual_words().leaves)
