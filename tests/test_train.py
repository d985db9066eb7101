"""Whole runs: what they leave behind, that a cut changes nothing, and that the way they are spread does not either."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml

from tests.distributed.spawn import run_ranks
from tests.runs import ROOT, TINY, figures, launch, losses, metrics, run_whole, stop_at
from tests.states import equal, whole
from vlscale import config, train
from vlscale.build import Request
from vlscale.errors import DONE, STOPPED
from vlscale.record import Record

STEPS = 32
CUT = ("steps=32", "checkpoint.every=5", "logging.every=2", "evaluation.every=16", "logging.sample_keys=true")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 steps of the tiny model at ZeRO 2, never disturbed."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    run_whole(1, out, *CUT)
    return out


# --- what a run leaves behind ------------------------------------------------------------------------------


def test_the_run_folder(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} == {
        *("config.yaml", "ds_config.json", "environment.json", "metrics.jsonl", "tensorboard", "checkpoints"),
        *("log.txt", "tokenizer.json", ".lock"),
    }
    assert list((finished / "tensorboard").glob("events.*"))
    assert (finished / "checkpoints" / "latest").read_text() == f"step_{STEPS:08d}\n"
    assert sorted(path.name for path in (finished / "checkpoints").glob("step_*")) == [
        *("step_00000030", "step_00000032"),
    ]
    expected = config.load("quickstart", [*TINY, *CUT])
    assert config.load(str(finished / "config.yaml")) == expected
    ds = json.loads((finished / "ds_config.json").read_text())
    assert ds["zero_optimization"]["stage"] == 2
    assert (ds["train_batch_size"], ds["train_micro_batch_size_per_gpu"], ds["gradient_accumulation_steps"]) == (
        8,
        8,
        1,
    )
    said = (finished / "log.txt").read_text()
    assert "step 2/32  loss " in said
    assert f"done: {STEPS} steps" in said


def test_the_keys_of_a_line(finished: Path) -> None:
    lines = [line for line in metrics(finished) if "loss" in line]
    assert [line["step"] for line in lines] == [1, *range(2, STEPS + 1, 2)]
    contract = {
        *("step", "samples_seen", "epoch", "task", "loss", "loss/itc", "loss/itm", "loss/mlm", "grad_norm"),
        *("lr/decay", "lr/no_decay", "seconds_per_step", "data_wait_fraction", "samples_per_second"),
        *("tokens_per_second", "padding_fraction", "model_tflops_per_second", "mfu", "memory_peak_bytes"),
        *("truncated_fraction", "truncated_words"),
        *("memory_allocated_bytes", "temperature", "skipped_steps", "bad_samples", "sample_keys"),
    }
    for line in lines:
        assert contract <= set(line)
        others = set(line) - contract
        assert others >= {"queue/image/filled", "queue/image/age_steps", "queue/text/filled", "queue/text/age_steps"}
        assert all(re.match(r"(queue|lr|itc|itm|mlm)/", key) for key in others), others
        assert line["mfu"] is None  # a CPU's peak is unknown
        assert line["samples_seen"] == 8 * line["step"]
        assert len(set(line["sample_keys"])) == 8
        weighted = line["loss/itc"] + line["loss/itm"] + line["loss/mlm"]
        assert line["loss"] == pytest.approx(weighted, rel=1e-5)
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_the_keys_of_an_evaluation(finished: Path) -> None:
    lines = [line for line in figures(finished) if "loss" not in line]
    assert [line["step"] for line in lines] == [16, 32]
    names = ("i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10")
    more = ("i2t_median_rank", "t2i_median_rank", "candidates", "chance_r1", "skipped")
    for line in lines:
        assert set(line) == {"step", *(f"eval/retrieval/{name}" for name in (*names, *more))}
        assert line["eval/retrieval/candidates"] == 32
        assert line["eval/retrieval/chance_r1"] == 1 / 32
        assert all(0 <= line[f"eval/retrieval/{name}"] <= 1 for name in names)


def test_tensorboard_holds_the_same(finished: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert {"loss", "lr/decay", "grad_norm", "eval/retrieval/i2t_r1", "samples_per_second"} <= set(tags["scalars"])
    assert any(tag.startswith("retrieval/") for tag in tags["images"])
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses(finished))


def test_evaluate_gives_the_figures_of_the_run(finished: Path, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    done = launch("evaluate", "--checkpoint", str(finished), "--batch", "8", "--json", str(file))
    assert done.returncode == DONE, done.stderr
    assert "i2t_r1" in done.stdout
    found = json.loads(file.read_text())
    last = figures(finished)[-1]
    assert found.pop("step") == last["step"]
    assert found == {key: value for key, value in last.items() if key != "step"}


# --- a cut changes nothing ---------------------------------------------------------------------------------


def train_here(ds_path: str, recipe: str, out: str, overrides: list[str]) -> int:
    """On each of several ranks: a whole run."""
    return train.train(Request(config.load(recipe, overrides), ds_path, Path(out)))


def same_state(one: Path, other: Path) -> None:
    """Masters, buffers, optimizer state and momentum averages, bit by bit."""
    equal(whole(one), whole(other))


@pytest.mark.parametrize("steps", [STEPS, STEPS + 2])
def test_an_evaluation_that_a_stop_left_out_is_made_up(finished: Path, tmp_path: Path, steps: int) -> None:
    """By the next start, before anything else, even if no step is left."""
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    lines = [line for line in metrics(out) if line["step"] < STEPS or "loss" in line]
    assert metrics(out)[-1] not in lines
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    overrides = [*TINY, *CUT, f"steps={steps}"]
    assert run_ranks(train_here, 1, "ds_configs/zero2.json", "quickstart", str(out), overrides) == [DONE]
    assert figures(out)[: len(figures(finished))] == figures(finished)
    assert (out / "log.txt").read_text().splitlines()[-1] == f"done: {steps} steps, in {out}"


def fails_to_evaluate(*given: Any) -> str:
    with mock.patch.object(Record, "evaluate", side_effect=MemoryError("of the GPU")):
        try:
            return str(train_here(*given))
        except MemoryError as error:
            return str(error)


def stops_at_its_last_step(*given: Any) -> int:
    def make_and_stop(*step: Any) -> train.StepResult:
        made = one_step(*step)
        os.kill(os.getpid(), signal.SIGUSR1)
        return made

    one_step = train.one_step
    with mock.patch.object(train, "one_step", make_and_stop):
        return train_here(*given)


def test_a_stop_at_the_last_step_leaves_the_evaluation_to_the_next_start(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    start = ("ds_configs/zero2.json", "quickstart", str(out), [*TINY, *CUT, f"steps={STEPS + 1}"])
    assert run_ranks(stops_at_its_last_step, 1, *start) == [STOPPED]
    assert f"stopped at step {STEPS + 1} by SIGUSR1" in (out / "log.txt").read_text()
    assert [line["step"] for line in figures(out) if "eval/retrieval/i2t_r1" in line] == [16, STEPS]
    assert run_ranks(train_here, 1, *start) == [DONE]
    assert [line["step"] for line in figures(out) if "eval/retrieval/i2t_r1" in line] == [16, STEPS, STEPS + 1]


def test_an_evaluation_that_fails_costs_no_step(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    start = ("ds_configs/zero2.json", "quickstart", str(out), [*TINY, *CUT, f"steps={STEPS + 1}"])
    for _ in range(2):  # in the step's own start, and made up
        assert run_ranks(fails_to_evaluate, 1, *start) == ["of the GPU"]
        assert (out / "checkpoints" / "latest").read_text() == f"step_{STEPS + 1:08d}\n"
    assert run_ranks(train_here, 1, *start) == [DONE]
    assert [line["step"] for line in figures(out) if "eval/retrieval/i2t_r1" in line] == [16, STEPS, STEPS + 1]


def cut_twice(world: int, out: Path, *arguments: str) -> None:
    """The run killed outright, then stopped on request, then left to finish."""
    code, said = stop_at(world, out, 8, signal.SIGKILL, *CUT, *arguments)
    assert code == -signal.SIGKILL, said
    code, said = stop_at(world, out, 16, signal.SIGTERM, *CUT, *arguments)
    assert "going on after step" in said
    assert code == STOPPED if world == 1 else code != DONE, said
    stopped = re.search(r"stopped at step (\d+) by SIGTERM", said)
    assert stopped is not None, said
    assert int(stopped[1]) < STEPS
    assert (out / "checkpoints" / "latest").read_text().strip() == f"step_{int(stopped[1]):08d}"
    run_whole(world, out, *CUT, *arguments)
    assert "going on after step" in (out / "log.txt").read_text()


def test_a_cut_run_equals_one_in_one_go(finished: Path, tmp_path: Path) -> None:
    cut_twice(1, tmp_path / "cut")
    assert figures(tmp_path / "cut") == figures(finished)
    same_state(*(out / "checkpoints" / f"step_{STEPS:08d}" for out in (finished, tmp_path / "cut")))


@pytest.mark.slow
def test_a_cut_run_of_two_ranks_equals_one_in_one_go(tmp_path: Path) -> None:
    """By the launchers that users have; `tests.faults` has every stage, more recipes and more ways to end."""
    run_whole(2, tmp_path / "whole", *CUT)
    cut_twice(2, tmp_path / "cut", *CUT)
    assert figures(tmp_path / "cut") == figures(tmp_path / "whole")
    same_state(*(tmp_path / each / "checkpoints" / f"step_{STEPS:08d}" for each in ("whole", "cut")))


def test_a_broken_checkpoint_is_gone_back_from(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    (out / "checkpoints" / f"step_{STEPS:08d}" / "rank_00000.safetensors").write_bytes(b"short")
    (out / "log.txt").unlink()
    assert run_ranks(train_here, 1, "ds_configs/zero2.json", "quickstart", str(out), [*TINY, *CUT]) == [DONE]
    said = (out / "log.txt").read_text()
    assert "going on after step 30" in said
    assert "rank_00000.safetensors is missing or not" in said
    assert figures(out) == figures(finished)
    same_state(*(each / "checkpoints" / f"step_{STEPS:08d}" for each in (finished, out)))


# --- the way it is spread changes nothing ------------------------------------------------------------------


def test_rates_are_logged_by_group_where_zero_parts_the_parameters(tmp_path: Path) -> None:
    rates_given = ("optim.lr=0.5", "optim.warmup=0", "optim.scale={temperature: 2}")
    overrides = [*TINY, "steps=1", "evaluation.limit=8", *rates_given]
    run_ranks(train_here, 1, "ds_configs/zero3.json", "quickstart", str(tmp_path / "run"), overrides)
    rates = {key: value for key, value in metrics(tmp_path / "run")[0].items() if key.startswith("lr/")}
    assert rates == {"lr/decay": 0.5, "lr/no_decay": 0.5, "lr/no_decay/temperature": 1.0}


def fp32_of(name: str, folder: Path) -> str:
    """The file in fp32."""
    tree = json.loads((ROOT / "ds_configs" / f"{name}.json").read_text())
    for key in ("bf16", "data_types"):
        tree.pop(key, None)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(tree))
    return str(path)


def words_only(folder: Path) -> str:
    """A recipe with nothing per rank: masked words, hard labels, no dropout."""
    tree = config.read_yaml(ROOT / "vlscale" / "recipes" / "quickstart.yaml")
    tree["objectives"] = {"mlm": {"soften": 0.0}}
    tree["optim"]["scale"] = {}
    path = folder / "words.yaml"
    path.write_text(yaml.safe_dump(tree))
    return str(path)


OF_ITC = ("objectives.itc.queue=32",)
SPREAD = [each for each in TINY if each not in OF_ITC] + ["family.dropout=0", "logging.sample_keys=true"]


def words_series(
    folder: Path, world: int, micro_batch: int, ds: str, steps: int
) -> tuple[list[float], list[list[str]]]:
    out = folder / f"{world}-{micro_batch}"
    overrides = [*SPREAD, f"steps={steps}", f"data.micro_batch={micro_batch}"]
    assert run_ranks(train_here, world, ds, words_only(folder), str(out), overrides) == [DONE] * world
    return losses(out), [line["sample_keys"] for line in metrics(out) if "loss" in line]


def test_ranks_and_micro_batches_leave_the_series_alone(tmp_path: Path) -> None:
    ds = fp32_of("zero2", tmp_path)
    expected, keys = words_series(tmp_path, 1, 8, ds, steps=8)
    assert len(expected) == 8
    for world, micro_batch in [(1, 2), (2, 4)]:
        found, found_keys = words_series(tmp_path, world, micro_batch, ds, steps=8)
        assert found == pytest.approx(expected, rel=1e-4)
        assert found_keys == keys


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero0", "zero1", "zero2", "zero3"])
def test_any_number_of_ranks_at_any_stage(name: str, tmp_path: Path) -> None:
    expected, keys = words_series(tmp_path, 1, 8, fp32_of("zero0", tmp_path), steps=20)
    ds = fp32_of(name, tmp_path)
    for world, micro_batch in [(2, 2), (4, 1)]:
        found, found_keys = words_series(tmp_path, world, micro_batch, ds, steps=20)
        assert found == pytest.approx(expected, rel=1e-4)
        assert found_keys == keys


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stages_agree(precision: str, tmp_path: Path) -> None:
    series = {}
    for name in ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"):
        ds = fp32_of(name, tmp_path) if precision == "fp32" else f"{ROOT}/ds_configs/{name}.json"
        out = tmp_path / "runs" / name
        overrides = [*TINY, "steps=20"]
        assert run_ranks(train_here, 2, ds, "quickstart", str(out), overrides) == [DONE, DONE]
        series[name] = losses(out)
        assert len(series[name]) == 20
        assert series[name] == pytest.approx(series["zero0"], rel=1e-4 if precision == "fp32" else 2e-2), name
