"""`shards.py make` on the files of UNITER's, OSCAR's and VLP's authors, made here in small as their code does."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.test_formats import HEIGHT, REGIONS, WIDTH, cell, made, picture_arrays, read
from vlscale.data.formats import open_source
from vlscale.data.formats.base import optional
from vlscale.errors import ConfigError, DataError

CLASSES = 5


def soft_labels(number: int) -> Any:
    return np.random.default_rng(number).dirichlet(np.ones(CLASSES), REGIONS).astype(np.float32)


def places(number: int) -> Any:
    """[R, 6] x1 y1 x2 y2 w h, normalised."""
    x1, y1, x2, y2 = (picture_arrays(number)["boxes"] / np.float32([WIDTH, HEIGHT, WIDTH, HEIGHT])).T
    return np.stack([x1, y1, x2, y2, x2 - x1, y2 - y1], axis=1).astype(np.float32)


def test_a_library_that_is_missing_is_named() -> None:
    with pytest.raises(ConfigError, match=r"with no_such_library, which is not installed; `pip"):
        optional("no_such_library")


# --- uniter_lmdb -------------------------------------------------------------------------------------------


def uniter_arrays(number: int) -> dict[str, Any]:
    half = {
        "features": picture_arrays(number)["features"],
        "norm_bb": places(number),
        "conf": soft_labels(number).max(axis=1),
        "soft_labels": soft_labels(number),
    }
    return {name: value.astype(np.float16) for name, value in half.items()}


def packed(arrays: dict[str, Any]) -> bytes:
    """As msgpack-numpy writes it."""
    msgpack = pytest.importorskip("msgpack")
    marked = {
        name: {b"nd": True, b"type": each.dtype.str, b"kind": b"", b"shape": each.shape, b"data": each.tobytes()}
        for name, each in arrays.items()
    }
    return bytes(msgpack.packb(marked, use_bin_type=True))


def zipped(arrays: dict[str, Any]) -> bytes:
    """As the `_compressed` DBs hold it."""
    out = BytesIO()
    np.savez_compressed(out, **arrays, allow_pickle=True)  # the authors' call: one more member of that name
    return out.getvalue()


def image_db(folder: Path, values: dict[str, bytes]) -> Path:
    lmdb = pytest.importorskip("lmdb")
    folder.mkdir(parents=True)
    with lmdb.open(str(folder), map_size=2**22) as environment, environment.begin(write=True) as write:
        for name, value in values.items():
            write.put(name.encode(), value)
        write.put(b"__keys__", json.dumps(list(values)).encode())
    return folder


def text_db(folder: Path, records: dict[str, dict[str, Any]]) -> Path:
    lmdb, msgpack = pytest.importorskip("lmdb"), pytest.importorskip("msgpack")
    frame = pytest.importorskip("lz4.frame")
    folder.mkdir(parents=True)
    with lmdb.open(str(folder), map_size=2**22) as environment, environment.begin(write=True) as write:
        for name, record in records.items():
            write.put(name.encode(), frame.compress(msgpack.packb(record, use_bin_type=True)))
    return folder


TOKENS = ["[PAD]", "[UNK]", "A", "cat", "##s", "'", "sit", ".", "dog"]
TEXTS = {
    "1": {"input_ids": [2, 3, 4, 6, 7], "img_fname": "coco_1.npz"},
    "2": {"input_ids": [2, 8], "img_fname": "coco_1.npz"},
    "3": {"input_ids": [8], "img_fname": "coco_2.npz", "sent": "The dog, as written."},
}


@pytest.mark.parametrize(("name", "encode"), [("feat_th0.2_max100_min10", packed), ("all_compressed", zipped)])
def test_uniters_databases(tmp_path: Path, name: str, encode: Any) -> None:
    images = image_db(tmp_path / "coco" / name, {f"coco_{n}.npz": encode(uniter_arrays(n)) for n in (1, 2)})
    texts = text_db(tmp_path / "coco.db", TEXTS)
    (tmp_path / "vocab.txt").write_text("\n".join(TOKENS))
    options = {"captions": [texts], "vocab": tmp_path / "vocab.txt"}
    samples = read(made(tmp_path, "uniter_lmdb", images.parent, options=options))
    record, regions, _ = samples["coco_1"]
    assert record["caption"] == ["A cats sit.", "A dog"]
    assert samples["coco_2"][0]["caption"] == "The dog, as written."
    assert regions is not None
    wanted = uniter_arrays(1)
    np.testing.assert_array_equal(regions.features, wanted["features"])
    np.testing.assert_array_equal(regions.class_probs, wanted["soft_labels"])
    np.testing.assert_array_equal(regions.class_confidence, wanted["conf"].astype(np.float32))
    sides = [regions.width, regions.height] * 2
    np.testing.assert_allclose(regions.boxes / sides, wanted["norm_bb"][:, :4].astype(np.float32), atol=1e-6)


def test_only_the_boxes_that_uniter_counts(tmp_path: Path) -> None:
    folder = image_db(tmp_path / "coco" / "feat_th0.2_max100_min10", {"coco_1.npz": packed(uniter_arrays(1))})
    (tmp_path / "coco" / "nbb_th0.2_max100_min10.json").write_text('{"coco_1.npz": 2}')
    regions = read(made(tmp_path, "uniter_lmdb", folder))["coco_1"][1]
    assert regions is not None
    assert regions.features.shape[0] == len(regions.boxes) == 2


def test_python_objects_in_a_database_are_refused(tmp_path: Path) -> None:
    msgpack = pytest.importorskip("msgpack")
    pickled = {b"nd": True, b"type": "|O", b"kind": b"O", b"shape": (1,), b"data": b"\x80\x04."}
    values = {
        "a.npz": packed(uniter_arrays(1)),
        "b.npz": bytes(msgpack.packb({"features": pickled}, use_bin_type=True)),
        "c.npz": zipped({"features": np.array([{}], dtype=object), "norm_bb": np.zeros((1, 6))}),
        "d.npz": b"\xc1 no msgpack",
        "e.npz": packed(uniter_arrays(2))[:-200],
    }
    written = made(tmp_path, "uniter_lmdb", image_db(tmp_path / "feat", values))
    reasons = dict(written.named)
    assert (written.samples, written.broken) == (1, 4)
    assert reasons["b"] == "its features is an array of Python objects, which is never loaded"
    assert reasons["c"] == "it holds pickled objects, which are never loaded"
    assert "no readable msgpack" in reasons["d"]
    assert "no readable msgpack" in reasons["e"]


def test_text_databases_that_do_not_fit(tmp_path: Path) -> None:
    images = image_db(tmp_path / "feat", {"coco_1.npz": packed(uniter_arrays(1))})
    pairs = text_db(tmp_path / "nlvr.db", {"1": {"input_ids": [2], "img_fname": ["a.npz", "b.npz"]}})
    answers = text_db(tmp_path / "vqa.db", {"1": {"input_ids": [2], "img_fname": "a.npz", "target": {"labels": [1]}}})
    captions = text_db(tmp_path / "coco.db", TEXTS)
    (tmp_path / "vocab.txt").write_text("\n".join(TOKENS[:4]))
    for texts, vocab, error, says in (
        (pairs, None, DataError, "pairs of pictures"),
        (answers, None, DataError, "answers are numbers"),
        (captions, None, ConfigError, "write --vocab"),
        (captions, tmp_path / "vocab.txt", ConfigError, "token 7, --vocab only 4"),
        (captions, tmp_path / "coco.db", ConfigError, "vocab.txt cannot be read"),
    ):
        with pytest.raises(error, match=says):
            open_source("uniter_lmdb", [images], captions=[texts], vocab=vocab)
    with pytest.raises(DataError, match="holds no LMDB"):
        open_source("uniter_lmdb", [tmp_path / "vocab.txt"])


# --- oscar_tsv ---------------------------------------------------------------------------------------------

NAMES = ("cat", "dog", "cow", "hat")


def objects(number: int) -> list[dict[str, Any]]:
    boxes, scores = picture_arrays(number)["boxes"], picture_arrays(number)["objects_conf"]
    return [
        {"class": name, "conf": float(score), "rect": box}
        for name, score, box in zip(NAMES, scores, boxes.tolist(), strict=True)
    ]


def oscar_features(number: int) -> Any:
    return np.concatenate([picture_arrays(number)["features"], places(number)], axis=1)


def write_oscar(folder: Path, labels: bool = True, rows: str = "three") -> Path:
    """Two pictures; the labels stand in another order than the features."""
    folder.mkdir()
    lines = {
        "three": lambda n: f"{n}\t{REGIONS}\t{cell(oscar_features(n))}\n",
        "json": lambda n: f"{n}\t{json.dumps({'num_boxes': REGIONS, 'features': cell(oscar_features(n))})}\n",
    }
    (folder / "features.tsv").write_text("".join(map(lines[rows], (1, 2))))
    (folder / "features.lineidx").write_text("0\n1\n")
    if labels:
        (folder / "train.label.tsv").write_text("".join(f"{n}\t{json.dumps(objects(n))}\n" for n in (2, 1)))
    return folder


@pytest.mark.parametrize("rows", ["three", "json"])
def test_oscars_files(tmp_path: Path, rows: str) -> None:
    folder = write_oscar(tmp_path / "in", rows=rows)
    captions = [{"image_id": "1", "caption": "a cat"}, {"image_id": "2", "caption": "a dog"}]
    (tmp_path / "train_caption.json").write_text(json.dumps(captions))
    samples = read(made(tmp_path, "oscar_tsv", folder, options={"captions": [tmp_path / "train_caption.json"]}))
    assert list(samples) == ["1", "2"]
    for n, caption in ((1, "a cat"), (2, "a dog")):
        record, regions, _ = samples[str(n)]
        assert record == {"caption": caption, "tags": list(NAMES), "width": WIDTH, "height": HEIGHT}
        assert regions is not None
        wanted = picture_arrays(n)
        np.testing.assert_allclose(regions.features, wanted["features"], atol=2e-3)
        np.testing.assert_allclose(regions.boxes, wanted["boxes"], atol=1e-3)
        np.testing.assert_allclose(regions.class_confidence, wanted["objects_conf"], atol=1e-6)


def test_the_size_from_labels_or_from_its_own_file(tmp_path: Path) -> None:
    told = write_oscar(tmp_path / "a", labels=False)
    (told / "predictions.tsv").write_text(
        "".join(f"{n}\t{json.dumps({'image_w': 200, 'image_h': 100, 'objects': objects(n)})}\n" for n in (1, 2))
    )
    beside = write_oscar(tmp_path / "b", labels=False)
    (beside / "train.hw.tsv").write_text("".join(f'{n}\t[{{"height": 100, "width": 200}}]\n' for n in (1, 2)))
    for folder, tags in ((told, list(NAMES)), (beside, None)):
        record, regions, _ = read(made(tmp_path / f"{folder.name}_out", "oscar_tsv", folder))["1"]
        assert record.get("tags") == tags
        assert regions is not None
        assert (regions.width, regions.height) == (200, 100)
        np.testing.assert_allclose(regions.boxes / [200, 100, 200, 100], places(1)[:, :4], atol=1e-6)
    nowhere = write_oscar(tmp_path / "c", labels=False)
    with pytest.raises(DataError, match=r"neither labels nor a hw\.tsv tell the picture's size"):
        made(tmp_path / "c_out", "oscar_tsv", nowhere)


def test_oscars_corpus_gives_captions(tmp_path: Path) -> None:
    folder = write_oscar(tmp_path / "in")
    (tmp_path / "corpus.tsv").write_text(
        "coco_1\tcoco_1\ta cat\ncoco_2\tcoco_2\ta dog\ncoco_1\tcoco_1\tanother cat\ncoco_1\tcoco_qa_1_9\twhy?\n"
    )
    samples = read(made(tmp_path, "oscar_tsv", folder, options={"captions": [tmp_path / "corpus.tsv"]}))
    assert samples["1"][0]["caption"] == ["a cat", "another cat"]


def test_rows_of_oscar_that_cannot_be_used(tmp_path: Path) -> None:
    folder = write_oscar(tmp_path / "in")
    good = cell(oscar_features(1))
    with open(folder / "features.tsv", "a") as file:
        file.write(f"short\t{REGIONS}\t{good[:-8]}\nfew\t0\t{good}\nodd\tmany\t{good}\nlabel\t{REGIONS}\t{good}\n")
    with open(folder / "train.label.tsv", "a") as file:
        file.write("label\tno json\n")
    written = made(tmp_path, "oscar_tsv", folder)
    assert (written.samples, written.broken) == (2, 4)
    assert dict(written.named).keys() == {"short", "few", "odd", "label"}


# --- vlp ---------------------------------------------------------------------------------------------------


def vlp_boxes(number: int) -> Any:
    """[R, 6] x1 y1 x2 y2, class, confidence."""
    arrays = picture_arrays(number)
    return np.concatenate(
        [arrays["boxes"], np.full((REGIONS, 1), 3, np.float32), arrays["objects_conf"][:, None]], axis=1
    )


def write_vlp(folder: Path, names: dict[str, int]) -> Path:
    h5py = pytest.importorskip("h5py")
    folder.mkdir()
    for name, number in names.items():
        for kind, array in (("feat", picture_arrays(number)["features"]), ("cls", soft_labels(number))):
            with h5py.File(folder / f"det_{kind}{name[-3:]}.h5", "a") as file:
                file[name] = array
        with h5py.File(folder / "det_bbox.h5", "a") as file:
            file[name] = vlp_boxes(number)
    return folder


def check_vlp(regions: Any, number: int) -> None:
    arrays = picture_arrays(number)
    np.testing.assert_allclose(regions.features, arrays["features"], atol=2e-3)
    np.testing.assert_allclose(regions.boxes, arrays["boxes"], atol=1e-4)
    np.testing.assert_allclose(regions.class_confidence, arrays["objects_conf"], atol=1e-6)
    np.testing.assert_allclose(regions.class_probs, soft_labels(number), atol=1e-3)
    assert regions.classes is None
    assert regions.width - 1 < arrays["boxes"][:, [0, 2]].max() <= regions.width
    assert regions.height - 1 < arrays["boxes"][:, [1, 3]].max() <= regions.height


def test_vlps_hdf5_files(tmp_path: Path) -> None:
    folder = write_vlp(tmp_path / "in", {"COCO_000001042": 1, "COCO_000002042": 2, "COCO_000000043": 3})
    karpathy = {"images": [{"filename": f"COCO_{n}.jpg", "sentences": [{"raw": f"picture {n}"}]} for n in
                           ("000001042", "000002042", "000000043")]}  # fmt: skip
    (tmp_path / "dataset_coco.json").write_text(json.dumps(karpathy))
    samples = read(made(tmp_path, "vlp", folder, options={"captions": [tmp_path / "dataset_coco.json"]}))
    for name, number in (("COCO_000001042", 1), ("COCO_000002042", 2), ("COCO_000000043", 3)):
        assert samples[name][0]["caption"] == f"picture {name[5:]}"
        check_vlp(samples[name][1], number)


def test_vlps_npy_files(tmp_path: Path) -> None:
    folder = write_vlp(tmp_path / "in", {"a042": 1})
    for kind in ("feat", "cls"):
        (folder / f"det_{kind}042.h5").unlink()
    np.save(folder / "a042.npy", picture_arrays(1)["features"])
    np.save(folder / "a042_cls_prob.npy", soft_labels(1))
    np.save(folder / "b042.npy", np.array([{}], dtype=object), allow_pickle=True)
    written = made(tmp_path, "vlp", folder)
    assert [name for name, _ in written.named] == ["b042"]
    check_vlp(read(written)["a042"][1], 1)


def test_vlp_files_that_are_missing(tmp_path: Path) -> None:
    folder = write_vlp(tmp_path / "in", {"a042": 1, "b043": 2})
    (folder / "det_cls043.h5").unlink()
    written = made(tmp_path, "vlp", folder)
    assert written.named[0][0] == "b043"
    assert "det_cls043.h5 does not hold its probs" in written.named[0][1]
    (folder / "det_bbox.h5").rename(tmp_path / "boxes.h5")
    with pytest.raises(DataError, match="holds no h5 file of boxes; name it in --source as well"):
        open_source("vlp", [folder])
    assert len(read(made(tmp_path / "again", "vlp", folder, tmp_path / "boxes.h5"))) == 1
