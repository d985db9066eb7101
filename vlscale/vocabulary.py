"""The tokenizer and the answers of a run: kept from its beginning, given by the user, or found in the training data."""

from __future__ import annotations

import hashlib
import json
import os
from importlib import metadata
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory

from vlscale.data import answers as answer_data
from vlscale.data import text as text_data
from vlscale.data.phrases import FEW, every_text, measure_cut, spread
from vlscale.data.samples import every_answer
from vlscale.data.shards import Shards, cache_folder
from vlscale.data.text import Tokenizer
from vlscale.data.views import Views
from vlscale.errors import ConfigError, DataError
from vlscale.options import TextConfig
from vlscale.types import Inputs

TOKENIZER = "tokenizer.json"  # these two lie in the run folder
ANSWERS = "answers.txt"
MOST_SAMPLES = 50_000  # whose texts are enough for a small vocabulary
LOOKED_AT = 500  # samples whose texts tell how many are too long
_VERSION = 1  # of how a vocabulary is built


def find_tokenizer(text: TextConfig, began: Path, train: Shards, size: int, *, questions: bool, tags: bool) -> str:
    """The text of the run's tokenizer.json.

    That of the folder `began`, where the run that goes on keeps it; else that of `text.vocab`; else a vocabulary of
    `size` entries or less, built from the captions of `train`, with its questions and tags where they are read. What
    was built stays in the cache folder, for the next run on the same data. ConfigError if `text.vocab` cannot be
    read, or is not what the run began with.
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
    options = (size, text.cased, text.kept_words, questions, tags)
    cached = cache_folder() / "vocabularies" / f"{_cache_key(train, options)}.json"
    try:
        return cached.read_text(encoding="utf-8")
    except OSError:  # there is none, or another user's
        pass
    texts = every_text(train, spread(train, MOST_SAMPLES), text.kept_words, questions=questions, named=tags)
    tokens = text_data.build_vocabulary(texts, size, text.cased)
    built = text_data.wordpiece(tokens, text.cased)
    _keep(cached, built)
    return built


def _cache_key(shards: Shards, options: tuple[object, ...]) -> str:
    """Tells the shards and their state, what is made of them, and what makes it."""
    libraries = [metadata.version(name) for name in ("tokenizers", "transformers")]
    told = [_VERSION, MOST_SAMPLES, libraries, shards.fingerprint(), shards.stamps(), options]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:32]


def _keep(file: Path, text: str) -> None:
    """Write whole or not at all; a cache folder that cannot be written only costs the next start."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile("w", dir=file.parent, delete=False, encoding="utf-8") as scratch:
            scratch.write(text)
        os.chmod(scratch.name, 0o644)  # a cache may be shared
        os.replace(scratch.name, file)
    except OSError:
        return


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


def warn_of_cut(tokenizer: Tokenizer, train: Shards, text: TextConfig, *, questions: bool) -> list[str]:
    """A sentence if more than `FEW` of the texts are too long for the clean-up or the family, else nothing."""
    cut = measure_cut(train, spread(train, LOOKED_AT), tokenizer, text.kept_words, questions)
    if cut.fraction <= FEW:
        return []
    now, then = [], []
    if 0 < text.kept_words < cut.words:
        now.append(f"text.max_words={text.max_words}")
        then.append(f"text.max_words={cut.words}")
    if tokenizer.length < cut.length:
        now.append(f"family.text_length={tokenizer.length}")
        then.append(f"family.text_length={cut.length}")
    return [
        f"{cut.fraction:.0%} of the training texts are cut by {' and '.join(now)}, which loses {cut.lost:.0%} of all "
        f"words; write {' '.join(then)} to keep {1 - FEW:.0%} of the texts whole"
    ]
