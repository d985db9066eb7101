"""Members of a sample that accident or malice could make; each takes draws, and whether it may be slow."""

from __future__ import annotations

import io
import json
import random
import struct
import warnings
import zipfile
import zlib
from collections.abc import Sequence
from functools import lru_cache
from typing import TypeVar

import cv2
import numpy as np

from tests.shard_files import Members, png
from tests.test_regions import header, npz, zipped

SOUND = 4  # sound samples of each shard
FEATS = 3  # numbers of a region's feature
T = TypeVar("T")


class Draws(random.Random):
    """The draws of one shard; `pick` goes through its options by turns, so that many shards have each of them."""

    def __init__(self, seed: int, turn: int) -> None:
        super().__init__(seed)
        self.turn = turn

    def pick(self, options: Sequence[T]) -> T:
        return options[self.turn % len(options)]


def sound(number: int) -> Members:
    """The members of a sound sample."""
    boxes = np.array([[0, 0, 4, 4], [1, 1, 8, 8]], dtype=np.float32)
    size = {"width": 9, "height": 9}
    record = {"caption": f"a red thing number {number}", "tags": ["green"], **size}
    return [
        (f"s{number}.png" if number % 2 else f"s{number}.jpg", png(number, 16) if number % 2 else jpeg(number)),
        (f"s{number}.json", json.dumps(record).encode()),
        (f"s{number}.regions.npz", npz(features=np.full((2, FEATS), number + 1.0, np.float32), boxes=boxes, **size)),
    ]


