"""`srun python launchers/pretrain.py`: what Slurm tells a task, and what torch and DeepSpeed ask of a launcher."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from tests.runs import ROOT, environment
from vlscale import cores, distributed
from vlscale.cluster.environment import FIRST_PORT, PORTS, first_node, for_sbatch, of_task, port
from vlscale.errors import ConfigError

TASK = {  # the third of seven
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_STEP_TASKS_PER_NODE": "4,3",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}


def of(**more: str) -> dict[str, str]:
    return of_task({**TASK, **more}, lambda node: f"address of {node}")


def test_a_task_is_a_rank() -> None:
    assert of() == {
        "RANK": "5",
        "WORLD_SIZE": "7",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "3",
        "MASTER_ADDR": "address of gpu07",
        "MASTER_PORT": str(FIRST_PORT + 4711),
    }


def test_what_is_set_stays() -> None:
    given = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500", "WORLD_SIZE": "7"}
    assert of(**given) == {"RANK": "5", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "3"}
    assert of(RANK="0") == {}  # torchrun's or deepspeed's, one launcher per task
    with pytest.raises(ConfigError, match="WORLD_SIZE is 2, but this Slurm step has 7 tasks; unset it"):
        of(WORLD_SIZE="2")


def test_one_process_stays_one() -> None:
    assert of_task({}) == {}
    batch = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    assert of_task(batch) == {}
    assert of_task({**batch, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"}) == {}


@pytest.mark.parametrize("name", sorted(set(TASK) - {"SLURM_STEP_NUM_TASKS"}))
def test_a_variable_that_is_missing_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=f"one of 7 tasks of a Slurm step, but {name} is not set"):
        of(**{name: ""})


def test_ranks_of_a_node() -> None:
    assert [of(SLURM_STEP_TASKS_PER_NODE="2(x2),3", SLURM_NODEID=n)["LOCAL_WORLD_SIZE"] for n in "012"] == [*"223"]


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        ({}, "1"),
        ({"CUDA_VISIBLE_DEVICES": ""}, "1"),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2"}, "1"),
        ({"CUDA_VISIBLE_DEVICES": "1", "SLURM_GPUS_ON_NODE": "3"}, "0"),
        ({"ROCR_VISIBLE_DEVICES": "1"}, "0"),
        ({"CUDA_VISIBLE_DEVICES": "0", "SLURM_GPUS_ON_NODE": "1"}, "1"),  # which all would share: told by `init`
    ],
)
def test_a_gpu_of_its_own_is_number_0(shown: dict[str, str], expected: str) -> None:
    assert of(**shown)["LOCAL_RANK"] == expected


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("gpu[08-11,14],cpu1", "gpu08"),
        ("gpu[3,5-7]", "gpu3"),
        ("rack[1-2]-gpu[01-08].site,x", "rack1-gpu01.site"),
        ("a-b[1]", "a-b1"),
    ],
)
def test_the_first_node(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


def test_a_start_does_not_meet_the_one_before() -> None:
    ports = [port(4711, 0, restarts) for restarts in range(50)]
    ports += [port(4711, step, 0) for step in range(1, 50)] + [port(4712, 0, 0)]
    assert len(set(ports)) == len(ports)
    assert all(FIRST_PORT <= each < FIRST_PORT + PORTS for each in ports)
    assert of(SLURM_RESTART_COUNT="1")["MASTER_PORT"] == str(port(4711, 0, 1))


def test_a_node_without_an_address_is_one_sentence() -> None:
    of_the_last = {**environment(), **TASK, "SLURM_STEP_NODELIST": "no-such-node.invalid"}
    done = subprocess.run(
        [sys.executable, "launchers/pretrain.py"],
        cwd=ROOT,
        env=of_the_last,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    (said,) = done.stderr.splitlines()
    assert "no address is known of node no-such-node.invalid, where rank 0 of this Slurm step runs; export" in said


@pytest.mark.parametrize(
    ("seen", "given", "expected"),
    [
        (12, {"SLURM_CPUS_PER_TASK": "12"}, 12),  # bound: the task's alone
        (1, {"SLURM_CPUS_PER_TASK": "12"}, 1),
        (96, {"SLURM_CPUS_PER_TASK": "12"}, 12),  # not bound: the whole machine's
        (96, {"SLURM_CPUS_PER_TASK": "96", "SLURM_STEP_NUM_TASKS": "2"}, 12),  # torchrun in each of two tasks
        (96, {}, 12),
    ],
)
def test_a_tasks_cores(monkeypatch: pytest.MonkeyPatch, seen: int, given: dict[str, str], expected: int) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(seen)))
    for name, value in {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "SLURM_STEP_NUM_TASKS": "16", **given}.items():
        monkeypatch.setenv(name, value)
    assert cores.of_a_rank() == expected


def test_a_port_that_is_taken_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = str(taken.getsockname()[1])
        places = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": number}
        for name, value in places.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ConfigError, match=f"port {number} of 127.0.0.1, where the ranks were to meet, is taken"):
            distributed.init()


def test_a_job_is_submitted_from_no_other() -> None:
    given = {"PATH": "/bin", "SLURM_CONF": "/etc/slurm.conf", "SLURM_JOB_ID": "7", "SLURM_CPU_BIND": "cores"}
    given |= {"RANK": "0", "MASTER_ADDR": "login", "SBATCH_PARTITION": "cpu", "SBATCH_ACCOUNT": "mine"}
    kept = {"PATH": "/bin", "SLURM_CONF": "/etc/slurm.conf", "SBATCH_ACCOUNT": "mine"}
    assert for_sbatch(given, ["partition"]) == kept
    outside = {"SLURM_CPU_BIND": "cores"}  # of a login shell: meant
    assert for_sbatch(outside, []) == outside
