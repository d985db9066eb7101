from __future__ import annotations

import io
import tarfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from webdataset import ShardWriter, TarWriter

from tests.shard_files import shared
from tests.test_shards import same_as_webdataset
from vlscale.data.shards import Shards
from vlscale.errors import DataError

LONG = "a/" * 100 + "x" * 120


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLSCALE_CACHE", str(tmp_path / "cache"))


def pack(path: Path, *members: tarfile.TarInfo | str, form: int = tarfile.USTAR_FORMAT) -> Path:
    """A tar of members; a name stands for a file of ten bytes."""
    with tarfile.open(path, "w", format=form) as tar:
        for member in members:
            info = tarfile.TarInfo(member) if isinstance(member, str) else member
            if info.isreg():
                info.size = 10
            tar.addfile(info, io.BytesIO(info.name.encode().ljust(10)[-10:]) if info.isreg() else None)
    return path


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_of_all_kinds(tmp_path: Path, form: int) -> None:
    names = ["./one.jpg", "./one.json", "x/two.0.JPG", "x/two.1.jpg", "no_field", "y.z/none", "three.txt"]
    long = [f"{'b' * 90}/{'c' * 90}.txt"] if form == tarfile.USTAR_FORMAT else [f"{LONG}.jpg", f"{LONG}.txt", "é/ü.txt"]
    assert same_as_webdataset(pack(tmp_path / "a.tar", *names, *long, "end.txt", form=form)) > 4


def test_tars_of_webdatasets_own_writers(tmp_path: Path) -> None:
    def sample(n: int) -> dict[str, object]:
        picture = np.full((8, 8, 3), n, np.uint8)
        return {"__key__": f"f{n % 3}/{n:06d}", "txt": f"text {n}", "json": {"n": n}, "0.png": picture, "cls": n}

    with ShardWriter(str(tmp_path / "s-%03d.tar"), maxcount=4, verbose=0) as writer:
        for n in range(10):
            writer.write(sample(n))
    for form in ("USTAR_FORMAT", "GNU_FORMAT", "PAX_FORMAT"):
        for end in (".tar", ".tar.gz"):
            with TarWriter(str(tmp_path / f"{form}{end}"), format=form) as writer:
                for n in range(10):
                    writer.write(sample(n))
    found = {path.name: same_as_webdataset(path) for path in sorted(tmp_path.glob("*.tar*"))}
    assert sum(found.values()) == 10 + 6 * 10
    assert Shards(str(tmp_path / "s-*.tar")).key(4) == "f1/000004"


@pytest.mark.slow
def test_every_real_shard_as_webdataset_reads_it() -> None:
    paths = sorted(path for path in shared().rglob("*.tar"))
    assert sum(map(same_as_webdataset, paths)) > 15_000


def test_only_files_are_members(tmp_path: Path) -> None:
    links = []
    kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE)
    for number, kind in enumerate(kinds):
        info = tarfile.TarInfo(f"k{number}.txt")
        info.type, info.linkname = kind, "/etc/passwd"
        links.append(info)
    path = pack(tmp_path / "a.tar", "../../up.txt", *links, "/root.txt", form=tarfile.PAX_FORMAT)
    shards = Shards(path)
    assert [shards.key(i) for i in range(len(shards))] == ["../../up", "/root"]
    assert [file.name for file in (tmp_path / "cache").rglob("*") if file.is_file()] != []
    assert not (tmp_path.parent / "up.txt").exists()


def test_a_sparse_member_is_refused_by_name(tmp_path: Path) -> None:
    info = tarfile.TarInfo("hole.bin")
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
    with pytest.raises(DataError, match=r"'hole.bin' is sparse; pack it without --sparse"):
        Shards(pack(tmp_path / "a.tar", "one.txt", info, form=tarfile.PAX_FORMAT))
    old = tarfile.TarInfo("hole.bin")
    old.type = tarfile.GNUTYPE_SPARSE
    with pytest.raises(DataError, match=r"'hole.bin' is sparse"):
        Shards(pack(tmp_path / "b.tar", "one.txt", old))


def header(name: bytes = b"a.txt", size: bytes = b"00000000012\0", kind: bytes = b"0") -> bytes:
    """A header whose checksum is right, whatever else is not."""
    block = bytearray(512)
    block[: len(name)] = name
    block[124:136] = size
    block[156:157] = kind
    block[257:265] = b"ustar\x0000"
    block[148:156] = b" " * 8
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    return bytes(block)


def base_256(number: int) -> bytes:
    return bytes([0x80]) + number.to_bytes(11, "big")


def pax(records: bytes, kind: bytes = b"x") -> bytes:
    padded = records.ljust(-(-len(records) // 512) * 512, b"\0")
    return header(b"p", f"{len(records):011o}\0".encode(), kind) + padded


END = bytes(1024)
HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "2^60 bytes": (lambda: header(size=base_256(2**60)) + END, "'a.txt' ends behind the end of the file"),
    "2^87 bytes": (lambda: header(size=base_256(2**87)) + END, "ends behind the end"),
    "a negative size": (lambda: header(size=b"\xff" * 12) + END, "negative size"),
    "a size in letters": (lambda: header(size=b"12345z78901\0") + END, "not octal"),
    "a PAX header of 2^60 bytes": (lambda: header(size=base_256(2**60), kind=b"x") + END, "ends behind the end"),
    "a PAX header of 2 MiB": (lambda: pax(b"2097152 a=" + b"b" * 2097141 + b"\n") + END, "header of 2097152 bytes"),
    "a long name of 2^60 bytes": (lambda: header(size=base_256(2**60), kind=b"L") + END, "ends behind the end"),
    "a name of 5000 bytes": (lambda: pax(b"5012 path=" + b"n" * 5001 + b"\n") + header() + END, "name of 5001 bytes"),
    "a PAX size of 10^30": (lambda: pax(b"40 size=" + b"1" * 31 + b"\n") + header() + END, "no number"),
    "a PAX size beyond": (lambda: pax(b"18 size=999999999\n") + header() + END, "ends behind the end"),
    "a PAX record without end": (lambda: pax(b"99 path=x\n") + header() + END, "PAX header is damaged"),
    "a PAX record of length 0": (lambda: pax(b"0 path=x\n") + header() + END, "PAX header is damaged"),
    "PAX records that never advance": (lambda: pax(b"1 1 1 1 1 1 ") + header() + END, "PAX header is damaged"),
    "no end mark": (lambda: header(size=b"00000000000\0"), "it ends there"),
    "headers of nothing": (lambda: header(b"d", b"00000000000\0", b"5") * 5_000, "it ends there"),
}


@pytest.mark.parametrize("kind", list(HOSTILE))
def test_a_hostile_header_is_refused_soon_and_in_little_memory(tmp_path: Path, kind: str) -> None:
    make, says = HOSTILE[kind]
    (tmp_path / "bad.tar").write_bytes(make())
    begin = time.process_time()
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=rf"bad.tar.*{says}"):
            Shards(tmp_path / "bad.tar")
        assert tracemalloc.get_traced_memory()[1] < 8e6
    finally:
        tracemalloc.stop()
    assert time.process_time() - begin < 5


def test_a_large_member_by_its_pax_size(tmp_path: Path) -> None:
    data = pax(b"15 size=000600\n") + header(size=b"00000000000\0") + bytes([7] * 600).ljust(1024, b"\0") + END
    (tmp_path / "a.tar").write_bytes(data)
    assert Shards(tmp_path / "a.tar").read(0) == {"txt": bytes([7] * 600)}
