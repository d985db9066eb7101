"""Weights in and out: reading files without running code from them, and renaming tensors strictly, both ways."""

from __future__ import annotations

import json
import pickle
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vlscale.errors import CheckpointError, ConfigError
from vlscale.families.base import Rename, Renames
from vlscale.model import PretrainModel
from vlscale.saving import checkpoint, pieces

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
PARALLEL = "module."  # what DistributedDataParallel puts before every name
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
            taken, and DDP's `module.` before every name is left out), or a folder with such a file or a
            Hugging Face index; or a checkpoint of ours, whose weights are then the fp32 masters, once every file
            is what was written (all ranks take part).

    Raises:
        CheckpointError: it is missing, unreadable, not a dict of tensors, or would need code to run.
    """
    path = Path(path)
    if path.is_dir() and next(path.glob(pieces.FILES), None):
        return checkpoint.weights(checkpoint.open_checkpoint(path), exact=True)
    file = _in_folder(path) if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(f"no weights at {file}; give a {', '.join(SUFFIXES)} file or a folder with one")
    try:
        found = _content(file)
    except UNREADABLE as error:
        raise CheckpointError(f"{file} cannot be read as plain tensors ({_reason(error)})") from error
    tensors = {name: value for name, value in found.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(f"{file} holds no tensors under its top level, 'model' or 'state_dict'")
    parallel = all(name.startswith(PARALLEL) for name in tensors)
    return {name.removeprefix(PARALLEL): value for name, value in tensors.items()} if parallel else tensors


def _reason(error: Exception) -> str:
    """Why a file could not be read, and what to do."""
    message = str(error) or type(error).__name__
    if isinstance(error, pickle.UnpicklingError) or "TorchScript" in message:
        wanted = re.search(r"GLOBAL ([\w.]+)", message)
        what = f" of {wanted.group(1)}" if wanted else ""
        return (
            f"it needs code{what} to run, and code from a file is never run here; where you trust it, load it "
            f"yourself and save its state_dict with safetensors"
        )
    return f"{message.splitlines()[0]}; save it as safetensors, or get it whole"


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
        if odd := next((shard for shard in shards if Path(shard).name != shard), None):
            raise CheckpointError(f"{file} lists {odd!r}, which is no file beside it")
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


@dataclass(frozen=True)
class Published:
    """What `publish` made."""

    tensors: dict[str, Tensor]  # by published name
    nameless: tuple[str, ...]  # ours that the table has no name for, or whose name another one has


class Place(NamedTuple):
    """One target of a row, backwards."""

    row: Rename
    number: int  # among the row's targets
    pattern: re.Pattern[str]  # our names


@torch.no_grad()
def publish(tensors: Mapping[str, Tensor], renames: Renames) -> Published:
    """Our tensors under the published names: `fill` backwards, to the bit where that only moved numbers.

    Of several of ours that came from one published tensor (a twin, a second head) the first is written.
    """
    gathered: dict[str, dict[int, Tensor]] = {}
    sources: dict[str, str] = {}
    nameless = []
    rows = [
        Place(row, number, _reversed(row.source, target))
        for row in renames.rows
        for number, target in enumerate(row.targets)
    ]
    for ours, tensor in tensors.items():
        places = _published_names(ours, rows, renames)
        network = ours.split(".")[0]
        fresh = {
            name: place
            for name, place in places.items()
            if name not in gathered or (place.row.joined and sources[name].split(".")[0] == network)
        }
        if not fresh:
            nameless.append(ours)
        for name, (row, number, _) in fresh.items():
            part = tensor.chunk(row.part[1])[row.part[0]]
            gathered.setdefault(name, {})[number] = part if row.back is None else row.back(part)
            sources.setdefault(name, ours)
    found = {
        name: torch.cat([each for _, each in sorted(own.items())]) if len(own) > 1 else next(iter(own.values()))
        for name, own in gathered.items()
    }
    return Published({name: each.contiguous() for name, each in found.items()}, tuple(nameless))


def _published_names(ours: str, rows: Iterable[Place], renames: Renames) -> dict[str, Place]:
    """{published name: where it stands} of one of our tensors: one, or as many as it has parts."""
    found: dict[tuple[int, int], tuple[str, Place]] = {}
    for place in rows:
        row, match = place.row, place.pattern.fullmatch(ours)
        if match is None or row.part in found or any(part[1] != row.part[1] for part in found):
            continue
        name = _spelled(row.source, match)
        if find(name, renames)[0] is row:  # else an earlier row would take it elsewhere
            found[row.part] = (name, place)
    return dict(found.values())


# A table's regular expressions are made of these: a group, a choice (perhaps optional), and characters.
TOKEN = re.compile(r"\((?!\?)(?P<group>[^()]*)\)|\(\?:(?P<choice>[^()]*)\)(?P<maybe>\??)|\\?(?P<letter>[^()])")


def _reversed(source: str, target: str) -> re.Pattern[str]:
    """What matches our names of a row's target, with the groups (g1, g2, ...) of its source."""
    groups = [token["group"] for token in TOKEN.finditer(source) if token["group"] is not None]
    out = ""
    for place, part in enumerate(re.split(r"\\(\d)", target)):
        seen = f"(?P<g{part}>" in out
        out += (
            re.escape(part) if place % 2 == 0 else f"(?P=g{part})" if seen else f"(?P<g{part}>{groups[int(part) - 1]})"
        )
    return re.compile(out)


