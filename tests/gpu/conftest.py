"""What needs a CUDA device: `pytest -m gpu -n 0 tests/gpu` runs all of it, and skips all of it without one."""

from __future__ import annotations

import pytest
import torch


def pytest_runtest_setup(item: pytest.Item) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
