"""Saves that go on beside training: what the run waits for, what a failure does, and what any end of it leaves."""

from __future__ import annotations

import errno
import faulthandler
import json
import os
import shutil
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.spawn import run_ranks
from vlscale import distributed
from vlscale.errors import CheckpointError, ConfigError, TrainingError
from vlscale.options import CheckpointConfig
from vlscale.saving import checkpoint, host_memory
from vlscale.saving.background import Saved, Saver
from vlscale.saving.host_memory import HostMemory
from vlscale.saving.pieces import Piece, Reader, Writable
from vlscale.saving.targets import Folder


def pieces(fill: float, rank: int = 0, ranks: int = 1, places: int = 1000) -> list[Piece]:
    """This rank's part of two tensors, as a small engine would give them."""
    start, stop = (places * each // ranks for each in (rank, rank + 1))
    return [
        Piece("master/weight", (places,), start, torch.full((stop - start,), float(fill))),
        Piece("step/weight", (ranks,), rank, torch.tensor([int(fill)])),
    ]


def save(saver: Saver, step: int, **more: Any) -> None:
    saver.start(step, pieces(step), {"step": step, **more})


def newest(out: Path) -> tuple[int, float]:
    """Its step, and the value that all its elements have."""
    found = checkpoint.newest(Folder(out))
    if found is None:
        return 0, 0.0
    (value,) = set(Reader(found.folder).whole("master/weight").tolist())
    return found.step, value


class Slow(Folder):
    """A folder whose files wait for `go`, or fail as `fault` says."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.go = threading.Event()
        self.fault: Callable[[int], int] = lambda step: 0  # of a step: an errno

    @contextmanager
    def create(self, step: int, name: str) -> Iterator[Writable]:
        with super().create(step, name) as file:
            self.go.wait(20)
            if self.fault(step):
                raise OSError(self.fault(step), os.strerror(self.fault(step)))
            yield file


# --- the run waits for a copy only ---------------------------------------------------------------------------


def test_training_goes_on_while_it_is_written(tmp_path: Path) -> None:
    target, told = Slow(tmp_path), list[Saved]()
    saver = Saver(target, CheckpointConfig(), told.append)
    live = pieces(1)
    saver.start(1, live, {"step": 1})
    live[0].values.fill_(7)  # the next training step
    assert saver.halves == 0
    saver.go_on(saver.halves)
    assert newest(tmp_path) == (0, 0.0)
    target.go.set()
    while len(told) < 1:  # two boundaries at least: one after the files, one after the commit
        saver.go_on(saver.halves)
    assert saver.halves == 2
    assert newest(tmp_path) == (1, 1.0)
    assert told[0].bytes == (tmp_path / "step_00000001" / "rank_00000.safetensors").stat().st_size
    assert 0 < told[0].stall_seconds < told[0].seconds
    state = json.loads((tmp_path / "step_00000001" / "state.json").read_text())
    assert state["writing"]["bytes"] == told[0].bytes


def test_never_two_at_once(tmp_path: Path) -> None:
    target = Slow(tmp_path)
    saver = Saver(target, CheckpointConfig())
    save(saver, 1)
    threading.Timer(0.3, target.go.set).start()
    began = time.monotonic()
    save(saver, 2)
    assert time.monotonic() - began > 0.25
    assert newest(tmp_path) == (1, 1.0)
    saver.finish(last=True)
    assert newest(tmp_path) == (2, 2.0)


def test_the_memory_is_one_copy_used_again() -> None:
    memory = HostMemory()
    first = memory.hold(pieces(1))
    places = [piece.values.data_ptr() for piece in first]
    again = memory.hold(pieces(2))
    assert [piece.values.data_ptr() for piece in again] == places
    assert all(piece.values.data_ptr() % 64 == 0 for piece in again)
    assert first[0].values[0] == 2
    large = memory.hold(pieces(3, places=5000))
    assert large[0].values.shape == (5000,)
    assert memory._room.numel() == -(-5000 * 4 // 64) * 64 + 64


class Runtime:
    """CUDA's, which gives these codes in turn, and says what it was asked."""

    def __init__(self, *codes: int) -> None:
        self.codes, self.asked = list(codes), list[str]()

    def cudaHostRegister(self, place: int, size: int, flags: int) -> int:  # noqa: N802
        self.asked.append("register")
        return self.codes.pop(0)

    def cudaHostUnregister(self, place: int) -> int:  # noqa: N802
        self.asked.append("unregister")
        return self.codes.pop(0)


@pytest.mark.parametrize(
    ("codes", "asked", "warnings"),
    [
        ((0, 0, 0), ["register", "unregister", "register"], 0),
        ((2, 0), ["register", "register"], 1),
        ((2, 2), ["register", "register"], 1),
    ],
)
def test_page_locked_or_not(
    codes: tuple[int, ...], asked: list[str], warnings: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was not locked is not unlocked, and it is said once."""
    runtime, told = Runtime(*codes), list[str]()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    memory = HostMemory(told.append)
    for places in (1000, 5000, 3000):
        assert memory.hold(pieces(2, places=places))[0].values.tolist() == [2.0] * places
    assert runtime.asked == asked
    assert len(told) == warnings
    assert all("cannot be page-locked" in each for each in told)


def test_the_old_room_goes_before_the_new_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    memory, seen = HostMemory(), list[int]()
    make = host_memory._host_memory
    monkeypatch.setattr(host_memory, "_host_memory", lambda size: (seen.append(memory._room.numel()), make(size))[1])
    memory.hold(pieces(1))
    memory.hold(pieces(1, places=5000))
    assert seen == [0, 0]


def test_too_little_memory_is_told_before_it_is_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "available", lambda: 4000)
    saver = Saver(Folder(tmp_path), CheckpointConfig())
    for ask in (saver.reserve, saver._memory.hold):
        with pytest.raises(ConfigError, match=r"no host memory for a copy .*GiB are left.*checkpoint.background=false"):
            ask(pieces(1))
    Saver(Folder(tmp_path), CheckpointConfig(background=False)).reserve(pieces(1))
    saver.reserve(pieces(1, places=500))
    saver.reserve(pieces(1, places=900))  # as much again is not asked for
    saver.reserve(pieces(1, places=900))


def test_the_limits_of_control_groups_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group = tmp_path / "job" / "step"
    texts = {group.parent: ("9000", "5000", "anon 1\ninactive_file 300\n"), group: ("max", "5000", ""), tmp_path: ()}
    group.mkdir(parents=True)
    for folder, told in texts.items():
        for name, text in zip(("memory.max", "memory.current", "memory.stat"), told, strict=False):
            (folder / name).write_text(f"{text}\n")
    read = host_memory._read
    proc = {"/proc/self/cgroup": "4:memory:/else\n0::/job/step\n"}
    monkeypatch.setattr(host_memory, "GROUPS", tmp_path)
    monkeypatch.setattr(host_memory, "_read", lambda path: proc.get(str(path)) or read(path))
    assert host_memory.available() == 4300
    (group / "memory.max").write_text("5100\n")
    assert host_memory.available() == 100
    (group / "memory.max").write_text("4100\n")
    assert host_memory.available() == 0


def test_in_the_foreground_nothing_is_copied(tmp_path: Path) -> None:
    told: list[Saved] = []
    saver = Saver(Folder(tmp_path), CheckpointConfig(background=False), told.append)
    saver.start(3, pieces(3), {"step": 3}, time.perf_counter() - 100)  # what the run has waited for before counts
    assert newest(tmp_path) == (3, 3.0)
    assert saver._memory._room.numel() == 0
    assert len(told) == 1
    assert 100 < told[0].stall_seconds < told[0].seconds
    assert all(each.name != "checkpoint" for each in threading.enumerate())


def test_children_do_not_have_the_copy() -> None:
    """A forked loader worker would otherwise double the memory at the next save."""
    held = HostMemory().hold(pieces(1))
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        float(held[0].values[0])  # not mapped here
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGSEGV


# --- failures ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO])
def test_a_failure_leaves_the_one_before(tmp_path: Path, number: int) -> None:
    target, warnings, told = Slow(tmp_path), list[str](), list[Saved]()
    target.go.set()
    saver = Saver(target, CheckpointConfig(), told.append, warnings.append)
    save(saver, 1)
    saver.finish()
    target.fault = lambda step: number if step == 2 else 0
    save(saver, 2)
    saver.finish()
    assert newest(tmp_path) == (1, 1.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000001"]
    assert [saved.failure != "" for saved in told] == [False, True]
    assert len(warnings) == 1
    for part in (os.strerror(number), "of step 2 could", "GiB are free", "newest is that of step 1", "1 of checkpoint"):
        assert part in warnings[0]
    save(saver, 3)
    saver.finish(last=True)
    assert newest(tmp_path) == (3, 3.0)


def test_too_many_in_a_row_end_the_run(tmp_path: Path) -> None:
    target, warnings = Slow(tmp_path), list[str]()
    target.go.set()
    saver = Saver(target, CheckpointConfig(failures=2), warn=warnings.append)
    target.fault = lambda step: errno.ENOSPC if step in (1, 3, 4) else 0
    for step in (1, 2, 3):
        save(saver, step)
    saver.finish()
    assert len(warnings) == 2
    save(saver, 4)
    with pytest.raises(TrainingError, match=r"step 4 could .*No space left.*newest is that of step 2.*failures"):
        saver.finish()
    assert newest(tmp_path) == (2, 2.0)


def test_the_last_one_must_not_fail(tmp_path: Path) -> None:
    target = Slow(tmp_path)
    target.go.set()
    target.fault = lambda step: errno.EROFS
    saver = Saver(target, CheckpointConfig())
    save(saver, 1)
    with pytest.raises(CheckpointError, match=r"step 1 could .*Read-only file system.*has written none yet") as caught:
        saver.finish(last=True)
    assert caught.value.exit_code == 5


def test_a_full_commit_is_a_failure_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    saver = Saver(Folder(tmp_path), CheckpointConfig(), warn=warnings.append)
    save(saver, 1)
    saver.finish()

    def full(path: Path, target: Path) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", full)
        save(saver, 2)
        saver.finish()
    assert "Disk quota exceeded" in warnings[0]
    assert newest(tmp_path) == (1, 1.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000001"]


@pytest.mark.parametrize("last", [False, True])
def test_a_checkpoint_that_latest_does_not_name_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: bool
) -> None:
    """What `latest` names then stays, too."""
    warnings: list[str] = []
    saver = Saver(Folder(tmp_path), CheckpointConfig(keep=1), warn=warnings.append)
    save(saver, 1)
    saver.finish()
    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", lambda path, to: os.stat("/proc/nowhere"))
        save(saver, 2)
        saver.finish(last)
    assert len(warnings) == 1
    assert "could not be made to name step 2" in warnings[0]
    assert (tmp_path / "latest").read_text() == "step_00000001\n"
    assert newest(tmp_path) == (2, 2.0)
    save(saver, 3)
    saver.finish()
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == ["latest", "step_00000003"]


@pytest.mark.parametrize("fault", [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EIO])
def test_a_file_system_without_fsync_of_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: int) -> None:
    sync = os.fsync

    def without(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(fault, os.strerror(fault))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", without)
    warnings: list[str] = []
    save(Saver(Folder(tmp_path), CheckpointConfig(background=False), warn=warnings.append), 1)
    assert newest(tmp_path) == ((0, 0.0) if fault == errno.EIO else (1, 1.0))
    assert len(warnings) == (fault == errno.EIO)


def test_our_own_mistakes_are_no_failures_of_the_disk(tmp_path: Path) -> None:
    saver = Saver(Folder(tmp_path), CheckpointConfig())
    save(saver, 1, what=object())
    with pytest.raises(TypeError, match="not JSON serializable"):
        saver.finish()


# --- ends ----------------------------------------------------------------------------------------------------


def test_given_up(tmp_path: Path) -> None:
    target = Slow(tmp_path)
    saver = Saver(target, CheckpointConfig())
    save(saver, 1)
    threading.Timer(0.2, target.go.set).start()
    saver.close()
    assert list(tmp_path.iterdir()) == []
    saver.close()
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join(5)
            assert not thread.is_alive()


class Killed:
    """Ends this process before its n-th file operation."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.seen: list[str] = []
        self.unsafe: set[str] = set()  # files that were written to and not flushed to the disk

    def install(self) -> None:
        for name in ("open", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir"):
            setattr(os, name, self.counted(name, getattr(os, name)))

    def counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **named: Any) -> Any:
            self.seen.append(name)
            if len(self.seen) == self.number:
                self.die()
            if name == "fsync":
                self.unsafe.discard(os.readlink(f"/proc/self/fd/{args[0]}"))
            made = function(*args, **named)
            if name == "open" and args[1] & os.O_CREAT:
                self.unsafe.add(os.readlink(f"/proc/self/fd/{made}"))
            if name in ("rename", "replace"):
                old, new = map(str, args)
                self.unsafe = {new + path.removeprefix(old) if path.startswith(old) else path for path in self.unsafe}
            return made

        return operation

    def die(self) -> None:
        """As if the power had gone: what was not flushed is lost."""
        for path in self.unsafe:
            if os.path.exists(path):
                os.truncate(path, os.path.getsize(path) // 2)
        os._exit(9)


class Counted:
    """A file whose writes count as operations."""

    def __init__(self, file: Any, killed: Killed) -> None:
        self.write = killed.counted("write", file.write)


def dying(root: Path, step: int, keep: int, number: int) -> int:
    """A save in a child that is killed before one of its operations; what it exits with, unkilled: their number."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    killed = Killed(number)

    class Watched(Folder):
        @contextmanager
        def create(self, step: int, name: str) -> Iterator[Writable]:
            with super().create(step, name) as file:
                yield Counted(file, killed)

    saver = Saver(Watched(root), CheckpointConfig(keep=keep, background=False))
    killed.install()
    save(saver, step)
    os._exit(100 + len(killed.seen))


@pytest.mark.parametrize("background", [False, True])
def test_each_line_is_on_the_disk_before_the_next(
    tmp_path: Path, background: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def noted(name: str, say: Callable[..., str]) -> None:
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *given: (seen.append(f"{name} {say(*given)}"), real(*given))[1])

    def of(path: Any) -> str:
        return str(Path(path).relative_to(tmp_path))

    noted("fsync", lambda descriptor: of(os.readlink(f"/proc/self/fd/{descriptor}")))
    noted("rename", lambda old, new: of(new))
    noted("replace", lambda old, new: of(new))
    saver = Saver(Folder(tmp_path / "to"), CheckpointConfig(background=background))
    save(saver, 1)
    saver.finish()
    partial = "to/.step_00000001.partial"
    assert seen == [
        *(f"fsync {partial}/{name}" for name in ("rank_00000.safetensors", "state.json", "manifest.json")),
        f"fsync {partial}",
        "rename to/step_00000001",
        "fsync to",
        "fsync .",
        "fsync to/.latest.partial",
        "replace to/latest",
        "fsync to",
    ]


@pytest.mark.parametrize(("case", "keep"), [("leftover", 1), ("again", 2)])
def test_killed_at_each_file_operation(tmp_path: Path, case: str, keep: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """`latest` and the newest are usable at all times; what the kill left goes with the next save."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # `Killed` keeps the books
    before, step, old = tmp_path / "before", 30, 20
    saver = Saver(Folder(before), CheckpointConfig(background=False))
    for each in (10, 20):
        save(saver, each)
    if case == "again":  # 20 is broken, and the run has gone on from 10
        step, old = 20, 10
        os.truncate(before / "step_00000020" / "rank_00000.safetensors", 100)
    if case == "leftover":
        for each in (25, 30):
            shutil.copytree(before / "step_00000010", before / f".step_{each:08d}.partial")
        (before / ".step_00000030.partial" / "rank_00007.safetensors").write_bytes(b"of a larger run")
    operations = dying(shutil.copytree(before, tmp_path / "whole"), step, keep, 0) - 100
    assert operations > 15
    seen = set()
    for number in range(1, operations + 1):
        root = shutil.copytree(before, tmp_path / f"{number}")
        assert dying(root, step, keep, number) == 9
        found = newest(root)
        assert found in ((old, old), (step, step))
        seen.add(found[0])
        named = (root / "latest").read_text().strip()
        if case != "again" or found[0] == step:  # else it still names the broken one
            checkpoint.open_checkpoint(root / named)
        assert not list(root.glob("step_*/*00007*"))
        save(Saver(Folder(root), CheckpointConfig(keep=1, background=False)), 40)
        assert newest(root) == (40, 40.0)
        assert sorted(path.name for path in root.iterdir()) == ["latest", "step_00000040"]
    assert seen == {old, step}


# --- several ranks -------------------------------------------------------------------------------------------


def rank_reserves() -> str:
    """There is room for one rank's copy, and two are on this machine: why not."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(host_memory, "available", lambda: 6000)
        with pytest.raises(ConfigError) as caught:
            HostMemory().reserve(pieces(1, distributed.rank(), 2, places=2000))
    return str(caught.value)


def ranks_save(root: Path, faulty: int) -> dict[str, Any]:
    """Three saves by votes; that of step 2 fails on one rank."""
    rank, ranks = distributed.rank(), distributed.world_size()
    target, told, warnings = Slow(root), list[Saved](), list[str]()
    target.go.set()
    target.fault = lambda step: errno.ENOSPC if step == 2 and rank == faulty else 0
    saver = Saver(target, CheckpointConfig(failures=2), told.append, warnings.append)
    vote = distributed.StopVote()
    over = []
    for step in range(1, 4):
        saver.start(step, pieces(step, rank, ranks), {"step": step, "rank": rank})
        for _ in range(1000):
            (behind,) = vote.agreed(-saver.halves)
            saver.go_on(-behind)
            if not saver.busy:
                break
            time.sleep(0.002 * (1 + rank))
        over.append(saver.halves)
    found = checkpoint.newest(Folder(root))
    assert found is not None
    refused = rank_reserves()
    return {
        "over": over,
        "refused": refused,
        "told": [saved.failure for saved in told],
        "warnings": warnings,
        "found": (found.step, found.state["rank"]),
        "files": sorted(path.name for path in (root / "step_00000003").iterdir()),
        "left": sorted(path.name for path in root.iterdir()),
    }


def test_ranks_save_together(tmp_path: Path) -> None:
    first, second = run_ranks(ranks_save, 2, tmp_path, 1)
    assert first["over"] == second["over"] == [2, 4, 6]
    assert "no host memory for a copy" in first["refused"]
    assert first["refused"] == second["refused"]
    assert second["told"] == second["warnings"] == []
    assert [failure == "" for failure in first["told"]] == [True, False, True]
    assert "rank 1: [Errno 28] No space left on device" in first["warnings"][0]
    assert first["found"] == second["found"] == (3, 0)
    assert first["files"] == ["manifest.json", "rank_00000.safetensors", "rank_00001.safetensors", "state.json"]
    assert first["left"] == ["latest", "step_00000001", "step_00000003"]
    assert newest(tmp_path) == (3, 3.0)


def ranks_look(root: Path) -> list[Any]:
    warnings: list[str] = []
    found = checkpoint.newest(Folder(root), warnings.append)
    return [found and found.step, warnings]


def test_ranks_agree_on_what_is_whole(tmp_path: Path) -> None:
    """Each reads a part of the files only, and all hear of what one finds."""
    run_ranks(ranks_save, 2, tmp_path, 7)
    for name in ("rank_00001.safetensors", "state.json"):
        path = tmp_path / "step_00000003" / name
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
        (step, warnings), other = run_ranks(ranks_look, 2, tmp_path)
        assert [step, warnings] == other
        assert step == 2
        assert f"step_00000003/{name} has changed since it was written" in warnings[0]
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
