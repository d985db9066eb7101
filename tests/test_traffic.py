"""Bytes per step: the formulas by hand, and what real runs of two and four processes move."""

from __future__ import annotations

import contextlib
import io
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from tests import engines
from tests.distributed.spawn import run_ranks
from tests.models import batch_for
from tests.test_recipes import shrunk
from vlscale import build, distributed, plan, train
from vlscale.build import Request
from vlscale.collectives import Volume
from vlscale.engine import DeepSpeedEngine
from vlscale.recompute import set_activation_checkpointing
from vlscale.traffic import (
    HOWS,
    NETWORKS,
    Network,
    Part,
    Scale,
    Sizes,
    Zero,
    agreement_traffic,
    contrast_traffic,
    engine_traffic,
    own_traffic,
    weak_scaling,
)

FILES = Path(__file__).parent.parent / "ds_configs"
SAMPLES = 4  # of a micro-batch
SMALL = 200  # numbers of a parameter that ZeRO 3 keeps whole
SETTLED = 4  # steps until ZeRO 3 has traced the model, and the one that is looked at
NORMS = 64  # bytes of norms and overflow checks, which are not counted
SIZES = Sizes(groups=[[1000, 9], [7]], frozen=[1000, 9], followed=[0], twin=[1000, 9])


def by_name(parts: list[Part]) -> dict[str, tuple[str, float]]:
    return {part.name: (part.how, part.bytes) for part in parts}


def test_what_each_stage_moves_by_hand() -> None:
    made = {
        stage: by_name(engine_traffic(SIZES, Zero(stage, weight=2, gradient=2, small=9), ranks=4, micro_batches=3))
        for stage in range(4)
    }
    assert made[0] == {"gradients": ("all-reduce", 1016 * 2)}
    twin = {"momentum twin": ("all-gather", 1016 * 2)}  # 1009 padded to a multiple of 2 * 4
    assert made[1] == {**made[0], "weights": ("all-gather", (1016 + 8) * 2), **twin}
    assert made[2] == {**made[1], "gradients": ("all-reduce", 3 * 1016 * 2)}
    assert made[3] == {
        "gradients": ("reduce-scatter", 3 * (1000 + 12 + 8) * 2),  # each parameter padded to a multiple of 4
        "weights": ("all-gather", 3 * 1000 * 2),
        "weights of twin and frozen": ("all-gather", 3 * 1000 * 2),
        "small weights": ("all-gather", (12 + 8 + 12) * 2),
        "momentum twin": ("all-gather", 12 * 2),
    }


def test_weights_that_are_not_kept_are_gathered_again() -> None:
    kept = Zero(3, weight=2, gradient=2, small=0, reuse=2 * 1016 + 1009)  # forward and backward, and the twin's
    away = replace(kept, reuse=kept.reuse - 1)

    def times(zero: Zero, passes: int = 2, two_pass: bool = False) -> float:
        parts = engine_traffic(SIZES, zero, ranks=1, micro_batches=2, passes=passes, two_pass=two_pass)
        return by_name(parts)["weights"][1] / (1016 * 2)

    assert times(kept) == times(kept, passes=3) == 2
    assert times(away) == 4
    assert times(away, passes=3) == 6
    assert times(kept, two_pass=True) == 7


def test_what_a_ring_sends() -> None:
    ring = {how: Part("", how, 1200.0).sent(4) for how in HOWS.values()}
    assert ring["all-reduce"] == 2 * 900
    assert ring["all-gather"] == ring["reduce-scatter"] == ring["all-to-all"] == 900
    assert ring["to a neighbour"] == 1200
    assert Part("", "all-reduce", 1200.0).sent(1) == 0


def test_what_objectives_add_by_hand() -> None:
    assert by_name(contrast_traffic(samples=8, ranks=4, keys=100, gradients=200)) == {
        "contrast": ("all-gather", 3200),
        "contrast, gradients": ("reduce-scatter", 6400),
    }
    assert list(by_name(contrast_traffic(8, 4, 100, 0))) == ["contrast"]
    assert [part.bytes for part in agreement_traffic(counted=2)] == [48]
    few, more = {"all_gather_into_tensor": 14, "all_reduce": 5}, {"all_gather_into_tensor": 24, "all_reduce": 5}
    drawn_on = own_traffic(few, more, (2, 4), whole=10)  # 4 and 5 per sample; and 5 whatever the samples
    assert sorted((part.how, part.bytes) for part in drawn_on) == [("all-gather", 54), ("all-reduce", 5)]
    (alone,) = own_traffic({"all_reduce": 5}, {"all_reduce": 5}, (1, 1), whole=10)
    assert alone.bytes == 50


