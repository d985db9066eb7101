"""`shards.py make` from annotation files: each text, box and answer goes with its own picture."""

from __future__ import annotations

import gzip
import hashlib
import json
import pickle
import zlib
from pathlib import Path
from typing import Any

import pytest

from tests.shard_files import png, shared
from tests.test_formats import made, read
from vlscale.data.formats import FORMATS, open_source, recognise
from vlscale.data.making.write import Written
from vlscale.data.samples import sentences, tags
from vlscale.data.shards import Shards
from vlscale.errors import ConfigError, DataError

SIDE = 24  # of the drawn pictures


def draw(folder: Path, *names: str) -> Path:
    """Pictures that differ; the first is picture 0."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(number, SIDE))
    return folder


def write(path: Path, data: object) -> Path:
    """As JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))
    return path


def write_lines(path: Path, *lines: object) -> Path:
    """Of text, or of JSON."""
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def records(written: Written) -> dict[str, dict[str, Any]]:
    """{key: json} without the picture's size."""
    return {
        key: {name: value for name, value in record.items() if name not in ("width", "height")}
        for key, (record, _, _) in read(written).items()
    }


# --- albef_json --------------------------------------------------------------------------------------------


def test_albef_json_brings_the_captions_of_a_picture_together(tmp_path: Path) -> None:
    images = draw(tmp_path / "images", "coco/a.jpg", "vg/b.jpg")
    one = write(tmp_path / "coco.json", [{"image": "coco/a.jpg", "caption": "first", "image_id": 7}])
    two = write(
        tmp_path / "vg.json",
        [
            {"image": "vg/b.jpg", "caption": ["other", "last "]},
            {"image": "coco/a.jpg", "caption": "second"},
        ],
    )
    written = made(tmp_path, "albef_json", one, two, options={"images": images})
    assert records(written) == {
        "coco/a": {"caption": ["first", "second"], "image_id": 7},
        "vg/b": {"caption": ["other", "last"]},
    }
    record, _, members = read(written)["coco/a"]
    assert (record["width"], record["height"]) == (SIDE, SIDE)
    assert members["png"] == png(0, SIDE)  # whatever its file is called
    shards = Shards(written.shards)
    assert [each.text for each in sentences(shards, 0)] == ["first", "second"]


def test_albef_json_of_the_authors_folders(tmp_path: Path) -> None:
    images = draw(tmp_path / "images", "val2014/a.jpg")
    entries = [{"image": f"/export/share/coco/val2014/{name}.jpg", "caption": name} for name in ("gone", "a")]
    entries.append({"image": "/export/share/other/a.jpg", "caption": "of another folder"})
    written = made(tmp_path, "albef_json", write(tmp_path / "x.json", entries), options={"images": images})
    assert records(written) == {"val2014/a": {"caption": "a"}}
    assert [key for key, _ in written.named] == ["val2014/gone", "export/share/other/a"]


def test_albef_json_names_what_is_broken(tmp_path: Path) -> None:
    draw(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "html.jpg").write_text("<html>")
    file = write(
        tmp_path / "x.json",
        [
            {"image": "a.jpg", "caption": "sound"},
            {"url": "http://x.org/1.jpg", "caption": "BLIP's"},
            {"image": "gone.jpg", "caption": "no file"},
            {"image": "html.jpg", "caption": "no picture"},
            {"image": "b.jpg", "caption": " "},
            {"image": "b.jpg", "caption": []},
            {"image": "b.jpg", "caption": 3},
            {"image": "b.jpg"},
            "b.jpg",
        ],
    )
    written = made(tmp_path, "albef_json", file)
    assert list(read(written)) == ["a"]
    assert (written.samples, written.broken) == (1, 8)
    assert dict(written.named) == {
        "gone": f"its picture gone.jpg is not in {tmp_path}",
        "html": "it is not a JPEG, PNG or WebP picture",
        "x/1": "it has a url and no 'image': fetch it first, for example with img2dataset",
        "x/4": "its caption is empty",
        "x/5": "its list of captions is empty",
        "x/6": "its caption is a int; it should be a text",
        "x/7": "it has no 'caption'",
        "x/8": "it is a str; it should be an object",
    }


