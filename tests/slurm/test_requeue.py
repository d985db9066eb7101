"""Jobs that must stop before they are done, on a real cluster: each comes home with what an undisturbed one has."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest

from tests import runs
from tests.slurm.cluster import Cluster
from tests.slurm.submitted import events, follow, job_of, ranks, submit, tiny, until

pytestmark = pytest.mark.slow
NODES = ["--nodes", "4", "--time", "60"]
WORDS = ["steps=300", "data.batch=32", "checkpoint.every=1000"]  # no checkpoint but those of the stops
# Few enough steps for the second start to end within a minute of the loss: one that ran longer was once cancelled by
# Slurm on the node that was back, and there would be three.
OFTEN = ["steps=80", "data.batch=32", "checkpoint.every=5", "checkpoint.keep=1"]
SAMPLES = "logging.sample_keys=true"


def seldom_asked(slurm: Cluster) -> None:
    """As on most clusters, Slurm asks a node for a sign of life every few minutes."""
    configuration = Path(slurm.environment()["SLURM_CONF"])
    configuration.write_text(re.sub("SlurmdTimeout=.*", "SlurmdTimeout=200", configuration.read_text()))
    slurm.run("scontrol", "reconfigure")


def began(out: Path) -> int:
    return sum(line["event"] == "began" for line in events(out)) if (out / "slurm" / "starts.jsonl").exists() else 0


def ended(out: Path) -> list[tuple[object, object]]:
    return [(line["code"], line["then"]) for line in events(out) if line["event"] == "ended"]


def until_step(out: Path, start: int) -> None:
    """Until the start of this number, from 1, has made a step or two."""
    until(lambda: began(out) == start, timeout=200)
    before = runs.last_step(out)
    until(lambda: runs.last_step(out) > before + 1, timeout=200)


@pytest.mark.timeout(900)
def test_told_to_stop_in_every_way(slurm: Cluster, tmp_path: Path) -> None:
    out, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    submit(slurm, "--local", "4", *tiny(undisturbed, *WORDS))
    with follow(slurm, *NODES, "--follow", "--lead", "40", *tiny(out, *WORDS)) as following:
        until_step(out, 1)
        job = job_of(out)
        slurm.run("scancel", "--signal=USR1", job)
        slurm.run("scancel", "--signal=USR2", job, timeout=60)  # while it saves, or a little later
        until(lambda: began(out) >= 2, timeout=100)
        time.sleep(1)
        told = began(out)  # where the second signal met the next start, that one has gone back, too
        until_step(out, told)
        slurm.run("sbatch", "--partition=urgent", "--exclusive", "--nodes=4", "--output=/dev/null", "--wrap=sleep 1")
        until_step(out, told + 1)
        slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=1")
        until(lambda: began(out) == told + 2, timeout=200)
        slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")
        said = following.communicate(timeout=300)[0]
    assert following.returncode == 0, said
    assert ended(out) == [*[(75, "requeue")] * (told - 1), (75, "stopped"), (75, "requeue"), (0, "done")], said
    assert runs.figures(out) == runs.figures(undisturbed)
    assert not ranks(slurm)


@pytest.fixture(scope="module")
def often(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What four ranks that nobody disturbs log."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    runs.run_whole(4, out, *OFTEN)
    return runs.figures(out)


@pytest.mark.timeout(600)
def test_ranks_that_slurm_ends_alone_start_again(slurm: Cluster, tmp_path: Path, often: list[dict[str, Any]]) -> None:
    out = tmp_path / "run"
    with follow(slurm, *NODES, "--follow", *tiny(out, *OFTEN)) as following:
        until(lambda: runs.last_step(out) >= 8, timeout=200)
        slurm.run("scancel", f"{job_of(out)}.0")
        said = following.communicate(timeout=300)[0]
    assert following.returncode == 0, said
    assert ended(out) == [(137, "requeue"), (0, "done")], said
    assert runs.figures(out) == often


@pytest.mark.timeout(600)
@pytest.mark.parametrize("node", ["node3", "node1"])  # the first has the batch script, the conductor and srun
def test_a_lost_node_is_waited_for(slurm: Cluster, tmp_path: Path, often: list[dict[str, Any]], node: str) -> None:
    out = tmp_path / "run"
    with follow(slurm, *NODES, "--follow", *tiny(out, *OFTEN)) as following:
        until(lambda: runs.last_step(out) >= 8, timeout=200)
        slurm.kill_node(node, notice=True)
        until(lambda: slurm.job(job_of(out))["JobState"] == "PENDING", timeout=100)
        assert not ranks(slurm)
        slurm.start_node(node)
        said = following.communicate(timeout=300)[0]
    assert following.returncode == 0, said
    assert began(out) == 2, said
    assert ended(out)[-1] == (0, "done")
    assert len(ended(out)) == (1 if node == "node1" else 2), said
    assert runs.figures(out) == often
    assert not ranks(slurm)


@pytest.mark.timeout(600)
def test_a_job_goes_on_without_the_lost_node(slurm: Cluster, tmp_path: Path) -> None:
    out = tmp_path / "run"
    seldom_asked(slurm)
    with follow(slurm, *NODES, "--follow", "--on_node_loss", "shrink", *tiny(out, *OFTEN, SAMPLES)) as following:
        until(lambda: runs.last_step(out) >= 8, timeout=200)
        slurm.kill_node("node3")
        said = following.communicate(timeout=400)[0]
    assert following.returncode == 0, said
    first, second = (line for line in events(out) if line["event"] == "ended")
    assert (first["then"], first["lost"], second["then"]) == ("again", ["node3"], "done"), said
    assert [line["nodes"] for line in events(out) if line["event"] == "began"][1] == ["node1", "node2"]
    assert "lost node3; going on with 2 node(s)" in said
    whole = tmp_path / "whole"
    submit(slurm, "--local", "4", *tiny(whole, *OFTEN, SAMPLES))
    assert [line["sample_keys"] for line in runs.metrics(out) if "loss" in line] == [
        line["sample_keys"] for line in runs.metrics(whole) if "loss" in line
    ]
    assert runs.losses(out) == pytest.approx(runs.losses(whole), rel=0.02)
    assert not ranks(slurm)


def test_a_lost_node_ends_the_job_where_that_is_asked(slurm: Cluster, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with follow(slurm, *NODES, "--follow", "--on_node_loss", "end", *tiny(out, *OFTEN)) as following:
        until(lambda: len(ranks(slurm)) == 4)
        slurm.kill_node("node3", notice=True)
        said = following.communicate(timeout=200)[0]
    assert following.returncode != 0, said
    assert re.search("--on_node_loss end was given", said)
    assert not slurm.run("squeue", "--noheader", "--states=PENDING,RUNNING")
    assert not ranks(slurm)
