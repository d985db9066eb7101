"""The momentum twin is the same at every ZeRO stage, follows the fp32 masters, and moves once per step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.distributed import toy_twin
from tests.distributed.spawn import run_ranks
from tests.distributed.toy_twin import OPTIM, Options, Toy, batch_of, engine_of, model_of, train, twin
from tests.states import whole_weights, write
from vlscale import distributed
from vlscale.engine import DeepSpeedEngine, StepReport
from vlscale.local_engine import LocalEngine
from vlscale.nn import momentum
from vlscale.nn.transformer import Stack
from vlscale.plan import memory_plan
from vlscale.saving.pieces import Reader
from vlscale.train import one_step
from vlscale.types import Moment

PLAIN = Options()
STAGES = ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
STEPS = 20
slow = pytest.mark.slow


def by_turns(*quick: str) -> list[Any]:
    """Every stage; those not named are slow."""
    return [name if name in quick else pytest.param(name, marks=slow) for name in STAGES]


@pytest.fixture(scope="module")
def plain() -> dict[str, Tensor]:
    return toy_twin.local_weights_after(PLAIN, STEPS)


def close(found: dict[str, Tensor], wanted: dict[str, Tensor], atol: float = 1e-6) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert float((found[name] - tensor).abs().max()) <= atol, name


@pytest.mark.parametrize(
    ("world", "name"),
    [
        *((2, name) for name in STAGES),
        *(pytest.param(w, name, marks=slow) for w in (1, 4) for name in ("zero1", "zero3")),
    ],
)
def test_the_twin_equals_plain_pytorch_on_the_joined_batch(world: int, name: str, plain: dict[str, Tensor]) -> None:
    everyone = run_ranks(toy_twin.weights_after, world, PLAIN, name, STEPS)
    for found in everyone:
        close(found, plain)
    start, moved = model_of(PLAIN).family.state_dict(), twin(plain)
    for key in moved:  # neither still nor a copy
        assert (moved[key] - start[key]).abs().max() > 1e-3
        assert (moved[key] - plain[f"family.{key}"]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3"])
def test_accumulating_moves_it_once_per_step(name: str, plain: dict[str, Tensor]) -> None:
    first, _ = run_ranks(toy_twin.weights_after, 2, PLAIN, name, STEPS, "fp32", 2)
    close(first, plain)
    close(toy_twin.local_weights_after(PLAIN, STEPS, accumulation=4), plain)


class Counting(LocalEngine):
    """Counts the moves of the twin; some optimizer steps are skipped, as fp16 does at a non-finite gradient."""

    moves = 0
    applied = True

    def step(self, lr: float) -> StepReport:
        return replace(super().step(lr), applied=self.applied)

    def after_step(self, coefficient: float) -> None:
        self.moves += 1
        super().after_step(coefficient)


def test_the_loop_moves_it_once_per_applied_step() -> None:
    engine = Counting(model_of(PLAIN), OPTIM, torch.device("cpu"), accumulation=4)
    moves = SimpleNamespace(coefficient=0.9, schedule="constant", drop_layers=0.0)
    run: Any = SimpleNamespace(seed=0, steps=9, optim=OPTIM, momentum=moves)
    for step, applied in enumerate((True, False, True), start=1):
        engine.applied = applied
        before = twin(whole_weights(engine))
        batches = [batch_of(PLAIN, step, part, 4) for part in range(4)]
        one_step(run, engine.model, engine, distributed.StepPlans(), step, batches)
        after = twin(whole_weights(engine))
        assert all(torch.equal(before[key], after[key]) != applied for key in before)
    assert engine.moves == 2


def masters_of(engine: DeepSpeedEngine) -> list[Tensor]:
    """This rank's fp32 masters as DeepSpeed's optimizer keeps them."""
    optimizer: Any = engine._optimizer
    if engine.stage == 0:
        return [master for group in optimizer.fp32_groups for master in group]
    if engine.stage == 3:
        return list(optimizer.fp32_partitioned_groups_flat)
    if engine._ds.bfloat16_enabled() and engine.stage == 1:
        return list(optimizer.fp32_groups_flat_partition)
    return list(optimizer.single_partition_of_fp32_groups)


def away(found: list[Tensor], wanted: list[Tensor]) -> float:
    """|found - wanted| / |wanted|, L2 over all."""
    square = sum(float((f.double() - w).square().sum()) for f, w in zip(found, wanted, strict=True))
    return (square / sum(float(w.square().sum()) for w in wanted)) ** 0.5


def follow(name: str, coefficient: float, updates: int) -> tuple[float, float]:
    """Masters walk at random in a bf16 run; how far our averages, and averages in bf16, are from those in fp64."""
    engine = engine_of(PLAIN, name, "bf16")
    own = {master.data_ptr(): master for master in masters_of(engine)}
    masters = [own[master.data_ptr()] for master in engine._averages.masters]  # KeyError: something else is followed
    judge = [master.detach().double() for master in masters]
    rough = [master.detach().bfloat16() for master in masters]
    draw = torch.Generator().manual_seed(distributed.rank())
    for _ in range(updates):
        with torch.no_grad():
            for master in masters:
                master.add_(torch.randn(master.shape, generator=draw), alpha=1e-3).add_(1e-4)
        engine.after_step(coefficient)
        for number, master in enumerate(masters):
            judge[number] = coefficient * judge[number] + (1 - coefficient) * master.detach().double()
            rough[number].lerp_(master.detach().bfloat16(), 1 - coefficient)
    return away(list(engine._averages.averages), judge), away(rough, judge)


@pytest.mark.parametrize("coefficient", [0.999, 0.99995])
@pytest.mark.parametrize("name", by_turns("zero2"))
def test_2000_updates_in_bf16_follow_the_masters(name: str, coefficient: float) -> None:
    for ours, rough in run_ranks(follow, 2, name, coefficient, 2000):
        print(f"{name}, {coefficient}: off by {ours:.1e}; in bf16 by {rough:.1e}")
        assert ours < 1e-5
        assert rough > 1e-2, "averaging in bf16 would do"


def twin_and_its_judge(name: str, steps: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The whole bf16 twin after real steps, and the average of whole masters, which DeepSpeed gathers, in fp64."""
    from deepspeed.utils import safe_get_full_fp32_param

    engine = engine_of(PLAIN, name, "bf16")
    family = dict(engine.model.family.named_parameters())

    def whole_masters() -> dict[str, Tensor]:
        if engine.stage:
            return {key: safe_get_full_fp32_param(each).double() for key, each in family.items()}
        return {key: engine._masters(each)[0].double().view(each.shape) for key, each in family.items()}

    judge = whole_masters()
    for step in range(1, steps + 1):
        train(engine, PLAIN, range(step, step + 1), ranks=distributed.world_size())
        for key, master in whole_masters().items():
            judge[key] = 0.9 * judge[key] + 0.1 * master
    return twin(whole_weights(engine)), judge