def test_json_lines_with_one_that_is_cut(tmp_path: Path) -> None:
    draw(tmp_path, "a.jpg")
    lines = write_lines(tmp_path / "x.jsonl", {"image": "a.jpg", "caption": "a dog\u2028barks"}, '{"image": "b')
    written = made(tmp_path, "albef_json", lines)
    assert records(written) == {"a": {"caption": "a dog\u2028barks"}}
    assert written.named[0][0] == "x/1"
    assert "its line is no JSON" in written.named[0][1]


def test_real_flickr8k_lines(tmp_path: Path) -> None:
    packed = shared() / "research_only" / "text_only" / "flickr8k_captions.jsonl.gz"
    told = [json.loads(line) for line in gzip.decompress(packed.read_bytes()).splitlines()]
    lines = write_lines(tmp_path / "flickr8k.jsonl", *told)
    draw(tmp_path, *(each["image"] for each in told[::100]))
    written = made(tmp_path, "albef_json", lines)
    assert {key: record["caption"] for key, record in records(written).items()} == {
        each["image"].removesuffix(".jpg"): [caption.strip() for caption in each["caption"]] for each in told[::100]
    }
    assert (written.samples, written.broken) == (78, 7712)


# --- coco --------------------------------------------------------------------------------------------------

IMAGES = [
    {"id": 42, "file_name": "COCO_val2014_000000000042.jpg", "width": 48, "height": 12},
    {"id": 43, "file_name": "COCO_val2014_000000000043.jpg", "width": SIDE, "height": SIDE},
]
CAPTIONS = {
    "images": IMAGES,
    "annotations": [
        {"id": 901, "image_id": 42, "caption": "first"},
        {"id": 902, "image_id": 43, "caption": "other"},
        {"id": 903, "image_id": 42, "caption": "second"},
        {"id": 904, "image_id": 44, "caption": "of no picture"},
    ],
}
INSTANCES = {
    "images": IMAGES,
    "categories": [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}],
    "annotations": [
        {"id": 1, "image_id": 43, "category_id": 18, "bbox": [1.5, 2, 10, 20.25], "iscrowd": 0},
        {"id": 2, "image_id": 42, "category_id": 1, "bbox": [8, 2, 40, 10], "iscrowd": 1},
        {"id": 3, "image_id": 43, "category_id": 99, "bbox": [0, 0, 1, 1]},
        {"id": 4, "image_id": 43, "category_id": 1, "bbox": [0, 0, 1]},
    ],
}


@pytest.mark.parametrize("layout", ["val2014/COCO_val2014_{}", "COCO_val2014_{}", "train2017/{}", "{}"])
def test_coco_captions_and_boxes_of_a_picture(tmp_path: Path, layout: str) -> None:
    images = draw(tmp_path / "images", *(layout.format(f"{number:012d}.jpg") for number in (42, 43)))
    files = [write(tmp_path / "captions_x.json", CAPTIONS), write(tmp_path / "instances_x.json", INSTANCES)]
    written = made(tmp_path, "coco", *files, options={"images": images})
    assert records(written) == {
        "COCO_val2014_000000000042": {
            "image_id": 42,
            "caption": ["first", "second"],
            "caption_ids": [901, 903],
            # the picture was made half as wide and twice as high after it had been annotated
            "objects": [{"name": "person", "box": [4, 4, 24, 24], "crowd": True}],
        },
        "COCO_val2014_000000000043": {
            "image_id": 43,
            "caption": "other",
            "caption_ids": [902],
            "objects": [{"name": "dog", "box": [1.5, 2, 11.5, 22.25]}],
        },
    }
    assert tags(Shards(written.shards), 1) == "dog"
    assert dict(written.named) == {
        "captions_x/3": "its picture 44 is not among the file's images",
        "instances_x/2": "its category 99 is not among the file's categories",
        "instances_x/3": "its bbox is [0, 0, 1]; it should be four numbers, x y width height",
    }


def test_coco_of_2017_in_the_folder_of_its_split(tmp_path: Path) -> None:
    draw(tmp_path, "val2017/000000000042.jpg")
    data = {"images": [{"id": 42, "file_name": "000000000042.jpg"}], "annotations": CAPTIONS["annotations"][:1]}
    written = made(tmp_path, "coco", write(tmp_path / "captions_val2017.json", data), options={"images": tmp_path})
    assert records(written)["000000000042"]["caption"] == "first"


