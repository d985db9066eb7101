"""Putting a run together: from a checked configuration to shards, tokenizer, model, loader and engine."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vlscale import agreement, config, cores, distributed, ds_config, engine, preflight, run_folder, towers, vocabulary
from vlscale.config import RunConfig
from vlscale.data import held_out
from vlscale.data import views as view_data
from vlscale.data.bad import Budget
from vlscale.data.batches import Batching, Even, Spread, fewest, make_batching
from vlscale.data.lengths import Lengths, Reading, Shapes, measure
from vlscale.data.loader import Loader
from vlscale.data.micro_batches import Preprocessing
from vlscale.data.order import Source, TaskOrder
from vlscale.data.scenes import embedded as scenes
from vlscale.data.shards import Shards
from vlscale.data.sources import EMBEDDED, make_order, named, open_sources, unused_weights
from vlscale.data.text import Tokenizer
from vlscale.data.views import Views
from vlscale.engine import DeepSpeedEngine
from vlscale.errors import ConfigError
from vlscale.evaluation.base import usual_task
from vlscale.families.base import Family
from vlscale.model import PretrainModel, Task
from vlscale.objectives.base import Objective
from vlscale.options import InitConfig
from vlscale.recompute import set_activation_checkpointing
from vlscale.saving import begin, checkpoint
from vlscale.saving.checkpoint import Checkpoint
from vlscale.saving.disk import checkpoint_bytes, still_needed
from vlscale.saving.targets import write_atomically
from vlscale.served import check_served
from vlscale.types import Batch
from vlscale.watchdog import limits, patience
from vlscale.weights import init_towers, init_whole, owners


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    run: RunConfig
    ds_path: str
    out: Path | None  # None = runs/<recipe>-<date>-<time>
    resume: str = "auto"  # auto, never, or a checkpoint
    until: int | None = None  # `auto` goes on from the newest checkpoint up to this step; None = the newest


@dataclass(frozen=True)
class Elsewhere:
    """Where a run will take place that is only checked here."""

    ranks: int
    gpus: bool


@dataclass(frozen=True)
class Setting:
    """Where a run takes place: made by `setup`, the same on every rank but for `device`."""

    out: Path
    ds: dict[str, Any]
    device: torch.device
    train: Shards
    sources: tuple[Source, ...]  # of `train`
    val: Shards
    tokenizer: Tokenizer
    vocabulary: str  # the text of the tokenizer's tokenizer.json
    answers: tuple[str, ...]  # of questions, by number; none where no objective asks
    begin: Checkpoint | None  # what the run goes on from
    warnings: tuple[str, ...]  # of rank 0; for the log, once there is one


def finished(request: Request) -> bool:
    """Whether `out` holds this very run with all its steps done, and evaluated; rank 0 says so. Joins the group."""
    run, out = request.run, request.out
    if out is None or request.resume == "never":
        return False
    _join(run)
    asked = (run.checkpoint.to, config.dump(run), request.resume)
    said = agreement.by_rank_0(lambda: begin.finished(out, *asked, run.steps))
    if said and distributed.rank() == 0:
        print(said)
    return bool(said)


def setup(request: Request, elsewhere: Elsewhere | None = None) -> Setting:
    """Check everything that can be checked without a model, and join the group. Nothing is written.

    For a run `elsewhere` no group is joined.
    """
    run = request.run
    tree = ds_config.load(request.ds_path)
    ds = ds_config.for_device(tree, request.ds_path, elsewhere.gpus if elsewhere else torch.cuda.is_available())
    if run.data.batching == "cost" and run.data.tokens is not None:
        ds_config.check_free(tree, request.ds_path)
    decided = ds_config.Decided(run.recipe, run.data.batch, run.data.micro_batch, run.optim.clip)
    world = elsewhere.ranks if elsewhere else int(os.environ.get("WORLD_SIZE", "1"))
    ds = ds_config.merge(ds, request.ds_path, decided, world)
    warnings = [unused] if (unused := unused_weights(run.data)) else []
    cores.share()
    train, sources, val = open_shards(run)
    make_order(sources, run.data, run.seed)  # a mistake in weights is told before anything slow
    device = torch.device("cpu") if elsewhere else _join(run)
    asked = (request.out, run.checkpoint.to, config.dump(run), request.resume)
    agreement.by_rank_0(lambda: begin.check(*asked))
    out = Path(distributed.from_rank_0(str(request.out or run_folder.default_name(run.recipe))))
    told = {
        "--resume": request.resume,
        "ds_config": json.dumps(ds, sort_keys=True),
        "shards of data.train": f"{train.fingerprint()} ({len(train)} samples)",
        "shards of data.val": f"{val.fingerprint()} ({len(val)} samples)",
    }
    agreement.same_settings("what the ranks were told", {**config.flat(run), **told})
    first = begin.find(*asked, warnings.append, request.until)
    asks, inputs = _asks(run), run.family.inputs
    began = out if first is None else checkpoint.run_of(first)
    read = {"questions": asks, "tags": inputs.tags, "words": inputs.words}
    words = run.family.vocab - (inputs.marks is not None)  # one id is no word's
    find = partial(vocabulary.find_tokenizer, run.text, began, train, words, vectors=run.init.text, **read)
    kept = agreement.by_rank_0(find)
    answers = (
        agreement.by_rank_0(lambda: vocabulary.find_answers(run.text, began, train, _most_answers(run))) if asks else ""
    )
    tokenizer = vocabulary.make_tokenizer(kept, inputs)
    vocabulary.check_marks(tokenizer, inputs.marks)
    vocabulary.check_tokenizer(tokenizer, run.family.vocab, view_data.parse(run.views, inputs))
    budget = Budget(run.data.bad_budget, run.data.bad_always)
    preflight.check(
        train,
        tokenizer,
        inputs,
        batch=run.data.batch,
        max_words=run.text.kept_words,
        out=out,
        disk=0 if request.until is not None else _disk(run, out),  # who goes on for a replay saves nothing
        questions=asks,
        budget=budget,
        texts=_reads_texts(run),
    )
    preflight.check_held_out(val, tokenizer, inputs, run.text.kept_words, asks, budget, _reads_texts(run))
    noted: tuple[str, ...] = ()
    if distributed.rank() == 0:
        noted = (*warnings, *vocabulary.warn_of_cut(tokenizer, train, run.text, questions=asks))
    return Setting(out, ds, device, train, sources, val, tokenizer, kept, tuple(answers.splitlines()), first, noted)


def _join(run: RunConfig) -> torch.device:
    """Into the process group, or stay in it: this rank's device. The group waits longer than the watchdog."""
    return distributed.init(patience(limits(run.watchdog, run.data)))


