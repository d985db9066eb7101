"""S3D-G against its published sizes and the layers' own words; towers that make features of a clip's pixels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.distributed.spawn import run_ranks
from vlscale import distributed
from vlscale.nn import moving
from vlscale.nn.cnn import BatchNorm
from vlscale.nn.s3d import (
    Convolution3d,
    Inception,
    S3d,
    S3dSizes,
    SelfGating,
    TimeConvolution,
    clip_pixels,
    s3d_flops,
    same_pool,
    space_to_depth,
)
from vlscale.nn.video import TOWERS, FrameTower, TowerKind
from vlscale.types import Visual

SMALL = S3dSizes().divided(16)


@pytest.mark.parametrize(("deep", "parameters"), [(False, 9_649_872), (True, 9_670_800)])
def test_published_sizes(deep: bool, parameters: int) -> None:
    with torch.device("meta"):
        network = S3d(S3dSizes(space_to_depth=deep))
    head = 1024 * 512 + 512  # the joint embedding, which the published count holds
    assert sum(each.numel() for each in network.parameters()) + head == parameters
    assert S3dSizes().width == 1024


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize(("frames", "height", "width"), [(16, 64, 96), (8, 32, 32), (6, 70, 50)])
def test_shape_and_flops(deep: bool, frames: int, height: int, width: int) -> None:
    sizes = replace(SMALL, space_to_depth=deep)
    network, clips = S3d(sizes).eval(), torch.randint(0, 256, (1, frames, 3, height, width), dtype=torch.uint8)
    with FlopCounterMode(display=False) as counter:
        out = network(clips)
    assert out.shape == (1, sizes.width, -(-frames // 8), -(-height // 32), -(-width // 32))
    assert s3d_flops(sizes, frames, height, width) == counter.get_total_flops()


@pytest.mark.parametrize("moments", [1, 2, 3, 4])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_over_time_alone(moments: int, stride: int) -> None:
    """That of three dimensions, in bf16 too, where oneDNN's own is wrong on some processors."""
    torch.manual_seed(0)
    exact = torch.nn.Conv3d(32, 32, (3, 1, 1), (stride, 1, 1), (1, 0, 0), bias=False).bfloat16().double()
    ours = TimeConvolution(32, 32, (3, 1, 1), (stride, 1, 1), (1, 0, 0), bias=False).bfloat16()
    ours.load_state_dict(exact.state_dict())
    clips = torch.randn(32, 32, moments, 6, 6).bfloat16()
    made = []
    for layer, inputs in ((ours, clips.clone()), (exact, clips.double())):
        out = layer(inputs.requires_grad_())
        gradients = torch.autograd.grad(out.square().sum(), [inputs, layer.weight])
        made.append([each.double() for each in (out, *gradients)])
    for found, expected in zip(*made, strict=True):
        assert found.shape == expected.shape
        assert (found - expected).norm() <= 1e-2 * expected.norm()


def test_pixels() -> None:
    clips = torch.randint(0, 256, (2, 4, 3, 5, 6), dtype=torch.uint8)
    found = clip_pixels(clips, torch.float32)
    torch.testing.assert_close(found, clips.permute(0, 2, 1, 3, 4) / 255)
    torch.testing.assert_close(clip_pixels(clips / 255, torch.float32), found)


def test_a_gate_by_hand() -> None:
    gate, given = SelfGating(3), torch.rand(2, 3, 2, 2, 2)
    for row in range(2):
        weights = (gate.linear.weight @ given[row].mean(dim=(1, 2, 3)) + gate.linear.bias).sigmoid()
        torch.testing.assert_close(gate(given)[row], given[row] * weights[:, None, None, None])


def test_a_separable_convolution_is_over_space_then_time() -> None:
    layer = Convolution3d(3, 4, (3, 5, 5), (2, 1, 2), (1, 2, 2), separable=True)
    assert [each.kernel_size for each in layer.convolutions] == [(1, 5, 5), (3, 1, 1)]
    assert [each.stride for each in layer.convolutions] == [(1, 1, 2), (2, 1, 1)]
    assert [each.padding for each in layer.convolutions] == [(0, 2, 2), (1, 0, 0)]
    assert all(each.bias is None for each in layer.convolutions)


def test_branches_stand_in_order() -> None:
    block, given = Inception(6, (1, 2, 3, 4, 5, 7)).eval(), torch.rand(2, 6, 2, 4, 4)
    parts = block(given).split([1, 3, 5, 7], dim=1)
    for part, branch, gate in zip(parts, block.branches, block.gates, strict=True):
        torch.testing.assert_close(part, gate(branch(given)))


