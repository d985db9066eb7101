"""Which logged losses are spikes, data that are left out, and a run that goes back before a spike and past its data."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from tests import small_runs
from tests.distributed.spawn import run_ranks
from tests.runs import metrics
from tests.shard_files import make_tokenizer, write_samples
from tests.test_loader import BATCH, make_loader
from vlscale import build, config, train
from vlscale.data.loader import Loader
from vlscale.data.shards import Shards
from vlscale.errors import ConfigError, VlscaleError
from vlscale.monitor import Monitor
from vlscale.options import SpikeConfig
from vlscale.saving.pieces import Reader
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
    with pytest.raises(ConfigError, match=r"spikes\.window"):
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


# --- a run that goes back ----------------------------------------------------------------------------------

STEPS, SPIKE = 20, 14  # the step before which the data go wrong


class KilledError(Exception):
    """In place of a kill."""


def trained(recipe: str, out: str, left_out: list[tuple[int, int]], ds: str = "zero2", killed_at: int = 0) -> str:
    """A whole run, whose loader leaves something out from the start, or which dies before a step; how it ended."""
    make, one_step = build.build_loader, train.one_step

    def loader_of(*given: Any) -> Loader:
        loader = make(*given)
        loader.left_out = loader.left_out or list(left_out)
        return loader

    def step_or_die(*given: Any) -> Any:
        if given[4] == killed_at:
            raise KilledError
        return one_step(*given)

    closing = mock.patch.object(Monitor, "close", autospec=True, side_effect=Monitor.close)
    with (
        mock.patch.object(build, "build_loader", loader_of),
        mock.patch.object(train, "one_step", step_or_die),
        closing as closed,
    ):
        try:
            code = train.train(build.Request(config.load(recipe), f"ds_configs/{ds}.json", Path(out)))
        except (KilledError, VlscaleError) as error:
            return f"{type(error).__name__}: {error}"
        finally:
            assert closed.call_count == 1  # however it ends
    return str(code)


def ended(out: Path) -> tuple[dict[str, torch.Tensor], list[Any]]:
    """The tensors of the last checkpoint by name; the loss and samples of each step."""
    reader = Reader(out / "checkpoints" / f"step_{STEPS:08d}")
    lines = [(line["step"], line["loss"], line["sample_keys"]) for line in metrics(out) if "loss" in line]
    return {name: reader.whole(name) for name in reader.names()}, lines


@pytest.mark.parametrize(("world", "ds"), [(1, "zero2"), pytest.param(2, "zero3", marks=pytest.mark.slow)])
def test_a_run_goes_back_before_a_spike_and_past_its_data(tmp_path: Path, world: int, ds: str) -> None:
    wrong = {small_runs.samples_of(SPIKE)[1]: 1e4}
    data = small_runs.write_data(tmp_path / "data", wrong)
    options = [f"steps={STEPS}", "spikes.window=8", "spikes.factor=30"]
    goes_back = small_runs.write_recipe(tmp_path / "back.yaml", [*data, *options, "spikes.roll_back=true"])
    says_so = small_runs.write_recipe(tmp_path / "says.yaml", [*data, *options])
    back, cut, left = (tmp_path / name for name in ("back", "cut", "left"))
    assert run_ranks(trained, world, goes_back, str(back), [], ds) == ["0"] * world
    for step in (15, 18):  # when no checkpoint knows of the roll-back, and when one does
        assert run_ranks(trained, world, goes_back, str(cut), [], ds, step) == ["KilledError: "] * world
    assert run_ranks(trained, world, goes_back, str(cut), [], ds) == ["0"] * world
    assert run_ranks(trained, world, says_so, str(left), [(12, 2)], ds) == ["0"] * world
    tensors, lines = ended(left)  # whose loader has left the data out from the start
    assert [step for step, *_ in lines] == list(range(1, STEPS + 1))
    for out in (back, cut):
        found, told = ended(out)
        assert told == lines
        assert found.keys() == tensors.keys()
        assert [name for name in found if not torch.equal(found[name], tensors[name])] == []
        (line,) = map(json.loads, (out / "bad_steps.jsonl").read_text().splitlines())
        assert line == {"step": 12, "spike": SPIKE, "rolled_back": 1, "positions": [48, 56], "left_out": [[12, 2]]}
        said = (out / "log.txt").read_text()
        assert said.count(f"spikes at step {SPIKE}: ") == 1
        left_out = "the samples at positions 48 to 55 are left out from now on"
        assert said.count(f"back at step 12; {left_out} (roll-back 1 of 3)") == 1


def test_a_spike_too_many_ends_the_run_at_its_last_good_checkpoint(tmp_path: Path) -> None:
    wrong = dict.fromkeys([small_runs.samples_of(step)[0] for step in (SPIKE, SPIKE + 1, SPIKE + 3)], 1e4)
    data = small_runs.write_data(tmp_path / "data", wrong)
    options = [f"steps={STEPS}", "spikes.window=8", "spikes.factor=30", "spikes.roll_back=true", "spikes.budget=1"]
    recipe = small_runs.write_recipe(tmp_path / "recipe.yaml", [*data, *options])
    for _ in range(2):  # the second goes on where the first has ended
        (said,) = run_ranks(trained, 1, recipe, str(tmp_path / "out"), [])
        assert said == (
            "TrainingError: the loss spikes once more at step 13, after spikes.budget=1 roll-backs; lower optim.lr, or "
            "write a larger spikes.budget; the same command goes on from step 12"
        )
    assert (tmp_path / "out" / "log.txt").read_text().count("back at step 12; ") == 1
    assert (tmp_path / "out" / "checkpoints" / "latest").read_text() == "step_00000012\n"
    small_runs.write_recipe(tmp_path / "recipe.yaml", [*data, *options[:-1]])
    assert run_ranks(trained, 1, recipe, str(tmp_path / "out"), []) == ["0"]


@pytest.mark.slow
def test_by_default_a_spike_is_told_and_no_more(tmp_path: Path) -> None:
    data = small_runs.write_data(tmp_path / "data", {small_runs.samples_of(SPIKE)[1]: 1e4})
    recipe = small_runs.write_recipe(tmp_path / "recipe.yaml", [*data, f"steps={STEPS}", "spikes.window=8"])
    assert run_ranks(trained, 1, recipe, str(tmp_path / "out"), []) == ["0"]
    assert f"the loss of task 'all' spikes at step {SPIKE}: " in (tmp_path / "out" / "log.txt").read_text()
    assert not (tmp_path / "out" / "bad_steps.jsonl").exists()
