"""What is said of jobs, with a Slurm that answers what a test wants."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tests.cluster.jobs import job, load_submit
from vlscale.cluster import follow, queue, records, slurm, status, sweep
from vlscale.cluster.records import Job
from vlscale.errors import ConfigError

Answer = Callable[[Sequence[str]], str]
DOWN = "Unable to contact slurm controller (connect failure)"
FORGOTTEN = "scontrol failed: slurm_load_jobs error: Invalid job id specified"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A machine with Slurm, whose jobs are all RUNNING; what it was asked."""
    seen: list[list[str]] = []
    monkeypatch.setattr(slurm, "is_here", lambda: True)
    monkeypatch.setattr(slurm, "ask", lambda words: seen.append(list(words)) or "JobState=RUNNING Restarts=0")
    return seen


def says(monkeypatch: pytest.MonkeyPatch, answer: str | Exception) -> None:
    def ask(words: Sequence[str]) -> str:
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(slurm, "is_here", lambda: True)
    monkeypatch.setattr(slurm, "ask", ask)


def queued(out: Path, number: str = "7", **options: object) -> Job:
    return job(out, **options).queued_as(number, str(out / "slurm" / f"{number}_log.out"))


def ended(made: Job, then: str, code: int = 75, number: str | None = None) -> None:
    values = {"start": "7_0_0", "job": made.number if number is None else number, "code": code, "then": then}
    records.append(made.home, "began", {**values, "nodes": ["node1"], "checkpoint": ""})
    records.append(made.home, "ended", {**values, "why": "so"})


def swept(folder: Path, code: int = 0) -> list[Job]:
    """Two jobs of a sweep, which have ended with this code."""
    runs = sweep.variants(["seed=1,2"])
    sweep.write(folder, runs)
    made = [queued(folder / run.name, f"7_{index}") for index, run in enumerate(runs)]
    for each in made:
        ended(each, "failed" if code else "done", code)
    return made


def test_a_job_put_back_and_then_cancelled_is_cancelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = queued(tmp_path)
    ended(made, "requeue")
    says(monkeypatch, "JobState=PENDING")
    assert status.state(made) == "PENDING"
    says(monkeypatch, "JobState=CANCELLED")
    assert status.state(made) == "CANCELLED"
    ended(made, "stopped")
    assert status.state(made) == "stopped"
    assert status.state(replace(made, number="8")) == "CANCELLED"  # submitted again, and never started


def test_slurm_that_does_not_answer_is_not_an_empty_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queued(tmp_path)
    says(monkeypatch, slurm.SlurmError(f"scontrol failed: {DOWN}"))
    for deed in (queue.check_free, status.cancel, status.requeue, status.status):
        with pytest.raises(ConfigError, match="Unable to contact slurm controller"):
            deed(tmp_path)
    assert slurm.job("7") == {}  # for the conductor
    assert not slurm.is_gone("node1")
    says(monkeypatch, slurm.SlurmError(FORGOTTEN))
    queue.check_free(tmp_path)
    with pytest.raises(ConfigError, match="has no job in the queue"):
        status.cancel(tmp_path)


def test_of_what_a_command_says_the_last_line_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "sinfo"
    program.write_text(
        "#!/bin/sh\necho 'sinfo: error: resolve' >&2\necho 'sinfo: fatal: no configuration' >&2\nexit 1\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(ConfigError) as raised:
        slurm.check(None, 1)
    said = "sinfo failed: sinfo: fatal: no configuration; is this a login node of a Slurm cluster?"
    assert str(raised.value) == said


@pytest.mark.parametrize("command", ["cancel", "requeue", "follow"])
def test_a_machine_without_slurm(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queued(tmp_path)
    monkeypatch.setattr(slurm, "is_here", lambda: False)
    with pytest.raises(ConfigError, match=r"this machine has no Slurm .* run it on a login node"):
        load_submit().main([command, str(tmp_path)])


def test_a_running_job_that_may_not_go_back_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[list[str]]
) -> None:
    queued(tmp_path, requeue=0)
    with pytest.raises(ConfigError, match=r"as often as --requeue 0 allows, and runs on; `cancel` lets it save"):
        status.requeue(tmp_path)
    assert not any(words[0] == "scancel" for words in asked)
    queued(tmp_path, requeue=1)
    assert status.requeue(tmp_path) == 0
    assert ["scancel", "--signal=USR2", "7"] in asked


def test_logs_of_a_sweep_go_on_after_a_job_without(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = swept(tmp_path)
    Path(second.log).write_text("the end\n")
    assert status.logs(tmp_path, None, 5) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"==> {first.log} is not there: the job has not started yet, or has no such rank",
        f"==> {second.log}",
        "the end",
    ]


def test_logs_of_a_run_here_are_those_of_rank_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = job(tmp_path)
    made.write()
    ended(made, "done", 0)
    folder = made.home / records.LOGS / "7_0_0"
    folder.mkdir(parents=True)
    (folder / "rank_00000.txt").write_text("step 4\n")
    status.logs(tmp_path, None, 5)
    assert capsys.readouterr().out.splitlines() == [f"==> {folder / 'rank_00000.txt'}", "step 4"]


# --- followed ---


def test_a_run_is_followed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = queued(tmp_path)
    ended(made, "stopped")
    (tmp_path / "log.txt").write_text("step 1\nstep 2\n")
    monkeypatch.setattr(follow, "PAUSE", 0.01)
    says(monkeypatch, "JobState=FAILED")
    assert load_submit().main(["follow", str(tmp_path)]) == 75
    assert capsys.readouterr().out.splitlines() == ["step 1", "step 2", f"job 7 ({tmp_path.name}): FAILED"]


def test_of_several_jobs_those_that_fail_show_their_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for made in swept(tmp_path, code=3):
        Path(made.log).write_text(f"no disk for {made.number}\n")
    monkeypatch.setattr(follow, "PAUSE", 0.01)
    says(monkeypatch, "JobState=FAILED")
    assert status.watch(tmp_path) == 3
    said = capsys.readouterr().out.splitlines()
    assert said[:4] == [
        "job 7_0 (seed=1): FAILED",
        "    no disk for 7_0",
        "job 7_1 (seed=2): FAILED",
        "    no disk for 7_1",
    ]
    assert said[4].split()[:3] == ["run", "job", "state"]


@pytest.mark.usefixtures("asked")
def test_the_end_of_watching_is_130(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    queued(tmp_path)
    monkeypatch.setattr(follow.time, "sleep", interrupted)
    assert status.watch(tmp_path) == 130
    assert f"again: `slurm/submit.py follow {tmp_path}`" in capsys.readouterr().out


def test_a_run_here_cannot_be_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job(tmp_path).write()
    says(monkeypatch, "")
    with pytest.raises(ConfigError, match="has no job on Slurm that could be followed"):
        status.watch(tmp_path)


# --- submitted ---


@pytest.mark.parametrize(
    ("partition", "listed", "found"),
    [
        (None, "cpu (null)\nnormal* gpu:a100:4(S:0-1)\n", True),
        (None, "gpus gpu:4\nnormal* (null)\n", False),
        ("gpus", "gpus craynetwork:4,gpu:8\n", True),
        ("cpu", "cpu craynetwork:4\n", False),
    ],
)
def test_a_partition_with_gpus(
    partition: str | None, listed: str, found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    says(monkeypatch, listed)
    assert slurm.has_gpus(partition) is found
