"""What a training step costs here against another checkout: both train, in turn, a few steps at a time.

    git worktree add /somewhere COMMIT
    python -m tests.faults.overhead /somewhere

Each runs `launchers/pretrain.py` of its own checkout with what is on by default: watchdog, votes, recording; only
checkpoints are far away. While one makes its steps the other waits, so that both see the same machine. The figures
are medians over the turns: CPU seconds of all threads of all ranks, which others on the machine disturb little, and
the time by the clock.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[2]
FIRST = 6  # steps before the first turn
CHILD = "--as-a-rank"


def main(argv: Sequence[str]) -> int:
    """Measure and tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="another checkout of this project")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--turns", type=int, default=40, help="of each; default %(default)s")
    parser.add_argument("--steps", type=int, default=4, help="of a turn; default %(default)s")
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--ds_config", default="ds_configs/zero2.json")
    arguments, overrides = parser.parse_known_args(argv)
    with tempfile.TemporaryDirectory(prefix="overhead-") as folder:
        runs = [Run(each, Path(folder), arguments, overrides) for each in (HERE, arguments.other.resolve())]
        turns = [[run.turn() for run in runs] for _ in range(arguments.turns + 1)][1:]
        for run in runs:
            run.end()
    for name, place in (("CPU seconds", 0), ("seconds", 1)):
        here, there = ([each[number][place] / arguments.steps for each in turns] for number in (0, 1))
        ratios = sorted(one / other - 1 for one, other in zip(here, there, strict=True))
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(
            f"{name} per step: here {statistics.median(here):.4f}, there {statistics.median(there):.4f}; "
            f"difference {middle:+.2%} (quartiles {low:+.2%} to {high:+.2%}, {len(ratios)} turns)"
        )
    return 0


class Run:
    """A training run of a checkout that makes some steps when it is told to."""

    def __init__(self, checkout: Path, folder: Path, arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
        out = folder / f"run-{len(list(folder.iterdir()))}"
        out.mkdir()
        command = ["launchers/pretrain.py", "--recipe", arguments.recipe, "--ds_config", arguments.ds_config]
        command += ["--out", str(out / "run"), "steps=1000000", "checkpoint.every=1000000", "evaluation.every=0"]
        command += overrides
        self._ranks = [
            _Rank(checkout, rank, arguments, command, out / f"{rank}.txt") for rank in range(arguments.ranks)
        ]
        for rank in self._ranks:
            rank.told()

    def turn(self) -> tuple[float, float]:
        """Make the steps of a turn: CPU seconds of all ranks, and seconds."""
        before = [rank.now for rank in self._ranks]
        for rank in self._ranks:
            rank.go()
        began = time.perf_counter()
        cpu = sum(rank.told() - then for rank, then in zip(self._ranks, before, strict=True))
        return cpu, time.perf_counter() - began

    def end(self) -> None:
        """End its processes."""
        for rank in self._ranks:
            rank.process.kill()
            rank.process.wait()


class _Rank:
    def __init__(
        self, checkout: Path, rank: int, arguments: argparse.Namespace, command: Sequence[str], log: Path
    ) -> None:
        hears, self._tell = os.pipe()
        listen, tells = os.pipe()
        environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(arguments.ranks)}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _port(checkout), "OMP_NUM_THREADS": "1"}
        environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(checkout)}
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, __file__, CHILD, str(hears), str(tells), str(arguments.steps), *command],
                cwd=checkout,
                env={**os.environ, **environment},
                pass_fds=(hears, tells),
                stdout=file,
                stderr=file,
            )
        os.close(hears)
        os.close(tells)
        self._listen = os.fdopen(listen)
        self._log = log
        self.now = 0.0

    def go(self) -> None:
        os.write(self._tell, b"\n")

    def told(self) -> float:
        """Wait for the end of its turn: the CPU seconds that it has used so far."""
        line = self._listen.readline()
        if not line:
            raise RuntimeError(self._log.read_text())
        self.now = float(json.loads(line))
        return self.now


_PORTS: dict[Path, str] = {}


def _port(checkout: Path) -> str:
    if checkout not in _PORTS:
        import socket

        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            _PORTS[checkout] = str(probe.getsockname()[1])
    return _PORTS[checkout]


def be_a_rank(hears: int, tells: int, steps: int, command: list[str]) -> None:
    """Train, and wait at every `steps`th step for the word to go on."""
    sys.path[0] = os.getcwd()
    from vlscale import train

    assert Path(train.__file__).is_relative_to(os.getcwd())
    seed_step: Any = train.seed_step

    def begun(seed: int, step: int, *rest: Any) -> None:
        if step >= FIRST and (step - FIRST) % steps == 0:
            os.write(tells, f"{json.dumps(time.process_time())}\n".encode())
            os.read(hears, 1)
        seed_step(seed, step, *rest)

    train.seed_step = begun
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


if __name__ == "__main__":
    if sys.argv[1:2] == [CHILD]:
        be_a_rank(int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5:])
    sys.exit(main(sys.argv[1:]))
