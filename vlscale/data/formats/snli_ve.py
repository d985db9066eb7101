"""SNLI-VE, visual entailment: snli_ve_*.jsonl (github.com/necla-ml/SNLI-VE), or ALBEF's ve_*.json.

A picture of Flickr30k is the premise and `sentence2` the hypothesis; the gold label is entailment, neutral or
contradiction. ALBEF's are lists of {"image", "sentence", "label"}. A sample is a picture with all its `hypotheses`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vlscale.data.formats.base import Options
from vlscale.data.formats.captions import stem
from vlscale.data.formats.listed import Entries, Entry, Listed, Record, read_json, text
from vlscale.data.making.write import Source

__all__ = ["Options", "source"]

PICTURE = ("Flickr30K_ID", "Flikr30kID", "Flickr30kID", "image")  # the second is how the first release writes it
LABELS = ("entailment", "neutral", "contradiction")


def source(paths: Sequence[Path], options: Options) -> Source[Entry]:
    """The pictures of the files, each with its hypotheses. DataError if a file is something else."""
    entries = Entries()
    files = read_json(paths, "snli_ve")

    def take(record: Record) -> None:
        label = record["gold_label"] if "gold_label" in record else record["label"]
        if label not in LABELS:
            raise ValueError(f"its label is {label!r}; it should be {', '.join(LABELS[:2])} or {LABELS[2]}")
        told = {"text": text(record, "sentence2" if "sentence2" in record else "sentence"), "label": label}
        number = {"id": record["pairID"]} if "pairID" in record else {}
        name = stem(next((str(record[key]) for key in PICTURE if record.get(key)), ""))
        if not name:
            raise ValueError(f"it has no {PICTURE[0]}")
        entry = entries.of(name, (f"{name}.jpg", f"flickr30k-images/{name}.jpg"))
        entry.record.setdefault("hypotheses", []).append({**told, **number})

    for path, data in files:
        entries.add(path, data, take)
    return Listed(options.images or files[0][0].parent, entries)