def test_weak_scaling_by_hand() -> None:
    def moved(ranks: int) -> list[Part]:
        return [Part("a", "all-reduce", 1e9, 1, hides=True), Part("b", "all-to-all", 1e9, 2)]

    network = Network(node=100, gpu=800)
    one, two = weak_scaling((1, 2), 1.0, moved, network, gpus=4, overlap=0.5, reached=0.5, latency=1e-3)
    inside = 8e9 / 400e9  # a gigabyte between the GPUs of a node
    assert one.network == pytest.approx(1.5 * inside + 0.75 * inside + 3 * 2e-3)
    assert one.exposed == pytest.approx(one.network - 0.5 * (1.5 * inside + 2e-3))
    outside = 8e9 / 50e9  # through the cards of a node: a ring once for all its GPUs, an all-to-all for each of them
    reduced = 1.75 * outside + 3e-3
    assert two.network == pytest.approx(reduced + 4 * 0.5 * outside + 2 * 3e-3)
    assert two.exposed == pytest.approx(two.network - 0.5 * reduced)
    assert two == Scale(2, two.network, two.exposed, 1.0 + two.exposed, 1 / (1.0 + two.exposed))


def test_efficiency_falls_with_nodes_and_rises_with_bandwidth() -> None:
    def moved(ranks: int) -> list[Part]:
        return engine_traffic(Sizes([[200_000_000]]), Zero(2, 2, 2), ranks)

    table = {name: weak_scaling((1, 2, 64), 0.3, moved, network) for name, network in NETWORKS.items()}
    for rows in table.values():
        assert 1 > rows[0].efficiency > rows[1].efficiency > rows[2].efficiency > 0
    assert [rows[2].efficiency for rows in table.values()] == sorted(rows[2].efficiency for rows in table.values())
    (alone,) = weak_scaling((1,), 0.3, moved, NETWORKS["10 Gb Ethernet"], gpus=1)
    assert (alone.step, alone.efficiency) == (0.3, 1.0)
    (hidden,) = weak_scaling((64,), 1e-3, moved, NETWORKS["10 Gb Ethernet"], overlap=1.0)
    assert hidden.exposed > 0.9 * hidden.network, "no more is hidden than computing lasts"


def test_bytes_are_counted_at_the_calls() -> None:
    volume = Volume()
    four = torch.zeros(4)
    way = SimpleNamespace(tensor=four)  # a send or a receipt, in place of torch's
    for name, arguments in (
        ("all_reduce", (four,)),
        ("all_reduce", (four.double(),)),
        ("all_gather", ([four, four], four)),
        ("all_gather_into_tensor", (torch.zeros(8), four)),
        ("reduce_scatter_tensor", (four, torch.zeros(8))),
        ("batch_isend_irecv", ([way, way],)),
        ("barrier", ()),
    ):
        assert volume.recorded(name, lambda *_, **__: "made")(*arguments) == "made"
    assert volume.recorded("broadcast", lambda tensor, src: None)(tensor=four, src=0) is None
    assert volume.bytes == {
        **{"all_reduce": 48, "all_gather": 32, "all_gather_into_tensor": 32, "reduce_scatter_tensor": 32},
        **{"batch_isend_irecv": 16, "barrier": 0, "broadcast": 16},
    }
    assert volume.begun == 8


class Case(NamedTuple):
    """A run to look at."""

    recipe: str
    stage: int
    precision: str
    micro_batches: int = 1
    small: int = SMALL
    reuse: int | None = None  # None = as the file says
    recompute: str = "none"


def configuration(case: Case) -> dict[str, Any]:
    batch = SAMPLES * case.micro_batches * distributed.world_size()
    tree = engines.configuration(f"zero{case.stage}", batch, SAMPLES, 1.0, case.precision)
    if case.stage == 3:
        tree["zero_optimization"]["stage3_param_persistence_threshold"] = case.small
    if case.reuse is not None:
        tree["zero_optimization"] |= {"stage3_max_reuse_distance": case.reuse, "stage3_prefetch_bucket_size": 0}
    return tree


def on_a_rank(cases: list[Case]) -> list[tuple[list[Part], dict[str, int]]]:
    """For each case, what is planned and what a settled step moved."""
    volume = Volume()
    distributed.record(volume)  # before DeepSpeed takes the functions
    return [planned_and_found(case, volume) for case in cases]


