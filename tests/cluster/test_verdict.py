"""What becomes of a run whose ranks have ended: the whole table, by hand."""

from __future__ import annotations

from typing import Any

import pytest

from vlscale.cluster.verdict import Ended, Left, judge, meaning

TOLD, LIMIT, LOST, STUCK = {"ending": "other"}, {"ending": "limit"}, {"lost": ("node3",)}, {"headway": False}
CANCELLED = {"cancelled": True}


@pytest.mark.parametrize(
    ("code", "how", "then"),
    [
        *((0, how, "done") for how in ({}, TOLD, LIMIT, LOST, STUCK)),
        # ended by themselves
        (75, {}, "requeue"),  # told by `scancel --signal`, or before the time limit
        (75, STUCK, "failed"),
        *((code, how, "failed") for code in (1, 4, 137, 139) for how in ({}, STUCK)),
        *((code, how, "failed") for code in (2, 3, 5) for how in ({}, LIMIT, LOST, STUCK)),
        # cancelled, or preempted and put back by Slurm itself
        *((code, TOLD, "stopped") for code in (1, 2, 4, 75, 137)),
        (137, {**TOLD, **LOST}, "stopped"),
        # out of time
        (75, LIMIT, "requeue"),
        (75, {**LIMIT, **STUCK}, "failed"),
        (137, LIMIT, "requeue"),  # killed before it had saved
        (137, {**LIMIT, **STUCK}, "failed"),
        # the step was cancelled, the job was not
        (137, CANCELLED, "requeue"),
        (137, {**CANCELLED, **LOST}, "requeue"),
        (137, {**CANCELLED, **STUCK}, "failed"),
        *((code, CANCELLED, "failed") for code in (2, 3, 5)),
        # a node lost
        *((code, LOST, "requeue") for code in (1, 4, 75, 137)),
        (137, {**LOST, **STUCK}, "requeue"),  # what no checkpoint helps against
    ],
)
def test_the_table(code: int, how: dict[str, Any], then: str) -> None:
    verdict = judge(Ended(code, **how), Left(requeues=5, nodes=3, on_node_loss="replace"))
    assert verdict.then == then, verdict.why
    assert verdict.why


@pytest.mark.parametrize(("on_node_loss", "nodes", "then"), [("shrink", 3, "again"), ("shrink", 0, "requeue")])
def test_with_fewer_nodes(on_node_loss: str, nodes: int, then: str) -> None:
    left = Left(requeues=5, nodes=nodes, on_node_loss=on_node_loss)
    verdict = judge(Ended(137, ("node3",)), left)
    assert verdict.then == then
    assert "lost node3" in verdict.why
    assert judge(Ended(4, ("node3",)), Left(0, nodes, on_node_loss)).then == ("again" if nodes else "stopped")


@pytest.mark.parametrize("how", [LOST, {**LOST, **TOLD}])
def test_a_lost_node_ends_it_where_that_was_asked_for(how: dict[str, Any]) -> None:
    verdict = judge(Ended(137, **how), Left(requeues=5, nodes=3, on_node_loss="end"))
    assert (verdict.then, verdict.why) == ("failed", "lost node3, and --on_node_loss end was given")


@pytest.mark.parametrize(
    "ended", [Ended(75), Ended(75, **LIMIT), *(Ended(137, **how) for how in (LIMIT, LOST, CANCELLED))]
)
def test_no_requeue_left(ended: Ended) -> None:
    assert judge(ended, Left(1, 3, "replace")).why.endswith("back into the queue, 0 more time(s) allowed")
    for left in (0, -1):
        verdict = judge(ended, Left(left, 3, "replace"))
        assert (verdict.then, verdict.why.split("; ")[-1]) == ("stopped", "no --requeue is left")


def test_ranks_that_were_asked_before_they_listened_have_stopped() -> None:
    assert [meaning(128 + number) for number in (2, 10, 12, 15)] == [75] * 4
    assert [meaning(code) for code in (0, 1, 4, 75, 128 + 9, 128 + 11)] == [0, 1, 4, 75, 137, 139]
