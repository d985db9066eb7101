from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest

from vlscale.data import augment as operations
from vlscale.data.augment import Blur, ColorJitter, Flip, Grayscale, RandAugment, RandomResizedCrop
from vlscale.data.decode import Crop
from vlscale.data.masking import MaskTokens
from vlscale.data.views import parse
from vlscale.errors import ConfigError
from vlscale.types import IGNORE


class Words:
    pad, unk, cls, sep, mask, vocab_size = 0, 1, 2, 3, 4, 1000


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def photo(side: int = 48) -> np.ndarray:
    noise = rng(5).integers(0, 256, (side // 4, side // 4, 3), dtype=np.uint8)
    return np.asarray(cv2.resize(noise, (side, side), interpolation=cv2.INTER_CUBIC))


# --- masking -----------------------------------------------------------------------------------------------


def long_text() -> np.ndarray:
    ids = rng(1).integers(5, 1000, 200_000)
    ids[[0, 500, -1]] = Words.cls, Words.sep, Words.pad
    return ids


def test_masking_shares() -> None:
    ids = long_text()
    masked, labels = MaskTokens(prob=0.15)(ids, Words(), rng())
    picked = labels != IGNORE
    assert np.array_equal(labels[picked], ids[picked])
    assert np.array_equal(masked[~picked], ids[~picked])
    assert abs(picked.mean() - 0.15) < 0.003
    is_mask, same = masked[picked] == Words.mask, masked[picked] == ids[picked]
    assert abs(is_mask.mean() - 0.8) < 0.01
    assert abs(same.mean() - 0.1) < 0.01  # a random id is the old one once in 1000
    random = masked[picked][~is_mask & ~same]
    assert abs(len(random) / picked.sum() - 0.1) < 0.01
    assert random.min() <= 3  # special ids included, as in ALBEF
    assert random.max() >= 990


def test_special_tokens_are_never_masked() -> None:
    ids = np.array([Words.cls, 7, 8, Words.sep, Words.pad])
    for seed in range(20):
        masked, labels = MaskTokens(prob=1.0, mask_share=1.0, random_share=0.0)(ids, Words(), rng(seed))
        assert masked.tolist() == [Words.cls, Words.mask, Words.mask, Words.sep, Words.pad]
        assert labels.tolist() == [IGNORE, 7, 8, IGNORE, IGNORE]


def test_at_least_one_token_is_masked_uniformly() -> None:
    ids = np.array([Words.cls, 7, 8, 9])
    one = MaskTokens(prob=1e-9)
    draws = [np.flatnonzero(one(ids, Words(), rng(seed))[1] != IGNORE).tolist() for seed in range(600)]
    assert all(len(draw) == 1 for draw in draws)
    assert all(150 < draws.count([place]) < 250 for place in (1, 2, 3))
    assert (MaskTokens(prob=1e-9, at_least_one=False)(ids, Words(), rng())[1] == IGNORE).all()
    assert (one(np.array([Words.cls]), Words(), rng())[1] == IGNORE).all()


def test_masking_leaves_its_input() -> None:
    ids = long_text()
    before = ids.copy()
    MaskTokens()(ids, Words(), rng())
    assert np.array_equal(ids, before)


# --- pictures ----------------------------------------------------------------------------------------------


def test_crops_have_the_area_and_ratio_asked_for() -> None:
    crop = RandomResizedCrop(scale=(0.2, 0.6))
    boxes = np.array([crop.box(300, 400, rng(seed)) for seed in range(2000)])
    top, left, height, width = boxes.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= 300).all()
    assert (left + width <= 400).all()
    share, ratio = height * width / 120_000, width / height
    assert 0.195 < share.min() < 0.22
    assert 0.58 < share.max() < 0.605
    assert abs(share.mean() - 0.4) < 0.01
    assert abs(np.log(ratio).mean()) < 0.02
    assert 0.74 < ratio.min() < 0.77
    assert 1.30 < ratio.max() < 1.35


def test_a_crop_of_an_extreme_picture_is_centred() -> None:
    crop = RandomResizedCrop(scale=(1.0, 1.0))
    assert crop.box(10, 1000, rng()) == (0, 493, 10, 13)
    assert crop.box(1000, 10, rng()) == (493, 0, 13, 10)
    assert crop(10, 1000, 20, rng()) == Crop(0, 493, 10, 13, (20, 20))


def test_flip() -> None:
    pixels = photo()
    flipped = [np.array_equal(Flip(0.3)(pixels.copy(), rng(seed)), pixels[:, ::-1]) for seed in range(1000)]
    assert abs(np.mean(flipped) - 0.3) < 0.05


def test_operations_against_pillow() -> None:
    """Where the authors' comments promise the same output as Pillow, hold them to it."""
    image_ops = pytest.importorskip("PIL.ImageOps")
    image = pytest.importorskip("PIL.Image")
    enhance = pytest.importorskip("PIL.ImageEnhance")
    pixels = np.clip(photo() * 0.5 + 40, 0, 255).astype(np.uint8)
    picture = image.fromarray(pixels)
    assert difference(operations.auto_contrast(pixels, 7, 1), image_ops.autocontrast(picture)) <= 1
    assert difference(operations.equalize(pixels, 7, 1), image_ops.equalize(picture)) == 0
    assert difference(operations.brightness(pixels, 7, 1), enhance.Brightness(picture).enhance(1.36)) <= 1
    sharp = np.asarray(enhance.Sharpness(picture).enhance(1.36))
    assert difference(operations.sharpness(pixels, 7, 1)[2:-2, 2:-2], sharp[2:-2, 2:-2]) <= 2


def difference(one: np.ndarray, other: Any) -> int:
    return int(np.abs(one.astype(int) - np.asarray(other).astype(int)).max())


def test_warps_by_hand() -> None:
    pixels = np.zeros((40, 40, 3), np.uint8)
    pixels[20, 20] = 255
    assert operations.translate_x(pixels, 7, 1)[20, 13].tolist() == [255] * 3
    assert operations.translate_x(pixels, 7, -1)[20, 27].tolist() == [255] * 3
    assert operations.translate_y(pixels, 7, 1)[13, 20].tolist() == [255] * 3
    assert (operations.translate_x(pixels, 7, 1)[:, 33:] == 128).all()
    line = np.full((40, 40, 3), 0, np.uint8)
    line[:, 20] = 255
    sheared = operations.shear_x(line, 10, 1)  # 0.3 columns per row
    assert abs(int(sheared[30].argmax() // 3) - int(sheared[0].argmax() // 3)) == 9
    turned = operations.rotate(line, 10, 1)  # 30 degrees
    assert turned[20, 20].min() > 100
    assert abs(np.degrees(np.arctan2(*bright_direction(turned)))) == pytest.approx(30, abs=3)


def bright_direction(pixels: np.ndarray) -> tuple[float, float]:
    rows, columns = np.nonzero(pixels[..., 0] > 200)
    slope = np.polyfit(rows, columns, 1)[0]
    return float(slope), 1.0


def test_rand_augment_is_a_function_of_its_draws() -> None:
    pixels = photo()
    augment = RandAugment(num=2, level=7)
    before = pixels.copy()
    first = [augment(pixels, rng(seed)) for seed in range(200)]
    assert all(np.array_equal(one, augment(pixels, rng(seed))) for seed, one in enumerate(first))
    assert np.array_equal(pixels, before)
    untouched = np.mean([np.array_equal(one, pixels) for one in first])
    assert 0.2 < untouched < 0.45  # a quarter by probability, and more by `identity`
    assert all(one.shape == pixels.shape and one.dtype == np.uint8 for one in first)
    assert np.array_equal(RandAugment(num=5, prob=0.0)(pixels, rng()), pixels)


def test_a_view_is_a_function_of_its_draws() -> None:
    view = parse({"visual.clean": {"random_resized_crop": {}, "flip": {}, "rand_augment": {}}}).visual["clean"]
    pixels = photo()
    assert view.crop(48, 64, 32, rng(3)) == view.crop(48, 64, 32, rng(3)) != view.crop(48, 64, 32, rng(4))
    assert np.array_equal(view(pixels, rng(3)), view(pixels, rng(3)))
    assert not np.array_equal(view(pixels, rng(3)), view(pixels, rng(4)))


# --- options -----------------------------------------------------------------------------------------------


def test_parse() -> None:
    made = parse(
        {
            "visual.clean": {"random_resized_crop": {"scale": [0.5, 1]}, "rand_augment": {"level": 5}},
            "visual.augmented": {},
            "text.clean": None,
            "text.masked": {"mask_tokens": {"prob": 1}},
        }
    )
    assert set(made.visual) == {"clean", "augmented"}
    assert set(made.text) == {"clean", "masked"}
    assert made.visual["clean"].random_resized_crop == RandomResizedCrop(scale=(0.5, 1.0))
    assert made.visual["clean"].rand_augment == RandAugment(num=2, level=5.0)
    assert made.visual["clean"].flip is None
    assert made.text["masked"].mask_tokens == MaskTokens(prob=1.0)
    assert made.text["clean"].mask_tokens is None


@pytest.mark.parametrize(
    ("views", "says"),
    [
        ({"text.maksed": {}}, r"views.text.maksed is not a view; did you mean 'text.masked'\?"),
        (
            {"text.masked": {"mask_token": {}}},
            r"views.text.masked.mask_token is not an operation; did you mean 'mask",
        ),
        ({"text.clean": {"flip": {}}}, "views.text.clean.flip is not an operation; there is mask_tokens"),
        (
            {"text.masked": {"mask_tokens": {"probb": 1}}},
            r"views.text.masked.mask_tokens.probb is not an option; did you mean 'prob'\?",
        ),
        (
            {"text.masked": {"mask_tokens": {"prob": "x"}}},
            r"mask_tokens.prob: should be a number \(got 'x'\)",
        ),
        ({"text.masked": {"mask_tokens": {"prob": True}}}, r"prob: should be a number \(got True\)"),
        (
            {"text.masked": {"mask_tokens": {"prob": 1.5}}},
            r"views.text.masked.mask_tokens.prob: should be .* 1.5",
        ),
        (
            {"text.masked": {"mask_tokens": {"mask_share": 0.95}}},
            r"random_share: should be a number in \[0, 0.05\]",
        ),
        ({"text.masked": {"mask_tokens": {"at_least_one": 1}}}, "at_least_one: should be true or false"),
        ({"visual.clean": {"rand_augment": {"num": 1.5}}}, "rand_augment.num: should be a whole number"),
        ({"visual.clean": {"random_resized_crop": {"scale": 0.2}}}, "scale: should be a list of two numbers"),
        (
            {"visual.clean": {"random_resized_crop": {"scale": [1, 0.2]}}},
            "scale: should be two rising numbers",
        ),
        (
            {"visual.clean": {"flip": 0.5}},
            r"views.visual.clean.flip: should be a mapping of options \(got 0.5\)",
        ),
        ({"visual.clean": ["flip"]}, "views.visual.clean: should be a mapping of operations"),
    ],
)
def test_mistakes_in_the_options_are_named(views: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse(views)


def picture(seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (24, 20, 3), dtype=np.uint8)


def test_color_jitter_is_pillows_arithmetic() -> None:
    image, enhance = pytest.importorskip("PIL.Image"), pytest.importorskip("PIL.ImageEnhance")
    pixels = picture()
    for name, kind in (("brightness", "Brightness"), ("contrast", "Contrast"), ("saturation", "Color")):
        only = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0, name: 0.4}
        rng = np.random.default_rng(3)
        draw = np.random.default_rng(3).random(5)[1 + ("brightness", "contrast", "saturation").index(name)]
        expected = np.array(getattr(enhance, kind)(image.fromarray(pixels)).enhance(0.6 + 0.8 * draw))
        found = ColorJitter(**only, prob=1.0)(pixels, rng)
        assert np.abs(found.astype(int) - expected).max() <= 2, name  # greys round apart


def test_color_jitter_draws_alike_whether_it_acts_or_not() -> None:
    rng, other = np.random.default_rng(1), np.random.default_rng(1)
    assert np.array_equal(ColorJitter(prob=0.0)(picture(), rng), picture())
    assert not np.array_equal(ColorJitter(prob=1.0)(picture(), other), picture())
    assert rng.random() == other.random()
    acted = sum(not np.array_equal(ColorJitter()(picture(), rng), picture()) for _ in range(400)) / 400
    assert acted == pytest.approx(0.8, abs=0.06)


def test_hues_turn_round_the_circle() -> None:
    red = np.zeros((2, 2, 3), dtype=np.uint8)
    red[..., 0] = 200
    for share, channel in ((1 / 3, 1), (-1 / 3, 2), (0.0, 0)):
        turned = operations.turn_hue(red, share)
        assert turned[0, 0, channel] == 200
        assert turned[0, 0].sum() < 212


def test_grayscale_and_blur() -> None:
    gray = Grayscale(prob=1.0)(picture(), np.random.default_rng(0))
    weights = np.array([0.299, 0.587, 0.114])  # ITU-R 601
    assert np.abs(gray - (picture() @ weights)[..., None]).max() <= 1
    assert np.array_equal(Grayscale(prob=0.0)(picture(), np.random.default_rng(0)), picture())
    dot = np.zeros((31, 31, 3), dtype=np.uint8)
    dot[15, 15] = 255
    spread = Blur(sigma=(2.0, 2.0), prob=1.0)(dot, np.random.default_rng(0)).astype(float)[15, :, 0]
    assert spread[15] == pytest.approx(255 / (2 * np.pi * 4), abs=1)
    assert spread[17] / spread[15] == pytest.approx(np.exp(-0.5), abs=0.1)
    assert np.array_equal(Blur(prob=0.0)(dot, np.random.default_rng(0)), dot)


def test_a_views_operations_come_in_tcls_order() -> None:
    views = parse({"visual.augmented": {"blur": {"sigma": [1.0, 1.0], "prob": 1.0}, "grayscale": {"prob": 1.0}}})
    made = views.visual["augmented"](picture(), np.random.default_rng(2))
    rng = np.random.default_rng(2)
    expected = Blur(sigma=(1.0, 1.0), prob=1.0)(Grayscale(prob=1.0)(picture(), rng), rng)
    assert np.array_equal(made, expected)
    with pytest.raises(ConfigError, match=r"views.visual.augmented.blur.sigma: should be two rising numbers"):
        parse({"visual.augmented": {"blur": {"sigma": [2.0, 1.0]}}})
