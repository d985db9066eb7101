"""Each optimizer by hand and against torch's, and its steps at every ZeRO stage against one process."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.distributed import toy_twin
from tests.distributed.spawn import run_ranks
from tests.states import whole_weights, write
from vlscale import distributed, optimizers
from vlscale.engine import DeepSpeedEngine
from vlscale.errors import ConfigError
from vlscale.local_engine import LocalEngine
from vlscale.optim import OptimConfig, SgdConfig
from vlscale.plan import memory_plan
from vlscale.saving.pieces import Reader

TOY = toy_twin.Options()
STAGES = ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
STEPS = 8
slow = pytest.mark.slow
SGD = SgdConfig(("stack",), lr_scale=3.0, momentum=0.8, weight_decay=0.2)
BASE = OptimConfig(weight_decay=0.1, eps=1e-4, clip=1.0)
CASES = {
    "adamw_and_sgd": replace(BASE, sgd=SGD),
    "adam_bert": replace(BASE, name="adam_bert"),
    "adamw_transformers": replace(BASE, name="adamw_transformers"),
    "clipped_each": replace(BASE, name="adam_bert", clip_each=0.05),
    "clipped_each_and_sgd": replace(BASE, sgd=SGD, clip_each=0.05),
    "cold_sgd": replace(BASE, sgd=replace(SGD, cold_steps=4)),
    "lamb": replace(BASE, name="lamb"),
}


class Two(nn.Module):
    """A trunk and a head, of a matrix and a bias each."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head = nn.Linear(4, 3), nn.Linear(3, 2)


def two(seed: int = 0) -> Two:
    torch.manual_seed(seed)
    return Two()


def move(module: nn.Module, optimizers: list[torch.optim.Optimizer], steps: int, lr: float = 0.02) -> None:
    """Steps under gradients that are drawn anew for each."""
    draw = torch.Generator().manual_seed(7)
    for _ in range(steps):
        for parameter in module.parameters():
            parameter.grad = 3 * torch.randn(parameter.shape, generator=draw)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("scale", 1.0)
            optimizer.step()


def same(one: nn.Module, other: nn.Module) -> None:
    for name, parameter in one.named_parameters():
        torch.testing.assert_close(parameter, other.get_parameter(name), msg=lambda text, name=name: f"{name}: {text}")


# --- the rules ---------------------------------------------------------------------------------------------


def test_adamw_alone_is_torchs() -> None:
    made = optimizers.build(two().named_parameters(), OptimConfig())
    assert type(made) is torch.optim.AdamW