def test_lvis_tells_its_pictures_by_url(tmp_path: Path) -> None:
    draw(tmp_path, "train2017/000000000042.jpg")
    image = {"id": 42, "coco_url": "http://images.cocodataset.org/train2017/000000000042.jpg"}
    found = {"image_id": 42, "category_id": 1, "bbox": [1, 2, 3, 4]}
    data = {"images": [image], "categories": [{"id": 1, "name": "cup"}], "annotations": [found]}
    written = made(tmp_path, "coco", write(tmp_path / "lvis_v1_val.json", data))
    assert records(written)["000000000042"]["objects"] == [{"name": "cup", "box": [1, 2, 4, 6]}]


def test_real_coco_captions_with_their_pictures(tmp_path: Path) -> None:
    """COCO's val2017 captions, in its own form, find the pictures of shards that hold the same captions."""
    told = gzip.decompress((shared() / "open" / "text_only" / "coco_captions_val2017.jsonl.gz").read_bytes())
    lines = [json.loads(line) for line in told.splitlines()]
    data = {
        "images": [{"id": each["image_id"], "file_name": f"{each['image_id']:012d}.jpg"} for each in lines],
        "annotations": [{"image_id": each["image_id"], "caption": c} for each in lines for c in each["caption"]],
    }
    told_of = {each["image_id"] for each in lines}
    shards, wanted = Shards(sorted((shared() / "open" / "coco_by").glob("*.tar"))), {}
    (tmp_path / "val2017").mkdir()
    for i in range(len(shards)):
        raw = shards.read(i)
        record = json.loads(raw["json"])
        if record["coco_id"] in told_of:
            (tmp_path / "val2017" / f"{record['coco_id']:012d}.jpg").write_bytes(raw["jpg"])
            wanted[f"{record['coco_id']:012d}"] = {caption.strip() for caption in record["caption"]}
    written = made(tmp_path, "coco", write(tmp_path / "captions_val2017.json", data))
    assert len(wanted) > 50
    assert {key: set(record["caption"]) for key, record in records(written).items()} == wanted


# --- karpathy ----------------------------------------------------------------------------------------------


def karpathy(number: int, split: str) -> dict[str, Any]:
    said = [{"raw": f"caption {number}{letter} .", "sentid": 10 * number + n} for n, letter in enumerate("ab")]
    name = f"COCO_val2014_{number:012d}.jpg"
    place = {"filepath": "val2014", "filename": name, "cocoid": number}
    return {**place, "sentids": [each["sentid"] for each in said], "imgid": 0, "split": split, "sentences": said}


def test_karpathys_splits(tmp_path: Path) -> None:
    data = {"images": [karpathy(1, "train"), karpathy(2, "restval"), karpathy(3, "test")], "dataset": "coco"}
    file = write(tmp_path / "dataset_coco.json", data)
    draw(tmp_path, *(f"val2014/COCO_val2014_{number:012d}.jpg" for number in (1, 2, 3)))
    everything = made(tmp_path / "all", "karpathy", file)
    assert [each["split"] for each in records(everything).values()] == ["train", "restval", "test"]
    some = made(tmp_path / "some", "karpathy", file, options={"split": ["train", "restval"]})
    assert records(some) == {
        f"COCO_val2014_{number:012d}": {
            "caption": [f"caption {number}a .", f"caption {number}b ."],
            "caption_ids": [10 * number, 10 * number + 1],
            "image_id": number,
            "split": split,
        }
        for number, split in ((1, "train"), (2, "restval"))
    }
    with pytest.raises(DataError, match=r"dataset_coco\.json is of split 'vall'; there is restval, test, train"):
        made(tmp_path, "karpathy", file, options={"split": ["vall"]})
    with pytest.raises(ConfigError, match="--split is not read by coco, only by karpathy, flickr30k, refcoco"):
        made(tmp_path, "coco", file, options={"split": ["val"]})


# --- flickr30k ---------------------------------------------------------------------------------------------

FLICKR = {
    "results_20130124.token": 'a.jpg#0\tTwo "dogs" , running .\na.jpg#1\tDogs .\nb.jpg#0\tA cat .\n',
    "results.csv": 'image_name| comment_number| comment\na.jpg| 0| Two "dogs" , running .\na.jpg| 1| Dogs .\n'
    "b.jpg| 0| A cat .\n",
    "captions.txt": 'image,caption\na.jpg,"Two ""dogs"" , running ."\na.jpg,Dogs .\nb.jpg,A cat .\n',
    "flickr_annotations_30k.csv": "raw,sentids,split,filename,img_id\n"
    '"[""Two \\""dogs\\"" , running ."", ""Dogs .""]","[0, 1]",train,a.jpg,0\n"[""A cat .""]",[5],val,b.jpg,1\n',
}


