"""Every recipe on samples at the edge: one word and 512, no region and many, pictures of all shapes, clips of one frame
and of many, with one sentence and with forty, nothing hidden, one sample per rank."""

from __future__ import annotations

import json
from contextlib import redirect_stdout
from dataclasses import replace
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from tests.clip_files import clip
from tests.distributed.spawn import run_ranks
from tests.shard_files import Members, write_tar
from tests.test_recipes import NAMES, shrunk
from vlscale import config, plan
from vlscale.build import Request
from vlscale.config import RunConfig
from vlscale.data.scenes import frames
from vlscale.data.scenes.regions import FEATURES, NUM_ATTRIBUTES, NUM_CLASSES
from vlscale.errors import DONE, VlscaleError

WORDS = (1, 512, 3, 40)  # of a caption
REGIONS = (0, 1, 40, 5)
CODES = frames.BRANCHES**frames.LEVELS
SHAPES = ((64, 64), (20, 90), (300, 24), (33, 47))  # height and width in pixels


FRAMES = (1, 60, 3, 17)  # of a clip, one a second
SENTENCES = (1, 3, 40, 1)


def odd_clip(number: int, words: list[str], feats: int, codes: int) -> tuple[Members, list[dict[str, Any]]]:
    """A clip with its features and visual words, and what is said in it."""
    rng, key = np.random.default_rng(number), f"odd{number:02d}"
    frames, said = FRAMES[number % 4], SENTENCES[number // 4 % 4]
    height, width = SHAPES[number % 4]
    pictures = rng.integers(0, 256, (frames, height + height % 2, width + width % 2, 3), dtype=np.uint8)
    members = [(f"{key}.gif", clip(list(pictures), "gif", rate=1))]
    for name, rows in (("frames", rng.random((frames, feats))), ("visual_words", rng.integers(codes, size=frames))):
        buffer = BytesIO()
        field = {"frames": "features", "visual_words": "codes"}[name]
        np.savez(buffer, **{field: rows, "times": np.arange(frames, dtype=np.float64)})
        members.append((f"{key}.{name}.npz", buffer.getvalue()))
    ends = np.linspace(0, frames, said + 1)
    parts = [words[i::said] or words[:1] for i in range(said)]
    times = zip(ends[:-1].tolist(), ends[1:].tolist(), parts, strict=True)
    return members, [{"start": start, "end": end, "text": " ".join(part)} for start, end, part in times]


def odd_sample(
    number: int, feats: int = FEATURES, classes: int = NUM_CLASSES, wide: int = frames.FEATURES, codes: int = CODES
) -> Members:
    """`feats` of a region and `classes` of its detector; `wide` features of a frame, and `codes` visual words."""
    rng = np.random.default_rng(number)
    height, width = SHAPES[number % 4]
    picture = cv2.imencode(".png", rng.integers(0, 256, (height, width, 3), dtype=np.uint8))[1].tobytes()
    words = rng.choice(["red", "dog", "sits", "above", "two", "stars"], WORDS[(number + 1) % 4]).tolist()
    shown, said = odd_clip(number, words, wide, codes)
    record: dict[str, Any] = {
        "caption": " ".join(words),
        "sentences": said,
        "tags": ["dog"] * (number % 3),
        "width": width,
        "height": height,
    }
    record["qa"] = [{"q": "what", "a": "dog"}] * (number % 2)
    count = REGIONS[number % 4]
    buffer = BytesIO()
    np.savez(
        buffer,
        features=rng.random((count, feats)).astype(np.float16),
        boxes=np.sort(rng.random((count, 2, 2)), axis=1).reshape(count, 4) * [width, height, width, height],
        classes=rng.integers(classes, size=count),
        class_confidence=rng.random(count),
        class_probs=rng.dirichlet(np.ones(classes), size=count).reshape(count, classes),
        attributes=rng.integers(NUM_ATTRIBUTES, size=count),
        attribute_confidence=rng.random(count),
    )
    key = f"odd{number:02d}"
    return [
        (f"{key}.png", picture),
        (f"{key}.json", json.dumps(record).encode()),
        (f"{key}.regions.npz", buffer.getvalue()),
        *shown,
    ]


def dry_run(name: str, overrides: list[str]) -> str:
    """What `--dry_run` prints."""
    said = StringIO()
    with redirect_stdout(said):
        assert plan.show(Request(config.load(name, overrides), "ds_configs/zero2.json", None)) == DONE
    return said.getvalue()


def reads_clips(name: str) -> bool:
    return bool(config.load(name).family.inputs.frames)


# of families that read clips: shrunk, their tiny recipes have nothing of their own, and three are of all kinds
TRAINED = [name for name in NAMES if "_tiny" not in name or not reads_clips(name)]
PLANNED = [name for name in TRAINED if "_tiny" not in name and name != "quickstart"]
PLANNED = [name for name in PLANNED if not reads_clips(name) or name in ("howto100m", "milnce", "hero")]


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANNED)
def test_a_dry_run_at_the_published_size(name: str, tmp_path: Path) -> None:
    inputs = config.load(name).family.inputs
    widths = (inputs.feats or FEATURES, inputs.classes or NUM_CLASSES, inputs.feats or 1, inputs.codes or CODES)
    shard = write_tar(tmp_path / "few.tar", [member for n in range(8) for member in odd_sample(n, *widths)])
    data = [f"data.train={shard}", f"data.val={shard}", "data.batch=8", "data.micro_batch=8"]
    [said] = run_ranks(dry_run, 1, name, data, timeout=300)
    planned = {line[:34].strip(): line[34:].strip() for line in said.splitlines()}
    assert float(planned["model TFLOPs per step"]) > 0.05
    assert int(planned["trainable, all"].replace(",", "")) > 1e7


