"""Runs with steps that are skipped, what they write of them, and `--replay`, which makes such a step again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests import small_runs
from tests.distributed.spawn import run_ranks
from tests.runs import launch, metrics
from vlscale import build, config, replay, train
from vlscale.errors import VlscaleError

HUGE = 3e38  # a finite fp32 number, so the data plane lets it pass; squared it is none
STEPS, BAD = 8, 6
OTHERS = "{} does not go with --replay, which reads all of that in the run folder"


def trained(recipe: str, out: str, ds: str = "zero2") -> str:
    """A whole run; how it ended."""
    try:
        return str(train.train(build.Request(config.load(recipe), f"ds_configs/{ds}.json", Path(out))))
    except VlscaleError as error:
        return f"{error.exit_code}: {error}"


def replayed(where: str, file: str) -> str:
    try:
        return str(replay.show(where, file))
    except VlscaleError as error:
        return f"{error.exit_code}: {error}"


def bad_steps(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "bad_steps.jsonl").read_text().splitlines()]


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of two ranks and two micro-batches, one of whose steps has a sample that is not fit to train on."""
    folder = tmp_path_factory.mktemp("poisoned")
    sample = small_runs.samples_of(BAD)[3]  # the last rank's last micro-batch
    data = small_runs.write_data(folder / "data", {sample: HUGE})
    options = [f"steps={STEPS}", "data.micro_batch=1", "checkpoint.every=2"]
    recipe = small_runs.write_recipe(folder / "recipe.yaml", [*data, *options])
    assert run_ranks(trained, 2, recipe, str(folder / "run")) == ["0", "0"]
    return folder / "run", f"{sample:04d}"


def test_the_run_goes_on_and_names_the_sample(poisoned: tuple[Path, str]) -> None:
    out, key = poisoned
    (line,) = bad_steps(out)
    assert (line["step"], line["task"], line["grad_norm"]) == (BAD, "all", None)
    each = {(micro_batch["rank"], micro_batch["micro_batch"]): micro_batch for micro_batch in line["micro_batches"]}
    assert sorted(each) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    keys = [key for place in ((0, 0), (1, 0), (0, 1), (1, 1)) for key in each[place]["keys"]]
    assert keys == [f"{sample:04d}" for sample in small_runs.samples_of(BAD)]
    assert each[1, 1]["positions"] == [BAD * 4 - 1]
    folder = out.parent / "data"
    shard = f"{folder}/train-{int(key) * small_runs.SHARDS // small_runs.SAMPLES}.tar"
    assert each[1, 1]["shards"] == [shard]
    (suspect,) = each[1, 1]["suspects"]
    assert suspect == {"key": key, "shard": shard, "reason": "what it is fed holds 3e+38"}
    assert not any(each[place]["suspects"] for place in ((0, 0), (0, 1), (1, 0)))
    assert None in each[1, 1]["losses"].values()
    assert all(isinstance(loss, float) for loss in each[0, 0]["losses"].values())
    said = (out / "log.txt").read_text()
    assert said.count(f"step {BAD} is skipped") == 1
    assert f"suspected: sample '{key}' of shard {shard}: what it is fed holds 3e+38" in said
    lines = {line["step"]: line for line in metrics(out) if "loss" in line}
    assert [lines[step]["skipped_steps"] for step in range(1, STEPS + 1)] == [0] * 5 + [1] * 3
    assert (lines[BAD]["loss"], lines[BAD]["grad_norm"]) == (None, None)


