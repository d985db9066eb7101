"""Folders of frames' features, an .npy [T, F] per video (or an .npz with `features`), with what is said in each.

Each folder in --source is a stream of its own with as many rows a second as --rates tells, such as HowTo100M's
features_2d at 1 and features_3d at 1.5. What is said: as in `clips`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlscale.data.arrays import MAX_BYTES, read_arrays, read_header
from vlscale.data.formats.base import Options, files_in
from vlscale.data.formats.clips import Item, spoken, told
from vlscale.data.formats.timed import stem
from vlscale.data.making.write import Sample, Source
from vlscale.errors import ConfigError

__all__ = ["Options", "source"]

FILES = r".*\.np[yz]"
ENDS = [f"{video}.{end}" for video in ("", ".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v") for end in ("npy", "npz")]


def source(paths: Sequence[Path], options: Options) -> Source[Item]:
    """The videos of the first of `paths`. DataError if it has none, ConfigError for rates that cannot be."""
    rates = options.rates or (1.0,) * len(paths)
    if len(rates) != len(paths) or min(rates) <= 0:
        given = " ".join(f"{rate:g}" for rate in rates)
        raise ConfigError(f"--rates {given} should be rows a second, above 0, of each of the {len(paths)} --source")
    files = files_in(paths[:1], FILES, "features (npy or npz)")
    named = [(stem(file.relative_to(folder).as_posix()), file) for folder, file in files]
    return _Streams(told(named, options), paths, rates)


class _Streams:
    """The source of such features. To other processes go the folders and rates: each item carries the rest."""

    def __init__(self, files: list[tuple[str, Item]], folders: Sequence[Path], rates: Sequence[float]) -> None:
        self._files = files
        self._folders = tuple(folders)
        self._rates = tuple(rates)

    def __reduce__(self) -> tuple[type[_Streams], tuple[list[tuple[str, Item]], tuple[Path, ...], tuple[float, ...]]]:
        return _Streams, ([], self._folders, self._rates)

    def items(self) -> Iterator[tuple[str, Item]]:
        """(name, item) of every video."""
        return iter(self._files)

    def sample(self, name: str, item: Item) -> Sample:
        """The sample of all its streams. ValueError if one cannot be used."""
        path, record = spoken(item, "file of features")
        files = [path, *(self._other(folder, name, path) for folder in self._folders[1:])]
        streams = [read_features(file) for file in files]
        return Sample(record, frames=tuple(zip(streams, self._rates, strict=True)))

    def _other(self, folder: Path, name: str, path: Path) -> Path:
        """The file of the same video in another stream."""
        first = self._folders[0]
        same = folder / path.relative_to(first) if path.is_relative_to(first) else folder / path.name
        found = [same, *(folder / f"{name}{end}" for end in ENDS)]
        there = next((each for each in found if each.is_file()), None)
        if there is None:
            raise ValueError(f"{folder} has no features of it ({same.name})")
        return there


def read_features(path: Path) -> NDArray[Any]:
    """[T, F], at least one row. ValueError if it holds anything else; nothing is unpickled."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"{path.name} has {path.stat().st_size} bytes; at most {MAX_BYTES} are read")
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path.name} cannot be read ({error.strerror})") from error
    if path.suffix.lower() == ".npz":
        arrays = read_arrays(data, ("features",))
        if "features" not in arrays:
            raise ValueError(f"{path.name} has no 'features'")
        rows = arrays["features"]
    else:
        rows = _npy(data, path.name)
    if rows.ndim != 2 or not rows.size or rows.dtype.kind not in "fiu":
        raise ValueError(f"{path.name} is {rows.dtype} {list(rows.shape)}; it should be numbers [rows, width]")
    if not np.isfinite(rows).all():
        raise ValueError(f"{path.name} holds a number that is not finite")
    return rows


def _npy(data: bytes, name: str) -> NDArray[Any]:
    content = BytesIO(data)
    try:
        shape, fortran, dtype = read_header(content)
        if dtype.hasobject:
            raise ValueError("pickled objects, which are never loaded")
        flat = np.frombuffer(data, dtype, offset=content.tell())
        return flat.reshape(shape, order="F" if fortran else "C")
    except ValueError as error:
        raise ValueError(f"{name} holds {error}") from error
