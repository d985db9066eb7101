"""`python slurm/submit.py` on a real cluster."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests import runs
from tests.runs import ROOT
from tests.slurm.cluster import Cluster
from tests.slurm.submitted import events, follow, job_of, ranks, submit, tiny, until

pytestmark = pytest.mark.slow
ISSUE = ["--ds_config", "ds_configs/zero2.json", "--recipe", "quickstart", "steps=40"]


@pytest.mark.parametrize("stage", [2, 3])
def test_four_nodes_train_as_four_processes(slurm: Cluster, tmp_path: Path, stage: int) -> None:
    here, there = str(tmp_path / "here"), str(tmp_path / "there")
    steps = 40 if stage == 2 else 8
    run = ISSUE if stage == 2 else ["--ds_config", "ds_configs/zero3.json", *runs.TINY, f"steps={steps}"]
    said = submit(slurm, "--nodes", "4", "--follow", "--", *run, "--out", there)
    assert "RUNNING on node[1-4]" in said
    assert f"step {steps}/{steps}  loss" in said
    submit(slurm, "--local", "4", "--", *run, "--out", here)
    assert runs.figures(tmp_path / "there") == runs.figures(tmp_path / "here")
    assert runs.last_step(tmp_path / "there") == steps


def test_a_sweep_is_one_array_with_a_table(slurm: Cluster, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    words = ["--sweep", "optim.lr=1e-4,3e-4", "seed=1,2", "--follow", *tiny(out, "steps=4")]
    said = submit(slurm, *words)
    names = ["optim.lr=1e-4,seed=1", "optim.lr=1e-4,seed=2", "optim.lr=3e-4,seed=1", "optim.lr=3e-4,seed=2"]
    assert [run["name"] for run in json.loads((out / "sweep.json").read_text())["runs"]] == names
    numbers = [job_of(out / name) for name in names]
    assert [number.partition("_")[2] for number in numbers] == ["0", "1", "2", "3"]
    assert len({number.partition("_")[0] for number in numbers}) == 1
    table = submit(slurm, "status", str(out))
    assert said.endswith(table)
    head, *rows = (line.split() for line in table.splitlines())
    assert head[:6] == ["run", "job", "state", "starts", "step", "loss"]
    losses = [f"{runs.losses(out / name)[-1]:.4g}" for name in names]
    assert [row[:6] for row in rows] == [
        [name, number, "done", "1", "4/4", loss] for name, number, loss in zip(names, numbers, losses, strict=True)
    ]
    assert len({tuple(runs.losses(out / name)) for name in names}) == 4
    again = submit(slurm, *words)
    assert again.count("nothing") == 4
    assert not slurm.run("squeue", "--noheader")


def test_a_run_is_looked_after(slurm: Cluster, tmp_path: Path) -> None:
    out, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    words = ["steps=60", "checkpoint.every=1000"]
    with follow(slurm, "--nodes", "2", "--follow", *tiny(out, *words)) as following:
        until(lambda: runs.last_step(out) >= 1)
        assert "RUNNING" in submit(slurm, "status", str(out))
        assert "goes back into the queue" in submit(slurm, "requeue", str(out))
        until(lambda: len([line for line in events(out) if line["event"] == "began"]) == 2)
        stopped = runs.last_step(out)
        until(lambda: runs.last_step(out) > stopped)
        assert "cancelled" in submit(slurm, "cancel", str(out))
        said = following.communicate(timeout=120)[0]
    assert following.returncode == 75, said
    assert "CANCELLED" in said
    assert [line["then"] for line in events(out) if line["event"] == "ended"] == ["requeue", "stopped"]
    assert 0 < stopped < runs.last_step(out) < 60
    slurm.idle()
    assert "stopped" in submit(slurm, "status", str(out))
    assert "rank(s) on node1, node2" in submit(slurm, "logs", str(out))
    assert "step " in submit(slurm, "logs", str(out), "--rank", "0", "--lines", "3")
    assert "has no such rank" in submit(slurm, "logs", str(out), "--rank", "2", code=2)
    assert "in the queue again" in submit(slurm, "requeue", str(out))
    slurm.wait(job_of(out), "COMPLETED", 120)
    assert "60/60" in submit(slurm, "status", str(out))
    assert "all steps are done" in submit(slurm, "requeue", str(out), code=2)
    assert "no job in the queue" in submit(slurm, "cancel", str(out), code=2)
    submit(slurm, "--local", "2", *tiny(undisturbed, *words))
    assert runs.figures(out) == runs.figures(undisturbed)


def test_mistakes_are_told_before_anything_is_queued(slurm: Cluster, tmp_path: Path) -> None:
    out = tmp_path / "run"

    def told(*words: str) -> str:
        said = submit(slurm, *words, code=2)
        assert len(said.splitlines()) == 1, said
        assert not out.exists()
        assert not slurm.run("squeue", "--noheader")
        return said

    assert "did you mean 'normal'" in told("--partition", "nromal", *tiny(out))
    assert "--nodes 8: partition normal has 4" in told("--nodes", "8", *tiny(out))
    assert "sbatch refuses the job: Invalid feature" in told("--constraint", "gold", *tiny(out))
    assert "did you mean 'quickstart'" in told("--", "--out", str(out), "--recipe", "quickstrat")
    (tmp_path / "file").touch()
    assert "--out" in told(*tiny(tmp_path / "file" / "run"))
    submit(slurm, "--sbatch", "hold", *tiny(out))
    assert "is job" in submit(slurm, *tiny(out), code=2)
    assert "waits in the queue already" in submit(slurm, "requeue", str(out), code=2)
    assert len(slurm.run("squeue", "--noheader").splitlines()) == 1


def test_a_rank_that_is_killed_is_named(slurm: Cluster, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with follow(slurm, "--nodes", "2", "--follow", *tiny(out, "steps=100000")) as following:
        until(lambda: runs.last_step(out) >= 2)
        victim = next(each for each in ranks(slurm) if each.environ()["SLURM_PROCID"] == "1")
        victim.send_signal(signal.SIGKILL)
        said = following.communicate(timeout=120)[0]
    assert following.returncode == 137, said
    assert "rank 1 failed first (Killed)" in said
    assert slurm.wait(job_of(out), "FAILED")["ExitCode"] == "137:0"
    assert not ranks(slurm)


def test_a_rank_that_ends_alone_says_its_last_lines(slurm: Cluster, tmp_path: Path) -> None:
    out, profile = tmp_path / "run", tmp_path / "profile.yaml"
    fails = 'test $SLURM_PROCID = 0 || { echo "no disk here"; exit 3; }; exec "$@"'
    profile.write_text(f"container: [sh, -c, '{fails}', container]\n")
    said = submit(slurm, "--nodes", "2", "--cluster", str(profile), "--follow", *tiny(out), code=3)
    assert "rank 1 failed first (Exited with exit code 3)" in said
    assert "    no disk here\n" in said
    assert slurm.wait(job_of(out), "FAILED")["ExitCode"] == "3:0"
    assert not ranks(slurm)


def test_later_edits_do_not_touch_a_queued_job(slurm: Cluster, tmp_path: Path) -> None:
    checkout, out = tmp_path / "checkout", tmp_path / "run"
    for part in ("vlscale", "launchers", "ds_configs", "slurm"):
        shutil.copytree(ROOT / part, checkout / part, ignore=shutil.ignore_patterns("__pycache__"))
    git = ("git", "-c", "user.name=nobody", "-c", "user.email=nobody@example.org")
    for words in (["init", "--quiet"], ["add", "vlscale"], ["commit", "--quiet", "--message", "first"]):
        subprocess.run([*git, *words], cwd=checkout, check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], cwd=checkout, check=True, capture_output=True, text=True)
    with (checkout / "vlscale" / "__init__.py").open("a") as file:
        file.write("# before the job was queued\n")
    shutil.copy(checkout / "vlscale" / "recipes" / "quickstart.yaml", checkout / "mine.yaml")
    submit(slurm, "--sbatch", "hold", *tiny(out, "--recipe", "mine.yaml", "steps=2"), cwd=checkout)
    for path in [*checkout.rglob("*.py"), *checkout.rglob("*.yaml"), *checkout.rglob("*.json")]:
        path.write_text("raise SystemExit(9)")
    slurm.run("scontrol", "release", job_of(out))
    slurm.wait(job_of(out), {"COMPLETED", "FAILED"}, 120)
    assert runs.last_step(out) == 2, submit(slurm, "logs", str(out))
    record = json.loads((out / "environment.json").read_text())
    assert record["git_commit"] == commit.stdout.strip()
    assert "+# before the job was queued" in record["git_diff"]
    assert "SystemExit" not in record["git_diff"]