@pytest.mark.parametrize("world", [1, 2])
def test_a_step_is_replayed_and_looked_into(poisoned: tuple[Path, str], tmp_path: Path, world: int) -> None:
    out, key = poisoned
    before, file = contents(out), tmp_path / "found.json"
    assert run_ranks(replayed, world, f"{out}:{BAD}", str(file)) == ["0"] * world
    assert contents(out) == before
    found = json.loads(file.read_text())
    assert (found["step"], found["from_step"], found["ranks"]) == (BAD, 4, world)
    assert (found["applied"], found["grad_norm"]) == (False, None)
    (line,) = bad_steps(out)
    again = [{name: each[name] for name in line["micro_batches"][0]} for each in found["micro_batches"]]
    if world == 2:
        assert again == line["micro_batches"]
    (broken,) = [each for each in found["micro_batches"] if key in each["keys"]]
    assert [suspect["key"] for suspect in broken["suspects"]] == [key]
    assert broken["module"].startswith("family.")
    assert [each["module"] for each in found["micro_batches"] if each is not broken] == [None] * 3
    assert len(found["gradients"]) > 10
    assert all(0 < wrong <= size for wrong, size in found["gradients"].values())


def test_any_step_can_be_replayed(poisoned: tuple[Path, str], tmp_path: Path) -> None:
    out = Path(shutil.copytree(poisoned[0], tmp_path / "run"))
    lines = {line["step"]: line for line in metrics(out) if "loss" in line}
    run = config.load(str(out / "config.yaml"))
    others = [replay._steps_were_others(out, 5, run.optim, steps, build.build_model(run)) for steps in (STEPS, 9)]
    assert others == [False, True]
    with (out / "bad_steps.jsonl").open("a") as file_of_steps:
        file_of_steps.write('{"step": 7, "rolled_ba')  # while the run writes it
    for step, start in ((1, 0), (2, 0), (5, 4), (8, 6)):
        file = tmp_path / f"{step}.json"
        run_ranks(replayed, 2, f"{out}:{step}", str(file))
        found = json.loads(file.read_text())
        assert (found["applied"], found["from_step"], found["gradients"]) == (True, start, {})
        assert found["grad_norm"] == lines[step]["grad_norm"]
        keys = [each["keys"] for each in found["micro_batches"]]
        assert [keys[place][0] for place in (0, 2, 1, 3)] == lines[step]["sample_keys"]


def test_what_cannot_be_replayed_is_told_in_a_sentence(poisoned: tuple[Path, str], tmp_path: Path) -> None:
    out, _ = poisoned
    file = str(tmp_path / "none.json")
    assert replayed(str(out), file).startswith("2: --replay ")
    assert (
        replayed(f"{tmp_path}:3", file)
        == f"2: --replay {tmp_path}:3: {tmp_path} is no run folder, for it has no config.yaml"
    )
    assert replayed(f"{out}:0", file).endswith("should be a run folder and a step, such as runs/mine:1234")
    nowhere = str(tmp_path / "none" / "found.json")
    assert replayed(f"{out}:6", nowhere) == f"2: --json {nowhere}: there is no folder {tmp_path / 'none'}"
    assert replayed(f"{out}:9", file) == f"2: --replay {out}:9: the run has 8 steps"
    for arguments, says in (
        (("--replay", f"{out}:6", "seed=2"), "'seed=2' cannot be changed here; the run's own configuration counts"),
        (("--replay", f"{out}:6", "--out", "b"), OTHERS.format("--out")),
        (("--replay", f"{out}:6", "--recipe=b"), OTHERS.format("--recipe=b")),
        (("--replay", f"{out}:6", "--dry_run"), OTHERS.format("--dry_run")),
        (("--json", file), "--json goes with --replay; a run's figures are in its metrics.jsonl"),
    ):
        done = launch("pretrain", *arguments)
        assert (done.returncode, done.stderr) == (2, f"pretrain.py: {says}\n")
    later = tmp_path / "later"
    shutil.copytree(out, later, ignore=shutil.ignore_patterns("step_*[024]"))
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (later / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] > 4))
    (said,) = run_ranks(replayed, 1, f"{later}:6", file)
    assert said == (
        f"5: {later} went on from another run's checkpoint at step 5 and has none of its own before step 6; "
        "replay a later step"
    )
    broken = tmp_path / "run"
    shutil.copytree(out, broken)
    for state in broken.glob("checkpoints/*/state.json"):
        state.write_text("{}")
    (said,) = run_ranks(replayed, 1, f"{broken}:6", file)
    assert said.startswith(f"5: {broken}/checkpoints holds 2 checkpoint(s), and none is usable")


