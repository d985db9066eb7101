"""`python -m tests.measure_infonce [--threads N]`: streamed InfoNCE beside the plain one, time and processor time.

One of 64 ranks with 512 rows of a global batch of 32,768 x 512, forward and backward with gradients of rows,
columns and temperature. Runs are interleaved; medians of 15. Memory is measured by tests/test_contrast.py.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional as F

from vlscale.nn import contrast

ROWS, COLUMNS, WIDTH, ROUNDS = 512, 32768, 512, 15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    torch.set_num_threads(parser.parse_args().threads)
    torch.manual_seed(0)
    rows = F.normalize(torch.randn(ROWS, WIDTH), dim=1).requires_grad_()
    columns = F.normalize(torch.randn(COLUMNS, WIDTH), dim=1).requires_grad_()
    temperature = torch.full((1,), 0.07, requires_grad=True)
    own = torch.arange(ROWS)

    def streamed() -> Tensor:
        total, _ = contrast.log_sum_exp(rows, columns, temperature)
        partners = columns.detach()[:ROWS]
        return (total - (rows * partners).sum(dim=1) / temperature).mean()

    def plain() -> Tensor:
        return F.cross_entropy(rows @ columns.T / temperature, own)

    def timed(loss: Callable[[], Tensor]) -> tuple[float, float]:
        wall, processor = time.perf_counter(), time.process_time()
        torch.autograd.grad(loss(), [rows, columns, temperature])
        return time.perf_counter() - wall, time.process_time() - processor

    timed(streamed), timed(plain)
    pairs = [(timed(streamed), timed(plain)) for _ in range(ROUNDS)]
    for place, name in enumerate(("wall", "processor")):
        ours, theirs = (median(pair[side][place] for pair in pairs) for side in (0, 1))
        print(f"{name}: streamed {ours * 1e3:.0f} ms, plain {theirs * 1e3:.0f} ms, ratio {ours / theirs:.2f}")


if __name__ == "__main__":
    main()
