"""Pictures that keep their shape: their size, how a batch of them is padded, and which cells count."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.shard_files import INPUTS, make_tokenizer, sample, write_samples
from vlscale.data.augment import KeepRatio, OptionError
from vlscale.data.batches import Even
from vlscale.data.decode import Encoded
from vlscale.data.loader import Loader
from vlscale.data.micro_batches import Preprocessing
from vlscale.data.order import Order, Source, TaskOrder
from vlscale.data.pictures import pad_pictures
from vlscale.data.shards import Shards
from vlscale.data.views import parse
from vlscale.errors import ConfigError
from vlscale.families import soho
from vlscale.nn.cnn import imagenet_pixels


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [  # mmcv.rescale_size with scale (1000, 600)
        ((480, 640), (600, 800)),
        ((640, 480), (800, 600)),
        ((375, 500), (600, 800)),
        ((333, 500), (600, 901)),  # 900.9 pixels, rounded
        ((300, 600), (500, 1000)),  # the longer side decides
        ((600, 1000), (600, 1000)),
        ((1, 5000), (1, 1000)),  # never less than a pixel
    ],
)
def test_sizes(given: tuple[int, int], wanted: tuple[int, int]) -> None:
    assert KeepRatio().size(*given) == wanted
    shown = keep_ratio(np.full((*given, 3), 77, dtype=np.uint8), KeepRatio())
    assert shown.shape == (*wanted, 3)
    assert shown.dtype == np.uint8
    assert (shown == 77).all()


def keep_ratio(pixels: np.ndarray, how: KeepRatio) -> np.ndarray:
    found = Encoded(cv2.imencode(".png", pixels[..., ::-1])[1].tobytes())
    return found.crops([how(found.height, found.width)])[0]


def test_a_picture_of_the_size_is_left_as_it_is() -> None:
    given = picture(600, 1000)
    assert np.array_equal(keep_ratio(given, KeepRatio()), given)


def test_the_filter_is_bilinear() -> None:
    shown = keep_ratio(np.array([[[0, 0, 0], [200, 100, 40]]], dtype=np.uint8), KeepRatio(short=2, long=4))
    assert shown[0, :, 0].tolist() == [0, 50, 150, 200]
    assert shown[1, :, 1].tolist() == [0, 25, 75, 100]


@pytest.mark.parametrize("wrong", [{"short": 0}, {"short": 700, "long": 600}, {"multiple": 33}, {"mask": "both"}])
def test_wrong_options(wrong: dict[str, object]) -> None:
    with pytest.raises(OptionError):
        KeepRatio(**wrong)  # type: ignore[arg-type]


def test_padding_is_below_and_right_in_the_mean_colour() -> None:
    wide, high = picture(70, 130), picture(100, 64, 1)
    pixels = pad_pictures([wide, high]).feats
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (2, 3, 128, 160)  # the greatest sides, rounded up to 32
    assert np.array_equal(pixels[0, :, :70, :130].permute(1, 2, 0).numpy(), wide)
    assert np.array_equal(pixels[1, :, :100, :64].permute(1, 2, 0).numpy(), high)
    shown = imagenet_pixels(pixels, torch.float32)
    for i, (height, width) in enumerate(((70, 130), (100, 64))):
        outside = torch.ones(128, 160, dtype=torch.bool)
        outside[:height, :width] = False
        assert float(shown[i, :, outside].abs().max()) < 0.01  # the authors pad what is normalised with 0


def test_a_multiple_and_the_least_size() -> None:
    assert pad_pictures([picture(130, 200)], multiple=128).feats.shape == (1, 3, 256, 256)
    tiny = pad_pictures([picture(5, 9)])
    assert tiny.feats.shape == (1, 3, 64, 64)
    assert tiny.mask is not None
    assert tiny.mask.tolist() == [[True]]


SIZES = [(600, 800), (400, 1000), (600, 600), (1000, 600), (800, 600), (97, 350), (31, 64)]


def masks(sizes: list[tuple[int, int]], mask: Literal["picture", "authors"], square: bool) -> tuple[Tensor, Tensor]:
    """Ours, and a canvas of whole pixels made smaller by torch."""
    padded = pad_pictures([picture(*size) for size in sizes], 32, mask)
    height, width = padded.feats.shape[2:]
    canvas = torch.zeros(len(sizes), 1, height, height if square else width)
    for i, (h, w) in enumerate(sizes):
        canvas[i, 0, :h, :w] = 1
    assert padded.mask is not None
    return padded.mask, F.interpolate(canvas, size=(height // 64, width // 64)).bool().flatten(1)


@pytest.mark.parametrize("sizes", [SIZES, *([each] for each in SIZES), SIZES[:2], SIZES[3:5]])
def test_cells_of_the_picture(sizes: list[tuple[int, int]]) -> None:
    ours, expected = masks(sizes, "picture", square=False)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("sizes", [SIZES, *([each] for each in SIZES), SIZES[:2], SIZES[3:5]])
def test_cells_of_the_authors_square_canvas(sizes: list[tuple[int, int]]) -> None:
    ours, expected = masks(sizes, "authors", square=True)
    assert torch.equal(ours, expected)


def test_the_authors_hide_the_right_of_upright_pictures() -> None:
    upright = [picture(1000, 600)]
    assert pad_pictures(upright).feats.shape == (1, 3, 1024, 608)
    whole, theirs = (pad_pictures(upright, mask=which).mask for which in ("picture", "authors"))
    assert whole is not None
    assert theirs is not None
    assert int(whole.sum()) == 16 * 9
    assert theirs.view(16, 9)[0].tolist() == [True] * 6 + [False] * 3
    padding = pad_pictures([picture(600, 700), picture(600, 1000)], mask="authors").mask
    assert padding is not None
    assert bool(padding.all())  # and take padding on the right of wide ones for picture


def test_soho_reads_them() -> None:
    family = soho.build(soho.tiny()).eval()
    sizes = ((96, 150), (128, 200))
    batch = pad_pictures([picture(*size, seed) for seed, size in enumerate(sizes)])
    stream = family.encode_visual(batch)
    assert stream.mask is batch.mask
    assert stream.hidden.shape[:2] == (2, 2 * 3)


VIEWS: dict[str, dict[str, Any]] = {
    "visual.masked": {"keep_ratio": {"short": 128, "long": 256, "mask": "authors"}},
    "text.masked": {"mask_tokens": {}},
}


def loader_of(folder: Path, any_size: bool) -> Loader:
    sizes = ((40, 60), (50, 40))
    encoded = [cv2.imencode(".png", picture(*size))[1].tobytes() for size in sizes]
    listed = {i: sample(i, picture=data) for i, data in enumerate(encoded)}
    shards = Shards(write_samples(folder / "shards", 2, 2, listed), folder / "cache")
    preprocessing = Preprocessing({"all": parse(VIEWS)}, TaskOrder({"all": 1.0}, 0), 0)
    inputs = replace(INPUTS, any_size=any_size)
    order = Order([Source("data", (0, 2))], 0)
    return Loader(shards, make_tokenizer(folder), inputs, preprocessing, order, Even(2, 2, 0, 1), 0)


def test_the_loader_pads_them(tmp_path: Path) -> None:
    ((_, (batch,)),) = loader_of(tmp_path, any_size=True).steps(0, 1)
    view, order = batch.visual["masked"], batch.pair_id.tolist()
    assert view.feats.shape == (2, 3, 160, 192)  # 128 x 192 and 160 x 128
    assert view.mask is not None
    assert view.mask[order.index(1)].tolist() == [True] * 6  # mask "picture" would hide the last column
    upright = view.feats[order.index(1)]
    assert upright[:, :, :128].float().std() > 20
    assert (upright[:, :, 128:] == torch.tensor([124, 116, 104])[:, None, None]).all()


def test_a_family_of_squares_refuses_them(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"views\.visual\.masked\.keep_ratio .* squares of 16 pixels"):
        loader_of(tmp_path, any_size=False)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"keep_ratio": {"shrt": 3}}, "short"),
        ({"keep_ratio": {"mask": "author"}}, "picture or authors"),
        ({"keep_ratio": {"multiple": 48}}, "multiple of 32"),
        ({"keep_ratio": {}, "random_resized_crop": {}}, "keep_ratio: should be left out"),
    ],
)
def test_wrong_views(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=rf"views\.visual\.clean.*{sentence}"):
        parse({"visual.clean": options})
