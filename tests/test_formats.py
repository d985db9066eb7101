"""`shards.py make`: people's formats become shards that training reads, each array and text in its place."""

from __future__ import annotations

import base64
import json
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.shard_files import png, shared
from vlscale.data.detections import Detections, read_regions
from vlscale.data.formats import open_source
from vlscale.data.looking import inspect
from vlscale.data.making.write import Layout, Written, key_of, make
from vlscale.data.shards import Shards
from vlscale.errors import ConfigError, DataError

REGIONS, WIDTH, HEIGHT = 4, 64, 48


def picture_arrays(number: int, width: int = 6) -> dict[str, Any]:
    """What bottom-up attention says of picture `number`, under LXMERT's names."""
    rng = np.random.default_rng(number)
    corners = np.sort(rng.uniform(0, 1, (REGIONS, 2, 2)), axis=1).reshape(REGIONS, 4)
    return {
        "img_h": HEIGHT,
        "img_w": WIDTH,
        "objects_id": rng.integers(0, 3, REGIONS),
        "objects_conf": rng.uniform(0, 1, REGIONS).astype(np.float32),
        "attrs_id": rng.integers(0, 3, REGIONS),
        "attrs_conf": rng.uniform(0, 1, REGIONS).astype(np.float32),
        "boxes": (corners * [WIDTH, HEIGHT, WIDTH, HEIGHT]).astype(np.float32),
        "features": rng.standard_normal((REGIONS, width)).astype(np.float32),
    }


def made(folder: Path, format_: str, *paths: Path, options: dict[str, Any] | None = None, **layout: Any) -> Written:
    return make(open_source(format_, paths, **(options or {})), Layout(folder / "out", "data", **layout))


def read(written: Written) -> dict[str, tuple[dict[str, Any], Detections | None, dict[str, bytes]]]:
    """{key: (json, regions, members)} of shards that verify finds sound."""
    assert inspect.verify(written.shards).counts == {}
    shards = Shards(written.shards)
    out = {}
    for i in range(len(shards)):
        raw = shards.read(i)
        regions = read_regions(raw["regions.npz"]) if "regions.npz" in raw else None
        out[shards.key(i)] = (json.loads(raw["json"]), regions, raw)
    return out


def same(regions: Detections | None, wanted: dict[str, Any]) -> None:
    """The detections hold what LXMERT's names said."""
    assert regions is not None
    assert (regions.width, regions.height) == (WIDTH, HEIGHT)
    for ours, theirs, tolerance in (
        ("features", "features", 2e-3),
        ("boxes", "boxes", 1e-4),
        ("classes", "objects_id", 0),
        ("class_confidence", "objects_conf", 0),
        ("attributes", "attrs_id", 0),
        ("attribute_confidence", "attrs_conf", 0),
    ):
        np.testing.assert_allclose(getattr(regions, ours), wanted[theirs], atol=tolerance)


# --- writing -----------------------------------------------------------------------------------------------


def write_pictures(folder: Path, count: int) -> Path:
    """Pictures with a txt beside."""
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(count):
        (folder / f"p{n}.png").write_bytes(png(n))
        (folder / f"p{n}.txt").write_text(f"picture number {n}\n")
    return folder


def test_the_same_source_gives_the_same_bytes_in_any_number_of_processes(tmp_path: Path) -> None:
    source = write_pictures(tmp_path / "in", 5)
    one, again = (made(tmp_path / name, "folder", source, samples=2) for name in "ab")
    two = made(tmp_path / "c", "folder", source, samples=2, processes=2)
    assert [path.name for path in one.shards] == ["data-000000.tar", "data-000001.tar", "data-000002.tar"]
    for other in (again, two):
        assert [path.read_bytes() for path in other.shards] == [path.read_bytes() for path in one.shards]
    assert list(read(one)) == [f"p{n}" for n in range(5)]


def test_a_shard_ends_at_its_size(tmp_path: Path) -> None:
    written = made(tmp_path, "folder", write_pictures(tmp_path / "in", 6), megabytes=0.01)
    assert len(written.shards) > 1
    assert all(path.stat().st_size <= 0.01 * 2**20 + 10_240 for path in written.shards)  # tar's own end
    assert len(read(written)) == 6


def test_broken_ones_are_left_out_and_named(tmp_path: Path) -> None:
    source = write_pictures(tmp_path / "in", 3)
    (source / "p1.png").write_bytes(b"no picture")
    written = made(tmp_path, "folder", source)
    assert (written.samples, written.broken) == (2, 1)
    assert written.named == [("p1", "it is not a JPEG, PNG or WebP picture")]
    assert sorted(read(written)) == ["p0", "p2"]


