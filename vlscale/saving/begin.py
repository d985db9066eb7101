"""What a run goes on from, and whether the places that it is to write to are its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from vlscale import run_folder
from vlscale.errors import CheckpointError, ConfigError
from vlscale.monitor import evaluated
from vlscale.optim import KEPT
from vlscale.saving import checkpoint
from vlscale.saving.checkpoint import Checkpoint
from vlscale.saving.remote import Remote


def check(out: Path | None, to: str | None, configuration: Mapping[str, Any], resume: str) -> str:
    """Whether this run may write to `out` and to `checkpoint.to`; asked by rank 0 for all.

    Raises:
        ConfigError: another run is there, or any run with `--resume never`.
        CheckpointError: the store cannot be looked into.
    """
    if out is not None:
        run_folder.check(out, configuration, resume)
    if to:
        _check_store(Remote(to), out, configuration, resume)
    return ""


def finished(out: Path, to: str | None, configuration: Mapping[str, Any], resume: str, steps: int) -> str:
    """As `done`; of a run that is not, the folder is held."""
    said = done(out, to, configuration, resume, steps)
    if not said and (out / run_folder.CONFIG).is_file():
        run_folder.hold(out)  # before anything is read that it goes on from
    return said


def done(out: Path, to: str | None, configuration: Mapping[str, Any], resume: str, steps: int) -> str:
    """A sentence if `out` holds this very run with all its steps done, and evaluated; else empty. As `check`.

    Checkpoints are judged by the names and sizes of their files alone.
    """
    check(out, to, configuration, resume)
    step = checkpoint.last_step(checkpoint.target(out, to))
    if step < steps or (step == steps and not evaluated(out, step)):
        return ""
    return f"{out} holds this run, finished at step {step}; there is nothing left to do"


def find(
    out: Path | None,
    to: str | None,
    configuration: Mapping[str, Any],
    resume: str,
    warn: Callable[[str], None],
    until: int | None = None,
) -> Checkpoint | None:
    """The checkpoint that the run goes on from, its newest (up to step `until`); None = it begins. All ranks take part.

    The one that `--resume` names is where a run begins that has none of its own: the same command, given again,
    goes on with what it did.

    Raises:
        CheckpointError: none is usable, or that of `--resume` is of another model or optimizer.
    """
    if resume == "never":
        return None
    own = None if out is None else checkpoint.newest(checkpoint.target(out, to), warn, until)
    if resume == "auto":
        return own
    if own is not None:
        where = checkpoint.target(out or Path(), to).place
        warn(f"{where} holds this run at step {own.step}: it goes on from there, not from --resume {resume} again")
        return own
    found = checkpoint.find(resume, warn)
    for what, keys in (("model", ("family", "objectives")), ("optimizer", tuple(f"optim.{key}" for key in KEPT))):
        odd = run_folder.differing(checkpoint.run_of(found), configuration, keys)
        if odd:
            raise CheckpointError(f"--resume {resume} holds another {what}: {odd}; give its keys")
    return found


def _check_store(place: Remote, out: Path | None, configuration: Mapping[str, Any], resume: str) -> None:
    what = f"checkpoint.to={place.place}"
    with TemporaryDirectory() as folder:
        try:
            known = bool(place.kept((run_folder.CONFIG,)))
            if known:
                place.get(run_folder.CONFIG, Path(folder) / run_folder.CONFIG)
            elif not place.steps():
                return
        except OSError as error:
            raise CheckpointError(f"{what} cannot be looked into ({error})") from error
        if out is None or resume == "never":
            raise ConfigError(f"{what} holds a run already; write another URL, or go on with it by its --out")
        differ = run_folder.differing(Path(folder), configuration) if known else "there is no config.yaml beside it"
        if differ:
            raise ConfigError(f"{what} holds another run: {differ}; write another URL")
