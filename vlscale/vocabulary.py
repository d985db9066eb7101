"""The tokenizer and the answers of a run: kept from its beginning, given by the user, or found in the training data."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

from vlscale.config import TextConfig
from vlscale.data import answers as answer_data
from vlscale.data import text as text_data
from vlscale.data.samples import every_answer, every_text
from vlscale.data.shards import Shards
from vlscale.data.text import Tokenizer
from vlscale.data.views import Views
from vlscale.errors import ConfigError, DataError
from vlscale.types import Inputs

TOKENIZER = "tokenizer.json"  # these two lie in the run folder
ANSWERS = "answers.txt"
MOST_CAPTIONS = 100_000  # enough for a small vocabulary


def find_tokenizer(text: TextConfig, began: Path, train: Shards, size: int, *, questions: bool, tags: bool) -> str:
    """The text of the run's tokenizer.json.

    That of the folder `began`, where the run that goes on keeps it; else that of `text.vocab`; else a vocabulary of
    `size` entries or less, built from the captions of `train`, with its questions and tags where they are read.
    ConfigError if `text.vocab` cannot be read, or is not what the run began with.
    """
    kept = began / TOKENIZER
    given = None if text.vocab is None else text_data.read_tokenizer(text.vocab, text.cased)
    if kept.is_file():
        found = kept.read_text(encoding="utf-8")
        if given is not None:
            _check_still(f"text.vocab={text.vocab}", json.loads(given), kept, json.loads(found))
        return found
    if given is not None:
        return given
    texts = every_text(train, questions, tags)
    cleaned = (text_data.clean_caption(each, text.kept_words) for each in texts)
    tokens = text_data.build_vocabulary(islice(cleaned, MOST_CAPTIONS), size, text.cased)
    return text_data.wordpiece(tokens, text.cased)


def find_answers(text: TextConfig, began: Path, train: Shards, most: int) -> str:
    """One answer a line: those of the run that goes on, of `text.answers`, or the `most` commonest of `train`.

    ConfigError if `text.answers` lists more than `most`, or is not what the run began with; DataError if no question
    of `train` has an answer.
    """
    kept = began / ANSWERS
    listed = None if text.answers is None else answer_data.read_answers(Path(text.answers))
    if kept.is_file():
        found = kept.read_text(encoding="utf-8")
        if listed is not None:
            _check_still(f"text.answers={text.answers}", listed, kept, found.splitlines())
        return found
    if listed is not None:
        if len(listed) > most:
            raise ConfigError(
                f"text.answers lists {len(listed)} answers, but the objective tells {most} apart; "
                f"write objectives.answer.answers={len(listed)}"
            )
        return "\n".join(listed)
    common = answer_data.common_answers(every_answer(train), most)
    if not common:
        raise DataError("views has pairs.answers, but data.train holds no question with an answer ('qa' of the json)")
    return "\n".join(common)


def _check_still(option: str, now: object, kept: Path, began: object) -> None:
    """ConfigError if the file that `option` names holds something else than when the run began."""
    if now != began:
        raise ConfigError(
            f"{option} does not hold what the run began with and keeps in {kept}; put the old file back, or go on "
            f"under another --out with --resume {kept.parent} {option.split('=')[0]}={kept}"
        )


def make_tokenizer(vocabulary: str, inputs: Inputs) -> Tokenizer:
    """The tokenizer whose tokenizer.json has the text `vocabulary`."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / TOKENIZER
        path.write_text(vocabulary, encoding="utf-8")
        return Tokenizer(path, inputs)


def check_tokenizer(tokenizer: Tokenizer, size: int, views: Views) -> None:
    """ConfigError if it has more tokens than the model's `size`, or cannot mask as the views ask."""
    if tokenizer.vocab_size > size:
        raise ConfigError(
            f"the vocabulary has {tokenizer.vocab_size} entries, but family.vocab={size}; "
            f"write family.vocab={tokenizer.vocab_size}"
        )
    for view in views.text.values():
        if view.mask_tokens is not None:
            view.mask_tokens.check(tokenizer)
