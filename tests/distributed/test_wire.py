"""What travels per step for contrast with a queue, counted at the calls of torch.distributed."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.distributed.spawn import run_ranks
from tests.models import albef_batch
from vlscale import agreement, distributed
from vlscale.errors import TrainingError
from vlscale.families import albef
from vlscale.model import PretrainModel
from vlscale.objectives import itc
from vlscale.types import Moment

COLLECTIVES = (
    *("all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "reduce_scatter_tensor"),
    *("all_to_all_single", "broadcast", "broadcast_object_list", "batch_isend_irecv", "barrier"),
)


class Count:
    """Collectives and the bytes that this rank hands to them."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def __enter__(self) -> Count:
        self._patches = [mock.patch.object(dist, name, self._watch(name)) for name in COLLECTIVES]
        for patch in self._patches:
            patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        for patch in self._patches:
            patch.stop()

    def _watch(self, name: str) -> Any:
        plain = getattr(dist, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            sent = (
                arguments[1]
                if name in ("all_gather", "all_gather_into_tensor", "reduce_scatter_tensor")
                else arguments[0]
            )
            self.calls.append((name, sent.numel() * sent.element_size() if isinstance(sent, Tensor) else 0))
            return plain(*arguments, **options)

        return counted


def ours(options: dict[str, Any]) -> list[tuple[str, int]]:
    torch.manual_seed(0)
    family = albef.build(albef.tiny())
    model = PretrainModel(family, {"itc": itc.build(itc.Config(**options), family)})
    batch = albef_batch(seed=distributed.rank())
    with Count() as count:
        made = model(batch, Moment(1))
        model.total(made.losses, {}).backward()  # type: ignore[no-untyped-call]
        model.commit([made.keys], 1, "step")
    return count.calls


def one_gather_per_stream(width: int, samples: int) -> list[tuple[str, int]]:
    """MoCo's way, for the two streams of ALBEF: an fp32 all-gather of each."""
    with Count() as count:
        for _ in ("image", "text"):
            keys = torch.randn(samples, width)
            dist.all_gather([torch.empty_like(keys) for _ in range(distributed.world_size())], keys)
    return count.calls


@pytest.mark.parametrize("scope", ["rank", "global"])
def test_one_message_of_half_the_bytes(scope: str) -> None:
    (theirs, *_) = run_ranks(one_gather_per_stream, 4, albef.tiny().embed, len(albef_batch()))
    assert len(theirs) == 2
    for dtype, share in (("fp32", 1.0), ("bf16", 0.5)):
        for calls in run_ranks(ours, 4, {"queue": 16, "queue_dtype": dtype, "scope": scope}):
            assert [name for name, _ in calls] == ["all_gather_into_tensor"]
            assert calls[0][1] == share * sum(size for _, size in theirs)


def test_pair_ids_travel_with_the_keys_where_they_matter() -> None:
    for calls in run_ranks(ours, 2, {"queue": 16, "same_picture": "excluded"}):
        assert [name for name, _ in calls] == ["all_gather_into_tensor"]
        assert calls[0][1] == len(albef_batch()) * (2 * 4 * albef.tiny().embed + 8)


def test_clip_needs_one_message_there_and_one_back() -> None:
    for calls in run_ranks(ours, 2, {"queue": 0, "soften": 0.0, "scope": "global"}):
        assert [name for name, _ in calls] == ["all_gather_into_tensor", "reduce_scatter_tensor"]


def digests(spoil: bool) -> list[str]:
    torch.manual_seed(0)
    family = albef.build(albef.tiny())
    model = PretrainModel(family, {"itc": itc.build(itc.Config(queue=16, queue_dtype="bf16"), family)})
    made = model(albef_batch(seed=distributed.rank()), Moment(1))
    model.commit([made.keys], 1, "step")
    if spoil and distributed.rank() == 1:
        model.key_queues()["text"].keys[3, 0] += 1
    agreement.same_settings("what the ranks keep", model.queue_digests())
    return list(model.queue_digests().values())


def test_queues_are_alike_on_all_ranks_and_proven_so() -> None:
    first, second = run_ranks(digests, 2, False)
    assert first == second
    assert len(set(first)) == 2
    with pytest.raises(TrainingError, match="the text queue is"):
        run_ranks(digests, 2, True)
