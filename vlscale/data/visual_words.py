"""Visual words: a codebook that tells each frame's feature a number, and the `visual_words.npz` of a sample that holds
them (VideoBERT, Sun et al. 2019, arXiv 1904.01766: hierarchical k-means, 12 branches, 4 levels).

A codebook is a safetensors file of centroids: `level0` [1, k, F], `level1` [k, k, F], ... and last `leaves`
[k^(L-1), k, F], with `counts/...` [k^l, k] beside each. T frames, F numbers each. Nothing is unpickled.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vlscale.data.clip_files import Track, read_tracks
from vlscale.errors import DataError

LEAVES = "leaves"

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


class Assigned(NamedTuple):
    """What a codebook says of features."""

    codes: Ints  # [T]
    squares: NDArray[np.float64]  # [L] squared distances to the chosen centroid of each level, summed over T


@dataclass(frozen=True)
class Codebook:
    """A tree of centroids: at each of L levels the nearest of k children, by squared Euclidean distance.

    A visual word is the digits of that way, the first level's the most significant. The whole vocabulary of k^L stays,
    also where no feature comes to a leaf.
    """

    levels: tuple[Floats, ...]  # level l [k^l, k, F]
    counts: tuple[Ints, ...]  # level l [k^l, k], of the features that it was made of

    @property
    def branches(self) -> int:
        """k."""
        return int(self.levels[0].shape[1])

    @property
    def width(self) -> int:
        """F."""
        return int(self.levels[0].shape[2])

    @property
    def words(self) -> int:
        """k^L."""
        return int(self.levels[-1].shape[0]) * self.branches

    @property
    def leaves(self) -> Floats:
        """[k^L, F] the centroid of each visual word."""
        return self.levels[-1].reshape(-1, self.width)

    def __call__(self, features: NDArray[Any]) -> Assigned:
        """The visual words of features [T, F]. ValueError if they are of another width."""
        if features.ndim != 2 or features.shape[1] != self.width:
            raise ValueError(f"features have the shape {list(features.shape)}; the codebook's are [T, {self.width}]")
        rows = features.astype(np.float64)
        codes = np.zeros(len(rows), dtype=np.int64)
        squares = []
        for centroids in self.levels:
            codes, square = descend(rows, codes, centroids)
            squares.append(square.sum())
        return Assigned(codes, np.array(squares))


def descend(rows: NDArray[np.float64], nodes: Ints, centroids: Floats) -> tuple[Ints, NDArray[np.float64]]:
    """One level down: rows [T, F] at nodes [T] of a level, whose children are `centroids` [N, k, F].

    The nodes of the next level [T], and the squared distances to them [T].
    """
    branches = centroids.shape[1]
    below, squares = np.empty_like(nodes), np.empty(len(nodes))
    order = np.argsort(nodes, kind="stable")
    for some in np.split(order, np.flatnonzero(np.diff(nodes[order])) + 1):
        if not len(some):
            continue
        node = nodes[some[0]]
        children, own = centroids[node].astype(np.float64), rows[some]
        distances = (children**2).sum(axis=1) - 2 * own @ children.T  # and the row's own square, the same for all
        nearest = distances.argmin(axis=1)
        below[some] = node * branches + nearest
        squares[some] = distances[np.arange(len(some)), nearest] + (own**2).sum(axis=1)
    return below, squares.clip(min=0)


def write_codebook(codebook: Codebook, path: Path) -> None:
    """Whole or not at all, and the same bytes for the same codebook."""
    from safetensors.numpy import save

    names = [*(f"level{number}" for number in range(len(codebook.levels) - 1)), LEAVES]
    tensors: dict[str, NDArray[Any]] = {}
    for name, level, counts in zip(names, codebook.levels, codebook.counts, strict=True):
        tensors |= {name: level, f"counts/{name}": counts}
    hidden = path.with_name(f".{path.name}.part")
    with open(hidden, "wb") as file:
        file.write(save(tensors))
        file.flush()
        os.fsync(file.fileno())
    os.replace(hidden, path)


def read_codebook(path: Path) -> Codebook:
    """A codebook from its file. DataError if there is none, or it is no tree of centroids."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors = load_file(path)
        names = [*(f"level{number}" for number in range(sum(name.startswith("level") for name in tensors))), LEAVES]
        levels = tuple(tensors[name].astype(np.float32) for name in names)
        counts = tuple(tensors[f"counts/{name}"].astype(np.int64) for name in names)
        _, branches, width = levels[0].shape
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise DataError(
            f"{path} is no codebook ({error}); make one with `launchers/visual_words.py grow SHARDS --to FILE`"
        ) from error
    for depth, (level, count) in enumerate(zip(levels, counts, strict=True)):
        if level.shape != (branches**depth, branches, width) or count.shape != level.shape[:2]:
            raise DataError(
                f"{path} is no codebook: its {names[depth]} has the shape {list(level.shape)}, not "
                f"{[branches**depth, branches, width]}; make it again"
            )
    return Codebook(levels, counts)


def read_features(data: bytes) -> Track:
    """The features and their times in a frames.npz. ValueError if training could not read it, or it has several rates:
    a visual word is of one row."""
    tracks = read_tracks(data)
    if len(tracks) > 1:
        raise ValueError(f"it has features of {len(tracks)} rates; visual words are of one, so leave the others out")
    if not np.isfinite(tracks[0].rows).all():
        raise ValueError("features hold a number that is not finite")
    return tracks[0]


def write_words(codes: Ints, times: NDArray[Any]) -> bytes:
    """The bytes of `visual_words.npz`, the same for the same words."""
    out = BytesIO()
    np.savez(out, codes=codes.astype(np.int32), times=np.asarray(times, dtype=np.float32))
    return out.getvalue()