@pytest.mark.parametrize("name", by_turns("zero0", "zero1", "zero2", "zero3"))
def test_the_twin_is_the_rounded_average(name: str) -> None:
    (first, judge), (second, _) = run_ranks(twin_and_its_judge, 2, name, 12)
    close(first, second, atol=0)
    equal = [first[key] == value.bfloat16() for key, value in judge.items()]
    assert all(tensor.dtype == torch.bfloat16 for tensor in first.values())
    assert torch.cat([each.flatten() for each in equal]).float().mean() > 0.99  # a tie may round the other way
    for key, value in judge.items():
        torch.testing.assert_close(first[key].double(), value, rtol=2**-8, atol=0)


def resumed(name: str, folder: Path) -> list[tuple[list[Tensor], dict[str, Tensor]]]:
    """Averages and weights: when saved, at the end, when restored into a fresh engine, and at its end."""
    seen = []
    ranks = distributed.world_size()

    def look(engine: DeepSpeedEngine) -> None:
        held = [piece.values.clone() for piece in engine.pieces() if piece.name.startswith("master/twin.")]
        seen.append((held, whole_weights(engine)))

    engine = engine_of(PLAIN, name, "bf16")
    train(engine, PLAIN, range(1, 4), ranks=ranks)
    scalars = write(engine, folder)
    look(engine)
    train(engine, PLAIN, range(4, 7), ranks=ranks)
    look(engine)
    engine = engine_of(PLAIN, name, "bf16")
    with torch.no_grad():  # what is not read back shows
        for average in engine._averages.averages:
            average.fill_(3.0)
    engine.restore(Reader(folder), scalars)
    look(engine)
    train(engine, PLAIN, range(4, 7), ranks=ranks)
    look(engine)
    return seen


