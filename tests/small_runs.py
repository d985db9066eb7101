"""Whole runs of UNITER in miniature within a test's rank, on drawn scenes of which some have regions beyond reason."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tests.shard_files import write_tar
from tests.test_recipes import shrunk
from vlscale import config
from vlscale.data.order import Order, Source
from vlscale.data.scenes import embedded

SAMPLES, SHARDS, BATCH, SEED = 120, 3, 4, 1
RUN = (
    *(f"data.batch={BATCH}", f"seed={SEED}", "tasks={}", "logging.sample_keys=true", "checkpoint.every=4"),
    *("checkpoint.keep=9", "optim.warmup=2", "optim.lr=0.001"),
)


def write_data(folder: Path, features: Mapping[int, float]) -> list[str]:
    """Training and validation shards, as overrides; `features`: {sample: what all its regions' features are}."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = list(islice(embedded.samples(True, True), SAMPLES))
    for n, value in features.items():
        drawn[n] = {**drawn[n], "regions.npz": _changed(drawn[n]["regions.npz"], value)}
    parts = {f"train-{part}": range(part * SAMPLES // SHARDS, (part + 1) * SAMPLES // SHARDS) for part in range(SHARDS)}
    for name, numbers in {**parts, "val-0": range(8)}.items():
        members = [(f"{n:04d}.{field}", value) for n in numbers for field, value in drawn[n].items()]
        write_tar(folder / f"{name}.tar", members)
    return [f"data.train={folder}/train-*.tar", f"data.val={folder}/val-*.tar"]


def _changed(regions: bytes, value: float) -> bytes:
    with np.load(io.BytesIO(regions)) as arrays:
        kept = {name: arrays[name] for name in arrays.files}
    kept["features"] = np.full(kept["features"].shape, value, np.float32)
    out = io.BytesIO()
    np.savez(out, **kept)
    return out.getvalue()


def write_recipe(path: Path, overrides: Sequence[str]) -> str:
    """The run with `overrides`, as a recipe's file; no sample sees another one's picture."""
    tree: dict[str, Any] = config.dump(shrunk("uniter_tiny"))
    for key, unwanted in {"objectives": ("itm", "wra"), "views": ("pairs.mismatch",)}.items():
        tree[key] = {name: options for name, options in tree[key].items() if name not in unwanted}
    for override in (*RUN, *overrides):
        config.apply_override(tree, override)
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return str(path)


def samples_of(step: int) -> list[int]:
    """Which samples a step takes."""
    order = Order([Source("data", (0, SAMPLES))], SEED)
    return [int(each) for each in order(np.arange((step - 1) * BATCH, step * BATCH))]
