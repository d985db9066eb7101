"""`frames.npz` for shards of clips, by a tower with published weights: what families that read features are fed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlscale import towers, weights
from vlscale.data.clip_files import clip_field
from vlscale.data.clips import Clip
from vlscale.data.decode import Crop
from vlscale.data.making.frames import write_frames
from vlscale.data.making.resumed import rewrite_resumed
from vlscale.data.making.write import Member, Written, require_dtype
from vlscale.data.samples import CLIP_FIELDS, FRAME_FIELD
from vlscale.data.shards import Shards
from vlscale.errors import ConfigError
from vlscale.nn.video import TOWERS, FrameTower, TowerKind
from vlscale.types import Visual

MOST_A_SECOND = 1000.0


@dataclass(frozen=True)
class Sampling:
    """Which frames make a feature. ConfigError for numbers that cannot be."""

    every: float = 1.0  # seconds from one feature to the next
    window: int = 16  # frames of one feature; read by s3d alone
    fps: float = 0.0  # of the frames in a window; 0 = as many as fill `every`
    image_size: int = 224  # pixels of the middle square

    def __post_init__(self) -> None:
        for name, least in (("every", 1 / MOST_A_SECOND), ("window", 1), ("fps", 0), ("image_size", 32)):
            if not getattr(self, name) >= least:
                raise ConfigError(f"--{name} is {getattr(self, name)}; write {least:g} or more")

    def times(self, start: float, frames: int) -> list[float]:
        """Seconds of the frames of the feature that begins at `start`."""
        rate = self.fps or frames / self.every
        return [start + k / rate for k in range(frames)]


class Extracted(NamedTuple):
    """What `add_frames` has made, in this call."""

    features: int
    decoded_per_second: float  # frames that became pixels, per second of the processor's time


def load_tower(kind: TowerKind, path: Path, sampling: Sampling, device: str = "auto") -> FrameTower:
    """A tower with the weights of a file or folder (`towers.fill`).

    ConfigError for another kind or a device that is not there, CheckpointError for weights of another one.
    """
    if kind not in TOWERS[1:]:
        raise ConfigError(f"no tower '{kind}'; there is {', '.join(TOWERS[1:])}")
    tensors = weights.read(path)
    kind = towers.stem_of(kind, tensors)
    if kind == "s3d_space_to_depth" and (sampling.window % 2 or sampling.image_size % 2):
        raise ConfigError("these weights read blocks of two frames and pixels; write an even --window and size")
    tower = FrameTower(kind, sampling.image_size, sampling.window, frozen=True)
    towers.fill(tower, tensors, f"--weights {path}")
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        return tower.eval().to(name)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {device} is not there: {str(error).splitlines()[0]}") from error


class FrameFeatures:
    """Clips to the features of their frames, so many forward passes at a time."""

    def __init__(self, tower: FrameTower, sampling: Sampling, batch: int) -> None:
        """`batch` counts features."""
        self._tower, self._sampling, self._batch = tower, sampling, batch
        self._device = next(tower.parameters()).device
        self.features, self.decoded, self.seconds = 0, 0, 0.0  # of processor time for the frames decoded

    def __call__(self, data: bytes) -> NDArray[np.float32]:
        """[T, F] of a clip: feature t is of what begins at t x `every` seconds. At least one.

        A window that goes on behind the clip's end has its last frame there. ValueError for a clip that cannot be used.
        """
        size, frames = self._sampling.image_size, self._tower.window
        with Clip(data) as clip:
            crop = Crop.middle(clip.height, clip.width, size)
            count = max(1, int(np.ceil(clip.duration / self._sampling.every - 1e-6)))
            found = []
            for first in range(0, count, self._batch):
                starts = [n * self._sampling.every for n in range(first, min(first + self._batch, count))]
                began = time.thread_time()
                pixels = clip.frames([each for start in starts for each in self._sampling.times(start, frames)], crop)
                self.seconds += time.thread_time() - began
                self.decoded += len(pixels)
                found.append(self._encoded(torch.from_numpy(pixels).view(len(starts), frames, size, size, 3)))
        self.features += count
        return np.concatenate(found)

    def _encoded(self, pixels: Tensor) -> NDArray[np.float32]:
        """uint8 [n, window, H, W, 3] -> [n, F]."""
        try:
            with torch.inference_mode():
                out = self._tower(Visual(pixels.permute(0, 1, 4, 2, 3).to(self._device))).feats
        except torch.OutOfMemoryError as error:
            raise ConfigError(f"{len(pixels)} features at a time do not fit; write a smaller --batch") from error
        return np.asarray(out[:, 0].float().cpu().numpy(), dtype=np.float32)


def add_frames(
    shards: Shards, folder: Path, tower: FrameTower, sampling: Sampling, batch: int = 8, dtype: str = "float16"
) -> tuple[Written, Extracted]:
    """Copies of `shards` in `folder`, under their names, whose samples have `frames.npz` of their clip.

    Samples without a usable clip are left out, counted and named. Ended early, the same call goes on after the copies
    that are whole. ConfigError if `folder` holds shards of these names that another call has made, DataError if no
    sample could be written.
    """
    if batch < 1:
        raise ConfigError(f"--batch is {batch}; write 1 or more")
    require_dtype(dtype)
    encode = FrameFeatures(tower, sampling, batch)

    def change(numbers: range) -> Iterator[Member]:
        for i in numbers:
            raw = shards.read(i)
            try:
                field = clip_field(tuple(raw))
                if field is None:
                    raise ValueError(f"it has no {' or '.join(CLIP_FIELDS)} but {', '.join(raw)}")
                made = write_frames([(encode(raw[field]), 1 / sampling.every)], dtype)
            except ValueError as error:
                yield Member(shards.key(i), {}, str(error))
                continue
            yield Member(shards.key(i), {**raw, FRAME_FIELD: made})

    digest = sha256(b"".join(each.cpu().numpy().tobytes() for each in tower.state_dict().values())).hexdigest()
    written = rewrite_resumed(
        shards, folder, change, {"tower": tower.kind, "weights": digest, "dtype": dtype, **asdict(sampling)}
    )
    return written, Extracted(encode.features, encode.decoded / max(encode.seconds, 1e-9))
