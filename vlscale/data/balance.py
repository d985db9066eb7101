"""Steps and micro-batches out of samples of known lengths, so that little is padded and all cost the same.

A sample has `words` and `seen` (regions, cells or patches). A micro-batch pads both to its longest: it costs its
samples times (most words + most seen).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from vlscale.data.shuffle import Numbers

EXACT = 0.001  # to what part of itself the least greatest cost is found


def deal(words: Numbers, seen: Numbers, steps: int, shapes: int, generator: Generator) -> Numbers:
    """The samples [steps, N / steps] of each of some steps, out of N = words.size samples.

    The samples are parted by words + seen into `shapes` ranges of equal cost. A range is sorted by what is seen and
    cut into one run per step, which steps take in a drawn order. So a step has a run of samples alike in shape from
    every range of lengths, short to long, and every step has about the same lengths.
    """
    length = words + seen
    by_length = np.argsort(length, kind="stable")
    edges = _edges(np.cumsum(length[by_length]), steps, min(shapes, len(words) // steps))
    out = np.empty((steps, len(words) // steps), dtype=np.int64)
    for first, last in pairwise(edges):
        part = by_length[first * steps : last * steps]
        runs = part[np.argsort(seen[part], kind="stable")].reshape(steps, last - first)
        out[:, first:last] = runs[generator.permutation(steps)]
    return out


def _edges(running: Numbers, steps: int, shapes: int) -> list[int]:
    """Where ranges of equal cost begin and end in a step's samples; none is empty."""
    cost = running[-1] * np.arange(1, shapes) / shapes
    edges = np.round(np.searchsorted(running, cost) / steps).astype(int).tolist()
    samples = len(running) // steps
    for number, edge in enumerate(edges):
        least = edges[number - 1] + 1 if number else 1
        edges[number] = min(max(edge, least), samples - (shapes - 1 - number))
    return [0, *edges, samples]


def cut(words: Numbers, seen: Numbers, groups: int) -> list[Numbers]:
    """The samples of each of `groups` micro-batches, the dearest first, out of one step's N >= groups.

    Of some orders in which neighbours are alike, that one is cut into runs which makes the greatest cost least.
    """
    found = [(order, _cut(words[order], seen[order], groups)) for order in _orders(words, seen, groups)]
    order, edges = min(found, key=lambda each: costs(each[0], each[1], words, seen).max())
    made = [order[first:last] for first, last in pairwise(edges)]
    dearest = np.argsort(-costs(order, edges, words, seen), kind="stable")
    return [made[number] for number in dearest]


def costs(order: Numbers, edges: Sequence[int], words: Numbers, seen: Numbers) -> Numbers:
    """[M] of runs of an order that begin and end at edges [M + 1]."""
    starts = np.asarray(edges[:-1])
    longest = np.maximum.reduceat(words[order], starts) + np.maximum.reduceat(seen[order], starts)
    cost: Numbers = np.diff(edges) * longest
    return cost


def _orders(words: Numbers, seen: Numbers, groups: int) -> list[Numbers]:
    """As they stand; and in strips of what is seen, in which words rise and fall by turns."""
    orders = [np.arange(len(words))]
    for strips in sorted({1, groups // 4, groups // 2} - {0}):
        by_seen = np.lexsort((words, seen))
        running = np.cumsum((words + seen)[by_seen])
        strip = np.minimum(running * strips // running[-1], strips - 1)
        signed = np.where(strip % 2, -words[by_seen], words[by_seen])
        orders.append(by_seen[np.lexsort((signed, strip))])
    return orders


def _cut(words: Numbers, seen: Numbers, groups: int) -> list[int]:
    """The edges [groups + 1] of runs whose greatest cost is the least, within `EXACT`."""
    most = len(words) * int(words.max() + seen.max())
    low, high = float((words + seen).sum()) / groups, float(most)
    edges = _filled(words, seen, most, groups)
    assert edges is not None, "one run holds them all"
    guess = 1.25 * low  # a bound from above costs more steps of the search than a guess
    while high - low > EXACT * low:
        cost = guess if low < guess < high else (low + high) / 2
        guess = 0.0
        found = _filled(words, seen, cost, groups)
        if found is None:
            low = cost
        else:
            high, edges = cost, found
    return _split(edges, groups, words + seen)


def _filled(words: Numbers, seen: Numbers, most: float, groups: int) -> list[int] | None:
    """The edges of runs that each take as many samples as cost no more than `most`; None if they are too many."""
    count, edges = len(words), [0]
    window = 2 * count // groups + 8
    while edges[-1] < count:
        if len(edges) > groups:
            return None
        end = min(count, edges[-1] + window)
        cost = _running_cost(words[edges[-1] : end], seen[edges[-1] : end])
        taken = int(np.searchsorted(cost, most, side="right"))
        if taken == len(cost) and end < count:
            window *= 2
        else:
            edges.append(edges[-1] + max(taken, 1))
    return edges


def _running_cost(words: Numbers, seen: Numbers) -> NDArray[np.int64]:
    """[N] of the first, the first two, ... samples."""
    longest = np.maximum.accumulate(words) + np.maximum.accumulate(seen)
    cost: NDArray[np.int64] = np.arange(1, len(words) + 1) * longest
    return cost


def _split(edges: list[int], groups: int, length: Numbers) -> list[int]:
    """More edges, by halving the largest runs, until there are `groups` runs."""
    while len(edges) <= groups:
        sums = [int(length[first:last].sum()) * (last - first > 1) for first, last in pairwise(edges)]
        widest = sums.index(max(sums))
        edges.insert(widest + 1, (edges[widest] + edges[widest + 1]) // 2)
    return edges
