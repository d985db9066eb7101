"""`launchers/pretrain.py` with one rank that comes to harm: `HARM=HOW:RANK:STEP python tests/harmed.py ...`.

HOW is what happens to that rank at the beginning of that step: see `HARMS`.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launchers import pretrain
from vlscale import console
from vlscale.errors import DataError


def sleep() -> None:
    time.sleep(10_000)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def wrong() -> None:
    raise ValueError("a mistake of ours")


def data() -> None:
    raise DataError("the shard of this rank alone is unreadable")


HARMS = {harm.__name__: harm for harm in (sleep, stop, die, wrong, data)}


def main(argv: list[str]) -> int:
    from vlscale import train

    how, rank, step = os.environ["HARM"].split(":")
    plain = train.one_step

    def one_step(*arguments: Any) -> Any:
        if arguments[4] == int(step) and os.environ.get("RANK", "0") == rank:
            HARMS[how]()
        return plain(*arguments)

    train.one_step = one_step
    return pretrain.main(argv)


if __name__ == "__main__":
    console.run(main, sys.argv[1:])
