from __future__ import annotations

import bz2
import errno
import gc
import gzip
import os
import pickle
import tempfile
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest
import simplejpeg
from webdataset.tariterators import group_by_keys, tar_file_expander

from tests.shard_files import png, sample, shared, write_samples, write_tar
from vlscale.data import shards as shards_module
from vlscale.data.decode import decode, picture_size, resize
from vlscale.data.phrases import every_text
from vlscale.data.samples import BrokenSampleError, picture, sentences
from vlscale.data.shards import Shards, expand
from vlscale.data.storage import access
from vlscale.data.storage.indexing import index
from vlscale.data.text import AS_IT_IS
from vlscale.errors import DataError


def test_keys_fields_and_bytes(tmp_path: Path) -> None:
    members = [
        ("x/a.b/one.0.JPG", b"left"),
        ("x/a.b/one.1.jpg", b"right"),
        ("x/a.b/one.json", b"{}"),
        ("__meta__.json", b"skipped"),
        ("._two.txt", b"skipped"),
        ("two.txt", b""),
    ]
    write_tar(tmp_path / "a.tar", members)
    write_tar(tmp_path / "b.tar", [("three.txt", b"3")])
    shards = Shards(str(tmp_path / "?.tar"), tmp_path / "cache")
    assert [shards.key(i) for i in range(len(shards))] == ["x/a.b/one", "two", "three"]
    assert shards.fields(0) == ("0.jpg", "1.jpg", "json")
    assert shards.read(0) == {"0.jpg": b"left", "1.jpg": b"right", "json": b"{}"}
    assert shards.read(0, ("1.jpg", "txt")) == {"1.jpg": b"right"}
    assert shards.read(1) == {"txt": b""}
    assert shards.shard(2) == str(tmp_path / "b.tar")
    assert [shards.start(n) for n in range(3)] == [0, 2, 3]
    with pytest.raises(IndexError):
        shards.key(3)


def test_the_index_is_cached_and_a_stale_one_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(tmp_path / "a.tar", [("one.txt", b"1")])
    cache = tmp_path / "cache"
    Shards(path, cache)
    with monkeypatch.context() as patch:
        patch.setattr(shards_module, "_scan", lambda access, origin: pytest.fail("scanned again"))
        again = Shards(path, cache)
    assert again.read(0) == {"txt": b"1"}
    write_tar(path, [("one.txt", b"1"), ("two.txt", b"22")])
    assert Shards(path, cache).read(1) == {"txt": b"22"}


def test_copies_of_other_times_keep_indexes_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLSCALE_CACHE", str(tmp_path / "cache"))
    path = write_tar(tmp_path / "a.tar", [("one.txt", b"1")])
    for _ in range(2):  # two nodes that share a cache start by turns
        for second in (1000, 2000):
            os.utime(path, (second, second))
            Shards(path)
    inodes = {file.name: file.stat().st_ino for file in (tmp_path / "cache" / "index").iterdir()}
    assert len(inodes) == 2
    os.utime(path, (1000, 1000))
    with monkeypatch.context() as patch:
        patch.setattr(shards_module, "_scan", lambda access, origin: pytest.fail("scanned again"))
        Shards(path)
    os.utime(path, (3000, 3000))
    assert [each.was for each in index(path)] == ["stale"]
    assert [each.was for each in index(path)] == ["kept"]
    left = {file.name: file.stat().st_ino for file in (tmp_path / "cache" / "index").iterdir()}
    assert len(left) == 1
    assert not left.keys() & inodes.keys()


@pytest.mark.parametrize("damage", [b"", b"nonsense", b"PK\x03\x04 a torn zip"])
def test_a_damaged_index_is_made_again(tmp_path: Path, damage: bytes) -> None:
    path = write_tar(tmp_path / "a.tar", [("one.txt", b"1")])
    Shards(path, tmp_path / "cache")
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(damage or file.read_bytes()[:200])
    assert Shards(path, tmp_path / "cache").read(0) == {"txt": b"1"}


def test_where_the_cache_cannot_be_written_indexes_lie_in_a_folder_of_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    paths = [write_tar(tmp_path / f"{name}.tar", [(f"{name}.txt", name.encode())]) for name in "ab"]
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "own").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "own"))
    shards = Shards(paths, tmp_path / "file" / "cache")
    again = Shards(paths[0], tmp_path / "file" / "cache")
    assert [record.message.count("VLSCALE_CACHE") for record in caplog.records] == [1]
    with monkeypatch.context() as patch:  # other processes map what this one has written
        patch.setattr(shards_module, "_scan", lambda access, origin: pytest.fail("scanned again"))
        assert pickle.loads(pickle.dumps(shards)).read(1) == {"txt": b"b"}
    assert len(list((tmp_path / "own").glob("*/*.index"))) == 3
    del shards, again
    gc.collect()
    assert not list((tmp_path / "own").iterdir())


