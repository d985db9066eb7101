"""The plan of `--dry_run`: what a run will need, found by building it and passing two samples through."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlscale import build, distributed, ds_config, optimizers
from vlscale.build import Request
from vlscale.collectives import Volume
from vlscale.errors import DONE
from vlscale.flops import RECOMPUTING, peak_flops, step_flops
from vlscale.model import PretrainModel
from vlscale.optim import OptimConfig, groups
from vlscale.saving.disk import at_most, checkpoint_bytes
from vlscale.traffic import Part, Sizes, Zero, agreement_traffic, engine_traffic, own_traffic
from vlscale.types import Batch, Moment

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
PROBE = 32  # samples that lengths and FLOPs are judged by
MEASURED = 2  # of them, whose activations are measured
ASSUMED_MFU = 0.35  # share of the peak that the time is stated for
PLUS_PLUS = ("zero_hpz_partition_size", "zero_quantized_weights", "zero_quantized_gradients")  # ZeRO++


def show(request: Request) -> int:
    """Check the data, build the model on this rank, print the plan; nothing is trained or left behind."""
    setting = build.setup(request)
    run = request.run
    model = build.build_model(run, tokenizer=setting.tokenizer)
    model = model.to(setting.device)  # where ranks can send what `scope: global` asks for
    setting = build.within_budget(run, setting, model)
    batches = build.probes(run, setting, model, PROBE)
    world, micro_batch = distributed.world_size(), setting.ds["train_micro_batch_size_per_gpu"]
    memory = memory_plan(model, setting.ds, world, run.optim)
    memory["activations of a micro-batch"] = max(
        activation_bytes(model, batch.to(setting.device), micro_batch) for batch in batches.values()
    )
    first = next(iter(batches.values())).to(setting.device)
    moved = traffic_plan(model, setting.ds, run.optim, first, run.activation_checkpointing in RECOMPUTING)
    if distributed.rank() == 0:
        flops = run.data.batch * _mean(model, {task: step_flops(model, each).model for task, each in batches.items()})
        tokens = run.data.batch * _mean(model, {task: _tokens(each) for task, each in batches.items()})
        few = len(next(iter(batches.values())))
        print(build.describe(run, setting, model, start=0))
        print("\nparameters")
        for name, count in parameter_counts(model).items():
            print(f"  {name:32} {count:>16,}")
        print(f"\nmemory per rank, ZeRO {ds_config.stage(setting.ds)} on {world} rank(s)")
        for name, size in memory.items():
            print(f"  {name:32} {size / 2**20:>12.1f} MiB")
        print(f"  {'together':32} {sum(memory.values()) / 2**20:>12.1f} MiB")
        _show_network(moved, world)
        size = checkpoint_bytes(model, run.optim)
        print("\ncheckpoints")
        print(f"  {'one':32} {size / 2**20:>12.1f} MiB")
        print(f"  {'on disk at most':32} {at_most(size, run.checkpoint, run.steps) / 2**20:>12.1f} MiB")
        if run.checkpoint.background:
            print(f"  {'host memory per rank, for a copy':32} {size / world / 2**20:>12.1f} MiB")
        samples = len(setting.train)
        print("\nwork")
        print(f"  {'samples per step':32} {run.data.batch:>12,}")
        print(f"  {'micro-batches per rank and step':32} {run.data.batch // (micro_batch * world):>12,}")
        print(f"  {'text tokens per step, all views':32} {round(tokens / few):>12,}")
        print(f"  {'model TFLOPs per step':32} {flops / few / 1e12:>12.3f}")
        print(f"  {'steps':32} {run.steps:>12,}")
        print(f"  {'epochs':32} {run.steps * run.data.batch / samples:>12.2f}")
        print(f"  {'time':32} {_time(flops / few / world * run.steps, setting):>12}")
    distributed.barrier()
    return DONE


def parameter_counts(model: PretrainModel) -> dict[str, int]:
    """Parameters by part, twins apart."""
    counts = {f"family.{name}": _count(child) for name, child in model.family.named_children()}
    counts |= {f"objectives.{name}": _count(child) for name, child in model.asked()}
    trainable = [each for each in model.parameters() if each.requires_grad]
    counts["trainable, all"] = sum(each.numel() for each in trainable)
    counts["momentum twin"] = sum(twin.numel() for _, twin in model.momentum_pairs())
    return {name: count for name, count in counts.items() if count}


def memory_plan(model: PretrainModel, ds: dict[str, Any], world: int, optim_config: OptimConfig) -> dict[str, int]:
    """Bytes on one rank's device by part, from the ZeRO paper's accounting (arXiv 1910.02054, section 3).

    The optimizer keeps an fp32 master (beside 16-bit weights) and its fp32 moments, two for Adam's kind and one for
    SGD; gradients are accumulated in fp32. What is offloaded is left out.
    """
    stage, size = ds_config.stage(ds), BYTES[ds_config.precision(ds)]
    zero = ds.get("zero_optimization", {})
    trainable = sum(each.numel() for each in model.parameters() if each.requires_grad)
    whole = sum(each.numel() for each in model.parameters())
    followed = sum(online.numel() for online, _ in model.momentum_pairs() if online.requires_grad)
    along = trainable - followed if followed and stage else 0  # heads in the flat buffers, see vlscale.averages
    averages = {2: followed + along, 4: along if stage == 3 else 0}[size] * 4  # an fp32 twin is its own average
    masters = trainable * 4 if size == 2 else 0
    moments = sum(
        optimizers.MOMENTS[group["rule"]] * 4 * each.numel()
        for group in groups(model.named_parameters(), optim_config)
        for each in group["params"]
    )
    return {
        "weights": 0 if "offload_param" in zero else whole * size // world if stage == 3 else (whole + along) * size,
        "gradients": trainable * 4 // (world if stage >= 2 else 1),
        "optimizer": 0 if "offload_optimizer" in zero else (masters + moments) // (world if stage >= 1 else 1),
        "momentum averages": 0 if "offload_optimizer" in zero else averages // (world if stage >= 1 else 1),
        "queues and other buffers": sum(each.numel() * each.element_size() for each in model.buffers()),
    }


def activation_bytes(model: PretrainModel, batch: Batch, samples: int) -> int:
    """Bytes that autograd keeps for a micro-batch of `samples` in fp32, measured on two and scaled up.

    A 16-bit run keeps about half of it; activation checkpointing less.
    """
    few = batch.first(MEASURED)
    kept: dict[int, int] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        made = model(few, Moment(step=1))
        model.total(made.losses, {})
    return sum(kept.values()) * samples // len(few)


def traffic_plan(
    model: PretrainModel, ds: dict[str, Any], optim_config: OptimConfig, batch: Batch, recomputes: bool = False
) -> list[Part]:
    """What each rank of the process group moves in an optimizer step; nothing for one rank, or under ZeRO++.

    What objectives exchange is seen in two passes over a few samples of the batch's task; all ranks take part.
    """
    world, zero, stage = distributed.world_size(), ds.get("zero_optimization", {}), ds_config.stage(ds)
    if world == 1 or any(zero.get(key) for key in PLUS_PLUS):
        return []
    micro_batches, size = ds["gradient_accumulation_steps"], BYTES[ds_config.precision(ds)]
    samples = (min(MEASURED, len(batch)), min(2 * MEASURED, len(batch)))
    few, more = (_volume(model, batch.first(number), micro_batches) for number in samples)
    options = Zero(
        stage=stage,
        weight=size,
        gradient=BYTES.get(ds.get("communication_data_type", ""), size),
        small=int(zero.get("stage3_param_persistence_threshold", Zero.small)),
        reuse=int(zero.get("stage3_max_reuse_distance", Zero.reuse)),
        overlap=bool(zero.get("overlap_comm", stage == 3)),
    )
    sizes, two_pass = parameter_sizes(model, optim_config), micro_batches > 1 and model.whole(batch.task)
    return [
        *engine_traffic(sizes, options, world, micro_batches, 3 if recomputes else 2, two_pass),
        *own_traffic(few, more, samples, ds["train_micro_batch_size_per_gpu"] * micro_batches),
        *agreement_traffic(len(model.counts(batch))),
    ]


def parameter_sizes(model: PretrainModel, optim_config: OptimConfig) -> Sizes:
    """How the parameters are grouped, for `traffic`; before DeepSpeed parts them."""
    made = [group["params"] for group in groups(model.named_parameters(), optim_config)]
    pairs = [(online, twin) for online, twin in model.momentum_pairs() if online.requires_grad]
    online = {id(each) for each, _ in pairs}
    return Sizes(
        groups=[[each.numel() for each in group] for group in made],
        frozen=[each.numel() for each in model.parameters() if not each.requires_grad],
        followed=[number for number, group in enumerate(made) if any(id(each) in online for each in group)],
        twin=[twin.numel() for _, twin in pairs],
    )


def _volume(model: PretrainModel, batch: Batch, micro_batches: int) -> dict[str, int]:
    """Bytes by collective of a forward and backward pass, and of the moves that follow it."""
    volume = Volume()
    end = distributed.record(volume)
    made = model(batch, Moment(step=1, of=micro_batches))
    model.total(made.losses, {}).backward()  # type: ignore[no-untyped-call]
    model.commit([made.keys], 1, "step")
    end()
    model.zero_grad(set_to_none=True)
    return volume.bytes


def _show_network(moved: list[Part], world: int) -> None:
    if not moved:
        return
    print("\nnetwork, sent and received by each rank in a step")
    for part in moved:
        print(f"  {f'{part.name}, {part.how}':48} {part.sent(world) / 1e9:>12.6f} GB")
    print(f"  {'together':48} {sum(part.sent(world) for part in moved) / 1e9:>12.6f} GB")


def _tokens(batch: Batch) -> int:
    return sum(int(text.mask.sum()) for text in batch.text.values())


def _mean(model: PretrainModel, values: dict[str, int]) -> float:
    """Of a figure by task, weighed by the tasks' shares."""
    shares = {task: model.tasks[task].share for task in values}
    return sum(shares[task] * value for task, value in values.items()) / sum(shares.values())


def _count(module: nn.Module) -> int:
    return sum(each.numel() for each in module.parameters() if each.requires_grad)


def _time(flops_per_rank: float, setting: build.Setting) -> str:
    if setting.device.type != "cuda":
        return "unknown on a CPU; a few steps will tell"
    peak = peak_flops(torch.cuda.get_device_name(setting.device), ds_config.precision(setting.ds))
    if peak is None:
        return "unknown for this GPU"
    return f"{flops_per_rank / (peak * ASSUMED_MFU) / 3600:.1f} h at {ASSUMED_MFU:.0%} of the GPU's peak"
