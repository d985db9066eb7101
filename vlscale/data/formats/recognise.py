"""Which format a file is in, by its keys or its first line; and reading those in JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from vlscale.errors import DataError

READS: Mapping[str, str] = MappingProxyType(  # format -> what is in its files
    {
        "albef_json": "a list of objects with image and caption",
        "coco": "an object with images, annotations (caption or bbox) and categories",
        "karpathy": "an object with images, each of them with sentences and split",
        "vqa": "an object with questions, another with annotations, or a list with image, question and answer",
        "gqa": "an object of questions by number, with imageId, question and answer",
        "nlvr2": "objects with sentence, label and identifier, or with images",
        "refcoco": "a list of objects with ref_id and sentences, and an instances.json",
        "snli_ve": "objects with Flickr30K_ID, sentence2 and gold_label, or with image, sentence and label",
    }
)
LISTS = (  # format, what the objects of its list have
    ("nlvr2", {"sentence", "left_url"}),
    ("nlvr2", {"sentence", "images"}),
    ("refcoco", {"ref_id", "sentences"}),
    ("snli_ve", {"sentence2", "gold_label"}),
    ("snli_ve", {"image", "sentence", "label"}),
    ("vqa", {"image", "question", "answer"}),
    ("lxmert_tsv", {"sentf"}),
    ("albef_json", {"image", "caption"}),
    ("albef_json", {"url", "caption"}),
)
TABLES = (  # format, its first line
    ("flickr30k", r"[^\t]+\.jpg#\w+\t.+|image_name\s*\|.*|(image|file_?name|raw)\s*,.*"),
    ("cc_tsv", r"https?://\S+\t[^\t]+|[^\t]+\thttps?://\S+|(caption\turl|url\tcaption)"),
    ("lxmert_tsv", r"[^\t]+(\t[^\t]+){5}|[^\t]+(\t[^\t]+){9}"),
)
ENDS = (  # format, what its files' names end in
    ("clips", r"mp4|m4v|mov|webm|mkv|gif"),
    ("frame_features", r"npy"),
    ("folder", r"jpe?g|png|webp"),
)
LOOKED_AT = 100  # records that tell the format
HEAD = 1 << 20  # bytes in which a first line ends


def read(path: Path, wanted: str) -> Any:
    """What a file holds: its object or list, or the list of its lines' objects, in UTF-8.

    A line that is no JSON stands in the list as its ValueError. DataError if the file is no JSON at all.
    """
    refuse_pickle(path)
    try:
        data = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as JSON ({error}); {wanted} reads {READS[wanted]}") from error
    try:
        return json.loads(data)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data" or error.lineno < 2:  # else the first line is whole, and others follow
            raise DataError(_no_json(path, data, wanted, error)) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists in lists without end
        raise DataError(_no_json(path, data, wanted, error)) from error
    return [_line(line) for line in data.split("\n") if line.strip()]


def _line(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return ValueError(f"its line is no JSON ({error})")


def fault(error: Exception) -> str:
    """Why a text is no JSON."""
    if not isinstance(error, json.JSONDecodeError):
        return str(error)
    if not error.doc.strip():
        return "it is empty"
    if error.pos >= len(error.doc.rstrip()) or error.msg.startswith("Unterminated string"):
        return f"it ends early, after {len(error.doc)} characters: fetch or copy it again"
    return str(error)


def _no_json(path: Path, data: str, wanted: str, error: Exception) -> str:
    table = table_format(data.lstrip().split("\n", 1)[0])
    fits = f"it looks like {table}: write --from {table}" if table else f"{wanted} reads {READS[wanted]}"
    return f"{path} is no JSON ({fault(error)}); {fits}"


def refuse_pickle(path: Path) -> None:
    """DataError if a file is a pickle, by its name or its first byte, or cannot be read."""
    try:
        with open(path, "rb") as file:
            marked = file.read(1) == b"\x80"
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from error
    if marked or path.suffix in (".p", ".pkl", ".pickle"):
        raise DataError(f"{path} is a pickle, which is never loaded, for it can run code; write it as JSON first")


def require(path: Path, data: Any, *formats: str) -> Any:
    """`data` again. DataError, with the format that fits, if it is none of `formats`."""
    found = format_of(data)
    if found in formats:
        return data
    if data in ([], {}):
        raise DataError(f"{path} is empty: it holds no record; {formats[0]} reads {READS[formats[0]]}")
    held = f"a list of objects with {_some(data)}" if isinstance(data, list) else f"an object with {_some(data)}"
    hint = f"write --from {found}" if found else f"{formats[0]} reads {READS[formats[0]]}"
    if found == "lxmert_tsv":
        hint = "it holds texts for --from lxmert_tsv: give it as --captions"
    raise DataError(f"{path} is no file of {formats[0]}: it holds {held}; {hint}")


def format_of(data: Any) -> str:
    """The format that such data is in, by its keys; empty if it is none of ours."""
    if isinstance(data, list):
        keys = _keys(data)
        return next((name for name, needed in LISTS if needed <= keys), "")
    if not isinstance(data, dict):
        return ""
    annotated = _keys(data.get("annotations"))
    if "sentences" in _keys(data.get("images")):
        return "karpathy"
    if "question_id" in annotated | _keys(data.get("questions")):
        return "vqa"
    if {"image_id", "caption"} <= annotated or {"image_id", "bbox"} <= annotated:
        return "coco"
    return "gqa" if {"imageId", "question"} <= _keys(list(data.values())) else ""


def _keys(records: Any) -> set[str]:
    """Of the first records of a list."""
    listed = records[:LOOKED_AT] if isinstance(records, list) else []
    return {key for record in listed if isinstance(record, dict) for key in record}


def _some(data: Any) -> str:
    keys = sorted(_keys(data) if isinstance(data, list) else map(str, data) if isinstance(data, dict) else [])
    return ", ".join(keys[:8]) or "nothing that is known"


def table_format(line: str) -> str:
    """The format that a text file with this first line is in; empty if it is none of ours."""
    return next((name for name, mark in TABLES if re.fullmatch(mark, line.strip(), re.IGNORECASE)), "")


def format_in(path: Path) -> str:
    """The format that a file is in; empty if it is none of ours or cannot be read."""
    if named := next((name for name, ends in ENDS if re.fullmatch(ends, path.suffix[1:], re.IGNORECASE)), ""):
        return named
    try:
        first = first_line(path)
        return format_of(read(path, "albef_json")) if first[:1] in ("{", "[") else table_format(first)
    except (DataError, OSError):
        return ""


def first_line(path: Path) -> str:
    """Of a text file, as far as it can be read."""
    with open(path, "rb") as file:
        head = file.read(HEAD).decode("utf-8-sig", errors="replace").lstrip()
    return head.split("\n", 1)[0].rstrip()


def require_table(path: Path, wanted: str, reads: str) -> None:
    """DataError, with the format that fits, if the first line of a file is not one of `wanted`."""
    refuse_pickle(path)
    found = format_in(path)
    if found != wanted:
        hint = f"write --from {found}" if found else f"{wanted} reads {reads}"
        raise DataError(f"{path} is no file of {wanted}: it begins with '{first_line(path)[:60]}'; {hint}")
