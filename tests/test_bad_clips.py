"""A run on clips of which some cannot be used: they are named, and it goes on, or ends beyond its budget."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.clip_files import clip
from tests.runs import launch, metrics
from tests.shard_files import Members, write_samples
from tests.test_clips import only_sound
from vlscale.data.bad import FILE

COUNT, STEPS = 24, 6
BRANCHES = ", ".join(["[4, 4, 5, 4, 4, 4]"] * 9)
RECIPE = """
steps: 6
family:
  {name: milnce, image_size: 32, frames: 4, stem: 4, second: 6, vocab: 64, word_width: 8, text_width: 16, embed: 16,
   live_statistics: false, mixed: [BRANCHES]}
objectives: {mil_nce: {}}
views:
  text.clean: {}
  visual.clean: {random_crop: {}, flip: {}}
  pairs.clips: {candidates: 2, least_seconds: 2.0, fps: 2, start: random}
optim: {lr: 1.0e-3}
checkpoint: {every: 99}
evaluation: {every: 0}
logging: {every: 1}
"""


def shown(frames: int, audio: float = 0.0) -> bytes:
    """A clip of `frames` frames, 4 a second."""
    rng = np.random.default_rng(frames)
    return clip([rng.integers(0, 256, (40, 48, 3), np.uint8) for _ in range(frames)], rate=4, audio=audio)


def sample(i: int, data: bytes, *times: tuple[float, float]) -> Members:
    said = [
        {"start": start, "end": end, "text": f"{['a red', 'a blue'][i % 2]} thing number {i % 7} {k}"}
        for k, (start, end) in enumerate(times or [(0, 2), (2, 3), (3, 6)])
    ]
    return [(f"s{i:03d}.mp4", data), (f"s{i:03d}.json", json.dumps({"sentences": said}).encode())]


@pytest.mark.slow
def test_a_run_goes_on_past_clips_that_cannot_be_used(tmp_path: Path) -> None:
    whole = shown(24, audio=1.0)
    special = {i: sample(i, whole) for i in range(COUNT)} | {
        5: sample(5, whole[: len(whole) // 2]),
        7: sample(7, only_sound()),
        9: sample(9, shown(2)),  # half a second, of a window of two: padded
        11: sample(11, whole, (7, 9)),
        13: sample(13, whole, (3, 2)),
    }
    special[9] = sample(9, shown(2), (0, 2))
    data = write_samples(tmp_path / "shards", COUNT, 12, special)
    (tmp_path / "clips.yaml").write_text(RECIPE.replace("BRANCHES", BRANCHES))
    run = ["--recipe", str(tmp_path / "clips.yaml"), "--out", str(tmp_path / "run")]
    run += [f"data.train={data}", f"data.val={data}", "data.batch=8", "data.bad_budget=0"]
    ended = launch("pretrain", *run, "data.bad_always=5")
    assert ended.returncode == 3, ended.stderr
    assert "had to be skipped while" in ended.stderr, ended.stderr
    done = launch("pretrain", *run, "data.bad_always=50")
    assert done.returncode == 0, done.stderr
    named = {
        line["key"]: line["reason"] for line in map(json.loads, (tmp_path / "run" / FILE).read_text().splitlines())
    }
    assert sorted(named) == ["s005", "s007", "s011", "s013"]
    assert "its 'mp4': it is cut short" in named["s005"]
    assert named["s007"] == "its 'mp4': it has no video stream"
    assert named["s011"].startswith("a sentence is said from 7 s to 9 s, but its 'mp4' ends at 6 s")
    assert named["s013"].startswith("sentence 0 is from 3 s to 2 s")
    steps = [line for line in metrics(tmp_path / "run") if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert steps[-1]["bad_samples"] == 2 * 4  # two epochs