def test_a_cache_that_was_emptied_is_filled_again(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("one.txt", b"1")])
    kept = pickle.dumps(Shards(path, tmp_path / "cache"))
    for file in (tmp_path / "cache").iterdir():
        file.unlink()
    assert pickle.loads(kept).read(0) == {"txt": b"1"}


def test_braces_lists_and_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(3):
        write_tar(tmp_path / f"p-{n:03d}.tar", [(f"{n}.txt", b"1")])
    monkeypatch.setenv("HOME", str(tmp_path))
    names = [os.path.basename(path) for path in expand("~/p-{001..002}.tar")]
    assert names == ["p-001.tar", "p-002.tar"]
    assert len(expand([str(tmp_path / "p-000.tar"), tmp_path / "p-001.tar"])) == 2


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("train/part-*.ta", r"no shard matches '.*part-\*\.ta'; .*folder is .*train; did you mean 'part-00"),
        ("train/none-*", r"no shard matches .*folder is .*train, which holds part-000.tar, part-001.tar"),
        ("trian/part-*.tar", r"no shard matches .*; the nearest existing .*; did you mean 'train'\?"),
        ("train", r"is a folder; write '.*train/\*\.tar'"),
        ("train/part-{000..002}.tar", r"no shard matches '.*part-002.tar'; .*did you mean 'part-00"),
        (["train/part-000.tar", "train/part-*.tar"], "named twice"),
        ([], "no shards are named"),
    ],
)
def test_a_mistyped_path_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str | list[str], says: str
) -> None:
    write_samples(tmp_path / "train", 4, 2, {})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=says):
        expand(pattern)


def damaged_tars() -> dict[str, tuple[bytes, str]]:
    import io
    import tarfile

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for n in range(3):
            info = tarfile.TarInfo(f"s{n}.txt")
            info.size = 1000
            tar.addfile(info, io.BytesIO(bytes(1000)))
    whole = buffer.getvalue()
    return {
        "empty": (b"", "not a readable tar"),
        "text": (b"hello" * 1000, "not a readable tar"),
        "inside a member": (whole[:2600], "damaged at byte 1536 .member 's1.txt' ends behind.*copy or make it again"),
        "in the last member": (whole[:3700], "damaged at byte 3072 .member 's2.txt' ends behind the end"),
        "between members": (whole[: 2 * 1536], "cut short or damaged at byte 3072"),
        "inside a header": (whole[: 2 * 1536 + 100], "cut short or damaged at byte 3072"),
        "a damaged header": (whole[:3072] + b"x" * 512 + whole[3584:], "cut short or damaged at byte 3072"),
        "by bzip2": (bz2.compress(whole), "it is compressed: unpack it, or pack it with gzip"),
        "gzip cut short": (gzip.compress(whole)[:-20], "cannot be unpacked"),
        "gzip damaged": (gzip.compress(whole)[:40] + bytes(40) + gzip.compress(whole)[80:], "cannot be unpacked"),
        "a cut tar in gzip": (gzip.compress(whole[:2600]), "damaged at byte 1536"),
    }


@pytest.mark.parametrize("kind", list(damaged_tars()))
def test_a_damaged_tar_is_named(tmp_path: Path, kind: str) -> None:
    data, says = damaged_tars()[kind]
    (tmp_path / "bad.tar").write_bytes(data)
    with pytest.raises(DataError, match=rf"bad.tar.*({says})"):
        Shards(tmp_path / "bad.tar", tmp_path / "cache")


def test_scattered_and_doubled_members(tmp_path: Path) -> None:
    scattered = write_tar(tmp_path / "a.tar", [("a.txt", b""), ("b.txt", b""), ("a.json", b"")])
    doubled = write_tar(tmp_path / "b.tar", [("a.txt", b""), ("a.txt", b"")])
    with pytest.raises(DataError, match="members of sample 'a' are not next to one another"):
        Shards(scattered, tmp_path / "cache")
    with pytest.raises(DataError, match="sample 'a' has two fields 'txt'"):
        Shards(doubled, tmp_path / "cache")


def test_a_shard_that_shrinks_is_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("one.txt", bytes(5000))])
    shards = Shards(path, tmp_path / "cache")
    os.truncate(path, 2000)
    with pytest.raises(DataError, match=r"a.tar became shorter"):
        shards.read(0)


def test_a_shard_that_is_another_is_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("one.txt", bytes(5000))])
    for members, says in (([], "became shorter"), ([("two.txt", bytes(50_000))], "changed while it was in use")):
        write_tar(path, [("one.txt", bytes(5000))])
        shards = Shards(path, tmp_path / "cache")
        write_tar(path, members)
        os.truncate(path, os.path.getsize(path) if members else 1000)
        with pytest.raises(DataError, match=rf"a.tar {says}"):
            shards.read(0)


