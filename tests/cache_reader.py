"""`python -m tests.cache_reader SHARDS SECONDS`: read samples of pickled shards at random and check each."""

from __future__ import annotations

import pickle
import random
import sys
import time
from pathlib import Path

from vlscale.data.shards import Shards


def content(key: str) -> bytes:
    """What the sample of this key holds."""
    return random.Random(key).randbytes(20_000)


def main(path: str, seconds: float) -> None:
    shards: Shards = pickle.loads(Path(path).read_bytes())
    draw, end, read = random.Random(), time.monotonic() + seconds, 0
    while time.monotonic() < end or not read:
        i = draw.randrange(len(shards))
        assert shards.read(i) == {"bin": content(shards.key(i))}, shards.key(i)
        read += 1


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
