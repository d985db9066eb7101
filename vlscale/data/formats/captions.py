"""Files of captions and questions in the forms that people have, looked up by a picture's name."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from vlscale.data.formats.recognise import fault
from vlscale.errors import DataError

ENDS = re.compile(r"\.(jpe?g|png|webp|gif|npz|npy|txt|json)$", re.IGNORECASE)
NAME = ("file_name", "filename", "file", "image", "img_fname", "image_id", "img_id", "picture", "key", "id")
TEXT = ("caption", "captions", "text", "sentence", "sentences", "raw")
QUESTION, ANSWER = ("question", "q"), ("answer", "a", "multiple_choice_answer")

Record = Mapping[str, Any]


class Texts:
    """Captions and questions by picture."""

    def __init__(self) -> None:
        self._captions: dict[str, list[str]] = {}
        self._questions: dict[str, list[dict[str, str]]] = {}
        self._by_base: dict[str, str | None] = {}  # last part of a name -> the name, None where two share it
        self._count = 0

    def add(
        self, name: object, captions: Iterable[object] = (), questions: Iterable[tuple[object, object]] = ()
    ) -> None:
        """Texts of the picture `name`: a path, a file name or a number. Empty ones are passed over."""
        key = stem(str(name))
        if key not in self._captions:
            base = key.rsplit("/", 1)[-1]
            self._by_base[base] = key if base not in self._by_base else None
        told = [caption.strip() for caption in captions if isinstance(caption, str) and caption.strip()]
        pairs = [{"q": str(q).strip(), "a": str(a).strip()} for q, a in questions if q and a is not None]
        asked = [pair for pair in pairs if all(pair.values())]
        self._captions.setdefault(key, []).extend(told)
        self._questions.setdefault(key, []).extend(asked)
        self._count += len(told) + len(asked)

    def __len__(self) -> int:
        """How many texts there are."""
        return self._count

    def of(self, name: str) -> dict[str, object]:
        """`caption` (a string, or a list of several) and `qa` of a picture; empty if there are none.

        Found by its name, by the end of its path where that is one picture's alone, or by COCO's number:
        COCO_val2014_000000000042 and 000000000042 are 42.
        """
        found = self.find(name)
        if found is None:
            return {}
        captions, questions = self._captions[found], self._questions[found]
        caption = {"caption": captions if len(captions) > 1 else captions[0]} if captions else {}
        return {**caption, **({"qa": questions} if questions else {})}

    def names(self) -> Iterable[str]:
        """Of all pictures that have texts."""
        return self._captions

    def find(self, name: str) -> str | None:
        """The one of `names` that is meant by a picture's name, if there is one (see `of`)."""
        key = stem(name)
        base = key.rsplit("/", 1)[-1]
        near = self._by_base.get(base) or key
        if not (f"/{near}".endswith(f"/{key}") or f"/{key}".endswith(f"/{near}")):
            near = key  # the same name in another folder
        digits = re.search(r"(?:^|_)(\d{12})$", base)
        meant = (key, near, str(int(digits[1])) if digits else key)
        return next((each for each in meant if each in self._captions), None)


def stem(name: str) -> str:
    """A picture's name without the end that tells its kind."""
    return ENDS.sub("", name.strip())


def read_texts(paths: Sequence[Path]) -> Texts:
    """The texts of files: json (COCO's, Karpathy's, LXMERT's, a mapping, a list), jsonl, csv, tsv, or text files
    of `picture<tab>caption` lines. DataError if one cannot be read, or if there is no text in it.
    """
    texts = Texts()
    for path in paths:
        before = len(texts)
        _read(texts, path)
        if len(texts) == before:
            raise DataError(f"captions {path} hold no text with a picture's name; {_FORMS}")
    return texts


