"""Hostile shards: no crash, no hang, bounded memory, nothing written outside the cache, every fault named.

A child process that may take little memory and must end each shard in time reads them as training does.
"""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.hostile_members import FEATS, SOUND, sound
from tests.hostile_shards import shard
from tests.runs import ROOT, environment
from tests.shard_files import make_tokenizer
from vlscale.data import lengths
from vlscale.data.looking import inspect
from vlscale.data.looking.cards import cards
from vlscale.data.looking.describe import describe
from vlscale.data.looking.page import page
from vlscale.data.micro_batches import MicroBatches, Preprocessing
from vlscale.data.order import TaskOrder
from vlscale.data.phrases import Texts
from vlscale.data.samples import BrokenSampleError, picture, printable, regions, sentences, tags
from vlscale.data.shards import Shards
from vlscale.data.text import Tokenizer
from vlscale.data.views import parse
from vlscale.errors import DataError
from vlscale.types import Inputs

MOST_MEMORY = 2 << 30  # bytes that reading may take beside what the libraries map
MOST_SECONDS = 60  # of one shard; the machine may be busy
MOST_READ = 50  # samples of one shard that are read
SEEN = Inputs(image_size=16, text_length=12, separator=False)
FOUND = Inputs(0, 12, True, regions=4, feats=FEATS, boxes=4, geometry="corners")
VIEWS: dict[str, Any] = {"text.clean": {}, "visual.clean": {}}
FORBIDDEN = ("pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect")


