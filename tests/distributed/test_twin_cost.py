"""What moving a large twin costs at ZeRO 3: no full copy of the model, and far less time than gathering it."""

from __future__ import annotations

import ctypes
import gc
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import psutil
import pytest
import torch

from tests.distributed.spawn import run_ranks
from tests.distributed.toy_twin import Options, engine_of

LARGE = Options(width=2896, layers=11)  # 11 layers, a tied pair and a head of 8.4 M each: 101 M in the family
ROUNDS = 7
AT_ONCE = 10**9


def gathered(pairs: list[Any], coefficient: float, together: int) -> None:
    """The usual way: parameters are gathered, averaged on rank 0 and given back, `together` at a time."""
    import deepspeed

    for start in range(0, len(pairs), together):
        some = pairs[start : start + together]
        flat = [parameter for pair in some for parameter in pair]
        with deepspeed.zero.GatheredParameters(flat, modifier_rank=0), torch.no_grad():
            for online, twin in some:
                twin.data.lerp_(online.data, 1 - coefficient)


class Peak:
    """The most resident memory that this process has had more than at the start, in bytes."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._start = self._process.memory_info().rss
        self._open = True
        self.growth = 0
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._open = False
        self._thread.join()

    def _watch(self) -> None:
        while self._open:
            self.growth = max(self.growth, self._process.memory_info().rss - self._start)
            time.sleep(0.002)


@contextmanager
def peak() -> Iterator[Peak]:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system, and counts when it is taken again
    watched = Peak()
    try:
        yield watched
    finally:
        watched.close()


def costs() -> dict[str, tuple[float, int]]:
    """{way: (median seconds, greatest growth in bytes)} of one move of the twin, and the model's size."""
    engine = engine_of(LARGE, "zero3", "bf16")
    pairs = engine.model.momentum_pairs()
    assert engine._averages.small, "biases are kept whole beside their parts, and refreshed in what is timed"
    ways: dict[str, Callable[[], None]] = {
        "ours": lambda: engine.after_step(0.999),
        "by layer": lambda: gathered(pairs, 0.999, 2),
        "at once": lambda: gathered(pairs, 0.999, AT_ONCE),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    growth = dict.fromkeys(ways, 0)
    for way in ways.values():  # the first time is like no other
        way()
    for _ in range(ROUNDS):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - began)
    for name, way in ways.items():
        with peak() as watched:
            way()
        growth[name] = watched.growth
    size = sum(online.ds_numel for online, _ in pairs) * 2  # type: ignore[attr-defined]
    return {"whole": (0.0, size)} | {name: (median(seconds[name]), growth[name]) for name in ways}


@pytest.mark.slow
def test_moving_100_million_parameters_gathers_nothing() -> None:
    for rank, found in enumerate(run_ranks(costs, 2, timeout=230)):
        whole = found.pop("whole")[1]
        for name, (seconds, growth) in found.items():
            print(f"rank {rank} {name}: {seconds * 1e3:.0f} ms, {growth / whole:.2f} of {whole / 2**20:.0f} MiB more")
        ours = found["ours"][0]
        assert found["by layer"][0] > 5 * ours
        assert found["at once"][0] > 5 * ours
        assert found["ours"][1] < whole / 4
        assert found["at once"][1] > whole / 2, "the measure would not see a full copy"
