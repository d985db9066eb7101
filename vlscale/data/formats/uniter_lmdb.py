"""UNITER's LMDB folders: an image DB of regions and a text DB of token ids (data/data.py of the authors' code).

Image DB: name.npz -> msgpack of arrays or the bytes of an npz, float16; `__keys__` lists the names. The boxes are
normalised and the picture's size is nowhere: they are written as in a picture of 1,000 x 1,000 pixels. Text DB
(`--captions`): id -> msgpack in an lz4 frame, with `input_ids` of BERT's cased vocabulary (`--vocab`) and `img_fname`.
Arrays of Python objects are refused: nothing is unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlscale.data.arrays import read_arrays
from vlscale.data.formats.base import Extras, Options, detections, optional
from vlscale.data.formats.captions import Texts
from vlscale.data.making.write import Sample, Source
from vlscale.errors import ConfigError, DataError

__all__ = ["Options", "source"]

THRESHOLD, LEAST, MOST = 0.2, 10, 100  # which boxes of an `all` DB count: data/data.py, DetectFeatLmdb


def source(paths: Sequence[Path], options: Options) -> Source[tuple[Path, int | None]]:
    """The image DBs that `paths` are or hold. DataError if there is none, ConfigError if a library is missing."""
    for module in ("lmdb", "msgpack", "lz4.frame"):
        optional(module)
    found = [file.parent for path in paths for file in sorted(path.rglob("data.mdb"))]
    if not found:
        raise DataError(f"{', '.join(map(str, paths))} holds no LMDB (a folder with data.mdb)")
    extras = Extras(options._replace(captions=()))
    if options.captions:
        extras.texts = _texts(options.captions, _Words(options.vocab))
    return _Uniter(found, extras)


@dataclass(frozen=True)
class _Uniter:
    folders: list[Path]
    extras: Extras

    def items(self) -> Iterator[tuple[str, tuple[Path, int | None]]]:
        for folder in self.folders:
            with _open(folder) as environment, environment.begin() as read:
                listed = read.get(b"__keys__")
                names = json.loads(listed) if listed else [key.decode() for key, _ in read.cursor()]
            counts = _counts(folder)
            for name in names:
                yield name.removesuffix(".npz"), (folder, counts.get(name))

    def sample(self, name: str, item: tuple[Path, int | None]) -> Sample:
        folder, count = item
        with _open(folder) as environment, environment.begin() as read:
            value = read.get(f"{name}.npz".encode()) or read.get(name.encode())
        if value is None:
            raise ValueError(f"{folder} lists it and does not hold it")
        arrays = read_arrays(value, WANTED) if value[:2] == b"PK" else unpack_arrays(value)
        if count is None and folder.name.startswith("all") and "conf" in arrays:
            count = min(MOST, max(LEAST, int((arrays["conf"] > THRESHOLD).sum())))
        cut = arrays if count is None else {key: each[:count] if each.ndim else each for key, each in arrays.items()}
        return self.extras.sample(name, detections(cut))


WANTED = ("features", "norm_bb", "conf", "soft_labels", "image_w", "image_h", "img_w", "img_h")


def _open(folder: Path) -> Any:
    lmdb = optional("lmdb")
    try:
        return lmdb.open(str(folder), readonly=True, create=False, lock=False, readahead=False)
    except lmdb.Error as error:
        raise DataError(f"{folder} is no readable LMDB ({error})") from error


def _counts(folder: Path) -> dict[str, int]:
    """Boxes per picture, from the `nbb_*.json` beside the DB; empty where there is none."""
    stem = folder.name.removesuffix("_compressed").removeprefix("feat_")
    file = folder.parent / f"nbb_{stem}.json"
    try:
        counts = json.loads(file.read_bytes()) if file.is_file() else {}
        return {str(name): int(count) for name, count in counts.items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise DataError(f"{file} is no mapping of names to numbers of boxes ({error})") from error


def unpack_arrays(data: bytes) -> dict[str, NDArray[Any]]:
    """The arrays of a msgpack that msgpack-numpy wrote. ValueError if damaged, or if one is of Python objects."""
    msgpack = optional("msgpack")
    try:
        found = msgpack.unpackb(data, raw=False, strict_map_key=False)
    except (ValueError, msgpack.UnpackException) as error:
        raise ValueError(f"it is no readable msgpack ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__}; it should be a mapping of arrays")
    return {str(name): _array(str(name), value) for name, value in found.items()}


def _array(name: str, value: object) -> NDArray[Any]:
    """What msgpack-numpy stands for: {nd, type, kind, shape, data}, or a plain number or list."""
    if not isinstance(value, Mapping):
        plain = np.asarray(value)
        if plain.dtype.kind not in "biuf":
            raise ValueError(f"its {name} is no array of numbers")
        return plain
    parts = {key.decode() if isinstance(key, bytes) else str(key): each for key, each in value.items()}
    kind, code = parts.get("kind", b""), parts.get("type")
    if kind in (b"O", "O") or not isinstance(code, str | bytes) or not isinstance(parts.get("data"), bytes):
        raise ValueError(f"its {name} is an array of Python objects, which is never loaded")
    try:
        dtype = np.dtype(code.decode() if isinstance(code, bytes) else code)
        if dtype.kind not in "biuf":
            raise ValueError(f"its {name} is of {dtype}; it should be numbers")
        return np.frombuffer(parts["data"], dtype).reshape(parts.get("shape", ()))
    except TypeError as error:
        raise ValueError(f"its {name} is of an unknown kind ({error})") from error


def _texts(folders: Sequence[Path], words: _Words) -> Texts:
    """The captions of text DBs, in the order of their ids."""
    texts = Texts()
    for folder in folders:
        _read_texts(texts, folder, words)
    return texts


def _read_texts(texts: Texts, folder: Path, words: _Words) -> None:
    frame, msgpack = optional("lz4.frame"), optional("msgpack")
    with _open(folder) as environment, environment.begin() as read:
        for key, value in read.cursor():
            try:
                record = msgpack.unpackb(frame.decompress(value), raw=False, strict_map_key=False)
                name, ids = record["img_fname"], record.get("input_ids", [])
            except (RuntimeError, ValueError, KeyError, TypeError, msgpack.UnpackException) as error:
                raise DataError(
                    f"text DB {folder}: '{key.decode(errors='replace')}' cannot be read ({error})"
                ) from error
            if not isinstance(name, str):
                raise DataError(f"text DB {folder} is of pairs of pictures (NLVR2), which one sample cannot hold")
            if isinstance(record.get("target"), dict):
                raise DataError(f"text DB {folder} is of questions whose answers are numbers; take one of captions")
            texts.add(name, [words(record, ids)])


class _Words:
    """From a text record to a caption: its own text where it has one, else its tokens."""

    def __init__(self, vocab: Path | None) -> None:
        self._tokens: list[str] = []
        if vocab:
            file = vocab / "vocab.txt" if vocab.is_dir() else vocab
            try:
                self._tokens = file.read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"--vocab {file} cannot be read ({error}); write the path of a vocab.txt") from error

    def __call__(self, record: Mapping[str, Any], ids: Sequence[int]) -> str:
        for name in ("sent", "sentence", "caption", "question"):
            if isinstance(record.get(name), str):
                return str(record[name])
        if not self._tokens:
            raise ConfigError("the text DB holds token ids; write --vocab with the vocab.txt they are of")
        if any(not 0 <= number < len(self._tokens) for number in ids):
            raise ConfigError(
                f"the text DB has token {max(ids)}, --vocab only {len(self._tokens)}; write the one it is of"
            )
        from tokenizers.decoders import WordPiece

        return str(WordPiece(prefix="##", cleanup=True).decode([self._tokens[number] for number in ids]))
