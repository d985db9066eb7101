"""The ResNet trunk against published sizes and torch's counter; BatchNorm against torch's, and over ranks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tests.distributed.spawn import run_ranks
from vlscale import distributed
from vlscale.nn import moving
from vlscale.nn.cnn import BatchNorm, ResNet, imagenet_pixels

# torchvision's parameter counts, less the classifier's (512 or 2048 to 1000)
SIZES = {18: 11_689_512 - 513_000, 34: 21_797_672 - 513_000, 50: 25_557_032 - 2_049_000, 101: 44_549_160 - 2_049_000}


@pytest.mark.parametrize("depth", SIZES)
def test_published_sizes(depth: int) -> None:
    with torch.device("meta"):
        trunk = ResNet(depth)
    assert sum(parameter.numel() for parameter in trunk.parameters()) == SIZES[depth]
    assert trunk.width == (512 if depth < 50 else 2048)


@pytest.mark.parametrize(("depth", "height", "width"), [(18, 64, 96), (50, 96, 33), (34, 70, 50)])
def test_flops_and_shape(depth: int, height: int, width: int) -> None:
    trunk = ResNet(depth, stem=4, base=4)
    with FlopCounterMode(display=False) as counter:
        out = trunk(torch.randn(1, 3, height, width))
    assert out.shape == (1, trunk.width, -(-height // 32), -(-width // 32))
    assert trunk.flops(height, width) == counter.get_total_flops()


def test_blocks_by_hand() -> None:
    trunk = ResNet(18, stem=4, base=4).eval()
    pixels = torch.randn(2, 3, 40, 56)
    first = trunk.stem["norm"](trunk.stem["convolution"](pixels)).relu()
    hidden = nn.functional.max_pool2d(first, 3, 2, 1)
    for stage in trunk.stages.values():
        for block in stage:
            inner = block.norms[0](block.convolutions[0](hidden)).relu()
            hidden = (block.norms[1](block.convolutions[1](inner)) + block.shortcut(hidden)).relu()
    torch.testing.assert_close(trunk(pixels), hidden)
    assert trunk.stages["1"][0].shortcut(first) is first  # stem and stage 1 are equally wide: nothing to map
    assert len(trunk.stages["2"][0].shortcut) == 2


def test_a_bottleneck_strides_in_its_middle() -> None:
    block = ResNet(50, stem=4, base=4).stages["3"][0]
    assert [convolution.stride[0] for convolution in block.convolutions] == [1, 2, 1]
    assert [convolution.kernel_size[0] for convolution in block.convolutions] == [1, 3, 1]


def test_frozen_stages_neither_learn_nor_move() -> None:
    trunk = ResNet(18, stem=4, base=4, frozen=2)
    before = {name: buffer.clone() for name, buffer in trunk.named_buffers()}
    trunk(torch.randn(4, 3, 64, 64)).sum().backward()
    moving.move(trunk)
    for name, parameter in trunk.named_parameters():
        frozen = name.startswith(("stem", "stages.1.", "stages.2."))
        assert parameter.requires_grad is not frozen
        assert (parameter.grad is None) is frozen, name
    for name, buffer in trunk.named_buffers():
        assert torch.equal(buffer, before[name]) is name.startswith(("stem", "stages.1.", "stages.2.")), name


def test_an_unknown_depth() -> None:
    with pytest.raises(ValueError, match="depth 20; there is 18, 34, 50, 101, 152"):
        ResNet(20)


def test_pixels() -> None:
    bytes_ = torch.tensor([0, 255], dtype=torch.uint8).expand(1, 3, 1, 2)
    channels = imagenet_pixels(bytes_, torch.float32)[0, :, 0]
    authors = torch.tensor([[123.675, 58.395], [116.28, 57.12], [103.53, 57.375]])
    torch.testing.assert_close(channels[:, 0], -authors[:, 0] / authors[:, 1])
    torch.testing.assert_close(channels[:, 1], (255 - authors[:, 0]) / authors[:, 1])
    ready = torch.randn(1, 3, 2, 2)
    assert torch.equal(imagenet_pixels(ready, torch.float32), ready)


def pair(width: int = 3) -> tuple[BatchNorm, nn.BatchNorm2d]:
    """Ours and torch's, alike."""
    ours, theirs = BatchNorm(width), nn.BatchNorm2d(width)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_()
        theirs.running_mean.normal_()
        theirs.running_var.uniform_(0.5, 2)
    ours.load_state_dict({name: value for name, value in theirs.state_dict().items() if "tracked" not in name})
    return ours, theirs


