"""What crosses the network in an optimizer step, and what that makes of many nodes: arithmetic, nothing is run.

The byte counts are those of DeepSpeed 0.19.8 under our `ds_configs`, read off real runs of two and four processes
(`tests/test_traffic.py`). What they show and the ZeRO paper (Rajbhandari et al. 2020, arXiv 1910.02054, section 7)
does not say: stages 1 and 2 sum gradients by all-reduce, not by reduce-scatter, stage 2 in every micro-batch; in 16
bits they travel in 16 bits whatever `grad_accum_dtype` is; stage 3 keeps gathered weights from forward to backward
where `stage3_max_reuse_distance` lets it, and gathers the small ones once a step, a frozen twin's too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

BUCKET = 50_000_000  # elements of one message: reduce_bucket_size and its like in ds_configs/
PLAIN_BUCKET = 500_000_000  # DeepSpeed's own at stage 0
ALIGNED = 2  # stages 1 and 2 pad each group to a multiple of this many elements per rank
HOWS = {  # how bytes travel, by the names of torch.distributed
    **dict.fromkeys(("all_gather", "all_gather_into_tensor"), "all-gather"),
    **dict.fromkeys(("reduce_scatter", "reduce_scatter_tensor"), "reduce-scatter"),
    **dict.fromkeys(("all_to_all", "all_to_all_single"), "all-to-all"),
    "all_reduce": "all-reduce",
    "batch_isend_irecv": "to a neighbour",
    "broadcast": "broadcast",
}


class Part(NamedTuple):
    """Bytes of one kind that every rank takes part in moving in one optimizer step."""

    name: str
    how: str  # one of the values of `HOWS`
    bytes: float  # of the whole tensor: summed, gathered, or to be scattered
    messages: float = 1.0
    hides: bool = False  # whether it travels beside forward or backward

    def sent(self, ranks: int) -> float:
        """Bytes that one rank sends, and as many that it receives, by rings (Patarasuk and Yuan 2009)."""
        others = (ranks - 1) / ranks
        return self.bytes * {"all-reduce": 2 * others, "to a neighbour": 1.0, "broadcast": 1.0}.get(self.how, others)


@dataclass(frozen=True)
class Sizes:
    """How many numbers the parameters have, each for itself, and what else decides about bytes."""

    groups: Sequence[Sequence[int]]  # the trainable ones, by group of the optimizer
    frozen: Sequence[int] = ()  # all others, a momentum twin's first of all
    followed: Sequence[int] = ()  # numbers of the groups that hold a twin's partners
    twin: Sequence[int] = ()  # of `frozen`, those of the twin whose partners learn

    @property
    def trainable(self) -> list[int]:
        """Of all groups."""
        return [each for group in self.groups for each in group]


@dataclass(frozen=True)
class Zero:
    """What a DeepSpeed configuration says about traffic."""

    stage: int
    weight: int  # bytes of a number in training precision
    gradient: int  # and of a gradient on its way; DeepSpeed takes the training precision
    small: int = 100_000  # stage3_param_persistence_threshold
    reuse: int = 1_000_000_000  # stage3_max_reuse_distance
    overlap: bool = True  # overlap_comm


def engine_traffic(
    sizes: Sizes, zero: Zero, ranks: int, micro_batches: int = 1, passes: int = 2, two_pass: bool = False
) -> list[Part]:
    """What DeepSpeed and the momentum twin move in a step.

    Not counted: norms and the like (some bytes); at stage 3 the first two steps, which trace the model, and the first
    ones after another task. Layers that run several times in a micro-batch count once; where stage 3 does not keep
    weights, it gathers them each time.

    Args:
        sizes: of the model.
        zero: the configuration.
        ranks: W.
        micro_batches: of a rank and step.
        passes: at stage 3, how often a micro-batch needs a weight that is not kept: forward and backward; with
            activation checkpointing at most 3 (a block's last layer is not gathered again).
        two_pass: whether objectives look at a step's whole batch in several micro-batches. Stage 3 then finds no
            trace that holds, keeps nothing, and gathers 3 times per micro-batch and once more.

    Returns:
        Bytes of whole tensors; `Part.sent` makes what a rank sends of them. Groups are padded to 2 W numbers at
        stages 1 and 2, parameters to W at stage 3.
    """
    number = sum(sizes.trainable)
    if zero.stage == 3:
        return _sharded(sizes, zero, ranks, micro_batches, passes, two_pass)
    times, bucket = (micro_batches, BUCKET) if zero.stage == 2 else (1, BUCKET if zero.stage else PLAIN_BUCKET)
    hides = zero.stage == 2 and zero.overlap
    summed = times * number * zero.gradient
    parts = [Part("gradients", "all-reduce", summed, times * math.ceil(number / bucket), hides)]
    if zero.stage == 0:
        return parts
    padded = [_padded(sum(group), ALIGNED * ranks) * zero.weight for group in sizes.groups]
    parts.append(Part("weights", "all-gather", sum(padded), len(padded)))
    if sizes.followed:
        moved = sum(padded[group] for group in sizes.followed)
        parts.append(Part("momentum twin", "all-gather", moved, len(sizes.followed)))
    return parts


def _sharded(sizes: Sizes, zero: Zero, ranks: int, micro_batches: int, passes: int, two_pass: bool) -> list[Part]:
    """ZeRO 3."""

    def size(numbers: Sequence[int], small: bool) -> int:
        return sum(_padded(each, ranks) * zero.weight for each in numbers if (each <= zero.small) == small)

    trainable, frozen = sizes.trainable, list(sizes.frozen)
    kept = 2 * sum(trainable) + sum(frozen) <= zero.reuse  # from a weight's forward to its backward
    often = 3 * micro_batches + 1 if two_pass else micro_batches * (1 if kept else passes)
    summed = micro_batches * sum(_padded(each, ranks) for each in trainable) * zero.gradient
    few = sum(each <= zero.small for each in (*trainable, *frozen))
    parts = [
        Part("gradients", "reduce-scatter", summed, micro_batches * math.ceil(sum(trainable) / BUCKET), zero.overlap),
        _in_buckets("weights", often * size(trainable, small=False), zero),
        _in_buckets("weights of twin and frozen", micro_batches * size(frozen, small=False), zero),
        Part("small weights", "all-gather", size([*trainable, *frozen], small=True), few),
        Part("momentum twin", "all-gather", size(sizes.twin, small=True), sum(e <= zero.small for e in sizes.twin)),
    ]
    return [part for part in parts if part.bytes]


def _in_buckets(name: str, size: int, zero: Zero) -> Part:
    return Part(name, "all-gather", size, math.ceil(size / zero.weight / BUCKET), zero.overlap)


def _padded(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def contrast_traffic(samples: int, ranks: int, keys: int, gradients: int, name: str = "contrast") -> list[Part]:
    """Embeddings that all ranks compare (`scope: global`), or the new keys of a replicated queue.

    Args:
        samples: of a rank and step.
        ranks: W.
        keys: bytes per sample that are gathered; ALBEF's bf16 queue: 2 embeddings of 256 in 2 bytes.
        gradients: bytes per sample that go home, in fp32; 0 for keys of a twin.
        name: of the parts.
    """
    whole = samples * ranks
    parts = [Part(name, "all-gather", whole * keys), Part(f"{name}, gradients", "reduce-scatter", whole * gradients)]
    return [part for part in parts if part.bytes]


def agreement_traffic(counted: int = 0) -> list[Part]:
    """Step plans and votes, 16 bytes each, and the counts of `counted` objectives, fp64; they make each step wait."""
    return [Part("plans, votes, counts", "all-reduce", 32 + 8 * counted, 2 + (counted > 0))]


def own_traffic(
    few: Mapping[str, float], more: Mapping[str, float], samples: tuple[int, int], whole: int
) -> list[Part]:
    """What the objectives move in a step, from what two passes of the model were seen to move.

    A line through the two counts is drawn on to the step's samples; passes over other numbers of ranks tell nothing.

    Args:
        few, more: `collectives.Volume.bytes` of a forward and backward pass.
        samples: of a rank in each of the two; may be equal.
        whole: samples of a rank and step.
    """
    first, second = samples
    parts = []
    for name in sorted({*few, *more} & HOWS.keys()):
        rise = more.get(name, 0) - (few.get(name, 0) if second > first else 0)  # else all of it goes with the samples
        slope = rise / (second - first or second)
        parts.append(Part("objectives", HOWS[name], max(0.0, more.get(name, 0) + slope * (whole - second))))
    return [part for part in parts if part.bytes]


class Network(NamedTuple):
    """Nominal bandwidth in gigabits per second, each way."""

    node: float  # all the cards of a node together
    gpu: float = 3600.0  # of one GPU to the others of its node


NVLINK = {  # gigabits per second and GPU, each way: half of what the data sheets give for both
    "NVLink 3 (A100)": 2400.0,  # 600 GB/s, A100 data sheet
    "NVLink 4 (H100, H200)": 3600.0,  # 900 GB/s, H100 data sheet
    "PCIe 4.0 x16": 256.0,  # 16 GT/s and lane
}
NETWORKS = {  # nominal line rates
    "10 Gb Ethernet": Network(10),
    "25 Gb Ethernet": Network(25),
    "100 Gb Ethernet": Network(100),
    "200 Gb InfiniBand": Network(200),
    "400 Gb InfiniBand": Network(400),
    "8 x 400 Gb InfiniBand": Network(3200),
}


class Scale(NamedTuple):
    """A prediction for some number of nodes; seconds of one optimizer step."""

    nodes: int
    network: float  # all communication
    exposed: float  # of it, what computing does not hide
    step: float
    efficiency: float  # samples per second and GPU, over those of one GPU that waits for nobody


def weak_scaling(
    nodes: Sequence[int],
    compute: float,
    moved: Callable[[int], Sequence[Part]],
    network: Network,
    gpus: int = 8,
    overlap: float = 0.5,
    reached: float = 0.8,
    latency: float = 5e-6,
) -> list[Scale]:
    """Step time on more and more nodes where each GPU keeps its share of the work. A prediction, not a measurement.

    It assumes:

    * `compute` is the same on every rank: no stragglers, no waiting for data, checkpoints and logs left out;
    * rings that enter and leave each node once, so that a node's cards carry each byte of `Part.sent` once for all
      its GPUs, and links inside carry it at the same time (the slower of both counts); an all-to-all has no ring, and
      each GPU's bytes for other nodes go through the cards;
    * every collective costs `latency` times the logarithm (base 2) of the ranks, as trees do; long rings cost more;
    * `reached` of the nominal bandwidth, on a network that is not shared and has full bisection;
    * `overlap` of what travels beside forward and backward (`Part.hides`) is hidden, while computing lasts; gradients
      at stages 0 and 1, weights after the step, and what objectives exchange are waited for.

    Args:
        nodes: e.g. (1, 2, 4).
        compute: seconds that one rank computes in a step, measured on one node without communication.
        moved: the parts at a number of ranks.
        network: nominal bandwidths.
        gpus: per node.
        overlap: share of the communication that can hide, 0 to 1.
        reached: share of the nominal bandwidth.
        latency: seconds per collective and doubling of the ranks.
    """
    out = []
    for each in nodes:
        ranks = each * gpus
        costs = [(part, _seconds(part, each, gpus, network, reached, latency)) for part in moved(ranks)]
        total = sum(seconds for _, seconds in costs)
        hidden = min(overlap * sum(seconds for part, seconds in costs if part.hides), compute)
        step = compute + total - hidden
        out.append(Scale(each, total, total - hidden, step, compute / step))
    return out


def _seconds(part: Part, nodes: int, gpus: int, network: Network, reached: float, latency: float) -> float:
    ranks = nodes * gpus
    if ranks == 1:
        return 0.0
    inside = part.sent(ranks) * 8 / (network.gpu * 1e9 * reached) if gpus > 1 else 0.0
    across = part.sent(ranks) if part.how != "all-to-all" else part.bytes * gpus * (1 - 1 / nodes)
    outside = across * 8 / (network.node * 1e9 * reached) if nodes > 1 else 0.0
    return max(inside, outside) + part.messages * latency * math.log2(ranks)
