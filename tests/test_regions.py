from __future__ import annotations

import tracemalloc
import zipfile
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from tests.shard_files import shared
from vlscale.data.collate import RegionSample, stack_regions
from vlscale.data.regions import PLACES, MaskRegions, Regions, check_widths, parse
from vlscale.types import Geometry, Inputs

SIZE = (200.0, 100.0)
BOXES = np.array([[20, 10, 60, 50], [100, 0, 200, 100]], dtype=np.float32)


def found(boxes: Any = BOXES, size: tuple[float, float] = SIZE, **fields: Any) -> Regions:
    boxes = np.asarray(boxes, dtype=np.float32)
    return Regions(np.ones((len(boxes), 3), dtype=np.float32), boxes, size, fields)


def npz(**arrays: Any) -> bytes:
    buffer = BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("geometry", "expected"),
    [
        ("corners", [[0.1, 0.1, 0.3, 0.5], [0.5, 0.0, 1.0, 1.0]]),
        ("corners_area", [[0.1, 0.1, 0.3, 0.5, 0.08], [0.5, 0.0, 1.0, 1.0, 0.5]]),
        ("corners_size", [[0.1, 0.1, 0.3, 0.5, 0.2, 0.4], [0.5, 0.0, 1.0, 1.0, 0.5, 1.0]]),
        ("corners_size_area", [[0.1, 0.1, 0.3, 0.5, 0.2, 0.4, 0.08], [0.5, 0.0, 1.0, 1.0, 0.5, 1.0, 0.5]]),
        # the greatest corner is the picture's here
        ("extent_area_score", [[0.1, 0.1, 0.3, 0.5, 0.08, 0.9], [0.5, 0.0, 1.0, 1.0, 0.5, 0.4]]),
    ],
)
def test_places(geometry: Geometry, expected: list[list[float]]) -> None:
    places = PLACES[geometry](found(class_confidence=np.array([0.9, 0.4], dtype=np.float32)))
    assert places.dtype == np.float32
    np.testing.assert_allclose(places, expected, atol=1e-6)


@pytest.mark.parametrize("geometry", PLACES)
def test_places_of_no_region(geometry: Geometry) -> None:
    empty = found(np.zeros((0, 4)), class_confidence=np.zeros(0, dtype=np.float32))
    whole = found(class_confidence=np.zeros(2, dtype=np.float32))
    assert PLACES[geometry](empty).shape == (0, PLACES[geometry](whole).shape[1])


def authors(system: str) -> dict[str, torch.Tensor]:
    path: Path = shared().parent / "reference" / system / "batch.safetensors"
    return load_file(path)


def test_places_agree_with_vilbert() -> None:
    batch = authors("vilbert")
    for row, number in enumerate(batch["num_boxes"].tolist()):
        width, height = batch["image_wh"][row].tolist()
        places = PLACES["corners_area"](found(batch["boxes_pixels"][row, :number].numpy(), (width, height)))
        np.testing.assert_allclose(places, batch["image_loc"][row, 1 : number + 1].numpy(), atol=1e-6)


def test_places_agree_with_vlp() -> None:
    batch = authors("vlp")
    for row, raw in enumerate(batch["raw_boxes_x1y1x2y2_class_score"]):
        regions = found(raw[:, :4].numpy(), class_confidence=raw[:, 5].numpy())
        even = F.layer_norm(torch.from_numpy(PLACES["extent_area_score"](regions)), (6,), eps=1e-5)
        torch.testing.assert_close(even, batch["vis_pe"][row, :, :6], atol=2e-5, rtol=1e-4)


def test_a_file() -> None:
    features = np.arange(12, dtype=np.float16).reshape(4, 3)
    boxes = np.arange(16, dtype=np.int64).reshape(4, 4)
    data = npz(
        features=features,
        boxes=boxes,
        classes=np.arange(4),
        width=80,
        height=60,
        attributes=np.arange(9),
        info=np.array([{}]),
    )
    regions = parse(data, 3, frozenset({"classes", "targets"}), (1.0, 1.0))
    assert regions.feats.tolist() == features[:3].tolist()
    assert regions.feats.dtype == regions.boxes.dtype == np.float32
    assert regions.size == (80, 60)
    assert {name: values.tolist() for name, values in regions.fields.items()} == {"classes": [0, 1, 2]}
    assert parse(npz(features=features, boxes=boxes), 9, frozenset(), SIZE).size == SIZE