def _spelled(source: str, match: re.Match[str]) -> str:
    """The published name: groups from our name, the first of a choice, nothing of what is optional."""
    out, number = "", 0
    for token in TOKEN.finditer(source):
        if token["group"] is not None:
            number += 1
            out += match[f"g{number}"]
        elif token["choice"] is not None:
            out += "" if token["maybe"] else token["choice"].split("|")[0].replace("\\", "")
        else:
            out += token["letter"]
    return out


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
    if row.rows != "all":
        slot = slot[: len(changed)] if row.rows == "first" else slot[-len(changed) :]
    if changed.shape != slot.shape:
        raise CheckpointError(
            f"tensor '{name}' is {tuple(tensor.shape)}, but {target} is {tuple(slot.shape)}; "
            f"set the recipe's family (or objective) to the file's sizes"
        )
    slot.copy_(changed)


def init_towers(
    model: PretrainModel, text: str | Path | None, vision: str | Path | None, codebook: str | Path | None = None
) -> dict[str, Loaded]:
    """Start towers from published weights (keys `init.text`, `init.vision`, `init.codebook`), then copy them to the
    twins.

    Args:
        model: on the CPU, before DeepSpeed has it.
        text: e.g. a folder with bert-base-uncased, or None.
        vision: e.g. a DeiT or ViT file in timm's or transformers' names, or None.
        codebook: of visual words, as `launchers/visual_words.py grow` makes it, or None.

    Returns:
        {"text", "vision", "codebook"}: what was filled, for those given.

    Raises:
        ConfigError: the family has no such tower.
        CheckpointError: as `read` and `fill`.
    """
    done = {}
    given = {
        "text": (text, model.family.init_text),
        "vision": (vision, model.family.init_vision),
        "codebook": (codebook, model.family.init_codebook),
    }
    for tower, (path, renames) in given.items():
        if path is None:
            continue
        if not renames.rows:
            system = type(model.family).__name__
            raise ConfigError(f"init.{tower} is set, but family '{system}' has no such start; leave it out")
        done[tower] = fill(model, read(path), renames)
    if done:
        _start_twins(model)
    return done


@torch.no_grad()
def init_whole(model: PretrainModel, path: str | Path) -> Loaded:
    """Start from whole-model weights in our own names (key `init.weights`); twins start as copies.

    The family must be filled exactly. Heads are taken where the run's objectives have them; queues start anew, for
    their keys are those of an earlier twin.

    Args:
        model: on the CPU, before DeepSpeed has it.
        path: a folder of `launchers/convert.py`, a checkpoint, or a file of `--merge`.

    Raises:
        CheckpointError: as `read`; a tensor of the family is missing, unknown or of another shape.
    """
    tensors = read(path)
    places = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    places = {name: place for name, place in places.items() if not name.startswith(("twin.", "queues."))}
    network = {name for name in places if name.startswith("family.")}
    odd = sorted(network.symmetric_difference(name for name in tensors if name.startswith("family.")))
    if odd:
        where = f"{path} lacks" if odd[0] in network else f"the run's family has no place for {path}'s"
        raise CheckpointError(
            f"{where} '{odd[0]}' ({len(odd)} tensors differ); give init.weights of this family and size, in our names"
        )
    for name in places.keys() & tensors.keys():
        if places[name].shape != tensors[name].shape:
            raise CheckpointError(
                f"'{name}' is {tuple(tensors[name].shape)} in {path}, but {tuple(places[name].shape)} in this run; "
                f"set the recipe's family (or objective) to the file's sizes"
            )
        places[name].copy_(tensors[name])
    _start_twins(model)
    filled = [name for name in places if name in tensors]
    left = [name for name in places if name not in tensors]
    queues = [name for name, _ in model.named_buffers() if name.startswith("queues.")]
    return Loaded(tuple(filled), tuple(name for name in tensors if name not in places), (*left, *queues))


def owners(names: Iterable[str]) -> str:
    """Tensor names in short: `objectives.itm, queues.text, twin`, or `nothing`."""
    parts = (name.split(".") for name in names)
    short = {".".join(part[:2]) if part[0] in ("objectives", "queues") else part[0] for part in parts}
    return ", ".join(sorted(short)) or "nothing"


@torch.no_grad()
def _start_twins(model: PretrainModel) -> None:
    """Make every twin a copy of what it follows."""
    for online, twin in model.momentum_pairs():
        twin.copy_(online)
    if model.twin is not None:
        for buffer, own in zip(model.family.buffers(), model.twin.buffers(), strict=True):
            own.copy_(buffer)
