"""Published weights in: reading files without running code from them, and renaming tensors strictly."""

from __future__ import annotations

import json
import pickle
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vlscale.errors import CheckpointError, ConfigError
from vlscale.families.base import Rename, Renames
from vlscale.model import PretrainModel

NAMES = (  # what a weights folder holds, best first
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
UNREADABLE = (  # what the readers raise on cut, foreign or code-carrying files
    SafetensorError,
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    LookupError,
    struct.error,
)
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class Loaded:
    """What `fill` did."""

    filled: tuple[str, ...]  # our names, parameters and buffers
    unused: tuple[str, ...]  # published names that have no place in this model, knowingly
    left: tuple[str, ...]  # our parameters and buffers that keep their start


def read(path: str | Path) -> dict[str, Tensor]:
    """Every tensor of a weights file or folder, by its published name, on the CPU.

    No code from the file runs: safetensors, or torch's weights-only reader.

    Args:
        path: a .safetensors, .bin, .pt, .pth or .ckpt file (a checkpoint's `model` or `state_dict` part is
            taken), or a folder with such a file or a Hugging Face index.

    Raises:
        CheckpointError: it is missing, unreadable, not a dict of tensors, or would need code to run.
    """
    path = Path(path)
    file = _in_folder(path) if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(f"no weights at {file}; give a {', '.join(SUFFIXES)} file or a folder with one")
    try:
        found = _content(file)
    except UNREADABLE as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{file} cannot be read as plain tensors ({reason}); save it as safetensors, or get it whole"
        ) from error
    tensors = {name: value for name, value in found.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(f"{file} holds no tensors under its top level, 'model' or 'state_dict'")
    return tensors


def _in_folder(folder: Path) -> Path:
    for name in NAMES:
        if (folder / name).is_file():
            return folder / name
    files = sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES)
    if len(files) == 1:
        return files[0]
    raise CheckpointError(
        f"{folder} holds {len(files)} weights files, none called {NAMES[0]} or {NAMES[2]}; name the file"
    )


def _content(file: Path) -> dict[str, Any]:
    if file.name.endswith(".index.json"):
        shards = sorted(set(json.loads(file.read_text())["weight_map"].values()))
        return {name: tensor for shard in shards for name, tensor in read(file.parent / shard).items()}
    if file.suffix == ".safetensors":
        return dict(load_file(file))
    content = torch.load(file, map_location="cpu", weights_only=True)
    for part in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(part), dict):
            content = content[part]
    return content if isinstance(content, dict) else {}


def find(name: str, renames: Renames) -> tuple[Rename, tuple[str, ...]]:
    """The row for a published name, and our names that it stands for.

    Raises:
        CheckpointError: no row matches.
    """
    for row in renames.rows:
        match = re.fullmatch(row.source, name)
        if match:
            return row, tuple(match.expand(target) for target in row.targets)
    raise CheckpointError(
        f"tensor '{name}' is unknown to this family's table of names; these are the weights of another system"
    )


@torch.no_grad()
def fill(model: nn.Module, tensors: Mapping[str, Tensor], renames: Renames) -> Loaded:
    """Copy published tensors into the model, in place; every tensor has a row, every place its shape.

    Raises:
        CheckpointError: a tensor without a row or place, another shape, or a parameter that the
            table promises to fill and the file does not.
    """
    places = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    parts: dict[str, int] = {}
    unused = []
    for name, tensor in tensors.items():
        row, targets = find(name, renames)
        present = [target for target in targets if target in places]
        if targets and not present and not row.optional:
            raise CheckpointError(
                f"tensor '{name}' {tuple(tensor.shape)} has no place in this model ({' or '.join(targets)}); "
                f"the file is of another size: compare the number of layers with the recipe's family"
            )
        for target in present:
            _copy(name, tensor, row, target, places[target])
            parts[target] = parts.get(target, 0) + 1
            if parts[target] == row.part[1]:
                parts[target] = 0
        if not present:
            unused.append(name)
    half = [target for target, number in parts.items() if number]
    missing = [name for name, _ in model.named_parameters() if re.fullmatch(renames.fills, name) and name not in parts]
    if half or missing:
        raise CheckpointError(
            f"the file does not fill {len(half + missing)} parameters, first '{(half + missing)[0]}'; "
            f"it is incomplete or of another size"
        )
    return Loaded(tuple(parts), tuple(unused), tuple(name for name in places if name not in parts))


def _copy(name: str, tensor: Tensor, row: Rename, target: str, place: Tensor) -> None:
    index, number = row.part
    slot = place.chunk(number)[index]
    try:
        changed = tensor if row.change is None else row.change(tensor, slot.shape)
    except ValueError as error:
        raise CheckpointError(f"tensor '{name}' does not fit {target}: {error}") from error
    if changed.shape != slot.shape:
        raise CheckpointError(
            f"tensor '{name}' is {tuple(tensor.shape)}, but {target} is {tuple(slot.shape)}; "
            f"set the recipe's family (or objective) to the file's sizes"
        )
    slot.copy_(changed)


def init_towers(model: PretrainModel, text: str | Path | None, vision: str | Path | None) -> dict[str, Loaded]:
    """Start towers from published weights (keys `init.text`, `init.vision`), then copy them to the twins.

    Args:
        model: on the CPU, before DeepSpeed has it.
        text: e.g. a folder with bert-base-uncased, or None.
        vision: e.g. a DeiT or ViT file in timm's or transformers' names, or None.

    Returns:
        {"text", "vision"}: what was filled, for those given.

    Raises:
        ConfigError: the family has no such tower.
        CheckpointError: as `read` and `fill`.
    """
    done = {}
    given = {"text": (text, model.family.init_text), "vision": (vision, model.family.init_vision)}
    for tower, (path, renames) in given.items():
        if path is None:
            continue
        if not renames.rows:
            system = type(model.family).__name__
            raise ConfigError(f"init.{tower} is set, but family '{system}' has no such start; leave it out")
        done[tower] = fill(model, read(path), renames)
    with torch.no_grad():
        for online, twin in model.momentum_pairs() if done else []:
            twin.copy_(online)
    return done
