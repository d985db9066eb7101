"""What can go wrong, as plain data that a seed draws and a line of output shows."""

from __future__ import annotations

import random
from dataclasses import dataclass, fields

EVERYONE = -1
PHASES = ("data", "forward", "backward", "step", "commit", "after_step", "record", "vote")  # see `harm`
BROKEN_DISKS = ("ENOSPC", "EDQUOT", "EIO", "EACCES", "EROFS")


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong in a start of a run; which of the fields count, its kind tells."""

    kind: str  # kill, stop, disk, read, full, flip, truncate, latest, clock, slow, worker
    where: str = ""  # of a kill: time, file, or one of PHASES
    how: str = ""  # of a kill at a file: before, after, torn, power; of a disk: the error's name
    rank: int = EVERYONE
    # 0 to 1 when drawn, of the steps or operations that are left; then which one: 7.25 = a quarter into step 7
    number: float = 0.0
    count: int = 1  # operations or steps that it lasts

    def __str__(self) -> str:
        shown = [self.kind, self.where, self.how, "" if self.rank == EVERYONE else f"rank {self.rank}"]
        shown += [f"{self.number:.3g}", f"x{self.count}" if self.count != 1 else ""]
        return " ".join(word for word in shown if word)

    @property
    def timed(self) -> bool:
        """Whether it is a signal that comes at a point of time."""
        return self.kind == "stop" or (self.kind, self.where) == ("kill", "time")

    def record(self) -> dict[str, object]:
        """For a JSON file."""
        return {each.name: getattr(self, each.name) for each in fields(self)}


Start = tuple[Fault, ...]  # what goes wrong in one start of the run


def draw(rng: random.Random, ranks: int) -> list[Start]:
    """The starts of a run until it is left alone: 1 to 3 are killed, others have it otherwise."""
    starts: list[Start] = []
    for number in range(rng.choice((1, 1, 1, 2, 2, 3))):
        if number and rng.random() < 0.4:
            starts.append((_survivable(rng, ranks),))
        beside = (_survivable(rng, ranks),) if rng.random() < 0.3 else ()
        after = (_damage(rng),) if rng.random() < 0.3 else ()
        starts.append((_end(rng, ranks), *beside, *after))
    return starts


def _rank(rng: random.Random, ranks: int) -> int:
    return rng.randrange(ranks)


def _end(rng: random.Random, ranks: int) -> Fault:
    """A kill, or seldom a stop on request."""
    rank = rng.choice((EVERYONE, _rank(rng, ranks)))
    where = rng.choices(("time", "phase", "file", "stop"), (3, 3, 5, 1))[0]
    if where == "stop":
        return Fault("stop", rank=rank, number=rng.random())
    if where == "phase":
        return Fault("kill", rng.choice(PHASES), rank=rank, number=rng.random())
    if where == "file":
        how = rng.choice(("before", "after", "torn", "power"))
        return Fault("kill", "file", how, rank, rng.random())
    return Fault("kill", "time", rank=rank, number=rng.random())


def _survivable(rng: random.Random, ranks: int) -> Fault:
    """What a run must come through, or end of with its own words."""
    kind = rng.choices(("disk", "full", "read", "clock", "slow", "worker"), (6, 2, 2, 1, 1, 2))[0]
    number, rank = rng.random(), _rank(rng, ranks)
    if kind == "disk":
        return Fault(kind, "", rng.choice(BROKEN_DISKS), rank, number, rng.choice((1, 1, 3, 10, 1000)))
    if kind == "full":
        return Fault(kind, "", "", 0, number, rng.choice((2, 4, 100)))
    if kind == "read":
        return Fault(kind, "", "EIO", rank, number)
    if kind == "clock":
        return Fault(kind, "", rng.choice(("on", "back")), EVERYONE, number)
    return Fault(kind, "", "", rank, number)


def _damage(rng: random.Random) -> Fault:
    """What becomes of the newest checkpoint after the end."""
    return Fault(rng.choice(("flip", "truncate", "latest")), number=rng.random())
