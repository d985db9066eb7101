"""Streamed similarities against the whole matrix, in fp64 and fp32; their memory and time."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vlscale.nn import contrast

ROOT = Path(__file__).parents[1]
NONE = -1e29  # "hugely negative": what a row without columns stays below


class Case(NamedTuple):
    queries: Tensor  # [N, E]
    keys: Tensor  # [C, E]
    temperature: Tensor  # [1]
    mask: Tensor | None
    apart: tuple[Tensor, Tensor] | None


def case(
    rows: int = 7,
    columns: int = 23,
    width: int = 5,
    temperature: float = 0.1,
    masked: bool = False,
    apart: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    queries = F.normalize(torch.randn(rows, width, generator=generator), dim=1)
    keys = F.normalize(torch.randn(columns, width, generator=generator), dim=1).to(dtype)
    mask = torch.rand(columns, generator=generator) < 0.7 if masked else None
    ids = [torch.randint(0, 6, (number,), generator=generator) for number in (rows, columns)]
    return Case(queries, keys, torch.tensor([temperature]), mask, (ids[0], ids[1]) if apart else None)


def allowed(given: Case) -> Tensor:
    there = torch.ones(len(given.queries), len(given.keys), dtype=torch.bool)
    if given.mask is not None:
        there &= given.mask
    if given.apart is not None:
        there &= given.apart[0][:, None] != given.apart[1][None, :]
    return there


def leaves(*tensors: Tensor, dtype: torch.dtype | None = None) -> list[Tensor]:
    return [each.detach().to(dtype or each.dtype).clone().requires_grad_() for each in tensors]


def naive(given: Case, dtype: torch.dtype, weights: Tensor) -> tuple[Tensor, list[Tensor]]:
    """lse [N] by the whole matrix with -inf, and gradients of (lse * weights).sum() over rows that have columns."""
    queries, keys, temperature = inputs = leaves(given.queries, given.keys, given.temperature, dtype=dtype)
    there = allowed(given)
    rows = there.any(dim=1)
    product = (queries @ keys.T / temperature).masked_fill(~there, -torch.inf)[rows]
    lse = torch.full((len(queries),), -torch.inf, dtype=dtype)
    lse = lse.masked_scatter(rows, product.logsumexp(dim=1))
    (lse[rows] * weights.to(dtype)[rows]).sum().backward()
    return lse.detach(), [each.grad if each.grad is not None else torch.zeros_like(each) for each in inputs]


def streamed(given: Case, weights: Tensor, block: int | None) -> tuple[Tensor, Tensor, list[Tensor]]:
    inputs = leaves(*given[:3])
    lse, best = contrast.log_sum_exp(*inputs, given.mask, given.apart, block)
    (lse * weights).sum().backward()
    assert not best.requires_grad
    assert lse.dtype == best.dtype == torch.float32
    return lse.detach(), best, [each.grad for each in inputs]  # type: ignore[misc]


CASES = {
    "plain": case(),
    "one column": case(columns=1),
    "one row": case(rows=1, columns=40),
    "masked": case(masked=True),
    "apart": case(apart=True),
    "masked and apart": case(rows=9, columns=50, masked=True, apart=True, seed=1),
    "sharp": case(temperature=0.001),
    "mild": case(temperature=3.0),
    "larger": case(rows=33, columns=301, width=48, masked=True, apart=True, seed=2),
}
BLOCKS = (None, 1, 4, 23, 64)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("given", CASES.values(), ids=CASES)
def test_log_sum_exp_and_its_gradients_are_those_of_the_whole_matrix(given: Case, block: int | None) -> None:
    weights = torch.randn(len(given.queries), generator=torch.Generator().manual_seed(3))
    lse, best, gradients = streamed(given, weights, block)
    rows = allowed(given).any(dim=1)
    for dtype in (torch.float64, torch.float32):
        expected, by_hand = naive(given, dtype, weights)
        torch.testing.assert_close(lse[rows].to(dtype), expected[rows], rtol=1e-6, atol=1e-6)
        for found, right in zip(gradients, by_hand, strict=True):
            scale = max(1.0, float(right.abs().max()))
            torch.testing.assert_close(found.to(dtype), right, rtol=1e-5, atol=1e-5 * scale)
    product = given.queries.double() @ given.keys.double().T / given.temperature.double()
    greatest = product.masked_fill(~allowed(given), -torch.inf).amax(dim=1)
    torch.testing.assert_close(best[rows].double(), greatest[rows], rtol=1e-6, atol=1e-6)
    assert bool((lse[~rows] < NONE).all())
    assert bool((best[~rows] < NONE).all())


@pytest.mark.parametrize("limit", [16, 64, 300, 2**21])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_rows_and_columns_change_nothing(
    limit: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any cut gives the one-block result, also with keys that are cast."""
    given = case(rows=29, columns=61, width=8, masked=True, apart=True, dtype=dtype)
    weights = torch.randn(29, generator=torch.Generator().manual_seed(3))
    exact, by_hand = naive(given, torch.float64, weights)
    monkeypatch.setattr(contrast, "BLOCK", limit)
    monkeypatch.setattr(contrast, "ROWS", 10)
    lse, _, gradients = streamed(given, weights, None)
    torch.testing.assert_close(lse.double(), exact, rtol=1e-6, atol=1e-6)
    for found, right, rough in zip(gradients, by_hand, (False, dtype == torch.bfloat16, False), strict=True):
        tolerance = 2**-8 if rough else 1e-5  # a bf16 gradient is rounded once, not once per block of rows
        torch.testing.assert_close(found.double(), right, rtol=tolerance, atol=1e-5)
    assert gradients[1].dtype == dtype


