"""Where checkpoints lie: in a folder of the run (here), or in a store (`remote`). Whole, or not to be seen.

    step_00001000/    rank_00000.safetensors ... state.json manifest.json
    latest            the name of the newest one

A folder's save has this order; each line is on the disk before the next begins:

1. every rank's file, in `.step_00001000.partial`, a name that nobody looks for;
2. `state.json`, then `manifest.json` with size and sha256 of every file, then the folder itself;
3. its new name, `step_00001000`: from here on it counts, and verifies as whole;
4. `latest`, replaced by a rename;
5. older ones, which are hidden by a rename before they are taken apart.

So whatever ends a save between two of these, `latest` names a whole checkpoint: the one before until 4, and the new one
after. (A broken one of the same step is hidden before 3, after `latest` has been made to name the one before it; where
there is none before it, there is none to name.) What lies there hidden is removed by the next save.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from vlscale.saving.pieces import Writable

STATE, MANIFEST, LATEST = "state.json", "manifest.json", "latest"
PREFIX = "step_"
FILE_MODE, FOLDER_MODE = 0o664, 0o775  # never writable by everybody, whatever the umask
NO_SYNC = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)  # a file system that has no fsync of folders
Listed = tuple[int, str]  # bytes and sha256 of a file


class Target(Protocol):
    """A place for one run's checkpoints, by their step. What goes wrong with the place raises OSError."""

    @property
    def place(self) -> str:
        """As a user knows it."""
        ...

    def steps(self) -> list[int]:
        """Of the checkpoints that were committed, ascending; they may be broken."""
        ...

    def create(self, step: int, name: str) -> AbstractContextManager[Writable]:
        """A new file of a checkpoint that is not committed; safe once the block has ended, gone if it fails."""
        ...

    def commit(self, step: int, files: Mapping[str, Listed], state: Mapping[str, Any]) -> None:
        """Make a checkpoint of files that all ranks have created, and of `state`; `latest` is named after it."""
        ...

    def discard(self, step: int) -> None:
        """Take away what was begun of a checkpoint and not committed."""
        ...

    def clear(self, step: int) -> None:
        """Take away what ended saves have left of all other steps."""
        ...

    def prune(self, step: int, keep: int, keep_every: int) -> None:
        """Keep the newest `keep` up to `step` and those of every `keep_every`th step (0 = none); later ones go."""
        ...

    def name_latest(self, step: int) -> None:
        """Make `latest` name that of `step`."""
        ...

    def go_back(self, step: int) -> None:
        """Make that of `step` the newest: later ones go."""
        ...

    def room(self) -> str:
        """What there is left, in words."""
        ...


class Folder:
    """A folder that all ranks see."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.place = str(root)

    def steps(self) -> list[int]:
        """See `Target.steps`."""
        names = [path.name.removeprefix(PREFIX) for path in self.root.glob(f"{PREFIX}*")]
        return sorted(int(name) for name in names if name.isdigit())

    @contextmanager
    def create(self, step: int, name: str) -> Iterator[Writable]:
        """See `Target.create`."""
        folder = self._partial(step)
        for each in (self.root, folder):
            each.mkdir(FOLDER_MODE, parents=True, exist_ok=True)
        try:
            with _new_file(folder / name) as file:
                yield file
        except BaseException:
            with suppress(OSError):
                (folder / name).unlink(missing_ok=True)
            raise

    def commit(self, step: int, files: Mapping[str, Listed], state: Mapping[str, Any]) -> None:
        """See `Target.commit`."""
        partial, final = self._partial(step), self.root / step_name(step)
        for name, (size, _) in files.items():
            if not (partial / name).is_file() or (partial / name).stat().st_size != size:
                raise OSError(f"{partial / name} is not there for rank 0; --out must be a folder that all ranks share")
        for path in partial.iterdir():
            if path.name not in files:
                path.unlink()  # of a save with more ranks that was killed
        for name, text in state_and_manifest(files, state).items():
            with _new_file(partial / name) as file:
                file.write(text.encode())
        _sync(partial)
        if final.exists():  # broken, or given up when the run went back
            before = [each for each in self.steps() if each < step]
            if before:
                self.name_latest(before[-1])
            self._remove(final)
        partial.rename(final)
        for folder in (self.root, self.root.parent):
            _sync(folder)

    def discard(self, step: int) -> None:
        """See `Target.discard`."""
        shutil.rmtree(self._partial(step), ignore_errors=True)

    def clear(self, step: int) -> None:
        """See `Target.clear`."""
        for folder in self.root.glob(f".{PREFIX}*"):
            if folder != self._partial(step):
                shutil.rmtree(folder, ignore_errors=True)

    def prune(self, step: int, keep: int, keep_every: int) -> None:
        """See `Target.prune`."""
        for each in to_prune(self.steps(), step, keep, keep_every):
            with suppress(OSError):  # what cannot be removed harms nobody
                self._remove(self.root / step_name(each))

    def name_latest(self, step: int) -> None:
        """See `Target.name_latest`."""
        write_atomically(self.root / LATEST, step_name(step) + "\n")

    def go_back(self, step: int) -> None:
        """See `Target.go_back`."""
        self.name_latest(step)
        for each in self.steps():
            if each > step:
                self._remove(self.root / step_name(each))

    def room(self) -> str:
        """See `Target.room`."""
        try:
            folder = next(each for each in (self.root, *self.root.absolute().parents) if each.exists())
            return f"{shutil.disk_usage(folder).free / 2**30:.2f} GiB are free"
        except OSError as error:
            return f"how much is free cannot be told ({error.strerror})"

    def _partial(self, step: int) -> Path:
        return self.root / f".{step_name(step)}.partial"

    def _remove(self, final: Path) -> None:
        hidden = final.with_name(f".{final.name}.removed")
        shutil.rmtree(hidden, ignore_errors=True)
        final.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def step_name(step: int) -> str:
    """Of a step's checkpoint."""
    return f"{PREFIX}{step:08d}"


def to_prune(steps: list[int], step: int, keep: int, keep_every: int) -> list[int]:
    """Which of `steps` go once that of `step` is there; later ones were broken or given up."""
    before = sorted(each for each in steps if each <= step)
    kept = {*before[-keep:], *(each for each in before if keep_every and each % keep_every == 0)}
    return [each for each in steps if each not in kept]


def state_and_manifest(files: Mapping[str, Listed], state: Mapping[str, Any]) -> dict[str, str]:
    """{name: text} of the two files that rank 0 adds, in the order in which they are written."""
    text = as_json(dict(state))
    listed = {**files, STATE: listed_as(text.encode())}
    return {STATE: text, MANIFEST: as_json({"files": {name: list(listed[name]) for name in sorted(listed)}})}


def as_json(value: Mapping[str, Any]) -> str:
    """As our files hold it."""
    return json.dumps(value, indent=1) + "\n"


def listed_as(content: bytes) -> Listed:
    """What a manifest says of a file with this content."""
    return len(content), hashlib.sha256(content).hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Replace a small file so that a reader sees the old or the new one, never half, whatever happens."""
    partial = path.with_name(f".{path.name}.partial")
    with _new_file(partial) as file:
        file.write(text.encode())
    partial.replace(path)
    _sync(path.parent)


@contextmanager
def _new_file(path: Path) -> Iterator[IO[bytes]]:
    """A file, empty at first, that is on the disk once the block has ended."""
    with open(path, "wb", opener=lambda name, flags: os.open(name, flags, FILE_MODE)) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise
    finally:
        os.close(descriptor)
