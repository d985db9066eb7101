"""What can go wrong for a user, one class per exit code (see `EXIT_CODES` in the README).

Raise these with one sentence: what was found, where, and what to write instead. The launchers print that
sentence and end with `exit_code`; a traceback is for our own mistakes only.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence

DONE = 0
STOPPED = 75  # stopped on request after saving; the same command goes on (BSD's EX_TEMPFAIL)


class VlscaleError(Exception):
    """A mistake that the user can mend; `exit_code` is what the process ends with."""

    exit_code = 1


class ConfigError(VlscaleError):
    """Wrong usage or configuration."""

    exit_code = 2


class DataError(VlscaleError):
    """Data missing or unusable."""

    exit_code = 3


class TrainingError(VlscaleError):
    """Training stopped by its own rules: non-finite budget spent, ranks disagree, a hang."""

    exit_code = 4


class CheckpointError(VlscaleError):
    """No usable checkpoint."""

    exit_code = 5


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error sentence: `; did you mean 'x'?`, or the list of what exists."""
    choices = sorted(known)
    near = difflib.get_close_matches(str(name), choices, n=1, cutoff=0.6)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; there is {', '.join(choices)}" if choices else ""


def differences(everyone: Sequence[Mapping[str, str]]) -> str:
    """What differs from rank 0, e.g. `task is 'all' on rank 0 but 'words' on rank 1, 3`."""
    found = []
    for key in sorted({key for each in everyone for key in each}):
        others: dict[str, list[str]] = {}
        for rank, each in enumerate(everyone):
            others.setdefault(repr(each.get(key)), []).append(str(rank))
        if len(others) > 1:
            first, *rest = others.items()
            there = " and ".join(f"{value} on rank {', '.join(ranks)}" for value, ranks in rest)
            found.append(f"{key} is {first[0]} on rank {', '.join(first[1])} but {there}")
    return "; ".join(found)
