"""Sources that end the work; in a file of their own, which other processes import quickly."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

from vlscale.data.write import Sample


class Unlucky:
    """Its second picture ends the process that converts it, unless that is the one that started."""

    def items(self) -> Iterator[tuple[str, int]]:
        return iter([("a", 0), ("b", os.getpid())])

    def sample(self, name: str, item: int) -> Sample:
        if item and os.getpid() != item:
            os.kill(os.getpid(), signal.SIGKILL)
        return Sample({"caption": name})


class Unreadable(Unlucky):
    """Its pictures may not be read."""

    def sample(self, name: str, item: int) -> Sample:
        raise PermissionError(13, "Permission denied", name)
