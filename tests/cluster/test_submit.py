"""slurm/submit.py as a user types it, on a machine without Slurm."""

from __future__ import annotations

import itertools
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
import yaml

from tests.cluster.jobs import load_submit
from tests.runs import ROOT, TINY, environment, figures, last_step, run_whole
from vlscale import config
from vlscale.cluster import queue, records, slurm, snapshot, sweep
from vlscale.errors import ConfigError

RUN = ("--ds_config", "ds_configs/zero2.json", "--recipe", "quickstart", *TINY)


@pytest.fixture
def no_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment of a machine that has git and no sbatch."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("git", "uname"):
        (tools / name).symlink_to(shutil.which(name) or name)
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return {**environment(), "PATH": str(tools)}


def submit(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "slurm/submit.py", *arguments],
        cwd=ROOT,
        env=env or environment(),
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--ndes 4 --", "no option --ndes; did you mean '--nodes'?"),
        ("--nodes four --", "argument --nodes: invalid int value: 'four'"),
        ("--nodes 4 -- --recpe quickstart", "no option --recpe; did you mean '--recipe'?"),
        ("--recipe quickstart --nodes 4", "--recipe is for launchers/pretrain.py; write it after ` -- `"),
        ("--nodes 4 --out=x", "--out=x is for launchers/pretrain.py; write it after ` -- `"),
        ("--nodes 4 steps=40", "'steps=40' is for launchers/pretrain.py; write it after ` -- `"),
        ("-- --dry_run", "--dry_run goes before ` -- `"),
        ("-- --replay a:1", "--replay is for launchers/pretrain.py itself"),
        ("-- --nodes 4", "no option --nodes"),
        ("--nodes 0 --", "--nodes should be at least 1 (got 0)"),
        ("--requeue 0 --time soon --", "--time soon is no time"),
        ("--signal HUP --", "signal: should be 'USR1', 'USR2' or 'TERM' (got 'HUP')"),
        ("--cluster nowhere --", "--cluster nowhere: no such profile"),
        ("--cluster ./nowhere.yaml --", "--cluster ./nowhere.yaml: no such file"),
        ("stauts runs/mine", "no command stauts; did you mean 'status'?"),
        ("--sbatch --hold --", "write --sbatch hold"),
        ("--srun --mpi=none --", "write --srun=--mpi=none"),
        ("-N 4 -p gpu --", "-N is sbatch's; write --nodes 4"),
        ("--nodes 2 -pgpu --", "-p is sbatch's; write --partition gpu"),
        ("--signal SIGUSR1 --", "--signal: should be 'USR1', 'USR2' or 'TERM' (got 'SIGUSR1')"),
        ("--sbatch gres=gpu:4 --", "write --gpus_per_node"),
        ("--parallel 2 --", "--parallel is for the runs of a --sweep; leave it out"),
        ("-- --steps 40", "steps is an override; write steps=40"),
        ("-- --recipe quickstart --data.batch=64", "write data.batch=64"),
        ("--local 2 --partition gpu --", "--local 2 starts so many ranks here; leave out --partition"),
        ("--local 2 --exclusive --", "leave out --exclusive"),
        ("--local 0 --", "--local should be at least 1 (got 0)"),
        ("--local 2 --nodes 2 --", "--local 2 starts so many ranks here; leave out --nodes"),
        ("--local 2 --cluster gpu --", "leave out --cluster"),
        ("--local 2 --sweep seed=1,2 --", "--local runs one run at a time; leave out --sweep"),
        ("--nodes 2 -- --recipe quikstart", "no recipe 'quikstart'; did you mean 'quickstart'?"),
        ("--nodes 2 -- optim.lrr=1", "optim.lrr is not an option; did you mean 'lr'?"),
        ("--sweep optim.lrr=1,2 --", "optim.lrr is not an option; did you mean 'lr'?"),
        ("--sweep seed --", "--sweep seed: write KEY=VALUE,VALUE"),
        ("--nodes 2 --", "this machine has no Slurm (sbatch is not found); run it on a login node, or give --local N"),
        ("status nowhere", "nowhere holds no job of slurm/submit.py"),
        ("status", "the following arguments are required: RUN"),
        ("logs nowhere --rnk 2", "no option --rnk; did you mean '--rank'?"),
        ("cancel nowhere steps=3", "'steps=3' cannot be changed here"),
    ],
)
@pytest.mark.usefixtures("no_slurm")
def test_mistakes_in_words(arguments: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        load_submit().main(arguments.split())
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


def test_what_launchers_add_is_not_listed() -> None:
    with pytest.raises(ConfigError, match="no option --xyz; there is --account, ") as raised:
        load_submit().parse(["--xyz"])
    assert "--local_rank" not in str(raised.value)
    assert load_submit().parse(["--local_rank=0"]).local_rank == 0


def test_all_options_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load_submit().parse(["--help"])
    text = capsys.readouterr().out
    lines = text[text.index("\noptions:") :].splitlines()
    for line, after in itertools.pairwise(lines):
        if line.startswith("  --"):
            assert "  " in line.strip() or after.startswith(" " * 8), line
    assert "--on_node_loss replace|shrink|end" in text
    assert "modules, environment, setup, container and python" in text


def test_axes_of_a_sweep_may_be_given_apart() -> None:
    assert load_submit().parse(["--sweep", "a=1,2", "b=1", "--sweep", "c=3"]).sweep == ["a=1,2", "b=1", "c=3"]


def test_a_mistake_is_one_line_and_2(no_slurm: dict[str, str], tmp_path: Path) -> None:
    done = submit("--nodes", "2", "--", *RUN, "--out", str(tmp_path / "run"), env=no_slurm)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("submit.py: this machine has no Slurm (sbatch is not found)")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_dry_run_needs_no_slurm_and_leaves_nothing(no_slurm: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "a run"
    sweep = ("--sweep", "optim.lr=1e-4,3e-4")
    job = ("--nodes", "4", "--time", "30", "--partition", "gpu", "--lead", "60", "--requeue", "0")
    done = submit(*job, *sweep, "--dry_run", "--", *RUN, "--out", str(out), "steps=4", env=no_slurm)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "#!/bin/bash"
    for line in ("nodes=4", "time=30", "partition=gpu", "signal=USR2@60", "array=0-1%2", "no-requeue"):
        assert f"#SBATCH --{line}" in lines
    assert lines[-1].startswith("# srun --nodes=4 --ntasks=4 ")
    assert lines[-1].endswith(" steps=4 optim.lr=1e-4")
    assert "# 4 rank(s) on 4 node(s): a batch of 8 = 4 rank(s) x 1 micro-batch(es) of 2" in lines
    assert not out.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tools"]


@pytest.mark.usefixtures("no_slurm")
def test_a_dry_run_shows_the_words_of_the_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are those of job.json, which a run here writes."""
    out, recipe = tmp_path / "run", tmp_path / "mine.yaml"
    shutil.copy(ROOT / "vlscale" / "recipes" / "quickstart.yaml", recipe)
    run = ["--", *TINY, "--recipe", str(recipe), "--out", str(out), "steps=4"]
    main = load_submit().main
    assert main(["--nodes", "2", "--on_node_loss", "shrink", "--dry_run", *run]) == 0
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert f"--output={out}/slurm/logs/NUMBER_0_0/rank_%5t.txt" in words
    assert words[-1] == "data.micro_batch=4"
    assert main(["--local", "2", "--dry_run", *run]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("# here, 2 rank(s) on 1 node(s): a batch of 8 = 2 rank(s) x 1")
    here = shlex.split(said[1])
    assert words[-len(here) - 1 : -1] == here
    assert main(["--local", "2", "--dry_run", *run, "data.batching=cost", "data.tokens=4096"]) == 0
    assert "a batch of 8, in micro-batches of up to 4096 tokens" in capsys.readouterr().out
    given = here[here.index("--recipe") + 1]
    assert Path(given).parent.parent == out / "slurm" / "given"
    assert given == snapshot.keep(str(recipe), out / "slurm")


def test_a_dry_run_asks_slurm_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = {"--format=%P %F": "normal* 4/0/0/4\n", "--format=%P %G": "normal* gpu:a100:4\n"}
    monkeypatch.setattr(slurm, "is_here", lambda: True)
    monkeypatch.setattr(slurm, "ask", lambda words: next(answers[word] for word in words if word in answers))
    main, run = load_submit().main, ["--dry_run", "--", *RUN, "--out", str(tmp_path / "run")]
    with pytest.raises(ConfigError, match="did you mean 'normal'"):
        main(["--partition", "nromal", *run])
    with pytest.raises(ConfigError, match="--nodes 8: partition normal has 4"):
        main(["--nodes", "8", *run])
    assert main(run) == 0
    told = capsys.readouterr()
    assert told.err == (
        "warning: the default partition has GPUs, and without --gpus_per_node N the ranks train on CPUs, one per node\n"
    )
    answers.clear()  # and can do without
    monkeypatch.setattr(slurm, "ask", refuse)
    assert main(["--gpus_per_node", "1", *run]) == 0
    told = capsys.readouterr()
    assert told.err == ""
    assert "# not checked with Slurm: sinfo failed: away" in told.out


def refuse(words: Sequence[str]) -> str:
    raise slurm.SlurmError(f"{words[0]} failed: away")


def test_a_sweep_is_kept_once_it_is_queued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a refused one would be a sweep of runs that are not there."""
    out = tmp_path / "sweep"
    out.mkdir()
    monkeypatch.setattr(slurm, "need", lambda otherwise="": None)
    monkeypatch.setattr(slurm, "is_here", lambda: False)
    monkeypatch.setattr(snapshot, "take", snapshot.folder_of)

    def refused(jobs: Sequence[records.Job], home: Path) -> list[records.Job]:
        raise ConfigError("sbatch refuses the job: no")

    words = ["--sweep", "seed=1,2", "--", *RUN, "--out", str(out)]
    monkeypatch.setattr(queue, "submit", refused)
    with pytest.raises(ConfigError, match="sbatch refuses the job"):
        load_submit().main(words)
    assert not list(out.iterdir())
    monkeypatch.setattr(queue, "submit", lambda jobs, home: [each.queued_as("7", "log") for each in jobs])
    assert load_submit().main(words) == 0
    assert [each.name for each in sweep.read(out)] == ["seed=1", "seed=2"]


@pytest.mark.usefixtures("no_slurm")
def test_a_run_that_may_shrink_keeps_its_micro_batch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, main = tmp_path / "run", load_submit().main
    out.mkdir()
    words = ["--nodes", "2", "--on_node_loss", "shrink", "--dry_run", "--", *RUN, "--out", str(out)]
    began = config.dump(config.load("quickstart", [*TINY, "data.micro_batch=2"]))
    (out / "config.yaml").write_text(yaml.safe_dump(began))
    assert main(words) == 0
    assert "data.micro_batch=2" in capsys.readouterr().out
    (out / "config.yaml").write_text(yaml.safe_dump(config.dump(config.load("quickstart", TINY))))
    assert main(words) == 0  # it began without: its micro-batches grow
    assert "data.micro_batch" not in capsys.readouterr().out


@pytest.mark.usefixtures("no_slurm")
def test_what_the_run_cannot_be_is_found_before_anything_is_queued(tmp_path: Path) -> None:
    out = tmp_path / "run"
    main, run = load_submit().main, [*RUN, "--out", str(out)]
    tokens = ("data.batching=cost", "data.tokens=4096")
    with pytest.raises(ConfigError, match=r"write data\.batch=9"):
        main(["--nodes", "3", "--dry_run", "--", *run])  # 8 samples on 3 ranks
    with pytest.raises(ConfigError, match="--on_node_loss shrink keeps the micro-batch"):
        main(["--nodes", "2", "--on_node_loss", "shrink", "--dry_run", "--", *run, *tokens])
    with pytest.raises(ConfigError, match=r"mine\.json"):
        main(["--dry_run", "--", *TINY, "--out", str(out), "--ds_config", "mine.json"])
    assert not out.exists()


@pytest.mark.usefixtures("no_slurm")
def test_a_folder_is_left_to_its_run(tmp_path: Path) -> None:
    """Whoever checks a run does not hold its lock, which its ranks will ask for."""
    out = tmp_path / "run"
    out.mkdir()
    (out / "config.yaml").write_text(yaml.safe_dump(config.dump(config.load("quickstart", (*TINY, "steps=4")))))
    assert load_submit().main(["--dry_run", "--", *RUN, "--out", str(out), "steps=4"]) == 0
    assert [path.name for path in out.iterdir()] == ["config.yaml"]


@pytest.mark.usefixtures("no_slurm")
def test_an_out_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file is no folder that can be written; give another one"):
        load_submit().main(["--dry_run", "--", *RUN, "--out", str(tmp_path / "file" / "run")])
    with pytest.raises(ConfigError, match="/proc/self/run") as raised:
        load_submit().main(["--local", "2", "--", *RUN, "--out", "/proc/self/run"])
    assert "\n" not in str(raised.value)


# --- on this machine ---


@pytest.mark.slow
def test_local_ranks_are_torchruns_to_the_bit(tmp_path: Path) -> None:
    run_whole(2, tmp_path / "torchrun", "steps=4")
    out = tmp_path / "local"
    done = submit("--local", "2", "--", *TINY, "--out", str(out), "steps=4")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"done: 4 steps, in {out}" in done.stdout
    assert figures(out) == figures(tmp_path / "torchrun")
    assert {path.name for path in (out / "slurm" / "logs" / "local_0_0").iterdir()} == {
        "rank_00000.txt",
        "rank_00001.txt",
    }
    again = submit("--local", "2", "--", *TINY, "--out", str(out), "steps=4")
    assert (again.returncode, again.stdout.count("\n")) == (0, 1)
    assert "there is nothing left to do" in again.stdout


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stop_of_local_ranks_leaves_no_process_and_goes_on(number: signal.Signals, tmp_path: Path) -> None:
    out, steps = tmp_path / "run", 60
    command = [sys.executable, "slurm/submit.py", "--local", "2", "--", *TINY, "--out", str(out), f"steps={steps}"]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        end = time.monotonic() + 200
        while process.poll() is None and last_step(out) < 3 and time.monotonic() < end:
            time.sleep(0.05)
        ranks = psutil.Process(process.pid).children(recursive=True)
        assert len(ranks) >= 2
        os.kill(process.pid, number)
        said = process.communicate(timeout=90)[0]
    assert psutil.wait_procs(ranks, timeout=30)[1] == []
    if number != signal.SIGKILL:
        assert process.returncode == 75, said
        assert records.starts(out / "slurm")[-1]["then"] == "stopped"
    if number == signal.SIGTERM:
        reached = last_step(out)
        done = submit("--local", "2", "--", *TINY, "--out", str(out), f"steps={reached + 1}")
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"going on after step {reached}" in done.stdout


@pytest.mark.slow
def test_a_local_rank_that_fails_is_shown(tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "slurm/submit.py", "--local", "2", "--", *TINY, "--out", str(out), "steps=500"]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        end = time.monotonic() + 200
        while process.poll() is None and last_step(out) < 2 and time.monotonic() < end:
            time.sleep(0.05)
        ranks = psutil.Process(process.pid).children()
        next(rank for rank in ranks if rank.environ()["RANK"] == "1").kill()
        said = process.communicate(timeout=90)[0]
    assert process.returncode == 137, said
    assert "rank 1 failed first (exit code 137); its last lines" in said
    assert psutil.wait_procs(ranks, timeout=10)[1] == []
