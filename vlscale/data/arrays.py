"""The arrays of an npz that anyone may have made: bounded in memory, and nothing is unpickled."""

from __future__ import annotations

import math
import struct
import zipfile
import zlib
from collections.abc import Collection
from io import BytesIO
from tokenize import TokenError
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

MAX_BYTES = 1 << 28  # of one file's arrays; 100 regions of 2,048 numbers and 1,600 classes take 1.5 MB
MAX_MEMBERS = 64  # arrays of one file; each costs memory before any is looked at
MAX_HEADER = 1_000  # characters that tell an array's shape and dtype; numpy writes some 120
_PLAIN = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # what numpy writes; others may ask for any memory
# what zipfile may end with; a RuntimeError where a member is encrypted
_DAMAGED = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, NotImplementedError, RuntimeError)

# what numpy's reading of a header, which evaluates it as a literal, may end with
_ODD_HEADER = (ValueError, TypeError, KeyError, SyntaxError, TokenError, OverflowError, RecursionError, MemoryError)


def read_arrays(data: bytes, names: Collection[str] = ()) -> dict[str, NDArray[Any]]:
    """The arrays of an npz by name, only `names` where given.

    ValueError if it is damaged, holds pickled objects, or declares more than `MAX_BYTES`; what it declares is looked
    at before it is inflated, and no more than that is.
    """
    if data[:4] != b"PK\x03\x04":
        raise ValueError("it is no npz" if data else "it is empty")
    if data.count(b"PK\x01\x02") > MAX_MEMBERS:  # the mark of an entry of the zip's directory
        raise ValueError(f"it holds more than {MAX_MEMBERS} arrays")
    try:
        with zipfile.ZipFile(BytesIO(data)) as file:
            members = {member.filename.removesuffix(".npy"): member for member in file.infolist()}
            chosen = {name: member for name, member in members.items() if not names or name in names}
            declared = sum(member.file_size for member in chosen.values())
            if declared > MAX_BYTES:
                raise ValueError(f"its arrays would take {declared} bytes; at most {MAX_BYTES} are read")
            return {name: _array(name, file, member) for name, member in chosen.items()}
    except _DAMAGED as error:
        raise ValueError(f"it is an npz that is damaged or cut short ({error})") from error


def read_header(content: BytesIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """(shape, whether columns come first, dtype) that the start of an npy tells. ValueError if it tells none."""
    try:
        read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[npy.read_magic(content)]
        shape, fortran, dtype = read(content, max_header_size=MAX_HEADER)
    except _ODD_HEADER as error:
        raise ValueError("no readable header of an array") from error
    return shape, fortran, dtype


def _array(name: str, file: zipfile.ZipFile, member: zipfile.ZipInfo) -> NDArray[Any]:
    if member.compress_type not in _PLAIN:
        raise ValueError(f"'{name}' is packed in a way that numpy does not use")
    with file.open(member) as opened:
        content = BytesIO(opened.read(member.file_size))  # with a size, no more than that is inflated
    try:
        shape, fortran, dtype = read_header(content)
    except ValueError as error:
        raise ValueError(f"'{name}' has {error}") from error
    if dtype.hasobject:
        raise ValueError("it holds pickled objects, which are never loaded")
    start = content.tell()
    held = len(content.getbuffer()) - start
    sound = dtype.itemsize and all(0 <= side <= MAX_BYTES for side in shape)
    if not sound or math.prod(shape) * dtype.itemsize != held:
        raise ValueError(f"'{name}' should be {dtype} of the shape {list(shape)}, but holds {held} bytes")
    flat = np.frombuffer(content.getbuffer(), dtype, offset=start) if held else np.empty(0, dtype)
    return flat.reshape(shape, order="F" if fortran else "C")