def _read(texts: Texts, path: Path) -> None:
    try:
        if path.suffix == ".json":
            data = path.read_text(encoding="utf-8")
            _from_json(texts, json.loads(data))
        elif path.suffix == ".jsonl":
            lines = path.read_text(encoding="utf-8").splitlines()
            _from_records(texts, (json.loads(line) for line in lines if line.strip()))
        else:
            with open(path, encoding="utf-8", newline="") as file:
                _from_table(texts, file, "," if path.suffix == ".csv" else "\t")
    except json.JSONDecodeError as error:
        raise DataError(f"captions {path} cannot be read ({fault(error)})") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"captions {path} cannot be read ({error})") from error
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise DataError(f"captions {path} have a form that is not known ({error!r}); {_FORMS}") from error


_FORMS = f"write records with a name ({', '.join(NAME[:4])}) and a text ({', '.join(TEXT[:3])})"


def _from_json(texts: Texts, data: Any) -> None:
    if isinstance(data, list):
        _from_records(texts, data)
    elif "annotations" in data:
        _from_coco(texts, data)
    elif "images" in data:  # Karpathy's dataset_coco.json
        for image in data["images"]:
            texts.add(image["filename"], [sentence["raw"] for sentence in image["sentences"]])
    else:
        for name, value in data.items():
            _from_records(
                texts, [{**value, "key": name}] if isinstance(value, dict) else [{"key": name, "text": value}]
            )


def _from_coco(texts: Texts, data: Record) -> None:
    """COCO's captions_*.json, and VQA's annotations where the question stands beside the answer."""
    names = {image["id"]: image.get("file_name", image["id"]) for image in data.get("images", [])}
    _from_records(
        texts,
        ({**each, "key": names.get(each["image_id"], each["image_id"])} for each in data["annotations"]),
        ("key",),
    )


def _from_records(texts: Texts, records: Iterable[Record], names: tuple[str, ...] = NAME) -> None:
    for record in records:
        name = _first(record, names)
        if name is None:
            continue
        if "sentf" in record:
            texts.add(name, *_lxmert(record))
            continue
        value = _first(record, TEXT)
        listed = value if isinstance(value, list) else [value]
        captions = [each["raw"] if isinstance(each, dict) else each for each in listed]
        asked = (_first(record, QUESTION), _first(record, ANSWER))
        pairs = [(pair["q"], pair["a"]) for pair in record.get("qa", [])]
        texts.add(name, captions, [*pairs, *([asked] if asked[0] else [])])


def _lxmert(record: Record) -> tuple[list[str], list[tuple[str, str | None]]]:
    """(captions, questions) of LXMERT's `sentf` and `labelf`: a source with labels is one of questions.

    The answer is the best scored one; a question without an answer is left out.
    """
    captions: list[str] = []
    questions: list[tuple[str, str | None]] = []
    for source, sentences in record["sentf"].items():
        labels = record.get("labelf", {}).get(source)
        if labels is None:
            captions += sentences
        else:
            questions += [
                (sentence, max(label, key=label.get) if label else None)
                for sentence, label in zip(sentences, labels, strict=True)
            ]
    return captions, questions


def _first(record: Record, names: tuple[str, ...]) -> Any:
    return next((record[name] for name in names if record.get(name) is not None), None)


def _from_table(texts: Texts, lines: Iterable[str], separator: str) -> None:
    """With a heading that names its columns, or without: picture, caption; or OSCAR's corpus (coco_7, coco_7, text)."""
    quoted = separator == ","  # in a TSV a quotation mark is a letter
    rows = csv.reader(lines, delimiter=separator, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE)
    first = next(rows, [])
    heading = [cell.strip().lower() for cell in first]
    if set(heading) & set(NAME) and set(heading) & {*TEXT, *QUESTION}:
        _from_records(texts, (dict(zip(heading, row, strict=False)) for row in rows))
        return
    for row in chain([first], rows):
        if len(row) == 3 and row[0].split("_")[0] == row[1].split("_")[0]:
            if "qa" not in row[1].split("_"):  # a question, whose answer is in another file
                texts.add(row[0].rsplit("_", 1)[-1], [row[2]])
        elif len(row) >= 2:
            texts.add(re.sub(r"#\w+$", "", row[0]), [row[1]])  # Flickr's `1000.jpg#0`
