"""The loop: `train` is a whole run, read top to bottom."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vlscale import build, distributed, optim, two_pass
from vlscale.build import Request
from vlscale.config import RunConfig
from vlscale.engine import Engine, StepReport
from vlscale.errors import DONE, STOPPED
from vlscale.model import PretrainModel
from vlscale.monitor import Monitor
from vlscale.nn import momentum
from vlscale.record import Record
from vlscale.stop import StopGuard
from vlscale.types import Batch, Loss, Moment, Visual
from vlscale.watchdog import Watchdog, limits


def train(request: Request) -> int:
    """Train to `steps`, or until asked to stop; returns the exit code. Every rank runs this."""
    watched = limits(request.run.watchdog, request.run.data)
    guard = StopGuard(patience=watched.step)  # stays open until the process ends
    with Watchdog(watched, request.out) as watchdog, ExitStack() as ends:
        return DONE if build.finished(request) else _train(request, guard, watchdog, ends)


def _train(request: Request, guard: StopGuard, watchdog: Watchdog, ends: ExitStack) -> int:
    run = request.run
    setting = build.setup(request)
    watchdog.at("building")
    notes: list[str] = []
    model = build.build_model(run, notes.append, setting.tokenizer)
    setting = build.within_budget(run, setting, model)
    loader = build.build_loader(run, setting, model)
    machine = build.build_engine(run, setting, model)
    start = setting.begin.step if setting.begin else 0
    if setting.begin:
        setting.begin.restore(machine)
    build.write_folder(run, setting)
    watchdog.listen(setting.out)
    monitor = Monitor(
        setting.out, steps=run.steps, start=start, rank=distributed.rank(), tensorboard=run.logging.tensorboard
    )
    ends.callback(monitor.close)
    for warning in setting.warnings:
        monitor.warn(warning)
    monitor.say(build.describe(run, setting, model, start))
    for note in notes if not start else ():
        monitor.say(note)
    vote = distributed.StopVote()
    plans = distributed.StepPlans()
    record = Record(run, setting, model, loader, monitor, watchdog)
    ends.callback(record.close)
    if start and evaluation_due(run, start) and not record.evaluated(start):
        record.evaluate(start)  # the last start did not come to it

    for step, micro_batches in record.timed(start, run.steps):
        watchdog.at("step", step)
        record.step(step, *one_step(run, model, machine, plans, step, micro_batches))
        if step == start + 1:
            record.reserve(machine)
        if record.spike and not record.end and record.roll_back(step, machine):
            continue

        wishes, slowest = vote.agreed(int(guard.requested), -record.saver.halves)  # the greatest of all ranks'
        record.saver.go_on(-slowest)
        stopping, last = wishes > 0, step == run.steps
        if stopping or last:
            guard.heed()
        if last or stopping or record.end or step % run.checkpoint.every == 0:
            record.save(step, machine, last=last or stopping)
        if record.end:
            record.saver.finish()
            raise record.end
        if stopping:
            by = guard.reason or "another rank's signal"
            monitor.say(f"stopped at step {step} by {by}; the same command goes on from there")
            return STOPPED
        if evaluation_due(run, step):
            record.evaluate(step)  # after the save, which its failure cannot cost
        watchdog.at("data", step + 1)
    monitor.say(f"done: {run.steps} steps, in {setting.out}")
    return DONE


def evaluation_due(run: RunConfig, step: int) -> bool:
    """Whether the validation shards are evaluated after this step."""
    return step == run.steps or bool(run.evaluation.every and step % run.evaluation.every == 0)


class StepResult(NamedTuple):
    """What an optimizer step saw and gave; one entry per micro-batch of this rank."""

    batches: list[Batch]  # on the device
    losses: list[dict[str, Loss]]
    shares: list[dict[str, Tensor]]
    report: StepReport


def one_step(
    run: RunConfig,
    model: PretrainModel,
    machine: Engine,
    plans: distributed.StepPlans,
    step: int,
    micro_batches: Sequence[Batch],
) -> StepResult:
    """Forward, backward, update, and the moves that follow the update; nothing is said or saved."""
    seed_step(run.seed, step)
    if model.twin is not None and run.momentum.drop_layers > 0:
        momentum.drop_layers(model.twin, run.momentum.drop_layers, run.seed, step, run.momentum.drop_every)
    task = micro_batches[0].task
    plans.check(step, step_plan(model, task, micro_batches))
    batches = [batch.to(machine.device) for batch in micro_batches]
    moments = [Moment(step, run.seed, number, len(batches)) for number in range(len(batches))]
    shares = step_shares(model, batches)
    if len(batches) > 1 and model.whole(task):
        passes = two_pass.passes(model, machine, batches, moments, shares)
    else:
        passes = []
        for number, batch in enumerate(batches):
            made = machine.forward(batch, moments[number])
            machine.backward(model.total(made.losses, shares[number]), last=number == len(batches) - 1)
            model.commit([made.keys], step, "micro_batch")
            passes.append(made)
    report = machine.step(optim.lr_at(step, run.optim, run.steps))
    if not report.applied:
        model.forget()
    else:
        model.commit([made.keys for made in passes], step, "step")
        machine.after_step(momentum.coefficient(step, run.momentum.coefficient, run.momentum.schedule, run.steps))
    return StepResult(batches, [made.losses for made in passes], shares, report)


def seed_step(seed: int, step: int) -> None:
    """Fix every draw that the model makes in this step (dropout, hard negatives), so that resuming is exact."""
    words = np.random.SeedSequence([seed, step, distributed.rank()]).generate_state(1, np.uint64)
    word = int(words[0] >> np.uint64(1))
    torch.default_generator.manual_seed(word)  # torch.manual_seed also asks for every other kind of device: 0.5 ms
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed(word)


def step_plan(model: PretrainModel, task: str, micro_batches: Sequence[Batch]) -> dict[str, str]:
    """What every rank must be about to do alike; texts, regions and pictures may be of other lengths and shapes."""
    first = micro_batches[0]
    samples = {"samples": ", ".join(str(len(batch)) for batch in micro_batches)} if model.even(task) else {}
    return {
        "task": task,
        "objectives": ", ".join(name for name, _ in model.asked(task)),
        "micro-batches": str(len(micro_batches)),
        **samples,
        "text views": ", ".join(sorted(first.text)),
        "visual views": ", ".join(f"{view} {_shape(visual)}" for view, visual in sorted(first.visual.items())),
    }


def _shape(visual: Visual) -> str:
    """(C, H, W) of pixels, (C,) where pictures keep their own shapes, (F,) of regions and frames."""
    shape = visual.feats.shape
    if visual.feats.ndim == 3:
        return str(tuple(shape[2:]))
    return str(tuple(shape[1:2] if visual.feats.ndim == 4 and visual.mask is not None else shape[1:]))


def step_shares(model: PretrainModel, batches: Sequence[Batch]) -> list[dict[str, Tensor]]:
    """Per micro-batch, {objective: its count of terms over the mean count of the step's micro-batches}."""
    passes = len(batches) * distributed.world_size()
    if passes == 1:
        return [{}]
    counts = [model.counts(batch) for batch in batches]
    own = {name: torch.stack([count[name] for count in counts]).sum() for name in counts[0]}
    whole = distributed.sum_over_ranks(own)
    return [
        {name: (each * passes / whole[name].clamp(min=1)).float() for name, each in count.items()} for count in counts
    ]
