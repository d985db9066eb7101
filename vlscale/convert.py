"""Weights from one set of names to another: the authors', ours, those of `transformers`; a checkpoint to one file."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn

from vlscale import config, run_folder, vocabulary, weights
from vlscale.data.text import Tokenizer
from vlscale.errors import CheckpointError, ConfigError, did_you_mean
from vlscale.families.base import Renames, Size
from vlscale.hugging_face import FORMS
from vlscale.saving import checkpoint
from vlscale.types import DTYPES


class System(NamedTuple):
    """A published system."""

    family: str
    settings: Mapping[str, Any]  # of the family's Config, where they are not its defaults
    recipe: str | None = None  # whose sizes are the published ones, where the defaults are not
    names: str = "PUBLISHED"  # the table in the family's file


OTHERS = {  # systems that are not called as the family they are
    "tcl": System("albef", {}),
    "oscar_plus": System("oscar", {"region_norm": True}),
    "siglip": System("clip", {}, recipe="siglip_vit_b16", names="SIGLIP"),
}
WIDTHS = {  # whose numbers of heads no shape tells
    "hidden": ("heads", "cross_heads", "temporal_heads", "query_heads"),
    "visual_width": ("visual_heads",),
    "coattention_width": ("coattention_heads",),
}
MODEL = "model.safetensors"
SHOWN = 6  # names in a message


@dataclass(frozen=True)
class Own:
    """Weights under our names."""

    tensors: dict[str, Tensor]
    folder: Path  # where config.yaml and perhaps tokenizer.json lie
    found: checkpoint.Checkpoint | None = None  # whose they are; keeps what was fetched


def from_published(system: str, file: str, out: str, recipe: str | None, overrides: Sequence[str]) -> list[str]:
    """Authors' weights to a new folder with model.safetensors (our names) and config.yaml (the family).

    Sizes come from the recipe's family (None: the published one), then from the file's shapes, then from
    overrides `family.key=value`.

    Returns:
        The summary, line by line.

    Raises:
        ConfigError: no such system, sizes that the file does not tell, a folder that holds something.
        CheckpointError: an unreadable file, or one that is not this system's.
    """
    known = _system(system)
    name, module = known.family, config.pick("families", known.family)
    renames: Renames = getattr(module, known.names)
    folder = _new(Path(out))
    tensors = weights.read(file)
    tree = _recipe(known, recipe)
    told, sizes = _sizes(tree["family"], module.SIZES, tensors, overrides)
    networks = _networks(module.build(sizes), tensors, renames)
    loaded = weights.fill(networks, tensors, renames)
    found = {each: tensor.detach() for each, tensor in (*networks.named_parameters(), *networks.named_buffers())}
    heads = _heads(tensors, loaded.unused, renames, tree.get("objectives") or {})
    folder.mkdir(parents=True, exist_ok=True)
    _save(folder / MODEL, {**found, **heads}, system)
    family = {"name": name, **_plain(sizes)}
    (folder / run_folder.CONFIG).write_text(yaml.safe_dump({"family": family}, sort_keys=False))
    used = {each: tensor for each, tensor in tensors.items() if weights.find(each, renames)[1]}
    unused = [f"{each}{_copy_of(tensors[each], used)}" for each in tensors if each not in used]
    assumed = {key: value for key, value in _plain(sizes).items() if key not in told}
    return [
        f"{folder}: {len(used)} of {len(tensors)} tensors of {system}, as family {name}",
        f"told by their shapes: {_pairs(told)}",
        f"not told by shapes, so check: {_pairs(assumed)}",
        f"left at their start: {', '.join(loaded.left) or 'nothing'}",
        f"knowingly unused: {', '.join(unused[:SHOWN]) or 'nothing'}{_more(unused)}",
    ]


def into_published(system: str, source: str, out: str, dtype: str | None = None) -> list[str]:
    """Our weights to one file under the authors' names; returns the summary.

    Raises:
        ConfigError: no such system, or a file that is there already.
        CheckpointError: unreadable, or not this system's network.
    """
    known = _system(system)
    own, file = _own(source, dtype), _new_file(out)
    made = weights.publish(own.tensors, getattr(config.pick("families", known.family), known.names))
    foreign = [each for each in made.nameless if each.startswith("family.")]
    if foreign:
        raise CheckpointError(
            f"{source} holds {len(foreign)} tensors that {system} has no name for, first {', '.join(foreign[:SHOWN])}; "
            f"it is another family's"
        )
    _save(file, _cast(made.tensors, dtype), system)
    return [
        f"{file}: {len(made.tensors)} tensors under the names of {system}",
        f"left out, for they have no name or tensor of their own there: {weights.owners(made.nameless)}",
    ]


def to_hugging_face(source: str, out: str, dtype: str | None = None) -> list[str]:
    """Our weights to a new folder that `from_pretrained` of `transformers` reads; returns the summary.

    Raises:
        ConfigError: `transformers` has no such model, or the folder holds something.
        CheckpointError: unreadable, or without the family's configuration.
    """
    own, folder = _own(source, dtype), _new(Path(out))
    path = own.folder / run_folder.CONFIG
    if not path.is_file():
        raise CheckpointError(f"there is no {path} to tell the family; give a run, a checkpoint or a converted folder")
    name, sizes = config.family_of(config.read_yaml(path).get("family"))
    if name not in FORMS:
        raise ConfigError(f"transformers has no model that is family '{name}'; it has {', '.join(sorted(FORMS))}")
    form = FORMS[name](sizes)
    covered = {each: tensor for each, tensor in own.tensors.items() if re.fullmatch(form.covers, each)}
    made = weights.publish(covered, form.renames)
    tensors = {form.named(each): tensor for each, tensor in _cast(made.tensors, dtype).items()}
    described = form.config(sizes, own.tensors, _end_token(own.folder, sizes))
    foreign = [each for each in made.nameless if each.startswith("family.")]
    if foreign:
        raise ConfigError(
            f"transformers has no place for {', '.join(foreign[:SHOWN])} in {described['architectures'][0]}"
        )
    left_out = [*made.nameless, *(each for each in own.tensors if each not in covered)]
    folder.mkdir(parents=True, exist_ok=True)
    _save(folder / MODEL, tensors, None)
    kind = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps({**described, "dtype": kind}, indent=2) + "\n")
    return [
        f"{folder}: {len(tensors)} tensors for {described['architectures'][0]} of transformers",
        f"left out, for it has no place for them: {weights.owners(left_out)}",
    ]


def merge(source: str, out: str, dtype: str | None = None) -> list[str]:
    """A training checkpoint's weights, whole, to one file; returns the summary.

    Args:
        source: a run folder (its newest checkpoint), or a checkpoint.
        out: a .safetensors file.
        dtype: what the fp32 masters are rounded to (`fp32` = not at all); None = as they were trained.

    Raises:
        ConfigError: no such folder, or a file that is there already.
        CheckpointError: no usable checkpoint.
    """
    file, found = _new_file(out), checkpoint.find(source)
    exact = dtype is not None
    tensors = _cast(checkpoint.weights(found, exact), dtype)
    _save(file, tensors, None)
    return [f"{file}: {len(tensors)} tensors of step {found.step}{', from the fp32 masters' if exact else ''}"]


# --- where weights come from and go to ---------------------------------------------------------------------


def _own(source: str, dtype: str | None) -> Own:
    """Weights under our names: a file, a converted folder, a checkpoint or a run, whose masters are to be rounded to
    `dtype` (None: as they were trained).
    """
    path, found = Path(source), None
    if path.is_file() or (path / MODEL).is_file():
        folder = path if path.is_dir() else path.parent
        tensors = weights.read(path)
    else:
        found = checkpoint.find(source)
        folder, tensors = checkpoint.run_of(found), checkpoint.weights(found, exact=dtype is not None)
    if not any(name.startswith("family.") for name in tensors):
        raise CheckpointError(
            f"{source} holds no tensors under our names; `--from SYSTEM` turns the authors' into ours"
        )
    return Own(tensors, folder, found)


def _new(path: Path) -> Path:
    """A folder that may be written."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"{path} exists and is not an empty folder; give another one")
    return path


