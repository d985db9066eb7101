"""`shards.py frames`: which frames make a feature, by which weights, and going on where it was stopped."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from launchers import shards as launcher
from tests.clip_files import clip, counting
from tests.shard_files import write_tar
from tests.test_clips import textured
from vlscale import config, weights
from vlscale.data.clip_files import read_tracks
from vlscale.data.clips import Clip
from vlscale.data.decode import Crop
from vlscale.data.shards import Shards
from vlscale.errors import DONE, CheckpointError, ConfigError
from vlscale.families.milnce import PUBLISHED
from vlscale.frame_features import FrameFeatures, Sampling, add_frames, load_tower
from vlscale.nn.cnn import ResNet
from vlscale.nn.s3d import S3d, S3dSizes
from vlscale.nn.video import FrameTower

SMALL = Sampling(every=0.5, window=4, image_size=32)


def published_s3d(path: Path, space_to_depth: bool = False) -> S3d:
    """Random weights of an S3D as MIL-NCE's authors write theirs, beside those of their text side."""
    torch.manual_seed(0)
    video = S3d(replace(S3dSizes(), space_to_depth=space_to_depth))
    ours = {f"family.video.{name}": tensor for name, tensor in video.state_dict().items()}
    tensors = weights.publish(ours, PUBLISHED).tensors
    torch.save({"state_dict": {**tensors, "text_module.fc1.weight": torch.zeros(2, 2)}}, path)
    return video.eval()


def torchvision_resnet(path: Path) -> ResNet:
    """Random weights of a ResNet-18 under torchvision's names."""
    torch.manual_seed(0)
    trunk = ResNet(18, 64, 64)
    ours = {f"family.trunk.{name}": tensor for name, tensor in trunk.state_dict().items()}
    table = config.pick("families", "soho").INIT_VISION
    torch.save({**weights.publish(ours, table).tensors, "fc.bias": torch.zeros(1000)}, path)
    return trunk.eval()


def write_shards(folder: Path, count: int = 2) -> Shards:
    """Shards of one clip each, of 2 s and 1.2 s and so on by turns."""
    folder.mkdir()
    for n in range(count):
        data = clip(textured(12 if n % 2 else 20, 40, 56))
        write_tar(folder / f"part-{n}.tar", [(f"v{n}.mp4", data), (f"v{n}.json", b'{"caption": "a thing"}')])
    return Shards(str(folder / "part-*.tar"), folder / "cache")


