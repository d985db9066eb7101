"""The numbers of docs/cluster.md: its piece of Python runs, and every cell of its tables is what `traffic` gives."""

from __future__ import annotations

import contextlib
import functools
import io
import re
from typing import NamedTuple

import pytest
import torch

from tests.models import batch_for
from tests.runs import ROOT
from vlscale import build, config
from vlscale.flops import step_flops
from vlscale.plan import parameter_sizes
from vlscale.traffic import (
    NETWORKS,
    Part,
    Sizes,
    Zero,
    agreement_traffic,
    contrast_traffic,
    engine_traffic,
    weak_scaling,
)

TEXT = (ROOT / "docs" / "cluster.md").read_text()
SAMPLES, RANKS = 64, 512  # of a rank and micro-batch; 64 nodes of 8
REACHED = 0.35 * 989.4e12  # FLOP/s of an H100, as assumed there


class Run(NamedTuple):
    """A recipe, as far as traffic goes."""

    sizes: Sizes
    compute: float  # seconds
    keys: int  # bytes per sample that are gathered, fp32
    gradients: int  # and that come back

    def contrast(self, ranks: int, micro_batches: int = 1) -> list[Part]:
        return contrast_traffic(SAMPLES * micro_batches, ranks, self.keys, self.gradients)

    def moved(self, stage: int, ranks: int, micro_batches: int = 1) -> list[Part]:
        zero = Zero(stage, weight=2, gradient=2, overlap=stage >= 2)
        two_pass = micro_batches > 1 and self.gradients > 0
        parts = engine_traffic(self.sizes, zero, ranks, micro_batches, two_pass=two_pass)
        return [*parts, *self.contrast(ranks, micro_batches), *agreement_traffic()]


@functools.cache
def run(name: str) -> Run:
    recipe = config.load(name, ("objectives.itc.queue=64",) if name == "albef_4m" else ())  # a queue is no traffic
    with torch.device("meta"):
        model = build.build_model(recipe)
    flops = step_flops(model, batch_for(recipe.family.inputs, recipe.family.vocab, 4)).model / 4
    keys = 2 * 4 * recipe.family.embed  # a picture's and a text's
    gradients = keys if recipe.objectives["itc"].scope == "global" else 0
    return Run(parameter_sizes(model, recipe.optim), SAMPLES * flops / REACHED, keys, gradients)


def table(head: str) -> dict[str, list[str]]:
    """The rows below a table's head, by their first cell."""
    assert TEXT.count(f"\n{head}\n") == 1
    rows = TEXT.partition(f"\n{head}\n")[2].partition("\n\n")[0].splitlines()[1:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return {first: others for first, *others in cells}


def written(value: float, like: str) -> str:
    """A number with as many decimals as another."""
    return f"{value:.{len(like.partition('.')[2])}f}"


def test_the_piece_of_python_runs() -> None:
    (block,) = (each for each in re.findall(r"^```python\n(.*?)^```", TEXT, re.S | re.M) if "weak_scaling(" in each)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(block, {})
    rows = re.findall(r"^ *(\d+) nodes: ([\d.]+) s per step, efficiency ([\d.]+)$", said.getvalue(), re.M)
    assert [int(nodes) for nodes, _, _ in rows] == [1, 4, 16, 64]
    assert [float(efficiency) for _, _, efficiency in rows] == pytest.approx(
        [0.05 / float(step) for _, step, _ in rows], abs=0.01
    )


def test_what_is_said_of_the_recipes() -> None:
    assumed = re.search(r"([\d.]+) s for albef_4m and ([\d.]+) s for clip_vit_l14", TEXT)
    assert assumed
    for name, seconds in zip(("albef_4m", "clip_vit_l14"), assumed.groups(), strict=True):
        assert written(run(name).compute, seconds) == seconds
        assert f"{name} ({sum(run(name).sizes.trainable) / 1e6:.0f} M" in TEXT


def test_every_cell_of_the_traffic() -> None:
    rows = table("| | ZeRO 0 | 1 | 2 | 3 |")
    assert len(rows) == 6
    name = ""
    for first, cells in rows.items():
        share = first.startswith("of it")  # of the row above
        name = name if share else re.findall(r"\w+", first)[0]
        several = 4 if first.endswith("4 micro-batches") else 1
        for stage, cell in enumerate(cells):
            parts = run(name).contrast(RANKS) if share else run(name).moved(stage, RANKS, several)
            assert written(sum(part.sent(RANKS) for part in parts) / 1e9, cell) == cell, (first, stage)


@pytest.mark.parametrize("name", ["albef_4m", "clip_vit_l14"])
def test_every_cell_of_the_efficiencies(name: str) -> None:
    nodes = (1, 2, 4, 8, 16, 32, 64)
    rows = table(f"| {name} | {' | '.join(map(str, nodes))} |")
    assert len(rows) >= 7
    for first, cells in rows.items():
        stage, _, network = first.removeprefix("ZeRO ").partition(", ")
        moved = functools.partial(run(name).moved, int(stage))
        found = weak_scaling(nodes, run(name).compute, moved, NETWORKS[network])
        assert [written(each.efficiency, cell) for each, cell in zip(found, cells, strict=True)] == cells, first
