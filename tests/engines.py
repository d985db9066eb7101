"""DeepSpeed as tests configure it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vlscale import distributed, ds_config

FILES = Path(__file__).parent.parent / "ds_configs"


def configuration(name: str, batch: int, micro_batch: int, clip: float, precision: str = "fp32") -> dict[str, Any]:
    """`ds_configs/<name>.json` on the ranks that there are: `batch` samples a step, `micro_batch` a rank and pass.

    `precision`: fp32, or the file's own.
    """
    path = str(FILES / f"{name}.json")
    tree = ds_config.for_device(ds_config.load(path), path, torch.cuda.is_available())
    if precision == "fp32":
        tree.pop("bf16", None)
        tree.pop("data_types", None)
    decided = ds_config.Decided("test", batch, micro_batch, clip)
    return ds_config.merge(tree, path, decided, distributed.world_size())
