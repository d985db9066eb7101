"""Checkpoints found again: which there are, whether each file is what was written, and the newest good one.

What a checkpoint consists of stands in `pieces`, where it lies and in which order it is written in `targets`, who
writes it and when in `background`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from torch import Tensor

from vlscale import agreement, distributed, run_folder, vocabulary
from vlscale.data.storage.stores import scheme, shown
from vlscale.errors import CheckpointError, ConfigError
from vlscale.saving import pieces
from vlscale.saving.fetched import Fetched
from vlscale.saving.remote import Remote
from vlscale.saving.targets import MANIFEST, STATE, Folder, Target, as_json, step_name
from vlscale.types import DTYPES

if TYPE_CHECKING:
    from vlscale.engine import Engine

BESIDE = (run_folder.CONFIG, vocabulary.TOKENIZER, vocabulary.ANSWERS)  # those in a store: to go on with
THREADS = 4  # files that a rank hashes at a time
FILE_NAME = re.compile(r"\w[\w.-]*")
LOST = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO)  # of a file: it is gone, or its disk cannot read it


class UnreachableError(CheckpointError):
    """A checkpoint that may well be good, but cannot be got at now."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on this machine."""

    folder: Path
    state: dict[str, Any]
    fetched: Fetched | None = None  # what holds it, where it came from a store

    @property
    def step(self) -> int:
        """The optimizer step after which it was written."""
        return int(self.state["step"])

    def reader(self) -> pieces.Reader:
        """Of the files that the manifest lists.

        Raises:
            CheckpointError: one is not readable.
        """
        return pieces.Reader(self.folder, [name for name in _listed(self.folder) if name != STATE])

    def restore(self, machine: Engine) -> None:
        """Go on from it; what was fetched is then removed. All ranks take part.

        Raises:
            CheckpointError: it is of another model, or some of it is missing.
        """
        machine.restore(self.reader(), self.state["engine"])
        self.release()

    def release(self) -> None:
        """What was fetched is removed: nothing more will be read. All ranks take part."""
        distributed.barrier()
        if self.fetched is not None:
            self.fetched.remove()


def target(out: Path, to: str | None) -> Target:
    """Where the checkpoints of the run in `out` lie; `to` is `checkpoint.to`."""
    return Remote(to) if to else Folder(out / run_folder.CHECKPOINTS)


def keep_beside(out: Path, to: str | None) -> str:
    """Files of a run folder to where its checkpoints go, if that is a store: whoever finds those can go on.

    Raises:
        ConfigError: nothing can be written there.
    """
    place = target(out, to)
    try:
        for path in (out / name for name in BESIDE):
            if isinstance(place, Remote) and path.is_file():
                place.keep(path.name, path.read_text())
    except OSError as error:
        raise ConfigError(f"checkpoint.to={place.place} cannot be written ({error})") from error
    return ""


def newest(
    place: Target, warn: Callable[[str], None] = lambda message: None, until: int | None = None
) -> Checkpoint | None:
    """The newest complete and unharmed checkpoint (of step `until` at most), or None if there is none at all.

    All ranks take part: each checks a part of the files, and all take the same checkpoint.

    A run may be writing and pruning there meanwhile.

    Raises:
        CheckpointError: there are checkpoints, and every one is broken, or a newer one cannot be got at: going on from
            an older one would take it away.
    """

    def listed() -> list[int]:
        every: list[int] = json.loads(agreement.by_rank_0(lambda: json.dumps(_steps(place))))
        return [step for step in every if step not in broken and (until is None or step <= until)]

    broken: dict[int, str] = {}
    while steps := listed():
        try:
            found = _open(place, steps[-1])
        except CheckpointError as error:
            if steps[-1] not in listed():
                continue  # pruned
            if isinstance(error, UnreachableError):
                raise UnreachableError(f"{error}; no older one is taken, as this one may be good: try again") from error
            broken[steps[-1]] = str(error)
            continue
        for reason in broken.values():
            warn(f"{reason}; going back to {found.folder.name}")
        return found
    if broken:
        first = next(iter(broken.values()))
        raise CheckpointError(f"{place.place} holds {len(broken)} checkpoint(s), and none is usable: {first}")
    return None


