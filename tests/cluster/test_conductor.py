"""The life of a job, on machines that exist in a test alone."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.cluster.jobs import job
from vlscale.cluster import conductor, records
from vlscale.cluster.conductor import First, Start
from vlscale.cluster.verdict import Ending

NODES = ("node1", "node2", "node3", "node4")


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """Of this process, as they were before a conductor took them."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@dataclass
class Machines:
    """Four nodes, on which each start of the ranks ends as it is told to."""

    endings: list[int | Callable[[], int]]  # the code of each start, or what happens in it
    restart: int = 0
    gone: tuple[str, ...] = ()
    over: bool = False  # out of time
    step_cancelled: bool = False  # the first start's
    goes_on: bool = False  # whatever the conductor was told
    queue: bool = True  # else started again at once
    refuses: str = ""
    starts: list[Start] = field(default_factory=list)
    deeds: list[str] = field(default_factory=list)

    def nodes(self) -> tuple[str, ...]:
        return NODES

    def begin(self, start: Start) -> Machines:
        self.starts.append(start)
        (start.logs / "rank_00002.txt").write_text("all is well\nout of memory\n")
        self.waited = False
        return self

    def wait(self, timeout: float) -> int:
        if not self.waited:
            self.waited = True
            raise subprocess.TimeoutExpired("srun", timeout)
        ending = self.endings.pop(0)
        return ending if isinstance(ending, int) else ending()

    def first(self, start: Start) -> First | None:
        return First(2, "Exited with exit code 4")

    def cancelled(self, start: Start) -> bool:
        return self.step_cancelled and start is self.starts[0]

    def lost(self, nodes: Sequence[str], ask: bool) -> tuple[str, ...]:
        return tuple(node for node in nodes if node in self.gone)

    def tell(self, number: int) -> None:
        self.deeds.append(f"told {signal.Signals(number).name}")

    def ending(self) -> Ending:
        return "limit" if self.over else "" if self.goes_on else "other"

    def keep(self, nodes: Sequence[str], queued: bool) -> None:
        self.deeds.append(f"keep {','.join(nodes)}{' in the queue' if queued else ''}")

    def give_up(self) -> None:
        self.deeds.append("give up")

    def requeue(self, lost: Sequence[str]) -> bool:
        if self.refuses:
            raise subprocess.CalledProcessError(1, "scontrol", stderr=self.refuses.encode())
        self.deeds.append(f"requeue without {','.join(lost)}" if lost else "requeue")
        self.restart += not self.queue
        return not self.queue


def told(number: signal.Signals, code: int) -> Callable[[], int]:
    """The conductor gets a signal, and then the ranks end."""

    def ending() -> int:
        os.kill(os.getpid(), number)
        return code

    return ending


def saving(out: Path, step: int, code: int) -> Callable[[], int]:
    """The ranks write a checkpoint before they end."""

    def ending() -> int:
        (out / "checkpoints").mkdir(exist_ok=True)
        (out / "checkpoints" / "latest").write_text(f"step_{step:08d}\n")
        return code

    return ending


def verdicts(out: Path) -> list[str]:
    return [line["then"] for line in records.starts(out / "slurm") if line["event"] == "ended"]


def test_done_at_once(tmp_path: Path) -> None:
    machines = Machines([0])
    assert conductor.run(job(tmp_path, nodes=4), machines) == 0
    assert (machines.deeds, verdicts(tmp_path)) == ([], ["done"])
    began, ended = records.starts(tmp_path / "slurm")
    assert (began["event"], began["start"], began["nodes"]) == ("began", "local_0_0", list(NODES))
    assert (ended["event"], ended["code"], ended["why"]) == ("ended", 0, "all steps are done")
    assert "rank" not in ended


def test_ranks_that_saved_put_the_job_back(tmp_path: Path) -> None:
    machines = Machines([saving(tmp_path, 3, 75)], restart=1)
    assert conductor.run(job(tmp_path, nodes=4), machines) == 75
    assert (machines.deeds, verdicts(tmp_path)) == (["requeue"], ["requeue"])
    assert records.starts(tmp_path / "slurm")[-1]["checkpoint"] == "step_00000003"


def test_without_a_queue_they_start_again_as_often_as_allowed(tmp_path: Path) -> None:
    machines = Machines([saving(tmp_path, step, 75) for step in range(1, 9)], queue=False)
    assert conductor.run(job(tmp_path, nodes=4, requeue=3), machines) == 75
    assert len(machines.starts) == 4
    assert verdicts(tmp_path) == ["requeue"] * 3 + ["stopped"]
    assert len({start.logs for start in machines.starts}) == 4


def test_a_job_that_slurm_itself_put_back_too_often_does_not_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machines = Machines([], restart=4)
    assert conductor.run(job(tmp_path, nodes=4, requeue=3), machines) == 75
    assert "was put back into the queue 4 times, --requeue allows fewer: stopped" in capsys.readouterr().out
    assert records.starts(tmp_path / "slurm") == []


def test_no_headway_ends_it(tmp_path: Path) -> None:
    """A job that is out of time again and again before its first new checkpoint would go on so for ever."""
    saving(tmp_path, 3, 75)()
    machines = Machines([75, 75, 75], queue=False)
    assert conductor.run(job(tmp_path, nodes=4), machines) == 75
    assert verdicts(tmp_path) == ["requeue", "failed"]
    assert "came no further than the start before it" in records.starts(tmp_path / "slurm")[-1]["why"]


def test_two_starts_without_a_first_checkpoint_end_it_too(tmp_path: Path) -> None:
    machines = Machines([75, 75, 75, 0], queue=False)
    assert conductor.run(job(tmp_path), machines) == 75
    assert verdicts(tmp_path) == ["requeue", "failed"]