@pytest.mark.slow
def test_after_a_roll_back_a_step_has_the_data_that_it_had(tmp_path: Path) -> None:
    data = small_runs.write_data(tmp_path / "data", {small_runs.samples_of(11)[2]: 1e4})
    spikes = ["spikes.window=8", "spikes.factor=30", "spikes.roll_back=true", "steps=14"]
    recipe = small_runs.write_recipe(tmp_path / "recipe.yaml", [*data, *spikes])
    out, file = tmp_path / "run", tmp_path / "found.json"
    assert run_ranks(trained, 1, recipe, str(out)) == ["0"]
    assert [line["rolled_back"] for line in bad_steps(out)] == [1]
    lines = {line["step"]: line for line in metrics(out) if "loss" in line}
    for step in (8, 9, 13):  # the run went back to 8
        assert run_ranks(replayed, 1, f"{out}:{step}", str(file)) == ["0"]
        found = json.loads(file.read_text())
        assert found["micro_batches"][0]["keys"] == lines[step]["sample_keys"]
        assert found["grad_norm"] == lines[step]["grad_norm"]


@pytest.mark.slow
@pytest.mark.parametrize("ds", ["zero3", "zero2_offload"])
def test_bad_steps_at_other_stages(tmp_path: Path, ds: str) -> None:
    sample = small_runs.samples_of(3)[1]
    data = small_runs.write_data(tmp_path / "data", {sample: HUGE})
    recipe = small_runs.write_recipe(tmp_path / "recipe.yaml", [*data, "steps=5", "data.micro_batch=1"])
    out, file = tmp_path / "run", tmp_path / "found.json"
    assert run_ranks(trained, 2, recipe, str(out), ds) == ["0", "0"]
    (line,) = bad_steps(out)
    assert line["step"] == 3
    suspects = [suspect["key"] for each in line["micro_batches"] for suspect in each["suspects"]]
    assert suspects == [f"{sample:04d}"]
    assert run_ranks(replayed, 2, f"{out}:3", str(file)) == ["0", "0"]
    found = json.loads(file.read_text())
    assert [each["module"] is not None for each in found["micro_batches"]] == [False, False, True, False]
    assert len(found["gradients"]) > 10


@pytest.mark.slow
def test_twenty_such_samples_end_the_run_with_a_checkpoint(tmp_path: Path) -> None:
    data = small_runs.write_data(tmp_path / "data", {small_runs.samples_of(step)[0]: HUGE for step in range(5, 25)})
    recipe = small_runs.write_recipe(tmp_path / "recipe.yaml", [*data, "steps=30", "checkpoint.every=100"])
    out = tmp_path / "run"
    done = launch("pretrain", "--recipe", recipe, "--out", str(out))
    assert done.returncode == 4, done.stdout + done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert "10 of the last 1000 steps had gradients that are not finite, and non_finite.budget=10 allows" in done.stderr
    assert [line["step"] for line in bad_steps(out)] == list(range(5, 15))
    assert (out / "checkpoints" / "latest").read_text() == "step_00000014\n"
    (said,) = run_ranks(trained, 1, recipe, str(out))
    assert said.startswith("4: 11 of the last 1000 steps"), said  # the same command: the budget is spent
    small_runs.write_recipe(tmp_path / "recipe.yaml", [*data, "steps=30", "non_finite.budget=100"])
    assert run_ranks(trained, 1, recipe, str(out)) == ["0"]
    assert [line["step"] for line in bad_steps(out)] == list(range(5, 25))
    done = launch("pretrain", "--replay", f"{out}:24")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"step 24 of {out}, task 'all': skipped, norm of the gradients not finite" in done.stdout
    assert "first output that is not finite: family." in done.stdout