def test_a_shard_that_was_written_over_at_its_size_is_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("one.txt", bytes(5000))])
    shards = Shards(path, tmp_path / "cache")
    assert shards.read(0) == {"txt": bytes(5000)}
    write_tar(path, [("two.json", bytes(5000))])
    with pytest.raises(DataError, match=r"a.tar changed while it was in use"):
        shards.read(0)


@pytest.mark.parametrize("call", ["pread", "fstat"])
def test_a_file_system_that_fails_is_the_shards_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = write_tar(tmp_path / "a.tar", [("one.txt", b"1")])
    shards = Shards(path, tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(DataError, match=r"a.tar cannot be read \(Input/output error\)"):
            shards.read(0)
        with pytest.raises(DataError, match=r"a.tar cannot be read \(Input/output error\)"):
            Shards(path, tmp_path / "another")


def fail(*_: object) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_reading_from_threads_a_pickle_and_more_shards_than_open_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access, "MAX_OPEN_FILES", 2)
    monkeypatch.setattr(shards_module, "MAX_MAPPED", 2)
    shards = pickle.loads(pickle.dumps(Shards(write_samples(tmp_path / "s", 12, 2, {}), tmp_path / "cache")))
    expected = [shards.read(i) for i in range(12)]
    found: list[bool] = []

    def read() -> None:
        found.append([shards.read(i) for i in range(12)] == expected)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 4


def test_fingerprint_tells_content_but_not_place(tmp_path: Path) -> None:
    first = Shards(write_samples(tmp_path / "a", 6, 3, {}), tmp_path / "cache")
    moved = Shards(write_samples(tmp_path / "b", 6, 3, {}), tmp_path / "cache")
    other = Shards(write_samples(tmp_path / "c", 6, 3, {2: sample(2, "another")}), tmp_path / "cache")
    assert first.fingerprint() == moved.fingerprint() != other.fingerprint()


# --- samples and pictures ----------------------------------------------------------------------------------


def same_as_webdataset(path: Path) -> int:
    """Same keys, fields and bytes in the same order; how many samples."""
    shards = Shards(path)
    ours = [(shards.key(i), shards.read(i)) for i in range(len(shards))]
    theirs = []
    with open(path, "rb") as stream:
        for found in group_by_keys(tar_file_expander([{"url": str(path), "stream": stream}])):
            fields = {name: data for name, data in found.items() if not name.startswith("__")}
            theirs.append((found["__key__"], fields))
    assert [key for key, _ in ours] == [key for key, _ in theirs]
    assert [list(fields.items()) for _, fields in ours] == [list(fields.items()) for _, fields in theirs]
    return len(ours)


def one(folder: Path, *members: tuple[str, bytes]) -> Shards:
    folder.mkdir(exist_ok=True)
    return Shards(write_tar(folder / "one.tar", members), folder / "cache")


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ([("a.json", b'{"caption": "one"}')], ["one"]),
        ([("a.json", b'{"caption": ["one", "two"]}'), ("a.txt", b"three")], ["one", "two"]),
        ([("a.json", b'{"width": 3}'), ("a.txt", "naïve".encode())], ["naïve"]),
    ],
)
def test_captions(tmp_path: Path, members: list[tuple[str, bytes]], expected: list[str]) -> None:
    shards = one(tmp_path, *members)
    assert [each.text for each in sentences(shards, 0)] == list(every_text(shards, [0], AS_IT_IS)) == expected


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ([("a.json", b'{"caption": ""}')], "a caption in 'json' is empty"),
        ([("a.json", b'{"caption": ["x", " "]}')], "a caption in 'json' is empty"),
        ([("a.json", b'{"caption": []}')], "caption list in 'json' is empty"),
        ([("a.json", b'{"caption": [3]}')], "a caption in 'json' is a int; write a string"),
        ([("a.json", b"{")], "'json' is not valid JSON"),
        ([("a.txt", b"\xff")], "not UTF-8"),
        ([("a.txt", b"\n")], "a caption in 'txt' is empty"),
        ([("a.png", b"")], "has no caption: neither 'caption' in 'json' nor a 'txt'"),
    ],
)
def test_captions_that_cannot_be_used(tmp_path: Path, members: list[tuple[str, bytes]], says: str) -> None:
    shards = one(tmp_path, *members)
    with pytest.raises(BrokenSampleError, match=rf"sample 'a' of shard .*one.tar: .*{says}"):
        sentences(shards, 0)
    assert list(every_text(shards, [0], AS_IT_IS)) == []