def zipped(content: bytes, name: str = "features.npy", method: int = zipfile.ZIP_DEFLATED, declared: int = -1) -> bytes:
    """An npz with one member of any content, that declares another size than it has if told to."""
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as file:
        file.writestr(name, content)
    data = buffer.getvalue()
    entry = data.rindex(b"PK\1\2")
    return data if declared < 0 else data[: entry + 24] + declared.to_bytes(4, "little") + data[entry + 28 :]


def header(shape: str, dtype: str = "<f4", content: bytes = b"") -> bytes:
    told = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(told).to_bytes(2, "little") + told + content


UNUSABLE: dict[str, tuple[bytes, str]] = {
    "no npz": (b"no zip", "it is no npz"),
    "nothing": (b"", "it is empty"),
    "cut short": (npz(features=np.ones((2, 3)), boxes=BOXES)[:-30], "it is an npz that is damaged"),
    "features of no dimension": (npz(features=np.float32(3), boxes=BOXES, class_probs=BOXES), r"the shape \[\]; they"),
    "features of no width": (npz(features=np.ones((2, 0)), boxes=BOXES, class_probs=BOXES), r"the shape \[2, 0\]"),
    "no features": (npz(boxes=BOXES), "it lacks features"),
    "too few boxes": (npz(features=np.ones((2, 3)), boxes=BOXES[:1]), r"boxes have the shape \[1, 4\]"),
    "no class_probs": (npz(features=np.ones((2, 3)), boxes=BOXES), "it lacks class_probs"),
    "flat class_probs": (
        npz(features=np.ones((2, 3)), boxes=BOXES, class_probs=np.ones(2)),
        r"class_probs have the shape \[2\]",
    ),
    "a feature is not a number": (
        npz(features=np.full((2, 3), np.nan), boxes=BOXES, class_probs=BOXES / 200),
        "features hold a number that is not finite",
    ),
    "a feature beyond float32": (
        npz(features=np.full((2, 3), 1e300), boxes=BOXES, class_probs=BOXES / 200),
        "features hold a number that is not finite",
    ),
    "a box is not a number": (
        npz(features=np.ones((2, 3)), boxes=BOXES + np.inf, class_probs=BOXES / 200),
        "boxes hold a number that is not finite",
    ),
    "a box outside": (
        npz(features=np.ones((2, 3)), boxes=BOXES + 60, class_probs=BOXES / 200),
        r"box \[80.0, 70.0, 120.0, 110.0\] lies outside the picture of 200 x 100 pixels",
    ),
    "words": (npz(features=np.array([["a"]]), boxes=BOXES), "its features are <U1; they should be numbers"),
    "pickled": (npz(features=np.array([[None]]), boxes=BOXES), "it holds pickled objects, which are never loaded"),
    "declares more than is read": (zipped(header("(1,)"), declared=1 << 30), "would take 1073741824 bytes; at most"),
    "more arrays than anyone has": (npz(**{f"x{n}": np.ones(1) for n in range(65)}), "it holds more than 64 arrays"),
    "inflates to more than it declares": (zipped(bytes(10**8), declared=200), "damaged or cut short .*CRC"),
    "an absurd shape": (zipped(header("(1 << 40, 4)")), "no readable header"),
    "a shape larger than the file": (zipped(header("(1099511627776, 4)")), "but holds 0 bytes"),
    "a negative shape": (zipped(header("(-1, 4)", content=bytes(16))), r"of the shape \[-1, 4\], but holds 16 bytes"),
    "numbers of no size": (zipped(header("(9,)", "|V0")), "but holds 0 bytes"),
    "a header of nested brackets": (zipped(header("(" * 900)), "no readable header"),
    "a long header": (zipped(header("(1,)" + " " * 60_000)), "no readable header"),
    "no array": (zipped(b"text"), "no readable header"),
    "another packing": (zipped(header("(0,)"), method=zipfile.ZIP_LZMA), "packed in a way that numpy does not use"),
}


