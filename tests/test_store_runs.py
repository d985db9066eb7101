"""Whole runs from stores that misbehave, and what many shards and samples cost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import runs
from tests.shard_files import write_samples
from tests.store_servers import Store, files, serving

pytestmark = pytest.mark.slow
FAULTS = ("", "drop", "", "503", "", "", "429", "drop", "", "stall", "")
SHORT = (
    "steps=8",
    "data.shuffle=windowed",
    "data.window=60",
    "data.store_timeout=0.3",
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
    import boto3
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "of-a-test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with serving(DomainDispatcherApplication(create_backend_app)) as store:
        monkeypatch.setenv("AWS_ENDPOINT_URL", store.url)
        client = boto3.client("s3")
        client.create_bucket(Bucket="shards")
        for path in folder.rglob("*.tar"):
            client.put_object(Bucket="shards", Key=str(path.relative_to(folder)), Body=path.read_bytes())
        client.close()
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