@pytest.mark.parametrize("wanted", ["q", "k", "t", "qk", "qt", "kt", ""])
@pytest.mark.parametrize("block", [None, 6])
def test_each_input_has_its_gradient_only_where_it_wants_one(wanted: str, block: int | None) -> None:
    given = case(masked=True)
    weights = torch.rand(7, generator=torch.Generator().manual_seed(3))
    _, by_hand = naive(given, torch.float64, weights)
    inputs = leaves(*given[:3])
    for name, each in zip("qkt", inputs, strict=True):
        each.requires_grad_(name in wanted)
    lse, _ = contrast.log_sum_exp(*inputs, given.mask, None, block)
    assert lse.requires_grad == bool(wanted)
    if wanted:
        (lse * weights).sum().backward()
    for name, each, right in zip("qkt", inputs, by_hand, strict=True):
        assert (each.grad is not None) == (name in wanted)
        if each.grad is not None:
            torch.testing.assert_close(each.grad.double(), right, rtol=1e-5, atol=1e-5)


def test_gradients_are_the_slope_of_the_function() -> None:
    """Central differences of the function itself, no formula of ours or torch's involved."""
    given = case(rows=3, columns=11, masked=True, apart=True, seed=5)
    _, _, gradients = streamed(given, torch.ones(3), 4)
    generator = torch.Generator().manual_seed(0)
    steps = [torch.randn(each.shape, generator=generator) for each in given[:3]]
    step = 1e-2 * 0.1  # the temperature is 0.1

    def value(sign: int) -> float:
        moved = [each + sign * step * way for each, way in zip(given[:3], steps, strict=True)]
        return float(contrast.log_sum_exp(*moved, given.mask, given.apart, 4)[0].double().sum())

    slope = sum(float((found * way).sum()) for found, way in zip(gradients, steps, strict=True))
    assert (value(1) - value(-1)) / (2 * step) == pytest.approx(slope, rel=5e-3)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("block", [None, 4])