def test_checkpoints_in_a_store_are_taken_for_granted(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("checkpoint: {to: 's3://bucket/run'}\n")
    machines = Machines([75, 75, 75, 0], queue=False)
    assert conductor.run(job(tmp_path), machines) == 0
    assert verdicts(tmp_path) == ["requeue", "requeue", "requeue", "done"]


def test_what_slurm_ends_is_slurms_to_put_back(tmp_path: Path) -> None:
    machines = Machines([told(signal.SIGTERM, 75)])
    assert conductor.run(job(tmp_path, nodes=4), machines) == 75
    assert (machines.deeds, verdicts(tmp_path)) == (["told SIGTERM"], ["stopped"])


def test_the_time_limit_puts_it_back_though_slurm_ends_it(tmp_path: Path) -> None:
    machines = Machines([told(signal.SIGTERM, 75)], over=True)
    conductor.run(job(tmp_path, nodes=4), machines)
    assert (machines.deeds, verdicts(tmp_path)) == (["told SIGTERM", "requeue"], ["requeue"])


def test_a_signal_to_the_conductor_alone_is_not_slurms_end_of_the_job(tmp_path: Path) -> None:
    machines = Machines([told(signal.SIGTERM, 75)], goes_on=True)
    conductor.run(job(tmp_path, nodes=4), machines)
    assert verdicts(tmp_path) == ["requeue"]


def test_a_signal_to_save_is_no_end_of_the_job(tmp_path: Path) -> None:
    machines = Machines([told(signal.SIGUSR2, 75)])
    conductor.run(job(tmp_path, nodes=4), machines)
    assert machines.deeds == ["told SIGUSR2", "requeue"]


def test_a_rank_that_fails_is_named_with_its_last_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    machines = Machines([4])
    assert conductor.run(job(tmp_path, nodes=4), machines) == 4
    said = capsys.readouterr().out
    assert "rank 2 failed first (Exited with exit code 4); its last lines" in said
    assert "    out of memory" in said
    line = records.starts(tmp_path / "slurm")[-1]
    assert (line["then"], line["rank"], line["said"]) == ("failed", 2, "Exited with exit code 4")


@pytest.mark.parametrize(
    ("gone", "batch", "left"),
    [
        (("node3",), 24, ("node1", "node2", "node4")),  # 24 divides by 3 x 2 ranks
        (("node3",), 8, ("node1", "node2")),  # 8 does not divide by 3
        (("node2", "node3"), 8, ("node1", "node4")),
        (("node2", "node3", "node4"), 8, ("node1",)),
    ],
)
def test_it_shrinks_to_the_most_nodes_whose_batch_divides(
    gone: tuple[str, ...], batch: int, left: tuple[str, ...], tmp_path: Path
) -> None:
    machines = Machines([137, 0], gone=gone)
    run = job(tmp_path, batch=batch, micro_batch=1, nodes=4, tasks_per_node=2, on_node_loss="shrink")
    assert conductor.run(run, machines) == 0
    assert [start.nodes for start in machines.starts] == [NODES, left]
    assert machines.deeds == [f"keep {','.join(left)}"]
    assert verdicts(tmp_path) == ["again", "done"]
    assert records.starts(tmp_path / "slurm")[1]["lost"] == list(gone)


def test_ranks_that_slurm_ended_alone_start_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    machines = Machines([saving(tmp_path, 5, 137), 0], step_cancelled=True, queue=False)
    assert conductor.run(job(tmp_path, nodes=4), machines) == 0
    assert verdicts(tmp_path) == ["requeue", "done"]
    assert "failed first" not in capsys.readouterr().out


def test_a_lost_node_is_waited_for(tmp_path: Path) -> None:
    machines = Machines([137], gone=("node3",))
    assert conductor.run(job(tmp_path, nodes=4), machines) == 137
    assert machines.deeds == ["requeue without node3"]


def test_a_lost_node_is_the_end_where_that_was_asked_for(tmp_path: Path) -> None:
    run = job(tmp_path, nodes=4, on_node_loss="end")
    machines = Machines([137], gone=("node3",))
    assert conductor.run(run, machines) == 137
    assert (machines.deeds, verdicts(tmp_path)) == (["give up"], ["failed"])
    put_back = Machines([], restart=1)  # by Slurm, which did not ask
    assert conductor.run(run, put_back) == 4
    assert put_back.starts == []


def test_later_starts_go_on_also_after_resume_never(tmp_path: Path) -> None:
    machines = Machines([saving(tmp_path, 1, 75), 0], queue=False)
    assert conductor.run(job(tmp_path, nodes=4), machines) == 0
    given = [start.command[start.command.index("--resume") + 1] for start in machines.starts]
    assert given == ["never", "auto"]
    put_back = Machines([0], restart=1)
    conductor.run(job(tmp_path, nodes=4), put_back)
    assert "never" not in put_back.starts[0].command


def test_a_queue_that_refuses_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert conductor.run(job(tmp_path, nodes=4), Machines([75], refuses="Access denied\n")) == 75
    said = capsys.readouterr().out
    assert "Slurm does not take that (Access denied); `slurm/submit.py requeue" in said


def test_last_lines(tmp_path: Path) -> None:
    path = tmp_path / "rank_00000.txt"
    assert conductor.last_lines(path) == []
    path.write_bytes(b"x" * 100_000 + b"\n" + b"".join(b"line %d\n" % number for number in range(50)) + b"\xff half")
    assert conductor.last_lines(path, 2) == ["line 49", "\ufffd half"]
    assert len(conductor.last_lines(path)) == conductor.LAST_LINES
