"""A map over processes that keeps its order; they end with the one that started them, however it ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from multiprocessing.connection import wait
from typing import Any, TypeVar

from vlscale.errors import ConfigError, DataError

CHUNK = 16  # items that a process is given at once
AHEAD = 3  # chunks that each process has been given beyond what was taken
FEW = 32  # items that are not worth another process
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def cores() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def require_processes(processes: int) -> None:
    """ConfigError unless there can be so many."""
    if processes < 1:
        raise ConfigError(f"--processes is {processes}; write 1 or more")


def ordered(
    job: Callable[[_Item], _Result], items: Iterator[_Item], processes: int, chunk: int = CHUNK, few: int = FEW
) -> Generator[_Result, None, None]:
    """What `job` makes of every item, in the items' order; the first error of a job ends it.

    `job` goes to each process once, by pickle; with one process, or fewer than `few` items, all is done here. Close the
    iterator to end early. DataError if a process is killed.
    """
    first = list(islice(items, few))
    items = chain(first, items)
    if processes == 1 or len(first) < few:
        yield from map(job, items)
        return
    waiting: deque[Future[list[_Result]]] = deque()
    context = multiprocessing.get_context("spawn")  # threads of ours or of a library must not be forked
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_start, initargs=(job,))
    try:
        while some := list(islice(items, chunk)):
            waiting.append(pool.submit(_run, some))
            if len(waiting) > AHEAD * processes:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    except BrokenProcessPool as error:
        raise DataError("a process was killed, as happens when memory runs out; write fewer --processes") from error
    finally:
        pool.shutdown(cancel_futures=True)


class _Process:
    """What a process of the pool has been given."""

    job: Callable[[Any], Any]


def _start(job: Callable[[Any], Any]) -> None:
    import cv2

    cv2.setNumThreads(1)  # each process is a core's already
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one that started us hears a Ctrl-C and ends us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _Process.job = job
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent:
        wait([parent.sentinel])
        os._exit(1)  # nobody is left who could take a result


def _run(some: list[Any]) -> list[Any]:
    return list(map(_Process.job, some))
