"""How much arithmetic a micro-batch costs, and how much a device can do."""

from __future__ import annotations

from typing import NamedTuple

from vlscale.model import PretrainModel
from vlscale.types import Batch

BACKWARD = 2  # a matrix product's backward pass makes two products of the same size
RECOMPUTING = ("full", "offload", "deepspeed")  # modes that run every block a second time


class Flops(NamedTuple):
    """FLOPs of one micro-batch (a multiply-add counts 2), matrix products only."""

    model: int  # what the method asks: online passes and heads three times, the twin's and frozen ones once
    forward: int  # one forward pass, twin and heads included
    hardware: int  # `model` and what activation checkpointing makes again


class _Peak(NamedTuple):
    name: str  # part of torch.cuda.get_device_name()
    half: float  # dense bf16 (fp16 where there is no bf16) tensor-core TFLOP/s with fp32 accumulation
    full: float  # fp32 TFLOP/s outside the tensor cores
    bf16: bool = True


# NVIDIA's data sheets, dense figures (half of those given "with sparsity"); the first match counts.
PEAK = (
    _Peak("B200", 2250.0, 80.0),  # HGX B200 data sheet, per GPU
    _Peak("H200", 989.4, 66.9),  # H200 SXM data sheet
    _Peak("H100 NVL", 835.5, 60.0),  # H100 data sheet, NVL column
    _Peak("H100 PCIe", 756.0, 51.2),  # H100 PCIe data sheet
    _Peak("H100", 989.4, 66.9),  # H100 SXM5 data sheet
    _Peak("H800", 989.4, 66.9),  # as H100 SXM5
    _Peak("A100", 312.0, 19.5),  # A100 data sheet
    _Peak("A800", 312.0, 19.5),  # as A100
    _Peak("V100", 125.0, 15.7, bf16=False),  # V100 SXM2 data sheet
    _Peak("T4", 65.0, 8.1, bf16=False),  # T4 data sheet
    _Peak("L40S", 362.0, 91.6),  # L40S data sheet
    _Peak("L40", 181.0, 90.5),  # L40 data sheet
    _Peak("L4", 121.0, 30.3),  # L4 data sheet
    _Peak("A40", 149.7, 37.4),  # A40 data sheet
    _Peak("A10", 125.0, 31.2),  # A10 data sheet
    _Peak("RTX 4090", 165.2, 82.6),  # Ada architecture white paper, fp32 accumulation
    _Peak("RTX 3090", 71.0, 35.6),  # GA102 white paper, fp32 accumulation
)


def peak_flops(device_name: str, precision: str) -> float | None:
    """Dense peak of a device in FLOP/s.

    Args:
        device_name: as `torch.cuda.get_device_name()` says it.
        precision: of the products: `bf16`, `fp16` or `fp32` (without TF32).

    Returns:
        None where it is unknown: a CPU, a device not in the table, a type it has no units for.
    """
    words = device_name.replace("-", " ").split()
    for peak in PEAK:
        if all(word in words for word in peak.name.split()):
            half = peak.half if precision == "fp16" or peak.bf16 else None
            tera = {"fp32": peak.full, "fp16": half, "bf16": half}.get(precision)
            return tera * 1e12 if tera is not None else None
    return None


def step_flops(model: PretrainModel, batch: Batch, mode: str = "none") -> Flops:
    """FLOPs of one micro-batch of the batch's task.

    Args:
        model: its family counts its own passes, its objectives their heads.
        batch: on the CPU (label counts are read from it).
        mode: activation checkpointing; `selective` makes no products again where attention drops no weights.
    """
    asked = list(model.asked(batch.task))
    shared: dict[str, float] = {}
    own: list[tuple[str, float]] = []
    for _, objective in asked:
        for name, number in objective.passes().items():
            if ":" in name:
                shared[name] = max(number, shared.get(name, 0.0))
            else:
                own.append((name, number))
    online = twin = 0.0
    for name, number in [*shared.items(), *own]:
        verb = name.removeprefix("momentum.").partition(":")[0]
        for part in ("encode_visual", "tower") if verb == "encode_visual" else (verb,):
            cost = number * _pass(model, batch, name, part == "tower")
            watched_alone = name.startswith("momentum.") or part in model.family.frozen
            online, twin = (online, twin + cost) if watched_alone else (online + cost, twin)
    heads = [objective.head_flops(batch) for _, objective in asked]
    trained, watched = sum(head for head, _ in heads), sum(head for _, head in heads)
    forward = online + twin + trained + watched
    needed = (1 + BACKWARD) * (online + trained) + twin + watched
    again = online if mode in RECOMPUTING else 0.0
    return Flops(round(needed), round(forward), round(needed + again))


def _pass(model: PretrainModel, batch: Batch, name: str, tower: bool = False) -> int:
    """FLOPs of one pass over the micro-batch, or of the tower in it; text is as long as its view's padding, and may
    have several rows per sample (candidate captions). All views of the pictures are of one size."""
    verb, *views = name.removeprefix("momentum.").split(":")
    known = [view for view in views if view in batch.text]
    ids = batch.text[known[0] if known else next(iter(batch.text))].ids if batch.text else None
    length = 0 if ids is None else ids.shape[1]
    feats = next(iter(batch.visual.values())).feats if batch.visual else None
    if verb == "fuse" and len(views) == 1:
        verb = "fuse_text"  # of a view that is read alone
    told = ids if verb in ("encode_text", "fuse_text") or feats is None else feats
    if not (batch.text if verb == "encode_text" else batch.visual if verb == "encode_visual" else True):
        return 0  # the task reads one modality alone
    if verb == "fuse" and not (batch.text and batch.visual):
        verb = "fuse_text" if batch.text else "fuse_visual"
    rows = len(batch) if told is None else len(told)
    if tower:
        return rows * model.family.flops(length).get("tower", 0)
    if feats is not None and feats.ndim == 4:  # [B, 3, H, W]
        return rows * model.family.flops_of(length, *feats.shape[2:])[verb]
    cost = rows * model.family.flops(length)[verb]
    most = model.family.inputs.sentences
    if most and verb == "fuse" and ids is not None:  # a family tells of the most sentences that a sample may have
        return cost * len(ids) // (len(batch) * most)
    return cost