def begin_at(place: Target, step: int) -> None:
    """The run goes on from `step`, if that lies here: later checkpoints, which could not be read, are given up.

    `metrics.jsonl` goes on from there too. So a later start must not meet them again, if the disk failed for a moment
    only.
    """
    with suppress(OSError):  # the next save tells
        if step in place.steps():
            place.go_back(step)


def go_back(place: Target, step: int) -> None:
    """Make the checkpoint of `step` the newest: later ones go. All ranks take part.

    Raises:
        CheckpointError: the place refuses.
    """

    def remove() -> str:
        try:
            place.go_back(step)
        except OSError as error:
            reason = f"{place.place}: the checkpoints after step {step} cannot be removed ({error})"
            raise CheckpointError(reason) from error
        return ""

    agreement.by_rank_0(remove)


def last_step(place: Target) -> int:
    """The step of the newest checkpoint, by the names and sizes of its files alone; 0 where they are not right.

    Every rank may ask for itself.
    """
    steps = _steps(place)
    if not steps or (isinstance(place, Folder) and not _looks_whole(place.root / step_name(steps[-1]))):
        return 0
    return steps[-1]


def to_stderr(message: str) -> None:
    """Warn a user who waits for a command."""
    print(f"warning: {message}", file=sys.stderr)


def find(path: str, warn: Callable[[str], None] = to_stderr) -> Checkpoint:
    """The checkpoint that a user names: its own folder, or a run's folder or `checkpoint.to` (its newest).

    `warn` hears of newer ones that are broken.

    Raises:
        ConfigError: the path is empty or absent.
        CheckpointError: there is no usable checkpoint.
    """
    folder = Path(path)
    if scheme(path):
        found = newest(Remote(path), warn)
    elif not path or not folder.is_dir():
        raise ConfigError(f"'{path}' is no folder; give a run folder or one of its checkpoints/step_*")
    elif (folder / run_folder.CHECKPOINTS).is_dir():
        found = newest(Folder(folder / run_folder.CHECKPOINTS), warn)
    elif to := _elsewhere(folder):
        found = newest(Remote(to), warn)
    else:
        return open_checkpoint(folder)
    if found is None:
        raise CheckpointError(f"{shown(path)} holds no checkpoint yet")
    return found


def open_checkpoint(folder: Path) -> Checkpoint:
    """Check every file of a checkpoint against its manifest; the ranks share the work.

    Raises:
        CheckpointError: names the first file that is missing, short or changed.
    """
    return _checked(folder, distributed.rank(), distributed.world_size())


def weights(found: Checkpoint, exact: bool = False) -> dict[str, Tensor]:
    """{our name: whole tensor} of every parameter and buffer; parameters as they were trained, or `exact`: in fp32."""
    return pieces.weights(found.reader(), None if exact else DTYPES[found.state["precision"]])


def run_of(checkpoint: Checkpoint) -> Path:
    """The run that a checkpoint belongs to."""
    return checkpoint.folder.parent.parent


def _elsewhere(folder: Path) -> str | None:
    """`checkpoint.to` of a run folder; None where it has none, or is none."""
    try:
        to = yaml.safe_load((folder / "config.yaml").read_text())["checkpoint"]["to"]
    except (OSError, ValueError, LookupError, TypeError, yaml.YAMLError):
        return None
    return str(to) if to else None


def _looks_whole(folder: Path) -> bool:
    try:
        return all((folder / name).stat().st_size == size for name, (size, _) in _listed(folder).items())
    except (OSError, CheckpointError):
        return False


def _steps(place: Target) -> list[int]:
    try:
        return place.steps()
    except OSError as error:
        raise CheckpointError(f"{place.place} cannot be looked into ({error})") from error


def _open(place: Target, step: int) -> Checkpoint:
    if isinstance(place, Folder):
        return open_checkpoint(place.root / step_name(step))
    assert isinstance(place, Remote)
    return _fetch(place, step)


def _fetch(place: Remote, step: int) -> Checkpoint:
    """A checkpoint out of a store, once per node, in a run folder that is removed afterwards; its ranks share."""
    nodes = distributed.gather_objects(_node())
    here = [rank for rank, node in enumerate(nodes) if node == nodes[distributed.rank()]]
    index = here.index(distributed.rank())
    fetched = agreement.together(lambda: _room() if index == 0 else None)
    paths = distributed.gather_objects(fetched and fetched.path)
    run = Path(str(paths[here[0]]))
    folder = run / run_folder.CHECKPOINTS / step_name(step)
    manifest = [(f"{step_name(step)}/{MANIFEST}", folder / MANIFEST)]
    agreement.together(lambda: _get(place, [] if index else manifest))
    listed = list(agreement.together(lambda: _listed(folder)))
    mine = [(f"{step_name(step)}/{name}", folder / name) for name in listed[index :: len(here)]]
    agreement.together(lambda: _get(place, mine, None if index else run))
    return replace(_checked(folder, index, len(here)), fetched=fetched)


