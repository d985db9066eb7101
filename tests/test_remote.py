"""Checkpoints in a store: whole or not to be seen, fetched once per node, and gone on with from anywhere."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests import runs
from tests.distributed.spawn import run_ranks
from tests.store_servers import Store, s3
from tests.test_background import pieces, save
from vlscale import distributed
from vlscale.errors import CheckpointError, ConfigError
from vlscale.options import CheckpointConfig
from vlscale.saving import checkpoint, remote
from vlscale.saving.background import Saver
from vlscale.saving.pieces import Reader
from vlscale.saving.remote import Remote


@pytest.fixture(params=["memory", "s3"])
def url(request: pytest.FixtureRequest) -> str:
    """A new place in each kind of store."""
    name = uuid.uuid4().hex
    if request.param == "s3":
        request.getfixturevalue("bucket")
    return {"memory": f"memory://{name}/run", "s3": f"s3://runs/{name}/run"}[request.param]


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """An S3 server with a bucket `runs`; the environment names it."""
    with s3("runs", monkeypatch) as (store, _):
        yield store


def names(url: str) -> list[str]:
    return sorted(Remote(url)._files.find(""))


def saver_of(url: str, **options: Any) -> Saver:
    return Saver(Remote(url), CheckpointConfig(background=False, **options))


def newest(url: str) -> tuple[int, float, list[str]]:
    """Its step, the value of all its elements, and the warnings; nothing that was fetched stays."""
    warnings: list[str] = []
    found = checkpoint.newest(Remote(url), warnings.append)
    if found is None:
        return 0, 0.0, warnings
    (value,) = set(Reader(found.folder).whole("master/weight").tolist())
    step, folder = found.step, checkpoint.run_of(found)
    del found
    gc.collect()  # what a store's client raised may hold on to who called
    assert not folder.exists()
    return step, value, warnings


def test_what_is_saved_is_found(url: str) -> None:
    assert newest(url) == (0, 0.0, [])
    saver = saver_of(url, keep=2)
    for step in (10, 20, 30):
        save(saver, step)
    assert newest(url) == (30, 30.0, [])
    assert checkpoint.last_step(Remote(url)) == 30
    files = [f"step_{step:08d}/{name}" for step in (20, 30) for name in ("manifest.json", "rank", "state.json")]
    assert names(url) == ["latest", *(name.replace("rank", "rank_00000.safetensors") for name in files)]


def test_a_harmed_one_leads_to_the_one_before(url: str) -> None:
    saver = saver_of(url)
    for step in (10, 20):
        save(saver, step)
    Remote(url)._files.put("step_00000020/rank_00000.safetensors", b"something else")
    step, value, warnings = newest(url)
    assert (step, value) == (10, 10.0)
    assert "rank_00000.safetensors is missing or not" in warnings[0]
    Remote(url)._files.put("step_00000010/manifest.json", b"{}")
    with pytest.raises(CheckpointError, match=r"holds 2 checkpoint\(s\), and none is usable"):
        newest(url)


def test_without_its_manifest_it_does_not_count(url: str) -> None:
    saver = saver_of(url)
    save(saver, 10)
    files = Remote(url)._files
    with files.create("step_00000020/rank_00000.safetensors") as file:
        file.write(memoryview(b"of a save that was killed"))
    assert newest(url) == (10, 10.0, [])
    save(saver, 30)  # takes it away
    assert not [name for name in names(url) if name.startswith("step_00000020")]


def test_a_step_that_is_saved_again_never_mixes(url: str) -> None:
    """The mark goes before the first file changes."""
    save(saver_of(url), 10)
    place = Remote(url)

    def broken_off() -> None:
        with place.create(10, "rank_00000.safetensors") as file:
            file.write(memoryview(b"half"))
            raise InterruptedError

    with pytest.raises(InterruptedError):
        broken_off()
    assert place.steps() == []
    save(saver_of(url), 10)
    assert newest(url) == (10, 10.0, [])


def test_large_files_travel_in_parts(bucket: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PART", 5 * 2**20)  # the least that S3 takes
    place = Remote("s3://runs/large")
    content = os.urandom(12 * 2**20)
    with place._files.create("it") as file:
        for start in range(0, len(content), 2**20):
            file.write(memoryview(content)[start : start + 2**20])
    assert len([asked for asked in bucket.asked if asked.startswith("PUT") and asked.endswith("/it")]) == 3
    body = place._files._client.get_object(Bucket="runs", Key="large/it")["Body"]  # type: ignore[attr-defined]
    assert body.read() == content


def test_a_store_that_says_no(bucket: Store) -> None:
    warnings: list[str] = []
    saver = Saver(Remote("s3://elsewhere/run"), CheckpointConfig(), warn=warnings.append)
    save(saver, 10)
    saver.finish()
    assert "could not be written to s3://elsewhere/run (rank 0: s3://elsewhere/run: NoSuchBucket" in warnings[0]
    with pytest.raises(CheckpointError, match="s3://elsewhere/run cannot be looked into"):
        checkpoint.newest(Remote("s3://elsewhere/run"))


def test_a_run_folder_tells_where_they_are(url: str, tmp_path: Path) -> None:
    save(saver_of(url), 10)
    (tmp_path / "config.yaml").write_text(f"checkpoint: {{to: '{url}'}}\n")
    assert checkpoint.find(str(tmp_path)).step == 10
    assert checkpoint.find(url).step == 10


def test_what_cannot_be_fetched_is_not_given_up(url: str) -> None:
    """A lost object leads to the one before; a store that does not answer does not."""
    for step in (10, 20):
        save(saver_of(url), step)
    away = mock.patch.object(type(Remote(url)._files), "get", side_effect=TimeoutError("timed out"))
    with away, pytest.raises(CheckpointError, match=r"cannot be fetched .*timed out.*; no older one is taken"):
        newest(url)
    Remote(url)._files.remove(["step_00000020/rank_00000.safetensors"])
    step, _, warnings = newest(url)
    assert step == 10
    assert "a checkpoint lacks a file" in warnings[0]


def test_a_file_that_rank_0_does_not_see_is_no_part_of_a_checkpoint(url: str) -> None:
    place = Remote(url)
    with place.create(10, "rank_00000.safetensors") as file:
        file.write(memoryview(b"short"))
    with pytest.raises(OSError, match=r"step_00000010/rank_00000.safetensors is not there for rank 0"):
        place.commit(10, {"rank_00000.safetensors": (6, "")}, {"step": 10})
    assert place.steps() == []


def test_only_what_a_run_needs_is_fetched_beside_its_checkpoint(url: str) -> None:
    save(saver_of(url), 10)
    for name in ("config.yaml", "fifty_gigabytes.bin"):
        Remote(url).keep(name, "it")
    if url.startswith("s3"):
        Remote(url)._files.put("", b"")  # as some programs make folders
    found = checkpoint.newest(Remote(url))
    assert found is not None
    assert sorted(path.name for path in checkpoint.run_of(found).iterdir()) == ["checkpoints", "config.yaml"]


def test_parts_of_killed_saves_are_given_back(bucket: Store) -> None:
    place = Remote("s3://runs/killed")
    client = place._files._client  # type: ignore[attr-defined]
    for key in ("step_00000010/rank_00000.safetensors", "step_00000020/rank_00001.safetensors", "notes"):
        client.create_multipart_upload(Bucket="runs", Key=f"killed/{key}")
    place.clear(20)
    left = client.list_multipart_uploads(Bucket="runs")["Uploads"]
    assert sorted(each["Key"] for each in left) == ["killed/notes", "killed/step_00000020/rank_00001.safetensors"]


def fetch(url: str) -> None:
    found = checkpoint.newest(Remote(url))
    assert found is not None
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_process_had_fetched_goes(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(saver_of(url), 10)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    killed = multiprocessing.get_context("fork").Process(target=fetch, args=(url,))
    killed.start()
    killed.join()
    (left,) = tmp_path.iterdir()
    live = checkpoint.newest(Remote(url))
    assert live is not None
    for folder in tmp_path.iterdir():
        os.utime(folder, (0, 0))
    assert newest(url) == (10, 10.0, [])
    assert list(tmp_path.iterdir()) == [checkpoint.run_of(live)]
    assert left != checkpoint.run_of(live)


def test_what_no_store_is() -> None:
    with pytest.raises(ConfigError, match=r"checkpoint.to '/a/folder' is no URL; write one such as s3://bucket/run"):
        Remote("/a/folder")
    with pytest.raises(ConfigError, match=r"checkpoint.to 'file:///a/folder' is no store; leave it out: --out is"):
        Remote("file:///a/folder")
    with pytest.raises(ConfigError, match=r"begins with no kind of store we know"):
        Remote("nosuch://a/b")


def ranks_save(url: str) -> tuple[int, list[str], bool]:
    """Both ranks save, and both find it; each has a part of the files to fetch."""
    rank, ranks = distributed.rank(), distributed.world_size()
    saver = saver_of(url)
    saver.start(10, pieces(10, rank, ranks), {"step": 10})
    found = checkpoint.newest(Remote(url))
    assert found is not None
    whole = set(Reader(found.folder).whole("master/weight").tolist())
    files = sorted(path.name for path in found.folder.iterdir())
    found.release()
    distributed.barrier()
    return len(whole), files, found.folder.exists()


def test_ranks_share_what_a_node_fetches(bucket: Store) -> None:
    files = ["manifest.json", "rank_00000.safetensors", "rank_00001.safetensors", "state.json"]
    assert run_ranks(ranks_save, 2, "s3://runs/shared") == [(1, files, False)] * 2


def refused(url: str) -> str:
    """The store says no to the one rank that asks what else lies there."""
    saver_of(url).start(10, pieces(10, distributed.rank(), distributed.world_size()), {"step": 10})
    with mock.patch.object(Remote, "kept", side_effect=PermissionError("not allowed")):
        try:
            return str(checkpoint.newest(Remote(url)))
        except CheckpointError as error:
            return str(error)


def test_what_one_rank_cannot_fetch_ends_all(bucket: Store) -> None:
    said = run_ranks(refused, 2, "s3://runs/refused")
    assert said[0] == said[1]
    assert said[0].startswith("a checkpoint cannot be fetched (not allowed)")


@pytest.mark.slow
def test_a_run_goes_on_from_a_bucket(bucket: Store, tmp_path: Path) -> None:
    """Stopped, gone on with, and taken up elsewhere by its URL alone; the numbers are those of a run in one go."""
    before = set(Path(tempfile.gettempdir()).glob("vlscale-checkpoint-*"))
    steps, url = ("steps=8", "checkpoint.every=3"), "s3://runs/mine"
    runs.run_whole(1, tmp_path / "whole", *steps)
    stored = (*steps, f"checkpoint.to={url}")
    code, said = runs.stop_at(1, tmp_path / "cut", 4, signal.SIGTERM, *stored)
    assert code == 75, said
    assert not (tmp_path / "cut" / "checkpoints").exists()
    assert {"config.yaml", "tokenizer.json", "latest"} <= set(names(url))
    runs.run_whole(1, tmp_path / "cut", *stored)
    assert runs.losses(tmp_path / "cut") == runs.losses(tmp_path / "whole")
    assert "nothing left to do" in runs.run_whole(1, tmp_path / "cut", *stored)
    said = runs.run_whole(1, tmp_path / "moved", "--resume", url, "steps=10", "checkpoint.every=3")
    assert "going on after step 8" in said
    measured = runs.launch("evaluate", "--checkpoint", str(tmp_path / "cut"))
    assert measured.returncode == 0, measured.stderr
    assert set(Path(tempfile.gettempdir()).glob("vlscale-checkpoint-*")) <= before  # those of killed processes go
