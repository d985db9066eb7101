"""A run checked where it is submitted, as far as that can be done without its nodes."""

from __future__ import annotations

from dataclasses import replace

import torch

from vlscale import build, config, ds_config, run_folder
from vlscale.build import Elsewhere, Request
from vlscale.errors import ConfigError
from vlscale.options import InitConfig


def check(request: Request, ranks: int, gpus: bool | None) -> tuple[int, int, tuple[str, ...]]:
    """Configuration, data, run folder and model of a run on so many ranks: its batch, micro-batch and warnings.

    `gpus`: whether the ranks will have them; None = as this machine has.

    Raises:
        ConfigError, DataError, CheckpointError: as the run itself would.
    """
    setting = build.setup(request, Elsewhere(ranks, torch.cuda.is_available() if gpus is None else gpus))
    with torch.device("meta"):
        build.build_model(replace(request.run, init=InitConfig()))
    return request.run.data.batch, int(setting.ds["train_micro_batch_size_per_gpu"]), setting.warnings


def kept_micro_batch(request: Request, ranks: int) -> int | None:
    """The micro-batch that a run keeps when it goes on with fewer ranks; None = it began without one, so that it grows.

    Raises:
        ConfigError: `data.tokens` would find it anew, or the batch does not divide.
    """
    run, out = request.run, request.out
    if run.data.tokens is not None:
        raise ConfigError(
            "--on_node_loss shrink keeps the micro-batch, which data.tokens would find anew; write data.micro_batch=N "
            "instead, or --on_node_loss replace"
        )
    if out is not None and (out / run_folder.CONFIG).is_file():
        began: int | None = config.load(str(out / run_folder.CONFIG)).data.micro_batch
        return began
    decided = ds_config.Decided(run.recipe, run.data.batch, run.data.micro_batch, run.optim.clip)
    merged = ds_config.merge(ds_config.load(request.ds_path), request.ds_path, decided, ranks)
    return int(merged["train_micro_batch_size_per_gpu"])
