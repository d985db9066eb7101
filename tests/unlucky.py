"""Sources that end the work; in a file of their own, which other processes import quickly."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from vlscale.data.making.write import Layout, Sample, make
from vlscale.data.parallel import FEW


class Unlucky:
    """Its second picture ends the process that converts it, unless that is the one that started."""

    def items(self) -> Iterator[tuple[str, int]]:
        return iter([("a", 0), ("b", os.getpid()), *((f"c{n}", 0) for n in range(FEW))])

    def sample(self, name: str, item: int) -> Sample:
        if item and os.getpid() != item:
            os.kill(os.getpid(), signal.SIGKILL)
        return Sample({"caption": name})


class Unreadable(Unlucky):
    """Its pictures may not be read."""

    def sample(self, name: str, item: int) -> Sample:
        raise PermissionError(13, "Permission denied", name)


@dataclass(frozen=True)
class Numbered:
    """Texts alone, of which 3 and 6 are broken; from `fails_at` on they may not be read."""

    samples: int
    name: str = "n"
    fails_at: int | None = None

    def items(self) -> Iterator[tuple[str, int]]:
        return iter([(f"{self.name}{n}", n) for n in range(self.samples)])

    def sample(self, name: str, item: int) -> Sample:
        if self.fails_at is not None and item >= self.fails_at:
            raise PermissionError(13, "Permission denied", name)
        if item in (3, 6):
            raise ValueError(f"it is number {item}")
        return Sample({"caption": name})


def in_child(work: Callable[[], Any]) -> int:
    """Do it in a forked process; its exit code."""
    child = os.fork()
    if not child:
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die_at(number: int) -> None:
    """The `number`-th fsync or rename is this process's last, at once and without any cleaning up."""
    calls = count(1)

    def mortal(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any) -> Any:
            result = function(*arguments)
            if next(calls) == number:
                os._exit(9)
            return result

        return wrapped

    os.fsync, os.replace = mortal(os.fsync), mortal(os.replace)


def killed_everywhere(folder: Path, samples: int) -> None:
    """For each step of a `make`, a folder in which one ended there and another went on to the end."""
    for number in count(1):
        layout = Layout(folder / f"{number:03d}", "data", samples=3)

        def killed(layout: Layout = layout, number: int = number) -> None:
            die_at(number)
            make(Numbered(samples), layout)

        code = in_child(killed)
        make(Numbered(samples), layout)
        if code == 0:
            return


if __name__ == "__main__":
    killed_everywhere(Path(sys.argv[1]), int(sys.argv[2]))
