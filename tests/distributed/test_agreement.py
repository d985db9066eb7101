"""Ranks that are about to do different things are stopped, with a sentence, and do not hang."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.spawn import free_port, run_ranks
from tests.runs import ROOT, TINY, environment, last_step
from vlscale import agreement, distributed
from vlscale.errors import TrainingError


def disagree(differing: int) -> str:
    plans = distributed.StepPlans()
    plan = {"task": "all", "samples": "4"}
    plans.check(1, plan)
    if distributed.rank() == differing:
        plan["task"] = "words"
    try:
        plans.check(2, plan)
    except TrainingError as error:
        return str(error)
    return ""


def settings(steps: dict[int, str]) -> None:
    agreement.same_settings("what the ranks were told", {"steps": steps[distributed.rank()], "seed": "1"})


def test_a_plan_that_differs_names_the_ranks() -> None:
    said = run_ranks(disagree, 3, 1)
    assert len(set(said)) == 1
    assert "task is 'all' on rank 0, 2 but 'words' on rank 1" in said[0]
    assert "samples" not in said[0]
    assert run_ranks(disagree, 2, -1) == ["", ""]


def sentences() -> tuple[bool, bool]:
    return distributed.first_to_say("found by all"), distributed.first_to_say(f"found by {distributed.rank()}")


def test_a_sentence_is_said_once() -> None:
    said = run_ranks(sentences, 3)
    assert sorted(of_all for of_all, _ in said) == [False, False, True]
    assert [own for _, own in said] == [True, True, True]


def test_settings_that_differ_are_named() -> None:
    with pytest.raises(TrainingError, match="steps is '5' on rank 0 but '6' on rank 1;"):
        run_ranks(settings, 2, {0: "5", 1: "6"})
    run_ranks(settings, 2, {0: "5", 1: "5"})


def torchrun(out: Path, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    several = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    command = [sys.executable, *several, program, "--out", str(out), *TINY, *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=150, check=False
    )


@pytest.mark.slow
def test_a_rank_with_another_task_ends_the_run_with_4(tmp_path: Path) -> None:
    tasks = "tasks={all: {objectives: [itc, itm, mlm]}, words: {objectives: [mlm]}}"
    done = torchrun(tmp_path / "run", "tests/distributed/other_task.py", "--ds_config", "ds_configs/zero3.json", tasks)
    said = done.stdout + done.stderr
    assert "task is 'all' on rank 0 but 'words' on rank 1" in said, said
    assert "exitcode  : 4" in said, said
    assert last_step(tmp_path / "run") == 2  # steps 1 and 2 were made
