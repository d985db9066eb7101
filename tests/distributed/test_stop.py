"""No process outlives its run: real launches, ended in every way that people and schedulers end them."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.distributed.loop import lock_name
from vlscale.errors import STOPPED, TrainingError

LOOP = Path(__file__).with_name("loop.py")
ROOT = LOOP.parents[2]
START = 60.0  # seconds that a launch may take on a busy machine
GONE = 40.0  # seconds after which no process may be left


@dataclass
class Launched:
    """A launch whose ranks are stepping."""

    top: subprocess.Popen[bytes]
    launch: psutil.Process | None
    ranks: list[psutil.Process]
    folder: Path

    def everyone(self) -> list[psutil.Process]:
        return family(self.top.pid)

    def worker(self) -> psutil.Process:
        """Of rank 0's loader; its parent is the server of forks."""
        return next(child for process in self.ranks[0].children() for child in process.children())

    def said(self) -> str:
        return (self.folder / "out.txt").read_text()

    def saved(self) -> list[str]:
        return sorted(path.name for path in self.folder.glob("*.saved"))


@pytest.fixture
def launched(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Launched]:
    yield from launches(tmp_path, *request.param)


def launches(folder: Path, kind: str, mode: str) -> Iterator[Launched]:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": str(ROOT)}
    with (folder / "out.txt").open("wb") as out:
        top = subprocess.Popen(
            [*command(kind), str(LOOP), str(folder), mode],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=ROOT,
            start_new_session=True,
        )
    everyone: list[psutil.Process] = []
    try:
        ranks = wait_for_ranks(folder, 1 if kind == "plain" else 2, top)
        launch = ranks[0].parent() if kind == "deepspeed" else None
        started = Launched(top, launch, ranks, folder)
        everyone = started.everyone()
        if Path("/dev/shm").is_dir():
            assert in_shared_memory(folder, everyone) != []  # the locks of a loader's queues
        yield started
        end = time.monotonic() + 5
        while (left := in_shared_memory(folder, everyone)) and time.monotonic() < end:
            time.sleep(0.1)
        assert left == [], started.said()
    finally:
        for process in everyone or family(top.pid):
            if process.is_running():
                process.kill()
        top.wait()


def in_shared_memory(folder: Path, everyone: list[psutil.Process]) -> list[str]:
    """Locks of this launch by the name that `loop.py` gives them, and torch's files by the process."""
    ours = (f"sem.{lock_name(folder)}", *(f"torch_{process.pid}_" for process in everyone))
    shared = Path("/dev/shm")
    return [path.name for path in shared.iterdir() if path.name.startswith(ours)] if shared.is_dir() else []


def family(pid: int) -> list[psutil.Process]:
    """The process and everything it started."""
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def command(kind: str) -> list[str]:
    scripts = Path(sys.executable).parent
    port = f"--master_port={free_port()}"
    return {
        "deepspeed": [str(scripts / "deepspeed"), "--num_accelerators", "2", port],
        "torchrun": [str(scripts / "torchrun"), "--nproc_per_node", "2", port],
        "plain": [sys.executable],
    }[kind]


def free_port() -> int:
    from tests.distributed.spawn import free_port

    return free_port()


def wait_for_ranks(folder: Path, world: int, top: subprocess.Popen[bytes]) -> list[psutil.Process]:
    end = time.monotonic() + START
    while time.monotonic() < end:
        found = sorted(folder.glob("rank_*.pid"))
        if len(found) == world:
            return [psutil.Process(int(path.read_text())) for path in found]
        assert top.poll() is None, (folder / "out.txt").read_text()
        time.sleep(0.1)
    raise AssertionError("the ranks did not start: " + (folder / "out.txt").read_text())


def seconds_until_gone(launched: Launched, everyone: list[psutil.Process]) -> float:
    began = time.monotonic()
    left = everyone
    while time.monotonic() - began < GONE:
        launched.top.poll()  # reaps it
        left = [process for process in left if process.is_running()]
        if not left:
            took = time.monotonic() - began
            print(f"all gone after {took:.1f} s, exit code {launched.top.returncode}")
            return took
        time.sleep(0.1)
    raise AssertionError(f"still there after {GONE} s: {left}\n" + (launched.folder / "out.txt").read_text())


def end(launched: Launched, target: str, number: signal.Signals) -> float:
    everyone = launched.everyone()
    targets = {"top": launched.top.pid, "rank_0": launched.ranks[0].pid, "rank_1": launched.ranks[-1].pid}
    if launched.launch is not None:
        targets["launch"] = launched.launch.pid
    if target == "worker":
        targets["worker"] = launched.worker().pid
    os.kill(targets[target], number)
    return seconds_until_gone(launched, everyone)


deepspeed = pytest.mark.parametrize("launched", [("deepspeed", "step")], indirect=True)


@deepspeed
@pytest.mark.parametrize(("target", "number"), [("top", signal.SIGTERM), ("top", signal.SIGKILL)])
def test_the_deepspeed_process_is_ended(launched: Launched, target: str, number: signal.Signals) -> None:
    end(launched, target, number)
    assert launched.saved() == ["rank_0.saved", "rank_1.saved"]
    assert launched.top.returncode == -number  # the process that was signalled; a shell shows 128 + number