def test_pictures_that_cannot_be_used(tmp_path: Path) -> None:
    reasons = ((b"", "is empty"), (b"GIF89a", "not a JPEG, PNG or WebP"), (png(1)[:200], "damaged or cut"))
    for data, says in reasons:
        with pytest.raises(BrokenSampleError, match=rf"'a' of .* in 'png' cannot be decoded: .*{says}"):
            picture(one(tmp_path, ("a.png", data)), 0)
    with pytest.raises(BrokenSampleError, match=r"has no picture .* but txt, seg.png"):
        picture(one(tmp_path, ("a.txt", b""), ("a.seg.png", png(1))), 0)
    error = BrokenSampleError("s.tar", "k", "why")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def jpeg(pixels: np.ndarray, subsampling: str = "444") -> bytes:
    return bytes(simplejpeg.encode_jpeg(pixels, quality=98, colorsubsampling=subsampling))


def smooth() -> np.ndarray:
    ramp = np.linspace(0, 255, 40, dtype=np.uint8)
    return np.ascontiguousarray(np.stack([*np.meshgrid(ramp, ramp[:30]), np.full((30, 40), 90, np.uint8)], -1))


def test_jpeg(tmp_path: Path) -> None:
    pixels = smooth()
    data = jpeg(pixels)
    assert picture_size(data) == (40, 30)
    assert np.abs(decode(data).astype(int) - pixels).max() < 8
    grey = bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(pixels[..., :1]), 98, "GRAY"))
    assert decode(grey).shape == (30, 40, 3)
    with pytest.raises(ValueError, match="remature end"):
        decode(data[:-200])
    with pytest.raises(ValueError, match=r"cut short|Could not"):
        decode(data[:60])
    assert np.array_equal(decode(data[:-2] + b"\0\0\0" + data[-2:]), decode(data))  # stray bytes do no harm


def test_cmyk_jpeg(tmp_path: Path) -> None:
    cmyk = np.zeros((16, 16, 4), np.uint8) + 255  # Adobe's inverted CMYK: no ink, white
    data = bytes(simplejpeg.encode_jpeg(cmyk, 98, "CMYK"))
    assert decode(data).shape == (16, 16, 3)


def test_png_and_webp_kinds() -> None:
    pixels = smooth()
    bgr = pixels[..., ::-1].copy()

    def encoded(array: np.ndarray, kind: str = ".png") -> bytes:
        options = [cv2.IMWRITE_WEBP_QUALITY, 101] if kind == ".webp" else []
        return bytes(cv2.imencode(kind, array, options)[1].tobytes())

    assert np.array_equal(decode(encoded(bgr)), pixels)
    assert np.array_equal(decode(encoded(bgr, ".webp")), pixels)
    assert picture_size(encoded(bgr, ".webp")) == picture_size(encoded(bgr)) == (40, 30)
    assert np.array_equal(decode(encoded(bgr[..., 0])), np.repeat(pixels[..., 2:], 3, axis=2))
    assert np.array_equal(decode(encoded(bgr.astype(np.uint16) * 257)), pixels)
    alpha = np.dstack([bgr, np.full((30, 40), 255, np.uint8)])
    alpha[0, 0, 3], alpha[0, 1, 3] = 0, 51
    shown = decode(encoded(alpha))
    assert shown[0, 0].tolist() == [255, 255, 255]
    assert np.array_equal(shown[0, 1], np.rint(pixels[0, 1] * 0.2 + 255 * 0.8))
    assert np.array_equal(shown[1:], pixels[1:])


def test_an_oversized_picture_is_refused_by_its_header() -> None:
    huge = png(1)[:16] + (100_000).to_bytes(4, "big") * 2 + png(1)[24:]
    with pytest.raises(ValueError, match="100000 x 100000 pixels"):
        decode(huge)


def test_resize() -> None:
    pixels = smooth()
    assert resize(pixels, 40, 30) is pixels
    assert np.array_equal(resize(pixels, 36, 27), cv2.resize(pixels, (36, 27), interpolation=cv2.INTER_CUBIC))
    assert np.array_equal(resize(pixels, 60, 60), cv2.resize(pixels, (60, 60), interpolation=cv2.INTER_CUBIC))


@pytest.mark.parametrize(("name", "count"), [("openstax_figures", 250), ("noto_emoji", 106)])
def test_real_shards(tmp_path: Path, name: str, count: int) -> None:
    shards = Shards(str(shared() / "open" / name / f"{name}-val-*.tar"), tmp_path)
    assert len(shards) == count
    for i in range(0, count, 10):
        assert picture(shards, i).ndim == 3
        assert all(sentences(shards, i))


@pytest.mark.parametrize("name", ["mpdata.tar", "compressed.tar", "testgz.tar", "tendata.tar", "sample.tgz"])
def test_foreign_tars_as_webdataset_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("VLSCALE_CACHE", str(tmp_path))
    same_as_webdataset(shared() / "open" / "foreign_tars" / name)
