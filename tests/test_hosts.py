"""A run on two hosts without a scheduler, as `deepspeed --hostfile` and torchrun start it through ssh."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.distributed.spawn import free_port
from tests.hosts import ADDRESSES, Hosts, missing
from tests.runs import ROOT, TINY, figures, last_step, run_whole
from vlscale.errors import DONE, STOPPED

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]  # minutes on a busy machine

STEPS = 100
RUN = ("--ds_config", "ds_configs/zero2.json", f"steps={STEPS}", "checkpoint.every=1000")
START, GONE = 240.0, 40.0  # seconds on a busy machine; the ranks themselves give up after 25


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    if (reason := missing()) and not os.environ.get("CI"):
        pytest.skip(reason)
    assert not reason, reason
    with Hosts(tmp_path_factory.mktemp("hosts")) as both:
        yield both


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two ranks on one machine log."""
    out = tmp_path_factory.mktemp("expected") / "run"
    run_whole(2, out, *RUN)
    return figures(out)


def pretrain(out: Path) -> list[str]:
    return ["launchers/pretrain.py", "--out", str(out), *TINY, *RUN]


@contextmanager
def deepspeed(hosts: Hosts, out: Path) -> Iterator[subprocess.Popen[str]]:
    """The `deepspeed` command, in a process group of its own; what it says is in `out`.txt."""
    command = [str(hosts.python), str(Path(sys.executable).with_name("deepspeed")), "--hostfile", str(hosts.hostfile)]
    command += ["--master_addr", ADDRESSES["first"], "--master_port", str(free_port()), *pretrain(out)]
    with started(hosts, out, command) as process:
        yield process


@contextmanager
def started(hosts: Hosts, out: Path, command: list[str]) -> Iterator[subprocess.Popen[str]]:
    with out.with_suffix(".txt").open("a") as said:
        process = subprocess.Popen(
            command, cwd=ROOT, env=hosts.environment(), stdout=said, stderr=said, text=True, start_new_session=True
        )
    try:
        yield process
    finally:
        for left in hosts.processes():
            left.kill()
        process.wait()


def wait_for_a_step(out: Path, process: subprocess.Popen[str], before: int) -> None:
    end = time.monotonic() + START
    while last_step(out) <= before:
        assert process.poll() is None, out.with_suffix(".txt").read_text()
        assert time.monotonic() < end, out.with_suffix(".txt").read_text()
        time.sleep(0.01)


def one(hosts: Hosts, *words: str) -> psutil.Process:
    """The Python process with these words in its command line, not one that it has forked."""
    lines = [(process, process.cmdline()) for process in hosts.processes()]
    found = [process for process, line in lines if line[:1] == [str(hosts.python)] and set(words) <= set(line)]
    return min(found, key=lambda process: process.create_time())


def test_deepspeed_stopped_in_every_way_and_resumed(
    hosts: Hosts, tmp_path: Path, expected: list[dict[str, Any]]
) -> None:
    """Over pdsh. The command exits with 1 after a signal, with pdsh's code for a lost host, 0 if pdsh is killed."""
    out = tmp_path / "run"
    for target, number, code in [
        ("runner", signal.SIGTERM, 1),
        ("runner", signal.SIGKILL, -signal.SIGKILL),
        ("group", signal.SIGINT, 1),  # Ctrl-C
        ("launch", signal.SIGKILL, 255),
        ("pdsh", signal.SIGKILL, 0),
        ("ssh", signal.SIGKILL, STOPPED),
    ]:
        before = last_step(out)
        with deepspeed(hosts, out) as process:
            wait_for_a_step(out, process, before)
            if target == "group":
                os.killpg(process.pid, number)
            elif target == "runner":
                process.send_signal(number)
            elif target == "launch":
                one(hosts, "deepspeed.launcher.launch", "--node_rank=1").kill()
            else:
                next(each for each in hosts.processes() if each.name().startswith(target)).kill()
            assert process.wait(timeout=GONE) == code
            hosts.wait_until_gone(GONE)
        assert (out / "checkpoints" / "latest").read_text().strip() == f"step_{last_step(out):08}"
        assert before < last_step(out) < STEPS
    with deepspeed(hosts, out) as process:
        assert process.wait(timeout=START) == DONE, out.with_suffix(".txt").read_text()
        hosts.wait_until_gone(GONE)
    assert figures(out) == expected


@contextmanager
def torchrun(hosts: Hosts, out: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """One torchrun per host, each through its own ssh."""
    several = ["--nnodes", "2", "--nproc_per_node", "1", "--master_addr", ADDRESSES["first"]]
    several = [str(hosts.python), "-m", "torch.distributed.run", *several, "--master_port", str(free_port())]
    first, second = (
        hosts.on(host, *several, "--node_rank", str(rank), *pretrain(out)) for rank, host in enumerate(ADDRESSES)
    )
    with started(hosts, out, first) as one_side, started(hosts, out, second) as other_side:
        yield [one_side, other_side]


def test_torchrun_on_both_hosts(hosts: Hosts, tmp_path: Path, expected: list[dict[str, Any]]) -> None:
    out = tmp_path / "run"
    with torchrun(hosts, out) as both:
        wait_for_a_step(out, both[0], 0)
        one(hosts, "torch.distributed.run", "--node_rank", "1").kill()
        assert all(process.wait(timeout=GONE) != DONE for process in both)
        hosts.wait_until_gone(GONE)
    assert 0 < last_step(out) < STEPS
    with torchrun(hosts, out) as both:
        assert [process.wait(timeout=START) for process in both] == [DONE, DONE], out.with_suffix(".txt").read_text()
        hosts.wait_until_gone(GONE)
    assert figures(out) == expected
