"""The tokenizer and the answers of a run: kept from its beginning, given by the user, or found in the training data."""

from __future__ import annotations

import hashlib
import json
import os
from importlib import metadata
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory

import numpy as np
import torch
from torch import nn

from vlscale.data import answers as answer_data
from vlscale.data import text as text_data
from vlscale.data import words as word_data
from vlscale.data.phrases import FEW, every_text, measure_cut, spread
from vlscale.data.samples import every_answer
from vlscale.data.shards import Shards, cache_folder
from vlscale.data.text import Tokenizer
from vlscale.data.views import Views
from vlscale.errors import ConfigError, DataError
from vlscale.options import TextConfig
from vlscale.types import Inputs, Marks

TOKENIZER = "tokenizer.json"  # these two lie in the run folder
ANSWERS = "answers.txt"
MOST_SAMPLES = 50_000  # whose texts are enough for a small vocabulary
LOOKED_AT = 500  # samples whose texts tell how many are too long
_VERSION = 1  # of how a vocabulary is built


def find_tokenizer(
    text: TextConfig,
    began: Path,
    train: Shards,
    size: int,
    *,
    questions: bool,
    tags: bool,
    words: bool = False,
    vectors: str | None = None,
) -> str:
    """The text of the run's tokenizer.json.

    That of the folder `began`, where the run that goes on keeps it; else that of `text.vocab`; else a vocabulary of
    `size` entries or less, built from the captions of `train`, with its questions and tags where they are read. What
    was built stays in the cache folder, for the next run on the same data. `words`: the vocabulary is of whole words;
    where it is built, of those alone that the file `vectors` has. ConfigError if `text.vocab` cannot be read, or is
    not what the run began with.
    """
    kept = began / TOKENIZER
    given = None if text.vocab is None else text_data.read_tokenizer(text.vocab, text.cased, words)
    if kept.is_file():
        found = kept.read_text(encoding="utf-8")
        if given is not None:
            _check_still(f"text.vocab={text.vocab}", json.loads(given), kept, json.loads(found))
        return found
    if given is not None:
        return given
    named = vectors if words and _holds_words(vectors) else None
    options = (size, text.cased, text.kept_words, questions, tags, words, named)
    cached = cache_folder() / "vocabularies" / f"{_cache_key(train, options)}.json"
    try:
        if named is None:  # a file of vectors may have changed
            return cached.read_text(encoding="utf-8")
    except OSError:  # there is none, or another user's
        pass
    texts = every_text(train, spread(train, MOST_SAMPLES), text.kept_words, questions=questions, named=tags)
    if words:
        known = None if named is None else {word for word, _ in word_data.vectors_of(named)}
        built = word_data.word_level(word_data.build_words(texts, size, text.cased, known), text.cased)
    else:
        built = text_data.wordpiece(text_data.build_vocabulary(texts, size, text.cased), text.cased)
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


def _holds_words(vectors: str | None) -> bool:
    """Whether a file of word vectors tells the words; a table (.npy) does not."""
    return vectors is not None and Path(vectors).suffix != ".npy"


@torch.no_grad()
def fill_words(table: nn.Embedding, tokenizer: Tokenizer, vectors: str) -> str:
    """Start a table [V, D] of word vectors from the file `vectors` (key `init.text`); returns what was done.

    Of a file with words each word gets its own; one without, and padding, is 0. A .npy holds a table [V, D] in the
    order of the ids, or of all but padding's.

    Raises:
        ConfigError: another width or number, or a file that knows less than half of the words.
    """
    rows = tokenizer.vocab_size
    if not _holds_words(vectors):
        return _copy_table(table, rows, vectors)
    ids = {tokenizer.token(i): i for i in range(1, rows)}
    found = dict(word_data.vectors_of(vectors, ids))
    if 2 * len(found) < len(ids):
        raise ConfigError(
            f"init.text={vectors} has vectors for {len(found)} of the vocabulary's {len(ids)} words; give the vectors "
            f"of this language, cased as text.cased says"
        )
    width = len(next(iter(found.values())))
    if width != table.embedding_dim:
        raise ConfigError(
            f"init.text={vectors} holds vectors of {width} numbers, but family.word_width={table.embedding_dim}; "
            f"write family.word_width={width}"
        )
    table.weight.zero_()
    for word, vector in found.items():
        table.weight[ids[word]] = torch.from_numpy(vector)
    return f"{len(found)} of {len(ids)} words start from {vectors}" + (
        "" if len(found) == len(ids) else "; the others are 0, as padding is"
    )


def _copy_table(table: nn.Embedding, rows: int, vectors: str) -> str:
    try:
        given = np.load(vectors, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"init.text={vectors} cannot be read as an array ({error}); give a .npy of [V, D]") from None
    if given.ndim != 2 or given.shape[1] != table.embedding_dim or len(given) not in (rows, rows - 1):
        raise ConfigError(
            f"init.text={vectors} holds an array {given.shape}, but the vocabulary has {rows - 1} words and padding, "
            f"and family.word_width={table.embedding_dim}; give their vectors in the vocabulary's order"
        )
    first = rows - len(given)  # 1: padding is left out
    table.weight.zero_()
    table.weight[first : first + len(given)] = torch.from_numpy(given.astype(np.float32))
    return f"{len(given)} word vectors start from {vectors}"


def check_marks(tokenizer: Tokenizer, marks: Marks | None) -> None:
    """ConfigError unless the vocabulary numbers what a family puts into its sequences itself as the family does."""
    if marks is None:
        return
    for name in ("cls", "sep", "mask"):
        known, given = getattr(tokenizer, name), getattr(marks, name)
        if known != given:
            told = "has none" if known is None else f"has it at {known}; write family.{name}={known}"
            raise ConfigError(f"family.{name} is {given}, but the vocabulary {told}")
    if marks.video_start < tokenizer.vocab_size and marks.video_start in tokenizer.ordinary:
        raise ConfigError(
            f"family.video_start is {marks.video_start}, in the vocabulary '{tokenizer.token(marks.video_start)}'; "
            f"write an id that no word has, such as {tokenizer.vocab_size} with family.vocab above it"
        )


def check_tokenizer(tokenizer: Tokenizer, size: int, views: Views) -> None:
    """ConfigError if it has more tokens than the model's `size`, or cannot mask as the views ask."""
    if tokenizer.vocab_size > size:
        raise ConfigError(
            f"the vocabulary has {tokenizer.vocab_size} entries, but family.vocab={size}; "
            f"write family.vocab={tokenizer.vocab_size}"
        )
    for view in views.text.values():
        for operation in (view.mask_tokens, view.write):
            if operation is not None:
                operation.check(tokenizer)


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
