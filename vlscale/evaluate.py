"""A checkpoint, measured: builds the run's model from its own files and hands it to one evaluation task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from vlscale import build, config, run_folder, vocabulary
from vlscale.data.shards import Shards
from vlscale.data.text import Tokenizer
from vlscale.errors import CheckpointError, ConfigError
from vlscale.evaluation.base import Found, HeldOut, usual_task
from vlscale.model import PretrainModel
from vlscale.options import InitConfig
from vlscale.saving import checkpoint


def evaluate(
    path: str,
    task: str | None,
    data: Sequence[str] | None,
    batch: int = 64,
    limit: int | None = None,
    windows: int | None = None,
) -> dict[str, Any]:
    """The figures of one task (None = the family's usual one) on shards (None = the run's own validation shards).

    Raises:
        ConfigError: no such task, or the model cannot do it; a `limit` (0 = all), `batch` or `windows` that counts
            nothing.
        CheckpointError: there is no usable checkpoint at `path`.
        DataError: the shards are missing or unusable.
    """
    if batch < 1:
        raise ConfigError(f"--batch should be at least 1 (got {batch})")
    if limit is not None and limit < 0:
        raise ConfigError(f"--limit should be at least 0, which means all samples (got {limit})")
    if windows is not None and windows < 1:
        raise ConfigError(f"--windows should be at least 1 (got {windows})")
    if task is not None:
        config.pick("evaluation", task)  # a wrong name is said at once
    found = checkpoint.find(path)
    folder = checkpoint.run_of(found)
    run = config.load(str(folder / run_folder.CONFIG))
    shards = Shards(list(data), options=run.data.stores()) if data else build.open_shards(run).val
    tokenizer = Tokenizer(folder / vocabulary.TOKENIZER, run.family.inputs)
    model = load_model(found, run)
    listed = folder / vocabulary.ANSWERS
    answers = listed.read_text().splitlines() if listed.is_file() else []
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    held = HeldOut(
        model.to(device),
        device,
        shards,
        tokenizer,
        build.preprocessing(run, answers, model),
        batch=batch,
        limit=run.evaluation.limit if limit is None else limit,
        windows=windows or run.evaluation.windows,
    )
    measured: Found = config.pick("evaluation", task or usual_task(model.family)).measure(held)
    return {"step": found.step, **measured.metrics}


def load_model(found: checkpoint.Checkpoint, run: config.RunConfig) -> PretrainModel:
    """The run's model with a checkpoint's weights, in the precision they were trained in."""
    weights = checkpoint.weights(found)
    model = build.build_model(replace(run, init=InitConfig()))  # every weight comes from the checkpoint
    for name, parameter in model.named_parameters():
        if name in weights:
            parameter.data = parameter.data.to(weights[name].dtype)
    missing, surplus = model.load_state_dict(weights, strict=False)
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - set(weights)
    if surplus or set(missing) - tied:
        odd = sorted(surplus) + sorted(set(missing) - tied)
        raise CheckpointError(f"{found.folder} does not fit its own configuration: {', '.join(odd[:3])} ...")
    return model