@pytest.mark.parametrize("space_to_depth", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_feature_of_s3d_is_the_mean_of_its_window(tmp_path: Path, space_to_depth: bool) -> None:
    video = published_s3d(tmp_path / "s3d.pth", space_to_depth)
    tower = load_tower("s3d", tmp_path / "s3d.pth", SMALL, "cpu")
    data = clip(textured(20, 40, 56))
    found = FrameFeatures(tower, SMALL, batch=3)(data)
    assert found.shape == (4, 1024)  # of 2 s, one every half second
    with Clip(data) as opened:
        middle = Crop(0, 8, 40, 40, (32, 32))
        pixels = opened.frames([1.0, 1.125, 1.25, 1.375], middle)
    with torch.inference_mode():
        expected = video(torch.from_numpy(pixels).permute(0, 3, 1, 2)[None]).flatten(2).mean(dim=2)[0]
    np.testing.assert_allclose(found[2], expected.numpy(), rtol=1e-4, atol=1e-6)


def test_a_feature_of_a_resnet_is_the_mean_of_one_frame(tmp_path: Path) -> None:
    trunk = torchvision_resnet(tmp_path / "resnet18.pth")
    tower = load_tower("resnet18", tmp_path / "resnet18.pth", SMALL, "cpu")
    data = clip(textured(12, 40, 56))
    found = FrameFeatures(tower, SMALL, batch=2)(data)
    assert found.shape == (3, 512)
    with Clip(data) as opened:
        (pixels,) = opened.frames([0.5], Crop(0, 8, 40, 40, (32, 32)))
    with torch.inference_mode():
        expected = trunk(torch.from_numpy(pixels).permute(2, 0, 1)[None]).flatten(2).mean(dim=2)[0]
    np.testing.assert_allclose(found[1], expected.numpy(), rtol=1e-4, atol=1e-6)


class Brightness(nn.Module):
    """The mean of each colour of a window."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        return clips.float().mean(dim=1).flatten(1)[:, :3, None] * self.scale


def bright() -> FrameTower:
    tower = FrameTower("resnet18", divided=64)
    tower.encoder, tower.width = Brightness(), 3
    return tower


def test_it_goes_on_after_the_shards_that_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards, out = write_shards(tmp_path / "clips", 3), tmp_path / "out"
    encode, calls = FrameFeatures.__call__, []

    def stopped(self: FrameFeatures, data: bytes) -> Any:
        calls.append(data)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(self, data)

    monkeypatch.setattr(FrameFeatures, "__call__", stopped)
    with pytest.raises(KeyboardInterrupt):
        add_frames(shards, out, bright(), SMALL)
    assert [path.name for path in out.glob("*.tar")] == ["part-0.tar"]
    with pytest.raises(ConfigError, match=r"part-0\.tar is there already"):
        add_frames(shards, out, bright(), replace(SMALL, every=1.0))
    written, made = add_frames(shards, out, bright(), SMALL)
    assert (written.samples, len(calls)) == (3, 4)
    assert made.features == 3 + 4  # of this call
    copies = Shards(str(out / "*.tar"), tmp_path / "cache")
    (track,) = read_tracks(copies.read(1)["frames.npz"])
    assert track.times.tolist() == [0.0, 0.5, 1.0]
    assert track.rows.dtype == np.float16
    assert copies.read(1)["json"] == shards.read(1)["json"]
    assert not list(out.glob(".begun*"))


def test_clips_that_cannot_be_used_are_named_and_others_kept(tmp_path: Path) -> None:
    data = clip(counting(10))
    write_tar(tmp_path / "a.tar", [("a.mp4", data[:900]), ("b.txt", b"a thing"), ("c.mp4", data)])
    written, _ = add_frames(Shards(tmp_path / "a.tar", tmp_path / "cache"), tmp_path / "out", bright(), SMALL)
    assert written.samples == 1
    told = data.index(b"moov") - 4  # where the box ends that is cut
    assert dict(written.named) == {
        "a": f"it is cut short: 900 of {told} bytes",
        "b": "it has no mp4 or gif or webm but txt",
    }


def test_what_cannot_be_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--every is 0; write 0.001 or more"):  # noqa: RUF043
        Sampling(every=0)
    with pytest.raises(ConfigError, match="no tower 's3dg'; there is resnet18"):
        load_tower("s3dg", tmp_path / "x.pth", SMALL)  # type: ignore[arg-type]
    torchvision_resnet(tmp_path / "resnet18.pth")
    for kind in ("s3d", "resnet50"):
        with pytest.raises(CheckpointError, match=rf"resnet18\.pth are none of {kind}: .*; name the tower"):
            load_tower(kind, tmp_path / "resnet18.pth", SMALL)  # type: ignore[arg-type]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLSCALE_CACHE", str(tmp_path / "cache"))
    write_shards(tmp_path / "clips")
    torchvision_resnet(tmp_path / "resnet18.pth")
    words = ["frames", f"{tmp_path}/clips/*.tar", "--tower", "resnet18", "--weights", str(tmp_path / "resnet18.pth")]
    assert launcher.main([*words, "--to", str(tmp_path / "out"), "--image_size", "32", "--device", "cpu"]) == DONE
    told = capsys.readouterr().out
    assert told.startswith("4 features of 512 numbers; ")
    assert "2 samples in 2 shard(s)" in told
    assert launcher.main(["describe", f"{tmp_path}/out/*.tar", "--json", str(tmp_path / "told.json")]) == DONE
    assert json.loads((tmp_path / "told.json").read_text())["samples"] == 2
