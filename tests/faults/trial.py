"""A trial: a run that is broken and resumed until it is done, held to the bit to the same run undisturbed."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.faults import fault as faults_of
from tests.faults import ranks, setting
from tests.faults.fault import EVERYONE, PHASES, Fault, Start
from tests.faults.harm import BALLAST
from tests.faults.ranks import Ended
from tests.faults.setting import POISONED, STEPS, Setting
from tests.runs import figures, last_step
from vlscale.errors import DONE, STOPPED, CheckpointError, DataError, TrainingError

EARLY = 0.12  # share of the signals that come before the first step
TMPFS = "64m"  # a file system of its own, for the trials that fill it
AT_STEP = ("full", "clock", "slow", "worker")
GARBLED = (b"", b"step_", b"\0" * 14, b"step_99999999\n")
DAMAGES = ("flip", "truncate", "latest")
ENDS = {  # of a start that was not killed, by what went wrong in it besides
    "stop": {DONE, STOPPED},
    "disk": {DONE, TrainingError.exit_code, CheckpointError.exit_code},
    "full": {DONE, TrainingError.exit_code, CheckpointError.exit_code},
    "read": {DONE, CheckpointError.exit_code},
    "worker": {DONE, DataError.exit_code},
}
OF_THE_CLOCK = ("checkpoint/", "straggler/")  # families of figures that are measured


@dataclass(frozen=True)
class Trial:
    """What a seed stands for."""

    seed: int
    setting: Setting
    starts: tuple[Start, ...]

    def __str__(self) -> str:
        return f"{self.setting}: " + "; ".join(", ".join(map(str, start)) for start in self.starts)


@dataclass
class Outcome:
    """How a trial went."""

    trial: Trial
    reason: str = ""  # why it failed; empty = identical to the bit
    kills: int = 0  # that hit
    ends: list[str] = field(default_factory=list)  # of each start: code and the step reached
    skipped: str = ""  # what could not be tried here, and why
    seconds: float = 0.0


def draw(seed: int, recipes: Sequence[str], stages: Sequence[int], world: Sequence[int]) -> Trial:
    """The trial of a seed, among the settings asked for."""
    where = setting.draw(seed, recipes, stages, world)
    return Trial(seed, where, tuple(faults_of.draw(random.Random(f"faults {seed}"), where.ranks)))


@dataclass(frozen=True)
class Reference:
    """An undisturbed run."""

    out: Path
    seconds: float
    counts: list[list[int]]


class Bench:
    """A folder with the small recipes and the undisturbed runs that trials are held to; each is made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._references: dict[Setting, Reference] = {}
        setting.write_recipes(folder)

    def reference(self, of: Setting) -> Reference:
        """The undisturbed run of a setting.

        Raises:
            RuntimeError: it does not even run undisturbed.
        """
        if of not in self._references:
            out = self.folder / f"reference-{of}"
            ended = self._start(of, out, ())
            if any(ended.codes):
                raise RuntimeError(f"{of} does not run undisturbed:\n{ended.said}")
            self._references[of] = Reference(out, ended.seconds, ended.counts)
        return self._references[of]

    def perform(self, trial: Trial) -> Outcome:
        """Break it, resume it, compare it; its folder stays only where it failed."""
        began = time.monotonic()
        outcome = Outcome(trial)
        reference = self.reference(trial.setting)
        place = self.folder / f"trial-{trial.seed}"
        place.mkdir()
        outcome.skipped = self._own_disk(trial, place)
        try:
            outcome.reason = self._through(trial, place / "run", reference, outcome)
        finally:
            if any(fault.kind == "full" for start in trial.starts for fault in start) and not outcome.skipped:
                _keep_log(place, outcome.reason)
                subprocess.run(["umount", str(place)], check=True)
        if not outcome.reason:
            shutil.rmtree(place)
        outcome.seconds = time.monotonic() - began
        return outcome

    def _through(self, trial: Trial, out: Path, reference: Reference, outcome: Outcome) -> str:
        """Every start of a trial; why it failed, or nothing."""
        reached = 0  # the newest checkpoint that was ever seen whole
        hurt = False  # by us
        for number, drawn in enumerate((*trial.starts, ())):
            due = [_placed(fault, out, reference) for fault in drawn if fault.kind != "full" or not outcome.skipped]
            ended = self._start(trial.setting, out, due, log=f"start_{number}.txt")
            (out.parent / BALLAST).unlink(missing_ok=True)
            outcome.ends.append(f"{ended.first} at {last_step(out)}")
            outcome.kills += any(fault.kind == "kill" for fault in due) and min(ended.codes) < 0
            if reason := _odd_end(ended, due):
                return f"start {number} ({', '.join(map(str, due)) or 'undisturbed'}): {reason}"
            unread = any(fault.kind == "read" for fault in due)  # so that an older one may have been taken
            found = ranks.asked(usable, str(out), hurt or unread)
            if isinstance(found, dict) or (found < reached and not unread):
                what = found["error"] if isinstance(found, dict) else f"only step {found} of {reached} is left"
                return f"after start {number} ({', '.join(map(str, due))}): {what}"
            reached = found
            if not ended.first and drawn:
                break  # it came through to its end
            for fault in drawn:
                reached = _damaged(fault, out, reached)
                hurt |= fault.kind in DAMAGES
        differences = ranks.asked(differing, str(out), str(reference.out))
        if isinstance(differences, dict):
            return str(differences["error"])
        halves = [each.name for each in (out / "checkpoints").glob(".step_*.partial")]
        if halves and not any(fault.kind in ("disk", "full") for start in trial.starts for fault in start):
            differences.append(f"left in checkpoints: {', '.join(halves)}")
        return "; ".join(differences)

    def _start(self, of: Setting, out: Path, due: Sequence[Fault], log: str = "start.txt") -> Ended:
        said = out.parent / (log if out.name == "run" else f"{out.name}.txt")
        more = ["data.workers=1"] if any(fault.kind == "worker" for fault in due) else []
        usual = self._references[of].seconds if of in self._references else 0.0
        command = [*setting.command(of, self.folder, out), *more]
        return ranks.start(command, of.ranks, out, said, due, POISONED if of.poisoned else (), usual)

    def _own_disk(self, trial: Trial, place: Path) -> str:
        """A small file system for a trial that fills one; why there is none, where there is none."""
        if not any(fault.kind == "full" for start in trial.starts for fault in start):
            return ""
        mount = ["mount", "-t", "tmpfs", "-o", f"size={TMPFS}", "faults", str(place)]
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
        return "" if done.returncode == 0 else f"full disk: {' '.join(done.stderr.split()) or 'no mount'}"


