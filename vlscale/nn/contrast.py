"""Similarities of a few rows against very many columns, whose matrix is never held whole.

The matrix is made block by block, and made again in the backward pass, so that memory grows with rows plus
columns (the running maximum and sum of Milakov and Gimelshein 2018; FlashAttention, Dao et al. 2022, for
the mean key). All arithmetic is fp32, also under autocast. Nothing waits for the device, except in
`sum_of_id`.

Shapes in this file: N rows (queries, fp32), E width, and C columns: keys, fp32 or a narrower type that is
cast block by block; there may be none. `mask` [C] bool, False = this column does not exist. `apart` = (row
ids [N] int64, column ids [C] int64): a pair with equal ids does not exist. `block` = columns of one block;
None = as many as `BLOCK` allows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

NEVER = -1e30  # logit of a pair that does not exist: exp gives 0, and no difference of two of them gives NaN
BLOCK = 2**21  # logits of one block: 8 MiB of fp32, enough for matrix products at full speed
ROWS = 1024  # rows of one block where the matrix has several, so that blocks are as broad as they are tall

Apart = tuple[Tensor, Tensor]  # row ids [N] int64, column ids [C] int64


def logits(
    queries: Tensor, keys: Tensor, temperature: Tensor, mask: Tensor | None = None, apart: Apart | None = None
) -> Tensor:
    """The whole matrix queries @ keys.T / temperature, for one block or to look at.

    Args:
        queries: [N, E].
        keys: [C, E].
        temperature: [1] fp32.
        mask: [C] bool, False = no such column.
        apart: ids of rows and columns; no pair with equal ids.

    Returns:
        [N, C] fp32, `NEVER` where there is no pair; with gradient to queries, keys and temperature.
    """
    with torch.autocast(queries.device.type, enabled=False):
        product = (queries.float() / temperature.float()) @ keys.float().T
    if mask is not None:
        product = product.masked_fill(~mask, NEVER)
    if apart is not None:
        product = product.masked_fill(apart[0][:, None] == apart[1], NEVER)
    return product


def log_sum_exp(
    queries: Tensor,
    keys: Tensor,
    temperature: Tensor,
    mask: Tensor | None = None,
    apart: Apart | None = None,
    block: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Logarithm of each row's sum of exp(queries @ keys.T / temperature).

    A row without any column has about `NEVER` in both results and sends no gradient, also after
    `torch.logaddexp` with another row's result. Where keys need no gradient, the backward pass is free.

    Args:
        queries, keys, temperature, mask, apart: as for `logits`.
        block: columns of one block.

    Returns:
        lse [N] fp32 with gradient to those of queries, keys and temperature that want one; and each row's
        greatest logit [N] fp32 without gradient.
    """
    if block is None and _small(queries, keys):
        product = logits(queries, keys, temperature, mask, apart)
        return product.logsumexp(dim=1), product.detach().amax(dim=1)
    wanted = torch.is_grad_enabled() and (queries.requires_grad or temperature.requires_grad)
    inputs = (queries.float(), keys, temperature.float(), mask, apart, block, wanted)
    results: tuple[Tensor, Tensor] = _LogSumExp.apply(*inputs)  # type: ignore[no-untyped-call]
    return results


