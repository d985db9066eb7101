"""What is said in videos and when, in the files that people have, looked up by a video's name.

A JSON file holds a mapping of videos: to `start`, `end` and `text` (HowTo100M's caption.json), to `timestamps` and
`sentences` (ActivityNet Captions), below `database` to `annotations` (YouCook2); `videos` and `sentences` (MSR-VTT);
`segments` (Whisper) or `events` (YouTube) of one video; or records with a video's name, as JSON lines too (VATEX; TV:
`sub`, or `desc` and `ts`). A CSV has columns such as video_id, start, end and text (WebVid: videoid and name), or there
is one for each video (MIL-NCE's captions). SRT and WebVTT subtitles are of one video each. A file of one video has the
video's name.
"""

from __future__ import annotations

import csv
import html
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from vlscale.data.formats.recognise import fault, refuse_pickle
from vlscale.errors import DataError, did_you_mean

FILES = r".*\.(jsonl?|csv|tsv|srt|vtt)"
ENDS = re.compile(r"\.(mp4|m4v|mov|webm|mkv|avi|gif|npy|npz|jsonl?|csv|tsv|srt|vtt|txt)$", re.IGNORECASE)
VIDEO = (
    *("video_id", "videoid", "videoID", "vid_name", "video_name", "video", "vid", "clip_name", "clip"),
    *("file_name", "filename", "name", "key"),
)
TEXT = ("text", "sentence", "caption", "desc", "description", "narration", "enCap", "name")
MANY = ("sub", "subtitles", "segments", "annotations", "sentences")  # lists of records
START, END = ("start", "start_time", "begin"), ("end", "end_time", "stop")
BOTH = ("segment", "timestamp", "ts")
_FORMS = f"write a video's name ({', '.join(VIDEO[:4])}), start and end in seconds, and a text ({', '.join(TEXT[:3])})"
_CUE = re.compile(r"(?:(\d+):)?(\d+):(\d+)[.,](\d+)\s+-->\s+(?:(\d+):)?(\d+):(\d+)[.,](\d+)")
_TAG = re.compile(r"<[^>]*>|\{\\[^}]*\}")
_RECOVERABLE = (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError)


class Line(NamedTuple):
    """One thing said."""

    video: str
    text: str
    time: tuple[float, float] | None = None  # seconds; None: of all of it
    split: str = ""


@dataclass(slots=True)
class _Said:
    """Of one video."""

    sentences: list[dict[str, object]] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    split: str = ""


class Timed:
    """What is said, by video."""

    def __init__(self, lines: Iterable[Line] = ()) -> None:
        """Of `lines`; empty ones are passed over."""
        self._said: dict[str, _Said] = {}
        self._by_base: dict[str, str | None] = {}  # last part of a name -> the name, None where two share it
        for line in lines:
            self.add(line)

    def add(self, line: Line) -> None:
        """One more."""
        name, text = stem(line.video), " ".join(line.text.split())
        if not (name and text):
            return
        if name not in self._said:
            base = name.rsplit("/", 1)[-1]
            self._by_base[base] = name if base not in self._by_base else None
        said = self._said.setdefault(name, _Said())
        said.split = said.split or line.split
        if line.time is None:
            said.captions.append(text)
        else:
            said.sentences.append({"start": line.time[0], "end": line.time[1], "text": text})

    def __len__(self) -> int:
        """How many videos."""
        return len(self._said)

    def names(self, splits: Iterable[str] = ()) -> list[str]:
        """Of the videos of these splits, or of all. DataError if there is no such split."""
        wanted = set(splits)
        there = {said.split for said in self._said.values()} - {""}
        for split in sorted(wanted - there):
            held = f"they have {', '.join(sorted(there))}" if there else "they tell of no splits"
            raise DataError(
                f"no video of the captions is of split '{split}'{did_you_mean(split, there) or f'; {held}'}"
            )
        return [name for name, said in self._said.items() if not wanted or said.split in wanted]

    def find(self, name: str) -> str | None:
        """The name that a video has here, by the whole of its name or the end of its path."""
        key = stem(name)
        near = self._by_base.get(key.rsplit("/", 1)[-1])
        ends = near and (f"/{near}".endswith(f"/{key}") or f"/{key}".endswith(f"/{near}"))
        return key if key in self._said else near if ends else None

    def of(self, name: str) -> dict[str, object]:
        """`sentences` by their start, and `caption`, of the video `name`; empty if nothing is said."""
        found = self.find(name)
        if found is None:
            return {}
        said = self._said[found]
        captions = said.captions[0] if len(said.captions) == 1 else said.captions
        told: dict[str, object] = {"caption": captions} if captions else {}
        if said.sentences:
            told["sentences"] = sorted(said.sentences, key=lambda each: float(str(each["start"])))
        return told


def stem(name: str) -> str:
    """A video's name without the ends that tell a file's kind: `a/b.mp4.npy` is `a/b`."""
    short = ENDS.sub("", name.strip())
    return short if short == name else stem(short)


def read_timed(paths: Iterable[Path]) -> Timed:
    """What files, and the files in folders, say of videos. DataError if one cannot be read or tells nothing."""
    timed = Timed()
    for path in paths:
        before = len(timed)
        for file in _files(path):
            for line in read_lines(file):
                timed.add(line)
        if len(timed) == before:
            raise DataError(f"captions {path} tell of no video; {_FORMS}")
    return timed


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    return [file for file in sorted(path.rglob("*")) if re.fullmatch(FILES, file.name, re.IGNORECASE)]