def test_a_row_without_columns_has_no_part_in_the_gradient(block: int | None, frozen: bool) -> None:
    queries, keys, temperature = leaves(*case(rows=3)[:3])
    keys.requires_grad_(not frozen)
    apart = torch.tensor([1, 1, 2]), torch.ones(23, dtype=torch.int64)  # rows 0 and 1 have nothing
    lse, best = contrast.log_sum_exp(queries, keys, temperature, None, apart, block)
    assert bool((lse[:2] < NONE).all())
    assert bool((best[:2] < NONE).all())
    assert bool(torch.isfinite(lse).all())
    positive = torch.tensor([0.5, -3.0, 2.0], requires_grad=True)
    total = torch.logaddexp(positive, lse)
    torch.testing.assert_close(total[:2], positive[:2])
    total.sum().backward()
    assert positive.grad is not None
    assert queries.grad is not None
    torch.testing.assert_close(positive.grad[:2], torch.ones(2))
    assert queries.grad[:2].abs().max() == 0
    assert queries.grad[2].abs().max() > 0
    alone = contrast.log_sum_exp(queries[2:].detach(), keys.detach(), temperature)[0]
    alone = torch.logaddexp(positive[2:].detach(), alone)
    (expected,) = torch.autograd.grad(alone.sum(), temperature)
    torch.testing.assert_close(temperature.grad, expected)
    lse, _ = contrast.log_sum_exp(queries, keys, temperature, None, apart, block)
    (of_queries,) = torch.autograd.grad(lse[:2].sum(), queries)  # and also without logaddexp
    assert of_queries.abs().max() == 0


@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("columns", [0, 5])
def test_no_rows_or_no_columns(rows: int, columns: int) -> None:
    for block in (None, 2):
        inputs = leaves(*case(rows=rows, columns=columns)[:3])
        lse, best = contrast.log_sum_exp(*inputs, block=block)
        assert lse.shape == best.shape == (rows,)
        torch.logaddexp(lse, torch.ones(rows)).sum().backward()
        for each in inputs:
            assert each.grad is not None
            assert bool(torch.isfinite(each.grad).all())
            assert rows * columns > 0 or not each.grad.any()
        mean, sums = contrast.soft_keys(*inputs, block=block)
        assert mean.shape == (rows, 5)
        assert columns > 0 or bool((sums < NONE).all() and (mean == 0).all())
        scale, bias = leaves(torch.tensor([2.0]), torch.tensor([-1.0]))
        total = contrast.sigmoid_pairs(inputs[0], inputs[1], scale, bias, 0, block)
        assert total.shape == ()
        total.backward()
        assert rows * columns > 0 or float(total.detach()) == 0


