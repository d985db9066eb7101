"""Threads and loader processes, by the cores that there are."""

from __future__ import annotations

import pytest

from vlscale import cores


@pytest.mark.parametrize(("machine", "ranks", "expected"), [(96, 8, 8), (32, 8, 3), (16, 1, 8), (4, 4, 1), (1, 1, 1)])
def test_loader_processes_share_out_the_cores_of_a_gpu_machine(
    monkeypatch: pytest.MonkeyPatch, machine: int, ranks: int, expected: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(machine)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert cores.workers(None) == 0
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert cores.workers(None) == expected
    assert cores.workers(5) == 5
