"""Run a function on several gloo ranks of this machine, from inside a test."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from multiprocessing import connection, forkserver
from typing import Any
from unittest import mock

CPU_ONLY = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}


def run_ranks(
    function: Callable[..., Any], world: int, *args: Any, timeout: float = 120.0, cuda: bool = False
) -> list[Any]:
    """`function(*args)` on `world` ranks in one process group; what each returned, in rank order.

    The ranks are gloo ranks on the CPU, or with `cuda` one per GPU.

    `function` lives at the top of a module, and what it takes and returns can be pickled. The ranks see the
    environment of this process as it is now. The first exception of a rank is raised here, with that rank's
    traceback as its cause. No process is left behind: not after an exception, not after `timeout` seconds
    (TimeoutError), not when this process is killed.
    """
    processes, pipes = _start(function, world, args, cuda)
    try:
        return _collect(pipes, time.monotonic() + timeout)
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.join()
            process.close()
        for pipe in pipes:
            pipe.close()


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _start(function: Callable[..., Any], world: int, args: tuple[Any, ...], cuda: bool) -> tuple[list[Any], list[Any]]:
    context: Any = multiprocessing.get_context("spawn" if cuda else "forkserver")
    if not cuda:
        context.set_forkserver_preload(["tests.distributed.warm"])  # imported once, not once per rank and test
    environment = {**os.environ, **({} if cuda else CPU_ONLY), "WORLD_SIZE": str(world)}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes, pipes = [], []
    with nullcontext() if cuda else _fork_server():
        for rank in range(world):
            ours, theirs = context.Pipe()
            of_rank = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = context.Process(target=_rank, args=(theirs, of_rank, function, args), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            pipes.append(ours)
    return processes, pipes


@contextmanager
def _fork_server() -> Iterator[None]:
    with mock.patch.dict(os.environ, CPU_ONLY):
        forkserver.ensure_running()
        yield


def _collect(pipes: list[connection.Connection], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    waiting = {pipe: rank for rank, pipe in enumerate(pipes)}
    while waiting:
        ready = connection.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"rank(s) {sorted(waiting.values())} did not finish in time")
        for pipe in ready:
            rank = waiting.pop(pipe)
            results[rank] = _result(rank, pipe)
    return [results[rank] for rank in range(len(pipes))]


def _result(rank: int, pipe: connection.Connection) -> Any:
    try:
        value, error, trace = pickle.loads(pipe.recv_bytes())
    except EOFError:
        raise RuntimeError(f"rank {rank} died without a word") from None
    if error is not None:
        raise error from RuntimeError(f"on rank {rank}:\n{trace}")
    return value


def _rank(
    pipe: connection.Connection,
    environment: dict[str, str],
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    threading.Thread(target=_end_with_parent, args=(pipe,), daemon=True).start()
    os.environ.clear()
    os.environ.update(environment)
    try:
        answer = _packed(_in_group(function, args), None, "")
    except BaseException as error:
        answer = _packed(None, error, traceback.format_exc())
    pipe.send_bytes(answer)
    os._exit(0)  # at once: another rank may be gone already, and a process group would wait for it


def _in_group(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    import torch

    from vlscale import distributed

    torch.set_num_threads(1)
    distributed.init()
    value = function(*args)
    distributed.barrier()
    return value


def _packed(value: Any, error: BaseException | None, trace: str) -> bytes:
    try:
        answer = pickle.dumps((value, error, trace))
        pickle.loads(answer)
    except Exception:
        answer = pickle.dumps((None, RuntimeError(f"cannot be pickled: {error or value!r}"), trace))
    return answer


def _end_with_parent(pipe: connection.Connection) -> None:
    pipe.poll(None)  # the test never sends: this returns when it closes its end or dies
    os._exit(1)
