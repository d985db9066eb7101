"""Reading a folder of reference tensors, and judging ours against them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from vlscale.errors import ConfigError

ABSOLUTE = 1e-5  # either is enough, fp32
RELATIVE = 1e-4  # of the largest entry of the reference tensor


@dataclass(frozen=True)
class Folder:
    """A folder of reference tensors; `outputs` files are read by `judge` only."""

    path: Path
    config: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> Folder:
        """Raises ConfigError: no such folder, or no config.json in it."""
        config = path / "config.json"
        if not config.is_file():
            raise ConfigError(f"{path} holds no config.json; name a folder of reference tensors")
        return cls(path, json.loads(config.read_text()))

    def tensors(self, name: str) -> dict[str, Tensor]:
        """An input file; empty where the folder has no such file."""
        assert "outputs" not in name
        file = self.path / name
        return load_file(file) if file.is_file() else {}


class Loose(NamedTuple):
    """A tensor with entries that rounding alone decides; those stay within `slack`, others compare."""

    value: Tensor
    slack: Tensor  # same shape; 0 = compares as usual
    why: str


class Absent(NamedTuple):
    """In a value's place, under a shell pattern of names (`s3d/*`): tensors of a part that we do not have."""

    why: str


Value = Tensor | Loose | Absent


@dataclass(frozen=True)
class Row:
    """One compared tensor. `tolerance` is the largest allowed absolute difference."""

    name: str
    max_abs: float
    rel: float
    tolerance: float
    ok: bool


@dataclass(frozen=True)
class Report:
    """Everything compared, and what was not."""

    system: str
    compared: list[Row]
    not_compared: list[dict[str, str]]
    ok: bool

    def as_json(self) -> str:
        """The `--json` file; a difference that is not finite is null."""
        rows = [asdict(row) for row in self.compared]
        for row in rows:
            for key in ("max_abs", "rel"):
                row[key] = row[key] if torch.isfinite(torch.tensor(row[key])) else None
        return json.dumps({**asdict(self), "compared": rows}, indent=1, allow_nan=False)


def compare(name: str, ours: Tensor, theirs: Tensor) -> Row:
    """Integers and booleans must be equal; another shape or a NaN is an infinite difference."""
    if ours.shape != theirs.shape:
        return Row(f"{name} (shape {tuple(ours.shape)}, not {tuple(theirs.shape)})", *_never())
    exact = not theirs.is_floating_point()
    theirs, ours = theirs.detach().double(), ours.detach().double()
    if theirs.numel() == 0:
        return Row(name, 0.0, 0.0, 0.0, True)
    largest = float(theirs.abs().max())
    difference = float((ours - theirs).abs().max())
    if not torch.isfinite(torch.tensor(difference)):
        return Row(name, *_never())
    tolerance = 0.0 if exact else max(ABSOLUTE, RELATIVE * largest)
    relative = difference / largest if largest else (0.0 if difference == 0 else float("inf"))
    return Row(name, difference, relative, tolerance, difference <= tolerance)


def _never() -> tuple[float, float, float, bool]:
    return float("inf"), float("inf"), 0.0, False


def judge(folder: Folder, system: str, computed: Mapping[str, Mapping[str, Value]]) -> Report:
    """Compare what we computed, {file: {name: tensor}}, with every tensor of those files and of every outputs file.

    A tensor that we have no value for is reported, and fails the report unless an `Absent` says why.
    """
    compared: list[Row] = []
    left: list[dict[str, str]] = []
    missing = False
    named = (folder.path / name for name in computed)  # what a runner makes besides, e.g. `optimizer.safetensors`
    files = {*folder.path.rglob("*outputs*.safetensors"), *(file for file in named if file.is_file())}
    for file in sorted(files):
        place = file.relative_to(folder.path)  # `outputs.safetensors`, or `v1/outputs.safetensors` of a variant
        ours = computed.get(place.as_posix(), {})
        for name, theirs in sorted(load_file(file).items()):
            label = (place.parent / (name if file.stem == "outputs" else f"{file.stem}:{name}")).as_posix()
            value = ours[name] if name in ours else _absent(ours, name)
            if isinstance(value, Absent):
                left.append({"name": label, "why": value.why})
            elif value is None:
                missing = True
                left.append({"name": label, "why": "our computation has no value of this name"})
            elif isinstance(value, Loose) and value.value.shape == theirs.shape:
                compared.append(_compare_loosely(label, value, theirs))
                left.append({"name": f"{label}[{int((value.slack > 0).sum())} entries]", "why": value.why})
            else:
                value = value.value if isinstance(value, Loose) else value
                compared.append(compare(label, value, theirs))
    ok = bool(compared) and not missing and all(row.ok for row in compared)
    return Report(system, compared, left, ok)


def _absent(ours: Mapping[str, Value], name: str) -> Absent | None:
    """Why we have no value of this name, where a pattern says so."""
    reasons = (each for pattern, each in ours.items() if isinstance(each, Absent) and fnmatchcase(name, pattern))
    return next(reasons, None)


def _compare_loosely(label: str, ours: Loose, theirs: Tensor) -> Row:
    firm = ours.slack == 0
    row = compare(label, ours.value[firm], theirs[firm])
    within = (ours.value - theirs).abs() <= ours.slack + row.tolerance
    return row if bool(within[~firm].all()) else Row(f"{label} (entries beyond their bound)", *_never())
