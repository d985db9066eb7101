"""Which logged losses are spikes, data that are left out, and a run that goes back before a spike and past its data."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from tests.shard_files import make_tokenizer, write_samples
from tests.test_loader import BATCH, make_loader
from vlscale import config
from vlscale.data.loader import Loader
from vlscale.data.shards import Shards
from vlscale.errors import ConfigError
from vlscale.options import SpikeConfig
from vlscale.spikes import FEWEST, Spikes


def judged(losses: list[float], **options: float) -> list[int]:
    """The steps at which spikes begin."""
    spikes = Spikes(SpikeConfig(**options))  # type: ignore[arg-type]
    return [step for step, loss in enumerate(losses, start=1) if spikes.judge(step, "all", loss)]


def falling(lines: int, seed: int = 0) -> list[float]:
    """As a loss falls: fast, then slowly, with noise of a fiftieth."""
    noise = np.random.default_rng(seed).normal(scale=0.02, size=lines)
    return [float((2 + 8 * math.exp(-n / 40)) * (1 + e)) for n, e in enumerate(noise)]


@pytest.mark.parametrize("seed", range(20))
def test_a_loss_that_falls_is_no_spike(seed: int) -> None:
    assert judged(falling(1000, seed)) == []


def test_a_jump_is_one_spike_and_a_new_level_is_none_for_ever() -> None:
    losses = falling(300)
    assert judged([*losses, 6.0]) == [301]
    assert judged([*losses, 6.0, 6.1, 6.2, *losses[-20:], 6.0]) == [301, 324]
    assert judged([*losses, *[6.0] * 80, 5.9]) == [301]
    assert judged([*losses[:FEWEST], 1000.0]) == [FEWEST + 1]
    assert judged([*losses[: FEWEST - 1], 1000.0]) == []  # too little is known
    assert judged([*losses, 3.0], factor=3.0) != judged([*losses, 3.0], factor=30.0) == []


def test_a_loss_that_does_not_move_is_judged_by_its_size() -> None:
    assert judged([2.0] * 50 + [2.1]) == []
    assert judged([2.0] * 50 + [2.3]) == [51]
    assert judged([-2.0] * 50 + [-1.9]) == []
    assert judged([-2.0] * 50 + [-1.7]) == [51]


def test_what_is_not_finite_is_left_out() -> None:
    assert judged([*falling(300), math.nan, math.inf]) == []
    assert judged([*falling(300), math.nan, 6.0, math.nan]) == [302]


def test_tasks_are_judged_apart() -> None:
    spikes = Spikes(SpikeConfig())
    for step, loss in enumerate(falling(200), start=1):
        assert not spikes.judge(2 * step, "words", loss)
        assert not spikes.judge(2 * step + 1, "regions", 50 * loss)
    assert spikes.judge(500, "words", 100.0).startswith("the loss of task 'words' spikes at step 500: 100, where 3.")
    assert spikes.fine == 401
    assert not spikes.judge(501, "regions", 100.0)


def test_it_goes_on_from_its_state() -> None:
    losses = [*falling(150), 6.0, 6.0, *falling(50), 7.0]
    whole, cut = Spikes(SpikeConfig(window=60)), Spikes(SpikeConfig(window=60))
    for step, loss in enumerate(losses, start=1):
        cut = Spikes(SpikeConfig(window=60), json.loads(json.dumps(cut.state())))
        assert cut.judge(step, "all", loss) == whole.judge(step, "all", loss)
    assert cut.state() == whole.state()


def test_wrong_options_are_named() -> None:
    with pytest.raises(ConfigError, match=r"spikes.factor should be above 0 \(got 0.0\)"):
        config.load("quickstart", ["spikes.factor=0"])
    with pytest.raises(ConfigError, match="spikes.window"):
        config.load("quickstart", ["spikes.window=0"])


# --- data that are left out --------------------------------------------------------------------------------


def keys(loader: Loader, start: int, stop: int) -> list[tuple[str, ...]]:
    served = list(loader.steps(start, stop))
    assert [step for step, _ in served] == list(range(start + 1, stop + 1))
    return [batch.keys for _, batches in served for batch in batches]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_steps_after_a_roll_back_train_on_what_follows(tmp_path: Path) -> None:
    shards = Shards(write_samples(tmp_path / "shards", 20, 7, {}), tmp_path / "cache")
    tokenizer = make_tokenizer(tmp_path)
    loader, other = make_loader(shards, tokenizer), make_loader(shards, tokenizer, workers=2)
    whole = keys(loader, 0, 12)
    assert loader.leave_out(after=2, until=4) == (2 * BATCH, 4 * BATCH)
    assert keys(loader, 0, 5) == [*whole[:2], *whole[4:7]]
    assert (loader.served(2), loader.served(3)) == (2 * BATCH, 5 * BATCH)
    assert loader.leave_out(after=4, until=5) == (6 * BATCH, 7 * BATCH)  # step 5 had the data of the seventh
    assert keys(loader, 2, 7) == [*whole[4:6], *whole[7:10]]
    other.load_state(json.loads(json.dumps(loader.state())))
    assert keys(other, 3, 7) == [whole[5], *whole[7:10]]
    assert loader.leave_out(after=4, until=6) == (7 * BATCH, 9 * BATCH)  # back to the same place once more
    assert keys(loader, 4, 6) == whole[9:11]
    assert loader.leave_out(after=1, until=5) == (BATCH, 10 * BATCH)  # and behind all of them
    assert keys(loader, 0, 3) == [whole[0], *whole[10:12]]
    assert loader.left_out == [(1, 9)]
    assert other.left_out == [(2, 2), (4, 1)]
