"""The draws of many positions at once, the very numbers that `order.Draws` gives for each of them.

Philox4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), keyed and counted as numpy does it.
"""

from __future__ import annotations

import zlib
from functools import cached_property, partial

import numpy as np
from numpy.typing import NDArray

from vlscale.data.shuffle import Numbers

Words = NDArray[np.uint64]
ROUNDS = 10
_FACTORS = (np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157))  # table 2 of the paper, as the next
_WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)  # what the key grows by each round
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


class ManyDraws:
    """The first draws of the generators `Draws(seed)(position, stream)`, position by position."""

    def __init__(self, seed: int, positions: Numbers, stream: str) -> None:
        """`positions` [N]; the four words of a counter suffice for a few draws."""
        key = np.random.Philox(key=seed).state["state"]["key"]
        stream_word = zlib.crc32(stream.encode())
        counter = [np.full(len(positions), word, np.uint64) for word in (1, stream_word, 0, 0)]
        counter[2] = positions.astype(np.uint64)
        self._make = partial(_philox, counter, key)
        self._next = 0  # of the four

    @cached_property
    def _words(self) -> list[Words]:
        """Made when something is drawn: most samples have but one text to draw from."""
        return self._make()

    def random(self) -> NDArray[np.float64]:
        """[N] in [0, 1), as `Generator.random()`."""
        word = self._words[self._next]
        self._next += 1
        uniform: NDArray[np.float64] = (word >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return uniform

    def integers(self, bounds: Numbers) -> Numbers:
        """[N] in [0, bound), as `Generator.integers(bound)` for bounds [N] from 1 to 2**32 - 1; the last draw.

        Numpy multiplies 32 bits with the bound and draws anew where the product's lower half is too small (Lemire
        2019, arXiv 1805.10941).
        """
        if bounds.max(initial=1) == 1:
            return np.zeros(len(bounds), dtype=np.int64)
        bounds = bounds.astype(np.uint64)
        refused = (np.uint64(1 << 32) - bounds) % bounds
        out = np.zeros(len(bounds), dtype=np.uint64)
        open_ = np.ones(len(bounds), dtype=bool)
        for half in (half for word in self._words[self._next :] for half in (word & _LOW, word >> _HALF)):
            product = half * bounds
            out[open_] = product[open_] >> _HALF
            open_ &= (product & _LOW) < refused
            if not open_.any():
                break
        return out.astype(np.int64)


def _philox(counter: list[Words], key: Words) -> list[Words]:
    """Four words of output [N] each for four words of counter [N] each and two of key."""
    a, b, c, d = counter
    for turn in range(ROUNDS):
        first, second = (
            np.uint64((int(word) + turn * step) % (1 << 64)) for word, step in zip(key, _WEYL, strict=True)
        )
        (high_a, low_a), (high_c, low_c) = _multiplied(a, _FACTORS[0]), _multiplied(c, _FACTORS[1])
        a, b, c, d = high_c ^ b ^ first, low_c, high_a ^ d ^ second, low_a
    return [a, b, c, d]


def _multiplied(words: Words, factor: np.uint64) -> tuple[Words, Words]:
    """The upper and lower 64 bits of 128-bit products."""
    low, high = words & _LOW, words >> _HALF
    factor_low, factor_high = factor & _LOW, factor >> _HALF
    middle = high * factor_low + (low * factor_low >> _HALF)
    other = low * factor_high + (middle & _LOW)
    return high * factor_high + (middle >> _HALF) + (other >> _HALF), words * factor
