from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

from tests.distributed.spawn import run_ranks
from vlscale.throughput import StepClock
from vlscale.types import Batch, Text, Visual


def batch(tokens: int, places: int) -> Batch:
    mask = torch.arange(places)[None] < tokens
    return Batch({"clean": Text(torch.zeros(1, places, dtype=torch.int64), mask)}, {}, torch.zeros(1))


def measured(tokens: int) -> dict[str, float | int | None]:
    clock = StepClock(torch.device("cpu"))
    for each in clock.waiting([tokens, tokens]):
        time.sleep(0.05)
        clock.step([batch(each, 8), batch(each, 8)])
    time.sleep(0.2)
    clock.skip()
    return clock.read(ranks=1, flops=1e9, peak=1e11)


def on_two_ranks() -> dict[str, float | int | None]:
    from vlscale import distributed

    clock = StepClock(torch.device("cpu"))
    time.sleep(0.05)
    clock.step([replace(batch(2 + 4 * distributed.rank(), 8), lost_words=((0, 3), (5, 0, 0))[distributed.rank()])])
    return clock.read(ranks=2, flops=1e9, peak=1e11)


def test_figures_follow_from_the_wall_clock() -> None:
    found = measured(6)
    seconds = found["seconds_per_step"]
    assert seconds is not None
    assert 0.05 <= seconds < 0.1  # the pause is left out
    assert found["samples_per_second"] == pytest.approx(2 / seconds)
    assert found["tokens_per_second"] == pytest.approx(12 / seconds)
    assert found["padding_fraction"] == 0.25
    assert found["model_tflops_per_second"] == pytest.approx(1e-3 / seconds)
    assert found["mfu"] == pytest.approx(1e-2 / seconds)
    assert found["data_wait_fraction"] == pytest.approx(0, abs=0.2)
    assert found["memory_peak_bytes"] >= found["memory_allocated_bytes"] > 1e6  # type: ignore[operator]


def test_padding_of_regions_counts_beside_that_of_words() -> None:
    clock = StepClock(torch.device("cpu"))
    seen = Visual(torch.zeros(1, 12, 2), torch.arange(12)[None] < 4)
    clock.step([replace(batch(6, 8), visual={"clean": seen})])
    found = clock.read(ranks=1, flops=0.0, peak=None)
    assert found["padding_fraction"] == 0.5  # 10 of 20 places
    assert found["tokens_per_second"] == pytest.approx(6 / found["seconds_per_step"])  # type: ignore[operator]


def test_waiting_for_data_is_seen() -> None:
    def slow() -> object:
        for _ in range(2):
            time.sleep(0.08)
            yield None

    clock = StepClock(torch.device("cpu"))
    for _ in clock.waiting(slow()):  # type: ignore[var-annotated, arg-type]
        time.sleep(0.02)
        clock.step([])
    found = clock.read(ranks=1, flops=0.0, peak=None)
    assert found["data_wait_fraction"] == pytest.approx(0.8, abs=0.1)
    assert found["mfu"] is None
    assert found["padding_fraction"] == 0.0


def test_ranks_agree() -> None:
    first, second = run_ranks(on_two_ranks, 2)
    for name in ("seconds_per_step", "tokens_per_second", "padding_fraction", "mfu", "truncated_fraction"):
        assert first[name] == second[name]
    assert first["padding_fraction"] == 0.5
    assert (first["truncated_fraction"], first["truncated_words"]) == (2 / 5, 8)
    assert first["tokens_per_second"] == pytest.approx(8 / first["seconds_per_step"])
