"""`--replay RUN:STEP`: one step of a run made again from its newest checkpoint before, and looked into.

Nothing is written into the run folder. Hooks on modules and parameters are set for that one step alone.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vlscale import build, config, distributed, ds_config, non_finite, optim, train
from vlscale.build import Request
from vlscale.data.samples import printable
from vlscale.errors import DONE, STOPPED, CheckpointError, ConfigError
from vlscale.lines import read
from vlscale.model import PretrainModel
from vlscale.optim import OptimConfig
from vlscale.run_folder import CONFIG, DS_CONFIG, ENVIRONMENT, METRICS
from vlscale.saving.targets import write_atomically
from vlscale.stop import StopGuard
from vlscale.types import Moment
from vlscale.watchdog import Watchdog, limits

SHOWN = 20  # parameters that the table names
Found = dict[str, Any]


def show(where: str, file: str | None, leave: Sequence[str] = ()) -> int:
    """Replay `where` (RUN:STEP), print what was found, write it to `file` as JSON; returns the exit code.

    The same number of ranks gives the same numbers; on others only the samples are the same. `leave` may hold
    `data.pipe=true`, which no run folder remembers. Every rank runs this.

    Raises:
        ConfigError: there is no such run, or no such step in it, or no folder for `file`.
        CheckpointError: its checkpoints are all broken, or it goes on from another run's and has none so early.
    """
    out, step = parse(where)
    run = config.load(str(out / CONFIG), leave)
    if file is not None and not Path(file).absolute().parent.is_dir():
        raise ConfigError(f"--json {file}: there is no folder {Path(file).parent}")
    if step > run.steps:
        raise ConfigError(f"--replay {where}: the run has {run.steps} steps")
    with tempfile.TemporaryDirectory() as folder:
        given = ds_config.load(str(out / DS_CONFIG))
        free = ds_config.COUNTS if run.data.tokens is not None else ds_config.COUNTS[2:]  # ranks may be others
        ds = Path(folder) / "ds_config.json"
        ds.write_text(json.dumps({key: value for key, value in given.items() if key not in free}))
        watched = limits(run.watchdog, run.data)
        guard = StopGuard(patience=watched.step)
        with Watchdog(watched, None) as watchdog:
            found = _replay(Request(run, str(ds), out, until=step - 1), step, guard, watchdog)
    if found is None:
        return STOPPED
    if distributed.rank() == 0:
        print("\n".join(table(out, found)))
        if file is not None:
            write_atomically(Path(file), json.dumps(found, indent=1, allow_nan=False) + "\n")
    distributed.barrier()
    return DONE


def parse(where: str) -> tuple[Path, int]:
    """RUN:STEP as (run folder, step). ConfigError if it is none."""
    out, _, number = where.rpartition(":")
    if not (out and number.isdecimal() and int(number) > 0):
        raise ConfigError(f"--replay {where} should be a run folder and a step, such as runs/mine:1234")
    if not (Path(out) / CONFIG).is_file():
        raise ConfigError(f"--replay {where}: {out} is no run folder, for it has no {CONFIG}")
    return Path(out), int(number)


def _replay(request: Request, step: int, guard: StopGuard, watchdog: Watchdog) -> Found | None:
    """What was found; None if it was asked to stop before."""
    run = request.run
    setting = build.setup(request)
    model = build.build_model(run, tokenizer=setting.tokenizer)
    setting = build.within_budget(run, setting, model)
    loader = build.build_loader(run, setting, model)
    if last := non_finite.last_roll_back(setting.out, step - 1):
        loader.left_out = [(after, steps) for after, steps in last["left_out"]]
    machine = build.build_engine(run, setting, model)
    start = setting.begin.step if setting.begin else 0
    if setting.begin:
        setting.begin.restore(machine)
    elif (first := _first_step(setting.out)) > 1:
        raise CheckpointError(
            f"{setting.out} went on from another run's checkpoint at step {first} and has none of its own before step "
            f"{step}; replay a later step"
        )
    if distributed.rank() == 0:
        for warning in setting.warnings:
            print(f"warning: {warning}")
        source = f"{setting.begin.folder.name}, the newest checkpoint before it" if setting.begin else "the first step"
        print(f"replaying step {step} of {setting.out} from {source}: {step - start} step(s)", flush=True)
        if (ranks := _ranks(setting.out)) not in (None, distributed.world_size()):
            print(f"the run had {ranks} rank(s): here the samples are the same, the numbers nearly so", flush=True)
        if _steps_were_others(setting.out, step, run.optim, run.steps, model):
            print("the run made this step with another `steps`: its schedules, and so its numbers, were others")
    plans, noted = distributed.StepPlans(), Noted()
    vote = distributed.StopVote()
    watchdog.workers = loader.working
    for number, micro_batches in loader.steps(start, step):
        watchdog.at("step", number)
        if any(vote.agreed(guard.requested)):
            return None
        if number < step:
            train.one_step(run, model, machine, plans, number, micro_batches)
            continue
        with noting(model, noted):
            result = train.one_step(run, model, machine, plans, number, micro_batches)
        moments = [Moment(step, run.seed, each, len(micro_batches)) for each in range(len(micro_batches))]
        found = non_finite.findings(model, loader.shards_of, result.batches, moments, result.losses)
        everyone: list[Any] = distributed.gather_objects((noted.modules, noted.gradients))
        for each in found:
            each["module"] = everyone[each["rank"]][0].get(each["micro_batch"])
        norm = result.report.grad_norm
        return {
            "step": step,
            "task": result.batches[0].task,
            "from_step": start,
            "ranks": distributed.world_size(),
            "applied": result.report.applied,
            "grad_norm": norm if math.isfinite(norm) else None,
            "parameters": sum(parameter.requires_grad for parameter in model.parameters()),
            "micro_batches": found,
            "gradients": _together([gradients for _, gradients in everyone]),
        }
    raise AssertionError("the loader serves every step")


def _first_step(out: Path) -> int:
    """The first that the run logged; 1 of a run that began at the beginning."""
    try:
        with (out / METRICS).open() as lines:
            return int(json.loads(lines.readline())["step"])
    except (OSError, ValueError):
        return 1


def _steps_were_others(out: Path, step: int, options: OptimConfig, steps: int, model: PretrainModel) -> bool:
    """Whether the learning rates that were logged are not those of the run as it is configured now."""
    lr = optim.lr_at(step, options, steps)
    here = {f"lr/{group['name']}": lr * group["scale"] for group in optim.groups(model.named_parameters(), options)}
    logged = [line for line in read(out / METRICS) if line["step"] == step]
    return any(line.get(name, rate) != rate for line in logged for name, rate in here.items())


def _ranks(out: Path) -> int | None:
    """Of the run's last start."""
    try:
        return int(json.loads((out / ENVIRONMENT).read_text())["world_size"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


@dataclass
class Noted:
    """What the hooks see in one step, on this rank."""

    number: int = 0  # the micro-batch that is being made
    modules: dict[int, str] = field(default_factory=dict)  # by micro-batch: the first whose output is not finite
    gradients: dict[str, tuple[int, int]] = field(default_factory=dict)  # by parameter: not finite, of how many


@contextmanager
def noting(model: nn.Module, noted: Noted) -> Iterator[None]:
    """Inside, `noted` hears of every module's output and every parameter's gradient, one backward at a time."""
    handles = [model.register_forward_pre_hook(lambda _, given: setattr(noted, "number", given[1].number))]
    for name, module in model.named_modules():
        handles.append(module.register_forward_hook(_on_output(name, noted)))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            handles.append(parameter.register_hook(_on_gradient(name, noted)))  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _on_output(name: str, noted: Noted) -> Any:
    def note(module: nn.Module, given: Any, made: Any) -> None:
        if noted.number not in noted.modules and not _finite(made):
            fed = "" if _finite(given) else ", and what it was given is not"
            noted.modules[noted.number] = f"{name} ({type(module).__name__}){fed}"

    return note


def _on_gradient(name: str, noted: Noted) -> Any:
    def note(gradient: Tensor) -> None:
        wrong = int((~gradient.isfinite()).sum())
        if wrong:
            before, _ = noted.gradients.get(name, (0, 0))
            noted.gradients[name] = max(before, wrong), gradient.numel()

    return note


def _finite(value: Any) -> bool:
    """Whether all floating tensors in nested tuples, lists and dicts are."""
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(value.isfinite().all())
    if isinstance(value, dict):
        return all(map(_finite, value.values()))
    return all(map(_finite, value)) if isinstance(value, tuple | list) else True


def _together(ranks: list[dict[str, tuple[int, int]]]) -> dict[str, tuple[int, int]]:
    """Of each parameter the most that a rank found."""
    return {name: max(each.get(name, (0, 0)) for each in ranks) for name in dict.fromkeys(n for r in ranks for n in r)}


def table(out: Path, found: Found) -> list[str]:
    """What was found, in lines for people."""
    norm = "not finite" if found["grad_norm"] is None else f"{found['grad_norm']:.4g}"
    result = "applied" if found["applied"] else "skipped"
    lines = [f"step {found['step']} of {out}, task '{found['task']}': {result}, norm of the gradients {norm}"]
    for each in found["micro_batches"]:
        shown = {name: "not finite" if loss is None else f"{loss:.4g}" for name, loss in each["losses"].items()}
        losses = ", ".join(f"{name} {loss}" for name, loss in shown.items())
        lines += [
            f"\nmicro-batch {each['micro_batch']} of rank {each['rank']}: {losses}",
            f"  samples: {' '.join(map(printable, each['keys']))}",
            f"  first output that is not finite: {each['module'] or 'none'}",
        ]
        lines += [f"  suspected: {non_finite.named(suspect)}" for suspect in each["suspects"]]
    wrong = found["gradients"]
    lines.append(f"\nparameters whose gradients are not finite: {len(wrong)} of {found['parameters']}")
    lines += [f"  {name}  {count} of {size} numbers" for name, (count, size) in list(wrong.items())[:SHOWN]]
    if len(wrong) > SHOWN:
        lines.append(f"  and {len(wrong) - SHOWN} more")
    return lines