def test_training_as_torch_but_for_when_the_figures_move() -> None:
    torch.manual_seed(0)
    ours, theirs = pair()
    hidden = torch.randn(4, 3, 5, 6) * 3 + 1
    before = ours.running_mean.clone()
    out = ours(hidden)
    torch.testing.assert_close(out, theirs(hidden))
    assert torch.equal(ours.running_mean, before)
    moving.move(ours)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    assert ours.noted is None
    torch.testing.assert_close(ours.eval()(hidden), theirs.eval()(hidden))


def test_several_micro_batches_move_once_by_their_mean() -> None:
    torch.manual_seed(0)
    ours, _ = pair()
    batches = torch.randn(3, 4, 3, 5, 5)
    start = ours.running_var.clone()
    for batch in batches:
        ours(batch)
    moving.move(ours)
    seen = torch.stack([batch.transpose(0, 1).flatten(1).var(dim=1) for batch in batches]).mean(dim=0)
    torch.testing.assert_close(ours.running_var, 0.9 * start + 0.1 * seen)


@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize("size", [1, 2])
def test_gradients_where_channels_lie_last(live: bool, size: int) -> None:
    torch.manual_seed(0)
    layer = BatchNorm(3, live)
    hidden = torch.randn(size, 3, 2, 3, requires_grad=True)
    weights = torch.randn(size, 6, 3)
    (layer(hidden).flatten(2).transpose(1, 2) * weights).sum().backward()
    plain = hidden.detach().double().requires_grad_()
    mean, variance = plain.mean((0, 2, 3)), plain.var((0, 2, 3), correction=0)
    centre, scale = (mean, variance) if live else (torch.zeros(3), torch.ones(3))
    out = (plain - centre[:, None, None]) / (scale + 1e-5).sqrt()[:, None, None]
    (out.flatten(2).transpose(1, 2) * weights).sum().backward()
    torch.testing.assert_close(hidden.grad, plain.grad.float())  # type: ignore[union-attr]


@pytest.mark.parametrize("way", ["eval", "no_grad", "frozen"])
def test_what_notes_nothing(way: str) -> None:
    layer = BatchNorm(3, live=way != "frozen").train(way != "eval")
    with torch.set_grad_enabled(way != "no_grad"):
        layer(torch.randn(4, 3, 2, 2))
    assert layer.noted is None


def test_a_number_that_is_not_finite_moves_nothing() -> None:
    layer = BatchNorm(3)
    hidden = torch.randn(4, 3, 2, 2)
    hidden[0, 0, 0, 0] = torch.inf
    layer(hidden)
    moving.move(layer)
    assert torch.equal(layer.running_mean, torch.zeros(3))
    assert layer.noted is None


def test_figures_stay_fp32_in_a_network_of_16_bits() -> None:
    layer = BatchNorm(3).to(torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16
    assert layer.running_mean.dtype == torch.float32
    hidden = torch.randn(4, 3, 5, 5)
    out = layer(hidden.to(torch.bfloat16))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), BatchNorm(3)(hidden), atol=0.05, rtol=0.02)
    assert layer.eval()(hidden.to(torch.bfloat16)).dtype == torch.bfloat16


def over_ranks(state: dict[str, Tensor], batch: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Each rank's rows of a batch through a layer with the statistics of all ranks."""
    layer = BatchNorm(batch.shape[1], over_ranks=True)
    layer.load_state_dict(state)
    rows = slice(distributed.rank() * 2, distributed.rank() * 2 + 2)
    hidden = batch[rows].clone().requires_grad_()
    out = layer(hidden)
    (out * weights[rows]).sum().backward()
    moving.move(layer)
    assert hidden.grad is not None
    assert layer.weight.grad is not None
    return {
        "out": out.detach(),
        "grad": hidden.grad,
        "weight": layer.weight.grad,
        "mean": layer.running_mean,
        "var": layer.running_var,
    }


def test_statistics_of_all_ranks_are_those_of_the_whole_batch() -> None:
    torch.manual_seed(0)
    _, theirs = pair()
    state = {name: value.clone() for name, value in theirs.state_dict().items() if "tracked" not in name}
    batch, weights = torch.randn(4, 3, 3, 2) * 2 + 5, torch.randn(4, 3, 3, 2)
    whole = batch.clone().requires_grad_()
    out = theirs(whole)
    (out * weights).sum().backward()
    first, second = run_ranks(over_ranks, 2, state, batch, weights)
    torch.testing.assert_close(torch.cat([first["out"], second["out"]]), out.detach())
    torch.testing.assert_close(torch.cat([first["grad"], second["grad"]]), whole.grad, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(first["weight"] + second["weight"], theirs.weight.grad, atol=1e-5, rtol=1e-4)
    for found in (first, second):
        torch.testing.assert_close(found["mean"], theirs.running_mean)
        torch.testing.assert_close(found["var"], theirs.running_var)
