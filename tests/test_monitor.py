from __future__ import annotations

import errno
import io
import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from vlscale.monitor import Monitor


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Shown(NamedTuple):
    picture: Tensor
    caption: str
    rank: int


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def values(step: int) -> dict[str, Any]:
    return {
        "loss": 1.0 / step,
        "samples_per_second": 100.0,
        "seconds_per_step": 2.0,
        "task": "all",
        "mfu": None,
    }


def run(out: Path, start: int, steps: int, until: int | None = None, **options: Any) -> str:
    console = options.pop("console", io.StringIO())
    monitor = Monitor(out, steps=steps, start=start, rank=0, console=console, **options)
    for step in range(start + 1, (until or steps) + 1):
        monitor.scalars(step, values(step))
    monitor.close()
    return str(console.getvalue())


def test_one_json_object_per_step_with_the_step_first(tmp_path: Path) -> None:
    run(tmp_path, 0, 3, tensorboard=False)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    assert next(iter(lines(tmp_path)[0])) == "step"
    assert lines(tmp_path)[1] == {"step": 2, **values(2)}


def test_what_is_not_a_number_becomes_null(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path, steps=1, start=0, rank=0, tensorboard=False, console=io.StringIO())
    monitor.scalars(1, {"loss": math.nan, "grad_norm": math.inf, "seconds_per_step": math.nan})
    text = (tmp_path / "metrics.jsonl").read_text()  # flushed before `close`
    monitor.close()
    assert text == '{"step": 1, "loss": null, "grad_norm": null, "seconds_per_step": null}\n'


def test_a_resumed_file_is_that_of_an_uninterrupted_run(tmp_path: Path) -> None:
    run(tmp_path / "whole", 0, 8, tensorboard=False)
    run(tmp_path / "cut", 0, 8, until=6, tensorboard=False)
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # killed while writing
    run(tmp_path / "cut", 5, 8, tensorboard=False)
    whole, cut = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "cut"))
    assert whole == cut
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == ["log.txt", "metrics.jsonl"]


def test_plain_lines_at_a_readable_pace(tmp_path: Path) -> None:
    said = run(tmp_path, 0, 50, tensorboard=False).splitlines()
    assert said[0] == "step 1/50  loss 1  100.0 samples/s  ETA 0:01:38"
    assert [line.split()[1] for line in said] == ["1/50", "2/50", "3/50", "50/50"]
    assert (tmp_path / "log.txt").read_text().splitlines() == said


def test_a_bar_on_a_terminal(tmp_path: Path) -> None:
    said = run(tmp_path, 5, 10, tensorboard=False, console=Terminal())
    assert "10/10" in said
    assert "loss 0.1" in said


def test_an_evaluation_is_said_in_full(tmp_path: Path) -> None:
    console = io.StringIO()
    monitor = Monitor(tmp_path, steps=9, start=0, rank=0, tensorboard=False, console=console)
    monitor.scalars(9, {"eval/retrieval/i2t_r1": 0.512345, "eval/retrieval/candidates": 500})
    monitor.scalars(9, {"eval/pretext/loss/mlm": 1.5, "eval/pretext/mlm/accuracy": 0.25})
    monitor.close()
    assert console.getvalue() == (
        "step 9/9  i2t_r1 0.5123  candidates 500\nstep 9/9  loss/mlm 1.5  mlm/accuracy 0.25\n"
    )


def test_other_ranks_write_only_warnings(tmp_path: Path) -> None:
    console = io.StringIO()
    monitor = Monitor(tmp_path, steps=1, start=0, rank=3, console=console)
    monitor.scalars(1, values(1))
    monitor.pictures(1, [Shown(torch.zeros(3, 2, 2, dtype=torch.uint8), "a", 1)])
    monitor.say("hello")
    monitor.warn("shard 7 is short")
    monitor.close()
    assert console.getvalue() == "warning (rank 3): shard 7 is short\n"
    assert [path.name for path in tmp_path.iterdir()] == ["log.txt"]