def _new_file(out: str) -> Path:
    path = Path(out)
    if path.suffix != ".safetensors":
        raise ConfigError(f"--to {out} should be a file whose name ends in .safetensors")
    if path.exists():
        raise ConfigError(f"--to {out} is there already; give another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _save(file: Path, tensors: Mapping[str, Tensor], system: str | None) -> None:
    """Under another name first, so that a file of the right name is whole."""
    partial = file.with_name(f".{file.name}.partial")
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, partial, {"format": "pt", **({"system": system} if system else {})})
    partial.replace(file)


def _cast(tensors: Mapping[str, Tensor], dtype: str | None) -> dict[str, Tensor]:
    if dtype is None:
        return dict(tensors)
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype} is not known{did_you_mean(dtype, DTYPES)}")
    return {name: each.to(DTYPES[dtype]) if each.is_floating_point() else each for name, each in tensors.items()}


def _end_token(folder: Path, sizes: Any) -> int:
    """The id that ends a text: of the run's tokenizer, else the last one, as in CLIP's."""
    file = folder / vocabulary.TOKENIZER
    found = Tokenizer(file, sizes.inputs).sep if file.is_file() else None
    return int(sizes.vocab) - 1 if found is None else found


# --- authors' files ----------------------------------------------------------------------------------------