@lru_cache
def jpeg(number: int, *options: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    return bytes(cv2.imencode(".jpg", pixels, options)[1].tobytes())


@lru_cache
def webp(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    return bytes(cv2.imencode(".webp", pixels, [cv2.IMWRITE_WEBP_QUALITY, 80])[1].tobytes())


def odd_samples(rng: Draws, slow: bool) -> Members:
    """Members that are missing, empty, doubled, scattered or under another name."""
    picture, text, regions = sound(9)
    return rng.pick(
        [
            [picture],
            [text],
            [regions],
            [("s9.cls", b"5")],
            [(picture[0], b""), text, regions],
            [picture, (text[0], b""), regions],
            [picture, text, (regions[0], b"")],
            [(f"s9{end}", b"") for end in (".png", ".json", ".regions.npz")],
            [picture, text, regions, picture],
            [picture, *sound(8), text],
            [("s9.jpg", text[1]), ("s9.json", picture[1]), ("s9.regions.npz", text[1])],
            [("s9.jpg", png(9)), text, regions],  # the wrong extension does no harm
            [("s9.png", b"GIF89a" + bytes(100)), text, regions],
            [("s9.png", b"BM" + bytes(100)), text, regions],
            [("s9.png", b"II*\0" + rng.randbytes(100)), text, regions],
            [("s9.png", b"<svg xmlns='http://www.w3.org/2000/svg'/>"), text, regions],
            [("s9.png", b"#?RADIANCE\n" + bytes(100)), text, regions],
        ]
    )


# --- pictures ----------------------------------------------------------------------------------------------


@lru_cache
def squeezed(count: int) -> bytes:
    """So many zeros."""
    return zlib.compress(bytes(count), 9)


def chunk(kind: bytes, data: bytes, length: int | None = None) -> bytes:
    told = struct.pack(">I", len(data) if length is None else length)
    return told + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(width: int, height: int, depth: int = 8, colour: int = 2, lines: bytes = b"", *more: bytes) -> bytes:
    told = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", told) + b"".join(more) + chunk(b"IDAT", lines) + chunk(b"IEND", b"")


def pictures(rng: Draws, slow: bool) -> Members:
    sides = (0, 1, 65_535, 100_000, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)
    bomb = squeezed((1 << 27) if slow and rng.turn < 18 else (1 << 22))
    of_jpeg, place = jpeg(9), jpeg(9).index(b"\xff\xc0") + 5
    scans = jpeg(9, cv2.IMWRITE_JPEG_PROGRESSIVE, 1)
    scan = scans.rindex(b"\xff\xda")
    of_webp = webp(9)
    side = struct.pack(">HH", rng.choice(sides[:3]), rng.choice(sides[:3]))
    name, data = rng.pick(
        [
            ("png", png_of(rng.choice(sides), rng.choice(sides), lines=bomb)),
            ("png", png_of(12_000, 12_000, 16, 6, bomb)),
            ("png", png_of(4_000, 4_000, 8, 0, bomb)),
            ("png", png_of(8, 8, 8, 2, bomb)),
            ("png", png_of(8, 8, 8, 3, b"")),
            ("png", png_of(8, 8, 8, 2, b"", chunk(b"zTXt", b"k\0\0" + bomb))),
            ("png", png_of(8, 8, 8, 2, b"", chunk(b"iCCP", b"k\0\0" + bomb))),
            ("png", png_of(8, 8, 8, 2, b"", chunk(b"tEXt", b"x", 1 << 31))),
            ("png", png_of(8, 8, 8, 2, b"", chunk(b"tRNS", bytes(300)), chunk(b"PLTE", bytes(900)))),
            ("jpg", of_jpeg[:place] + side + of_jpeg[place + 4 :]),
            ("jpg", of_jpeg[: place + 20]),
            ("jpg", b"\xff\xd8" + b"\xff\xfe\xff\xff" + bytes(65_533) + of_jpeg[2:]),
            ("jpg", b"\xff\xd8\xff"),
            ("jpg", scans[:-2] + scans[scan:-2] * ((20_000) if slow else 300) + b"\xff\xd9"),
            ("webp", of_webp[:20]),
            ("webp", of_webp[:26] + b"\xff\x3f\xff\x3f" + of_webp[30:]),
            ("webp", b"RIFF\xff\xff\xff\xffWEBPVP8X" + struct.pack("<I", 10) + b"\x02" + bytes(3) + b"\xff" * 6),
            ("webp", of_webp[:4] + b"\xff\xff\xff\xff" + of_webp[8:]),
        ]
    )
    return [(f"s9.{name}", data), *sound(9)[1:]]


# --- texts and regions -------------------------------------------------------------------------------------


@lru_cache
def odd_texts(long: int) -> tuple[tuple[str, bytes], ...]:
    """(field, bytes) of odd ones; some have about `long` bytes."""
    deep = 100_000
    return (
        ("json", b"[" * deep),
        ("json", b'{"a":' * deep + b"1" + b"}" * deep),
        ("json", b'{"caption": "a", "tags": ' + b"[" * 900 + b"]" * 900 + b"}"),
        ("json", b'{"caption": ' + b"[" * 900 + b"]" * 900 + b"}"),
        ("json", b'{"caption": "a", "qa": ' + b"[" * 900 + b"]" * 900 + b"}"),
        ("json", b'{"caption": "' + b"a" * long + b'"}'),
        ("json", b'{"caption": "' + b"ab " * 60_000 + b'"}'),
        ("json", b'{"caption": [' + b'"a",' * 200_000 + b'"a"]}'),
        ("json", b'{"caption": "a", "tags": [' + b'"a",' * 200_000 + b'"a"]}'),
        ("json", b'{"caption": "\xff\xfe"}'),
        ("json", '{"caption": "a thing"}'.encode("utf-16")),
        ("json", b'\xef\xbb\xbf{"caption": "a thing"}'),
        ("json", rb'{"caption": "a \ud800 thing"}'),
        ("json", rb'{"caption": "a thing", "tags": ["\udfff"]}'),
        ("json", rb'{"caption": "\u0000"}'),
        ("json", b'{"caption": "a", "width": NaN, "height": Infinity}'),
        ("json", b'{"caption": "a", "width": 1e999, "height": -1}'),
        ("json", b'{"caption": "a", "width": ' + b"9" * 400 + b', "height": true}'),
        ("json", b'{"caption": "a", "width": ' + b"9" * 9_000 + b"}"),
        ("json", b'{"caption": {"a": "b"}}'),
        ("json", b'{"caption": null}'),
        ("json", b'{"caption": []}'),
        ("json", b'{"caption": "a", "tags": {"b": 1}, "objects": "x"}'),
        ("json", b'{"caption": "a", "objects": [{"name": ["b"]}, 5, null]}'),
        ("json", b'{"caption": "a", "qa": [{"q": 1, "a": null}], "question": []}'),
        ("json", b'"a thing"'),
        ("json", b"null"),
        ("txt", b"\xff\xfe\x00"),
        ("txt", b"a " * (long // 2)),
        ("txt", bytes(1000)),
        ("txt", b" \n\t "),
        ("txt", b"?!..."),
        ("txt", "\u202e\ufeff\u200b".encode()),
    )


def texts(rng: Draws, slow: bool) -> Members:
    field, data = rng.pick(odd_texts(100_000_000 if slow and rng.turn < 33 else 5_000_000))
    picture, _, regions = sound(9)
    return [picture, (f"s9.{field}", data), regions]


@lru_cache
def odd_regions(large: int) -> tuple[bytes, ...]:
    """Some of them inflate to `large` bytes."""
    box = np.array([[0.0, 0.0, 4.0, 4.0]], dtype=np.float32)
    row = np.ones((1, FEATS), dtype=np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # two members of one name
        doubled = io.BytesIO()
        with zipfile.ZipFile(doubled, "w") as file:
            for _ in range(2):
                file.writestr("features.npy", header("(1, 3)", content=bytes(12)))
    whole = npz(features=row, boxes=box)
    encrypted = bytearray(whole)
    encrypted[encrypted.index(b"PK\1\2") + 8] |= 1
    return (
        npz(features=np.array([[{"a": 1}]]), boxes=box),
        npz(features=row, boxes=box, info=np.array([{"a": 1}])),  # never looked at
        npz(features=row, boxes=box, classes=np.array([None])),
        npz(features=np.full((1, FEATS), np.nan), boxes=box),
        npz(features=row, boxes=np.full((1, 4), np.inf)),
        npz(features=row, boxes=-100 * box),
        npz(features=row.astype(np.complex64), boxes=box),
        npz(features=row.astype("U3"), boxes=box),
        npz(features=row, boxes=box, width=-5, height=9),
        npz(features=row, boxes=box, width=np.nan, height=9),
        npz(features=row, boxes=box, width=np.ones(4), height=9),
        npz(features=np.ones((0, FEATS)), boxes=np.ones((0, 4))),
        npz(features=np.ones((3, 0)), boxes=np.ones((3, 4))),
        npz(features=np.ones((1, FEATS + 1)), boxes=box),
        npz(features=np.zeros((), dtype=[("a", "f4"), ("b", "i8")]), boxes=box),
        npz(**{f"x{n}": row for n in range(200)}),
        npz(**{"../../outside": row, "/outside": row, "features": row, "boxes": box}),
        zipped(header("(1, 3)", content=bytes(large))),
        zipped(header("(1, 3)", content=bytes(12)), declared=1 << 31),
        zipped(header("(1, 3)", content=bytes(large)), declared=150),
        zipped(header(f"({1 << 62}, 3)", content=bytes(12))),
        zipped(header("(-1, 3)", content=bytes(12))),
        zipped(header("(" * 900)),
        zipped(header("(1, 3)", "|O", b"cos\nsystem\n(S'id'\ntR.")),
        zipped(header("(1, 3)", "|V0")),
        zipped(header("(1, 3)", content=bytes(12)), method=zipfile.ZIP_LZMA),
        zipped(b"cos\nsystem\n(S'id'\ntR.", "features"),
        doubled.getvalue(),
        bytes(encrypted),
        whole[:60],
        whole[-60:],
        b"PK\x03\x04" + bytes(range(256)),
        b"cos\nsystem\n(S'id'\ntR.",
    )


def regions(rng: Draws, slow: bool) -> Members:
    data = rng.pick(odd_regions((1 << 29) if slow and rng.turn < 33 else (1 << 23)))
    return [*sound(9)[:2], ("s9.regions.npz", data)]
