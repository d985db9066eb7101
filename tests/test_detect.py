"""`shards.py regions`: any detector of transformers fills regions.npz, whatever else is in its batch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    ConditionalDetrConfig,
    ConditionalDetrForObjectDetection,
    DetrConfig,
    DetrForObjectDetection,
    DetrImageProcessorPil,
    PreTrainedModel,
    ResNetConfig,
    YolosConfig,
    YolosForObjectDetection,
    YolosImageProcessorPil,
)

from tests.shard_files import Members, png, write_tar
from vlscale.data.detect import Choice, Detector, add_regions
from vlscale.data.detections import read_regions
from vlscale.data.looking import inspect
from vlscale.data.shards import Shards
from vlscale.errors import ConfigError, DataError

CLASSES, QUERIES = 5, 24
BACKBONE = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage2"])
DECODER = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
HEADS = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_queries": QUERIES, "num_labels": CLASSES}
SHARED = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None, "backbone_config": BACKBONE}
TINY: dict[str, Callable[[], PreTrainedModel]] = {
    "yolos": lambda: YolosForObjectDetection(
        YolosConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
                    image_size=[32, 32], num_detection_tokens=QUERIES, num_labels=CLASSES)
    ),
    "detr": lambda: DetrForObjectDetection(DetrConfig(**SHARED, **DECODER, **HEADS)),
    "conditional_detr": lambda: ConditionalDetrForObjectDetection(ConditionalDetrConfig(**SHARED, **DECODER, **HEADS)),
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny detector of each kind, as save_pretrained leaves it."""
    folders = {}
    for name, build in TINY.items():
        torch.manual_seed(1)
        folders[name] = tmp_path_factory.mktemp(name)
        build().save_pretrained(folders[name])
        processor = YolosImageProcessorPil if name == "yolos" else DetrImageProcessorPil
        processor(size={"shortest_edge": 32, "longest_edge": 48}).save_pretrained(folders[name])
    return folders


def pictures(folder: Path, sides: tuple[int, ...] = (24, 40, 24), special: Members | None = None) -> Shards:
    members: Members = []
    for n, side in enumerate(sides):
        members += [(f"s{n}.png", png(n, side)), (f"s{n}.json", json.dumps({"caption": f"number {n}"}).encode())]
    folder.mkdir(exist_ok=True)
    return Shards(write_tar(folder / "part-000.tar", [*members, *(special or [])]))


@pytest.mark.parametrize("name", TINY)
def test_every_kind_of_detector_gives_sound_regions(tmp_path: Path, saved: dict[str, Path], name: str) -> None:
    shards = pictures(tmp_path / "in")
    written = add_regions(shards, tmp_path / "out", Detector(saved[name], "cpu"), Choice(12, 0.0), dtype="float32")
    assert [path.name for path in written.shards] == ["part-000.tar"]
    assert inspect.verify(written.shards).counts == {}
    copies = Shards(written.shards)
    background = name != "conditional_detr"
    for i in range(3):
        raw = copies.read(i)
        regions = read_regions(raw["regions.npz"])
        record = json.loads(raw["json"])
        assert raw["png"] == shards.read(i)["png"]
        assert record["caption"] == f"number {i}"
        assert regions.features.shape == (12, 16)
        assert (regions.width, regions.height) == ((24, 40, 24)[i],) * 2
        assert regions.class_probs is not None
        assert regions.class_confidence is not None
        assert regions.classes is not None
        assert regions.class_probs.shape == (12, CLASSES + background)
        np.testing.assert_allclose(regions.class_probs.sum(axis=1), 1, atol=1e-5)
        assert (np.diff(regions.class_confidence) <= 0).all()
        assert (regions.class_probs[:, background:].argmax(axis=1) == regions.classes).all()
        assert record["tags"] == [f"LABEL_{number}" for number in regions.classes]
        if background:
            np.testing.assert_array_equal(regions.class_probs[:, 1:].max(axis=1), regions.class_confidence)


