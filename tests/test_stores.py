from __future__ import annotations

import errno
import fcntl
import gzip
import logging
import os
import pickle
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.shard_files import write_samples, write_tar
from tests.store_servers import Store, files, serving
from vlscale.data.shards import Shards, StoreOptions, expand
from vlscale.data.storage import access
from vlscale.data.storage import cache as cache_module
from vlscale.data.storage import stores as stores_module
from vlscale.data.storage.stores import is_pattern, shown
from vlscale.errors import ConfigError, DataError

COUNT, PER_SHARD = 12, 4
RANGED = StoreOptions(cache_gigabytes=0, timeout=0.3)
CACHED = StoreOptions(timeout=0.3)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLSCALE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(stores_module, "SHORTEST_WAIT", 0.001)
    monkeypatch.setattr(stores_module, "LONGEST_WAIT", 0.05)


@pytest.fixture
def local(tmp_path: Path) -> Shards:
    return Shards(write_samples(tmp_path / "s", COUNT, PER_SHARD, {}))


@pytest.fixture
def store(tmp_path: Path, local: Shards) -> Iterator[Store]:
    with serving(files(tmp_path)) as served:
        yield served


def everything(shards: Shards) -> list[tuple[str, dict[str, bytes]]]:
    return [(shards.key(i), shards.read(i)) for i in range(len(shards))]


def bodies(store: Store) -> int:
    """How many answers held more than the first byte."""
    return sum(not asked.endswith("bytes=0-0") for asked in store.asked)


@pytest.mark.parametrize("options", [RANGED, CACHED], ids=["by ranges", "by the cache"])
def test_the_same_samples_as_from_disk(store: Store, local: Shards, options: StoreOptions) -> None:
    shards = Shards(f"{store.url}/s/part-{{000..002}}.tar", options=options)
    assert everything(pickle.loads(pickle.dumps(shards))) == everything(local)
    assert shards.fingerprint() == local.fingerprint()
    assert shards.read(1, ("json",)) == local.read(1, ("json",))
    assert shards.shard(5) == f"{store.url}/s/part-001.tar"
    store.asked.clear()
    again = Shards(f"{store.url}/s/part-*.tar", options=options)  # found by the server's listing
    assert again.paths == shards.paths
    assert bodies(store) == 1  # the listing: indexes are kept
    assert everything(again) == everything(local)
    assert (bodies(store) == 1) == (options is CACHED)


@pytest.mark.parametrize("options", [RANGED, CACHED], ids=["by ranges", "by the cache"])
def test_a_store_that_breaks_off_stalls_and_refuses(store: Store, local: Shards, options: StoreOptions) -> None:
    store.fault = lambda number: ("503", "drop", "", "429", "drop", "stall")[number % 6] if number < 18 else ""
    shards = Shards(f"{store.url}/s/part-{{000..002}}.tar", options=options)
    assert everything(shards) == everything(local)


def test_a_download_goes_on_from_the_byte_it_reached(store: Store, local: Shards) -> None:
    size = os.path.getsize(local.paths[0])
    store.fault = lambda number: "drop" if number == 1 else ""
    Shards(f"{store.url}/s/part-000.tar", options=CACHED)
    asked = [each.split("bytes=")[1] for each in store.asked]
    assert asked == ["0-0", f"0-{size - 1}", f"{size // 2}-{size - 1}"]