def _keep_log(place: Path, reason: str) -> None:
    """What a failed trial said, beside its file system, which goes."""
    if reason:
        shutil.copytree(place, place.with_name(f"{place.name}-kept"), ignore=shutil.ignore_patterns(BALLAST))


def _placed(fault: Fault, out: Path, reference: Reference) -> Fault:
    """The same fault, its number no longer a share but a time, a step or an operation of what is still to do."""
    newest = _newest_step(out)
    left = 1 - newest / STEPS
    if fault.timed:
        in_start = fault.number < EARLY
        share = fault.number / EARLY if in_start else (fault.number - EARLY) / (1 - EARLY)
        return replace(fault, number=share if in_start else newest + 1 + share * (STEPS - newest))
    if fault.kind in AT_STEP or fault.where in PHASES:
        return replace(fault, number=newest + 1 + int(fault.number * (STEPS - newest)))
    column = {"kill": 0, "disk": 1, "read": 2}.get(fault.kind)
    if column is None:
        return fault
    rows = reference.counts if fault.rank == EVERYONE else [reference.counts[fault.rank]]
    most = max(row[column] for row in rows)
    if column == 2:  # an undisturbed run reads nothing: some reads of a resume
        most, left = 12, 1.0
    return replace(fault, number=1 + int(fault.number * most * left))


