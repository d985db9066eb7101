"""Visual question answering: VQA v1 and v2 with their questions and annotations, or ALBEF's vqa_*.json.

v2_OpenEnded_mscoco_*_questions.json and v2_mscoco_*_annotations.json (visualqa.org/download.html) are both needed: a
question of training has an answer. ALBEF's are lists of {"image", "question", "answer"}, a text or a list of ten. Also
OK-VQA, which has the same form.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from vlscale.data.formats.base import Options
from vlscale.data.formats.captions import stem
from vlscale.data.formats.coco import numbered, places
from vlscale.data.formats.listed import Entries, Entry, Listed, Names, Record, read_json, text
from vlscale.data.making.write import Source
from vlscale.errors import DataError

__all__ = ["Options", "source"]

PEOPLE = 10  # asked each question


def source(paths: Sequence[Path], options: Options) -> Source[Entry]:
    """The pictures that are asked about, each with its questions. DataError if a file is something else."""
    entries = Entries()
    files = read_json(paths, "vqa")
    answers: dict[Any, Record] = {}
    for _, data in files:
        if isinstance(data, dict):
            answers.update(numbered(data.get("annotations"), "question_id"))
    for path, data in files:
        if isinstance(data, list):
            entries.add(path, data, partial(_take_listed, entries))
        elif "questions" in data:
            if not answers:
                raise DataError(f"{path} holds questions without answers; give the file of annotations to --source too")
            folder = str(data.get("data_subtype", ""))
            entries.add(path, data["questions"], partial(_take, entries, answers, folder))
        elif not any(isinstance(other, dict) and "questions" in other for _, other in files):
            raise DataError(f"{path} holds answers without questions; give the file of questions to --source too")
    return Listed(options.images or files[0][0].parent, entries)


def _take(entries: Entries, answers: Mapping[Any, Record], folder: str, record: Record) -> None:
    number = record["question_id"]
    if number not in answers:
        raise ValueError(f"its question {number} has no annotation")
    told = answers[number]
    pair = _pair(text(record, "question"), told.get("answers", []), told.get("multiple_choice_answer"))
    kinds = {name: told[name] for name in ("question_type", "answer_type") if name in told}
    name = f"COCO_{folder}_{int(record['image_id']):012d}" if folder else f"{int(record['image_id']):012d}"
    entry = _asked(entries, name, places(f"{name}.jpg", folder))
    entry.record["image_id"] = record["image_id"]
    entry.record["qa"].append({**pair, "id": number, **kinds})


def _take_listed(entries: Entries, record: Record) -> None:
    name, answer = text(record, "image"), record["answer"]
    pair = _pair(text(record, "question"), answer if isinstance(answer, list) else [answer])
    number = {"id": record["question_id"]} if "question_id" in record else {}
    _asked(entries, stem(name), (name,)).record["qa"].append({**pair, **number})


def _asked(entries: Entries, name: str, names: Names) -> Entry:
    entry = entries.of(name, names)
    entry.record.setdefault("qa", [])
    return entry


def _pair(question: str, answers: Sequence[Any], chosen: Any = None) -> dict[str, object]:
    """`q`, `a` (the chosen answer, else the commonest), and of several `answers` them all; of ten their `scores` too.

    ValueError if there is no answer.
    """
    told = (each["answer"] if isinstance(each, dict) else each for each in answers)
    given = [answer for each in told if each is not None and (answer := str(each).strip())]
    if not given and not chosen:
        raise ValueError("it has no answer")
    pair: dict[str, object] = {"q": question, "a": str(chosen) if chosen else Counter(given).most_common(1)[0][0]}
    if len(given) > 1:
        pair["answers"] = given
    if len(given) == PEOPLE:
        pair["scores"] = scores(given)
    return pair


def scores(answers: Sequence[str]) -> dict[str, float]:
    """How right each of ten people's answers is, the commonest first: VQA's accuracy (visualqa.org/evaluation.html).

    That is min(1, n / 3), averaged over the ten ways to leave one person out: min(1, 0.3 n) if n of ten say it.
    """
    return {answer: round(min(1.0, 0.3 * count), 1) for answer, count in Counter(answers).most_common()}
