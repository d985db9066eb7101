"""What Slurm is given: the words of srun and the script of sbatch; and what srun says of ranks that failed."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest

from tests.cluster.jobs import job
from vlscale.cluster import queue, records
from vlscale.cluster.conductor import Start
from vlscale.cluster.options import JobOptions
from vlscale.cluster.srun import First, command, first_to_fail, was_cancelled
from vlscale.errors import ConfigError

SCRIPT_LINES = [
    *("partition=gpu", "account=me", "qos=high", "constraint='a100|h100'", "reservation=talk", "exclusive", "nodes=3"),
    *("nodelist='node[1-4]'", "exclude=node2", "comment='for the paper'", "job-name=albef", "gpus-per-node=8"),
    *("ntasks-per-node=8", "cpus-per-task=12", "mem=200G", "time=90", "signal=USR1@300", "requeue", "open-mode=append"),
    *("chdir=/code", "mail-type=END", "contiguous"),
]
ASKED = JobOptions(
    nodes=3,
    gpus_per_node=8,
    cpus_per_task=12,
    mem="200G",
    time="1:30:00",
    partition="gpu",
    account="me",
    qos="high",
    constraint="a100|h100",
    reservation="talk",
    exclusive=True,
    nodelist="node[1-4]",
    exclude="node2",
    comment="for the paper",
    job_name="albef",
    sbatch=("mail-type=END", "contiguous"),
    srun=("--mpi=none",),
    cpu_bind="cores",
    interface="ib0",
    signal="USR1",
    lead=300,
    modules=("cuda/12.4",),
    environment={"SAID": 'it\'s "so" & $HOME', "EMPTY": ""},
    setup=("ulimit -l unlimited",),
    container=("apptainer", "exec", "my image.sif"),
    python="python3",
)


def options_of(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH ")]


def test_every_option_is_in_the_script(tmp_path: Path) -> None:
    script = queue.executor(tmp_path, Path("/code"), "/bin/python", ASKED).script()
    output = next(line for line in options_of(script) if line.startswith("output="))
    assert sorted(options_of(script)) == sorted([*SCRIPT_LINES, output])
    assert output.startswith(f"output={tmp_path}/")
    assert "srun" not in script.split("# command")[1]  # which the conductor calls


def test_what_nobody_asked_for_is_not_in_the_script(tmp_path: Path) -> None:
    script = queue.executor(tmp_path, Path("/code"), "/bin/python", JobOptions(requeue=0)).script()
    said = {line.split("=")[0] for line in options_of(script)}
    assert said == {"chdir", "no-requeue", "nodes", "ntasks-per-node", "open-mode", "output", "signal", "time"}


def test_environment_and_setup_come_first_and_arrive_as_they_are_written(tmp_path: Path) -> None:
    script = queue.executor(tmp_path, Path("/code"), "/bin/python", ASKED).script()
    before = script.split("# setup\n")[1].split("# command")[0]
    assert before.splitlines()[0] == "module load cuda/12.4"
    assert before.strip().splitlines()[-1] == "ulimit -l unlimited"
    exports = "\n".join(line for line in before.splitlines() if line.startswith("export "))
    said = subprocess.run(
        ["bash", "-c", f'{exports}\nprintf "%s\\n" "$SAID" "$EMPTY" "$GLOO_SOCKET_IFNAME" "$NCCL_SOCKET_IFNAME"'],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert said.splitlines() == ['it\'s "so" & $HOME', "", "ib0", "ib0"]


def test_a_profile_may_name_an_interface_of_its_own_for_nccl(tmp_path: Path) -> None:
    options = JobOptions(interface="eth0", environment={"NCCL_SOCKET_IFNAME": "ib0"})
    lines = queue.setup_lines(options)
    assert "export NCCL_SOCKET_IFNAME=ib0" in lines
    assert "export GLOO_SOCKET_IFNAME=eth0" in lines


def test_several_runs_are_one_array(tmp_path: Path) -> None:
    made = queue.executor(tmp_path, Path("/code"), "/bin/python", JobOptions())
    assert "array=0-3%4" in options_of(made.script(4))
    limited = queue.executor(tmp_path, Path("/code"), "/bin/python", JobOptions(parallel=2))
    assert "array=0-3%2" in options_of(limited.script(4))
    assert not any(line.startswith("array") for line in options_of(limited.script()))


def test_a_folder_with_a_space(tmp_path: Path) -> None:
    home = tmp_path / "my run"
    script = queue.executor(home, home / "code", "/my python/bin/python", JobOptions()).script()
    assert f"#SBATCH --chdir='{home}/code'" in script
    assert shlex.split(script.strip().splitlines()[-1])[:2] == ["exec", "/my python/bin/python"]
    assert shlex.split(script.strip().splitlines()[-1])[-1] == str(home)


# --- srun ---


def start_of(asked: records.Job, *nodes: str) -> Start:
    return Start(nodes, asked.options.ranks_per_node, 0, asked.home / "logs" / "7_0_0", asked.command())


def test_the_words_of_srun(tmp_path: Path) -> None:
    asked = records.Job(str(tmp_path), "/code", "/here", "/bin/python", ("steps=4",), ASKED, 48, 1)
    words = command(asked, start_of(asked, "node1", "node3", "node4"))
    assert words[0] == "srun"
    place = words.index("apptainer")
    assert words[place:] == ["apptainer", "exec", "my image.sif", "python3", "/code/launchers/pretrain.py", "steps=4"]
    assert words[place - 1] == "--mpi=none"
    assert set(words[1:place]) >= {
        *("--nodes=3", "--ntasks=24", "--ntasks-per-node=8", "--nodelist=node1,node3,node4"),
        *("--gpus-per-node=8", "--cpus-per-task=12", "--cpu-bind=cores", "--chdir=/here"),
        f"--output={tmp_path}/slurm/logs/7_0_0/rank_%5t.txt",
    }


def test_ranks_on_cpus_ask_for_no_gpu(tmp_path: Path) -> None:
    asked = job(tmp_path, nodes=2)
    words = command(asked, start_of(asked, "node1", "node2"))
    assert "--ntasks=2" in words
    assert not any(word.startswith(("--gpus", "--cpus", "--cpu-bind")) for word in words)
    assert words[words.index("/bin/python") + 1] == "/code/launchers/pretrain.py"


@pytest.mark.parametrize(
    ("said", "first"),
    [
        ("", None),
        ("srun: job 4 queued and waiting for resources\nsrun: job 4 has been allocated resources\n", None),
        (
            "srun: error: node2: tasks 2-3: Exited with exit code 75\n"
            "srun: error: node1: tasks 0-1: Exited with exit code 75\n",
            None,
        ),
        (
            "srun: error: node2: task 2: Exited with exit code 4\n"
            "srun: error: node2: task 3: Killed\n"
            "srun: error: node1: task 0: Exited with exit code 1\n"
            "srun: error: node1: task 1: Exited with exit code 75\n"
            "srun: Force Terminated StepId=1.0\n",
            First(2, "Exited with exit code 4"),
        ),
        (  # one that lost another is told of before that one
            "srun: error: node1: tasks 0-1: Exited with exit code 1\nsrun: error: node2: task 3: Killed\n",
            First(3, "Killed"),
        ),
        (
            "srun: error: node2: task 2: Exited with exit code 1\n"
            "srun: error: node2: task 3: Exited with exit code 75\n"
            "srun: error: node1: tasks 0-1: Exited with exit code 1\n",
            First(2, "Exited with exit code 1"),
        ),
        (  # the others hung, and were ended
            "srun: error: node1: task 1: Exited with exit code 1\n"
            "srun: First task exited 2s ago\n"
            "srun: StepId=4.0 tasks 0,2-3: running\n"
            "srun: StepId=4.0 task 1: exited abnormally\n"
            "srun: launch/slurm: _step_signal: Terminating StepId=4.0\n"
            "slurmstepd-node1: error: *** STEP 4.0 ON node1 CANCELLED AT 2026-11-21T23:17:57 ***\n"
            "srun: Job step aborted: Waiting up to 32 seconds for job step to finish.\n"
            "srun: error: node1: task 0: Killed\n"
            "srun: error: node2: tasks 2-3: Killed\n",
            First(1, "Exited with exit code 1"),
        ),
        (
            "srun: Job step aborted: Waiting up to 32 seconds for job step to finish.\n"
            "srun: error: node1: task 0: Killed\n",
            First(0, "Killed"),
        ),
        ("srun: error: node1: task 1: Segmentation fault\n", First(1, "Segmentation fault")),
    ],
)
def test_who_failed_first(said: str, first: First | None) -> None:
    """Each text was printed by Slurm 22.05."""
    assert first_to_fail(said) == first


ABORTED = "srun: Job step aborted: Waiting up to 32 seconds for job step to finish.\n"
KILLED = "srun: error: node1: tasks 0-1: Killed\n"


@pytest.mark.parametrize(
    ("said", "cancelled"),
    [
        ("", False),
        (ABORTED + KILLED, True),
        (KILLED + "srun: Force Terminated StepId=3451.0\n", False),  # the ranks alone, by anybody
        ("srun: error: node2: task 2: Exited with exit code 1\n" + ABORTED + KILLED, False),  # by us, for that one
    ],
)
def test_whether_slurm_ended_the_step(said: str, cancelled: bool) -> None:
    assert was_cancelled(said) == cancelled


# --- what a job leaves ---


def test_a_job_is_read_as_it_was_written(tmp_path: Path) -> None:
    asked = records.Job(str(tmp_path), "/code", "/here", "/bin/python", ("a=[1, 2]", "b=é"), ASKED, 48, 2)
    asked.write()
    assert records.read_job(tmp_path) == asked
    assert asked.queued_as("12_3", "/log") == records.read_job(tmp_path)
    assert records.read_job(tmp_path).number == "12_3"


def test_what_is_no_job(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no job of slurm/submit\.py .*; give a run folder"):
        records.read_job(tmp_path)
    (tmp_path / "slurm").mkdir()
    for text in ("", "{}", "[]", '{"arguments": 3, "options": {}}'):
        (tmp_path / "slurm" / records.JOB).write_text(text)
        with pytest.raises(ConfigError, match="cannot be read as a job"):
            records.read_job(tmp_path)


def test_starts_are_lines_and_half_a_line_is_none(tmp_path: Path) -> None:
    assert records.starts(tmp_path) == []
    records.append(tmp_path, "began", {"start": "7_0_0"})
    records.append(tmp_path, "ended", {"start": "7_0_0", "code": 75})
    with (tmp_path / records.STARTS).open("a") as file:
        file.write('{"event": "beg')
    assert [(line["event"], line["start"]) for line in records.starts(tmp_path)] == [
        ("began", "7_0_0"),
        ("ended", "7_0_0"),
    ]
    records.append(tmp_path / "nowhere", "began", {})  # is not worth a run


@pytest.mark.parametrize(("batch", "nodes", "most"), [(24, 4, 4), (24, 3, 2), (36, 3, 3), (6, 4, 1), (5, 4, 0)])
def test_the_most_nodes_over_which_a_batch_divides(batch: int, nodes: int, most: int, tmp_path: Path) -> None:
    """Of two ranks each, in micro-batches of three."""
    assert job(tmp_path, batch=batch, tasks_per_node=2).fewer(nodes) == most
