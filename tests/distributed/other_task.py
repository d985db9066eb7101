"""Pre-training in which rank 1 draws another task from step 3 on; arguments as for launchers/pretrain.py."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from launchers import pretrain
from vlscale import console, train

drawn = train.pick_task


def other(run: train.RunConfig, model: train.PretrainModel, step: int) -> str:
    if step >= 3 and os.environ["RANK"] == "1":
        return "words"
    return "all"


train.pick_task = other
console.run(pretrain.main, sys.argv[1:])
