"""`srun python launchers/pretrain.py`: Slurm's tasks are the ranks, with nothing of ours between."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from launchers import pretrain as launcher
from tests.distributed.spawn import run_ranks
from tests.runs import ROOT, TINY, environment, figures, last_step
from tests.slurm.cluster import Cluster
from vlscale.errors import DONE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]  # minutes on a busy machine

STEPS = 40
RUN = ("--ds_config", "ds_configs/zero2.json", f"steps={STEPS}", "checkpoint.every=1000")
START, GONE = 240.0, 40.0  # seconds on a busy machine; the ranks themselves give up after 25


def srun(slurm: Cluster, out: Path) -> subprocess.Popen[str]:
    """Four ranks on two nodes; what they say is in `out`.txt."""
    command = ["srun", "-N2", "--ntasks-per-node=2", sys.executable, "launchers/pretrain.py", "--out", str(out)]
    own = {**environment(), **slurm.environment(), "GLOO_SOCKET_IFNAME": "lo"}
    own |= {name: environment()[name] for name in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR", "OMP_NUM_THREADS")}
    with out.with_suffix(".txt").open("a") as said:
        return subprocess.Popen([*command, *TINY, *RUN], cwd=ROOT, env=own, stdout=said, stderr=said, text=True)


def pretrain(*arguments: str) -> None:
    assert launcher.main(list(arguments)) == DONE


def ranks(slurm: Cluster) -> list[psutil.Process]:
    """By what runs, wherever it belongs to by now: who is left behind has no slurmstepd any more."""
    found = []
    for process in psutil.process_iter():
        try:
            if "SLURM_CONF" in (own := process.environ()) and own["SLURM_CONF"] == slurm.environment()["SLURM_CONF"]:
                found += [process] if "launchers/pretrain.py" in process.cmdline() and process.name() != "srun" else []
        except psutil.Error:
            pass  # it has just ended
    return found


def test_a_run_that_loses_a_node_s_slurmstepd_and_goes_on(slurm: Cluster, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = srun(slurm, out)
    end = time.monotonic() + START
    while last_step(out) < 1:
        assert process.poll() is None, out.with_suffix(".txt").read_text()
        assert time.monotonic() < end, out.with_suffix(".txt").read_text()
        time.sleep(0.02)
    assert len(ranks(slurm)) == 4
    ranks(slurm)[0].parents()[0].kill()
    _, left = psutil.wait_procs(ranks(slurm), timeout=GONE)
    assert left == [], out.with_suffix(".txt").read_text()
    process.kill()  # srun does not notice, and would wait for ever
    process.wait()
    slurm.restore()
    assert (out / "checkpoints" / "latest").read_text().strip() == f"step_{last_step(out):08}"
    assert last_step(out) < STEPS, out.with_suffix(".txt").read_text()
    assert srun(slurm, out).wait(timeout=START) == DONE, out.with_suffix(".txt").read_text()
    run_ranks(pretrain, 4, "--out", str(tmp_path / "local"), *TINY, *RUN)
    assert figures(out) == figures(tmp_path / "local")
