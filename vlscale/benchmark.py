"""How fast a recipe runs here, what memory it takes, and what our loop costs on top of a bare DeepSpeed loop.

What is timed is `train.one_step` between the loader and the record, as in `train.train`; nothing is left behind.
"""

from __future__ import annotations

import contextlib
import io
import os
import platform
import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from vlscale import build, distributed, ds_config, throughput, train
from vlscale.build import Request, Setting
from vlscale.engine import DeepSpeedEngine
from vlscale.errors import ConfigError, did_you_mean
from vlscale.flops import peak_flops, step_flops
from vlscale.model import PretrainModel
from vlscale.monitor import Monitor
from vlscale.nn import momentum
from vlscale.options import WatchdogConfig
from vlscale.record import Record
from vlscale.stop import StopGuard
from vlscale.types import Batch, Moment
from vlscale.watchdog import Watchdog

AGAINST = ("bare",)
Steps = Generator[tuple[int, list[Batch]], None, None]


class Lap(NamedTuple):
    """One timed step of this rank."""

    begin: Any  # marks of a `_Watch`
    end: Any
    waited: float  # seconds for the loader
    cpu: float  # processor seconds of this process, all threads


class Work(NamedTuple):
    """What a step's micro-batches hold, on this rank."""

    samples: int
    model_flops: int
    hardware_flops: int
    tokens: int
    filled: int  # places of words and regions that are no padding
    places: int


class Loop(Protocol):
    """One of the loops that are compared."""

    steps: Steps

    def step(self, step: int, micro_batches: Sequence[Batch]) -> bool:
        """Everything that this loop does with a step's micro-batches; True if it was asked to stop."""
        ...


class OurLoop:
    """What `train.train` does with every step, checkpoints and evaluations apart."""

    def __init__(self, parts: _Parts, total: int, record: Record) -> None:
        self._parts = parts
        self._record = record
        self._vote = distributed.StopVote()
        self._plans = distributed.StepPlans()
        self.steps: Steps = record.timed(0, total)

    def step(self, step: int, micro_batches: Sequence[Batch]) -> bool:
        """See `Loop.step`."""
        request, _, model, machine, guard = self._parts
        self._record.step(step, *train.one_step(request.run, model, machine, self._plans, step, micro_batches))
        return any(self._vote.agreed(guard.requested))


class BareLoop:
    """The loop of DeepSpeed's own examples: forward, backward, step, and the moves that the method needs.

    No seed per step, no learning rate, no norm, no losses read, no vote, no mean over unequal micro-batches.
    """

    def __init__(self, parts: _Parts, steps: Steps) -> None:
        self._parts = parts
        self.steps: Steps = steps

    def step(self, step: int, micro_batches: Sequence[Batch]) -> bool:
        """See `Loop.step`."""
        request, setting, model, machine, _ = self._parts
        run, engine = request.run, machine.deepspeed
        keys = []
        for number, each in enumerate(micro_batches):
            batch = each.to(setting.device)
            made = engine(batch, Moment(step, run.seed, number, len(micro_batches)))
            engine.set_gradient_accumulation_boundary(number == len(micro_batches) - 1)
            engine.backward(model.total(made.losses, {}))
            engine.step()
            keys.append(made.keys)
        model.commit(keys, step, "step")
        machine.after_step(momentum.coefficient(step, run.momentum.coefficient, run.momentum.schedule, run.steps))
        return False


class _Parts(NamedTuple):
    request: Request
    setting: Setting
    model: PretrainModel
    machine: DeepSpeedEngine
    guard: StopGuard