def test_a_download_that_was_killed_is_gone_on_with(
    store: Store, local: Shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.fault = lambda number: "" if number == 0 else "drop" if number == 1 else "503"
    impatient = StoreOptions(timeout=0.3, patience=0.1)
    with pytest.raises(DataError, match="HTTP 503"):
        Shards(f"{store.url}/s/part-000.tar", options=impatient)
    store.fault = lambda number: ""
    store.asked.clear()
    assert Shards(f"{store.url}/s/part-000.tar", options=CACHED).read(0) == local.read(0)
    assert "bytes=0-0" in store.asked[0]
    assert not store.asked[1].split("bytes=")[1].startswith("0-")


def test_an_outage_is_told_once_and_outlived(
    store: Store, local: Shards, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(stores_module, "TOLD_AFTER", 0.1)
    shards = Shards(f"{store.url}/s/part-{{000..002}}.tar", options=RANGED)
    begin = time.monotonic()
    store.fault = lambda number: "503" if time.monotonic() - begin < 0.5 else ""
    with caplog.at_level(logging.WARNING):
        assert everything(shards) == everything(local)
    assert [record.message.split(" (")[0] for record in caplog.records] == [
        f"{store.url.removeprefix('http://')} does not answer"
    ]


def test_a_store_that_stays_away(store: Store, local: Shards) -> None:
    options = StoreOptions(cache_gigabytes=0, timeout=0.3, patience=0.2)
    shards = Shards(f"{store.url}/s/part-{{000..002}}.tar", options=options)
    store.fault = lambda number: "503"
    with pytest.raises(
        DataError, match=r"shard .*/s/part-001.tar could not be read for .* last error: .*HTTP 503; mend"
    ):
        shards.read(5)


@pytest.mark.parametrize(
    ("status", "says"),
    [("404", "is not there"), ("403", "may not be read"), ("400", r"cannot be asked for \(HTTP 400")],
)
def test_what_no_patience_mends_ends_at_once(store: Store, local: Shards, status: str, says: str) -> None:
    shards = Shards(f"{store.url}/s/part-000.tar", options=RANGED)
    store.fault = lambda number: status
    store.asked.clear()
    with pytest.raises(DataError, match=rf"shard .*part-000.tar {says}"):
        shards.read(0)
    with pytest.raises(DataError, match=rf"shard .*part-001.tar {says}"):
        Shards(f"{store.url}/s/part-001.tar", options=RANGED)
    assert len(store.asked) == 2


@pytest.mark.parametrize("options", [RANGED, CACHED], ids=["by ranges", "by the cache"])
def test_a_shard_that_changed_ends_at_once(store: Store, local: Shards, options: StoreOptions, tmp_path: Path) -> None:
    shards = Shards(f"{store.url}/s/part-000.tar", options=options)
    for file in (tmp_path / "cache" / "shards").glob("*.tar"):
        file.unlink()
    write_tar(tmp_path / "s" / "part-000.tar", [("another.txt", bytes(9_000))])
    store.asked.clear()
    with pytest.raises(DataError, match=r"part-000.tar changed while it was in use"):
        shards.read(0)
    assert len(store.asked) == 1
    assert Shards(f"{store.url}/s/part-000.tar", options=options).key(0) == "another"  # its index is made anew


def test_samples_in_a_row_are_read_ahead(store: Store, tmp_path: Path) -> None:
    local = Shards(write_samples(tmp_path / "many", 100, 100, {}))
    shards = Shards(f"{store.url}/many/part-000.tar", options=RANGED)
    store.asked.clear()
    assert everything(shards) == everything(local)
    assert len(store.asked) < 12
    store.asked.clear()
    for i in range(0, 100, 7):
        assert shards.read(99 - i, ("json",)) == local.read(99 - i, ("json",))
    spans = [asked.split("bytes=")[1].split("-") for asked in store.asked]
    assert sum(int(last) - int(first) for first, last in spans) < 15 * 4096  # backwards: only what is asked for


def test_a_server_without_ranges(tmp_path: Path, local: Shards) -> None:
    with serving(files(tmp_path, ranges=False)) as store:
        for options in (RANGED, CACHED):
            shards = Shards(f"{store.url}/s/part-{{000..002}}.tar", tmp_path / str(options.cache_gigabytes), options)
            assert everything(shards) == everything(local)


def test_nobody_prints_a_secret(store: Store, local: Shards, caplog: pytest.LogCaptureFixture) -> None:
    secret = f"{store.url.replace('//', '//me:hidden@')}/s/part-000.tar?X-Amz-Signature=hidden"
    shards = Shards(secret, options=StoreOptions(cache_gigabytes=0, timeout=0.3, patience=0.1))
    assert shards.read(0) == local.read(0)
    store.fault = lambda number: "503"
    with pytest.raises(DataError) as away:
        shards.read(1)
    store.fault = lambda number: "403"
    with pytest.raises(DataError) as refused:
        shards.read(1)
    with pytest.raises(DataError) as unreachable:
        Shards("http://me:hidden@127.0.0.1:9/x.tar?key=hidden", options=StoreOptions(patience=0.1))
    with pytest.raises(ConfigError) as piped:
        expand("pipe:curl -H hidden")
    with pytest.raises(ConfigError) as malformed:
        expand("https://me:hidden@[::1/x.tar?key=hidden")
    said = [str(error.value) for error in (away, refused, unreachable, piped, malformed)]
    assert not any("hidden" in text for text in [*said, *shards.paths, shards.shard(0), caplog.text])
    assert shown("s3://bucket/a.tar") == "s3://bucket/a.tar"


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("AWS_SECRET=hidden aws s3 cp x -", "aws ..."),
        ("A='not hidden' B=\"so hidden\"\tcurl x", "curl ..."),
        ("curl\t-H\thidden", "curl ..."),
        ("KEY=hidden", " ..."),
        ("KEY='hidden", " ..."),
        ("zcat a.gz", "zcat ..."),
        ("", " ..."),
    ],
)
def test_a_command_is_told_without_its_arguments(command: str, says: str) -> None:
    assert shown(f"pipe:{command}") == f"pipe:{says}"


