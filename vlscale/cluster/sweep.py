"""Several runs that differ in some keys: their names, and a table of how they do."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlscale.errors import ConfigError
from vlscale.saving.targets import write_atomically

LONGEST = 200  # bytes of a folder's name; file systems take 255
SWEEP = "sweep.json"  # in the folder that holds the runs' folders


@dataclass(frozen=True)
class Variant:
    """One run of a sweep."""

    name: str  # of its folder
    overrides: tuple[str, ...]


def variants(words: Sequence[str]) -> list[Variant]:
    """All combinations of `KEY=V1,V2` words, the last word's values changing fastest.

    Raises:
        ConfigError: a word is not of that form, a key stands twice, or two runs would have one folder.
    """
    axes: list[list[str]] = []
    keys: list[str] = []
    for word in words:
        key, equals, text = word.partition("=")
        values = split(text)
        if not equals or not key or not all(values):
            raise ConfigError(f"--sweep {word}: write KEY=VALUE,VALUE, e.g. optim.lr=1e-4,3e-4")
        if key in keys:
            raise ConfigError(f"--sweep gives {key} twice; write all its values in one word")
        if len(set(values)) < len(values):
            raise ConfigError(f"--sweep {word} gives a value twice")
        keys.append(key)
        axes.append([f"{key}={value}" for value in values])
    found: dict[str, Variant] = {}
    for each in itertools.product(*axes):
        name = ",".join(each).replace("/", "_").replace(" ", "")
        if name in found:
            both = f"{' '.join(found[name].overrides)} and {' '.join(each)}"
            raise ConfigError(f"--sweep: {both} would have one folder, {name}; write values that differ in more")
        if len(name.encode()) > LONGEST:
            key = max(each, key=len).partition("=")[0]
            raise ConfigError(
                f"--sweep {key}: the name of a run's folder would be {len(name.encode())} bytes long, {LONGEST} are "
                f"allowed; write shorter values, or a recipe for each"
            )
        found[name] = Variant(name, each)
    return list(found.values())


def split(text: str) -> list[str]:
    """At the commas that stand in no brackets: `[1,2],[3]` is two values."""
    values, depth = [""], 0
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth == 0:
            values.append("")
        else:
            values[-1] += letter
    return values


def write(folder: Path, runs: Sequence[Variant]) -> None:
    """Keep which runs a folder holds: these, and those that it held before."""
    folder.mkdir(parents=True, exist_ok=True)
    held = {run.name: run for run in (*read(folder), *runs)}
    listed = {"runs": [{"name": run.name, "overrides": list(run.overrides)} for run in held.values()]}
    write_atomically(folder / SWEEP, json.dumps(listed, indent=2) + "\n")


def read(folder: Path) -> list[Variant]:
    """The runs of a folder; none if it holds no sweep."""
    try:
        listed = json.loads((folder / SWEEP).read_text())["runs"]
        return [Variant(str(run["name"]), tuple(map(str, run["overrides"]))) for run in listed]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder / SWEEP} cannot be read ({error})") from None


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Lines of aligned columns: every key that some row has, in the order of their first appearance."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([_text(row.get(name)) for name in names] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(names))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells)
    return "\n".join(lines)


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
