"""What a run measures, says and saves along the way."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from vlscale import agreement, build, config, distributed, ds_config, non_finite, optim
from vlscale.build import Setting
from vlscale.config import RunConfig
from vlscale.data import bad as bad_data
from vlscale.data.bad import BadSamples, Budget
from vlscale.data.loader import Loader
from vlscale.engine import Engine, StepReport
from vlscale.errors import CheckpointError, DataError, TrainingError, VlscaleError
from vlscale.evaluation.base import Found, HeldOut, usual_task
from vlscale.flops import peak_flops, step_flops
from vlscale.lines import Lines
from vlscale.model import PretrainModel
from vlscale.monitor import Monitor, evaluated
from vlscale.non_finite import Window
from vlscale.saving import checkpoint
from vlscale.saving.background import Saved, Saver
from vlscale.spikes import Spikes
from vlscale.throughput import StepClock, Stragglers
from vlscale.types import Batch, Loss, Moment
from vlscale.watchdog import Watchdog

Served = tuple[int, list[Batch]]  # a step and this rank's micro-batches


class Record:
    """What is measured, said and saved along the way."""

    def __init__(
        self,
        run: RunConfig,
        setting: Setting,
        model: PretrainModel,
        loader: Loader,
        monitor: Monitor,
        watchdog: Watchdog,
    ) -> None:
        self._watchdog = watchdog
        watchdog.workers = loader.working
        self._run, self._setting, self._model, self._loader, self._monitor = (
            run,
            setting,
            model,
            loader,
            monitor,
        )
        self._peak = None
        if setting.device.type == "cuda":
            name = torch.cuda.get_device_name(setting.device)
            self._peak = peak_flops(name, ds_config.precision(setting.ds))
        self._scales = {group["name"]: group["scale"] for group in optim.groups(model.named_parameters(), run.optim)}
        self._clock = StepClock(setting.device, lambda: watchdog.collectives.seconds)
        self._stragglers = Stragglers()
        begin = setting.begin.state if setting.begin else {}
        self._go_on(begin)
        self._bad = BadSamples(setting.out / bad_data.FILE) if distributed.rank() == 0 else None
        self._bad_steps = Lines(setting.out / non_finite.FILE)
        self._forget_after(begin.get("step", 0))
        self._rolled_back: int = begin.get("rolled_back", 0)
        self._go_on_from_roll_back(begin.get("step", 0))
        self._target = checkpoint.target(setting.out, run.checkpoint.to)
        self.saver = Saver(self._target, run.checkpoint, self._saved, monitor.warn, watchdog.beat)
        self.saver.newest = begin.get("step")
        self.end: VlscaleError | None = None  # what ends the run, once it should
        self.spike = False  # one began at this step, and the run should go back
        self._back: int | None = None  # the step that it went back to

    def _go_on(self, state: Mapping[str, Any]) -> None:
        """Take up what a checkpoint's `state` holds of this; empty = from the start."""
        self._skipped = int(state.get("skipped_steps", 0))
        self._window = Window(self._run.non_finite, state.get("non_finite", ()))
        self._spikes = Spikes(self._run.spikes, state.get("spikes"))

    def _go_on_from_roll_back(self, step: int) -> None:
        """Take up a roll-back to `step` or before that no checkpoint has been written after."""
        told = agreement.by_rank_0(lambda: json.dumps(non_finite.last_roll_back(self._setting.out, step)))
        last = json.loads(told)
        if last and last["rolled_back"] > self._rolled_back:
            self._rolled_back = last["rolled_back"]
            self._loader.left_out = [(after, steps) for after, steps in last["left_out"]]

    def _forget_after(self, step: int) -> None:
        """Take the lines of later steps out of bad_steps.jsonl."""
        if distributed.rank() == 0 and (problem := self._bad_steps.forget_after(step)):
            self._monitor.warn(problem)

    def timed(self, start: int, stop: int) -> Generator[Served, None, None]:
        """The loader's steps, after a `roll_back` those from there on, with the time spent waiting for them noted."""
        try:
            while start < stop:
                self._back = None
                with closing(self._loader.steps(start, stop)) as steps:
                    for served in self._clock.waiting(steps):
                        yield served
                        if self._back is not None:
                            break
                start = stop if self._back is None else self._back
        except DataError:
            if self._bad:
                self._bad.add(self._loader.take_bad())  # of this rank; the others may be gone
            raise

    def step(
        self,
        step: int,
        batches: Sequence[Batch],
        losses: Sequence[Mapping[str, Loss]],
        shares: Sequence[Mapping[str, Tensor]],
        report: StepReport,
    ) -> None:
        """Note a step; at log steps, write its line."""
        self._skipped += not report.applied
        if non_finite.is_bad(report, losses):
            self._bad_step(step, batches, losses)
        self._clock.step(batches)
        run = self._run
        if step % run.logging.every and step not in (1, run.steps):
            return
        ranks = distributed.world_size()
        seen = self._loader.served(step)
        values: dict[str, Any] = {
            "samples_seen": seen,
            "epoch": self._loader.order.epoch(seen),
            **self._passes(seen),
            "task": batches[0].task,
            **mean_losses(self._model, losses, shares),
            **self._queues(step),
        }
        lr = optim.lr_at(step, run.optim, run.steps)
        values |= {f"lr/{name}": lr * scale for name, scale in self._scales.items()}
        values["grad_norm"] = report.grad_norm
        if report.loss_scale is not None:
            values["loss_scale"] = report.loss_scale
        flops = sum(step_flops(self._model, batch).model for batch in batches)
        values |= self._clock.read(ranks=ranks, flops=flops, peak=self._peak)
        values["skipped_steps"] = self._skipped
        values["bad_samples"] = self._bad_samples(step)
        if run.logging.sample_keys:
            values["sample_keys"] = global_keys(batches)
        self._monitor.scalars(step, values)
        odd = [name for name in values if name.partition("/")[0] == "loss" and not math.isfinite(values[name])]
        if odd and report.applied:
            self._warn(f"step {step}: {', '.join(odd)} is not finite, but the gradients are; it was applied")
        if ranks > 1 and (slow := self._stragglers.judge(values)):
            self._warn(slow)
        if sentence := self._spikes.judge(step, values["task"], values["loss"]):
            self._warn(sentence)
            self.spike = run.spikes.roll_back

    def roll_back(self, step: int, machine: Engine) -> bool:
        """Go on from the newest checkpoint before the spike at `step`, past the data that led to it, if there is one.

        Raises:
            TrainingError: `spikes.budget` is spent.
            CheckpointError: later checkpoints cannot be removed.
        """
        self.spike = False
        self._watchdog.at("going back", step)
        self.saver.finish()
        try:
            found = checkpoint.newest(self._target, self._monitor.say, until=self._spikes.fine)
        except CheckpointError:
            found = None
        if found is None:
            self._warn("there is no good checkpoint from before the spike: the run goes on as it is")
            return False
        checkpoint.go_back(self._target, found.step)
        if self._rolled_back >= self._run.spikes.budget:
            raise TrainingError(
                f"the loss spikes once more at step {step}, after spikes.budget={self._run.spikes.budget} roll-backs; "
                f"lower optim.lr, or write a larger spikes.budget; the same command goes on from step {found.step}"
            )
        found.restore(machine)
        first, end = self._loader.leave_out(found.step, step)
        self._rolled_back += 1
        self._go_on(found.state)
        self.saver.newest = found.step
        self._monitor.go_back(found.step)
        self._forget_after(found.step)
        places = {"positions": [first, end], "left_out": self._loader.left_out}
        self._note({"step": found.step, "spike": step, "rolled_back": self._rolled_back, **places})
        self._warn(
            f"back at step {found.step}; the samples at positions {first} to {end - 1} are left out from now on "
            f"(roll-back {self._rolled_back} of {self._run.spikes.budget})"
        )
        self._clock.skip()
        self._back = found.step
        return True

    def _note(self, line: Mapping[str, Any]) -> None:
        """A line of bad_steps.jsonl."""
        if distributed.rank() == 0 and (problem := self._bad_steps.add(json.dumps(line, allow_nan=False) + "\n")):
            self._monitor.warn(problem)

    def _warn(self, message: str) -> None:
        """Of what all ranks find."""
        if distributed.rank() == 0:
            self._monitor.warn(message)

    def _bad_step(self, step: int, batches: Sequence[Batch], losses: Sequence[Mapping[str, Loss]]) -> None:
        """Write down what a skipped step was made of; too many of them end the run."""
        moments = [Moment(step, self._run.seed, number, len(batches)) for number in range(len(batches))]
        found = non_finite.findings(self._model, self._loader.shards_of, batches, moments, losses)
        self._note({"step": step, "task": batches[0].task, "grad_norm": None, "micro_batches": found})
        self._warn(non_finite.message(step, found))
        self._window.add(step)
        if self._window.spent():
            self.end = TrainingError(self._window.refusal(self._setting.out / non_finite.FILE))

    def reserve(self, machine: Engine) -> None:
        """Take the memory for saves, once the optimizer has its moments: after the first step."""
        self.saver.reserve(machine.pieces())
        self._clock.skip()

    def save(self, step: int, machine: Engine, last: bool = False) -> None:
        """Write a checkpoint, in the background but for the `last`.

        Raises:
            TrainingError: the ranks' key queues have come to differ, or too many saves have failed.
            CheckpointError: the last has failed.
        """
        began = time.perf_counter()
        self._watchdog.at("checkpoint", step)
        agreement.same_settings("what the ranks keep", self._model.queue_digests())
        loader = {**self._loader.state(), "bad_samples": self._bad_samples(step)}
        state = {
            "step": step,
            "world_size": distributed.world_size(),
            "zero_stage": ds_config.stage(self._setting.ds),
            "precision": ds_config.precision(self._setting.ds),
            "engine": machine.scalars(),
            "loader": loader,
            "skipped_steps": self._skipped,
            "non_finite": self._window.state(),
            "spikes": self._spikes.state(),
            "rolled_back": self._rolled_back,
        }
        self.saver.start(step, machine.pieces(), state, began)
        if last:
            self.saver.finish(last=True)
        self._clock.skip()

    def _saved(self, saved: Saved) -> None:
        if not saved.failure:
            figures = {"stall_seconds": saved.stall_seconds, "seconds": saved.seconds, "bytes": saved.bytes}
            self._monitor.scalars(saved.step, {f"checkpoint/{name}": value for name, value in figures.items()})

    def evaluated(self, step: int) -> bool:
        """Whether the run has figures of `evaluate` at this step, of this start or an earlier one."""
        return distributed.greatest(int(evaluated(self._setting.out, step))) > 0

    def close(self) -> None:
        """Give up a save under way; say what has not been said yet. Asks nothing of other ranks."""
        self.saver.close()
        for message in self._bad.rest() if self._bad else ():
            self._monitor.warn(message)
        self._bad_steps.close()

    def _bad_samples(self, step: int) -> int:
        """How many were skipped so far on all ranks; rank 0 names the new ones, and all learn if they are too many."""
        own = self._loader.bad_samples, tuple(dict.fromkeys(self._loader.take_bad()))
        everyone: list[Any] = distributed.gather_objects(own)
        count: int = sum(each for each, _ in everyone)
        found = [bad for _, fresh in everyone for bad in fresh]
        for message in self._bad.add(found) if self._bad else ():
            self._monitor.warn(message)
        data, seen = self._run.data, self._loader.served(step)
        budget = Budget(data.bad_budget, data.bad_always)
        if found and budget.spent(count, seen):
            self.end = DataError(budget.refusal(count, seen, found[-1], self._setting.out / bad_data.FILE))
        return count

    def _passes(self, samples: int) -> dict[str, float]:
        """`epoch/<source>`: how often each source was gone through, where weights mix several."""
        order = self._loader.order
        mixed = len(order.sources) > 1
        return {f"epoch/{name}": passes for name, passes in order.passes(samples).items()} if mixed else {}

    def _queues(self, step: int) -> dict[str, float]:
        """How full and how old the key queues are; of sharded ones, the mean over ranks."""
        sums = distributed.sum_over_ranks(self._model.queue_metrics(step))
        return {name: float(value) / distributed.world_size() for name, value in sums.items()}

    def evaluate(self, step: int) -> None:
        """Measure the model on the validation shards by its family's usual task."""
        self._watchdog.at("evaluation", step)
        setting = self._setting
        held = HeldOut(
            self._model,
            setting.device,
            setting.val,
            setting.tokenizer,
            build.preprocessing(self._run, setting.answers, self._model),
            batch=setting.ds["train_micro_batch_size_per_gpu"],
            limit=self._run.evaluation.limit,
            windows=self._run.evaluation.windows,
            beat=self._watchdog.beat,
        )
        found: Found = config.pick("evaluation", usual_task(self._model.family)).measure(held)
        self._monitor.scalars(step, found.metrics)
        self._monitor.pictures(step, found.examples)
        self._clock.skip()