def test_many_readers_fetch_a_shard_once(store: Store, local: Shards) -> None:
    shards = Shards(f"{store.url}/s/part-{{000..002}}.tar", options=CACHED)
    expected = everything(local)
    cache = Path(os.environ["VLSCALE_CACHE"]) / "shards"
    for file in cache.glob("*.tar"):
        file.unlink()
    store.asked.clear()
    found: list[bool] = []
    threads = [threading.Thread(target=lambda: found.append(everything(shards) == expected)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 6
    assert len(store.asked) == 3
    assert len(list(cache.glob("*.part"))) == 0


def test_the_cache_is_bounded_and_the_longest_unused_goes(
    store: Store, local: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "FULL", 0.0)
    size = os.path.getsize(local.paths[0])
    options = StoreOptions(cache_gigabytes=2.5 * size / 1e9, windowed=True, cache=str(tmp_path / "small"))
    shards = Shards(f"{store.url}/s/part-{{000..002}}.tar", options=options)

    def rest(seconds: float) -> None:
        for number, file in enumerate(
            sorted((tmp_path / "small").glob("*.tar"), key=lambda file: file.stat().st_mtime)
        ):
            os.utime(file, (time.time() - seconds + number,) * 2)

    for _ in range(2):
        assert everything(shards) == everything(local)  # what finds no room is read by ranges
        kept = {file.name for file in (tmp_path / "small").glob("*.tar")}
        assert len(kept) == 2
        rest(1000)
    for i in (0, 4, 8):
        rest(1000)
        assert shards.read(i) == local.read(i)
        assert sum(file.stat().st_size for file in (tmp_path / "small").iterdir()) <= 2.5 * size


def test_a_shard_is_fetched_before_it_is_read(store: Store, local: Shards, tmp_path: Path) -> None:
    shards = Shards(f"{store.url}/s/part-{{000..002}}.tar", options=CACHED)
    for file in (tmp_path / "cache" / "shards").glob("*.tar"):
        file.unlink()
    shards.prefetch(5)
    end = time.monotonic() + 10
    while time.monotonic() < end and not list((tmp_path / "cache" / "shards").glob("*.tar")):
        time.sleep(0.01)
    store.fault = lambda number: "404"
    assert shards.read(6) == local.read(6)
    shards.prefetch(0)  # in vain, which nobody hears of before sample 0 is read
    with pytest.raises(DataError, match=r"part-000.tar is not there"):
        shards.read(0)


def test_a_cached_shard_that_was_damaged_is_fetched_again(store: Store, local: Shards, tmp_path: Path) -> None:
    shards = Shards(f"{store.url}/s/part-000.tar", options=CACHED)
    for file in (tmp_path / "cache" / "shards").glob("*.tar"):
        os.truncate(file, 100)
    assert shards.read(3) == local.read(3)


def test_a_cache_that_cannot_be_written_is_named(store: Store, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(DataError, match=r"the cache .*file/x cannot be written .* data.cache_gigabytes=0"):
        Shards(f"{store.url}/s/part-000.tar", options=StoreOptions(cache=str(tmp_path / "file" / "x")))


def test_other_stores_by_fsspec(local: Shards) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in local.paths:
        memory.pipe_file(f"/bucket/{os.path.basename(path)}", Path(path).read_bytes())
    for options in (RANGED, CACHED):
        assert everything(Shards("memory://bucket/part-*.tar", options=options)) == everything(local)
    with pytest.raises(DataError, match=r"memory://bucket/none.tar is not there"):
        Shards("memory://bucket/none.tar")
    with pytest.raises(DataError, match=r"no shard matches 'memory://bucket/none-\*'"):
        expand("memory://bucket/none-*")


def test_a_full_disk_is_read_past(store: Store, local: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = SimpleNamespace(free=os.path.getsize(local.paths[0]) * 1.5)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: full)
    monkeypatch.setattr("vlscale.data.shards.THREADS", 1)  # two that begin together may both find no room
    shards = Shards(f"{store.url}/s/part-{{000..002}}.tar", options=CACHED)
    full.free = 0
    for file in list((tmp_path / "cache" / "shards").glob("*.tar"))[1:]:
        file.unlink()
    assert everything(shards) == everything(local)
    assert len(list((tmp_path / "cache" / "shards").glob("*.tar"))) == 1


def test_parts_that_others_write_take_their_room(
    store: Store, local: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = os.path.getsize(local.paths[0])
    folder = tmp_path / "cache" / "shards"
    folder.mkdir(parents=True)
    with open(folder / f"other-{10 * size}.part", "wb") as part:
        fcntl.flock(part, fcntl.LOCK_EX)
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=5 * size))
        shards = Shards(f"{store.url}/s/part-000.tar", options=CACHED)
        assert shards.read(0) == local.read(0)
        assert not list(folder.glob("*.tar"))


def test_a_disk_that_fills_meanwhile_is_read_past(
    store: Store, local: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(descriptor: int, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(access, "_write", write)
    shards = Shards(f"{store.url}/s/part-{{000..002}}.tar", options=CACHED)
    assert everything(shards) == everything(local)
    assert [file.suffix for file in (tmp_path / "cache" / "shards").iterdir()] == [".lock"]


def test_what_other_users_left_in_a_cache_is_passed_over(
    store: Store, local: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cache" / "shards"
    Shards(f"{store.url}/s/part-000.tar", options=CACHED)
    assert (folder / "room.lock").stat().st_mode & 0o777 == 0o666
    whole = next(folder.glob("*.tar"))
    assert whole.stat().st_mode & 0o777 == 0o644
    part = whole.rename(whole.with_suffix(".part"))
    os.truncate(part, 100)
    opened, removed = os.open, Path.unlink

    def refuse(path: str | Path, flags: int, *mode: int) -> int:
        if Path(path) == part and flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(path, flags, *mode)

    def keep(path: Path, missing_ok: bool = False) -> None:
        if path == part:
            raise PermissionError(errno.EPERM, "Operation not permitted")
        removed(path, missing_ok)

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(Path, "unlink", keep)
    assert Shards(f"{store.url}/s/part-000.tar", options=CACHED).read(0) == local.read(0)
    assert part.stat().st_size == 100
    assert whole.exists()
    os.utime(part, (1000, 1000))
    os.utime(whole, (2000, 2000))
    small = StoreOptions(cache_gigabytes=2 * part.with_suffix(".tar").stat().st_size / 1e9, windowed=True, timeout=0.3)
    assert Shards(f"{store.url}/s/part-001.tar", options=small).read(0) == local.read(PER_SHARD)
    assert part.exists()
    assert not whole.exists()


def test_a_cache_on_a_file_system_without_locks(
    store: Store, local: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", no_flock)
    (tmp_path / "s" / "packed.tgz").write_bytes(gzip.compress(Path(local.paths[0]).read_bytes()))
    found: list[bool] = []

    def read() -> None:
        shards = Shards([f"{store.url}/s/part-{{000..002}}.tar", f"{store.url}/s/packed.tgz"], options=CACHED)
        found.append(everything(shards) == [*everything(local), *everything(local)[:PER_SHARD]])

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 3
    assert {file.suffix for file in (tmp_path / "cache" / "shards").iterdir()} == {".tar", ".lock"}


def no_flock(*_: object) -> None:
    raise OSError(errno.ENOSYS, "Function not implemented")


@pytest.mark.parametrize(
    ("name", "pattern"),
    [("http://[::1]:80/a.tar", False), ("http://h/a.tar?x=*", False), ("s3://b/a-?.tar", True), ("http://h/*", True)],
)
def test_what_is_a_pattern(name: str, pattern: bool) -> None:
    assert is_pattern(name) == pattern


def test_a_store_of_no_kind_we_know() -> None:
    with pytest.raises(ConfigError, match=r"'http://\[::1/a.tar' is no URL"):
        Shards("http://[::1/a.tar")
    with pytest.raises(ConfigError, match=r"htp://.* begins with no kind of store we know"):
        Shards("htp://host/a.tar")


def test_pipes_need_leave(local: Shards, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'pipe:cat ...' runs a command; write data.pipe=true"):
        Shards(f"pipe:cat {local.paths[0]}")
    allowed = StoreOptions(pipe=True, patience=0.3)
    shards = Shards([f"pipe:cat {tmp_path}/s/part-{{000..001}}.tar", f"pipe:gzip -c {local.paths[2]}"], options=allowed)
    assert everything(shards) == everything(local)
    with pytest.raises(DataError, match=r"'pipe:cat ...' ended with code 1"):
        Shards("pipe:cat /nowhere 2>/dev/null", options=allowed)
    with pytest.raises(DataError, match=r"'pipe:sleep ...' printed nothing for 0.3 s"):
        Shards("pipe:sleep 20", options=allowed)


@pytest.mark.parametrize("remote", [False, True], ids=["on disk", "in a store"])
def test_gzipped_shards(store: Store, local: Shards, tmp_path: Path, remote: bool) -> None:
    packed = tmp_path / "a.tar.gz"
    packed.write_bytes(gzip.compress(Path(local.paths[0]).read_bytes()))
    url = f"{store.url}/a.tar.gz" if remote else str(packed)
    shards = Shards(url, options=CACHED)
    assert everything(shards) == everything(local)[:PER_SHARD]
    for file in (tmp_path / "cache" / "shards").glob("*.tar"):
        file.unlink()
    assert everything(shards) == everything(local)[:PER_SHARD]
    with pytest.raises(DataError, match=r"a.tar.gz is compressed .* data.cache_gigabytes=0 turns off"):
        Shards(url, tmp_path / "other", RANGED).read(0)
    with pytest.raises(DataError, match=r"a.tar.gz does not fit, unpacked, into the cache of 1e-06 GB"):
        Shards(url, tmp_path / "third", StoreOptions(cache_gigabytes=1e-6, cache=str(tmp_path / "small")))


def test_a_gzip_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "MOST_UNPACKED", (2**20, 200))
    (tmp_path / "bomb.tgz").write_bytes(gzip.compress(bytes(9 * 2**20)))
    with pytest.raises(DataError, match=r"bomb.tgz unpacks to more than 0.00"):
        Shards(tmp_path / "bomb.tgz")
    assert not list((tmp_path / "cache" / "shards").glob("*.tar"))
