from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

from tests.distributed.spawn import run_ranks
from vlscale import distributed
from vlscale.throughput import IN_A_ROW, StepClock, Stragglers
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


def own_part(seconds: float, collectives: float) -> dict[str, float | int | None]:
    """Of a rank whose step took `seconds` of its own besides those in collectives; rank 1's takes longer."""
    inside = 0.0

    def measured() -> float:
        return inside

    clock = StepClock(torch.device("cpu"), measured)
    time.sleep(seconds * (1 + 3 * distributed.rank()))
    inside += collectives * (1 - distributed.rank())
    time.sleep(collectives * (1 - distributed.rank()))
    clock.step([batch(4, 8)])
    return clock.read(ranks=2, flops=0.0, peak=None)


def test_the_rank_that_keeps_the_others_waiting_is_found() -> None:
    """Both ranks' steps last the same: what one spends on its own, the other waits for."""
    for found in run_ranks(own_part, 2, 0.1, 0.3):
        assert found["straggler/rank"] == 1
        assert found["straggler/max_over_median"] > 2  # 4, but for what a busy machine takes of both


def line(rank: int, ratio: float, seconds: float = 1.0) -> dict[str, float]:
    return {"straggler/rank": rank, "straggler/max_over_median": ratio, "seconds_per_step": seconds}


def test_a_rank_is_named_once_when_it_stays_behind() -> None:
    judge = Stragglers().judge
    assert [bool(judge(line(3, 1.8))) for _ in range(IN_A_ROW + 3)] == [n == IN_A_ROW for n in range(1, IN_A_ROW + 4)]
    assert [judge(line(n % 2, 2.0)) for n in range(20)] == [""] * 20  # now this one, now that
    assert [judge(line(1, 1.4)) for _ in range(20)] == [""] * 20
    assert [judge(line(1, 9.0, seconds=0.01)) for _ in range(20)] == [""] * 20  # nobody minds
    for _ in range(IN_A_ROW - 1):
        judge(line(2, 1.6))
    assert judge(line(2, 1.7)).startswith("rank 2 keeps the others waiting: in 5 logged steps in a row")
