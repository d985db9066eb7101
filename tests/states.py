"""What a run is made of, whole: on every rank as it lives, or as its pieces on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlscale import distributed
from vlscale.engine import Engine
from vlscale.model import PretrainModel
from vlscale.nn.queue import KeyQueue
from vlscale.saving import pieces
from vlscale.saving.pieces import RANKS, RING, Reader


def whole_weights(engine: Engine) -> dict[str, Tensor]:
    """Every parameter and buffer, whole, in training precision; all ranks take part."""
    out = {}
    for name, parameter in engine.model.named_parameters():
        gathered: Any = nullcontext()
        if hasattr(parameter, "ds_tensor"):
            import deepspeed

            gathered = deepspeed.zero.GatheredParameters([parameter])
        with gathered:
            out[name] = parameter.detach().cpu().clone()
    return {**out, **whole_buffers(engine.model)}


def whole_buffers(model: PretrainModel) -> dict[str, Tensor]:
    """Every buffer, as if no queue were sharded; all ranks take part."""
    out = {name: buffer.detach().cpu().clone() for name, buffer in model.named_buffers()}
    for path, queue in model.key_queues().items():
        out |= {f"queues.{path}.{name}": buffer for name, buffer in whole_queue(queue).items()}
    return out


def whole_queue(queue: KeyQueue) -> dict[str, Tensor]:
    """Every buffer of a queue as if it were replicated."""
    out = {name: buffer.detach().cpu().clone() for name, buffer in queue.named_buffers()}
    for name, part in queue.parts().items():
        everyone = distributed.gather([part])[0].view(distributed.world_size(), *part.shape)
        out[name] = everyone.transpose(0, 1).reshape(-1, *part.shape[1:]).cpu()
    return out


def write(engine: Engine, folder: Path) -> dict[str, Any]:
    """All ranks' pieces, as they are; the scalars."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / pieces.file_of(distributed.rank())).open("wb") as file:
        pieces.write(file, engine.pieces())
    distributed.barrier()
    return engine.scalars()


def whole(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, queues in the order of their ring."""
    reader = Reader(folder)
    out = {name: reader.whole(name) for name in reader.names()}
    return {name: each.transpose(0, 1).flatten(0, 1) if name.startswith(RING) else each for name, each in out.items()}


def equal(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """To the bit; what each rank has of its own may be what stands for all ranks'."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        other = found[name]
        if name.startswith(RANKS) and len(other) != len(tensor):
            tensor = pieces.over_ranks(tensor).expand_as(other)
        assert other.dtype == tensor.dtype, name
        assert torch.equal(other, tensor), name


def unlike(folder: Path, other: Path) -> list[str]:
    """In what two checkpoints differ: tensors by name, bit by bit, and the small state."""
    one, two = Reader(folder), Reader(other)
    if one.names() != two.names():
        return [f"other tensors: {sorted(set(one.names()) ^ set(two.names()))[:4]}"]
    odd = [name for name in two.names() if not _same(one.whole(name), two.whole(name))]
    found = [f"{len(odd)} of {len(two.names())} tensors differ, {', '.join(odd[:4])}"] if odd else []
    small = [json.loads((each / "state.json").read_text()) for each in (folder, other)]
    for each in small:
        each.pop("writing", None)  # seconds
    keys = [key for key in {**small[0], **small[1]} if small[0].get(key) != small[1].get(key)]
    return found + ([f"state.json differs in {', '.join(keys)}"] if keys else [])


def _same(one: Tensor, other: Tensor) -> bool:
    return (
        one.shape == other.shape
        and one.dtype == other.dtype
        and torch.equal(one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8))
    )
