"""Every command line of the README and of docs/cluster.md is one that its program understands."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from launchers import pretrain
from tests.cluster.jobs import load_submit
from tests.runs import ROOT
from vlscale import config, ds_config
from vlscale.cluster import slurm, status, submission

STARTERS = ("python", "deepspeed", "torchrun", "srun")
LAUNCHER = re.compile(r"(?:launchers|slurm)/\w+\.py")


def commands() -> Iterator[str]:
    """Lines of blocks, and what stands between backticks."""
    for name in ("README.md", "docs/cluster.md"):
        text = (ROOT / name).read_text()
        blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.S | re.M)
        lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
        inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))
        for line in (part.strip().removeprefix("$ ") for each in (*lines, *inline) for part in each.split("&&")):
            if line.startswith(STARTERS) and LAUNCHER.search(line) and "..." not in line:
                yield line


COMMANDS = sorted(set(commands()))


def check_run(words: list[str]) -> None:
    """Options, recipe, overrides and ds_config of launchers/pretrain.py."""
    asked = pretrain.parse(words)
    config.load(asked.recipe, asked.overrides)
    ds_config.load(asked.ds_config)


def test_they_are_found() -> None:
    wanted = (
        "python slurm/submit.py --nodes 4 --follow -- --ds_config ds_configs/zero2.json --recipe quickstart steps=40"
    )
    assert wanted in COMMANDS
    assert wanted in (ROOT / "README.md").read_text()
    assert any(line.startswith("deepspeed --hostfile") for line in COMMANDS)


@pytest.mark.parametrize("line", [line for line in COMMANDS if "slurm/submit.py" in line])
def test_of_submit(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[submission.Asked] = []
    monkeypatch.setattr(submission, "submit", lambda asked: seen.append(asked) or 0)
    for name in ("status", "logs", "watch", "cancel", "requeue"):
        monkeypatch.setattr(status, name, lambda *_: 0)
    words = shlex.split(line, comments=True)
    assert words[:2] == ["python", "slurm/submit.py"]
    assert load_submit().main(words[2:]) == 0
    for asked in seen:
        for variant in submission.sweep.variants(asked.sweep):
            config.load(asked.recipe, (*asked.overrides, *variant.overrides))
        ds_config.load(asked.ds_config)


def dry_runs() -> list[str]:
    """What is submitted there, with nothing queued; but for data that this machine has not."""
    submitted = [line for line in COMMANDS if re.match(r"python slurm/submit\.py --(?!local)", line)]
    submitted = [line for line in submitted if "/data/" not in line]
    return [line if "--dry_run" in line else line.replace(" --", " --dry_run --", 1) for line in submitted]


@pytest.mark.parametrize("line", [*dry_runs(), "python slurm/submit.py --nodes 4 --dry_run"])
def test_of_submit_run(line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As it is spelt, in the checkout, where there is no Slurm."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(slurm, "is_here", lambda: False)
    before = sorted((ROOT / "runs").glob("*"))
    assert load_submit().main(shlex.split(line, comments=True)[2:]) == 0
    said = capsys.readouterr().out
    for option, value in re.findall(r"--(nodes|partition) (\S+)", line):
        assert f"#SBATCH --{option}={value}\n" in said
    assert ("#SBATCH --array=0-3" in said) == ("--sweep" in line)
    assert "\n# srun --nodes=" in said
    assert sorted((ROOT / "runs").glob("*")) == before


@pytest.mark.parametrize("line", [line for line in COMMANDS if "launchers/" in line])
def test_of_launchers(line: str) -> None:
    words = shlex.split(line, comments=True)
    place = next(number for number, word in enumerate(words) if LAUNCHER.fullmatch(word))
    assert Path(ROOT / words[place]).is_file()
    if words[place] == "launchers/pretrain.py":
        check_run(words[place + 1 :])
    starters = {"deepspeed": _of_deepspeed, "torchrun": _of_torchrun}
    if words[0] in starters:
        starters[words[0]](words[1:])


def _of_deepspeed(words: list[str]) -> None:
    from deepspeed.launcher.runner import parse_args

    assert LAUNCHER.fullmatch(parse_args(words).user_script)


def _of_torchrun(words: list[str]) -> None:
    from torch.distributed.run import get_args_parser

    assert LAUNCHER.fullmatch(get_args_parser().parse_args(words).training_script)