@pytest.mark.parametrize("name", by_turns("zero0", "zero1", "zero3"))
def test_a_checkpoint_brings_it_back_bit_by_bit(name: str, tmp_path: Path) -> None:
    for saved, end, loaded, again in run_ranks(resumed, 2, name, tmp_path):
        for before, after in ((saved, loaded), (end, again)):
            assert all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
            close(after[1], before[1], atol=0)


FROZEN = Options(frozen=True)


def kept_by_rank(name: str) -> tuple[int, dict[str, Tensor]]:
    engine = engine_of(FROZEN, name)
    train(engine, FROZEN, range(1, STEPS + 1), ranks=distributed.world_size())
    return sum(average.numel() for average in engine._averages.averages), whole_weights(engine)


@pytest.mark.parametrize("name", by_turns("zero2", "zero3"))
def test_a_frozen_part_has_no_average(name: str) -> None:
    wanted = toy_twin.local_weights_after(FROZEN, STEPS)
    family = model_of(FROZEN).family
    learning = sum(each.numel() for each in family.parameters() if each.requires_grad)
    head = 7 * 7 + 7
    for count, found in run_ranks(kept_by_rank, 2, name):
        close(found, wanted)
        for key in ("entry.weight", "entry.bias"):
            assert torch.equal(found[f"twin.{key}"], family.state_dict()[key])
        assert count == learning if name == "zero0" else learning // 2 <= count <= (learning + head) // 2 + 16


def kept_and_planned(name: str, precision: str) -> tuple[int, int]:
    """Bytes of weights and of averages beside them on this rank, and what `--dry_run` says of them."""
    options = replace(PLAIN, width=64)
    planned = memory_plan(model_of(options), toy_twin.configuration(name, precision), distributed.world_size(), OPTIM)
    engine = engine_of(options, name, precision)
    parts = [getattr(each, "ds_tensor", each) for each in engine.model.parameters()]
    weights = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in parts}
    storages = [average.untyped_storage() for average in engine._averages.averages]
    beside = sum(storage.nbytes() for storage in storages if storage.data_ptr() not in weights)
    return sum(weights.values()) + beside, planned["weights"] + planned["momentum averages"]


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("name", [name for name in by_turns("zero2", "zero3") if "offload" not in str(name)])
def test_a_rank_keeps_what_the_plan_says(name: str, precision: str) -> None:
    for kept, planned in run_ranks(kept_and_planned, 2, name, precision):
        assert kept == pytest.approx(planned, rel=0.01)


def test_a_tied_weight_stands_once_and_stays_tied() -> None:
    engine = LocalEngine(model_of(PLAIN), OPTIM, torch.device("cpu"))
    online, copy = engine.model.family, engine.model.twin
    assert isinstance(online, Toy)
    assert isinstance(copy, Toy)
    assert copy.exit.weight is copy.entry.weight
    assert len(engine._averages.averages) == len(list(online.parameters())) == 3 + 2 * 2
    before = copy.entry.weight.detach().clone()
    with torch.no_grad():
        online.entry.weight.fill_(1.0)
    engine.after_step(0.75)
    torch.testing.assert_close(copy.exit.weight, 0.75 * before + 0.25)  # 0.5625 if it stood twice


