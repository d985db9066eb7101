"""Folders of reference tensors as tests use them: compared whole, and with one tensor spoilt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from tests.reference.__main__ import main


def agreed(folder: Path, scratch: Path) -> dict[str, Any]:
    """The report of a folder that agrees, in which every tensor of its outputs is compared."""
    report = scratch / "report.json"
    assert main([str(folder), "--json", str(report)]) == 0
    found: dict[str, Any] = json.loads(report.read_text())
    assert {row["name"] for row in found["compared"]} == set(load_file(folder / "outputs.safetensors"))
    return found


def copied(folder: Path, scratch: Path) -> Path:
    """A writable copy under the same last name."""
    copy = scratch / folder.name
    copy.mkdir()
    for each in folder.iterdir():
        (copy / each.name).write_bytes(each.read_bytes())
    return copy


def spoilt(folder: Path, scratch: Path, name: str, file: str = "outputs") -> Path:
    """A copy under the same last name, in whose `file` one tensor is a hundredth larger."""
    copy = copied(folder, scratch)
    path = copy / f"{file}.safetensors"
    tensors = load_file(path)
    tensors[name] = tensors[name] * 1.01
    save_file(tensors, path)
    return copy