def read_lines(path: Path) -> Iterator[Line]:
    """What one file says. DataError if it cannot be read, or a time is no number."""
    refuse_pickle(path)
    own = stem(path.name)
    try:
        if path.suffix.lower() in (".srt", ".vtt"):
            yield from (Line(own, *cue) for cue in _cues(path.read_text(encoding="utf-8-sig")))
        elif path.suffix.lower() in (".csv", ".tsv"):
            yield from _table(path, own)
        elif path.suffix.lower() == ".jsonl":
            with open(path, encoding="utf-8-sig") as file:
                yield from (line for text in file if text.strip() for line in _record(json.loads(text), own))
        else:
            yield from _document(json.loads(path.read_text(encoding="utf-8-sig")), own)
    except json.JSONDecodeError as error:
        raise DataError(f"captions {path} cannot be read ({fault(error)})") from error
    except (OSError, UnicodeDecodeError, csv.Error, RecursionError) as error:
        raise DataError(f"captions {path} cannot be read ({error})") from error
    except _RECOVERABLE as error:
        reason = error if isinstance(error, ValueError) else repr(error)
        raise DataError(f"captions {path} have a form that is not known ({reason}); {_FORMS}") from error


def _document(data: Any, own: str) -> Iterator[Line]:
    """A whole JSON file."""
    if isinstance(data, list):
        for each in data:
            yield from _record(each, own)
    elif isinstance(data.get("database"), dict):  # YouCook2
        yield from _mapping(data["database"])
    elif "videos" in data and "sentences" in data:  # MSR-VTT
        splits = {str(each["video_id"]): str(each.get("split", "")) for each in data["videos"]}
        for each in data["sentences"]:
            yield from (line._replace(split=splits.get(line.video, "")) for line in _record(each, own))
    elif isinstance(data.get("events"), list):  # YouTube's json3
        for each in data["events"]:
            text = "".join(part.get("utf8", "") for part in each.get("segs", ()))
            start = each.get("tStartMs", 0) / 1000
            yield Line(own, text, (start, start + each.get("dDurationMs", 0) / 1000))
    elif any(isinstance(data.get(name), list) for name in MANY) or _first(data, VIDEO) or _columns(data):
        yield from _record(data, own)
    else:
        yield from _mapping(data)


def _mapping(videos: Mapping[str, Any]) -> Iterator[Line]:
    """What is said of each."""
    for name, value in videos.items():
        split = str(value.get("subset", value.get("split", ""))) if isinstance(value, dict) else ""
        for each in value if isinstance(value, list) else [value]:
            record = {"text": each} if isinstance(each, str) else each
            yield from (line._replace(split=split) for line in _record(record, name))


def _record(record: Any, own: str) -> Iterator[Line]:
    """What a record says of the video that it names, else of `own`."""
    if not isinstance(record, dict):
        raise ValueError(f"a {type(record).__name__} where an object should be")
    found = _first(record, VIDEO)
    video, split = own if found is None else str(found), str(record.get("split") or "")
    if _columns(record):
        for start, end, text in zip(record["start"], record["end"], record["text"], strict=True):
            yield Line(video, _text(text), _time(start, end), split)
    elif "timestamps" in record and "sentences" in record:  # ActivityNet Captions
        for (start, end), text in zip(record["timestamps"], record["sentences"], strict=True):
            yield Line(video, _text(text), _time(start, end), split)
    elif many := next((record[name] for name in MANY if isinstance(record.get(name), list)), None):
        for each in many:
            yield from (line._replace(video=video, split=split) for line in _record(each, own))
    else:
        start, end = _first(record, BOTH) or (_first(record, START), _first(record, END))
        texts = _first(record, TEXT)
        for text in texts if isinstance(texts, list) else [texts]:
            yield Line(video, _text(text), None if start is None else _time(start, end), split)


def _columns(record: Mapping[str, Any]) -> bool:
    """Whether starts, ends and texts are lists of one length."""
    return all(isinstance(record.get(name), list) for name in ("start", "end", "text"))


def _text(value: Any) -> str:
    """A text; what is none (a missing one is NaN) is empty."""
    return value if isinstance(value, str) else ""


def _time(start: Any, end: Any) -> tuple[float, float]:
    """Seconds."""
    try:
        seconds = float(start), float(end)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the times {start!r} and {end!r} are no seconds") from error
    if not all(map(math.isfinite, seconds)):
        raise ValueError(f"the times {start!r} and {end!r} are no seconds")
    return seconds


def _first(record: Mapping[str, Any], names: Iterable[str]) -> Any:
    return next((record[name] for name in names if record.get(name) not in (None, "")), None)


def _table(path: Path, own: str) -> Iterator[Line]:
    """A CSV or TSV with a heading."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        names = {name.strip().lower() for name in rows.fieldnames or ()}
        if not names & set(TEXT):
            raise ValueError(f"its columns are {', '.join(sorted(names)) or 'none'}, of which none is a text")
        for row in rows:
            yield from _record({str(name).strip().lower(): value for name, value in row.items()}, own)


def _cues(text: str) -> Iterator[tuple[str, tuple[float, float]]]:
    """(text, time) of SRT's or WebVTT's cues. YouTube's rolling ones repeat lines, which count once."""
    rolling, before = "<c>" in text, [""]
    for block in re.split(r"\n\n+", text.replace("\r\n", "\n")):
        found = _CUE.search(block)
        if not found:
            continue
        lines = [html.unescape(_TAG.sub("", line)).strip() for line in block[found.end() :].split("\n")[1:]]
        fresh = [line for line in lines if line and not (rolling and line in before)]
        before = lines
        numbers = [float(part or 0) for part in (*found.groups()[:3], *found.groups()[4:7])]
        start, end = (3600 * hours + 60 * minutes + seconds for hours, minutes, seconds in (numbers[:3], numbers[3:]))
        yield " ".join(fresh), (start + float(f"0.{found[4]}"), end + float(f"0.{found[8]}"))
