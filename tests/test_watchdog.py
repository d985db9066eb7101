"""A hang ends: real ranks that sleep, stop or die, and what is left of them to read."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests import runs
from tests.distributed import spawn
from tests.runs import TINY
from vlscale import distributed, run_folder
from vlscale import watchdog as watchdog_module
from vlscale.collectives import Collectives
from vlscale.data.options import DataConfig
from vlscale.errors import DataError, TrainingError
from vlscale.options import WatchdogConfig
from vlscale.watchdog import Report, Watchdog, limits, patience, verdict

LIMIT, GRACE, REAL_LIMIT = 3.0, 2.0, 10  # seconds; this machine may be busy
HUNG = TrainingError.exit_code


def train(folder: Path, harms: dict[int, str], workers: Sequence[str] = ()) -> None:
    """Five steps of one collective each, with the watchdog of a run; a rank comes to harm in the third."""
    rank = distributed.rank()
    watchdog_module.GRACE = GRACE
    sys.stderr = open(folder / f"rank_{rank}.err", "w", buffering=1)  # noqa: SIM115 (the process's own)
    distributed.barrier()
    with Watchdog(WatchdogConfig(start=LIMIT, step=LIMIT), folder) as watchdog:
        watchdog.listen(folder)
        watchdog.workers = lambda: list(workers)
        for step in range(1, 6):
            watchdog.at("step", step)
            if step == 3 and rank in harms:
                come_to_harm(harms[rank], watchdog)
            distributed.sum_(torch.ones(4))
            watchdog.at("data", step + 1)
    (folder / f"rank_{rank}.done").touch()


def come_to_harm(how: str, watchdog: Watchdog) -> None:
    if how == "sleeps":
        time.sleep(600)
    elif how == "waits for data":
        watchdog.at("data", 3)
        time.sleep(600)
    elif how == "evaluates":  # longer than the limit, a batch at a time
        for _ in range(12):
            time.sleep(LIMIT / 8)
            watchdog.beat()
    elif how == "stops":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif how == "dies":
        os.kill(os.getpid(), signal.SIGKILL)


class Ended:
    """Ranks that were waited for: their exit codes (None = still there) and what they said."""

    def __init__(self, folder: Path, harms: dict[int, str], workers: Sequence[str] = ()) -> None:
        self.folder = folder
        processes, pipes = spawn._start(train, 2, (folder, harms, workers), cuda=False)
        try:
            self.seconds, self.codes = self.join(processes, harms)
        finally:
            for process in processes:
                process.kill()
                process.join()
            for pipe in pipes:
                pipe.close()

    def join(self, processes: list[Any], harms: dict[int, str]) -> tuple[float, list[int | None]]:
        """Seconds between the first and the last end of those that can end."""
        ends = []
        for rank in sorted(range(2), key=lambda rank: harms.get(rank, "") == "stops"):
            processes[rank].join(0 if harms.get(rank) == "stops" else 60)
            ends.append(time.monotonic())
        return ends[-1] - ends[0], [process.exitcode for process in processes]

    def report(self, rank: int) -> tuple[Report, str]:
        text = (self.folder / "hangs" / f"rank_{rank:05d}.txt").read_text()
        return Report(**json.loads(text.splitlines()[0])), text

    def verdict(self) -> str:
        return (self.folder / "hangs" / "verdict.txt").read_text()

    def said(self, rank: int) -> str:
        return (self.folder / f"rank_{rank}.err").read_text()


@pytest.mark.parametrize("sleeper", [0, 1])
def test_a_rank_that_sleeps_for_ever_ends_the_run(tmp_path: Path, sleeper: int) -> None:
    (tmp_path / "log.txt").write_text("step 2\n")
    ended = Ended(tmp_path, {sleeper: "sleeps"})
    assert ended.codes == [HUNG, HUNG]
    assert ended.seconds < GRACE
    for rank in (0, 1):
        report, text = ended.report(rank)
        assert (report.rank, report.step, report.phase) == (rank, 3, "step")
        assert LIMIT * 0.9 <= report.quiet < LIMIT + GRACE
        assert bool(report.waiting) == (rank != sleeper)
        assert "come_to_harm" in text if rank == sleeper else "all_reduce" in text  # every thread's stack
        assert "all_reduce (4,) torch.float32" in text  # the last collectives
    assert f"behind is rank {sleeper} (" in ended.verdict()
    assert ended.verdict() in ended.said(0)
    assert ended.said(1) == ""  # one rank speaks
    assert (tmp_path / "log.txt").read_text() == f"step 2\n{ended.verdict()}"


def test_a_rank_that_says_nothing_is_named(tmp_path: Path) -> None:
    ended = Ended(tmp_path, {0: "stops"})
    assert ended.codes == [None, HUNG]
    assert "rank 0 of 2 left no word" in ended.verdict()
    assert ended.verdict() in ended.said(1)


def test_a_dead_rank_is_named(tmp_path: Path) -> None:
    ended = Ended(tmp_path, {0: "dies", 1: "sleeps"})  # where nobody notices it by a broken connection
    assert ended.codes[0] == -signal.SIGKILL
    assert "rank 0 of 2 left no word" in ended.verdict()


def test_a_worker_that_hangs_is_named_with_its_sample(tmp_path: Path) -> None:
    ended = Ended(tmp_path, {1: "waits for data"}, ["loader worker 0 at sample 17 of a.tar"])
    assert ended.codes == [HUNG, HUNG]
    assert "behind is rank 1 (" in ended.verdict()
    assert "at step 3, data" in ended.verdict()
    assert "loader worker 0 at sample 17 of a.tar" in ended.verdict()


def test_a_long_evaluation_is_no_hang(tmp_path: Path) -> None:
    ended = Ended(tmp_path, {0: "evaluates", 1: "evaluates"})
    assert ended.codes == [0, 0]
    assert not (tmp_path / "hangs").exists()


class Noting(Watchdog):
    """Its end is noted instead of coming."""

    def _end(self, quiet: float) -> None:
        vars(self).setdefault("ended", []).append(quiet)
        self._closed.set()


def test_time_is_up_once() -> None:
    with Noting(WatchdogConfig(start=0.4, step=0.2), None) as watchdog:
        assert watchdog._closed.wait(30)
    assert len(vars(watchdog)["ended"]) == 1
    assert vars(watchdog)["ended"][0] >= 0.4


def test_how_long_a_rank_may_be_still() -> None:
    """The first step compiles, a checkpoint waits for another rank's disk: both may take as long as a start."""
    with Watchdog(WatchdogConfig(start=1800, step=600), None) as watchdog:
        found = []
        for at in (
            ("building", 0),
            ("evaluation", 6),  # that the last start did not come to
            ("step", 7),
            ("data", 8),
            ("step", 8),
            ("checkpoint", 8),
            ("evaluation", 8),
            ("going back", 8),
            ("step", 8),
        ):
            watchdog.at(*at)
            found.append(watchdog._limit())
    assert found == [1800, 1800, 1800, 600, 600, 1800, 600, 1800, 600]


