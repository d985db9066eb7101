"""What becomes of samples that a run cannot use: each is named once in a file, few are said aloud, too many end it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from vlscale.data.samples import Bad, BrokenSampleError
from vlscale.lines import Lines

FILE = "bad_samples.jsonl"
SAID = 10  # samples that the console names; of the rest it hears a number
PAUSE = 60.0  # seconds between two such numbers


class BadSamples:
    """`bad_samples.jsonl` of a run folder: one line for each sample and reason, however often it is met."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """Go on with the file of a run that was stopped; one is made with the first line."""
        self._path = path
        self._clock = clock
        self._file = Lines(path)
        self._known = {hash(line) for line in _whole_lines(path)}  # hashes: a crawl has broken samples by the million
        self._said = 0
        self._unsaid = 0
        self._said_at = clock()

    def add(self, found: Iterable[Bad]) -> list[str]:
        """Write down those that are not there yet; what the console should hear of them."""
        lines = {json.dumps(bad._asdict()): bad for bad in found}
        fresh = {line: bad for line, bad in lines.items() if hash(line) not in self._known}
        if fresh:
            self._file.add("".join(f"{line}\n" for line in fresh))
            self._file.close()
        self._known.update(map(hash, fresh))
        named = list(fresh.values())[: SAID - self._said]
        self._said += len(named)
        self._unsaid += len(fresh) - len(named)
        messages = [f"{BrokenSampleError(*bad)}; it is skipped" for bad in named]
        return messages + ([self._number()] if self._clock() - self._said_at >= PAUSE and self._unsaid else [])

    def rest(self) -> list[str]:
        """What the console has not heard yet."""
        return [self._number()] if self._unsaid else []

    def _number(self) -> str:
        unsaid, self._unsaid = self._unsaid, 0
        self._said_at = self._clock()
        return f"{unsaid} more samples are skipped; {self._path} names all {len(self._known)}"


def _whole_lines(path: Path) -> list[str]:
    """The lines of the file; one that was cut off in writing is taken out of it."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
    return content[:whole].decode("utf-8", "replace").splitlines()


@dataclass(frozen=True)
class Budget:
    """How many samples may be skipped before a run ends."""

    share: float  # of the samples served
    always: int  # so many may be broken whatever their share, for a share of few says little

    def spent(self, bad: int, seen: int) -> bool:
        """Whether `bad` skipped ones are too many where `seen` were served."""
        return bad > max(self.always, self.share * seen)

    def limit(self, seen: int) -> tuple[str, float]:
        """The key that allows most where `seen` were served, and its value."""
        share = ("data.bad_budget", self.share)
        return share if self.share * seen > self.always else ("data.bad_always", self.always)

    def refusal(self, bad: int, seen: int, last: Bad, file: Path) -> str:
        """The sentence that ends the run."""
        return (
            f"{bad} samples had to be skipped while {seen} were served, more than data.bad_budget={self.share:g} and "
            f"data.bad_always={self.always} allow; the last: {BrokenSampleError(*last)}; "
            f"{file} names each: mend or leave out those shards, or write a larger {self.limit(seen)[0]} and go on"
        )
