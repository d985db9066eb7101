"""Answers of questions as classes: which count, and how they are written."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from vlscale.errors import ConfigError

# LXMERT (src/pretrain/qa_answer_table.py): numbers in figures, one spelling of grey
_WORDS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5",
    "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10", "grey": "gray",
}  # fmt: skip
_ARTICLES = ("a ", "an ", "the ")


def normal_answer(answer: str) -> str:
    """Lower case, without a full stop at the end or an article at the start, numbers in figures."""
    text = answer.strip().lower().removesuffix(".").strip()
    text = next((text.removeprefix(article) for article in _ARTICLES if text.startswith(article)), text)
    return _WORDS.get(text, text)


def common_answers(answers: Iterable[str], most: int) -> list[str]:
    """The `most` commonest normal answers, the commonest first; ties by the alphabet."""
    counts = Counter(map(normal_answer, answers))
    return sorted(counts, key=lambda answer: (-counts[answer], answer))[:most]


def read_answers(path: Path) -> list[str]:
    """The answers of a file, one a line or a JSON list (of strings, or as LXMERT's all_ans.json of {"ans": ...}).

    ConfigError if it cannot be read.
    """
    try:
        text = path.expanduser().read_text(encoding="utf-8")
        listed = json.loads(text) if path.suffix == ".json" else text.splitlines()
        named = [each["ans"] if isinstance(each, dict) else each for each in listed]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"text.answers={path} cannot be read ({error}); write a file with one answer a line"
        ) from error
    return list(dict.fromkeys(normal_answer(str(each)) for each in named))