@pytest.mark.slow
@deepspeed
@pytest.mark.parametrize(
    ("target", "number", "codes", "saves"),
    [
        ("top", signal.SIGINT, {-signal.SIGINT, 1, 130}, True),
        ("launch", signal.SIGTERM, {1, STOPPED}, True),
        ("launch", signal.SIGKILL, {0}, True),  # deepspeed itself hides how its launcher died
        ("rank_0", signal.SIGTERM, {STOPPED}, True),
        ("rank_1", signal.SIGUSR1, {STOPPED}, True),
        ("rank_0", signal.SIGKILL, {247}, False),
        ("worker", signal.SIGKILL, {1}, False),
    ],
)
def test_any_process_is_ended(
    launched: Launched, target: str, number: signal.Signals, codes: set[int], saves: bool
) -> None:
    end(launched, target, number)
    if saves:
        assert launched.saved() == ["rank_0.saved", "rank_1.saved"]
    else:  # the rank that lost it has nothing else to say
        assert "ends too: it lost another rank" in launched.said()
    if target != "top":  # the `deepspeed` command itself answers SIGINT with one
        assert ("Traceback" in launched.said()) == (target == "worker")
    assert launched.top.returncode in codes


@pytest.mark.slow
@pytest.mark.parametrize("launched", [("deepspeed", "hang")], indirect=True)
@pytest.mark.parametrize(
    ("target", "number"),
    [
        ("top", signal.SIGKILL),
        ("launch", signal.SIGTERM),
    ],
)
def test_a_stuck_rank_is_ended(launched: Launched, target: str, number: signal.Signals) -> None:
    time.sleep(2)
    assert end(launched, target, number) < 20
    assert launched.saved() == []
    assert "no stop within 6 s" in (launched.folder / "out.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("launched", [("torchrun", "step")], indirect=True)
@pytest.mark.parametrize(
    ("target", "number", "saves"),
    [("top", signal.SIGTERM, True), ("top", signal.SIGKILL, True), ("rank_1", signal.SIGKILL, False)],
)
def test_torchrun_is_ended(launched: Launched, target: str, number: signal.Signals, saves: bool) -> None:
    end(launched, target, number)
    assert launched.saved() == (["rank_0.saved", "rank_1.saved"] if saves else [])
    assert launched.top.returncode != 0


@pytest.mark.parametrize("launched", [("plain", "step")], indirect=True)
def test_one_process_stops_by_its_own_code(launched: Launched) -> None:
    assert end(launched, "top", signal.SIGTERM) < 10
    assert launched.top.returncode == STOPPED
    assert launched.saved() == ["rank_0.saved"]


def test_a_program_outlives_the_shell_that_started_it(tmp_path: Path) -> None:
    program = "import time, vlscale.stop as s; g = s.StopGuard(); time.sleep(2.5); print(g.requested)"
    out = tmp_path / "out.txt"
    out.touch()
    shell = f"{sys.executable} -c '{program}' > {out} 2>&1 &"
    subprocess.run(["bash", "-c", shell], check=True, cwd=ROOT, timeout=30)
    end = time.monotonic() + 20
    while not out.read_text() and time.monotonic() < end:
        time.sleep(0.1)
    assert out.read_text() == "False\n"


REQUESTED = """
import os, signal, time
from vlscale.stop import StopGuard
guard = StopGuard(deadline=0.5, patience={patience})
os.kill(os.getpid(), signal.SIGTERM)
assert guard.requested
{then}
time.sleep(2.5)  # the step goes on, or the save
print("saved")
"""


@pytest.mark.parametrize(
    ("patience", "then", "saves"),
    [
        (0, "", False),
        (0, "guard.heed()", True),  # however long the save takes
        (60, "", True),  # nobody kills it in the meantime
        (60, "guard.request('the launcher is gone', hurry=True)", False),
    ],
)
def test_who_does_not_begin_to_stop_is_ended(patience: float, then: str, saves: bool) -> None:
    program = REQUESTED.format(patience=patience, then=then)
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == (0 if saves else TrainingError.exit_code), done.stderr
    assert done.stdout == ("saved\n" if saves else "")
    assert ("SIGTERM: no stop within" in done.stderr) != saves


GUARDED = """
import time, vlscale.stop as s
guard = s.StopGuard()
print("up", flush=True)
end = time.monotonic() + 20
while not guard.requested and time.monotonic() < end:
    time.sleep(0.05)
print(guard.reason)
"""
TOLD = "deepspeed.launcher.launch --node_rank=1 --world_info=QQ== --master_addr=host --master_port=1"


@pytest.mark.parametrize(
    ("line", "killed"),
    [
        (["slurmstepd"], 0),
        (["slurmstepd", "bash", "torchrun"], 0),  # torchrun itself would go on
        (["sshd-session", "bash", f"python {TOLD}"], 0),  # the connection that `deepspeed --hostfile` has made
        (["python deepspeed.launcher.runner", f"pdsh -S -f 9 {TOLD}", f"python {TOLD}"], 0),  # ... and made here
        (["python deepspeed.launcher.runner", f"pdsh -S -f 9 {TOLD}", f"python {TOLD}"], 1),
        (["python submit.py --local 2"], 0),
    ],
)
def test_whoever_started_a_rank_is_watched(tmp_path: Path, line: list[str], killed: int) -> None:
    command = [sys.executable, "-c", GUARDED]
    for number, (name, *words) in reversed(list(enumerate(each.split() for each in line))):
        if not (tmp_path / name).exists():
            (tmp_path / name).symlink_to("/bin/bash")  # so that a process has this name
        script = tmp_path / f"{number}.sh"
        script.write_text(f"echo $$ > {tmp_path}/{number}.pid\n{shlex.join(command)}\ntrue\n")
        command = [str(tmp_path / name), str(script), *words]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as top:
        assert top.stdout is not None
        assert top.stdout.readline() == "up\n"
        everyone = family(top.pid)
        os.kill(int((tmp_path / f"{killed}.pid").read_text()), signal.SIGKILL)
        said = top.stdout.read()
    psutil.wait_procs(everyone, timeout=10)
    assert "gone" in said