@pytest.mark.parametrize(
    "train", [("s3://bucket/a.tar",), ("pipe:cat a.tar",), {"a": "a.tar", "b": ("http://b/b.tar",)}]
)
def test_a_store_that_is_away_is_waited_for(train: Any) -> None:
    """The data plane gives up first, for it says which store it is."""
    data = DataConfig(train=train, store_patience=1800, store_timeout=30)
    for run in (WatchdogConfig(), WatchdogConfig(start=10, step=10)):
        found = limits(run, data)
        assert min(found.start, found.step) > data.store_patience + data.store_timeout
        assert patience(found).total_seconds() > found.step
    assert limits(WatchdogConfig(start=0, step=0), data) == WatchdogConfig(start=0, step=0)
    assert limits(WatchdogConfig(), DataConfig(train=("data/*.tar",))) == WatchdogConfig()


def hang(file_system: str, folder: Path) -> None:
    """A run whose main thread and file system both hang, or whose words cannot be written."""
    sys.stderr = open(folder / "err", "w", buffering=1, errors="backslashreplace")  # noqa: SIM115
    watchdog_module.GRACE = 1.0
    Watchdog._others = lambda self, own: {own.rank: own}  # type: ignore[method-assign]
    with Watchdog(WatchdogConfig(start=1, step=1), folder) as watchdog:
        watchdog.listen(folder)
        watchdog.workers = lambda: ["sample \udcff"]
        watchdog.at("data", 1)
        if file_system == "hangs":
            Path.mkdir = lambda *_, **__: time.sleep(600)  # type: ignore[method-assign]
        if file_system == "fails":
            Watchdog._report = lambda self, quiet: 1 / 0  # type: ignore[method-assign, assignment, return-value]
        time.sleep(600)