@pytest.mark.parametrize("name", FLICKR)
def test_flickr_captions(tmp_path: Path, name: str) -> None:
    images = draw(tmp_path / "flickr30k-images", "a.jpg", "b.jpg")
    (tmp_path / name).write_text(FLICKR[name])
    samples = records(made(tmp_path, "flickr30k", tmp_path / name, options={"images": images}))
    assert {key: record["caption"] for key, record in samples.items()} == {
        "a": ['Two "dogs" , running .', "Dogs ."],
        "b": "A cat .",
    }
    if "annotations" in name:
        assert samples["a"]["caption_ids"] == [0, 1]
        options = {"images": images, "split": ["val"]}
        assert list(records(made(tmp_path / "val", "flickr30k", tmp_path / name, options=options))) == ["b"]


def test_the_line_of_results_csv_that_lacks_a_bar(tmp_path: Path) -> None:
    draw(tmp_path, "a.jpg")
    lines = ("image_name| comment_number| comment", "a.jpg| 3| A dog .", "a.jpg| 4   A dog runs .")
    written = made(tmp_path, "flickr30k", write_lines(tmp_path / "results.csv", *lines))
    assert (written.samples, written.named) == (1, [("results/1", "it has no 'caption'")])


# --- cc_tsv and img2dataset --------------------------------------------------------------------------------

URLS = [f"http://x.org/{number}.jpg?q=1" for number in range(4)]
NAMINGS = {
    "VL-BERT": lambda row: f"{row:08d}.jpg",
    "ViLBERT": lambda row: f"training/{row}_{zlib.crc32(URLS[row].encode())}",
    "crc32": lambda row: f"{zlib.crc32(URLS[row].encode())}.jpg",
    "md5": lambda row: f"{hashlib.md5(URLS[row].encode()).hexdigest()}.png",
    "sha256": lambda row: f"0/{hashlib.sha256(URLS[row].encode()).hexdigest()}",
}


@pytest.mark.parametrize("naming", NAMINGS)
def test_cc_rows_with_what_was_fetched(tmp_path: Path, naming: str) -> None:
    images = draw(tmp_path / "images", *(NAMINGS[naming](row) for row in (0, 2, 3)))
    (images / "00000001.json").write_text("{}")  # no picture
    tsv = write_lines(tmp_path / "Train_GCC-training.tsv", *(f"caption {row}\t{url}" for row, url in enumerate(URLS)))
    written = made(tmp_path, "cc_tsv", tsv, options={"images": images})
    samples = read(written)
    assert {key: (record["caption"], record["url"]) for key, (record, _, _) in samples.items()} == {
        f"{row:08d}": (f"caption {row}", URLS[row]) for row in (0, 2, 3)
    }
    assert samples["00000002"][2]["png"] == png(1, SIDE)
    assert written.named == [("00000001", f"its picture is not in {images}")]


@pytest.mark.parametrize("heading", [(), ("url\tcaption",)])
def test_cc12m_has_the_url_first(tmp_path: Path, heading: tuple[str, ...]) -> None:
    images = draw(tmp_path / "images", "0.jpg", "1.jpg")
    rows = (f"{URLS[0]}\tcaption 0", f"{URLS[1]}\tcaption 1", "no url\t")
    written = made(tmp_path, "cc_tsv", write_lines(tmp_path / "cc12m.tsv", *heading, *rows), options={"images": images})
    assert [each["caption"] for each in records(written).values()] == ["caption 0", "caption 1"]
    assert written.named == [("00000002", "its line is not a caption and a url")]


def test_pictures_that_may_be_of_another_row_are_refused(tmp_path: Path) -> None:
    tsv = write_lines(tmp_path / "cc.tsv", *(f"caption {row}\t{url}" for row, url in enumerate(URLS)))
    from_one = draw(tmp_path / "one", "1.jpg", "2.jpg", "3.jpg", "4.jpg")
    with pytest.raises(DataError, match=r"holds 4\.jpg, but the rows of .* end at 3: number from 0"):
        made(tmp_path / "a", "cc_tsv", tsv, options={"images": from_one})
    twice = draw(tmp_path / "twice", "x/1.jpg", "y/001.png")
    with pytest.raises(DataError, match=r"holds .*1\.\w+ and .*1\.\w+, which are of one row"):
        made(tmp_path / "b", "cc_tsv", tsv, options={"images": twice})
    with pytest.raises(ConfigError, match="write --images with the folder of the fetched pictures"):
        made(tmp_path / "c", "cc_tsv", tsv)