def benchmark(request: Request, *, steps: int = 50, warmup: int = 10, against: str | None = None) -> dict[str, Any]:
    """Run `warmup` + `steps` steps of a recipe and say how they went; every rank runs this and gets the same.

    Args:
        request: as for training; `out` and `resume` are not looked at, and no run folder is made.
        steps: steps that count.
        warmup: steps before them.
        against: `bare` interleaves blocks of as many steps of `BareLoop` on the same model, with a loader of
            its own that gives the same batches. A block is as long as `logging.every`, so that each block of
            ours holds one log line; `steps` is rounded up to whole blocks.

    Returns:
        The figures, ready for JSON (docs/benchmarks.md explains each); empty if it was stopped.

    Raises:
        ConfigError: no such comparison, or too few steps.
    """
    if against is not None and against not in AGAINST:
        raise ConfigError(f"--against {against}: no such loop{did_you_mean(against, AGAINST)}")
    if steps < 1 or warmup < 1:
        raise ConfigError(f"--steps and --warmup should be at least 1 (got {steps} and {warmup})")
    run = request.run
    request = replace(request, out=None, resume="never")
    guard = StopGuard()
    load_before = _load_average()
    setting = build.setup(request)
    model = build.build_model(run)
    setting = build.within_budget(run, setting, model)
    parts = _Parts(request, setting, model, build.build_engine(run, setting, model), guard)
    block = run.logging.every if against else 1
    blocks = -(-steps // block)
    with ExitStack() as open_things:
        scratch = Path(open_things.enter_context(TemporaryDirectory()))
        loops = _loops(parts, warmup + blocks * block, scratch, open_things, against)
        before = _start_memory(setting.device)
        laps, work = _interleave(loops, parts, warmup, block, blocks)
        if not laps:
            return {}
        peak = _peak_memory(setting.device)
    figures = {
        **_what(parts, steps=blocks * block, warmup=warmup),
        **_speed(laps[0], work, parts),
        **_memory(before, peak),
        "against": _compare(laps, block, against) if against else None,
        "machine": {**_machine(setting.device), "load_average": [load_before, _load_average()]},
    }
    return figures


def _loops(parts: _Parts, total: int, scratch: Path, open_things: ExitStack, against: str | None) -> list[Loop]:
    request, setting, model, _, _ = parts
    loader = build.build_loader(request.run, setting, model)
    monitor = Monitor(
        scratch / str(distributed.rank()),
        steps=request.run.steps,
        start=0,
        rank=distributed.rank(),
        tensorboard=request.run.logging.tensorboard,
        console=io.StringIO(),
    )
    open_things.callback(monitor.close)
    watchdog = open_things.enter_context(Watchdog(WatchdogConfig(start=0, step=0), None))
    ours = OurLoop(parts, total, Record(request.run, setting, model, loader, monitor, watchdog))
    open_things.callback(ours.steps.close)
    loops: list[Loop] = [ours]
    if against:
        same = build.build_loader(request.run, setting, model).steps(0, total)
        loops.append(BareLoop(parts, open_things.enter_context(closing(same))))
    return loops


def _interleave(
    loops: Sequence[Loop], parts: _Parts, warmup: int, block: int, blocks: int
) -> tuple[list[list[Lap]], list[Work]]:
    """Per loop its timed laps, in blocks that take turns; and what the first loop's steps held."""
    watch = _Watch(parts.setting.device)
    laps: list[list[Lap]] = [[] for _ in loops]
    work: list[Work] = []
    for number in range(blocks + 1):
        for loop, own in zip(loops, laps, strict=True):
            for _ in range(block if number else warmup):
                lap, held, stopping = _lap(loop, watch)
                if stopping:
                    return [], []
                if number:
                    own.append(lap)
                    if loop is loops[0]:
                        work.append(_work(parts, *held))
    return laps, work


def _lap(loop: Loop, watch: _Watch) -> tuple[Lap, tuple[int, list[Batch]], bool]:
    cpu, begin, began = time.process_time(), watch.mark(), time.perf_counter()
    step, micro_batches = next(loop.steps)
    waited = time.perf_counter() - began
    stopping = loop.step(step, micro_batches)
    return Lap(begin, watch.mark(), waited, time.process_time() - cpu), (step, micro_batches), stopping


def _work(parts: _Parts, step: int, micro_batches: Sequence[Batch]) -> Work:
    run = parts.request.run
    mode = run.activation_checkpointing
    flops = [step_flops(parts.model, batch, mode) for batch in micro_batches]
    masks = [mask for batch in micro_batches for mask in batch.masks()]
    return Work(
        samples=sum(map(len, micro_batches)),
        model_flops=sum(each.model for each in flops),
        hardware_flops=sum(each.hardware for each in flops),
        tokens=sum(int(text.mask.sum()) for batch in micro_batches for text in batch.text.values()),
        filled=sum(int(mask.sum()) for mask in masks),
        places=sum(mask.numel() for mask in masks),
    )


class _Watch:
    """Times between two marks: on a GPU by its own clock, so that no step waits to be timed."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


def seconds(begin: Any, end: Any) -> float:
    """Between two marks."""
    if isinstance(begin, float):
        return float(end - begin)
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


# --- figures -----------------------------------------------------------------------------------------------


def _speed(laps: Sequence[Lap], work: Sequence[Work], parts: _Parts) -> dict[str, Any]:
    setting = parts.setting
    ranks = distributed.world_size()
    peak = None
    if setting.device.type == "cuda":
        peak = peak_flops(torch.cuda.get_device_name(setting.device), ds_config.precision(setting.ds))
    whole = [_over_ranks(each) for each in work]
    took = np.array([seconds(lap.begin, lap.end) for lap in laps])
    samples, model, hardware, tokens, filled, places = (
        np.array(column, dtype=float) for column in zip(*whole, strict=True)
    )
    rates = {
        "seconds_per_step": took,
        "samples_per_second": samples / took,
        "tokens_per_second": tokens / took,
        "data_wait_fraction": np.array([lap.waited for lap in laps]) / took,
        "cpu_seconds_per_step": np.array([lap.cpu for lap in laps]),
        "model_tflops_per_second": model / took / 1e12,
        "hardware_tflops_per_second": hardware / took / 1e12,
    }
    return {
        **{name: spread(values) for name, values in rates.items()},
        "mfu": spread(model / took / (ranks * peak)) if peak else None,
        "hfu": spread(hardware / took / (ranks * peak)) if peak else None,
        "model_tflops_per_step": float(model.mean()) / 1e12,
        "hardware_tflops_per_step": float(hardware.mean()) / 1e12,
        "padding_fraction": float(1 - filled.sum() / places.sum()) if places.sum() else 0.0,
    }


def _over_ranks(work: Work) -> list[float]:
    own = {name: torch.tensor(float(value)) for name, value in work._asdict().items()}
    on_device = {name: value.to(_message_device()) for name, value in own.items()}
    return [float(value) for value in distributed.sum_over_ranks(on_device).values()]


def _message_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def spread(values: Any) -> dict[str, float]:
    """Median, p10 and p90."""
    low, middle, high = np.percentile(values, [10, 50, 90])
    return {"median": float(middle), "p10": float(low), "p90": float(high)}


def _compare(laps: Sequence[Sequence[Lap]], block: int, against: str) -> dict[str, Any]:
    """Blocks of ours over the blocks of the other loop that followed them."""
    took = [np.array([seconds(lap.begin, lap.end) for lap in own]).reshape(-1, block).mean(axis=1) for own in laps]
    cpu = [np.array([lap.cpu for lap in own]).reshape(-1, block).mean(axis=1) for own in laps]
    return {
        "name": against,
        "ratio": float(np.median(took[0]) / np.median(took[1])),
        "ratio_of_pairs": spread(took[0] / took[1]),
        "cpu_ratio": float(np.median(cpu[0]) / np.median(cpu[1])),
        "cpu_ratio_of_pairs": spread(cpu[0] / cpu[1]),
        "ours_seconds_per_step": spread(took[0]),
        "bare_seconds_per_step": spread(took[1]),
        "pairs": len(took[0]),
        "steps_per_block": block,
    }


def _memory(before: int, peak: int) -> dict[str, Any]:
    """Of the rank that needed most."""
    everywhere: list[Any] = distributed.gather_objects((peak, before))
    peak, before = max(everywhere)
    return {
        "memory_before_bytes": before,
        "memory_peak_bytes": peak,
        "memory_growth_bytes": peak - before,
    }


def _start_memory(device: torch.device) -> int:
    """Bytes in use now; the high-water mark starts anew here where the system lets it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):  # not on this system
            Path("/proc/self/clear_refs").write_text("5")  # Linux: VmHWM falls back to VmRSS
    return int(throughput.memory(device)["memory_allocated_bytes"] or 0)


def _peak_memory(device: torch.device) -> int:
    if device.type != "cuda":
        with contextlib.suppress(OSError, StopIteration):
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    return int(throughput.memory(device)["memory_peak_bytes"] or 0)


def _what(parts: _Parts, steps: int, warmup: int) -> dict[str, Any]:
    run, ds = parts.request.run, parts.setting.ds
    return {
        "recipe": run.recipe,
        "family": run.family_name,
        "objectives": list(run.objectives),
        "ds_config": parts.request.ds_path,
        "zero_stage": ds_config.stage(ds),
        "precision": ds_config.precision(ds),
        "activation_checkpointing": run.activation_checkpointing,
        "ranks": distributed.world_size(),
        "batch": run.data.batch,
        "micro_batch": ds["train_micro_batch_size_per_gpu"],
        "trainable_parameters": sum(each.numel() for each in parts.model.parameters() if each.requires_grad),
        "steps": steps,
        "warmup": warmup,
    }


def _machine(device: torch.device) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in ("torch", "deepspeed")},
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, None) or platform.processor() or platform.machine()


def _load_average() -> float | None:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None
