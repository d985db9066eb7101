"""Where the members of a tar lie: one walk over its headers that trusts none of them.

Reads ustar, GNU (long names, sizes above 8 GiB) and PAX (POSIX.1-2001, "pax Interchange Format"). Python's `tarfile`
reads a PAX header of any size whole, and takes a damaged header for the end; an index of training data may do neither.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

BLOCK = 512  # bytes, of a header and of what data is padded to
LONGEST_NAME = 4_096  # bytes, Linux' PATH_MAX
LARGEST_HEADER = 2**20  # bytes of one PAX header
_ZERO = bytes(BLOCK)
_REGULAR = (b"0", b"\0", b"7")
_WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders, pipes: their size counts nothing


class TarError(ValueError):
    """What is wrong with a tar, and at which of its bytes."""

    def __init__(self, place: int, reason: str) -> None:
        """`reason` is a clause."""
        super().__init__(place, reason)
        self.place = place
        self.reason = reason


class Member(NamedTuple):
    """A regular file of a tar."""

    name: bytes
    offset: int  # of its data, bytes
    size: int  # bytes


def members(read: Callable[[int, int], bytes], length: int) -> Iterator[Member]:
    """The regular files of a tar of `length` bytes, in its order; folders, links and devices are passed over.

    Args:
        read: gives (offset, size) -> bytes.
        length: of the tar in bytes.

    Raises:
        TarError: a header is damaged, data end behind the end, the end mark is missing, or a member is sparse.
    """
    offset = 0
    every: dict[bytes, bytes] = {}  # PAX: what holds for all that follows
    single: dict[bytes, bytes] = {}  # PAX and GNU: what holds for the next member
    while (block := read(offset, BLOCK) if offset + BLOCK <= length else b"") != _ZERO:
        size, kind = _check(block, offset), block[156:157]
        data = offset + BLOCK
        if kind in (b"L", b"x", b"X", b"g"):
            _check_end(data, size, length, offset)
            if size > LARGEST_HEADER:
                raise TarError(offset, f"a header of {size} bytes, more than {LARGEST_HEADER}")
            held = read(data, size)
            found = {b"path": held.split(b"\0", 1)[0]} if kind == b"L" else _records(held, offset)
            (every if kind == b"g" else single).update(found)
        else:
            name, size = _described(block, size, {**every, **single}, offset)
            folder = kind == b"\0" and name.endswith(b"/")  # before POSIX
            if kind in _WITHOUT_DATA or folder:
                size = 0
            if kind == b"S" or any(key.startswith(b"GNU.sparse") for key in single):
                raise TarError(offset, f"member '{printable(name)}' is sparse; pack it without --sparse")
            _check_end(data, size, length, offset, name)
            if kind in _REGULAR and not folder:
                yield Member(name, data, size)
            if kind != b"K":
                single = {}
        offset = data + -(-size // BLOCK) * BLOCK


def printable(name: bytes) -> str:
    """A name as text; what is not UTF-8 in it as escapes."""
    return name.decode("utf-8", "backslashreplace")


def _check(block: bytes, offset: int) -> int:
    """The size that a header tells, if its checksum is right."""
    if len(block) < BLOCK:
        raise TarError(offset, "it ends there")
    plain = sum(block) - sum(block[148:156]) + 8 * ord(" ")
    signed = plain - 256 * sum(byte > 127 for byte in block[:148] + block[156:]) if not block.isascii() else plain
    if _number(block[148:156], offset) not in (plain, signed):  # old writers summed signed bytes
        raise TarError(offset, "a header's checksum is wrong")
    return _number(block[124:136], offset)


def _number(field: bytes, offset: int) -> int:
    """Octal digits, or GNU's base 256, which the highest bit tells."""
    if field[0] & 0x80:
        if field[0] & 0x40:
            raise TarError(offset, "a header tells a negative size")
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip()
    if digits and (not digits.isdigit() or b"8" in digits or b"9" in digits):
        raise TarError(offset, "a header's number is not octal")
    return int(digits or b"0", 8)


def _check_end(data: int, size: int, length: int, offset: int, name: bytes = b"") -> None:
    if data + size > length:
        member = f"member '{printable(name)}'" if name else "a header"
        raise TarError(offset, f"{member} ends behind the end of the file")


def _records(held: bytes, offset: int) -> dict[bytes, bytes]:
    """The records `length key=value` of a PAX header."""
    found: dict[bytes, bytes] = {}
    place = 0
    while place < len(held) and held[place]:
        digits = held[place : place + 20].split(b" ", 1)[0]
        end = place + int(digits) if digits.isdigit() else 0
        key, equals, value = held[place + len(digits) + 1 : end - 1].partition(b"=")
        if not place < end <= len(held) or held[end - 1 : end] != b"\n" or not equals:
            raise TarError(offset, "a PAX header is damaged")
        found[key] = value
        place = end
    return found


def _described(block: bytes, size: int, told: dict[bytes, bytes], offset: int) -> tuple[bytes, int]:
    """(name, size) of a member, of which extended headers may tell more than its own."""
    name = block[:100].split(b"\0", 1)[0]
    if block[257:263] == b"ustar\0" and block[345]:
        name = block[345:500].split(b"\0", 1)[0] + b"/" + name
    name = told.get(b"path", name)
    if len(name) > LONGEST_NAME:
        raise TarError(offset, f"a member's name of {len(name)} bytes, more than {LONGEST_NAME}")
    if b"size" in told:
        if not told[b"size"].isdigit() or len(told[b"size"]) > 20:
            raise TarError(offset, "a PAX header tells a size that is no number")
        size = int(told[b"size"])
    return name, size
