"""Crops of encoded pictures: that they are where they should be, sharp, free of aliases, and refused when damaged."""

from __future__ import annotations

import io
from typing import Any

import cv2
import numpy as np
import pytest
import simplejpeg

from vlscale.data.decode import Crop, Encoded, Pixels, decode, resize

Image = pytest.importorskip("PIL.Image")


def photo(height: int, width: int, seed: int = 0) -> Pixels:
    """Soft noise of several scales."""
    rng = np.random.default_rng(seed)
    total = np.zeros((height, width, 3), dtype=np.float32)
    for cell in (4, 16, 64):
        noise = rng.random((height // cell + 2, width // cell + 2, 3), dtype=np.float32)
        total += cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC) * cell**0.5
    return np.asarray(255 * (total - total.min()) / (total.max() - total.min()), dtype=np.uint8)


def jpeg(pixels: Pixels, **options: Any) -> bytes:
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "JPEG", **{"quality": 90, **options})
    return encoded.getvalue()


def pillow(pixels: Pixels, crop: Crop) -> Pixels:
    part = Image.fromarray(pixels[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width])
    return np.asarray(part.resize(crop.size[::-1], Image.Resampling.BICUBIC))


def apart(one: Pixels, other: Pixels) -> float:
    return float(np.abs(one.astype(int) - other).mean())


@pytest.mark.parametrize(
    "options", [{"subsampling": 0}, {"subsampling": 1}, {"subsampling": 2}, {"progressive": True}, {"optimize": True}]
)
def test_a_crop_is_the_part_of_the_whole(options: dict[str, Any]) -> None:
    """Though rows below it are not decoded."""
    data = jpeg(photo(203, 301), **options)
    whole = decode(data)
    rng = np.random.default_rng(3)
    for _ in range(20):
        height, width = rng.integers(1, 203), rng.integers(1, 301)
        top, left = int(rng.integers(204 - height)), int(rng.integers(302 - width))
        (part,) = Encoded(data).crops([Crop(top, left, int(height), int(width), (int(height), int(width)))])
        assert np.array_equal(part, whole[top : top + height, left : left + width])


def test_a_crop_does_not_decode_what_lies_below() -> None:
    """Damage there is not seen, which shows that it costs nothing; a file that is cut short is refused all the same."""
    data = jpeg(photo(512, 640), restart_marker_blocks=40)
    top = Crop(0, 0, 200, 640, (200, 640))
    damaged = bytearray(data)
    place = len(data) - 4000
    damaged[place : place + 1000] = bytes(1000)
    assert np.array_equal(Encoded(bytes(damaged)).crops([top])[0], Encoded(data).crops([top])[0])
    with pytest.raises(ValueError, match="remature end"):
        Encoded(data[:-4000]).crops([top])


CASES = [  # height, width of a crop, what it becomes, the greatest mean difference to Pillow's bicubic
    (224, 224, (224, 224), 0.0),
    (120, 150, (224, 224), 0.7),  # enlarged
    (240, 250, (224, 224), 1.5),
    (300, 320, (224, 224), 1.5),  # shrinks by 1.43
    (256, 370, (224, 224), 1.5),  # by 1.65 along one side
    (400, 420, (224, 224), 0.7),  # by 1.9: smoothed first
    (300, 512, (224, 224), 0.01),  # by 2.3 along one side: as Pillow
    (500, 640, (224, 224), 2.0),  # by its own transform to 1/2, then by 1.4
    (512, 640, (100, 100), 2.0),  # to 1/4
]