def mean_losses(
    model: PretrainModel, losses: Sequence[Mapping[str, Loss]], shares: Sequence[Mapping[str, Tensor]]
) -> dict[str, float]:
    """`loss`, `loss/<objective>` and the objectives' own figures, averaged over the step's whole batch."""
    passes = len(losses) * distributed.world_size()
    sums: dict[str, Tensor] = {}
    for each, share in zip(losses, shares, strict=True):
        parts = {f"loss/{name}": loss.value * share.get(name, 1.0) for name, loss in each.items()}
        parts["loss"] = model.total(each, share)
        for name, loss in each.items():
            parts |= {figure: value * share.get(name, 1.0) for figure, value in loss.metrics.items()}
        for name, value in parts.items():
            sums[name] = sums.get(name, 0.0) + value.detach().double().reshape(())
    return {name: float(value) / passes for name, value in distributed.sum_over_ranks(sums).items()}


def global_keys(batches: Sequence[Batch]) -> list[str]:
    """The keys of the step's samples in global order, that of their positions."""
    mine = [pair for batch in batches for pair in zip(batch.positions, batch.keys, strict=True)]
    everywhere: list[Any] = distributed.gather_objects(mine)
    return [key for _, key in sorted(pair for pairs in everywhere for pair in pairs)]
