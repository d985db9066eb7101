"""Pre-training in which rank 1 draws another task from step 3 on; arguments as for launchers/pretrain.py."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from launchers import pretrain
from vlscale import console
from vlscale.data.order import TaskOrder


def other(order: TaskOrder, step: int) -> str:
    return "words" if step >= 3 and os.environ["RANK"] == "1" else "all"


TaskOrder.__call__ = other  # type: ignore[method-assign]
console.run(pretrain.main, sys.argv[1:])
