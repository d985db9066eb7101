"""Whole runs from stores that misbehave, and what many shards and samples cost."""

from __future__ import annotations

import os
import pickle
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests import runs
from tests.cache_reader import content
from tests.shard_files import write_samples, write_tar
from tests.store_servers import Store, files, s3, serving
from vlscale.data.shards import Shards, StoreOptions
from vlscale.errors import DataError

pytestmark = pytest.mark.slow
FAULTS = ("", "drop", "", "stall", *("", "503", "", "", "429", "drop", "", "", "drop") * 3)
SHORT = (
    "steps=8",
    "data.shuffle=windowed",
    "data.window=60",
    "data.store_timeout=2",
    "optim.warmup=0",
    "checkpoint.every=100",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards for a short run."""
    found = tmp_path_factory.mktemp("store")
    write_samples(found / "train", 150, 50, {})
    write_samples(found / "val", 32, 32, {})
    return found


@pytest.fixture(scope="module")
def expected(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of a run from disk."""
    out = tmp_path_factory.mktemp("disk") / "out"
    runs.run_whole(1, out, *SHORT, f"data.train={folder}/train/*.tar", f"data.val={folder}/val/*.tar")
    return runs.losses(out)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def misbehave(store: Store) -> None:
    store.asked.clear()
    store.fault = lambda number: FAULTS[number % len(FAULTS)]


def test_a_run_from_a_web_server_that_breaks_off_refuses_and_stalls(
    folder: Path, expected: list[float], tmp_path: Path
) -> None:
    with serving(files(folder)) as store:
        misbehave(store)
        names = {
            part: ",".join(f"{store.url}/{part}/{path.name}" for path in sorted((folder / part).iterdir()))
            for part in ("train", "val")
        }
        given = [f"data.{part}=[{listed}]" for part, listed in names.items()]
        out = tmp_path / "out"
        runs.run_whole(1, out, *SHORT, *given, "data.workers=1", "data.cache_gigabytes=0")
        assert len(store.asked) > 60
    assert runs.losses(out) == expected


@pytest.fixture
def bucket(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """An S3 server that holds the data set; the environment names it."""
    with s3("shards", monkeypatch) as (store, client):
        for path in folder.rglob("*.tar"):
            client.put_object(Bucket="shards", Key=str(path.relative_to(folder)), Body=path.read_bytes())
        yield store


def test_a_run_from_s3_that_breaks_off_refuses_and_stalls(
    bucket: Store, expected: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    misbehave(bucket)
    given = ["data.train=s3://shards/train/*.tar", "data.val=s3://shards/val/*.tar", f"data.cache={tmp_path}/cache"]
    runs.run_whole(1, tmp_path / "out", *SHORT, *given)
    assert len(bucket.asked) > 8
    assert len(list((tmp_path / "cache").glob("*.tar"))) >= 2
    assert runs.losses(tmp_path / "out") == expected


def test_s3_tells_what_is_missing_and_what_changed(bucket: Store, folder: Path, tmp_path: Path) -> None:
    import boto3

    for options in (StoreOptions(cache_gigabytes=0), StoreOptions(cache=str(tmp_path / "cache"))):
        with pytest.raises(DataError, match=r"s3://shards/train/none.tar is not there \(HTTP 404\)"):
            Shards("s3://shards/train/none.tar", tmp_path / "index", options)
        with pytest.raises(DataError, match=r"no shard matches 's3://shards/other/\*'"):
            Shards("s3://shards/other/*", tmp_path / "index", options)
        shards = Shards("s3://shards/val/part-000.tar", tmp_path / "index", options)
        assert shards.fingerprint() == Shards(folder / "val" / "part-000.tar", tmp_path / "index").fingerprint()
        for file in (tmp_path / "cache").glob("*.tar"):
            file.unlink()
        client = boto3.client("s3")
        client.put_object(Bucket="shards", Key="val/part-000.tar", Body=bytes(shards.bytes))
        with pytest.raises(DataError, match=r"s3://shards/val/part-000.tar changed while it was in use"):
            shards.read(0)
        client.put_object(Bucket="shards", Key="val/part-000.tar", Body=(folder / "val" / "part-000.tar").read_bytes())
        client.close()


def test_processes_that_share_a_small_cache_and_are_killed(tmp_path: Path) -> None:
    for n in range(12):
        members = [(f"{n}_{i}.bin", content(f"{n}_{i}")) for i in range(50)]
        (tmp_path / "s").mkdir(exist_ok=True)
        write_tar(tmp_path / "s" / f"{n:02d}.tar", members)
    limit, cache, draw = 6_000_000, tmp_path / "cache", random.Random(0)
    with serving(files(tmp_path)) as store:
        options = StoreOptions(cache=str(cache), cache_gigabytes=limit / 1e9, windowed=True, timeout=0.3)
        shards = Shards([f"{store.url}/s/{n:02d}.tar" for n in range(12)], tmp_path / "index", options)
        (tmp_path / "shards").write_bytes(pickle.dumps(shards))
        store.fault = lambda number: ("", "drop", "", "503", "", "", "")[number % 7]
        command = [sys.executable, "-m", "tests.cache_reader", str(tmp_path / "shards"), "10"]
        readers = [subprocess.Popen(command, cwd=runs.ROOT) for _ in range(5)]
        most, end = 0, time.monotonic() + 10
        while time.monotonic() < end:
            time.sleep(0.2)
            for file in cache.glob("*.tar"):  # as if it had rested, so that shards come and go all the time
                with suppress(FileNotFoundError):
                    most = max(most, sum(each.stat().st_size for each in cache.iterdir()))
                    os.utime(file, (time.time() - draw.choice([0, 100]),) * 2)
            if draw.random() < 0.1:
                readers[0].kill()
                readers[0].wait()
                readers[0] = subprocess.Popen([*command[:-1], "1"], cwd=runs.ROOT)
        assert [reader.wait(60) for reader in readers] == [0] * 5
        assert 0 < most <= limit
