"""A copy of the code for a job, so that later edits do not touch it, and a record of what it was."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from vlscale.errors import ConfigError
from vlscale.run_folder import SNAPSHOT, git
from vlscale.saving.targets import write_atomically

PARTS = ("vlscale", "launchers", "ds_configs", "pyproject.toml", "constraints.txt")
GIVEN = "given"
HASH = 12  # hexadecimal digits of a folder's name


def folder_of(checkout: Path, into: Path) -> Path:
    """Where `take` puts the code: `into/code-HASH`, named by what is in it."""
    digest = hashlib.sha256()
    for file in sorted(_files(checkout)):
        content = (checkout / file).read_bytes()
        digest.update(f"{file}\0{len(content)}\0".encode() + content)
    return into / f"code-{digest.hexdigest()[:HASH]}"


def take(checkout: Path, into: Path) -> Path:
    """Copy the code of `checkout`; what is there of that name is the same already.

    Of a git checkout, what git tracks or does not ignore is copied, as it is now.

    Raises:
        ConfigError: `into` cannot be written.
    """
    folder = folder_of(checkout, into)
    if (folder / SNAPSHOT).is_file():
        return folder
    partial = into / f".{folder.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        for file in _files(checkout):
            (partial / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(checkout / file, partial / file)
        record = {"git_commit": git(checkout, "rev-parse", "HEAD"), "git_diff": git(checkout, "diff", "HEAD")}
        write_atomically(partial / SNAPSHOT, json.dumps(record, indent=2) + "\n")
        partial.replace(folder)
    except OSError as error:
        if not (folder / SNAPSHOT).is_file():  # another submission was faster
            raise ConfigError(f"the code cannot be copied to {into} ({error}); give another --out") from error
    return folder


def keep(path: str, into: Path) -> str:
    """A copy of a file that the command line names."""
    place = Path(place_of(path, into))
    place.parent.mkdir(parents=True, exist_ok=True)
    return str(shutil.copy(path, place))


def place_of(path: str, into: Path) -> str:
    """Where `keep` puts it."""
    return str(into / GIVEN / hashlib.sha256(Path(path).read_bytes()).hexdigest()[:HASH] / Path(path).name)


def _files(checkout: Path) -> Iterator[str]:
    """Relative paths of what belongs to the code."""
    listed = git(checkout, "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *PARTS)
    if listed:
        yield from (file for file in listed.split("\0") if (checkout / file).is_file())
        return
    for part in PARTS:
        paths = [checkout / part] if (checkout / part).is_file() else (checkout / part).rglob("*")
        yield from (
            str(path.relative_to(checkout)) for path in paths if path.is_file() and "__pycache__" not in path.parts
        )
