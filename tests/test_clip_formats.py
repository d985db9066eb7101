"""`shards.py make` from clips and features of frames: what is said goes with its own video and its own time."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.test_formats import made, read
from vlscale.data.clip_files import read_tracks
from vlscale.data.formats.timed import read_timed, stem
from vlscale.data.making.write import Written
from vlscale.data.scenes.embedded import _mp4
from vlscale.errors import ConfigError, DataError


def clip(seconds: int = 2, grey: int = 0) -> bytes:
    return _mp4([np.full((48, 48, 3), grey, np.uint8)] * 8 * seconds)


def write(path: Path, text: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    return path


def clips(folder: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(clip(2, 100 * number))
    return folder


def texts(written: Written) -> dict[str, Any]:
    """{key: what is said}."""
    told = {key: record for key, (record, _, _) in read(written).items()}
    return {key: record.get("sentences", record.get("caption")) for key, record in told.items()}


def said(start: float, end: float, text: str) -> dict[str, Any]:
    return {"start": start, "end": end, "text": text}


FIRST, SECOND = said(0.5, 1.0, "take a pan"), said(1.0, 2.5, "fry it")
SRT = "1\n00:00:00,500 --> 00:00:01,000\n<i>take</i>\na pan\n\n2\n00:00:01,000 --> 00:00:02,500\nfry it\n"
VTT = (
    "WEBVTT\n\nNOTE nothing\n\n00:00.500 --> 00:01.000 align:start\ntake a pan\n\nx\n00:01.000 --> 00:02.500\nfry it\n"
)
CSV = "start,end,text\n1.0,2.5,fry it\n0.5,1.0,take a pan\n3,4,\n"  # a text that is missing is none
COLUMNS = {"start": [0.5, 1.0], "end": [1.0, 2.5], "text": ["take a pan", "fry it"]}
WHISPER = {"text": "take a pan fry it", "segments": [{"id": 0, **FIRST}, {"id": 1, **SECOND}], "language": "en"}
YOUTUBE = {
    "wireMagic": "pb3",
    "events": [
        {"tStartMs": 0, "dDurationMs": 9000, "id": 1},
        {"tStartMs": 500, "dDurationMs": 500, "segs": [{"utf8": "take"}, {"utf8": " a pan"}]},
        {"tStartMs": 900, "segs": [{"utf8": "\n"}]},
        {"tStartMs": 1000, "dDurationMs": 1500, "segs": [{"utf8": "fry it"}]},
    ],
}


@pytest.mark.parametrize(
    ("end", "text"),
    [
        ("srt", SRT),
        ("srt", SRT.replace("\n", "\r\n")),
        ("vtt", VTT),
        ("csv", CSV),
        ("json", COLUMNS),
        ("json", WHISPER),
        ("json", YOUTUBE),
        ("json", [FIRST, SECOND]),
        ("json", {"sentences": [FIRST, SECOND]}),
    ],
)
def test_what_is_said_beside_a_clip(tmp_path: Path, end: str, text: object) -> None:
    folder = clips(tmp_path / "in", "cook/a.mp4")
    write(folder / f"cook/a.{end}", text)
    written = made(tmp_path, "clips", folder)
    assert texts(written) == {"cook/a": [FIRST, SECOND]}
    record, _, members = read(written)["cook/a"]
    assert (record["width"], record["height"], record["duration"]) == (48, 48, 2.0)
    assert members["mp4"] == clip()


ALL = {
    "caption.json": {"a": COLUMNS, "b": {"start": [0], "end": [9], "text": ["mix"]}},  # HowTo100M
    "activitynet.json": {
        "a": {"duration": 3, "timestamps": [[0.5, 1.0], [1.0, 2.5]], "sentences": ["take a pan", " fry it"]},
        "b": {"duration": 9, "timestamps": [[0, 9]], "sentences": ["mix"]},
    },
    "youcookii_annotations_trainval.json": {
        "database": {
            "a": {
                "subset": "training",
                "annotations": [
                    {"segment": [0.5, 1.0], "id": 0, "sentence": "take a pan"},
                    {"segment": [1.0, 2.5], "id": 1, "sentence": "fry it"},
                ],
            },
            "b": {"subset": "validation", "annotations": [{"segment": [0, 9], "id": 0, "sentence": "mix"}]},
        }
    },
    "tv_subtitles.jsonl": "\n".join(
        json.dumps({"vid_name": name, "sub": sub})
        for name, sub in (("a", [FIRST, {**SECOND, "text": "fry\nit"}]), ("b", [said(0, 9, "mix")]))
    ),
    "tvr_train_release.jsonl": "\n".join(
        json.dumps({"desc_id": 1, "desc": text, "vid_name": name, "duration": 9, "ts": ts, "type": "v"})
        for name, text, ts in (("a", "take a pan", [0.5, 1]), ("b", "mix", [0, 9]), ("a", "fry it", [1, 2.5]))
    ),
    "youcook.csv": "end,start,task,text,video_id\n2.5,1,1,fry it,a\n1.0,0.5,1,take a pan,a\n9,0,2,mix,b\n",
    "list.json": [{"video": "a.mp4", **FIRST}, {"video": "b.mp4", **said(0, 9, "mix")}, {"video": "a.mp4", **SECOND}],
    "lists.json": {"a": [FIRST, SECOND], "b": [said(0, 9, "mix")]},
}


@pytest.mark.parametrize("name", ALL)
def test_files_of_captions_with_times(tmp_path: Path, name: str) -> None:
    file = write(tmp_path / name, ALL[name])
    written = made(tmp_path, "clips", clips(tmp_path / "in", "a.mp4", "x/b.mp4"), options={"captions": [file]})
    assert texts(written) == {"a": [FIRST, SECOND], "x/b": [said(0, 9, "mix")]}


def test_a_folder_of_captions_with_a_file_for_each(tmp_path: Path) -> None:
    """As those of MIL-NCE."""
    write(tmp_path / "captions/a.csv", CSV)
    write(tmp_path / "captions/b.csv", "start,end,text\n0,9,mix\n")
    options = {"captions": [tmp_path / "captions"]}
    written = made(tmp_path, "clips", clips(tmp_path / "in", "a.mp4", "b.mp4"), options=options)
    assert texts(written) == {"a": [FIRST, SECOND], "b": [said(0, 9, "mix")]}


MSRVTT = {
    "info": {},
    "videos": [
        {"video_id": "video0", "split": "train", "start time": 137.7, "end time": 149.4},
        {"video_id": "video1", "split": "test", "start time": 1, "end time": 2},
    ],
    "sentences": [
        {"caption": "a car", "video_id": "video0", "sen_id": 0},
        {"caption": "a dog", "video_id": "video1", "sen_id": 1},
        {"caption": "it drives", "video_id": "video0", "sen_id": 2},
    ],
}


def test_msr_vtt_and_its_splits(tmp_path: Path) -> None:
    """Its clips are cut already: times are those of the film that they come from, and not read."""
    folder = clips(tmp_path / "in", "video0.mp4", "video1.mp4")
    file = write(tmp_path / "videodatainfo.json", MSRVTT)
    options = {"captions": [file], "split": ["test"]}
    assert texts(made(tmp_path / "1", "clips", folder, options={"captions": [file]})) == {
        "video0": ["a car", "it drives"],
        "video1": "a dog",
    }
    written = made(tmp_path / "2", "clips", folder, options=options)
    assert (texts(written), written.broken) == ({"video1": "a dog"}, 0)
    csv = write(tmp_path / "MSRVTT_JSFUSION_test.csv", "key,vid_key,video_id,sentence\nret0,msr1,video1,a dog runs\n")
    written = made(tmp_path / "3", "clips", folder, options={"captions": [csv]})
    assert texts(written) == {"video1": "a dog runs"}
    assert written.named == [("video0", "nothing is said in it: the captions have none")]
    with pytest.raises(DataError, match="no video of the captions is of split 'tset'; did you mean 'test'"):
        made(tmp_path / "4", "clips", folder, options={"captions": [file], "split": ["tset"]})
    with pytest.raises(DataError, match="--split is told by --captions"):
        made(tmp_path / "5", "clips", folder, options={"split": ["test"]})


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("vatex.json", [{"videoID": "a", "enCap": ["a pan", "a cook"], "chCap": ["x"]}]),
        ("webvid.csv", "videoid,contentUrl,duration,page_dir,name\na,https://x/a.mp4,PT0H,1,a pan\na,u,1,1,a cook\n"),
        ("captions.json", {"a": ["a pan", "a cook"]}),
        ("captions.jsonl", '{"video": "a.mp4", "caption": ["a pan", "a cook"]}'),
    ],
)
def test_captions_without_times(tmp_path: Path, name: str, text: object) -> None:
    file = write(tmp_path / name, text)
    written = made(tmp_path, "clips", clips(tmp_path / "in", "a.mp4"), options={"captions": [file]})
    assert texts(written) == {"a": ["a pan", "a cook"]}


def test_rolling_subtitles_count_once(tmp_path: Path) -> None:
    file = write(
        tmp_path / "a.vtt",
        "WEBVTT\n\n00:00:00.000 --> 00:00:01.000\n \ntake<00:00:00.5><c> a</c><c> pan</c>\n\n"
        "00:00:01.000 --> 00:00:01.010\ntake a pan\n \n\n00:00:01.010 --> 00:00:02.000\ntake a pan\nfry<c> it</c>\n",
    )
    assert read_timed([file]).of("a") == {"sentences": [said(0, 1, "take a pan"), said(1.01, 2, "fry it")]}


def test_clips_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    folder = clips(tmp_path / "in", "a.mp4", "silent.mp4")
    for name, data in (("cut", clip()[:900]), ("text", b"no clip")):
        (folder / f"{name}.mp4").write_bytes(data)
        write(folder / f"{name}.txt", "something")
    write(folder / "a.txt", "one\ntwo\n")
    write(folder / "late.srt", SRT)  # of no clip
    (folder / "odd.mp4").write_bytes(clip())
    write(folder / "odd.csv", "start,end,text\nsoon,1,go\n")
    written = made(tmp_path, "clips", folder)
    assert texts(written) == {"a": ["one", "two"]}
    named = dict(written.named)
    assert named.keys() == {"cut", "text", "silent", "odd"}
    assert named["silent"] == "nothing is said in it: no srt, vtt, csv, json or txt beside it holds a text"
    assert "the times 'soon' and '1' are no seconds" in named["odd"]


def test_captions_without_a_clip_are_named(tmp_path: Path) -> None:
    file = write(tmp_path / "caption.json", ALL["caption.json"])
    written = made(tmp_path, "clips", clips(tmp_path / "in", "a.mp4"), options={"captions": [file]})
    assert written.named == [("b", "the captions name it, and there is no such clip")]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        (
            "HowTo100M_v1.csv",
            "video_id,category_1,rank\nabc,Food,1\n",
            "columns are category_1, rank, video_id, of which",
        ),
        ("caption.json", '{"a": {"start": [1', "ends early"),
        ("caption.json", {"a": {"start": [1], "end": [2, 3], "text": ["x"]}}, "form that is not known"),
        ("caption.json", {"a": 3}, "a int where an object should be"),
        ("captions.jsonl", '{"vid_name": "a", "sub": [{"start": "x", "end": 1, "text": "go"}]}', "are no seconds"),
        ("caption.json", {}, "tell of no video"),
    ],
)
def test_captions_that_cannot_be_read(tmp_path: Path, name: str, content: object, reason: str) -> None:
    file = write(tmp_path / name, content)
    with pytest.raises(DataError, match=reason) as raised:
        made(tmp_path, "clips", clips(tmp_path / "in", "a.mp4"), options={"captions": [file]})
    assert str(file) in str(raised.value)


def test_a_pickle_is_never_loaded(tmp_path: Path) -> None:
    (tmp_path / "caption.pickle").write_bytes(pickle.dumps({"a": COLUMNS}))
    with pytest.raises(DataError, match=r"is a pickle, which is never loaded.*write it as JSON first"):
        made(tmp_path, "clips", clips(tmp_path / "in", "a.mp4"), options={"captions": [tmp_path / "caption.pickle"]})


def features(number: int, rows: int, width: int = 4) -> Any:
    return np.random.default_rng(number).standard_normal((rows, width)).astype(np.float32)


def test_features_of_two_rates(tmp_path: Path) -> None:
    """HowTo100M's, in two folders; YouTube's kind of file stands in the name, or not."""
    for name, number in (("a", 1), ("b", 2)):
        for folder, rows in (("2d", 4), ("3d", 6)):
            (tmp_path / folder).mkdir(exist_ok=True)
            end = "npy" if folder + name == "2db" else "mp4.npy"
            np.save(tmp_path / folder / f"{name}.{end}", features(number, rows))
    np.save(tmp_path / "2d/c.npy", features(3, 4))  # without 3d
    file = write(tmp_path / "caption.json", {**ALL["caption.json"], "c": COLUMNS})
    options = {"captions": [file], "rates": (1.0, 1.5)}
    written = made(tmp_path, "frame_features", tmp_path / "2d", tmp_path / "3d", options=options, processes=2)
    assert texts(written) == {"a": [FIRST, SECOND], "b": [said(0, 9, "mix")]}
    assert written.named[0][0] == "c"
    assert written.named[0][1].endswith("3d has no features of it (c.npy)")
    first, second = read_tracks(read(written)["b"][2]["frames.npz"])
    assert first.rows.dtype == np.float16
    np.testing.assert_allclose(first.rows, features(2, 4), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(second.rows, features(2, 6), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(first.times, [0, 1, 2, 3])
    np.testing.assert_allclose(second.times, np.arange(6) / 1.5, rtol=1e-6)


def test_features_in_float32_and_as_npz(tmp_path: Path) -> None:
    rows = features(0, 3) * 1e6  # too large for float16
    (tmp_path / "in").mkdir()
    np.savez(tmp_path / "in/a.npz", features=rows)
    write(tmp_path / "in/a.txt", "mix")
    written = made(tmp_path, "frame_features", tmp_path / "in", options={"rates": (0.5,)}, dtype="float32")
    (track,) = read_tracks(read(written)["a"][2]["frames.npz"])
    np.testing.assert_array_equal(track.rows, rows)
    np.testing.assert_allclose(track.times, [0, 2, 4])
    with pytest.raises(DataError, match="too large for float16; write them as float32"):
        made(tmp_path / "half", "frame_features", tmp_path / "in")


def test_features_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    arrays = {"good": features(0, 3), "flat": features(0, 3)[0], "nan": features(0, 3) * np.nan, "none": features(0, 0)}
    for name, array in {**arrays, "objects": np.array([{}], dtype=object), "cut": features(0, 3)}.items():
        np.save(folder / f"{name}.npy", array, allow_pickle=True)
        write(folder / f"{name}.txt", "mix")
    (folder / "cut.npy").write_bytes((folder / "cut.npy").read_bytes()[:-7])
    written = made(tmp_path, "frame_features", folder)
    named = dict(written.named)
    assert texts(written) == {"good": "mix"}
    assert named.keys() == {"flat", "nan", "none", "objects", "cut"}
    assert "never loaded" in named["objects"]
    assert "not finite" in named["nan"]


def test_rates_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in/a.npy", features(0, 3))
    for rates in ((1.0, 1.5), (0.0,)):
        with pytest.raises(
            ConfigError, match=r"--rates .* should be rows a second, above 0, of each of the 1 --source"
        ):
            made(tmp_path, "frame_features", tmp_path / "in", options={"rates": rates})
    with pytest.raises(ConfigError, match="--rates is not read by clips, only by frame_features"):
        made(tmp_path, "clips", tmp_path / "in", options={"rates": (1.0,)})


def test_another_format_is_told_by_the_ends_of_files(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in/a.npy", features(0, 3))
    for format_, folder, fits in (
        ("clips", tmp_path / "in", "a.npy looks like frame_features: write --from frame_features"),
        ("folder", clips(tmp_path / "videos", "b.mp4"), "b.mp4 looks like clips: write --from clips"),
    ):
        with pytest.raises(DataError, match=fits):
            made(tmp_path, format_, folder)


def test_stems() -> None:
    assert [stem(name) for name in ("a.mp4", "a.mp4.npy", "b/a", "a.b.webm")] == ["a", "a", "b/a", "a.b"]


def test_the_same_name_in_two_folders_is_not_mixed(tmp_path: Path) -> None:
    timed = read_timed([write(tmp_path / "all.json", {"x/a": ["one"], "y/a": ["two"], "b": ["three"]})])
    assert timed.of("y/a.mp4") == {"caption": "two"}
    assert timed.of("a") == {}
    assert timed.of("z/b") == {"caption": "three"}