@pytest.mark.parametrize(
    ("file_system", "says"),
    [("hangs", "in hang"), ("fails", "ZeroDivisionError"), ("takes it", "no sign of life for 1 s, so this run ends")],
)
def test_nothing_keeps_a_hung_run_alive(file_system: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("")
    ((process,), _) = spawn._start(hang, 1, (file_system, tmp_path), cuda=False)
    try:
        process.join(60)
        assert process.exitcode == HUNG
        assert says in (tmp_path / "err").read_text()
        assert ("sample ?" in (tmp_path / "log.txt").read_text()) == (file_system == "takes it")
    finally:
        process.kill()
        process.join()


def test_an_empty_folder_of_reports_ends_nobody(tmp_path: Path) -> None:
    """A file server may still show what has been moved away."""
    (tmp_path / "hangs").mkdir()
    (tmp_path / "hangs" / "rank_00001.txt").write_text("{}\n")
    with Noting(WatchdogConfig(start=2, step=2), tmp_path) as watchdog:
        watchdog.listen(tmp_path)
        assert not watchdog._told.wait(0.6)
        line = json.dumps(asdict(report(1, 7)))
        (tmp_path / "hangs" / "rank_00001.txt").write_text(f"{line}\n")
        assert watchdog._told.wait(30)


def test_a_suspended_process_is_not_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody looked in the meantime, and time in which nobody looks does not count."""
    hours = iter(range(0, 10**9, 3600))
    with monkeypatch.context() as patched:
        patched.setattr("vlscale.watchdog.time.monotonic", lambda: float(next(hours)))
        with Watchdog(WatchdogConfig(start=2, step=2), None) as watchdog:
            ended: list[float] = []
            patched.setattr(watchdog, "_end", ended.append)
            time.sleep(0.5)
    assert ended == []


def test_0_seconds_is_never() -> None:
    before = set(threading.enumerate())
    with Watchdog(WatchdogConfig(start=0, step=0), None):
        assert set(threading.enumerate()) <= before


def test_the_process_group_is_more_patient() -> None:
    for given in (WatchdogConfig(), WatchdogConfig(start=1, step=7200), WatchdogConfig(start=0, step=0)):
        assert patience(given).total_seconds() > max(given.start, given.step) + 2 * watchdog_module.GRACE


def deepspeeds_patience(seconds: float) -> float:
    import torch.distributed as dist

    with Watchdog(WatchdogConfig(start=seconds, step=seconds), None):
        group = dist.new_group(range(dist.get_world_size()))  # so DeepSpeed asks for it
        return float(group._get_backend(torch.device("cpu")).options._timeout.total_seconds())


def test_deepspeeds_group_is_more_patient() -> None:
    """It makes one of its own, to train in; left alone that has torch's own time-out."""
    assert spawn.run_ranks(deepspeeds_patience, 1, 7200.0) == [7500.0]


def test_a_hang_at_the_start_does_not_spoil_the_folder(tmp_path: Path) -> None:
    (tmp_path / "hangs").mkdir()
    (tmp_path / "hangs" / "rank_00000.txt").write_text("the first")
    run_folder.check(tmp_path, {}, "auto")
    for number in (1, 2):
        run_folder.write(tmp_path, {}, {}, ["host"])
        assert not (tmp_path / "hangs").exists()
        assert (tmp_path / f"hangs_{number}").is_dir()
        (tmp_path / "hangs").mkdir()
    assert (tmp_path / "hangs_1" / "rank_00000.txt").read_text() == "the first"


def report(rank: int, begun: int, waiting: str = "", phase: str = "step") -> Report:
    return Report(rank, "node", 100 + rank, phase, 9, 60.0, begun, waiting, "vlscale/train.py:1 (f)", ("a worker",))


@pytest.mark.parametrize(
    ("reports", "world", "expected"),
    [
        ([report(0, 8, "all_reduce"), report(1, 7)], 2, "behind is rank 1 (node, process 101) at step 9, step"),
        ([report(0, 8), report(1, 8, "all_reduce")], 2, "behind is rank 0 ("),
        ([report(0, 8, phase="data"), report(1, 8, phase="data")], 2, "none of 2 rank(s) is behind the others; rank 0"),
        ([report(1, 8, "barrier")], 3, "ranks 0, 2 of 3 left no word"),
        ([report(rank, 7) for rank in range(6)] + [report(6, 8)], 7, "and 2 more, with 7 collectives begun where"),
    ],
)
def test_the_verdict(reports: list[Report], world: int, expected: str) -> None:
    sentence = verdict(reports, world, Path("OUT/hangs"))
    assert expected in sentence
    assert sentence.startswith("no sign of life for 60 s, so this run ends: ")
    assert sentence.endswith("; every thread's stack is in OUT/hangs")
    assert ("a worker" in sentence) == any(each.phase == "data" for each in reports)


def test_collectives_are_noted() -> None:
    noted = Collectives()

    def all_reduce(tensor: torch.Tensor, wait: float = 0) -> str:
        assert noted.waiting() == "all_reduce"
        time.sleep(wait)
        if wait > 0.05:
            raise RuntimeError("a lost connection")
        return "done"

    call = noted.recorded("all_reduce", all_reduce)
    assert call(torch.zeros(2, 3)) == "done"
    with pytest.raises(RuntimeError):
        call(torch.zeros(4), wait=0.1)
    assert [(each.number, each.what) for each in noted.last()] == [
        (1, ((2, 3), torch.float32)),
        (2, ((4,), torch.float32)),
    ]
    assert noted.waiting() == ""
    assert noted.begun == 2
    assert 0.1 <= noted.seconds < 0.5


def test_torch_is_left_as_it_was() -> None:
    import torch.distributed as dist

    before = dist.all_reduce, dist.all_gather_object
    with Watchdog(WatchdogConfig(start=0, step=0), None):
        assert dist.all_reduce is not before[0]
    assert (dist.all_reduce, dist.all_gather_object) == before


LAUNCHERS = {
    "deepspeed": [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", "2"],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"],
}


class Launch:
    """A run of real processes, of which one rank comes to harm in step 3, to its end."""

    def __init__(self, launcher: str, harm: str, out: Path) -> None:
        command = [*LAUNCHERS[launcher], f"--master_port={spawn.free_port()}", "tests/harmed.py", "--out", str(out)]
        options = (*TINY, "steps=5", "data.workers=1", f"watchdog.step={REAL_LIMIT}")
        environment = {**runs.environment(), "HARM": f"{harm}:1:3"}
        started: set[psutil.Process] = set()
        with (out.parent / "said.txt").open("wb") as said:
            process = subprocess.Popen(
                [*command, *options], cwd=runs.ROOT, env=environment, stdout=said, stderr=subprocess.STDOUT
            )
            started.add(psutil.Process(process.pid))
            end = time.monotonic() + 200
            while process.poll() is None and time.monotonic() < end:
                with contextlib.suppress(psutil.Error):
                    started |= set(psutil.Process(process.pid).children(recursive=True))
                time.sleep(0.2)
        ended = time.time()
        self.code = process.returncode
        self.left = psutil.wait_procs(started, timeout=5)[1]
        for each in self.left:
            each.kill()
        self.said = (out.parent / "said.txt").read_text()
        assert (out / "metrics.jsonl").exists(), self.said
        self.seconds = ended - (out / "metrics.jsonl").stat().st_mtime  # since step 2


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "code"), [("deepspeed", HUNG), ("torchrun", 1)])  # torchrun has a code of its own
def test_a_hang_of_a_real_run(launcher: str, code: int, tmp_path: Path) -> None:
    launch = Launch(launcher, "sleep", tmp_path / "run")
    assert launch.code == code, launch.said
    assert launch.seconds < REAL_LIMIT + 10 + 5  # the launchers look once a second, and take their time to go
    assert launch.left == []
    sentence = (tmp_path / "run" / "hangs" / "verdict.txt").read_text()
    assert "behind is rank 1 (" in sentence
    assert launch.said.count(sentence) == 1
    assert sentence in (tmp_path / "run" / "log.txt").read_text()
    for rank, where in enumerate(("all_reduce", "sleep")):
        text = (tmp_path / "run" / "hangs" / f"rank_{rank:05d}.txt").read_text()
        assert f" in {where}" in text
        assert "_watch" in text
        assert "loader worker 0 " in text


@pytest.mark.slow
def test_the_rank_that_failed_speaks_first(tmp_path: Path) -> None:
    launch = Launch("deepspeed", "data", tmp_path / "run")
    assert launch.code == DataError.exit_code, launch.said
    said = launch.said.index("harmed.py: the shard of this rank alone is unreadable")
    assert said < launch.said.index("rank 0 ends too: it lost another rank (Connection ")
    assert "Traceback" not in launch.said
    assert launch.left == []
