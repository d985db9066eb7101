"""What a job asks of a cluster: options, profiles, and the runs of a sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.runs import ROOT
from vlscale.cluster import sweep
from vlscale.cluster.options import JobOptions, check, seconds
from vlscale.cluster.profile import resolve
from vlscale.errors import ConfigError

PROFILE = """\
time: 24:00:00
mem: 200
partition: gpu
gpus_per_node: 8
exclusive: yes
comment:
qos: null
modules: cuda/12.4
environment: {NCCL_DEBUG: WARN, DEEP: 010, YES: true}
sbatch: [mail-type=END]
srun: [--mpi=none]
"""


@pytest.fixture
def profiles(tmp_path: Path) -> Path:
    (tmp_path / "alps.yaml").write_text(PROFILE)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *(("90", 5400), ("1:30", 90), ("02:00:00", 7200), ("24:00:00", 86400), ("100:00:00", 360_000)),
        *(("1-0", 86400), ("2-12", 216_000), ("1-01:30", 91_800), ("1-00:00:05", 86_405), (" 5 ", 300)),
    ],
)
def test_a_time_in_every_notation_of_slurms(text: str, expected: int) -> None:
    assert seconds(text) == expected


@pytest.mark.parametrize("text", ["", "0", "0:00", "24h", "1:2:3:4", "-5", "1.5", "1-", "UNLIMITED"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(ConfigError, match="is no time; write minutes, HH:MM:SS or D-HH:MM:SS"):
        seconds(text)


def test_the_time_limit_is_rounded_up_and_the_lead_fits_into_it() -> None:
    assert JobOptions(time="1:30").minutes == 2
    assert [JobOptions(time=time).lead_seconds for time in ("1", "4", "8", "24:00:00")] == [15, 60, 120, 120]
    assert JobOptions(time="10", lead=300).lead_seconds == 300


def test_ranks_are_one_per_gpu_or_one_per_node() -> None:
    assert JobOptions(nodes=3).ranks == 3
    assert JobOptions(nodes=3, gpus_per_node=8).ranks == 24
    assert JobOptions(nodes=3, gpus_per_node=8, tasks_per_node=4).ranks == 12
    assert JobOptions(nodes=3, tasks_per_node=2).ranks == 6


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"nodes": 0}, "--nodes should be at least 1 (got 0)"),
        ({"gpus_per_node": -1}, "--gpus_per_node should be at least 0 (got -1)"),
        ({"requeue": -1}, "--requeue should be at least 0 (got -1)"),
        ({"lead": 0}, "--lead should be at least 1 (got 0)"),
        ({"gpus_per_node": 2, "tasks_per_node": 4}, "--tasks_per_node 4 is more than --gpus_per_node 2"),
        ({"time": "2", "lead": 120}, "--lead 120 s is all of --time 2"),
        ({"time": "soon"}, "--time soon is no time"),
        ({"sbatch": ("--hold",)}, "--sbatch --hold: write KEY=VALUE or KEY without dashes, e.g. mail-type=END"),
        ({"sbatch": ("a b=c",)}, "--sbatch a b=c: write KEY=VALUE"),
        ({"sbatch": ("nodes=9",)}, "--sbatch nodes=9: slurm/submit.py has an option nodes of its own; write that one"),
        ({"sbatch": ("gpus-per-node=1",)}, "an option gpus_per_node of its own"),
        ({"sbatch": ("gpus=8",)}, "--sbatch gpus=8: slurm/submit.py has an option gpus_per_node of its own"),
        ({"sbatch": ("gpus-per-task=1",)}, "write --gpus_per_node"),
        ({"sbatch": ("gres=shard:1,gpu:a100:4",)}, "write --gpus_per_node"),
        ({"sbatch": ("ntasks=8",)}, "write --tasks_per_node"),
        ({"sbatch": ("ntasks-per-node=8",)}, "write --tasks_per_node"),
        ({"sbatch": ("output=x",)}, "--sbatch output=x: slurm/submit.py sets output itself; leave it out"),
        ({"environment": {"A-B": "1"}}, "environment: 'A-B' is no name of an environment variable"),
    ],
)
def test_values_that_cannot_be(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as raised:
        check(JobOptions(**options))
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_profile_is_read_as_it_is_written(profiles: Path) -> None:
    """YAML alone would make 86400 of 24:00:00, 8 of 010 and True of true."""
    options = resolve({}, "alps", profiles)
    assert options.time == "24:00:00"
    assert options.minutes == 24 * 60
    assert (options.mem, options.partition, options.gpus_per_node, options.exclusive) == ("200", "gpu", 8, True)
    assert (options.comment, options.qos) == (None, None)
    assert options.modules == ("cuda/12.4",)
    assert options.environment == {"NCCL_DEBUG": "WARN", "DEEP": "010", "YES": "true"}


def test_gpus_of_a_type(tmp_path: Path) -> None:
    from vlscale.cluster import queue

    (tmp_path / "typed.yaml").write_text("gpus_per_node: a100:4\nsbatch: gres=craynetwork:0\n")
    of_profile = resolve({}, "typed", tmp_path)
    assert (of_profile.gpus_per_node, of_profile.gpus, of_profile.ranks) == (4, "a100:4", 4)
    assert "#SBATCH --gpus-per-node=a100:4\n" in queue.executor(tmp_path, tmp_path, "python", of_profile).script()
    assert resolve({"gpus_per_node": "8"}, "typed", tmp_path).gpus == "8"  # of any type
    assert resolve({"gpus_per_node": "h100:2"}, "typed", tmp_path).gpus == "h100:2"
    assert resolve({}, None, tmp_path).gpus is None
    with pytest.raises(ConfigError, match="--gpus_per_node: should be a valid integer"):
        resolve({"gpus_per_node": "4:a100"}, None, tmp_path)


def test_the_command_line_goes_over_a_profile_and_lists_are_joined(profiles: Path) -> None:
    given = {"time": "5", "nodes": 4, "sbatch": ["hold"], "srun": ["--mpi=pmix"]}
    options = resolve(given, str(profiles / "alps.yaml"), Path())
    assert (options.time, options.nodes, options.partition) == ("5", 4, "gpu")
    assert options.sbatch == ("mail-type=END", "hold")
    assert options.srun == ("--mpi=none", "--mpi=pmix")
    assert resolve({}, None, profiles) == JobOptions()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("partitoin: gpu", "partitoin is not an option; did you mean 'partition'?"),
        ("nodes: many", "nodes: should be a valid integer"),
        ("signal: HUP", "signal: should be 'USR1', 'USR2' or 'TERM' (got 'HUP')"),
        ("on_node_loss: wait", "on_node_loss: should be 'replace', 'shrink' or 'end'"),
        ("environment: [A]", "environment: should be a valid dictionary"),
        ("time: a\n b: c", "cannot be read as YAML"),
        ("- gpu", "should hold 'key: value' lines (got list)"),
        ("", "should hold 'key: value' lines"),
        ("lead: 0", "--lead should be at least 1"),
    ],
)
def test_mistakes_in_a_profile(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as raised:
        resolve({}, str(path), tmp_path)
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_profile_that_is_not_there(profiles: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such profile in .*; did you mean 'alps'\?"):
        resolve({}, "alp", profiles)
    with pytest.raises(ConfigError, match=r"--cluster mine\.yaml: no such file"):
        resolve({}, "mine.yaml", profiles)


def test_a_profile_runs_nothing(tmp_path: Path) -> None:
    path, mark = tmp_path / "mine.yaml", tmp_path / "mark"
    path.write_text(f"comment: !!python/object/apply:os.system ['touch {mark}']")
    with pytest.raises(ConfigError):
        resolve({}, str(path), tmp_path)
    assert not mark.exists()


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "slurm" / "clusters").glob("*.yaml")))
def test_the_profiles_that_come_along_can_be_used(name: str, tmp_path: Path) -> None:
    from vlscale.cluster import queue

    options = resolve({"nodes": 2}, name, ROOT / "slurm" / "clusters")
    script = queue.executor(tmp_path, tmp_path / "code", "python", options).script()
    assert options.partition is not None
    assert f"#SBATCH --partition={options.partition}" in script
    assert f"#SBATCH --gpus-per-node={options.gpus_per_node}" in script


# --- sweeps ---


def test_a_sweep_is_all_combinations_the_last_changing_fastest() -> None:
    found = sweep.variants(["optim.lr=1e-4,3e-4", "seed=1,2"])
    assert [each.overrides for each in found] == [
        ("optim.lr=1e-4", "seed=1"),
        ("optim.lr=1e-4", "seed=2"),
        ("optim.lr=3e-4", "seed=1"),
        ("optim.lr=3e-4", "seed=2"),
    ]
    assert found[1].name == "optim.lr=1e-4,seed=2"


def test_values_with_brackets_and_slashes() -> None:
    found = sweep.variants(["a.b=[1, 2],{c: [3,4], d: 5}", "data.train=x/y.tar,z.tar"])
    assert [each.overrides[0] for each in found[::2]] == ["a.b=[1, 2]", "a.b={c: [3,4], d: 5}"]
    assert all("/" not in each.name and " " not in each.name for each in found)
    assert len({each.name for each in found}) == 4


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["seed"], "--sweep seed: write KEY=VALUE,VALUE, e.g. optim.lr=1e-4,3e-4"),
        (["=1,2"], "write KEY=VALUE,VALUE"),
        (["seed=1,,2"], "write KEY=VALUE,VALUE"),
        (["seed="], "write KEY=VALUE,VALUE"),
        (["seed=1", "seed=2"], "--sweep gives seed twice; write all its values in one word"),
        (["seed=1,2,1"], "--sweep seed=1,2,1 gives a value twice"),
        (["data.train=a/b,a_b"], "data.train=a/b and data.train=a_b would have one folder, data.train=a_b"),
        (["seed=1", f"data.train=b,{'a' * 190}"], "--sweep data.train: the name of a run's folder would be 208 bytes"),
    ],
)
def test_mistakes_in_a_sweep(words: list[str], says: str) -> None:
    with pytest.raises(ConfigError) as raised:
        sweep.variants(words)
    assert says in str(raised.value)


def test_a_sweep_is_kept_and_read_again(tmp_path: Path) -> None:
    runs = sweep.variants(["seed=1,2"])
    sweep.write(tmp_path / "sweep", runs)
    assert sweep.read(tmp_path / "sweep") == runs
    assert sweep.read(tmp_path) == []
    (tmp_path / sweep.SWEEP).write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        sweep.read(tmp_path)


def test_a_table_has_every_column_that_some_row_has() -> None:
    text = sweep.table([{"run": "a", "loss": 1.23456, "step": "4/4"}, {"run": "long", "r1": 0.5, "loss": None}])
    assert text.splitlines() == [
        "run   loss   step  r1",
        "a     1.235  4/4   -",
        "long  -      -     0.5",
    ]
