from __future__ import annotations

import os
import time

import psutil
import pytest
import torch

from tests.distributed.spawn import run_ranks
from vlscale import distributed
from vlscale.errors import DataError


def rank_and_sum(offset: int) -> tuple[int, torch.Tensor]:
    mine = torch.tensor([float(distributed.rank() + offset)])
    return os.getpid(), distributed.gather([mine])[0]


def fail_on_rank_1() -> None:
    if distributed.rank() == 1:
        raise DataError("shard 7 is empty")
    distributed.barrier()


def hang() -> None:
    time.sleep(60)


def test_every_rank_returns_its_result() -> None:
    (pid_0, first), (pid_1, second) = run_ranks(rank_and_sum, 2, 10)
    assert first.tolist() == second.tolist() == [10.0, 11.0]
    assert pid_0 != pid_1
    assert not psutil.pid_exists(pid_0)
    assert not psutil.pid_exists(pid_1)


def test_an_exception_of_one_rank_ends_all() -> None:
    with pytest.raises(DataError, match="shard 7 is empty") as caught:
        run_ranks(fail_on_rank_1, 2)
    assert "on rank 1" in str(caught.value.__cause__)


def test_a_hang_ends_in_time() -> None:
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"rank\(s\) \[0, 1\]"):
        run_ranks(hang, 2, timeout=4.0)
    assert time.monotonic() - began < 30