def test_same_pool_pads_behind_first() -> None:
    given = torch.arange(1.0, 6).view(1, 1, 1, 1, 5)
    # 1 zero behind the last: windows (1 2 3), (3 4 5); nothing stands in front
    assert same_pool(given, (1, 1, 3), (1, 1, 2)).flatten().tolist() == [3, 5, 5]
    assert same_pool(given, (1, 1, 2), (1, 1, 2)).flatten().tolist() == [2, 4, 5]  # the rest is a window too


def test_space_to_depth_numbers_time_then_row_then_column_then_colour() -> None:
    given = torch.rand(1, 3, 4, 6, 8)
    found = space_to_depth(given)
    for time, row, column, colour in [(0, 0, 0, 0), (0, 0, 1, 2), (0, 1, 0, 1), (1, 0, 0, 0), (1, 1, 1, 2)]:
        channel = ((time * 2 + row) * 2 + column) * 3 + colour
        torch.testing.assert_close(found[0, channel], given[0, colour, time::2, row::2, column::2])


def normed(ranks: int) -> Tensor:
    torch.manual_seed(0)
    layer, given = BatchNorm(3, over_ranks=True), torch.rand(4, 3, 2, 3, 3)
    return layer(given.chunk(ranks)[distributed.rank()]).detach()


def test_batch_norm_over_time_and_over_ranks() -> None:
    layer, given = BatchNorm(3), torch.rand(4, 3, 2, 3, 3)
    torch.testing.assert_close(layer(given), F.batch_norm(given, None, None, training=True))
    torch.testing.assert_close(torch.cat(run_ranks(normed, 2, 2)), normed(1))


def small(kind: TowerKind, frozen: bool = False) -> FrameTower:
    torch.manual_seed(0)
    return FrameTower(kind, image_size=32, window=4, frozen=frozen, divided=16)


def clips(padding: int = 0) -> Visual:
    """Two clips of 8 and 5 frames, then padding; the first has a hidden frame."""
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (2, 8, 3, 32, 32), dtype=torch.uint8, generator=generator)
    frames = torch.cat([frames, frames.new_full((2, padding, 3, 32, 32), 200)], dim=1)
    mask = torch.arange(8 + padding) < torch.tensor([[8], [5]])
    picked = torch.zeros_like(mask)
    picked[0, 4] = True
    return Visual(frames, mask, picked=picked)


@pytest.mark.parametrize("kind", TOWERS[1:])
def test_a_tower_makes_features_of_pixels(kind: TowerKind) -> None:
    tower = small(kind).eval()
    found = tower(clips())
    windows = kind.startswith("s3d")
    places = 2 if windows else 8
    assert found.feats.shape == (2, places, tower.width) == (2, tower.places(8), tower.width)
    assert found.mask.tolist()[1] == ([True, True] if windows else [True] * 5 + [False] * 3)
    assert (found.feats[found.picked] == 0).all()
    assert found.picked.sum() == 1
    assert (found.targets[found.picked] != 0).any()
    seen = found.mask & ~found.picked
    torch.testing.assert_close(found.feats[seen], found.targets[seen])
    padded = tower(clips(padding=4))
    torch.testing.assert_close(padded.feats[:, :places], found.feats)
    assert not padded.mask[:, places:].any()
    with FlopCounterMode(display=False) as counter:
        tower(Visual(clips().feats[:1]))
    assert tower.flops(8) == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("kind", ["s3d", "resnet18"])
def test_padding_does_not_move_statistics(kind: TowerKind) -> None:
    found = []
    for padding in (0, 4):
        tower = small(kind)
        tower(clips(padding)).feats.sum().backward()
        moving.move(tower)
        found.append(dict(tower.named_buffers()))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("kind", ["s3d", "resnet18", "vit_b32"])
def test_a_frozen_tower_neither_learns_nor_moves(kind: TowerKind) -> None:
    tower = small(kind, frozen=True).train()
    before = {name: each.clone() for name, each in tower.named_buffers()}
    found = tower(clips())
    assert not found.feats.requires_grad
    assert not any(each.requires_grad for each in tower.parameters())
    moving.move(tower)
    assert all(torch.equal(each, before[name]) for name, each in tower.named_buffers())
    torch.testing.assert_close(found.feats, small(kind).eval()(clips()).feats)


def test_features_pass_as_they_are() -> None:
    tower, given = FrameTower(""), Visual(torch.rand(2, 3, 4))
    assert tower(given) is given
    assert tower.flops(3) == tower.width == 0
    with pytest.raises(ValueError, match="no tower 'resnet34'; there is resnet18"):
        FrameTower("resnet34")  # type: ignore[arg-type]