def _families() -> list[str]:
    """Those whose authors' names we know."""
    names = sorted(path.stem for path in (config.HERE / "families").glob("*.py"))
    names = [name for name in names if name not in ("__init__", "base")]
    return [name for name in names if config.pick("families", name).PUBLISHED.rows]


def _system(system: str) -> System:
    known = {**{name: System(name, {}) for name in _families()}, **OTHERS}
    if system not in known:
        raise ConfigError(f"no system '{system}'{did_you_mean(system, known)}")
    return known[system]


def _recipe(system: System, recipe: str | None) -> dict[str, Any]:
    """The recipe's tree, or one of the published family alone."""
    if recipe is None and system.recipe is None:
        return {"family": {"name": system.family, **system.settings}}
    tree = config.read_yaml(config.find_recipe(recipe or str(system.recipe)))
    family, _ = config.family_of(tree.get("family"))
    if family != system.family:
        raise ConfigError(
            f"--recipe {recipe} is of family '{family}', but the weights are of '{system.family}'; give another"
        )
    return tree


def _sizes(
    family: Mapping[str, Any], known: Iterable[Size], tensors: Mapping[str, Tensor], overrides: Sequence[str]
) -> tuple[dict[str, Any], Any]:
    """({key: number that shapes tell}, the family's Config)."""
    _, before = config.family_of(family)
    numbers = _plain(before)
    given = {override.partition("=")[0] for override in overrides}
    told: dict[str, Any] = {}
    for size in known:
        number = _told(size, tensors)
        if not number or (size.change and f"family.{size.key}" in given):
            continue
        value = number if size.change is None else size.change(number, numbers)
        if value is not None:
            told[size.key] = numbers[size.key] = value
    tree: dict[str, Any] = {"family": {**family, **told}}
    for override in overrides:
        if not override.startswith("family."):
            raise ConfigError(f"'{override}' is no size of the network; write family.key=value, e.g. family.heads=12")
        config.apply_override(tree, override)
    made = config.family_of(tree["family"])[1]
    for width, each in WIDTHS.items():
        if width == "hidden" and not hasattr(before, "visual_width"):  # CBT: frames are as wide as words
            each = (*each, *WIDTHS["visual_width"])
        missing = [f"family.{heads}" for heads in each if hasattr(before, heads) and f"family.{heads}" not in given]
        if missing and getattr(made, width, 0) != getattr(before, width, 0):
            raise ConfigError(
                f"the file's network is {getattr(made, width)} wide, and shapes do not tell its heads; "
                f"add {' '.join(f'{heads}=NUMBER' for heads in missing)}"
            )
    return {key: value for key, value in told.items() if f"family.{key}" not in given}, made


def _told(size: Size, tensors: Mapping[str, Tensor]) -> int:
    """What the tensors' shapes say; 0 = nothing."""
    matches = [match for name in tensors if (match := re.fullmatch(size.source, name))]
    if size.axis is None:
        return len({match.group(1) for match in matches})
    return tensors[matches[0].string].shape[size.axis] if matches else 0


def _networks(family: nn.Module, tensors: Iterable[str], renames: Renames) -> nn.ModuleDict:
    """The family, and its twin where the file has one of its own."""
    targets = (weights.find(name, renames)[1] for name in tensors)
    has_twin = any(each and all(target.startswith("twin.") for target in each) for each in targets)
    return nn.ModuleDict({"family": family, **({"twin": deepcopy(family)} if has_twin else {})})


def _heads(
    tensors: Mapping[str, Tensor], names: Iterable[str], renames: Renames, objectives: Iterable[str]
) -> dict[str, Tensor]:
    """Heads and queues under our names. Of a head that several objectives may start from, each of the recipe's has
    a copy; the first, where the recipe has none.
    """
    found = {}
    for name in names:
        row, targets = weights.find(name, renames)
        owners: dict[tuple[str, ...], str] = {}
        for target in targets:
            owners.setdefault(tuple(target.split(".")[:2]), target)
        chosen = [target for owner, target in owners.items() if owner[0] == "queues" or owner[1] in objectives]
        for target in chosen or list(owners.values())[:1]:
            tensor = tensors[name] if row.change is None else row.change(tensors[name], tensors[name].shape)
            found[target] = tensor.clone()
    return found


def _copy_of(unused: Tensor, tensors: Mapping[str, Tensor]) -> str:
    """What an unused tensor is a copy of, for the summary."""
    for name, tensor in tensors.items():
        if tensor.shape == unused.shape and torch.equal(tensor, unused):
            return f" (the same numbers as {name})"
    return ""


def _more(names: Sequence[str]) -> str:
    return f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""


def _plain(sizes: Any) -> dict[str, Any]:
    """A Config as what YAML can hold."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(sizes).items()}


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in values.items()) or "nothing"
