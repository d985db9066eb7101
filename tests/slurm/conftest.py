"""One Slurm cluster for all tests of this folder."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, missing


@pytest.fixture(scope="session")
def _cluster() -> Iterator[Cluster]:
    reason = missing()
    if reason and not os.environ.get("CI"):
        pytest.skip(reason)
    with Cluster() as cluster:
        yield cluster


@pytest.fixture
def slurm(_cluster: Cluster) -> Iterator[Cluster]:
    """The cluster, all of whose nodes are idle; what a test leaves there is cancelled."""
    yield _cluster
    _cluster.restore()
