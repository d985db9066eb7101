"""Published weights for the towers that make features of pixels (`nn.video`), by the tables of the families that have
such a network as their own."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from vlscale import config, weights
from vlscale.errors import CheckpointError
from vlscale.families.base import Family, Renames
from vlscale.nn.video import FrameTower, TowerKind

STEM, DEEP_STEM = "conv1.conv1.weight", 24  # MIL-NCE's name; channels that a stem of space to depth reads


class Source(NamedTuple):
    """Whose table of names a tower's published weights are read by."""

    family: str
    part: str  # of the family, that is such a tower
    table: str


SOURCES = {  # by the beginning of the tower's kind
    "s3d": Source("milnce", "video", "PUBLISHED"),
    "resnet": Source("soho", "trunk", "INIT_VISION"),
    "vit": Source("albef", "image_encoder", "INIT_VISION"),
}


def stem_of(kind: TowerKind, tensors: dict[str, Tensor]) -> TowerKind:
    """`kind`, with the stem that the weights are of."""
    stem = tensors.get(STEM)
    return "s3d_space_to_depth" if kind == "s3d" and stem is not None and stem.shape[1] == DEEP_STEM else kind


def start(family: Family, path: str | None) -> bool:
    """Fill the family's tower, if it has one, from published weights (key `init.vision`); whether it did.

    CheckpointError if they are of another tower.
    """
    tower: FrameTower | None = getattr(family, "tower", None)
    if path is None or tower is None or not tower.kind:
        return False
    tensors = weights.read(path)
    if (kind := stem_of(tower.kind, tensors)) != tower.kind:
        raise CheckpointError(f"init.vision {path} are of another stem; write family.tower={kind}")
    fill(tower, tensors, f"init.vision {path}")
    return True


def fill(tower: FrameTower, tensors: dict[str, Tensor], told: str) -> None:
    """Of S3D the weights of MIL-NCE (either stem), of ResNets torchvision's, of ViTs DeiT's or Hugging Face's.

    CheckpointError if they are of another tower; `told` names the weights, as in `--weights FILE`.
    """
    source = next(source for start, source in SOURCES.items() if tower.kind.startswith(start))
    table: Renames = getattr(config.pick("families", source.family), source.table)
    holder, family = nn.Module(), nn.Module()  # the tower stands where the family has it
    family.add_module(source.part, tower.encoder)
    holder.add_module("family", family)
    mine = f"family.{source.part}."
    try:
        weights.fill(holder, {name: each for name, each in tensors.items() if _concerns(name, table, mine)}, table)
    except CheckpointError as error:
        reason = str(error).split(";")[0]
        raise CheckpointError(f"{told} are none of {tower.kind}: {reason}; name the tower that they are of") from error


def _concerns(name: str, table: Renames, mine: str) -> bool:
    """Whether a published tensor belongs to the tower, or to nothing: others are the family's own."""
    _, targets = weights.find(name, table)
    return not targets or any(target.startswith(mine) for target in targets)