def planned_and_found(case: Case, volume: Volume) -> tuple[list[Part], dict[str, int]]:
    run = shrunk(case.recipe)
    model, config = build.build_model(run), configuration(case)

    def batches(step: int) -> list[Any]:
        seeds = [(step * 10 + number) * 10 + distributed.rank() for number in range(case.micro_batches)]
        return [batch_for(run.family.inputs, run.family.vocab, SAMPLES, seed=seed) for seed in seeds]

    planned = plan.traffic_plan(model, config, run.optim, batches(1)[0])
    set_activation_checkpointing(model, case.recompute)
    engine = DeepSpeedEngine(model, config, run.optim, distributed.init())
    plans, vote = distributed.StepPlans(), distributed.StopVote()
    for step in range(1, SETTLED + 1):
        volume.bytes.clear()
        assert train.one_step(run, model, engine, plans, step, batches(step)).report.applied
        vote.agreed(0, 0)
    return planned, dict(volume.bytes)


def check(world: int, cases: list[Case]) -> None:
    """To the byte, but for norms and what a sum over flat groups is padded by."""
    ranks = run_ranks(on_a_rank, world, cases, timeout=500)
    assert all(found == ranks[0] for found in ranks[1:])
    for case, (planned, counted) in zip(cases, ranks[0], strict=True):
        found: dict[str, float] = {}
        for name, size in counted.items():
            found[HOWS[name]] = found.get(HOWS[name], 0.0) + size
        told = {how: sum(part.bytes for part in planned if part.how == how) for how in found}
        assert {part.how for part in planned} <= found.keys(), case
        traced = found.pop("broadcast", 0.0)  # the agreement about a trace that is made again
        assert not traced or (case.stage == 3 and case.micro_batches > 1), case
        for how, size in found.items():
            slack = NORMS + 2 * 4 * world if how == "all-reduce" else 0
            fewer = told[how] / 1000 if traced else 0  # one number, the temperature, is gathered less often
            assert told[how] - fewer <= size <= told[how] + slack, f"{case} on {world}: {found} planned {told}"


def test_a_run_of_two_moves_what_is_planned() -> None:
    check(2, [Case("albef_tiny", 2, "bf16"), Case("clip_tiny", 0, "fp32")])


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("world", [2, 4])
def test_every_stage_moves_what_is_planned(world: int) -> None:
    cases = [Case("clip_tiny", stage, "fp32") for stage in range(4)]
    cases += [Case("clip_tiny", stage, "bf16", 2) for stage in range(3)]  # at stage 3: below
    both = [("bf16", 2)] if world == 4 else [(precision, number) for precision in ("fp32", "bf16") for number in (1, 2)]
    cases += [Case("albef_tiny", stage, *each) for stage in range(4) for each in both]  # a twin, queues, hard negatives
    check(world, cases)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_what_zero_3_gathers_again() -> None:
    check(
        2,
        [
            Case("clip_tiny", 3, "fp32", reuse=0),
            Case("clip_tiny", 3, "bf16", recompute="full"),  # kept, so that nothing is gathered for it
            *(Case("clip_tiny", 3, "fp32", number, small=0) for number in (2, 4)),  # a step in two passes
            Case("siglip_tiny", 2, "bf16", 1),
            Case("siglip_tiny", 2, "bf16", 2),
            Case("soho_tiny", 2, "fp32"),  # a dictionary that moves
        ],
    )


def dry_run(stage: int) -> str:
    """What `--dry_run` prints."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        plan.show(Request(shrunk("albef_tiny"), str(FILES / f"zero{stage}.json"), None))
    return said.getvalue()


def test_a_dry_run_of_several_ranks_tells_the_traffic() -> None:
    first, other = run_ranks(dry_run, 2, 2)
    assert "network" not in other
    section = first[first.index("\nnetwork, sent and received by each rank in a step") :].split("\n\n")[0]
    rows = dict(re.findall(r"^  (.+?) +(\S+) GB$", section, re.MULTILINE))
    trainable = int(re.search(r"trainable, all +([\d,]+)", first)[1].replace(",", ""))  # type: ignore[index]
    assert float(rows["gradients, all-reduce"]) == pytest.approx(trainable * 2 / 1e9, abs=1e-6)
    assert {"weights, all-gather", "momentum twin, all-gather", "objectives, all-gather", "together"} <= rows.keys()
    (alone,) = run_ranks(dry_run, 1, 2)
    assert "network" not in alone
