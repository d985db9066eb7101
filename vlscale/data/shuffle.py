"""A shuffle that is computed, not stored: any element of any permutation at once, in no memory."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]
ROUNDS = 8  # of the network; four already pass for random, the rest is margin


def shuffled(places: Numbers, size: int, keys: NDArray[np.uint64]) -> Numbers:
    """Where a shuffle of [0, size) takes `places` [N]: a bijection that is computed, not stored.

    A Feistel network over a rectangle of about the square root's sides; what falls outside is shuffled again until
    it is inside (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002: cycle walking).

    Args:
        places: [N], each in [0, size).
        size: of the range.
        keys: [rounds], what the shuffle depends on.
    """
    width = max(1, math.isqrt(size))
    height = -(-size // width)
    out = places.astype(np.uint64)
    outside = np.ones(len(out), dtype=bool)
    while outside.any():
        out[outside] = _network(out[outside], np.uint64(height), np.uint64(width), keys)
        outside = out >= size
    return out.astype(np.int64)


def _network(
    numbers: NDArray[np.uint64], height: np.uint64, width: np.uint64, keys: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    row, column = np.divmod(numbers, width)
    for turn, key in enumerate(keys):
        if turn % 2:
            row = (row + _mixed(column ^ key) % height) % height
        else:
            column = (column + _mixed(row ^ key) % width) % width
    mixed: NDArray[np.uint64] = row * width + column
    return mixed


def _mixed(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Every bit depends on every bit (the finaliser of SplitMix64: Steele, Lea, Flood, 2014)."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
