"""fp32 master weights from a checkpoint that DeepSpeed wrote in bf16 or fp16: the parts of all ranks, joined."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlscale import engine


def read(folder: Path, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """{our name: fp32 master, whole}; empty where the optimizer's state does not name its parameters (ZeRO 0).

    The files are pickled by DeepSpeed and loaded as resuming loads them: give folders of your own runs.

    Args:
        folder: a checkpoint.
        shapes: of every parameter, by our name.
    """
    states = [each["optimizer_state_dict"] for each in engine.saved(folder, "optim_states")]
    if not states:
        return {}
    if "fp32_flat_groups" in states[0]:
        order = engine.saved(folder, "model_states")[0]["param_shapes"]
        return _sharded([torch.cat(each["fp32_flat_groups"]) for each in states], order)
    return _partitioned(states, shapes)


def _partitioned(states: Sequence[Mapping[str, Any]], shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """ZeRO 1 and 2: each rank has a stretch of all parameters in a row, and notes where each of them lies in it."""
    pieces: dict[str, list[Tensor]] = {}
    for state in states:
        groups = zip(state["single_partition_of_fp32_groups"], state["param_slice_mappings"], strict=True)
        for flat, places in groups:
            for name, place in places.items():
                pieces.setdefault(name, []).append(flat.narrow(0, place.start, place.numel))
    return {name: torch.cat(each).view(shapes[name]) for name, each in pieces.items() if name in shapes}


def _sharded(flats: Sequence[Tensor], order: Sequence[Mapping[str, torch.Size]]) -> dict[str, Tensor]:
    """ZeRO 3: each rank has 1/ranks of every parameter, the last ones padded."""
    out, start = {}, 0
    for name, shape in (pair for group in order for pair in group.items()):
        size = -(-shape.numel() // len(flats))
        whole = torch.cat([flat.narrow(0, start, size) for flat in flats])
        out[name] = whole[: shape.numel()].view(shape)
        start += size
    return out
