"""Shards that accident or malice could make, each a pure function of its number; sound samples lie beside the bad."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Callable
from functools import lru_cache

import cv2

from tests.hostile_members import SOUND, Draws, jpeg, odd_samples, pictures, regions, sound, texts, webp
from tests.shard_files import Members, png
from vlscale.data.storage.index import MAX_FIELDS

Make = Callable[[Draws, bool], bytes]  # (draws, whether it may be slow) -> the bytes of a shard


def with_sound(members: Members, rng: Draws) -> bytes:
    """A tar of `SOUND` sound samples with these members somewhere between."""
    place = rng.randrange(SOUND + 1)
    rows = [sound(number) for number in range(SOUND)]
    rows.insert(place, members)
    return packed([member for row in rows for member in row])


def packed(members: Members) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def head(name: bytes, size: bytes | int, kind: bytes = b"0", link: bytes = b"", magic: bytes = b"ustar\x0000") -> bytes:
    """A tar header with a checksum that is right, whatever it says."""
    told = size if isinstance(size, bytes) else b"%011o\0" % size
    fields = [name.ljust(100, b"\0")[:100], b"0000644\0" * 3, told[:12], b"%011o\0" % 0, b" " * 8, kind]
    block = b"".join([*fields, link.ljust(100, b"\0")[:100], magic]).ljust(512, b"\0")
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def pax(records: bytes, kind: bytes = b"x") -> bytes:
    return head(b"PaxHeader", len(records), kind) + records.ljust(-(-len(records) // 512) * 512, b"\0")


def record(key: bytes, value: bytes) -> bytes:
    length = len(key) + len(value) + 3
    length += len(str(length + len(str(length))))
    return b"%d %s=%s\n" % (length, key, value)


def spliced(blocks: bytes, rng: Draws) -> bytes:
    """A sound tar with these blocks between two of its samples."""
    first, second = (packed([m for n in numbers for m in sound(n)]) for numbers in ((0, 1), (2, 3)))
    place = len(first.rstrip(b"\0")) // 512 * 512 + 512
    return first[:place] + blocks + second if rng.random() < 0.8 else blocks + first


# --- damage of any kind ------------------------------------------------------------------------------------


def damaged(data: bytes, rng: Draws) -> bytes:
    """Cut, flipped, blanked, doubled or with other bytes put in."""
    if not data:
        return b"\0"
    way, place = rng.randrange(6), rng.randrange(len(data))
    if way == 0:
        return data[:place]
    if way == 1:
        flipped = bytearray(data)
        for _ in range(rng.choice((1, 3, 30))):
            flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(flipped)
    if way == 2:
        return data[:place] + bytes(min(rng.choice((1, 40, 600)), len(data) - place)) + data[place + 600 :]
    if way == 3:
        return data[:place] + data[place // 2 :]
    if way == 4:
        return data[:place] + rng.randbytes(rng.choice((1, 4, 700))) + data[place:]
    value = rng.choice((0, 1, 0x7F, 0x80, 0xFF)).to_bytes(1, "big") * rng.choice((1, 2, 4, 8))
    return data[:place] + value + data[place + len(value) :]


def cut(rng: Draws, slow: bool) -> bytes:
    whole = with_sound([], rng)
    return whole[: rng.randrange(len(whole))]


def flipped_headers(rng: Draws, slow: bool) -> bytes:
    data = bytearray(with_sound([], rng))
    heads = [place for place in range(0, len(data), 512) if data[place + 257 : place + 262] == b"ustar"]
    for _ in range(rng.choice((1, 2, 9))):
        data[rng.choice(heads) + rng.randrange(512)] ^= 1 << rng.randrange(8)
    return bytes(data)


def damaged_anywhere(rng: Draws, slow: bool) -> bytes:
    return damaged(with_sound([], rng), rng)


def damaged_member(rng: Draws, slow: bool) -> bytes:
    members = sound(9)
    extra = [("s9.webp", webp(9)), ("s9.png", png(9)), ("s9.jpg", jpeg(9, cv2.IMWRITE_JPEG_PROGRESSIVE, 1))]
    members[0] = rng.choice([members[0], *extra])
    which = rng.randrange(3)
    members[which] = (members[which][0], damaged(members[which][1], rng))
    return with_sound(members, rng)


def no_tar(rng: Draws, slow: bool) -> bytes:
    whole = with_sound([], rng)
    return rng.pick([b"", rng.randbytes(5_000), b"\0" * 512, b"\0" * 10_240, b"<html>404</html>", whole[:-1024]])


@lru_cache
def bomb_of(count: int) -> bytes:
    return gzip.compress(head(b"s9.png", 1 << 30) + bytes(count), 9)


def compressed(rng: Draws, slow: bool) -> bytes:
    whole = with_sound([], rng)
    small = gzip.compress(whole)
    bomb = bomb_of((1 << 28) if slow and rng.turn < 6 else (1 << 23))
    once_more = gzip.compress(small)
    return rng.pick([small, small[: len(small) // 2], damaged(small, rng), bomb, once_more, b"BZh9" + small])


# --- headers -----------------------------------------------------------------------------------------------


def sizes(rng: Draws, slow: bool) -> bytes:
    number = rng.pick(
        [
            b"77777777777\0",  # 8 GiB - 1
            b"-0000000001\0",
            b"0000000008x\0",
            b" \0" * 6,
            b"\x80" + bytes(3) + b"\x7f" + bytes(7),  # base 256, 2^62
            b"\x80" + b"\xff" * 11,
            b"\xff" * 12,  # base 256, -1
            b"\xff" * 11 + b"\0",
        ]
    )
    return spliced(head(b"s9.png", number) + bytes(512), rng)


def extended(rng: Draws, slow: bool) -> bytes:
    long = rng.choice([1 << 13, 1 << 21, (1 << 24) if slow and rng.turn < 22 else (1 << 21)])
    plain = head(b"s9.png", 4) + b"data".ljust(512, b"\0")
    return spliced(
        rng.pick(
            [
                pax(record(b"size", b"99999999999999")) + plain,
                pax(record(b"size", b"-1")) + plain,
                pax(record(b"size", b"1" * 5_000)) + plain,
                pax(record(b"path", b"../../outside.png")) + plain,
                pax(record(b"path", b"a\0b.png")) + plain,
                pax(record(b"path", b"\xff\xfe.png")) + plain,
                pax(record(b"path", b"x" * long + b".png")) + plain,
                pax(record(b"GNU.sparse.size", b"9" * 18) + record(b"GNU.sparse.major", b"1")) + plain,
                pax(b"99999999999 path=x\n") + plain,
                pax(b"0 path=x\n") + plain,
                pax(b"-5 path=x\n") + plain,
                pax(record(b"comment", b"x") * 5_000, b"g") + plain,
                pax(b""),
                head(b"PaxHeader", 1 << 33, b"x") + plain,
                head(b"PaxHeader", 1 << 33, b"g") + plain,
                head(b"././@LongLink", long, b"L") + b"y" * long + plain,
                head(b"././@LongLink", 1 << 33, b"L") + plain,
                head(b"././@LongLink", 3, b"L") + b"z.p".ljust(512, b"\0"),
                head(b"s9.png", 512, b"S", magic=b"ustar  \0") + bytes(512),
                plain * 2,  # twice the same member
                head(b"s9.png", 0) * 3,
                head(b"s0.txt", 1) + b"a".ljust(512, b"\0"),  # of a sample that is over
            ]
        ),
        rng,
    )


NAMES = (
    *(
        b"../../outside.png",
        b"/outside.png",
        b"/etc/passwd",
        b"a/../../outside.json",
        b"..",
        b".",
        b"",
        b"/",
        b"...png",
    ),
    *(
        b"..\\outside.png",
        b"C:\\outside.png",
        b"~/outside.png",
        b"$HOME.png",
        b"`id`.png",
        b"s9\n.png",
        b"s9\x1b[2J.png",
    ),
    *(b"\xff\xfe\x80.png", b"\xed\xa0\x80.png", b"s9." + b"\xc3" * 40, b"s9.PNG.", b"s9..png", b" .png", b"__x__.png"),
    *("\u202etxt.png".encode(), b"s9." + b"x." * 40, b"s9.p\0ng", b"dev/null.png", b"proc/self/mem.json"),
)


def names(rng: Draws, slow: bool) -> bytes:
    body = b"data".ljust(512, b"\0")
    return spliced(b"".join(head(name, 4) + body for name in rng.sample(NAMES, rng.randrange(1, 5))), rng)


def links(rng: Draws, slow: bool) -> bytes:
    kinds = (b"1", b"2", b"3", b"4", b"5", b"6", b"7", b"A", b"V", b"\xff")
    targets = (b"/etc/passwd", b"../../outside", b"s0.jpg", b"/dev/zero", b"s9.png")
    size = rng.choice([0, 4, 1 << 33])
    blocks = [head(b"s9.png", size, rng.choice(kinds), rng.choice(targets)) for _ in range(rng.randrange(1, 4))]
    return spliced(b"".join(blocks), rng)


def many_members(rng: Draws, slow: bool) -> bytes:
    """Samples without a byte, or one sample with more members than anyone has."""
    if rng.pick((True, False)):
        count = 300_000 if slow and rng.turn == 0 else 3_000
        return b"".join(head(b"m%07d.png" % n, 0) for n in range(count)) + bytes(1024)
    return b"".join(head(b"m.x%07d" % n, 0) for n in range(MAX_FIELDS + 9)) + bytes(1024)


def around(make: Callable[[Draws, bool], Members]) -> Make:
    """A shard in which this sample lies between sound ones."""

    def made(rng: Draws, slow: bool) -> bytes:
        return with_sound(make(rng, slow), rng)

    made.__name__ = make.__name__
    return made


PICTURES, TEXTS, REGIONS, ODD = map(around, (pictures, texts, regions, odd_samples))
KINDS: tuple[Make, ...] = (
    *(cut, flipped_headers, damaged_anywhere, damaged_member, no_tar, compressed, sizes, extended, names, links),
    *(ODD, PICTURES, TEXTS, REGIONS, damaged_member, PICTURES, TEXTS, REGIONS, extended, many_members),
)


def shard(seed: int, slow: bool) -> tuple[str, bytes]:
    """(its kind, its bytes)."""
    round_, place = divmod(seed, len(KINDS))
    make = KINDS[place]
    turn = round_ * KINDS.count(make) + KINDS[:place].count(make)
    return make.__name__, make(Draws(seed, turn), slow)