def test_img2dataset_files(tmp_path: Path) -> None:
    source = draw(tmp_path / "in", "00000/000000000.jpg", "00000/000000003.jpg", "00000/000000004.jpg")
    (tmp_path / "in" / "00000.parquet").write_bytes(b"PAR1")
    write(source / "00000_stats.json", {"count": 5, "successes": 3})
    downloaded = {"caption": "told", "url": URLS[0], "key": "000000000", "status": "success", "error_message": None}
    sizes = {"width": 9, "height": 9, "original_width": 90, "original_height": 80, "exif": "{}", "sha256": "00ff"}
    write(source / "00000" / "000000000.json", {**downloaded, **sizes})
    write(source / "00000" / "000000003.json", {"caption": None, "url": URLS[3]})
    (source / "00000" / "000000003.txt").write_text("from the txt")
    written = made(tmp_path, "img2dataset", source)
    assert records(written) == {
        "00000/000000000": {
            "caption": "told", "url": URLS[0], "original_width": 90, "original_height": 80, "sha256": "00ff",
        },
        "00000/000000003": {"caption": "from the txt", "url": URLS[3]},
    }  # fmt: skip
    assert read(written)["00000/000000000"][0]["width"] == SIDE
    assert written.named == [("00000/000000004", "it has no caption in a json or txt beside it")]