def odd_run(name: str, shard: str, hidden: bool, per_rank: int) -> RunConfig:
    """The recipe in miniature on the odd samples; without `hidden` nothing is to restore in most micro-batches."""
    run = shrunk(name)
    views = {key: dict(options or {}) for key, options in run.views.items()}
    for options in views.values():
        for operation in ("mask_tokens", "mask_regions", "mask_frames", "mask_words", "shuffle_frames"):
            if operation in options and not hidden:
                always = {"at_least_one": False} if operation != "shuffle_frames" else {}
                options[operation] = {"prob": 1e-6, **always}
    data = replace(run.data, train=(shard,), val=(shard,), batch=2 * per_rank)
    text = replace(run.text, max_words=512)
    evaluation = replace(run.evaluation, limit=4)
    return replace(run, views=views, data=data, text=text, evaluation=evaluation)


def train_odd(names: list[str], shard: str, hidden: bool, per_rank: int, out: str) -> dict[str, str]:
    from vlscale import train
    from vlscale.build import Request

    failures: dict[str, str] = {}
    for name in names:
        try:
            request = Request(odd_run(name, shard, hidden, per_rank), "ds_configs/zero2.json", Path(out) / name)
            code = train.train(request)
        except VlscaleError as error:
            failures[name] = str(error)
        except Exception as error:  # all recipes are told at once
            failures[name] = f"{type(error).__name__}: {error}"
        else:
            failures |= {name: f"exit code {code}"} if code else {}
    return failures


def losses(folder: Path) -> dict[str, list[float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    series: dict[str, list[float]] = {}
    for line in lines:
        for key, value in line.items():
            if key.startswith(("loss", "grad_norm", "eval")):
                series.setdefault(key, []).append(float("nan") if value is None else value)
    return series


@pytest.mark.slow
@pytest.mark.parametrize(("hidden", "per_rank"), [(True, 4), (False, 1)])
def test_odd_samples(hidden: bool, per_rank: int, tmp_path: Path) -> None:
    members = [member for number in range(16) for member in odd_sample(number)]
    shard = write_tar(tmp_path / "odd.tar", members)
    made = run_ranks(train_odd, 2, TRAINED, str(shard), hidden, per_rank, str(tmp_path / "runs"), timeout=900)
    assert made[0] == made[1]
    for name, failure in made[0].items():  # who draws negatives from a rank's own samples needs two of them
        assert per_rank == 1, f"{name}: {failure}"
        assert "got one sample; set data.micro_batch to at least 2" in failure, f"{name}: {failure}"
    for name in set(TRAINED) - set(made[0]):
        for key, values in losses(tmp_path / "runs" / name).items():
            assert np.isfinite(values).all(), f"{name}: {key} is {values}"