def write_folder(run: RunConfig, setting: Setting) -> None:
    """What a run folder holds before step 1; only when all is built, so that a mistake leaves no folder behind."""
    hosts = distributed.gather_objects(socket.gethostname())

    def write() -> str:
        try:
            run_folder.write(setting.out, config.dump(run), setting.ds, [str(host) for host in hosts])
            write_atomically(setting.out / vocabulary.TOKENIZER, setting.vocabulary)
            if setting.answers:
                listed = "".join(f"{answer}\n" for answer in setting.answers)
                write_atomically(setting.out / vocabulary.ANSWERS, listed)
        except OSError as error:
            raise ConfigError(f"--out {setting.out} cannot be written ({error}); give another --out") from error
        if setting.begin is not None:
            checkpoint.begin_at(checkpoint.target(setting.out, run.checkpoint.to), setting.begin.step)
        return ""

    agreement.by_rank_0(write)
    agreement.by_rank_0(lambda: checkpoint.keep_beside(setting.out, run.checkpoint.to))


class Opened(NamedTuple):
    """The data of a run."""

    train: Shards
    sources: tuple[Source, ...]  # of `train`
    val: Shards


def open_shards(run: RunConfig) -> Opened:
    """The training and validation shards; `embedded` draws them on first use."""
    given = {"train": run.data.train, "val": run.data.val}
    for key, value in given.items():
        if not value:
            raise ConfigError(f"recipe '{run.recipe}' names no data.{key}; write data.{key}='FOLDER/*.tar'")
    embedded = any(EMBEDDED in globs for value in given.values() for globs in named(value or ()).values())
    inputs = run.family.inputs
    drawn = scenes.ensure(regions=inputs.regions > 0, clips=inputs.frames > 0) if embedded else None
    stores = run.data.stores()
    train, sources = open_sources(given["train"] or (), drawn.train if drawn else (), options=stores)
    return Opened(train, sources, open_sources(given["val"] or (), drawn.val if drawn else (), options=stores)[0])