def _node() -> tuple[str, int, int]:
    """The same for all processes that share a folder for temporary files in memory or on a disk."""
    found = os.stat(tempfile.gettempdir())
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        boot = os.uname().nodename
    return boot, found.st_dev, found.st_ino


def _room() -> Fetched:
    try:
        return Fetched()
    except OSError as error:
        raise UnreachableError(f"a checkpoint cannot be fetched ({error})") from error


def _get(place: Remote, wanted: list[tuple[str, Path]], run: Path | None = None) -> None:
    """Files of a store to local ones; those that lie beside its checkpoints into the folder `run`."""
    try:
        kept = [(name, run / name) for name in place.kept(BESIDE)] if run is not None else []
        for name, path in (*wanted, *kept):
            path.parent.mkdir(parents=True, exist_ok=True)
            place.get(name, path)
    except FileNotFoundError as error:
        raise CheckpointError(f"a checkpoint lacks a file ({error})") from error
    except OSError as error:
        raise UnreachableError(f"a checkpoint cannot be fetched ({error})") from error


def _checked(folder: Path, index: int, ranks: int) -> Checkpoint:
    """The checkpoint, of which this rank looks at every `ranks`th file; a mistake is every rank's."""
    return Checkpoint(folder, agreement.together(lambda: _state(folder, index, ranks)))


def _state(folder: Path, index: int, ranks: int) -> dict[str, Any]:
    listed = _listed(folder)
    with ThreadPoolExecutor(THREADS) as threads:
        problems = threads.map(lambda name: _problem(folder / name, *listed[name]), list(listed)[index::ranks])
        first = next(filter(None, problems), "")
    if first:
        raise CheckpointError(first)
    try:
        state: dict[str, Any] = json.loads((folder / STATE).read_text())
    except ValueError as error:
        raise CheckpointError(f"{folder / STATE} cannot be read ({error})") from error
    except OSError as error:
        raise _unread(folder / STATE, error) from error
    return state


def _unread(file: Path, error: OSError) -> CheckpointError:
    kind = CheckpointError if error.errno in LOST else UnreachableError
    return kind(f"{file} cannot be read ({error.strerror or error})")


def _listed(folder: Path) -> Mapping[str, tuple[int, str]]:
    """{name: (bytes, sha256)} of a manifest, in which no byte may have changed."""
    path = folder / MANIFEST
    try:
        text = path.read_text()
        tree = json.loads(text)
        listed = {str(name): (int(size), str(digest)) for name, (size, digest) in tree["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder} has no readable {MANIFEST} ({type(error).__name__})") from None
    except OSError as error:
        if error.errno not in LOST:
            raise _unread(path, error) from error
        raise CheckpointError(f"{folder} has no readable {MANIFEST} ({type(error).__name__})") from None
    if text != as_json({"files": {name: list(each) for name, each in listed.items()}}) or STATE not in listed:
        raise CheckpointError(f"{path} has changed since it was written")
    if odd := next((name for name in listed if not FILE_NAME.fullmatch(name)), None):
        raise CheckpointError(f"{path} lists {odd!r}, which is no file of a checkpoint")
    return listed


def _problem(file: Path, size: int, digest: str) -> str:
    """What is wrong with a file, empty = nothing."""
    try:
        if file.stat().st_size != size:
            return f"{file} is missing or not {size} bytes long, as its manifest says"
        found = hashlib.sha256()
        with file.open("rb", buffering=0) as opened:
            while chunk := opened.read(pieces.CHUNK):
                found.update(chunk)
    except FileNotFoundError:
        return f"{file} is missing or not {size} bytes long, as its manifest says"
    except OSError as error:
        if error.errno not in LOST:
            raise _unread(file, error) from error
        return f"{file} cannot be read ({error.strerror or error})"
    return f"{file} has changed since it was written (its sha256 differs)" if found.hexdigest() != digest else ""