def watch(*allowed: Path) -> None:
    """End this process at once if it unpickles, runs something, or changes a file outside these folders."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        changed = None
        if event == "open" and isinstance(arguments[0], str | bytes):
            writes = arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            changed = os.fsdecode(arguments[0]) if writes else None
        elif event in ("os.mkdir", "os.remove", "os.rmdir", "os.chmod"):
            folder = os.readlink(f"/proc/self/fd/{arguments[-1]}") if arguments[-1] >= 0 else ""
            told = arguments[0]
            changed = os.readlink(f"/proc/self/fd/{told}") if isinstance(told, int) else os.fsdecode(told)
            changed = os.path.join(folder, changed)
        elif event in ("os.rename", "os.link", "os.symlink"):
            changed = os.fsdecode(arguments[1])
        inside = changed is None or any(Path(changed).resolve().is_relative_to(folder) for folder in allowed)
        if not inside or event.startswith(FORBIDDEN):
            os.write(2, f"{event} {arguments}\n".encode())
            os._exit(99)

    sys.addaudithook(hook)


def read_shard(path: Path, cache: Path, tokenizers: dict[str, Tokenizer]) -> dict[str, Any]:
    """What a shard of `tests.hostile_shards` gives; AssertionError if a sound sample is lost or a fault has no name."""
    try:
        shards = Shards(path, cache)
        numbers = range(min(len(shards), MOST_READ))
        good = {i for i in numbers if is_sound(shards, i)}
        bad = {i: reason for i in numbers if (reason := fault(shards, i))}
        assert not good & set(bad), (good, bad)
        if numbers:
            for name, inputs in (("seen", SEEN), ("found", FOUND)):
                in_batches(shards, numbers, good, inputs, tokenizers[name])
        looked_at(path, shards, good, tokenizers)
    except DataError as error:
        said = str(error)
        said.encode()
        return {"error": said}
    return {"samples": len(shards), "good": len(good), "bad": [f"{shards.key(i)}: {bad[i]}" for i in bad]}


def is_sound(shards: Shards, i: int) -> bool:
    """Whether sample `i` came through as it was made."""
    key = shards.key(i)
    number = int(key[1:]) if key[:1] == "s" and key[1:].isdecimal() and len(key) == 2 else SOUND
    made = {name.partition(".")[2]: data for name, data in sound(number)}
    return number < SOUND and shards.read(i) == made


def fault(shards: Shards, i: int) -> str:
    """Why sample `i` cannot be used, if it cannot, in any of the ways that samples are read."""
    reasons = []
    for read in (picture, sentences, tags, lambda *place: sentences(*place, True)):
        try:
            read(shards, i)
        except BrokenSampleError as error:
            reasons.append(named(error, shards, i))
    try:
        regions(shards, i, FOUND, frozenset())
    except BrokenSampleError as error:
        reasons.append(named(error, shards, i))
    return "; ".join(reasons)


def named(error: BrokenSampleError, shards: Shards, i: int) -> str:
    assert str(error).startswith(f"sample '{printable(shards.key(i))}' of shard {shards.shard(i)}: ")
    assert str(error).isprintable()
    assert 5 < len(error.reason) < 500
    return error.reason


def in_batches(shards: Shards, numbers: range, good: set[int], inputs: Inputs, tokenizer: Tokenizer) -> None:
    """As the loader makes micro-batches: sound samples come out, the others too or are named."""
    preprocessing = Preprocessing({"all": parse(VIEWS, inputs)}, TaskOrder({"all": 1.0}, 0), 0)
    made = MicroBatches(shards, tokenizer, inputs, preprocessing, lambda positions: positions)(
        np.arange(len(numbers)), "all"
    )
    if made.batch is None:
        assert not good, made.error
        assert str(shards.paths[0]) in made.error
        return
    named = {bad.key for bad in made.bad}
    assert {shards.key(i) for i in good} <= set(made.batch.keys) - named
    assert {shards.key(i) for i in numbers} <= set(made.batch.keys) | named
    json.dumps(made.bad).encode()


def looked_at(path: Path, shards: Shards, good: set[int], tokenizers: dict[str, Tokenizer]) -> None:
    """As `shards.py` looks into them, and as batches of equal cost measure them."""
    if len(shards) > MOST_READ:
        return
    report = inspect.verify([path])
    assert not {problem.key for problem in report.problems} & {shards.key(i) for i in good}, report
    for problem in report.problems:
        problem.reason.encode()
    if len(shards):
        page("hostile", describe(shards), cards(shards)).encode()
    for name, inputs in (("seen", SEEN), ("found", FOUND)):
        texts = Texts(shards, tokenizers[name], 0, None)
        for i in range(len(shards)):
            lengths.measure_one(shards, texts, lengths.Reading(inputs, 0), i)


def main(folder: Path, first: int, count: int, slow: bool) -> None:
    """Make and read shards; one line of JSON for each."""
    tokenizers = {}
    for name, inputs in (("seen", SEEN), ("found", FOUND)):
        (folder / name).mkdir()
        tokenizers[name] = make_tokenizer(folder / name, inputs)
    cache, path = Path(os.environ["VLSCALE_CACHE"]), folder / "shards" / "hostile.tar"
    watch(cache.resolve(), path.parent.resolve())
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MOST_MEMORY, resource.RLIM_INFINITY))
    for seed in range(first, first + count):
        kind, data = shard(seed, slow)
        path.write_bytes(data)
        del data
        faulthandler.dump_traceback_later(MOST_SECONDS, exit=True)
        print(json.dumps({"seed": seed, "kind": kind}), end="\t", flush=True)
        print(json.dumps(read_shard(path, cache, tokenizers)), flush=True)
        faulthandler.cancel_dump_traceback_later()


def fuzz(folder: Path, first: int, count: int, slow: bool, timeout: float) -> list[dict[str, Any]]:
    """What the child said of each shard."""
    cache = folder / "cache"
    for each in (cache, folder / "shards"):
        each.mkdir(parents=True)
    given = [str(folder), str(first), str(count), str(int(slow))]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.test_fuzz", *given],
        cwd=ROOT,
        env={**environment(), "VLSCALE_CACHE": str(cache), "TMPDIR": str(cache), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-1_000:]}\n{done.stderr[-8_000:]}"
    assert {path.name for path in folder.iterdir()} <= {"seen", "found", "shards", "cache"}
    assert [path.name for path in (folder / "shards").iterdir()] == ["hostile.tar"]
    found = [[json.loads(part) for part in line.split("\t")] for line in done.stdout.splitlines()]
    assert len(found) == count
    return [{**made, **said} for made, said in found]


def check(found: list[dict[str, Any]]) -> None:
    """The children's findings are what such shards should give."""
    by_kind: dict[str, Counter[str]] = {}
    for each in found:
        what = "error" if "error" in each else "bad" if each["bad"] else "sound"
        by_kind.setdefault(each["kind"], Counter())[what] += 1
    for kind in ("pictures", "texts", "regions", "odd_samples", "damaged_member"):
        assert by_kind[kind]["bad"] > 0, by_kind
    for each in found:
        assert "hostile.tar" in each.get("error", "hostile.tar"), each
        if each["kind"] in ("pictures", "texts", "regions", "damaged_member"):
            assert each.get("good") == SOUND, each
    for kind in ("cut", "sizes", "no_tar", "compressed", "extended", "many_members"):
        assert by_kind[kind]["error"] > 0, by_kind


def test_hostile_shards(tmp_path: Path) -> None:
    check(fuzz(tmp_path / "fuzz", 0, 60, slow=False, timeout=400))


@pytest.mark.slow
@pytest.mark.parametrize("first", [0, 500])
def test_a_thousand_hostile_shards(tmp_path: Path, first: int) -> None:
    check(fuzz(tmp_path / "fuzz", first, 500, slow=True, timeout=900))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "1")