def build_model(
    run: RunConfig, say: Callable[[str], None] = lambda message: None, tokenizer: Tokenizer | None = None
) -> PretrainModel:
    """Family + objectives + twin, the same on every rank; `say` hears what it starts from.

    Vectors of whole words (`init.text`) need the `tokenizer`, which tells their order; without it they start anew.
    """
    torch.manual_seed(run.seed)
    family = config.pick("families", run.family_name).build(run.family)
    words = run.init.text if run.family.inputs.words else None
    if words and tokenizer:
        say(vocabulary.fill_words(family.word_embedding, tokenizer, words))
    begun = towers.start(family, run.init.vision)
    objectives = {name: _objective(name, options, family) for name, options in run.objectives.items()}
    tasks = {name: Task(task.objectives, task.share, task.modality) for name, task in run.tasks.items()}
    model = PretrainModel(family, objectives, tasks)
    model.copies_buffers = run.momentum.buffers == "copied"
    parts = (None if words else run.init.text, None if begun else run.init.vision, run.init.codebook)
    if run.init.weights and (run.init.text or run.init.vision or any(parts)):
        raise ConfigError("init.weights fills the whole model; leave out init.text, init.vision and init.codebook")
    if any(parts):
        init_towers(model, *parts)
    if run.init.weights:
        done = init_whole(model, run.init.weights)
        say(
            f"{len(done.filled)} tensors start from {run.init.weights}; left at their start: {owners(done.left)}; "
            f"not used: {owners(done.unused)}"
        )
    missing = model.views() - set(run.views)
    if missing:
        raise ConfigError(
            f"the objectives read the view(s) {sorted(missing)}, but views gives {sorted(run.views)}; "
            f"add e.g. 'views.{min(missing)}={view_data.example(min(missing), run.family.inputs)}'"
        )
    return model


def within_budget(run: RunConfig, setting: Setting, model: PretrainModel) -> Setting:
    """The same with the number of micro-batches that `data.tokens` asks for, where batches of equal cost find it.

    Raises:
        ConfigError: micro-batches are to have unequal numbers of samples, and an objective needs equal ones.
    """
    data, world = run.data, distributed.world_size()
    if data.batching != "count" and (name := model.even()):
        raise ConfigError(
            f"data.batching={data.batching} gives micro-batches of unequal numbers of samples, and objectives.{name} "
            "compares the samples of a batch, or draws for them by number; write data.batching=count"
        )
    if data.batching != "cost" or data.tokens is None:
        return setting
    number = fewest(_batching(run, setting, model, 1), data.batch, world, data.tokens)
    micro_batch = data.batch // (number * world)
    counts = {"train_micro_batch_size_per_gpu": micro_batch, "gradient_accumulation_steps": number}
    return replace(setting, ds={**setting.ds, **counts})


def _batching(run: RunConfig, setting: Setting, model: PretrainModel, per_step: int) -> Batching:
    """Of `per_step` micro-batches on every rank."""
    inputs, made = run.family.inputs, preprocessing(run, setting.answers, model)

    def lengths() -> Lengths:
        keep_ratio = next((how for views in made.views.values() for how in views.keep_ratio().values()), None)
        reading = Reading(inputs, run.text.kept_words, _asks(run), keep_ratio)
        return measure(setting.train, setting.tokenizer, setting.vocabulary, reading)

    def shapes(measured: Lengths) -> Shapes:
        order = make_order(setting.sources, run.data, run.seed)
        return Shapes(measured, order, run.seed, made.views, inputs)

    spread = Spread(per_step, distributed.rank(), distributed.world_size(), run.seed)
    return make_batching(run.data, spread, made.tasks, lengths, shapes)


def build_loader(run: RunConfig, setting: Setting, model: PretrainModel) -> Loader:
    """The training samples of this rank."""
    inputs = run.family.inputs
    if inputs.regions:
        for shards in (setting.train, setting.val):
            preflight.check_regions(shards, (), inputs, model.fields())
    micro_batch = setting.ds["train_micro_batch_size_per_gpu"]
    if usual_task(model.family) == "pretext":  # retrieval makes do with any number
        held_out.sizes(min(len(setting.val), run.evaluation.limit), micro_batch, distributed.world_size())
    loader = Loader(
        setting.train,
        setting.tokenizer,
        inputs,
        preprocessing(run, setting.answers, model),
        make_order(setting.sources, run.data, run.seed),
        _batching(run, setting, model, setting.ds["gradient_accumulation_steps"]),
        cores.workers(run.data.workers),
    )
    if setting.begin is not None:
        loader.load_state(setting.begin.state["loader"])
        if distributed.rank():
            loader.bad_samples = 0  # rank 0 goes on with the count of all
    return loader


