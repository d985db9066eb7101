"""GQA's questions: train_balanced_questions.json and its like (cs.stanford.edu/people/dorarad/gqa).

An object of questions by number, each with `imageId`, `question`, `answer` and `fullAnswer`. train_all_questions may be
given as a folder of its ten files.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vlscale.data.formats.base import Options
from vlscale.data.formats.listed import Entries, Entry, Listed, Record, read_json, text
from vlscale.data.making.write import Source

__all__ = ["Options", "source"]


def source(paths: Sequence[Path], options: Options) -> Source[Entry]:
    """The pictures that are asked about, each with its questions. DataError if a file is something else."""
    entries = Entries()
    files = read_json(paths, "gqa")

    def take(record: Record) -> None:
        pair = {"q": text(record, "question"), "a": text(record, "answer"), "id": record["id"]}
        if record.get("fullAnswer"):
            pair["full_answer"] = text(record, "fullAnswer")
        name = str(record["imageId"])
        entry = entries.of(name, (f"{name}.jpg", f"images/{name}.jpg"))
        entry.record["image_id"] = name
        entry.record.setdefault("qa", []).append(pair)

    for path, data in files:
        numbered = ({**each, "id": number} if isinstance(each, dict) else each for number, each in data.items())
        entries.add(path, numbered, take)
    return Listed(options.images or files[0][0].parent, entries)