def test_nothing_is_left_where_all_are_broken(tmp_path: Path) -> None:
    source = write_pictures(tmp_path / "in", 2)
    for n in range(2):
        (source / f"p{n}.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="all 2 are broken; the first, 'p0': it is not a JPEG"):
        made(tmp_path, "folder", source)
    assert not (tmp_path / "out").exists()


def test_old_shards_are_not_mixed_with_new_ones(tmp_path: Path) -> None:
    source = write_pictures(tmp_path / "in", 2)
    made(tmp_path, "folder", source)
    with pytest.raises(ConfigError, match=r"holds data shards made with samples_per_shard 5000, not 1; go on"):
        made(tmp_path, "folder", source, samples=1)
    (tmp_path / "out" / "data.made.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"data-000000.tar is there already; write another --to or --prefix"):
        made(tmp_path, "folder", source)


def test_names_become_keys_that_a_shard_can_hold(tmp_path: Path) -> None:
    assert key_of("train/a.b c") == "train/a_b_c"
    assert not key_of("__x__").startswith("__")
    long = write_pictures(tmp_path / "in" / ("folder" * 20) / ("deeper" * 20), 1)
    assert list(read(made(tmp_path, "folder", long.parent.parent))) == [f"{'folder' * 20}/{'deeper' * 20}/p0"]


def test_two_names_of_one_key_are_told_apart_by_leaving_one_out(tmp_path: Path) -> None:
    source = write_pictures(tmp_path / "in", 1)
    for name in ("a b", "a_b"):
        (source / f"{name}.png").write_bytes(png(9))
        (source / f"{name}.txt").write_text("twice")
    written = made(tmp_path, "folder", source)
    assert (written.samples, written.named) == (2, [("a_b", "its key 'a_b' is that of an earlier one")])


# --- folder ------------------------------------------------------------------------------------------------

COCO = {
    "images": [{"id": 7, "file_name": "p0.png"}, {"id": 8, "file_name": "p1.png"}],
    "annotations": [
        {"image_id": 7, "caption": "first"},
        {"image_id": 8, "caption": "other"},
        {"image_id": 7, "caption": "second"},
    ],
}
KARPATHY = {
    "images": [
        {"filename": "p0.png", "sentences": [{"raw": "first"}, {"raw": "second"}]},
        {"filename": "p1.png", "sentences": [{"raw": "other"}]},
    ]
}
RECORDS = [
    {"image": "p0.png", "caption": ["first", "second"]},
    {"image": "p1.png", "caption": "other"},
]
CAPTION_FILES = {
    "coco.json": json.dumps(COCO),
    "karpathy.json": json.dumps(KARPATHY),
    "records.json": json.dumps(RECORDS),
    "mapping.json": json.dumps({"p0": ["first", "second"], "p1": "other"}),
    "records.jsonl": "\n".join(map(json.dumps, RECORDS)),
    "heading.csv": "file,caption\np0.png,first\np1.png,other\np0.png,second\n",
    "heading.tsv": "caption\timage\nfirst\tp0.png\nother\tp1.png\nsecond\tp0.png\n",
    "flickr.token.txt": "p0.png#0\tfirst\np0.png#1\tsecond\np1.png#0\tother\n",
}


@pytest.mark.parametrize("name", CAPTION_FILES)
def test_captions_in_one_file(tmp_path: Path, name: str) -> None:
    source = write_pictures(tmp_path / "in" / "deeper", 2).parent
    (tmp_path / name).write_text(CAPTION_FILES[name])
    samples = read(made(tmp_path, "folder", source, options={"captions": [tmp_path / name]}))
    assert samples["deeper/p0"][0] == {"caption": ["first", "second"], "width": 24, "height": 24}
    assert samples["deeper/p1"][0]["caption"] == "other"
    assert samples["deeper/p0"][2]["png"] == png(0)


def test_captions_and_questions_beside_the_picture(tmp_path: Path) -> None:
    source = write_pictures(tmp_path / "in", 2)
    record = {"caption": "from json", "qa": [{"q": "what?", "a": "red"}]}
    (source / "p0.json").write_text(json.dumps(record))
    (source / "p1.txt").write_text("one\n\ntwo\n")
    samples = read(made(tmp_path, "folder", source))
    assert samples["p0"][0] == {**record, "width": 24, "height": 24}
    assert samples["p1"][0]["caption"] == ["one", "two"]


def test_a_picture_without_a_text_is_named(tmp_path: Path) -> None:
    source = write_pictures(tmp_path / "in", 2)
    (source / "p1.txt").unlink()
    assert made(tmp_path / "a", "folder", source).named[0][0] == "p1"
    (tmp_path / "c.csv").write_text("image,caption\np0.png,first\n")
    written = made(tmp_path / "b", "folder", source, options={"captions": [tmp_path / "c.csv"]})
    assert written.named == [("p1", "the captions have no text for it")]


def test_a_text_without_a_picture_is_named(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text("image,caption\np0.png,first\nin/p1.png,second\nsub/p2.png,third\n")
    written = made(tmp_path, "folder", write_pictures(tmp_path / "in", 2), options={"captions": [tmp_path / "c.csv"]})
    assert written.samples == 2
    assert written.named == [("sub/p2", "the captions name it, and there is no such picture")]


def test_a_text_of_another_folder_is_not_taken(tmp_path: Path) -> None:
    for folder in ("a", "b", "c"):
        write_pictures(tmp_path / "in" / folder, 1)
    (tmp_path / "c.csv").write_text("image,caption\na/p0.png,in a\nin/b/p0.png,in b\n0.png,zero\n")
    written = made(tmp_path, "folder", tmp_path / "in", options={"captions": [tmp_path / "c.csv"]})
    assert {key: record["caption"] for key, (record, _, _) in read(written).items()} == {"a/p0": "in a"}
    (tmp_path / "d.csv").write_text("image,caption\nin/b/p0.png,in b\n")
    written = made(tmp_path / "again", "folder", tmp_path / "in", options={"captions": [tmp_path / "d.csv"]})
    assert {key: record["caption"] for key, (record, _, _) in read(written).items()} == {"b/p0": "in b"}


def test_several_files_of_captions(tmp_path: Path) -> None:
    (tmp_path / "one.csv").write_text("image,caption\np0.png,first\n")
    (tmp_path / "two.json").write_text('{"p0": "second", "p1": "other"}')
    files = [tmp_path / "one.csv", tmp_path / "two.json"]
    samples = read(made(tmp_path, "folder", write_pictures(tmp_path / "in", 2), options={"captions": files}))
    assert samples["p0"][0]["caption"] == ["first", "second"]
    (tmp_path / "two.json").write_text("{}")
    with pytest.raises(DataError, match=r"two\.json hold no text with a picture's name"):
        open_source("folder", [tmp_path / "in"], captions=files)


def test_hidden_files_are_passed_over(tmp_path: Path) -> None:
    source = write_pictures(tmp_path / "in", 1)
    write_pictures(source / ".thumbnails", 1)
    (source / "._p0.png").write_bytes(b"of another system")
    written = made(tmp_path, "folder", source)
    assert (written.samples, written.broken) == (1, 0)


def test_captions_that_were_cut_short(tmp_path: Path) -> None:
    text = json.dumps([{"image": "p0.png", "caption": "a red thing"}])
    for size in (0, 5, 20, len(text) - 1):
        (tmp_path / "c.json").write_text(text[:size])
        with pytest.raises(DataError, match="it ends early, after" if size else "it is empty"):
            open_source("folder", [write_pictures(tmp_path / "in", 1)], captions=[tmp_path / "c.json"])


@pytest.mark.parametrize("text", ["{", "[]", '{"annotations": [1]}', '[{"image": "p0.png"}, 3]'])
def test_captions_that_cannot_be_read(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(DataError, match=r"captions .*c\.json"):
        made(tmp_path, "folder", write_pictures(tmp_path / "in", 1), options={"captions": [tmp_path / "c.json"]})


# --- npz ---------------------------------------------------------------------------------------------------


def savez(path: Path, **arrays: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    np.savez(path, **arrays)


def test_npz_under_the_names_of_bottom_up_attention(tmp_path: Path) -> None:
    savez(tmp_path / "in" / "a.npz", **picture_arrays(1))
    (tmp_path / "in" / "a.png").write_bytes(png(1))
    (tmp_path / "in" / "a.txt").write_text("a red thing")
    (tmp_path / "names.txt").write_text("cat\ndog,hound\ncow\n")
    written = made(tmp_path, "npz", tmp_path / "in", options={"class_names": tmp_path / "names.txt"})
    record, regions, raw = read(written)["a"]
    same(regions, picture_arrays(1))
    assert record["caption"] == "a red thing"
    assert record["tags"] == [("cat", "dog", "cow")[n] for n in picture_arrays(1)["objects_id"]]
    assert raw["png"] == png(1)


def test_npz_under_near_names(tmp_path: Path) -> None:
    a = picture_arrays(1)
    size = {"image_w": WIDTH, "image_h": HEIGHT}
    normalised = a["boxes"] / np.array([WIDTH, HEIGHT, WIDTH, HEIGHT], dtype=np.float32)
    rest = {name: a[name] for name in ("objects_id", "objects_conf", "attrs_id", "attrs_conf")}
    info = np.array([{"pickled": True}], dtype=object)
    savez(tmp_path / "in" / "port.npz", x=a["features"], bbox=a["boxes"], num_bbox=REGIONS, info=info, **size, **rest)
    savez(tmp_path / "in" / "turned.npz", x=a["features"].T, bbox=a["boxes"], **size, **rest)
    savez(tmp_path / "in" / "padded.npz", x=np.pad(a["features"], ((0, 3), (0, 0))), num_boxes=REGIONS,
          bbox=np.pad(a["boxes"], ((0, 3), (0, 0))), **size, **rest)  # fmt: skip
    savez(tmp_path / "in" / "uniter.npz", features=a["features"], norm_bb=normalised, **size, **rest)
    samples = read(made(tmp_path, "npz", tmp_path / "in"))
    assert sorted(samples) == ["padded", "port", "turned", "uniter"]
    for _, regions, _ in samples.values():
        same(regions, a)


def test_soft_labels_name_tags_past_the_background(tmp_path: Path) -> None:
    a = picture_arrays(1)
    probs = np.full((REGIONS, 4), 0.1, dtype=np.float32)
    probs[:, 0], probs[:, 2] = 0.6, 0.2  # the background is likeliest, then the second class
    savez(tmp_path / "in" / "a.npz", features=a["features"], norm_bb=a["boxes"] / 64, soft_labels=probs)
    (tmp_path / "names.txt").write_text("cat\ndog\ncow\n")
    written = made(tmp_path, "npz", tmp_path / "in", options={"class_names": tmp_path / "names.txt"})
    record, regions, _ = read(written)["a"]
    assert record["tags"] == ["dog"] * REGIONS
    assert regions is not None
    np.testing.assert_allclose(regions.class_probs, probs, atol=1e-3)
    np.testing.assert_allclose(regions.boxes / regions.width, a["boxes"] / 64, atol=1e-6)


def test_npz_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    a = picture_arrays(1)
    objects = np.array([{"a": 1}] * REGIONS, dtype=object)
    savez(tmp_path / "in" / "a_good.npz", **a)
    savez(tmp_path / "in" / "b_sizeless.npz", features=a["features"], boxes=a["boxes"])
    savez(tmp_path / "in" / "c_boxless.npz", features=a["features"], img_w=9, img_h=9)
    savez(tmp_path / "in" / "d_pickled.npz", **{**a, "features": objects})
    savez(tmp_path / "in" / "e_outside.npz", **{**a, "boxes": a["boxes"] * 9})
    (tmp_path / "in" / "f_cut.npz").write_bytes(b"PK")
    written = made(tmp_path, "npz", tmp_path / "in")
    reasons = dict(written.named)
    assert (written.samples, written.broken) == (1, 5)
    assert "does not tell the picture's size" in reasons["b_sizeless"]
    assert "it has no boxes (one of boxes, bbox" in reasons["c_boxless"]
    assert reasons["d_pickled"] == "it holds pickled objects, which are never loaded"
    assert "outside the picture of 64 x 48" in reasons["e_outside"]
    assert reasons["f_cut"] == "it is no npz"


def test_real_npz_of_bottom_up_attention(tmp_path: Path) -> None:
    shards = Shards(str(shared() / "research_only" / "butd_regions" / "*.tar"))
    (tmp_path / "in").mkdir()
    for i in range(len(shards)):
        (tmp_path / "in" / f"{shards.key(i)}.npz").write_bytes(shards.read(i)["npz"])
    samples = read(made(tmp_path, "npz", tmp_path / "in", dtype="float32"))
    assert len(samples) == len(shards) == 8
    for i in range(len(shards)):
        with np.load(BytesIO(shards.read(i)["npz"])) as theirs:
            regions = samples[shards.key(i)][1]
            assert regions is not None
            np.testing.assert_array_equal(regions.features, theirs["features"])
            np.testing.assert_array_equal(regions.boxes, theirs["boxes"])
            np.testing.assert_array_equal(regions.attributes, theirs["attrs_id"])


# --- lxmert_tsv --------------------------------------------------------------------------------------------

LXMERT = ("img_h", "img_w", "objects_id", "objects_conf", "attrs_id", "attrs_conf", "num_boxes", "boxes", "features")


def cell(value: Any) -> str:
    return str(value) if isinstance(value, int) else base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()


def tsv_line(name: str, number: int, columns: tuple[str, ...] = LXMERT) -> str:
    arrays = {**picture_arrays(number), "num_boxes": REGIONS}
    return "\t".join([name, *(cell(arrays[column]) for column in columns)]) + "\n"


def test_lxmert_tsv_with_its_texts(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text(tsv_line("COCO_train2014_000000000042", 1) + tsv_line("COCO_train2014_43", 2))
    texts = [
        {
            "img_id": "COCO_train2014_000000000042",
            "sentf": {"mscoco": ["a cat", "a dog"], "vqa": ["what is it?", "why?"]},
            "labelf": {"vqa": [{"cat": 0.3, "dog": 1}, {}]},
        },
        {"img_id": "COCO_train2014_43", "sentf": {"mscoco": ["a cow"]}, "labelf": {}},
    ]
    (tmp_path / "t.json").write_text(json.dumps(texts))
    samples = read(made(tmp_path, "lxmert_tsv", tmp_path / "a.tsv", options={"captions": [tmp_path / "t.json"]}))
    record, regions, _ = samples["COCO_train2014_000000000042"]
    same(regions, picture_arrays(1))
    same(samples["COCO_train2014_43"][1], picture_arrays(2))
    assert record["caption"] == ["a cat", "a dog"]
    assert record["qa"] == [{"q": "what is it?", "a": "dog"}]
    assert samples["COCO_train2014_43"][0] == {"caption": "a cow", "width": WIDTH, "height": HEIGHT}


def test_captions_are_found_by_cocos_number(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text(tsv_line("COCO_train2014_000000000042", 1))
    (tmp_path / "c.json").write_text(json.dumps({"annotations": [{"image_id": 42, "caption": "a cat"}]}))
    samples = read(made(tmp_path, "lxmert_tsv", tmp_path, options={"captions": [tmp_path / "c.json"]}))
    assert samples["COCO_train2014_000000000042"][0]["caption"] == "a cat"


def test_the_tsv_of_six_columns(tmp_path: Path) -> None:
    columns = ("img_w", "img_h", "num_boxes", "boxes", "features")
    (tmp_path / "a.tsv").write_text(tsv_line("1", 1, columns))
    regions = read(made(tmp_path, "lxmert_tsv", tmp_path / "a.tsv"))["1"][1]
    assert regions is not None
    assert (regions.width, regions.height, regions.classes) == (WIDTH, HEIGHT, None)
    np.testing.assert_allclose(regions.boxes, picture_arrays(1)["boxes"])


def test_lines_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    good = tsv_line("good", 1)
    lines = [
        good,
        good.replace("good", "short").rsplit("\t", 1)[0] + "\n",
        good.replace("good", "cut").rstrip()[:-5] + "\n",
        good.replace("good\t48", "high\ttall"),
        good.replace(f"\t{REGIONS}\t", f"\t{REGIONS + 1}\t").replace("good", "many"),
    ]
    (tmp_path / "a.tsv").write_text("".join(lines))
    written = made(tmp_path, "lxmert_tsv", tmp_path / "a.tsv")
    reasons = dict(written.named)
    assert (written.samples, written.broken) == (1, 4)
    assert "has 9 columns; it should have 10 or 6" in reasons["short"]
    assert "features cannot be read as base64" in reasons["cut"]
    assert "its img_h is b'tall'" in reasons["high"]
    assert "not right for 5 boxes" in reasons["many"]


# --- mistakes ----------------------------------------------------------------------------------------------


def test_a_wrong_format_or_path(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no format 'lxmert'; did you mean 'lxmert_tsv'"):
        open_source("lxmert", [tmp_path])
    (tmp_path / "train.tsv").touch()
    with pytest.raises(DataError, match=r"there is no .*trian.tsv'; did you mean 'train.tsv'"):
        open_source("lxmert_tsv", [tmp_path / "trian.tsv"])
    for name in ("folder", "npz"):
        with pytest.raises(DataError, match=r"holds no (picture|npz file)"):
            open_source(name, [tmp_path])
