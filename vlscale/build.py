"""Putting a run together: from a checked configuration to shards, tokenizer, model, loader and engine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vlscale import checkpoint, config, distributed, ds_config, engine, preflight, run_folder
from vlscale.config import RunConfig
from vlscale.data import scenes
from vlscale.data import text as text_data
from vlscale.data import views as view_data
from vlscale.data.loader import Loader
from vlscale.data.shards import Shards
from vlscale.data.text import Tokenizer
from vlscale.engine import DeepSpeedEngine
from vlscale.errors import ConfigError
from vlscale.model import PretrainModel, Task
from vlscale.recompute import set_activation_checkpointing
from vlscale.weights import init_towers

VOCAB = "vocab.txt"


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    run: RunConfig
    ds_path: str
    out: Path | None  # None = runs/<recipe>-<date>-<time>
    resume: str = "auto"  # auto, never, or a checkpoint


@dataclass(frozen=True)
class Setting:
    """Where a run takes place: made by `setup`, the same on every rank but for `device`."""

    out: Path
    ds: dict[str, Any]
    device: torch.device
    train: Shards
    val: Shards


def setup(request: Request, write: bool = True) -> Setting:
    """Check everything that can be checked without a model, join the group, write the run folder."""
    run = request.run
    tree = ds_config.load(request.ds_path)
    ds = ds_config.for_device(tree, request.ds_path, torch.cuda.is_available())
    decided = ds_config.Decided(run.recipe, run.data.batch, run.data.micro_batch, run.optim.clip)
    ds = ds_config.merge(ds, request.ds_path, decided, int(os.environ.get("WORLD_SIZE", "1")))
    if request.out is not None:
        run_folder.check(request.out, config.dump(run), request.resume)
    _threads()
    train_shards, val_shards = open_shards(run)
    device = distributed.init()
    out = Path(distributed.from_rank_0(str(request.out or run_folder.default_name(run.recipe))))
    preflight.check(
        train_shards,
        val_shards,
        batch=run.data.batch,
        out=out,
        checkpoint_bytes=0,
        keep=run.checkpoint.keep,
    )
    if write and distributed.rank() == 0:
        run_folder.write(out, config.dump(run), ds, distributed.world_size())
    distributed.barrier()
    return Setting(out, ds, device, train_shards, val_shards)


def open_shards(run: RunConfig) -> tuple[Shards, Shards]:
    """The training and validation shards; `embedded` draws them on first use."""
    drawn = scenes.ensure() if ("embedded",) in (run.data.train, run.data.val) else None
    out = []
    for key in ("train", "val"):
        given = getattr(run.data, key)
        if not given:
            raise ConfigError(f"recipe '{run.recipe}' names no data.{key}; write data.{key}='FOLDER/*.tar'")
        out.append(Shards(getattr(drawn, key) if given == ("embedded",) else list(given)))
    return out[0], out[1]


def open_tokenizer(run: RunConfig, setting: Setting) -> Tokenizer:
    """The run's vocabulary: the one given, or one built from the training captions and kept in the run folder."""
    inputs = run.family.inputs
    vocab = run.text.vocab
    if vocab is None:
        path = setting.out / VOCAB
        if distributed.rank() == 0 and not path.is_file():
            words = text_data.build_vocabulary(_captions(run, setting.train), run.family.vocab)
            checkpoint.write_atomically(path, "\n".join(words) + "\n")
        distributed.barrier()
        vocab = str(path)
    tokenizer = Tokenizer(vocab, length=inputs.text_length, separator=inputs.separator)
    if tokenizer.vocab_size > run.family.vocab:
        raise ConfigError(
            f"text.vocab={vocab} has {tokenizer.vocab_size} entries, but family.vocab={run.family.vocab}; "
            f"write family.vocab={tokenizer.vocab_size}"
        )
    return tokenizer


def build_model(run: RunConfig, tokenizer: Tokenizer | None = None) -> PretrainModel:
    """Family + objectives + twin, the same on every rank."""
    torch.manual_seed(run.seed)
    family = config.pick("families", run.family_name).build(run.family)
    if run.init.text or run.init.vision:
        init_towers(family, run.init.text, run.init.vision)
    objectives = {
        name: config.pick("objectives", name).build(options, family)
        for name, options in run.objectives.items()
    }
    tasks = {name: Task(task.objectives, task.share) for name, task in run.tasks.items()}
    model = PretrainModel(family, objectives, tasks)
    missing = model.views() - set(run.views)
    if missing:
        raise ConfigError(
            f"the objectives read the view(s) {sorted(missing)}, but views gives {sorted(run.views)}; "
            f"add e.g. views.{min(missing)}={{}}"
        )
    return model


def build_loader(run: RunConfig, setting: Setting, model: PretrainModel, tokenizer: Tokenizer) -> Loader:
    """The training samples of this rank."""
    wanted = {name: options for name, options in run.views.items() if name in model.views()}
    return Loader(
        setting.train,
        view_data.parse(wanted),
        tokenizer,
        run.family.inputs,
        batch=run.data.batch,
        micro_batch=setting.ds["train_micro_batch_size_per_gpu"],
        seed=run.seed,
        rank=distributed.rank(),
        world=distributed.world_size(),
        workers=_workers(run.data.workers),
        max_words=run.text.max_words,
    )


def build_engine(run: RunConfig, setting: Setting, model: PretrainModel) -> DeepSpeedEngine:
    """DeepSpeed around the model, with its activation checkpointing."""
    recompute = engine.deepspeed_recompute() if run.activation_checkpointing == "deepspeed" else None
    set_activation_checkpointing(model, run.activation_checkpointing, recompute)
    return DeepSpeedEngine(model, setting.ds, run.optim, setting.device)


def describe(run: RunConfig, setting: Setting, model: PretrainModel, start: int) -> str:
    """The run in a few words, for the first line of the log."""
    trainable = sum(each.numel() for each in model.parameters() if each.requires_grad)
    going_on = f", going on after step {start}" if start else ""
    return (
        f"{run.recipe}: {run.family_name} with {', '.join(run.objectives)}, {trainable / 1e6:.1f} M trainable "
        f"parameters, {len(setting.train)} training samples, batch {run.data.batch} on "
        f"{distributed.world_size()} {setting.device.type} rank(s), ZeRO {ds_config.stage(setting.ds)} "
        f"{ds_config.precision(setting.ds)}, {run.steps} steps, in {setting.out}{going_on}"
    )


def _captions(run: RunConfig, shards: Shards) -> Iterator[str]:
    limit = min(len(shards), 50_000)  # captions enough for a small vocabulary
    for index in range(limit):
        for caption in shards.captions(index):
            yield text_data.clean_caption(caption, run.text.max_words)


def _workers(given: int | None) -> int:
    if given is not None:
        return given
    if not torch.cuda.is_available():
        return 0  # the step needs every core itself; decoding overlaps it in a thread
    return max(1, min(8, (os.cpu_count() or 1) // max(1, torch.cuda.device_count()) - 1))


def _threads() -> None:
    """Share a CPU's cores among the ranks on it."""
    if "OMP_NUM_THREADS" in os.environ or torch.cuda.is_available():
        return
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here))