@torch.no_grad()
def soft_keys(
    teachers: Tensor,
    keys: Tensor,
    temperature: Tensor,
    mask: Tensor | None = None,
    apart: Apart | None = None,
    block: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Each row's mean key under its softmax: softmax(teachers @ keys.T / temperature) @ keys.

    The cross-entropy of soft targets needs no more of them: sum_c p_c * (q . k_c) = q . mean key.

    Args:
        teachers: [N, E], in the queries' place.
        keys, temperature, mask, apart, block: as for `log_sum_exp`.

    Returns:
        mean keys [N, E] fp32 and lse [N] fp32, without gradient; a row without any column has zeros and
        `NEVER`. Results of disjoint columns are joined by `join_soft_keys`.
    """
    matrix = _Matrix.of(teachers.float(), keys, mask, apart, block)
    mean = torch.zeros(teachers.shape, dtype=torch.float32, device=teachers.device)
    lse, _ = _stream(matrix, temperature.float(), mean)
    return mean, lse


def join_soft_keys(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """What `soft_keys` gives for all columns, from its results (mean [N, E], lse [N]) for two disjoint sets."""
    (mean, lse), (other_mean, other_lse) = first, second
    joined = torch.logaddexp(lse, other_lse)
    share, other_share = (lse - joined).exp()[:, None], (other_lse - joined).exp()[:, None]
    return mean * share + other_mean * other_share, joined


def sum_of_id(ids: Tensor, keys: Tensor, column_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's sum of the keys that carry its id, in memory linear in rows and found columns.

    Args:
        ids: [N] int64.
        keys: [C, E].
        column_ids: [C] int64.

    Returns:
        [N, E] fp32 with gradient to keys, and how many keys that is, [N] fp32.
    """
    groups, group_of_row = torch.unique(ids, return_inverse=True)
    places = torch.searchsorted(groups, column_ids)
    at_place = F.pad(groups, (0, 1))[places]  # a place past the end finds none
    found = ((at_place == column_ids) & (places < len(groups))).nonzero()[:, 0]
    places = places[found]
    total = torch.zeros((len(groups), keys.shape[1]), dtype=torch.float32, device=keys.device)
    total = total.index_add(0, places, keys.index_select(0, found).float())
    number = torch.bincount(places, minlength=len(groups)).float()
    return total.index_select(0, group_of_row), number[group_of_row]


def sigmoid_pairs(
    queries: Tensor, keys: Tensor, scale: Tensor, bias: Tensor, first: int | Tensor | None, block: int | None = None
) -> Tensor:
    """SUM over all N * C pairs of -log sigmoid(y * (scale * q . k + bias)) (Zhai et al. 2023, SigLIP, algorithm 1).

    Args:
        queries: [N, E].
        keys: [C, E].
        scale: [1] fp32.
        bias: [1] fp32.
        first: the column that matches row 0, row 1 matches the next, and so on; y = +1 there and -1
            elsewhere. A match outside 0..C-1 lies in another block of columns. None = no pair matches.
        block: columns of one block.

    Returns:
        [] fp32 with gradient to those of queries, keys, scale and bias that want one.
    """
    if block is None and _small(queries, keys):
        with torch.autocast(queries.device.type, enabled=False):
            product = (queries.float() * scale.float()) @ keys.float().T + bias.float()
        return F.softplus(product * _flip_matches(torch.ones_like(product), 0, 0, first)).sum()
    inputs = (queries.float(), keys, scale.float(), bias.float(), first, block)
    total: Tensor = _SigmoidPairs.apply(*inputs)  # type: ignore[no-untyped-call]
    return total


def _small(queries: Tensor, keys: Tensor) -> bool:
    """Whether the matrix is one block; plain autograd, which keeps it for the backward pass, is faster then."""
    return 0 < max(len(queries) * len(keys), queries.numel(), keys.numel()) <= BLOCK and len(keys) > 0


@dataclass(frozen=True)
class _Matrix:
    """queries @ keys.T cut into blocks; columns outside, rows inside, so that keys are cast once."""

    queries: Tensor  # [N, E] fp32
    keys: Tensor  # [C, E]
    mask: Tensor | None
    apart: Apart | None
    rows: int  # of one block
    columns: int  # of one block

    @staticmethod
    def of(queries: Tensor, keys: Tensor, mask: Tensor | None, apart: Apart | None, block: int | None) -> _Matrix:
        """Cut so that a block of logits, of queries and of cast keys has at most `BLOCK` numbers each."""
        number, width = queries.shape
        rows = BLOCK // block if block is not None else min(ROWS, BLOCK // width)
        rows = max(1, min(rows, number))
        columns = block if block is not None else BLOCK // (rows if keys.dtype == torch.float32 else max(rows, width))
        return _Matrix(queries, keys, mask, apart, rows, max(1, min(columns, len(keys))))

    def buffer(self) -> Tensor:
        """For one block of logits."""
        return self.queries.new_empty(self.rows * self.columns)

    def room(self) -> Tensor | None:
        """For one block of keys in fp32; None where they are fp32 already."""
        cast = self.keys.dtype != torch.float32
        return self.queries.new_empty((self.columns, self.keys.shape[1])) if cast else None

    def row_blocks(self) -> list[slice]:
        """At least one, which is empty where there is no row."""
        number = len(self.queries)
        return [slice(start, min(start + self.rows, number)) for start in range(0, max(number, 1), self.rows)]

    def column_blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Each block's columns and its keys in fp32, valid until the next one."""
        total, room = len(self.keys), self.room()
        for start in range(0, total, self.columns):
            columns = slice(start, min(start + self.columns, total))
            part = self.keys[columns]
            yield columns, part if room is None else room[: len(part)].copy_(part)

    def product(self, scaled: Tensor, rows: slice, columns: slice, keys: Tensor, buffer: Tensor) -> Tensor:
        """One block of logits [rows, columns], made in `buffer`, from scaled queries [rows, E] and keys."""
        out = _part(buffer, len(scaled), len(keys))
        torch.mm(scaled, keys.T, out=out)
        if self.mask is not None:
            out.masked_fill_(~self.mask[columns], NEVER)
        if self.apart is not None:
            out.masked_fill_(self.apart[0][rows, None] == self.apart[1][columns], NEVER)
        return out

    def pull(
        self,
        weigh: Callable[[slice, slice, Tensor], Tensor],
        scaled: Callable[[slice], Tensor],
        sides: tuple[bool, bool],
    ) -> tuple[Tensor | None, Tensor | None]:
        """weights @ keys [N, E] fp32 and weights.T @ scaled queries [C, E], those of the two that `sides` asks for.

        `weigh` gives the block of weights of rows, columns and their keys, valid until the next call; `scaled`
        gives what stands for the queries of some rows.
        """
        wants_queries, wants_keys = sides
        of_queries = torch.zeros_like(self.queries) if wants_queries else None
        of_keys = torch.empty_like(self.keys) if wants_keys else None
        room = self.room() if wants_keys else None
        for columns, keys in self.column_blocks():
            target = room[: len(keys)] if room is not None else of_keys[columns] if of_keys is not None else None
            for number, rows in enumerate(self.row_blocks()):
                weights = weigh(rows, columns, keys)
                if of_queries is not None:
                    of_queries[rows].addmm_(weights, keys)
                if target is not None and number == 0:
                    torch.mm(weights.T, scaled(rows), out=target)
                elif target is not None:
                    target.addmm_(weights.T, scaled(rows))
            if room is not None and of_keys is not None:
                of_keys[columns].copy_(room[: len(keys)])
        return of_queries, of_keys


def _part(buffer: Tensor, rows: int, columns: int) -> Tensor:
    return buffer[: rows * columns].view(rows, columns)


def _stream(matrix: _Matrix, temperature: Tensor, mean: Tensor | None) -> tuple[Tensor, Tensor]:
    """lse [N] and greatest logit [N]; fills `mean` [N, E], which holds zeros, with the mean keys."""
    lse = matrix.queries.new_full((len(matrix.queries),), NEVER)
    best = lse.clone()
    buffer, work = matrix.buffer(), matrix.buffer()
    for columns, keys in matrix.column_blocks():
        for rows in matrix.row_blocks():
            product = matrix.product(matrix.queries[rows] / temperature, rows, columns, keys, buffer)
            greatest = product.amax(dim=1)
            best[rows] = torch.maximum(best[rows], greatest)
            out = _part(work, *product.shape)
            if mean is None:  # one pass for maximum and sum; the greatest log-probability is greatest - lse
                own = greatest - torch.log_softmax(product, dim=1, out=out).amax(dim=1)
                lse[rows] = torch.logaddexp(lse[rows], own)
                continue
            shares = torch.softmax(product, dim=1, out=out)
            own = greatest - shares.amax(dim=1).log()
            joined = torch.logaddexp(lse[rows], own)
            share = (own - joined).exp() * (greatest > NEVER / 2)  # a row without columns adds no key
            mean[rows] *= (lse[rows] - joined).exp()[:, None]
            mean[rows].addmm_(shares.mul_(share[:, None]), keys)
            lse[rows] = joined
    return lse, best


class _LogSumExp(torch.autograd.Function):
    """`log_sum_exp`. With p = exp(logits - lse): d lse / d query = sum_c p_c k_c / temperature, the mean key."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, temperature: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
        mask, apart, block, wanted = options
        matrix = _Matrix.of(queries, keys, mask, apart, block)
        ctx.block, ctx.frozen = block, not ctx.needs_input_grad[1]
        mean = torch.zeros_like(queries) if wanted and ctx.frozen else None
        lse, best = _stream(matrix, temperature, mean)
        ctx.mark_non_differentiable(best)
        if ctx.frozen:
            ctx.save_for_backward(queries, temperature, mean)
        else:
            ctx.save_for_backward(queries, keys, temperature, lse, mask, *(apart or ()))
        return lse, best

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        of_keys = None
        if ctx.frozen:
            queries, temperature, mean = ctx.saved_tensors
        else:
            queries, keys, temperature, lse, mask, *apart = ctx.saved_tensors
            matrix = _Matrix.of(queries, keys, mask, tuple(apart) or None, ctx.block)
            shift = torch.where(lse > NEVER / 2, lse, 0)[:, None]  # exp(NEVER - 0) = 0: no column, no gradient
            buffer = matrix.buffer()

            def weigh(rows: slice, columns: slice, keys: Tensor) -> Tensor:
                product = matrix.product(queries[rows] / temperature, rows, columns, keys, buffer)
                return product.sub_(shift[rows]).exp_()

            def scaled(rows: slice) -> Tensor:
                return torch.div(queries[rows], temperature).mul_(gradient[rows, None])

            sides = (ctx.needs_input_grad[0] or ctx.needs_input_grad[2], True)
            mean, of_keys = matrix.pull(weigh, scaled, sides)
        of_queries = of_temperature = None
        factor = gradient / temperature
        if ctx.needs_input_grad[2]:  # sum_c p_c * logit_c = query . mean key / temperature
            of_temperature = -((queries * mean).sum(dim=1) * factor).sum().view(1) / temperature
        if ctx.needs_input_grad[0]:
            of_queries = mean * factor[:, None]
        return of_queries, of_keys, of_temperature, None, None, None, None


class _SigmoidPairs(torch.autograd.Function):
    """`sigmoid_pairs`. A term is softplus(v), v = -y * logit, with d term / d logit = -y * sigmoid(v)."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, scale: Tensor, bias: Tensor, *options: Any) -> Tensor:
        first, block = options
        matrix = _Matrix.of(queries, keys, None, None, block)
        ctx.block, ctx.first = block, first
        buffer, total = matrix.buffer(), queries.new_zeros(())
        for columns, part in matrix.column_blocks():
            for rows in matrix.row_blocks():
                product = matrix.product(queries[rows] * scale, rows, columns, part, buffer).add_(bias)
                total += F.softplus(_flip_matches(product, rows.start, columns.start, first)).sum()
        ctx.save_for_backward(queries, keys, scale, bias)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, scale, bias = ctx.saved_tensors
        needs, first = ctx.needs_input_grad, ctx.first
        matrix = _Matrix.of(queries, keys, None, None, ctx.block)
        buffer, of_bias = matrix.buffer(), torch.zeros_like(bias)

        def weigh(rows: slice, columns: slice, keys: Tensor) -> Tensor:
            product = matrix.product(queries[rows] * scale, rows, columns, keys, buffer).add_(bias)
            weights = _flip_matches(product, rows.start, columns.start, first).sigmoid_()
            _flip_matches(weights, rows.start, columns.start, first)
            of_bias.add_(weights.sum())
            return weights

        def scaled(rows: slice) -> Tensor:
            return torch.mul(queries[rows], scale * gradient)

        pulled, of_keys = matrix.pull(weigh, scaled, (needs[0] or needs[2], needs[1]))
        of_queries = of_scale = None
        if pulled is not None:
            of_scale = (queries * pulled).sum().view(1) * gradient
            of_queries = pulled.mul_(scale * gradient)
        return of_queries, of_keys, of_scale, of_bias * gradient, None, None


def _flip_matches(block: Tensor, row: int, column: int, first: int | Tensor | None) -> Tensor:
    """Turn the sign of the matching pairs' entries in place; the block starts at `row` and `column`."""
    if first is None:
        return block
    places = torch.arange(row, row + block.shape[0], device=block.device) + first - column
    inside = (places >= 0) & (places < block.shape[1])
    places = places.clamp(0, block.shape[1] - 1)[:, None]
    entries = block.gather(1, places)
    return block.scatter_(1, places, torch.where(inside[:, None], -entries, entries))