@pytest.mark.parametrize(
    ("name", "said"), [("00000.tar", "holds shards already"), ("00000.parquet", "write output_format=webdataset")]
)
def test_img2dataset_in_another_form(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(DataError, match=said):
        open_source("img2dataset", [tmp_path])


# --- vqa, gqa ----------------------------------------------------------------------------------------------


def test_vqa_questions_with_their_answers(tmp_path: Path) -> None:
    asked = [
        {"image_id": 42, "question": "What is it?", "question_id": 420},
        {"image_id": 42, "question": "Is it red?", "question_id": 421},
        {"image_id": 43, "question": "Why?", "question_id": 430},
    ]
    ten = ["dog"] * 4 + ["cat"] * 3 + ["cow"] * 2 + ["pig"]
    told = [
        {
            "question_id": 420, "image_id": 42, "multiple_choice_answer": "dog", "answer_type": "other",
            "question_type": "what is", "answers": [{"answer": each, "answer_id": n} for n, each in enumerate(ten)],
        },
        {"question_id": 421, "image_id": 42, "multiple_choice_answer": "yes"},
    ]  # fmt: skip
    questions = write(tmp_path / "q.json", {"questions": asked, "data_subtype": "val2014"})
    annotations = write(tmp_path / "a.json", {"annotations": told, "data_subtype": "val2014"})
    draw(tmp_path / "images", "val2014/COCO_val2014_000000000042.jpg")
    written = made(tmp_path, "vqa", annotations, questions, options={"images": tmp_path / "images"})
    first = {
        "q": "What is it?", "a": "dog", "answers": ten, "scores": {"dog": 1.0, "cat": 0.9, "cow": 0.6, "pig": 0.3},
        "id": 420, "question_type": "what is", "answer_type": "other",
    }  # fmt: skip
    assert records(written) == {
        "COCO_val2014_000000000042": {"image_id": 42, "qa": [first, {"q": "Is it red?", "a": "yes", "id": 421}]}
    }
    assert written.named == [("q/2", "its question 430 has no annotation")]
    assert [tuple(each) for each in sentences(Shards(written.shards), 0, questions=True)] == [
        ("What is it?", "dog"),
        ("Is it red?", "yes"),
    ]
    for alone, missing in ((questions, "questions without answers"), (annotations, "answers without questions")):
        with pytest.raises(DataError, match=missing):
            open_source("vqa", [alone])


def test_a_score_is_the_published_accuracy() -> None:
    """min(1, n / 3), averaged over the ten ways to leave one of ten people out."""
    from vlscale.data.formats.vqa import scores

    for said in range(1, 11):
        people = ["yes"] * said + ["no"] * (10 - said)
        left = [people[:n] + people[n + 1 :] for n in range(10)]
        wanted = sum(min(1, each.count("yes") / 3) for each in left) / 10
        assert scores(people)["yes"] == pytest.approx(wanted)


def test_albefs_form_of_vqa(tmp_path: Path) -> None:
    draw(tmp_path, "vg/1.jpg")
    data = [
        {"image": "vg/1.jpg", "question": "What?", "answer": ["a cup"], "question_id": 5, "dataset": "vg"},
        {"image": "vg/1.jpg", "question": "Who?", "answer": []},
    ]
    written = made(tmp_path, "vqa", write(tmp_path / "vqa_train.json", data))
    assert records(written) == {"vg/1": {"qa": [{"q": "What?", "a": "a cup", "id": 5}]}}
    assert written.named == [("vqa_train/1", "it has no answer")]


def test_gqa(tmp_path: Path) -> None:
    draw(tmp_path, "images/n161313.jpg")
    data = {
        "201": {"imageId": "n161313", "question": "Is it?", "answer": "yes", "fullAnswer": "Yes, it is."},
        "202": {"imageId": "n161313", "question": "Of the test set?"},
    }
    written = made(tmp_path, "gqa", write(tmp_path / "testdev_balanced_questions.json", data))
    pair = {"q": "Is it?", "a": "yes", "id": "201", "full_answer": "Yes, it is."}
    assert records(written) == {"n161313": {"image_id": "n161313", "qa": [pair]}}
    assert written.named == [("testdev_balanced_questions/1", "it has no 'answer'")]


# --- nlvr2 -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["", "dev/", "images/dev/", "images/dev/12/"])
def test_nlvr2_has_two_pictures(tmp_path: Path, folder: str) -> None:
    draw(tmp_path, f"{folder}dev-896-0-img0.png", f"{folder}dev-896-0-img1.png")
    line = {"sentence": "There are six.", "label": "False", "identifier": "dev-896-0-1", "directory": 12}
    lines = [{**line, "left_url": "", "right_url": ""}, {**line, "label": "maybe"}, line]
    written = made(tmp_path, "nlvr2", write_lines(tmp_path / "dev.json", *lines))
    record, _, members = read(written)["dev-896-0-1"]
    assert record == {"sentence": "There are six.", "label": False, "identifier": "dev-896-0-1"}
    assert (members["0.png"], members["1.png"]) == (png(0, SIDE), png(1, SIDE))
    assert [reason for _, reason in written.named] == [
        "its label is 'maybe'; it should be True or False",
        "its identifier is 'dev-896-0-1', as another's",
    ]


def test_albefs_form_of_nlvr2(tmp_path: Path) -> None:
    draw(tmp_path, "dev/l.png", "dev/r.png")
    data = [{"images": ["dev/l.png", "dev/r.png"], "sentence": "Two.", "label": "True"}]
    written = made(tmp_path, "nlvr2", write(tmp_path / "nlvr_dev.json", data))
    assert records(written) == {"nlvr_dev/0": {"sentence": "Two.", "label": True}}


def test_real_nlvr2_lines(tmp_path: Path) -> None:
    lines = gzip.decompress((shared() / "open" / "text_only" / "nlvr2_balanced_dev.jsonl.gz").read_bytes())
    (tmp_path / "dev.json").write_bytes(lines)
    told = [json.loads(line) for line in lines.splitlines()]
    pairs = {each["identifier"].rsplit("-", 1)[0] for each in told[:40]}
    draw(tmp_path, *(f"{pair}-img{n}.png" for pair in sorted(pairs) for n in (0, 1)))
    written = made(tmp_path, "nlvr2", tmp_path / "dev.json")
    wanted = {
        each["identifier"]: (each["sentence"].strip(), each["label"] == "True")
        for each in told
        if each["identifier"].rsplit("-", 1)[0] in pairs
    }
    assert {key: (each["sentence"], each["label"]) for key, each in records(written).items()} == wanted
    assert written.samples + written.broken == 2300


# --- refcoco, snli_ve --------------------------------------------------------------------------------------

REFS = [
    {
        "ref_id": 7, "ann_id": 1, "image_id": 43, "split": "testA", "category_id": 18,
        "sentences": [{"sent": "the dog", "raw": "The Dog", "sent_id": 70}, {"sent": "left one", "sent_id": 71}],
    },
    {"ref_id": 8, "ann_id": 2, "image_id": 42, "split": "train", "sentences": [{"sent": "crowd", "sent_id": 80}]},
    {"ref_id": 9, "ann_id": 99, "image_id": 42, "split": "train", "sentences": [{"sent": "gone", "sent_id": 90}]},
]  # fmt: skip


def test_refcoco_expressions_have_boxes(tmp_path: Path) -> None:
    draw(tmp_path, *(f"train2014/COCO_val2014_{number:012d}.jpg" for number in (42, 43)))
    instances = {**INSTANCES, "annotations": INSTANCES["annotations"][:2]}
    files = [write(tmp_path / "refs.json", REFS), write(tmp_path / "instances.json", instances)]
    images = {"images": tmp_path / "train2014"}
    box = [1.5, 2, 11.5, 22.25]
    test = made(tmp_path / "test", "refcoco", *files, options={**images, "split": ["testA"]})
    assert records(test) == {
        "COCO_val2014_000000000043": {
            "image_id": 43,
            "objects": [{"name": "dog", "box": box}],
            "expressions": [
                {"text": "the dog", "name": "dog", "box": box, "id": 70, "ref_id": 7, "split": "testA"},
                {"text": "left one", "name": "dog", "box": box, "id": 71, "ref_id": 7, "split": "testA"},
            ],
        }
    }
    everything = made(tmp_path / "all", "refcoco", *files, options=images)
    scaled = records(everything)["COCO_val2014_000000000042"]
    assert scaled["expressions"][0]["box"] == scaled["objects"][0]["box"] == [4, 4, 24, 24]
    assert everything.named == [("refs/2", "its annotation 99 is not among the instances")]
    with pytest.raises(DataError, match=r"there is no instances\.json in .*refs\.json; give both"):
        open_source("refcoco", files[:1])


@pytest.mark.parametrize("name", FORMATS[:12])
def test_a_pickle_is_never_loaded(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    class Loud:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return print, ("it ran",)

    (tmp_path / "refs.p").write_bytes(pickle.dumps(Loud()))
    with pytest.raises(DataError, match="pickle" if name not in ("cc_tsv", "flickr30k", "img2dataset") else "holds no"):
        open_source(name, [tmp_path / "refs.p"])
    assert capsys.readouterr().out == ""


def test_snli_ve(tmp_path: Path) -> None:
    draw(tmp_path, "flickr30k-images/4705552913.jpg")
    line = {"Flickr30K_ID": "4705552913", "pairID": "47#1", "gold_label": "neutral", "sentence2": "A man eats."}
    lines = [line, {**line, "gold_label": "entailment", "Flickr30K_ID": "4705552913.jpg"}, {**line, "gold_label": "-"}]
    written = made(tmp_path, "snli_ve", write_lines(tmp_path / "snli_ve_dev.jsonl", *lines))
    said = [{"text": "A man eats.", "label": label, "id": "47#1"} for label in ("neutral", "entailment")]
    assert records(written) == {"4705552913": {"hypotheses": said}}
    assert written.named == [
        ("snli_ve_dev/2", "its label is '-'; it should be entailment, neutral or contradiction"),
    ]
    albef = [{"image": "4705552913", "sentence": "A man eats.", "label": "neutral"}]
    again = made(tmp_path / "again", "snli_ve", write(tmp_path / "ve_dev.json", albef))
    assert records(again) == {"4705552913": {"hypotheses": [{"text": "A man eats.", "label": "neutral"}]}}


# --- mistakes ----------------------------------------------------------------------------------------------

FILES: dict[str, object] = {
    "albef_json": [{"image": "a.jpg", "caption": "x"}],
    "coco": CAPTIONS,
    "karpathy": {"images": [karpathy(1, "train")]},
    "flickr30k": FLICKR["results_20130124.token"],
    "cc_tsv": f"caption\t{URLS[0]}\n",
    "vqa": {"questions": [{"image_id": 1, "question": "?", "question_id": 2}]},
    "gqa": {"1": {"imageId": "2", "question": "?", "answer": "yes"}},
    "nlvr2": [{"sentence": "x", "left_url": "", "label": "True", "identifier": "dev-1-0-0"}],
    "refcoco": REFS,
    "snli_ve": [{"Flickr30K_ID": "1", "sentence2": "x", "gold_label": "neutral"}],
}
ENDS = {"flickr30k": ".token", "cc_tsv": ".tsv"}


@pytest.mark.parametrize("held", FILES)
def test_a_file_of_another_format_is_told(tmp_path: Path, held: str) -> None:
    data = FILES[held]
    path = tmp_path / f"x{ENDS.get(held, '.json')}"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    assert recognise.format_in(path) == held
    for name in (*FILES, "folder"):
        if name == held or (name, held) == ("refcoco", "coco"):  # its instances.json is COCO's
            continue
        options = {"images": tmp_path} if name == "cc_tsv" else {}
        with pytest.raises(DataError, match=rf"x\.\w+ .*write --from {held}"):
            open_source(name, [path], **options)


def test_a_file_of_no_format(tmp_path: Path) -> None:
    path = write(tmp_path / "x.json", {"a": [1]})
    with pytest.raises(DataError, match="it holds an object with a; coco reads an object with images, annotations"):
        open_source("coco", [path])
    path.write_text('[{"image": "a.jpg", "capt')
    with pytest.raises(DataError, match=r"x\.json is no JSON .*; albef_json reads a list of objects with image and"):
        open_source("albef_json", [path])
    lxmert = write(tmp_path / "mscoco_train.json", [{"img_id": "COCO_1", "sentf": {"mscoco": ["x"]}}])
    with pytest.raises(DataError, match="it holds texts for --from lxmert_tsv: give it as --captions"):
        open_source("albef_json", [lxmert])
    with pytest.raises(ConfigError, match="--captions is not read by coco"):
        open_source("coco", [path], captions=[path])


@pytest.mark.parametrize("name", FORMATS)
def test_a_shard_needs_no_making(tmp_path: Path, name: str) -> None:
    (tmp_path / "00000.tar").touch()
    with pytest.raises(DataError, match=r"00000\.tar is a shard already: train on it as it is"):
        open_source(name, [tmp_path / "00000.tar"])


def test_listed_samples_are_made_by_several_processes(tmp_path: Path) -> None:
    draw(tmp_path, *(f"{number}.jpg" for number in range(40)))
    file = write(tmp_path / "x.json", [{"image": f"{number}.jpg", "caption": f"n {number}"} for number in range(41)])
    one = made(tmp_path / "one", "albef_json", file)
    two = made(tmp_path / "two", "albef_json", file, processes=2)
    assert one.samples == 40
    assert [path.read_bytes() for path in two.shards] == [path.read_bytes() for path in one.shards]
    assert two.named == one.named


@pytest.mark.parametrize(
    "record",
    [
        {"image": "a\0b.jpg", "caption": "x"},
        {"image": "a/" * 3_000 + "b.jpg", "caption": "x"},
        {"image": "../gone.jpg", "caption": "\ud800"},
        {"image": {}, "caption": {}},
        {"image": ".", "caption": ["x", None]},
    ],
)
def test_odd_records_are_named_and_the_rest_is_made(tmp_path: Path, record: dict[str, Any]) -> None:
    draw(tmp_path, "sound.jpg")
    file = write(tmp_path / "x.json", [record, {"image": "sound.jpg", "caption": "sound"}])
    written = made(tmp_path, "albef_json", file)
    assert list(read(written)) == ["sound"]
    assert written.broken == 1


@pytest.mark.parametrize(
    "change",
    [
        {"bbox": [0, 0, float("inf"), 1]}, {"bbox": "0 0 1 1"}, {"category_id": [1]}, {"image_id": None},
        {"image_id": {}}, {"caption": ["x"]},
    ],
)  # fmt: skip
def test_odd_annotations_are_named_and_the_rest_is_made(tmp_path: Path, change: dict[str, Any]) -> None:
    draw(tmp_path, IMAGES[1]["file_name"])
    sound = {"image_id": 43, "category_id": 18, "bbox": [1, 2, 3, 4]}
    data = {**INSTANCES, "annotations": [{**sound, **change}, sound]}
    data["images"] = [*IMAGES, {"id": 44, "file_name": "x.jpg", "width": float("inf"), "height": 3}, 7]
    written = made(tmp_path, "coco", write(tmp_path / "instances_x.json", data))
    assert [len(each["objects"]) for each in records(written).values()] == [1]
    assert [key for key, _ in written.named] == ["instances_x/0"]


@pytest.mark.parametrize("text", ["[" * 100_000, "[" + "9" * 10_000 + "]", "", "\x80", "null", "[]", "{}"])
def test_files_that_hold_nothing(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(text.encode("latin-1"))
    for name in ("albef_json", "coco", "karpathy", "vqa", "gqa", "nlvr2", "refcoco", "snli_ve"):
        with pytest.raises(DataError, match=r"x\.json.* is empty" if text in ("", "[]", "{}") else r"x\.json"):
            open_source(name, [path])