@pytest.mark.parametrize(("data", "reason"), UNUSABLE.values(), ids=UNUSABLE)
def test_a_file_that_cannot_be_used(data: bytes, reason: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=reason):
            parse(data, 36, frozenset({"class_probs"}), SIZE)
        assert tracemalloc.get_traced_memory()[1] < 10 * 2**20  # nothing was inflated first
    finally:
        tracemalloc.stop()


def test_a_file_without_a_region() -> None:
    regions = parse(npz(features=np.ones((0, 3)), boxes=np.ones((0, 4))), 36, frozenset(), SIZE)
    assert (regions.feats.shape, regions.boxes.shape) == ((0, 3), (0, 4))


def test_a_file_without_a_size() -> None:
    with pytest.raises(ValueError, match="lacks width, height: neither it nor the json tells how large the picture is"):
        parse(npz(features=np.ones((2, 3)), boxes=BOXES), 36, frozenset(), None)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"feats": 5}, "has features of 3 numbers, not family.feats=5"),
        ({"classes": 5}, "has class_probs of 4 classes, not family.classes=5"),
    ],
)
def test_another_detector_than_the_family_is_built_for(changes: dict[str, int], reason: str) -> None:
    regions = found(class_probs=np.ones((2, 4), dtype=np.float32), classes=np.array([0, 3]))
    fits = Inputs(0, 9, True, 4, 3, 4, 4, "corners")
    check_widths(regions, fits)
    with pytest.raises(ValueError, match=reason):
        check_widths(regions, replace(fits, **changes))
    with pytest.raises(ValueError, match=r"has classes from 0 to 4, but family.classes=4"):
        check_widths(found(classes=np.array([0, 4])), fits)


def none(rng: np.random.Generator) -> None:
    return None


def test_regions_are_hidden_in_their_shares() -> None:
    feats = np.ones((20_000, 2), dtype=np.float32)
    mask = MaskRegions(prob=0.2, zero_share=0.8, random_share=0.1, at_least_one=False)
    hidden, picked = mask(feats, lambda rng: np.full(2, 7, dtype=np.float32), np.random.default_rng(0))
    kinds = hidden[picked, 0]
    assert abs(picked.mean() - 0.2) < 0.01
    assert abs((kinds == 0).mean() - 0.8) < 0.02
    assert abs((kinds == 7).mean() - 0.1) < 0.02
    assert (hidden[~picked] == 1).all()
    assert (feats == 1).all()


def test_at_least_one_region_is_hidden_where_there_is_one() -> None:
    always, never = MaskRegions(prob=1e-9), MaskRegions(prob=1e-9, at_least_one=False)
    rng = np.random.default_rng(0)
    feats = np.ones((5, 2), dtype=np.float32)
    assert {int(np.flatnonzero(always(feats, none, rng)[1])[0]) for _ in range(60)} == {0, 1, 2, 3, 4}
    assert not never(feats, none, rng)[1].any()
    assert always(feats[:0], none, rng)[1].shape == (0,)


def seen(count: int, picked: list[bool]) -> RegionSample:
    feats = np.arange(1, 2 * count + 1, dtype=np.float32).reshape(count, 2)
    flags = np.array(picked, dtype=np.bool_)
    views = {"clean": (feats, None), "masked": (np.where(flags[:, None], 0, feats), flags)}
    return RegionSample(feats, feats * 2, {"classes": np.arange(count)}, views)  # type: ignore[arg-type]


def test_pictures_with_none_and_some_regions_in_one_batch() -> None:
    views = stack_regions([seen(0, []), seen(2, [False, True])], targets=True)
    clean, masked = views["clean"], views["masked"]
    assert clean.mask is not None
    assert clean.mask.tolist() == [[False, False], [True, True]]
    assert clean.feats.tolist() == [[[0, 0], [0, 0]], [[1, 2], [3, 4]]]
    assert clean.picked is None
    assert masked.picked is not None
    assert masked.picked.tolist() == [[False, False], [False, True]]
    assert masked.feats.tolist() == [[[0, 0], [0, 0]], [[1, 2], [0, 0]]]
    assert masked.targets is clean.feats
    assert masked.classes is clean.classes
    assert stack_regions([seen(0, [])], targets=False)["masked"].feats.shape == (1, 1, 2)