@pytest.mark.parametrize("name", ["local", "zero2", "zero3"])
def test_batch_norm_statistics_are_copied(name: str) -> None:
    options = Options(norm=True)
    if name == "local":
        weights = toy_twin.local_weights_after(options, 3)
    else:
        (weights,) = run_ranks(toy_twin.weights_after, 1, options, name, 3)
    for buffer in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(weights[f"twin.norm.{buffer}"], weights[f"family.norm.{buffer}"])
    assert weights["twin.norm.num_batches_tracked"] == 3


def test_batch_norm_keeps_its_own_statistics() -> None:
    options = Options(norm=True, copies_buffers=False)
    engine = LocalEngine(model_of(options), OPTIM, torch.device("cpu"))
    copy = engine.model.twin
    assert isinstance(copy, Toy)
    mean = torch.zeros(options.width)
    for step in range(1, 4):
        with torch.no_grad():  # what the twin, as it is now, sends into its norm
            arriving = copy.entry(batch_of(options, step).visual["clean"].feats)
        mean = 0.9 * mean + 0.1 * arriving.mean(0)
        train(engine, options, range(step, step + 1), coefficient=0.5)
    torch.testing.assert_close(copy.norm.running_mean, mean)
    assert not torch.allclose(copy.norm.running_mean, engine.model.family.norm.running_mean, atol=1e-5)  # type: ignore[union-attr,arg-type]
    copied = toy_twin.local_weights_after(replace(options, copies_buffers=True), 3)
    assert not torch.allclose(copied["twin.norm.running_mean"], mean, atol=1e-5)


def test_dropped_layers_are_the_identity() -> None:
    model = model_of(Options(layers=4))
    assert isinstance(model.twin, Toy)
    assert isinstance(model.family, Toy)
    hidden = torch.randn(3, 7)
    whole = model.family.stack(hidden)
    for step in range(1, 30):
        momentum.drop_layers(model.twin, 0.5, seed=3, step=step)
        expected = hidden
        assert model.twin.stack.kept is not None
        for layer, kept in zip(model.twin.stack.blocks.values(), model.twin.stack.kept, strict=True):
            expected = layer(expected) if kept else expected
        assert torch.equal(model.twin.stack(hidden), expected)
        assert model.family.stack.kept is None
        assert torch.equal(model.family.stack(hidden), whole)
    momentum.drop_layers(model.twin, 1.0, seed=3, step=1)
    assert torch.equal(model.twin.stack(hidden), hidden)
    momentum.drop_layers(model.twin, 0.0, seed=3, step=1)
    assert torch.equal(model.twin.stack(hidden), whole)


def test_layers_drop_by_seed_and_step_alone() -> None:
    net = nn.ModuleList(Stack(nn.Identity() for _ in range(9)) for _ in range(3))

    def drawn(seed: int, step: int) -> list[Any]:
        momentum.drop_layers(net, 0.5, seed, step)
        return [stack.kept for stack in net]

    first = drawn(7, 1)
    torch.manual_seed(11)
    assert drawn(7, 1) == first
    assert len(set(first)) == 3  # stacks differ
    assert drawn(7, 2) != first != drawn(8, 1)
    flags = torch.tensor([drawn(7, step) for step in range(400)]).float()  # [400, 3, 9]
    assert (flags.mean(0) - 0.5).abs().max() < 0.1  # 4 standard deviations of each layer's share


def test_zero_3_drops_layers_together() -> None:
    options = Options(layers=4, drop=0.5)
    wanted = toy_twin.local_weights_after(options, STEPS)
    for found in run_ranks(toy_twin.weights_after, 2, options, "zero3", STEPS):
        close(found, wanted)
    assert not torch.allclose(
        wanted["family.exit.bias"], toy_twin.local_weights_after(replace(options, drop=0.0), STEPS)["family.exit.bias"]
    )


def test_forward_gives_the_twin_no_gradient() -> None:
    engine = LocalEngine(model_of(PLAIN), OPTIM, torch.device("cpu"))
    made = engine.forward(batch_of(PLAIN, 1), Moment(1))
    engine.backward(engine.model.total(made.losses, {}), last=True)
    assert engine.model.twin is not None
    assert all(each.grad is None for each in engine.model.twin.parameters())