@pytest.mark.parametrize(("height", "width", "size", "least"), CASES)
def test_a_crop_is_near_to_pillows(height: int, width: int, size: tuple[int, int], least: float) -> None:
    data = jpeg(photo(512, 640), quality=95)
    crop = Crop(512 - height, (640 - width) // 2, height, width, size)
    (part,) = Encoded(data).crops([crop])
    assert part.shape == (*size, 3)
    assert apart(part, pillow(decode(data), crop)) <= least


def zone_plate(side: int) -> Pixels:
    """Rings that get finer outwards, up to the finest that pixels can hold."""
    x = np.arange(side) - side / 2
    rings = 127.5 + 127 * np.cos(np.pi * (x[:, None] ** 2 + x**2) / side)
    return np.repeat(rings.astype(np.uint8)[..., None], 3, axis=2)


def checkers(side: int) -> Pixels:
    """Black and white by turns, pixel by pixel."""
    return np.repeat((np.indices((side, side)).sum(axis=0) % 2 * 255).astype(np.uint8)[..., None], 3, axis=2)


FILTERS = [  # what a side of 512 becomes, mean difference to Pillow's bicubic: of a PNG, of a JPEG
    ((330, 330), 8.0, 8.0),  # smoothed by three pixels, of which Pillow's filter takes seven
    ((300, 300), 6.0, 6.0),
    ((330, 490), 8.0, 8.0),  # along one side only; area averages differ by 8 to 10
    ((490, 330), 8.0, 8.0),
    ((250, 250), 4.0, 16.0),  # a JPEG is halved by its own transform, which blocks out alike
    ((220, 300), 0.1, 0.1),
    ((120, 300), 0.5, 0.5),
]


@pytest.mark.parametrize(("size", "png", "jpg"), FILTERS)
def test_what_shrinks_by_more_than_one_and_a_half_has_no_aliases(size: tuple[int, int], png: float, jpg: float) -> None:
    """A checkerboard turns grey, and of the rings those that are too fine vanish, as they do with Pillow."""
    crop = Crop(0, 0, 512, 512, size)
    for pixels in (checkers(512), zone_plate(512)):
        for data, bound in (
            (cv2.imencode(".png", pixels)[1].tobytes(), png),
            (jpeg(pixels, quality=98, subsampling=0), jpg),
        ):
            expected = pillow(decode(data), crop)
            (shown,) = Encoded(data).crops([crop])
            aliased = cv2.resize(decode(data), size[::-1], interpolation=cv2.INTER_LINEAR)
            assert apart(shown, expected) < min(bound, 0.75 * apart(aliased, expected))
            if pixels[0, 0, 0] == 0:
                assert shown.std() < 20 < aliased.std()


def test_crops_of_one_picture_share_a_decoding_fine_enough_for_all() -> None:
    data = jpeg(photo(512, 512), quality=95)
    coarse, fine = Crop(0, 0, 512, 512, (128, 128)), Crop(100, 100, 128, 128, (128, 128))
    together = Encoded(data).crops([coarse, fine])
    assert np.array_equal(together[1], decode(data)[100:228, 100:228])
    assert apart(together[0], Encoded(data).crops([coarse])[0]) < 1.5


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_a_crop_at_a_coarser_scale_stays_in_its_place(factor: int) -> None:
    """An edge of the picture is found where Pillow has it, to within half a pixel of the result."""
    pixels = np.zeros((1024, 1024, 3), dtype=np.uint8)
    pixels[:, 500:] = 255
    for left in range(factor):
        crop = Crop(3, left, 64 * factor, 1000, (64, 1000 // factor))
        (part,) = Encoded(jpeg(pixels, quality=98)).crops([crop])
        expected = pillow(pixels, crop)
        assert abs(part[32, :, 0].astype(int).sum() - expected[32, :, 0].astype(int).sum()) <= 255 * 0.6


@pytest.mark.parametrize("size", [(64, 64), (50, 40), (30, 30), (20, 24), (100, 90)])
def test_a_crop_can_be_written_where_one_wants_it(size: tuple[int, int]) -> None:
    """Whichever filter makes it."""
    found, crop = Encoded(jpeg(photo(64, 64))), Crop(0, 0, 64, 64, size)
    room = np.zeros((2, *size, 3), dtype=np.uint8)
    (shown,) = found.crops([crop], [room[1]])
    assert np.array_equal(room[1], found.crops([crop])[0])
    assert np.shares_memory(shown, room)
    assert not room[0].any()


@pytest.mark.parametrize("kept", [1 << 25, 100])  # bytes of memory that pictures are decoded in one after the other
@pytest.mark.parametrize("side", [64, 40, 20])  # as it is, smoothed, filtered as Pillow does
def test_a_crop_outlives_the_next_picture(monkeypatch: pytest.MonkeyPatch, kept: int, side: int) -> None:
    monkeypatch.setattr("vlscale.data.decode.SCRATCH", kept)
    pixels = photo(64, 64)
    crop = Crop(0, 0, 64, 64, (side, side))
    (first,) = Encoded(jpeg(pixels)).crops([crop])
    before = first.copy()
    (second,) = Encoded(jpeg(255 - pixels)).crops([crop])
    assert np.array_equal(first, before)
    assert not np.array_equal(second, before)


def test_pixels_do_not_share_memory_with_the_picture() -> None:
    found = Encoded(jpeg(photo(64, 64)))
    one, other = found.crops([Crop(0, 0, 64, 64, (64, 64))] * 2)
    one[:] = 0
    assert other.any()


def test_larger_pictures_are_refused_by_the_header() -> None:
    data = jpeg(photo(40, 50))
    assert (Encoded(data, 2000).height, Encoded(data, 2000).width) == (40, 50)
    with pytest.raises(ValueError, match="it has 50 x 40 pixels; at most 1999 are decoded"):
        Encoded(data, 1999)


def encoded(pixels: Pixels, kind: str) -> bytes:
    if kind == "progressive":
        return jpeg(pixels, progressive=True)
    if kind == "cmyk":
        wide = np.dstack([pixels, pixels[..., :1]])
        return bytes(simplejpeg.encode_jpeg(wide, 90, "CMYK"))
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, {"jpg": "JPEG"}.get(kind, kind).upper())
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["jpg", "progressive", "cmyk", "png", "webp"])
def test_damage_is_a_value_error_or_a_picture(kind: str) -> None:
    """Nothing else comes of bytes that are cut, changed or added to."""
    rng = np.random.default_rng(7)
    data = encoded(photo(90, 120), kind)
    for trial in range(120):
        broken = bytearray(data)
        if trial % 3 == 0:
            del broken[int(rng.integers(1, len(data))) :]
        for place in rng.integers(0, 200 if trial % 3 == 2 else len(data), trial % 5):
            broken[place % len(broken)] = rng.integers(256)
        try:
            found = Encoded(bytes(broken), 1_000_000)
            crop = Crop(0, 0, min(60, found.height), min(80, found.width), (24, 24))
            assert found.crops([crop])[0].shape == (24, 24, 3)
        except ValueError:
            continue
    for length in (0, 1, 2, 12, 40, len(data) // 2):
        with pytest.raises(ValueError, match=r"."):
            Encoded(data[:length]).crops([Crop(5, 5, 60, 80, (24, 24))])


def test_resize() -> None:
    pixels = photo(30, 40)
    assert resize(pixels, 40, 30) is pixels
    assert np.array_equal(resize(pixels, 60, 60), cv2.resize(pixels, (60, 60), interpolation=cv2.INTER_CUBIC))
    assert np.array_equal(resize(pixels, 60, 60, True), cv2.resize(pixels, (60, 60), interpolation=cv2.INTER_LINEAR))
    assert resize(pixels[:, :1], 7, 3).shape == (3, 7, 3)