def test_regions_are_those_of_the_model(tmp_path: Path, saved: dict[str, Path]) -> None:
    """Against transformers' own post-processing."""
    detector = Detector(saved["detr"], "cpu")
    pixels = np.random.default_rng(3).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    regions = detector([pixels], Choice(QUERIES, 0.0))[0]
    model = DetrForObjectDetection.from_pretrained(saved["detr"]).eval()
    processor = DetrImageProcessorPil.from_pretrained(saved["detr"])
    with torch.no_grad():
        out = model(**processor(images=pixels, return_tensors="pt"))
    theirs = processor.post_process_object_detection(out, threshold=0.0, target_sizes=[(40, 30)])[0]
    order = theirs["scores"].argsort(descending=True, stable=True)
    np.testing.assert_allclose(regions.class_confidence, theirs["scores"][order], atol=1e-5)
    np.testing.assert_allclose(regions.boxes, theirs["boxes"][order].clamp(min=0), atol=0.1)
    np.testing.assert_allclose(regions.features, out.last_hidden_state[0][order].numpy(), atol=1e-4)


def test_a_region_does_not_depend_on_its_batch(tmp_path: Path, saved: dict[str, Path]) -> None:
    detector = Detector(saved["yolos"], "cpu")
    rng = np.random.default_rng(4)
    many = [rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in ((24, 24), (24, 40), (24, 24), (40, 24))]
    together = detector(many, Choice(8, 0.0))
    for pixels, found in zip(many, together, strict=True):
        alone = detector([pixels], Choice(8, 0.0))[0]
        np.testing.assert_allclose(found.features, alone.features, atol=1e-5)
        np.testing.assert_allclose(found.boxes, alone.boxes, atol=1e-3)


def test_how_many_regions_stay() -> None:
    confidence = np.linspace(0.0, 0.95, 20, dtype=np.float32)
    assert Choice(regions=36, threshold=0.2)(confidence).tolist() == list(range(19, 3, -1))
    assert Choice(regions=5, threshold=0.2)(confidence).tolist() == [19, 18, 17, 16, 15]
    assert len(Choice(regions=36, threshold=1.0)(confidence)) == 10
    assert len(Choice(regions=36, threshold=0.9)(confidence[:4])) == 4


def test_a_sample_without_a_picture_is_named(tmp_path: Path, saved: dict[str, Path]) -> None:
    special = [("t0.json", b"{}"), ("t1.png", b"no picture"), ("t2.png", png(9)), ("t2.json", b"[]")]
    shards = pictures(tmp_path / "in", (24,), special)
    written = add_regions(shards, tmp_path / "out", Detector(saved["yolos"], "cpu"), Choice(), batch=2)
    assert (written.samples, written.broken) == (1, 3)
    assert dict(written.named) == {
        "t0": "it has no picture (jpg, png or webp) but json",
        "t1": "it is not a JPEG, PNG or WebP picture",
        "t2": "its json holds a list; it should be an object",
    }
    with pytest.raises(ConfigError, match=r"part-000.tar is there already"):
        add_regions(shards, tmp_path / "out", Detector(saved["yolos"], "cpu"), Choice())
    only = Shards(write_tar(tmp_path / "only.tar", [("t.json", b"{}")]))
    with pytest.raises(DataError, match="all 1 are broken; the first, 't'"):
        add_regions(only, tmp_path / "out", Detector(saved["yolos"], "cpu"), Choice())


def test_what_is_no_detector_is_refused(tmp_path: Path, saved: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"holds no config.json; write a folder that save_pretrained made"):
        Detector(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match="cannot be loaded"):
        Detector(tmp_path)
    with pytest.raises(ConfigError, match="cannot be loaded on nowhere"):
        Detector(saved["yolos"], "nowhere")
    with pytest.raises(ConfigError, match="--threshold is 2"):
        Choice(threshold=2)
