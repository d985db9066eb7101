from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from vlscale.data.clip_windows import (
    Clips,
    Timed,
    Window,
    centres,
    duration,
    grow,
    nearest,
    overlapping,
    widened,
    window,
    windows,
    within,
)
from vlscale.errors import ConfigError

SAID = [Timed("a", 0, 2), Timed("b c", 2, 3), Timed("d", 4, 6), Timed("e f g", 7, 8), Timed("h", 10, 14)]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize(
    ("own", "least", "found"),
    [
        ((0,), 2, (0, 2, (0,))),  # long enough
        ((1,), 3, (0, 3, (1, 0))),  # 0-3 is shorter than 2-6; the one before stands behind
        ((2,), 4, (2, 6, (2, 1))),  # 2-6 and 4-8 span as much: the one before
        ((2,), 5, (0, 6, (2, 1, 0))),  # and again: 0-6 and 2-8
        ((4,), 99, (0, 14, (4, 3, 2, 1, 0))),
        ((0,), 99, (0, 14, (0, 1, 2, 3, 4))),
    ],
)
def test_clips_grow_by_the_nearer_neighbour(own: tuple[int, ...], least: float, found: tuple[object, ...]) -> None:
    start, end, texts = found
    assert grow(SAID, own, least) == Window(start, end, (texts,))  # type: ignore[arg-type]


def test_words_of_sentences_before_stand_in_front_where_they_are_prepended() -> None:
    assert grow(SAID, (2,), 5, appended=False).texts == ((0, 1, 2),)


def test_where_words_count_the_neighbour_with_fewer_joins() -> None:
    assert grow(SAID, (2,), 0, least_words=3) == Window(2, 6, ((2, 1),))  # b c, not e f g
    assert grow(SAID, (2,), 0, least_words=4, appended=False).texts == ((0, 1, 2),)
    assert grow(SAID, (2,), 1, least_words=9).texts == ((2, 1, 0, 3, 4),)


def test_candidates_are_the_run_of_sentences_that_spans_least() -> None:
    assert nearest(SAID, 2, 1) == [2]
    assert nearest(SAID, 2, 2) == [2, 3]  # 2-6 and 4-8: on a tie the later one
    assert nearest(SAID, 2, 3) == [1, 2, 3]  # then 2-8 rather than 4-14
    assert nearest(SAID, 0, 3) == [0, 1, 2]
    assert nearest(SAID, 4, 3) == [2, 3, 4]
    assert nearest(SAID[:2], 1, 4) == [0, 0, 0, 1]  # shifted left, then kept within
    assert nearest(SAID[:2], 0, 4) == [0, 1, 1, 1]


def test_a_caption_is_widened_about_its_middle() -> None:
    assert widened(7, 8, 5) == (5, 10)
    assert widened(1, 2, 5) == (0, 5)  # not before the beginning
    assert widened(4, 10, 5) == (4, 10)


def test_milnce_clips_have_candidates_and_a_widened_time() -> None:
    found = window(SAID, 3, Clips(candidates=3, least_seconds=5), rng())
    assert (found.start, found.end) == (5, 10)
    assert found.texts == ((1,), (2,), (3,))


def test_univl_draws_one_group_of_neighbours() -> None:
    options = Clips(number=3, choice="consecutive")
    groups = Counter(tuple(centres(5, options, rng(seed))) for seed in range(100))
    assert set(groups) == {(0, 1, 2), (3, 4, 0)}
    assert min(groups.values()) > 30
    assert centres(2, options, rng()) == [0, 1, 0]


def test_howto100m_draws_with_replacement() -> None:
    options = Clips(number=64, least_seconds=5, longer_by="appended")
    drawn = Counter(centres(5, options, rng()))
    assert sum(drawn.values()) == 64
    assert len(drawn) == 5
    assert windows(SAID, options, rng(3)) == windows(SAID, options, rng(3))
    assert windows(SAID, options, rng(3)) != windows(SAID, options, rng(4))


def test_sentences_join_by_chance() -> None:
    options = Clips(join=0.5)
    counts = Counter(len(window(SAID, 0, options, rng(seed)).texts[0]) for seed in range(2_000))
    assert abs(counts[1] / 2_000 - 0.5) < 0.05
    assert abs(counts[2] / 2_000 - 0.25) < 0.05
    joined = next(each for each in (window(SAID, 0, options, rng(seed)) for seed in range(99)) if each.end == 6)
    assert joined == Window(0, 6, ((0, 1, 2),))


def test_a_caption_without_time_goes_with_the_whole_clip() -> None:
    said = [Timed("a"), Timed("b")]
    assert window(said, 1, Clips(candidates=2, least_seconds=5), rng()) == Window(0, math.inf, ((0,), (1,)))
    assert grow(said, (0,), 5) == Window(0, math.inf, ((0,),))


@pytest.mark.parametrize("fps", [1.0, 1.5, 30 / 16, 29.97])
def test_frames_of_a_stretch_are_those_of_the_authors(fps: float) -> None:
    times = np.arange(200) / fps
    for kind in (np.float32, np.float64):
        for start, end in [*rng().uniform(0, 3, (500, 2)).cumsum(axis=1).tolist(), [2, 4], [2 / fps, 5 / fps]]:
            rows = slice(int((start + 1e-9) * fps), int((end + 1e-9) * fps) + 1)
            assert within(times.astype(kind), start, end) == rows
    assert within(times, 200 / fps, 300 / fps) == slice(200, 200)
    assert within(times, 199.5 / fps, math.inf) == slice(199, 200)


def test_a_sentence_overlaps_the_frames_that_it_is_said_in() -> None:
    times = np.array([0.0, 1.5, 3.0, 4.5])
    assert overlapping(times, 0.0, 1.5) == slice(0, 1)  # not the frame that begins with its end
    assert overlapping(times, 1.0, 3.5) == slice(0, 3)
    assert overlapping(times, 5.0, 9.0) == slice(3, 4)
    assert overlapping(times, 6.0, 9.0) == slice(4, 4)  # the last frame has ended
    assert overlapping(times + 3, 0.0, 2.0) == slice(0, 0)


def test_the_last_frame_lasts_as_long_as_the_one_before() -> None:
    assert duration(np.array([0.0, 2.0])) == 4.0
    assert duration(np.array([0.5])) == 1.5
    assert duration(np.array([])) == 0.0


@pytest.mark.parametrize(
    "options",
    [
        *({"number": 0}, {"fps": 0.0}, {"join": 1.0}, {"least_seconds": -1.0}, {"least_words": 3}),
        *({"candidates": 2, "join": 0.5}, {"candidates": 2, "longer_by": "appended"}),
    ],
)
def test_options_that_cannot_be(options: dict[str, float | str]) -> None:
    with pytest.raises(ConfigError):
        Clips(**options)  # type: ignore[arg-type]