def probes(run: RunConfig, setting: Setting, model: PretrainModel, samples: int) -> dict[str, Batch]:
    """{task: its first few samples}, at most `samples` and a micro-batch, the same on every rank."""
    few = min(samples, setting.ds["train_micro_batch_size_per_gpu"])

    def first(task: str) -> Batch:
        only = replace(preprocessing(run, setting.answers, model), tasks=TaskOrder({task: 1.0}, run.seed))
        order = make_order(setting.sources, run.data, run.seed)
        loader = Loader(setting.train, setting.tokenizer, run.family.inputs, only, order, Even(few, few, 0, 1), 0)
        return next(iter(loader.steps(0, 1)))[1][0]

    return {task: first(task) for task in model.tasks}


def preprocessing(run: RunConfig, answers: Sequence[str], model: PretrainModel) -> Preprocessing:
    """What the loader makes of the samples: of each task, the views that its objectives read.

    `answers` are those of questions, by number.
    """

    def views(task: str) -> Views:
        read = model.views(task) | {"pairs.clips"}
        wanted = {name: options for name, options in run.views.items() if name in read}
        return view_data.parse(wanted, run.family.inputs)

    return Preprocessing(
        views={task: views(task) for task in model.tasks},
        tasks=TaskOrder({name: task.share for name, task in model.tasks.items()}, run.seed),
        seed=run.seed,
        max_words=run.text.kept_words,
        answers={answer: number for number, answer in enumerate(answers)},
        fields=model.fields(),
        max_pixels=run.data.max_pixels,
    )


def build_engine(run: RunConfig, setting: Setting, model: PretrainModel) -> DeepSpeedEngine:
    """DeepSpeed around the model, with its activation checkpointing."""
    recompute = engine.deepspeed_recompute() if run.activation_checkpointing == "deepspeed" else None
    set_activation_checkpointing(model, run.activation_checkpointing, recompute)
    return DeepSpeedEngine(model, setting.ds, run.optim, setting.device)


def describe(run: RunConfig, setting: Setting, model: PretrainModel, start: int) -> str:
    """The run in a few words, for the first line of the log."""
    # a parameter that ZeRO 3 has parted says under `ds_numel` how large it is
    trainable = sum(getattr(each, "ds_numel", each.numel()) for each in model.parameters() if each.requires_grad)
    going_on = f", going on after step {start}" if start else ""
    return (
        f"{run.recipe}: {run.family_name} with {', '.join(run.objectives)}, {trainable / 1e6:.1f} M trainable "
        f"parameters, {len(setting.train)} training samples{_mixed(run, setting)}, batch {run.data.batch} on "
        f"{distributed.world_size()} {setting.device.type} rank(s), ZeRO {ds_config.stage(setting.ds)} "
        f"{ds_config.precision(setting.ds)}, {run.steps} steps, in {setting.out}{going_on}"
    )


def _mixed(run: RunConfig, setting: Setting) -> str:
    """How their order is made, where it is not one shuffle of all."""
    weights = [f"{name} {weight:g}" for name, weight in run.data.weights.items() if len(setting.sources) > 1]
    shares = f" of {', '.join(weights)} by {run.data.mix}" if weights else ""
    return shares + (f" shuffled {run.data.window} at a time" if run.data.shuffle == "windowed" else "")


def _objective(name: str, options: Any, family: Family) -> Objective:
    """Built after asking whether the family can serve it: building reads what only some families have."""
    module = config.pick("objectives", name)
    for kind in vars(module).values():
        if isinstance(kind, type) and issubclass(kind, Objective) and kind.__module__ == module.__name__:
            check_served(name, kind.needs, family)
    made: Objective = module.build(options, family)
    return made


def _asks(run: RunConfig) -> bool:
    """Whether questions take part."""
    return "pairs.answers" in run.views


def _reads_texts(run: RunConfig) -> bool:
    """Whether any task does; clips in which nothing is said are enough for the others."""
    return not run.tasks or any(task.modality != "visual" for task in run.tasks.values())


def _most_answers(run: RunConfig) -> int:
    """How many answers the objectives tell apart."""
    return max((config.answers for config in run.objectives.values() if hasattr(config, "answers")), default=0)


def _disk(run: RunConfig, out: Path) -> int:
    """Bytes that the run's checkpoints will still take in its folder."""
    if run.checkpoint.to:
        return 0
    with torch.device("meta"):
        size = checkpoint_bytes(build_model(replace(run, init=InitConfig())), run.optim)
    return still_needed(size, run.checkpoint, run.steps, out / run_folder.CHECKPOINTS)