def test_sgd_for_the_trunk_and_adamw_for_the_rest_are_torchs() -> None:
    ours, theirs = two(), two()
    config = OptimConfig(weight_decay=0.1, eps=1e-4, sgd=SgdConfig(("trunk",), 3.0, 0.8, 0.2))
    move(ours, [optimizers.build(ours.named_parameters(), config)], 5)
    rest = [{"params": [theirs.head.weight], "weight_decay": 0.1}, {"params": [theirs.head.bias], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(rest, eps=1e-4)
    sgd = torch.optim.SGD(theirs.trunk.parameters(), momentum=0.8, weight_decay=0.2)
    for group in sgd.param_groups:
        group["scale"] = 3.0
    move(theirs, [adamw, sgd], 5)
    same(ours, theirs)


def test_sgd_by_hand() -> None:
    parameter = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    config = OptimConfig(sgd=SgdConfig(("trunk",), momentum=0.5, weight_decay=0.1))
    (optimizer,) = [optimizers.build([("trunk.scale", parameter)], config)]
    optimizer.param_groups[0]["lr"] = 0.1
    value, buffer = 2.0, 0.0
    for gradient in (1.0, -3.0, 0.0):
        parameter.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
        buffer = 0.5 * buffer + gradient + 0.1 * value
        value -= 0.1 * buffer
        assert parameter.item() == pytest.approx(value, rel=1e-12)
    assert set(optimizer.state[parameter]) == {"momentum_buffer"}  # one number per weight


def test_parts_that_start_cold_wait() -> None:
    start, late, warm = two(), two(), two()
    sgd = SgdConfig(("trunk",), momentum=0.8, weight_decay=0.2, cold_steps=3)
    optimizer = optimizers.build(late.named_parameters(), OptimConfig(sgd=sgd))
    move(late, [optimizer], 3)
    same(late.trunk, start.trunk)
    assert not torch.equal(late.head.weight, start.head.weight)
    assert all(float(optimizer.state[each]["momentum_buffer"].abs().sum()) == 0 for each in late.trunk.parameters())
    move(late, [optimizer], 4)
    move(warm, [optimizers.build(warm.named_parameters(), OptimConfig(sgd=replace(sgd, cold_steps=0)))], 4)
    same(late.trunk, warm.trunk)  # as if they began only now


def by_hand(rule: str, value: float, gradients: list[float], decay: float) -> list[float]:
    """One number's way at rate 0.03, in the order of the authors' lines."""
    mean = square = 0.0
    way = []
    for step, gradient in enumerate(gradients, start=1):
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.99 * square + 0.01 * gradient * gradient
        update = mean / (math.sqrt(square) + 1e-3)
        if rule == "adam_bert":
            value -= 0.03 * (update + decay * value)
        else:
            value -= 0.03 * math.sqrt(1 - 0.99**step) / (1 - 0.9**step) * update
            value -= 0.03 * decay * value
        way.append(value)
    return way


@pytest.mark.parametrize("rule", ["adam_bert", "adamw_transformers"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_by_hand(rule: Any, decay: float) -> None:
    gradients = [0.5, -2.0, 0.0, 1e-7, 30.0]
    parameter = nn.Parameter(torch.tensor([0.8], dtype=torch.float64))
    config = OptimConfig(rule, betas=(0.9, 0.99), eps=1e-3, weight_decay=decay, no_decay=())
    optimizer = optimizers.build([("one", parameter)], config)
    optimizer.param_groups[0]["lr"] = 0.03
    for gradient, want in zip(gradients, by_hand(rule, 0.8, gradients, decay), strict=True):
        parameter.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
        assert parameter.item() == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("rule", ["adam_bert", "adamw_transformers"])
def test_they_are_adam_where_they_coincide(rule: Any) -> None:
    """Without epsilon and decay, and where bias is not corrected, with a rate that undoes torch's correction."""
    ours, theirs = two(), two()
    optimizer = optimizers.build(ours.named_parameters(), OptimConfig(rule, eps=0.0, weight_decay=0.0))
    adam = torch.optim.Adam(theirs.parameters(), eps=0.0)
    draw = torch.Generator().manual_seed(3)
    for step in range(1, 7):
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            one.grad = other.grad = torch.randn(one.shape, generator=draw)
        correction = (1 - 0.9**step) / math.sqrt(1 - 0.999**step) if rule == "adam_bert" else 1.0
        adam.param_groups[0]["lr"] = 0.02 * correction
        for group in optimizer.param_groups:
            group["lr"] = 0.02
        optimizer.step(), adam.step()
    same(ours, theirs)


@pytest.mark.parametrize("case", [case for case in CASES if case != "cold_sgd"])
def test_the_first_step_at_rate_0_fills_the_moments_and_moves_nothing(case: str) -> None:
    module = toy_twin.model_of(TOY)
    before = {name: parameter.clone() for name, parameter in module.named_parameters()}
    optimizer = optimizers.build(module.named_parameters(), CASES[case])
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert all(torch.equal(parameter, before[name]) for name, parameter in module.named_parameters())
    assert all(kept.any() for state in optimizer.state.values() for kept in state.values())


def test_lamb_by_hand() -> None:
    """Algorithm 2 of the paper, on the two entries of one parameter, and on a bias, which is spared."""
    weight = nn.Parameter(torch.tensor([[0.6, -0.8]], dtype=torch.float64))
    bias = nn.Parameter(torch.tensor([0.5], dtype=torch.float64))
    config = OptimConfig("lamb", betas=(0.9, 0.99), eps=1e-3, weight_decay=0.1)
    optimizer = optimizers.build([("weight", weight), ("bias", bias)], config)
    for group in optimizer.param_groups:
        group["lr"] = 0.03
    values, means, squares = [0.6, -0.8, 0.5], [0.0] * 3, [0.0] * 3
    for step, gradients in enumerate(([1.0, 2.0, 3.0], [-0.5, 0.0, 1e-3], [4.0, -1.0, 0.0]), start=1):
        weight.grad = torch.tensor([gradients[:2]], dtype=torch.float64)
        bias.grad = torch.tensor(gradients[2:], dtype=torch.float64)
        optimizer.step()
        means = [0.9 * mean + 0.1 * each for mean, each in zip(means, gradients, strict=True)]
        squares = [0.99 * square + 0.01 * each**2 for square, each in zip(squares, gradients, strict=True)]
        unbiased = [
            mean / (1 - 0.9**step) / (math.sqrt(square / (1 - 0.99**step)) + 1e-3)
            for mean, square in zip(means, squares, strict=True)
        ]
        first, second = (unbiased[place] + 0.1 * values[place] for place in (0, 1))
        ratio = math.hypot(values[0], values[1]) / math.hypot(first, second)
        updates = (ratio * first, ratio * second, unbiased[2])
        values = [value - 0.03 * update for value, update in zip(values, updates, strict=True)]
        assert [*weight[0].tolist(), bias.item()] == pytest.approx(values, rel=1e-12)


def test_lamb_moves_what_is_0_and_stays_finite() -> None:
    weight, still = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.ones(2, 2))
    config = OptimConfig("lamb", weight_decay=0.0, eps=0.0, no_decay=())
    optimizer = optimizers.build([("weight", weight)], config)
    weight.grad = torch.ones(2, 2)
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((2, 2), -0.1))  # the ratio is 1
    optimizer = optimizers.build([("still", still)], replace(config, eps=1e-8))
    still.grad = torch.zeros(2, 2)
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()
    assert torch.equal(still, torch.ones(2, 2))


@pytest.mark.parametrize("case", ["clipped_each", "clipped_each_and_sgd"])
def test_clipping_each_is_torchs_clipping_of_one_parameter(case: str) -> None:
    config = replace(CASES[case], clip_each=1.0, sgd=SgdConfig(("trunk",)) if CASES[case].sgd else None)
    ours, theirs = two(), two()
    optimizer = optimizers.build(ours.named_parameters(), config)
    other = optimizers.build(theirs.named_parameters(), replace(config, clip_each=0.0))
    draw = torch.Generator().manual_seed(3)
    for sizes in ((3.0, 1e-3, 3.0, 1e-3), (1e-3, 3.0, 3.0, 0.0)):  # above the bound and within it
        for size, mine, yours in zip(sizes, ours.parameters(), theirs.parameters(), strict=True):
            mine.grad = size * torch.randn(mine.shape, generator=draw)
            yours.grad = mine.grad.clone()
            norm = nn.utils.clip_grad_norm_([yours], 1.0)
            assert (norm > 1) == (size > 1)
        for each in (optimizer, other):
            for group in each.param_groups:
                group["lr"] = 0.1
            each.step()
        same(ours, theirs)


def test_a_zero_gradient_is_one_and_none_is_none() -> None:
    module = two()
    optimizer = optimizers.build(module.named_parameters(), OptimConfig("adam_bert", weight_decay=0.1))
    for group in optimizer.param_groups:
        group["lr"] = 0.5
    before = module.head.weight.detach().clone(), module.trunk.weight.detach().clone()
    module.head.weight.grad = torch.zeros_like(module.head.weight)
    optimizer.step()
    torch.testing.assert_close(module.head.weight.detach(), 0.95 * before[0])
    assert torch.equal(module.trunk.weight, before[1])
    assert not optimizer.state[module.trunk.weight]


def test_closure_and_gradients() -> None:
    module = two()
    optimizer = optimizers.build(module.named_parameters(), OptimConfig("adam_bert", clip_each=1e-3))

    def closure() -> float:
        loss = module.head(module.trunk(torch.ones(1, 4))).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    with torch.no_grad():
        expected = float(module.head(module.trunk(torch.ones(1, 4))).sum())
    assert optimizer.step(closure) == pytest.approx(expected)
    assert torch.equal(module.head.bias.grad, torch.ones(2))  # type: ignore[arg-type]  # not clipped in place


# --- under ZeRO --------------------------------------------------------------------------------------------


def weights_by_case(stages: tuple[str, ...], precision: str, cases: dict[str, OptimConfig]) -> dict[str, Any]:
    """{"stage case": whole weights after some steps} on this rank; for `run_ranks`."""
    found = {}
    for stage in stages:
        for case, config in cases.items():
            engine = engine_of(stage, precision, config)
            toy_twin.train(engine, TOY, range(1, STEPS + 1), ranks=distributed.world_size())
            found[f"{stage} {case}"] = whole_weights(engine)
    return found


def engine_of(stage: str, precision: str, config: OptimConfig) -> DeepSpeedEngine:
    made = toy_twin.configuration(stage, precision)
    if made["zero_optimization"]["stage"] == 3:  # matrices are cut, biases are kept whole on every rank
        made["zero_optimization"] = {**made["zero_optimization"], "stage3_param_persistence_threshold": 28}
    return DeepSpeedEngine(toy_twin.model_of(TOY), made, config, distributed.init())


def plain(config: OptimConfig) -> dict[str, Tensor]:
    engine = LocalEngine(toy_twin.model_of(TOY), config, torch.device("cpu"))
    toy_twin.train(engine, TOY, range(1, STEPS + 1))
    return whole_weights(engine)


def check(world: int, stages: tuple[str, ...], precision: str, atol: float) -> None:
    wanted = {case: plain(config) for case, config in CASES.items()}
    for found in run_ranks(weights_by_case, world, stages, precision, CASES, timeout=240):
        for name, weights in found.items():
            expected = wanted[name.split()[1]]
            assert weights.keys() == expected.keys()
            for key, value in weights.items():
                assert float((value.float() - expected[key]).abs().max()) <= atol, (name, key)


def test_what_is_compared_does_something() -> None:
    """No case equals another, so that none can pass by being left out."""
    found = [torch.cat([value.flatten() for value in plain(config).values()]) for config in (BASE, *CASES.values())]
    for number, one in enumerate(found):
        assert all(float((one - other).abs().max()) > 1e-4 for other in found[:number])


def test_two_ranks_equal_one_process() -> None:
    check(2, ("zero2", "zero3"), "fp32", 1e-6)


@slow
@pytest.mark.parametrize(("world", "precision"), [(1, "fp32"), (2, "fp32"), (4, "fp32"), (2, "bf16")])
@pytest.mark.parametrize("stages", [STAGES[:3], STAGES[3:]], ids=["zero012", "zero3_and_offload"])
def test_any_number_of_ranks_at_every_stage(world: int, precision: str, stages: tuple[str, ...]) -> None:
    check(world, stages, precision, 1e-6 if precision == "fp32" else 2e-2)


def resumed(folder: Path, stage: str, precision: str, cases: dict[str, OptimConfig]) -> dict[str, Any]:
    """{case: weights after six steps, and after three, a checkpoint, a new engine and three more}."""
    ranks, found = distributed.world_size(), {}
    for case, config in cases.items():
        first = engine_of(stage, precision, config)
        toy_twin.train(first, TOY, range(1, 4), ranks=ranks)
        scalars = write(first, folder / case)
        toy_twin.train(first, TOY, range(4, 7), ranks=ranks)
        second = engine_of(stage, precision, config)
        second.restore(Reader(folder / case), scalars)
        toy_twin.train(second, TOY, range(4, 7), ranks=ranks)
        found[case] = whole_weights(first), whole_weights(second)
    return found


def check_resumed(folder: Path, stage: str, cases: dict[str, OptimConfig]) -> None:
    for found in run_ranks(resumed, 2, folder, stage, "bf16", cases, timeout=240):
        for case, (through, again) in found.items():
            assert all(torch.equal(value, again[name]) for name, value in through.items()), case


def test_a_resumed_run_is_equal_to_the_bit(tmp_path: Path) -> None:
    check_resumed(tmp_path, "zero2", {case: CASES[case] for case in ("adamw_and_sgd", "clipped_each", "lamb")})


@slow
@pytest.mark.parametrize("stage", STAGES)
def test_so_is_it_at_every_stage(tmp_path: Path, stage: str) -> None:
    check_resumed(tmp_path, stage, CASES)


@pytest.mark.parametrize("case", CASES)
def test_the_plan_knows_what_is_kept(case: str) -> None:
    """What `--dry_run` says of the optimizer in fp32, where there is no master besides."""
    engine = LocalEngine(toy_twin.model_of(TOY), CASES[case], torch.device("cpu"))
    toy_twin.train(engine, TOY, range(1, 2))
    states = [kept for state in engine._optimizer.state.values() for kept in state.values() if kept.ndim > 0]
    planned = memory_plan(toy_twin.model_of(TOY), {}, 1, CASES[case])["optimizer"]
    assert sum(kept.numel() * kept.element_size() for kept in states) == planned > 0


def refused() -> str:
    config = toy_twin.configuration("zero3_offload", "fp32")
    zero = config["zero_optimization"]
    config["zero_optimization"] = {**zero, "offload_optimizer": {**zero["offload_optimizer"], "ratio": 0.5}}
    with pytest.raises(ConfigError) as caught:
        DeepSpeedEngine(toy_twin.model_of(TOY), config, CASES["adamw_and_sgd"], distributed.init())
    return str(caught.value)


@pytest.mark.parametrize("part", ["offload_optimizer", "offload_param"])
def test_what_lies_on_nvme_is_refused(part: str) -> None:
    optimizer = optimizers.build(two().named_parameters(), OptimConfig())
    optimizers.check_offload(optimizer, {"zero_optimization": {part: {"device": "cpu"}}})
    with pytest.raises(ConfigError, match=f'{part} sends to NVMe .* write "device": "cpu"'):
        optimizers.check_offload(optimizer, {"zero_optimization": {part: {"device": "nvme"}}})


def test_an_offload_that_leaves_some_on_the_gpu_is_refused() -> None:
    (said,) = run_ranks(refused, 1)
    assert "ratio is 0.5 in the ds_config" in said
    assert 'write "ratio": 1.0' in said
