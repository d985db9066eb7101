"""Broken samples: each is named once, few are said aloud, and too many end the run after it is saved."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.runs import ROOT, environment, figures, metrics, pretrain_command
from tests.shard_files import sample, write_samples
from vlscale.data.bad import FILE, PAUSE, SAID, BadSamples, Budget
from vlscale.data.samples import Bad

STEPS = 6


def bad(number: int, reason: str = "it is empty") -> Bad:
    return Bad("part.tar", f"s{number}", reason)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_is_written_down_once_and_also_after_a_stop(tmp_path: Path) -> None:
    path = tmp_path / FILE
    first = BadSamples(path)
    assert first.add([]) == []
    assert not path.exists()
    first.add([bad(1), bad(2), bad(1)])
    first.add([bad(2), bad(1, "another reason")])
    with path.open("a") as file:
        file.write('{"shard": "part.tar", "key": "s3"')  # cut off by a kill
    again = BadSamples(path)
    assert again.add([bad(1), bad(2)]) == []
    assert len(again.add([bad(3, "naïve \ud800")])) == 1
    told = [(line["shard"], line["key"], line["reason"]) for line in lines(path)]
    assert told == [bad(1), bad(2), bad(1, "another reason"), bad(3, "naïve \ud800")]


def test_the_console_hears_the_first_ones_and_then_a_number_a_minute(tmp_path: Path) -> None:
    now = [0.0]
    kept = BadSamples(tmp_path / FILE, lambda: now[0])
    said = kept.add([bad(n) for n in range(SAID + 5)])
    assert len(said) == SAID
    assert said[0] == "sample 's0' of shard part.tar: it is empty; it is skipped"
    now[0] = PAUSE - 1
    assert kept.add([bad(100)]) == []
    now[0] = PAUSE
    (number,) = kept.add([bad(101), bad(101)])
    assert number == f"7 more samples are skipped; {tmp_path / FILE} names all 17"
    assert kept.rest() == []
    now[0] = PAUSE + 1
    assert kept.add([bad(102)]) == []
    assert kept.rest() == [f"1 more samples are skipped; {tmp_path / FILE} names all 18"]


def test_a_key_cannot_write_to_the_terminal(tmp_path: Path) -> None:
    odd = Bad("part.tar", "s\x1b[2J\n\u202e\ud800é", "a caption 'naïve\r' is bad")
    (said,) = BadSamples(tmp_path / FILE).add([odd])
    assert said == r"sample 's\x1b[2J\n\u202e\ud800é' of shard part.tar: a caption 'naïve\r' is bad; it is skipped"
    assert tuple(lines(tmp_path / FILE)[0].values()) == odd


def test_a_budget_of_few_and_of_many() -> None:
    budget = Budget(share=0.01, always=100)
    assert not budget.spent(bad=100, seen=100)  # says little yet
    assert budget.spent(bad=101, seen=10_000)
    assert not budget.spent(bad=500_000, seen=100_000_000)
    assert Budget(share=0.0, always=0).spent(bad=1, seen=10**9)
    assert "write a larger data.bad_always and go on" in budget.refusal(101, 10_000, bad(1), Path(FILE))
    assert "write a larger data.bad_budget and go on" in budget.refusal(102, 10_001, bad(1), Path(FILE))


# --- a whole run -------------------------------------------------------------------------------------------


def run(out: Path, data: str, *arguments: str) -> tuple[int, str]:
    """(exit code, output) of a tiny run on two ranks."""
    keys = (f"steps={STEPS}", f"data.train={data}", f"data.val={data}", "data.bad_budget=0", *arguments)
    done = subprocess.run(
        pretrain_command(2, out, *keys),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_a_run_names_what_it_skips_on_any_rank_and_ends_when_that_is_too_much(tmp_path: Path) -> None:
    special = {n: sample(n, picture=b"no picture") for n in (5, 11, 14)}
    data, out = write_samples(tmp_path / "shards", 24, 12, special), tmp_path / "run"
    code, said = run(out, data, "data.bad_always=3")
    assert code == 1, said  # torchrun's own
    assert said.count("exitcode  : 3") == 2, said
    assert re.search(
        r"\d+ samples had to be skipped while \d+ were served, more than data.bad_budget=0 and data.bad_always=3 "
        r"allow; the last: sample 's0\d\d' of shard \S+: the picture in 'png' cannot be decoded",
        said,
    ), said
    stopped = figures(out)[-1]
    assert stopped["bad_samples"] > 3
    assert (out / "checkpoints" / "latest").read_text().strip() == f"step_{stopped['step']:08d}"
    code, said = run(out, data, "data.bad_always=30")
    assert code == 0, said
    assert sorted(line["key"] for line in lines(out / FILE)) == ["s005", "s011", "s014"]
    steps = [line for line in metrics(out) if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert steps[-1]["bad_samples"] == 3 * 2  # two epochs
