"""The test cluster does what tests of real runs rely on."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.slurm.cluster import SLURM_CONF, Cluster, ClusterError

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent.parent


def submit(slurm: Cluster, script: str, *options: str) -> str:
    return slurm.run("sbatch", "--parsable", "--output=/dev/null", *options, "--wrap", script).strip()


def test_a_step_over_four_nodes(slurm: Cluster) -> None:
    said = slurm.run("srun", "--nodes=4", "--ntasks=4", "bash", "-c", "echo $SLURM_PROCID $SLURMD_NODENAME")
    assert sorted(said.split("\n")) == ["", "0 node1", "1 node2", "2 node3", "3 node4"]


def test_urgent_preempts_and_requeues_normal(slurm: Cluster) -> None:
    first = submit(slurm, 'test "$SLURM_RESTART_COUNT" || sleep 100', "--nodes=4")
    slurm.wait(first, "RUNNING")
    urgent = submit(slurm, "sleep 1", "--nodes=4", "--partition=urgent", "--exclusive")
    slurm.wait(urgent, "COMPLETED")
    assert slurm.wait(first, "COMPLETED", 30)["Restarts"] == "1"
    known = ["sacct", "--duplicates", "--jobs", first, "--allocations", "--noheader", "--parsable2", "--format=State"]
    until(lambda: slurm.run(*known).split() == ["PREEMPTED", "COMPLETED"])  # accounting comes after


def test_a_node_is_lost_and_comes_back(slurm: Cluster, tmp_path: Path) -> None:
    beats = tmp_path / "beats"
    beats.mkdir()
    beat = f"while sleep 0.1; do date >{beats}/$SLURMD_NODENAME; done"
    job = submit(slurm, f"srun bash -c '{beat}'", "--nodes=3")
    until(lambda: len(list(beats.iterdir())) == 3)
    slurm.kill_node("node2")
    for each in beats.iterdir():
        each.unlink()
    time.sleep(1)
    assert {each.name for each in beats.iterdir()} == {"node1", "node3"}
    assert slurm.failed() == ["node2"]
    slurm.wait(job, "PENDING", 60)  # requeued
    slurm.run("scancel", job)
    slurm.start_node("node2")
    slurm.kill_node("node2", notice=True)
    slurm.start_node("node2")
    assert "node2" in slurm.run("srun", "--nodelist=node2", "printenv", "SLURMD_NODENAME")


def test_nothing_is_left(tmp_path: Path) -> None:
    with Cluster(nodes=1) as cluster:
        folder = cluster.folder
        job = submit(cluster, f"setsid sleep 1000 & echo $! >{tmp_path / 'pid'}; wait")
        cluster.wait(job, "RUNNING")
        until((tmp_path / "pid").exists)
        processes = cluster.processes()
        assert {"munged", "mariadbd", "slurmdbd", "slurmctld", "slurmd", "sleep"} <= {each.name() for each in processes}
    assert not [each for each in processes if each.is_running()]
    assert not folder.exists()


@pytest.fixture
def clusters() -> Iterator[Path]:
    """A folder for clusters whose name leaves room for the names of their sockets, at most 107 letters."""
    with tempfile.TemporaryDirectory(prefix="clusters-") as folder:
        yield Path(folder)


def test_daemons_end_with_a_process_that_was_killed(tmp_path: Path, clusters: Path) -> None:
    command = [sys.executable, "-m", "tests.slurm", "--nodes=1", "--", "bash", "-c", f"touch {tmp_path / 'up'}; cat"]
    environment = {**os.environ, "TMPDIR": str(clusters)}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.PIPE) as program:
        try:
            until((tmp_path / "up").exists, 60)
            below = psutil.Process(program.pid).children(recursive=True)
        finally:
            program.kill()
    assert len(below) >= 12  # five machines, their daemons, bash and cat
    assert not psutil.wait_procs(below, timeout=20)[1]
    assert not list(clusters.iterdir())


def test_a_daemon_that_dies_says_why(monkeypatch: pytest.MonkeyPatch, clusters: Path) -> None:
    wrong = SLURM_CONF.replace("SchedulerType=sched/backfill", "SchedulerType=sched/by_colour")
    monkeypatch.setattr("tests.slurm.cluster.SLURM_CONF", wrong)
    monkeypatch.setattr("tempfile.tempdir", str(clusters))
    with pytest.raises(ClusterError, match=r"^slurmctld does not work; it said: .*fatal"), Cluster(nodes=1):
        pass
    assert not list(clusters.iterdir())


def until(true: Callable[[], object], timeout: float = 30) -> None:
    end = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)