def test_backward_may_run_twice_but_is_not_differentiable() -> None:
    for block in (None, 4):
        inputs = leaves(*case()[:3])
        lse, _ = contrast.log_sum_exp(*inputs, block=block)
        first, second = (torch.autograd.grad(lse.sum(), inputs, retain_graph=True) for _ in range(2))
        torch.testing.assert_close(first, second, rtol=0, atol=0)
    inputs = leaves(*case()[:3])
    lse, _ = contrast.log_sum_exp(*inputs, block=4)
    weights = torch.ones(7, requires_grad=True)
    (of_queries, *_) = torch.autograd.grad((lse * weights).sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        of_queries.sum().backward()


@pytest.mark.parametrize("block", [None, 4])
def test_autocast_changes_nothing(block: int | None) -> None:
    given = case()
    scale, bias = torch.tensor([5.0]), torch.tensor([-2.0])

    def results() -> list[Tensor]:
        frozen = given.queries.clone().requires_grad_(), given.keys, given.temperature
        out = [contrast.log_sum_exp(*each, block=block)[0] for each in (leaves(*given[:3]), frozen)]
        out += [contrast.logits(*given[:3]), *contrast.soft_keys(*given[:3], block=block)]
        return [*out, contrast.sigmoid_pairs(given.queries, given.keys, scale, bias, 0, block)]

    expected = results()
    with torch.autocast("cpu", torch.bfloat16):
        found = results()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_logits_are_the_matrix() -> None:
    given = case(masked=True, apart=True)
    found = contrast.logits(*given)
    there = allowed(given)
    torch.testing.assert_close(found[there], (given.queries @ given.keys.T / given.temperature)[there])
    assert bool((found[~there] == contrast.NEVER).all())
    assert contrast.logits(*case(dtype=torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("temperature", [0.001, 0.1, 10.0])
def test_soft_keys_are_attention(temperature: float, block: int | None, dtype: torch.dtype) -> None:
    given = case(rows=9, columns=50, temperature=temperature, masked=True, apart=True, dtype=dtype)
    mean, lse = contrast.soft_keys(*given, block)
    product = given.queries.double() @ given.keys.double().T / given.temperature.double()
    product = product.masked_fill(~allowed(given), -torch.inf)
    torch.testing.assert_close(lse.double(), product.logsumexp(dim=1), rtol=1e-6, atol=1e-6)
    rough = 1e-6 if temperature >= 0.1 else 1e-4  # logits near 1000 have an ulp of 6e-5
    torch.testing.assert_close(mean.double(), product.softmax(dim=1) @ given.keys.double(), rtol=rough, atol=rough)
    assert mean.dtype == lse.dtype == torch.float32
    assert not mean.requires_grad


@pytest.mark.parametrize("temperature", [0.001, 0.1])
def test_joined_soft_keys_are_those_of_all_columns(temperature: float) -> None:
    given = case(rows=9, columns=50, temperature=temperature)
    left = torch.arange(50) < 20
    halves = [contrast.soft_keys(*given[:3], mask, block=8) for mask in (left, ~left)]
    whole = contrast.soft_keys(*given[:3], block=8)
    torch.testing.assert_close(contrast.join_soft_keys(*halves), whole, rtol=1e-5, atol=1e-5)
    nothing = contrast.soft_keys(*given[:3], torch.zeros(50, dtype=torch.bool), block=8)
    assert nothing[0].abs().max() == 0
    torch.testing.assert_close(contrast.join_soft_keys(whole, nothing), whole)
    torch.testing.assert_close(contrast.join_soft_keys(nothing, whole), whole)
    mean, lse = contrast.join_soft_keys(nothing, nothing)
    assert mean.abs().max() == 0
    assert bool((lse < NONE).all() and torch.isfinite(lse).all())


@pytest.mark.parametrize("block", [None, 4])
def test_soft_targets_need_no_matrix(block: int | None) -> None:
    """Cross-entropy with the teacher's softmax as target: lse - query . soft key / temperature."""
    given = case(rows=6, columns=31)
    teachers = case(rows=6, seed=9).queries
    target = contrast.logits(teachers, given.keys, given.temperature).softmax(dim=1)
    expected = F.cross_entropy(contrast.logits(*given[:3]), target)
    lse, _ = contrast.log_sum_exp(*given[:3], block=block)
    mean, _ = contrast.soft_keys(teachers, given.keys, given.temperature, block=block)
    found = (lse - (given.queries * mean).sum(dim=1) / given.temperature).mean()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_of_an_id(dtype: torch.dtype) -> None:
    ids = torch.tensor([4, 7, 4, -5, 9])
    column_ids = torch.tensor([7, 4, 1, 4, -1, 4, 100, 9, -100])
    keys = case(columns=9, dtype=dtype).keys.requires_grad_()
    equal = (ids[:, None] == column_ids[None, :]).float()
    total, number = contrast.sum_of_id(ids, keys, column_ids)
    torch.testing.assert_close(total, equal @ keys.float())
    assert number.tolist() == [3, 1, 3, 0, 1]
    weights = case(rows=5, seed=4).queries
    (found,) = torch.autograd.grad((total * weights).sum(), keys)
    torch.testing.assert_close(found, (equal.T @ weights).to(dtype))
    for rows, columns in ((0, 9), (5, 0), (0, 0)):
        total, number = contrast.sum_of_id(ids[:rows], keys[:columns], column_ids[:columns])
        assert total.shape == (rows, 5)
        assert not total.any()
        assert not number.any()


def naive_sigmoid(inputs: list[Tensor], first: int | None) -> Tensor:
    queries, keys, scale, bias = inputs
    product = scale * (queries @ keys.T) + bias
    sign = -torch.ones_like(product)
    for row in range(len(queries)):
        if first is not None and 0 <= first + row < len(keys):
            sign[row, first + row] = 1
    return -F.logsigmoid(sign * product).sum()


@pytest.mark.parametrize("first", [None, 0, 9, 20, -3, 100, -100])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sigmoid_pairs_are_the_sum_over_the_whole_matrix(
    first: int | None, block: int | None, dtype: torch.dtype
) -> None:
    given = case(dtype=dtype)
    values = [given.queries, given.keys, torch.tensor([10.0]), torch.tensor([-10.0])]
    exact = leaves(*values, dtype=torch.float64)
    expected = naive_sigmoid(exact, first)
    (expected * 0.3).backward()
    inputs = leaves(*values)
    place = torch.tensor(first) if first is not None and block == 4 else first  # a tensor will do as well
    total = contrast.sigmoid_pairs(*inputs, place, block)
    assert total.shape == ()
    torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=1e-7)
    (total * 0.3).backward()
    for found, right in zip(inputs, exact, strict=True):
        assert found.grad is not None
        assert found.grad.dtype == found.dtype
        assert right.grad is not None
        rough = 2**-8 if found.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(found.grad.double(), right.grad, rtol=rough, atol=1e-5)


def test_sigmoid_pairs_of_rare_mistakes_keep_their_digits() -> None:
    """Matches that are all but certain: softplus(z) - z would lose them to rounding."""
    queries = F.normalize(torch.eye(6), dim=1)
    values = [queries, queries.clone(), torch.tensor([40.0]), torch.tensor([-20.0])]
    expected = naive_sigmoid([each.double() for each in values], 0)
    for block in (None, 4):
        torch.testing.assert_close(contrast.sigmoid_pairs(*values, 0, block).double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("wanted", ["q", "k", "s", "b", "ks", ""])
def test_sigmoid_pairs_give_gradients_where_they_are_wanted(wanted: str) -> None:
    given = case()
    values = [given.queries, given.keys, torch.tensor([10.0]), torch.tensor([-10.0])]
    exact, inputs = leaves(*values, dtype=torch.float64), leaves(*values)
    naive_sigmoid(exact, 2).backward()
    for name, each in zip("qksb", inputs, strict=True):
        each.requires_grad_(name in wanted)
    total = contrast.sigmoid_pairs(*inputs, 2, 5)
    if wanted:
        total.backward()
    for name, found, right in zip("qksb", inputs, exact, strict=True):
        assert (found.grad is not None) == (name in wanted)
        if found.grad is not None and right.grad is not None:
            torch.testing.assert_close(found.grad.double(), right.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("limit", [16, 64, 2**21])
def test_sigmoid_pairs_of_parts_add_up(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ring of ranks: each block of texts with the place of its matches, or with none."""
    monkeypatch.setattr(contrast, "BLOCK", limit)
    given = case(rows=8, columns=24)
    values = [given.queries, given.keys, torch.tensor([10.0]), torch.tensor([-10.0])]
    whole, parts, told = leaves(*values), leaves(*values), leaves(*values)
    contrast.sigmoid_pairs(*whole, 8).backward()
    for number in range(3):
        block = slice(8 * number, 8 * number + 8)
        first = 0 if number == 1 else None
        contrast.sigmoid_pairs(parts[0], parts[1][block], *parts[2:], first).backward()
        contrast.sigmoid_pairs(told[0], told[1][block], *told[2:], 8 - 8 * number).backward()
    for right, *found in zip(whole, parts, told, strict=True):
        for each in found:
            torch.testing.assert_close(each.grad, right.grad, rtol=1e-5, atol=1e-5)


MEMORY = """
import sys
import torch
from torch.nn import functional as F
from tests.tables import Tables, rows
from vlscale.model import Encodings
from vlscale.nn import contrast
from vlscale.objectives import itc
from vlscale.types import Moment

MIB = 2**20

def kilobytes(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(name))

def streamed(queries, keys, partner, temperature):
    lse, _ = contrast.log_sum_exp(queries, keys, temperature)
    return (lse - (queries * partner).sum(1) / temperature).mean()

def plain(queries, keys, partner, temperature):
    product = queries @ keys.T / temperature
    return (product.logsumexp(1) - (queries * partner).sum(1) / temperature).mean()

def inputs(rows, columns, width):
    shapes = [(rows, width), (columns, width)] * 2
    return [F.normalize(torch.randn(shape), dim=1).requires_grad_() for shape in shapes]

def step(way, image, texts, text, images):
    temperature = torch.tensor([0.07], requires_grad=True)
    i2t = way(image, texts, text, temperature)
    t2i = way(text, images, image, temperature)
    ((i2t + t2i) / 2).backward()

def objective(image, texts, text, images):
    # what one rank of 64 does in `itc` with scope=global, after the gather
    family = Tables(image.detach(), text.detach(), temperature=0.07)
    loss = itc.build(itc.Config(queue=0, soften=0.0, scope="global"), family)
    batch = rows(0, len(image))
    enc = Encodings(family, batch, Moment(1), {})
    loss(enc, batch, (images, texts)).value.backward()
    image.grad, text.grad = family.image.grad, family.text.grad

if sys.argv[1] == "objective":
    step = lambda way, *given: objective(*given)
way = {"streamed": streamed, "plain": plain, "objective": objective}[sys.argv[1]]
for _ in range(2):
    step(way, *inputs(64, 1024, 512))  # threads, library scratch space, lazy imports
given = inputs(512, 32768, 512)
with open("/proc/self/clear_refs", "w") as peak:
    peak.write("5")  # the high-water mark starts again from here
before = kilobytes("VmRSS") * 1024
step(way, *given)
results = sum(each.grad.nbytes for each in given)
print((kilobytes("VmHWM") * 1024 - before - results) / MIB)
"""


def beyond_inputs_and_outputs(way: str) -> float:
    """MiB of resident memory that InfoNCE takes above inputs and gradients, at its peak, in a fresh process."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", MEMORY, way], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's high-water mark")
def test_infonce_of_32768_columns_takes_little_memory() -> None:
    """512 rows, 32,768 columns, both directions, all gradients: one matrix alone would take 64 MiB."""
    assert beyond_inputs_and_outputs("streamed") <= 64
    assert beyond_inputs_and_outputs("objective") <= 64
    assert beyond_inputs_and_outputs("plain") > 128  # the measure does see matrices


@pytest.mark.slow
def test_infonce_of_32768_columns_is_not_slower_than_the_whole_matrix() -> None:
    """In processor time of one thread, which neighbours on the machine disturb least."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    given = inputs = [F.normalize(torch.randn(rows, 512), dim=1).requires_grad_() for rows in (512, 32768)]
    temperature, labels = torch.tensor([0.07]), torch.arange(512)

    def plain() -> Tensor:
        return F.cross_entropy(given[0] @ given[1].T / temperature, labels)

    def streamed() -> Tensor:
        lse, _ = contrast.log_sum_exp(given[0], given[1], temperature)
        return (lse - (given[0] * given[1][:512]).sum(dim=1) / temperature).mean()

    def seconds(way: Callable[[], Tensor]) -> float:
        start = time.process_time()
        torch.autograd.grad(way(), inputs)
        return time.process_time() - start

    assert float(streamed().detach()) == pytest.approx(float(plain().detach()), rel=1e-5)
    try:
        measured = [(seconds(plain), seconds(streamed)) for _ in range(8)][1:]
    finally:
        torch.set_num_threads(threads)
    before, after = (statistics.median(column) for column in zip(*measured, strict=True))
    assert after <= 1.15 * before
