"""Checkpoints that are whole or absent: written aside, listed with their hashes, renamed, then pointed to.

    checkpoints/step_00001000/   deepspeed/ momentum_*.pt weights.safetensors state.json manifest.json
    checkpoints/latest           name of the newest complete one

`weights.safetensors` holds every parameter and buffer whole, in training precision and by our names, so that
evaluating needs neither DeepSpeed nor unpickling.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlscale import distributed
from vlscale.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from vlscale.engine import Engine

WEIGHTS, STATE, MANIFEST, LATEST = "weights.safetensors", "state.json", "manifest.json", "latest"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    folder: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """The optimizer step after which it was written."""
        return int(self.state["step"])


def save(out: Path, engine: Engine, state: Mapping[str, Any], keep: int) -> Path:
    """Write `state["step"]`'s checkpoint of the run in `out`; keeps the newest `keep`. All ranks take part."""
    root = out / "checkpoints"
    final = root / f"step_{state['step']:08d}"
    partial = root / f".{final.name}.partial"
    if distributed.rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    distributed.barrier()
    engine.save(partial)
    _save_weights(partial / WEIGHTS, engine)
    distributed.barrier()
    if distributed.rank() == 0:
        (partial / STATE).write_text(json.dumps(dict(state), indent=1) + "\n")
        (partial / MANIFEST).write_text(json.dumps({"files": _digests(partial)}, indent=1) + "\n")
        _sync(partial)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        write_atomically(root / LATEST, final.name + "\n")
        _prune(root, final, keep)
    distributed.barrier()
    return final


def newest(out: Path, warn: Callable[[str], None] = lambda message: None) -> Checkpoint | None:
    """The newest complete and unharmed checkpoint of the run in `out`, or None if it has none at all.

    Raises:
        CheckpointError: there are checkpoints, and every one is broken.
    """
    folders = sorted((out / "checkpoints").glob("step_*"), reverse=True)
    broken = []
    for folder in folders:
        try:
            found = open_checkpoint(folder)
        except CheckpointError as error:
            broken.append(str(error))
            continue
        for reason in broken:
            warn(f"{reason}; going back to {found.folder.name}")
        return found
    if folders:
        known = f"{len(folders)} checkpoint(s), and none is usable"
        raise CheckpointError(f"{out / 'checkpoints'} holds {known}: {broken[0]}")
    return None


def latest_step(out: Path) -> int:
    """The step of the newest checkpoint by the file `latest`, unchecked; 0 without one."""
    try:
        return int((out / "checkpoints" / LATEST).read_text().strip().removeprefix("step_"))
    except (OSError, ValueError):
        return 0


def find(path: str, warn: Callable[[str], None] = lambda message: None) -> Checkpoint:
    """The checkpoint that a user names: its own folder, or a run folder (its newest).

    Raises:
        ConfigError: the path is empty or absent.
        CheckpointError: there is no usable checkpoint.
    """
    folder = Path(path)
    if not path or not folder.is_dir():
        raise ConfigError(f"'{path}' is no folder; give a run folder or one of its checkpoints/step_*")
    if (folder / "checkpoints").is_dir():
        found = newest(folder, warn)
        if found is None:
            raise CheckpointError(f"{folder} holds no checkpoint yet")
        return found
    return open_checkpoint(folder)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Check every file of a checkpoint against its manifest.

    Raises:
        CheckpointError: names the first file that is missing, short or changed.
    """
    try:
        listed = json.loads((folder / MANIFEST).read_text())["files"]
        for name, (size, digest) in listed.items():
            file = folder / name
            if not file.is_file() or file.stat().st_size != size:
                raise CheckpointError(f"{file} is missing or not {size} bytes long, as its manifest says")
            if _sha256(file) != digest:
                raise CheckpointError(f"{file} has changed since it was written (its sha256 differs)")
        return Checkpoint(folder, json.loads((folder / STATE).read_text()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder} has no readable {MANIFEST} ({type(error).__name__})") from None


def check_fits(found: Checkpoint, world: int, zero_stage: int, precision: str) -> None:
    """Whether a checkpoint can be loaded into a run of this shape.

    Raises:
        CheckpointError: it was saved on another number of ranks, at another ZeRO stage or precision.
    """
    here = {"world_size": world, "zero_stage": zero_stage, "precision": precision}
    odd = [f"{key} {found.state[key]} (here {value})" for key, value in here.items() if found.state[key] != value]
    if odd:
        raise CheckpointError(f"{found.folder} was saved with {', '.join(odd)}; start the run the way it was saved")


def run_folder(checkpoint: Checkpoint) -> Path:
    """The run that a checkpoint belongs to."""
    return checkpoint.folder.parent.parent


def write_atomically(path: Path, text: str) -> None:
    """Replace a small file so that a reader sees the old or the new one, never half."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _save_weights(path: Path, engine: Engine) -> None:
    from safetensors.torch import save_file

    kept = {}
    for name, tensor in engine.weights():  # every rank walks along, rank 0 keeps
        if distributed.rank() == 0:
            kept[name] = tensor.contiguous()
    if distributed.rank() == 0:
        save_file(kept, path)


def _digests(folder: Path) -> dict[str, tuple[int, str]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_size, _sha256(path)) for path in files}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _sync(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _prune(root: Path, newest: Path, keep: int) -> None:
    """Keep `keep` up to the newest; later ones were broken or given up, hidden ones are what a kill left."""
    complete = sorted(root.glob("step_*"))
    place = complete.index(newest) + 1
    for folder in (*complete[: max(0, place - keep)], *complete[place:], *root.glob(".step_*.partial")):
        shutil.rmtree(folder, ignore_errors=True)
