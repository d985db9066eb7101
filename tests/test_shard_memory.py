"""What many shards and many samples cost in memory and descriptors."""

from __future__ import annotations

import os
import pickle
import time
from pathlib import Path

import psutil
import pytest

from tests.shard_files import make_tokenizer, write_samples, write_tar
from tests.test_loader import make_loader
from vlscale.data.shards import MAX_MAPPED, Shards
from vlscale.data.storage.access import Origin
from vlscale.data.storage.stores import Stat

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLSCALE_CACHE", str(tmp_path / "cache"))


def test_ten_thousand_shards_of_ten_thousand_samples_open_in_seconds(tmp_path: Path) -> None:
    """All are one file and one index by many names, for the room on disk; each is mapped and read for itself."""
    count = 10_000
    first = write_tar(tmp_path / "00000.tar", [(f"{n:08d}.txt", b"x" * 10) for n in range(count)])
    Shards(first)
    index = next((tmp_path / "cache" / "index").iterdir())
    _, _, state = index.name.partition("-")
    for n in range(1, count):
        os.link(first, path := tmp_path / f"{n:05d}.tar")
        os.link(index, index.with_name(f"{Origin.of(str(path), Stat(0, '')).place}-{state}"))
    process = psutil.Process()
    before, begin = process.memory_full_info().uss, time.monotonic()
    shards = Shards(str(tmp_path / "*.tar"))
    assert len(shards) == count * count
    assert time.monotonic() - begin < 30
    assert len(pickle.dumps(shards)) < 3e6
    for i in range(0, len(shards), count * 5 + 7):
        assert shards.read(i) == {"txt": b"x" * 10}
    assert process.memory_full_info().uss - before < 40e6
    assert process.num_fds() < 2 * MAX_MAPPED + 100


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than a small machine has cores
def test_workers_stay_as_they_are_over_a_hundred_thousand_samples(tmp_path: Path) -> None:
    shards = Shards(write_samples(tmp_path / "s", 3_000, 10, {}))
    views = {"visual.clean": {}, "text.clean": {}, "text.masked": {"mask_tokens": {"prob": 0.2}}}
    loader = make_loader(shards, make_tokenizer(tmp_path), batch=250, micro_batch=250, workers=4, views=views)
    memory: list[int] = []
    files: list[int] = []
    for step, _ in loader.steps(0, 430):  # beyond the last look, when the workers that are done have ended
        if step % 100 == 0:
            workers = psutil.Process().children(recursive=True)
            assert len(workers) >= 4
            memory.append(sum(each.memory_full_info().uss for each in workers))
            files.append(sum(each.num_fds() for each in workers))
    assert memory[3] < memory[1] * 1.03 + 4e6
    assert files[3] < files[1] + 100  # batches on their way vary; one left open per batch would make 200
    assert max(files) < 4 * (2 * MAX_MAPPED + 100)