@pytest.mark.filterwarnings("default")  # TensorBoard's reader, not ours
def test_tensorboard_counts_optimizer_steps_and_forgets_what_was_cut(tmp_path: Path) -> None:
    run(tmp_path, 0, 8, until=6)
    monitor = Monitor(tmp_path, steps=8, start=4, rank=0, console=io.StringIO())
    for step in range(5, 9):
        monitor.scalars(step, {"loss": 100.0 + step, "task": "all"})
    monitor.pictures(8, [Shown(torch.zeros(3, 8, 8, dtype=torch.uint8), "a red ball", 2)])
    monitor.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    kept = [(event.step, event.value) for event in events.Scalars("loss")]
    assert [step for step, _ in kept] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert kept[4][1] == 105.0
    assert events.Tags()["images"] == ["retrieval/0"]
    assert b"rank 2: a red ball" in events.Tensors("retrieval/0/text_summary")[0].tensor_proto.string_val[0]


class FullDisk:
    """Takes so many bytes of a file, until it is given room."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free = 1 << 40
        disk, write = self, io.FileIO.write

        class File(io.FileIO):
            def write(self, data: Any, /) -> int:
                taken = min(len(data), disk.free)
                if not taken:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                disk.free -= taken
                return write(self, bytes(data)[:taken])

        def opened(path: Path, mode: str = "r", **options: Any) -> Any:
            if mode == "wb" and disk.free < 1 << 40:  # a new file
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return File(path, mode.replace("b", "")) if options == {"buffering": 0} else open(path, mode, **options)

        monkeypatch.setattr(Path, "open", opened)


def test_a_full_disk_ends_nothing_and_loses_no_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = FullDisk(monkeypatch)
    console = io.StringIO()
    monitor = Monitor(tmp_path, steps=5, start=0, rank=0, tensorboard=False, console=console)
    monitor.scalars(1, values(1))
    disk.free = 20
    for step in (2, 3):
        monitor.scalars(step, values(step))
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1
    disk.free = 1 << 40
    monitor.scalars(4, values(4))
    monitor.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]
    assert console.getvalue().count("metrics.jsonl cannot be written (No space left on device)") == 1
    assert "cannot be written" in (tmp_path / "log.txt").read_text()


def test_a_run_goes_on_and_back_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, 0, 8, until=6, tensorboard=False)
    disk = FullDisk(monkeypatch)
    disk.free = 200
    console = io.StringIO()
    monitor = Monitor(tmp_path, steps=8, start=4, rank=0, tensorboard=False, console=console)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]
    for step in (5, 6, 7, 8):  # of which the disk takes one and a part of the next
        monitor.scalars(step, values(step))
    monitor.go_back(6)
    disk.free = 1 << 40
    monitor.scalars(7, values(7))
    monitor.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6, 7]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.txt", "metrics.jsonl"]


def test_lines_that_no_disk_lets_go_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, 0, 8, until=6, tensorboard=False)
    read_only = mock.Mock(side_effect=OSError(errno.EROFS, os.strerror(errno.EROFS)))
    console = io.StringIO()
    with mock.patch.object(Path, "open", read_only):
        monitor = Monitor(tmp_path, steps=8, start=5, rank=0, tensorboard=False, console=console)
    assert "it still has lines of steps that are made again" in console.getvalue()
    monitor.close()


def test_tensorboard_ends_where_its_disk_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    console = io.StringIO()
    monitor = Monitor(tmp_path, steps=5, start=0, rank=0, console=console)
    monitor.scalars(1, values(1))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    assert monitor._writer is not None
    monkeypatch.setattr(monitor._writer, "add_scalar", full)
    monitor.scalars(2, values(2))
    monitor.scalars(3, values(3))
    monitor.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    assert console.getvalue().count("TensorBoard") == 1