def _odd_end(ended: Ended, due: Sequence[Fault]) -> str:
    """What is wrong with how a start ended; nothing where it could so end."""
    if ended.hung:
        return f"hung:\n{ended.said}"
    if ended.left:
        return f"left behind {', '.join(ended.left)}"
    if any(fault.kind == "kill" for fault in due) and min(ended.codes) < 0:
        return ""
    allowed = {DONE}.union(*(ENDS.get(fault.kind, set()) for fault in due))
    if ended.first not in allowed:
        return f"ended with {ended.codes}, where {sorted(allowed)} is right:\n{ended.said}"
    if "Traceback" in ended.said:
        return f"ended with {ended.codes} and a traceback:\n{ended.said}"
    return ""


def _checkpoints(out: Path) -> list[Path]:
    return sorted((out / "checkpoints").glob("step_*"))


def _newest_step(out: Path) -> int:
    found = _checkpoints(out)
    return int(found[-1].name.removeprefix("step_")) if found else 0


def _damaged(fault: Fault, out: Path, reached: int) -> int:
    """Hurt what is on disk, if another checkpoint is left to go back to; the step of the newest good one."""
    found = _checkpoints(out)
    if fault.kind not in DAMAGES or len(found) < 2 or reached != int(found[-1].name.removeprefix("step_")):
        return reached
    rng = random.Random(str(fault.number))
    if fault.kind == "latest":
        (out / "checkpoints" / "latest").write_bytes(rng.choice(GARBLED))
        return reached
    file = rng.choice(sorted(path for path in found[-1].rglob("*") if path.is_file() and path.stat().st_size))
    size = file.stat().st_size
    with file.open("r+b") as opened:
        if fault.kind == "truncate":
            opened.truncate(rng.randrange(size))
        else:
            opened.seek(rng.randrange(size))
            byte = opened.read(1)[0]
            opened.seek(-1, os.SEEK_CUR)
            opened.write(bytes([byte ^ 1 << rng.randrange(8)]))
    return int(found[-2].name.removeprefix("step_"))


# --- asked of a process of its own -------------------------------------------------------------------------


def usable(path: str, hurt: bool) -> int:
    """The step of what `latest` names, whole; where we have `hurt` that, of the newest; 0 where there is nothing yet.

    Raises:
        CheckpointError: there is something, and it is not usable.
    """
    from vlscale.saving import checkpoint
    from vlscale.saving.targets import Folder

    out = Path(path)
    latest = out / "checkpoints" / "latest"
    if not latest.is_file():
        return 0
    if hurt:
        found = checkpoint.newest(Folder(latest.parent))
        return found.step if found else 0
    return checkpoint.open_checkpoint(latest.parent / latest.read_text().strip()).step


def differing(path: str, reference: str) -> list[str]:
    """In what two finished runs differ."""
    from tests.states import unlike

    out, other = Path(path), Path(reference)
    found = []
    for one, two in zip(_lines(out), _lines(other), strict=False):
        if one != two:
            keys = [key for key in {**one, **two} if one.get(key) != two.get(key)]
            found.append(f"metrics.jsonl differs first at step {two.get('step')}, in {', '.join(keys)}")
            break
    if len(_lines(out)) != len(_lines(other)):
        found.append(f"metrics.jsonl has {len(_lines(out))} lines, not {len(_lines(other))}")
    newest, expected = _checkpoints(out)[-1:], _checkpoints(other)[-1:]
    if [each.name for each in newest] != [each.name for each in expected]:
        return [*found, f"the last checkpoint is {newest}, not {expected[0].name}"]
    return found + unlike(newest[0], expected[0])


def _lines(out: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if not key.startswith(OF_THE_CLOCK)} for line in figures(out)]
