"""How much room checkpoints take."""

from __future__ import annotations

import math
from pathlib import Path

from vlscale import optim, optimizers
from vlscale.model import PretrainModel
from vlscale.optim import OptimConfig
from vlscale.options import CheckpointConfig
from vlscale.saving import state


def checkpoint_bytes(model: PretrainModel, optim_config: OptimConfig) -> int:
    """Of one checkpoint: weights and averages in fp32, the optimizer's moments, queues and other buffers.

    The model may lie on the meta device.
    """
    moments = sum(
        optimizers.MOMENTS[group["rule"]] * 4 * int(each.numel())
        for group in optim.groups(model.named_parameters(), optim_config)
        for each in group["params"]
    )
    kept = (piece for side in state.buffers(model) for piece in side)
    buffers = sum(math.prod(piece.shape) * piece.values.element_size() for piece in kept)
    return 4 * sum(each.numel() for each in model.parameters()) + moments + buffers


def at_most(size: int, options: CheckpointConfig, steps: int) -> int:
    """Bytes that a run's checkpoints of `size` take, the one being written included."""
    kept = options.keep + (steps // options.keep_every if options.keep_every else 0)
    return (min(kept, -(-steps // options.every)) + 1) * size


def still_needed(size: int, options: CheckpointConfig, steps: int, folder: Path) -> int:
    """Bytes that they will take beyond those that `folder` holds."""
    return max(0, at_most(size, options, steps) - sum(path.stat().st_size for path in folder.glob("step_*/*")))
