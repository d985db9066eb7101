"""Captions to token ids: ALBEF's clean-up, WordPiece vocabularies, and BERT's uncased tokenizer."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlscale.errors import ConfigError, did_you_mean
from vlscale.types import Inputs

Ids = NDArray[np.int64]  # [L] token ids
Flags = NDArray[np.bool_]

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MAX_LETTERS = 1000  # distinct characters of a vocabulary; rarer ones become [UNK]
# English words of grammar rather than of meaning. Words that say where a thing is (behind, under) are left out, for
# they name what a picture shows.
_FUNCTION_WORDS = """
a an the this that these those some any each every either neither both all no none such other another
i me my mine myself we us our ours ourselves you your yours yourself yourselves he him his himself she her hers
herself it its itself they them their theirs themselves who whom whose which what someone something anyone anything
everyone everything nobody nothing
of in on at by for with from to into onto upon about during before after despite except since until till via per as
than like and or but nor so yet if then else because although though while whereas whether when where why how
be is am are was were been being do does did done doing have has had having can could may might must shall should
will would not there here just very too also only even again still more most much less least
s t d ll m re ve isn aren wasn weren don doesn didn hasn haven hadn won wouldn couldn shouldn
"""
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())
_UNUSED = re.compile(r"\[unused\d+\]")
_CLEAN_UP = str.maketrans({**dict.fromkeys(",.'!?\"()*#:;~"), "-": " ", "/": " "})


def clean_caption(text: str, max_words: int) -> str:
    """ALBEF's clean-up (`pre_caption` in its dataset/utils.py): lower case, no punctuation, first words.

    `max_words` = 0 keeps every word. The result is empty if nothing but punctuation was there.
    """
    words = text.lower().translate(_CLEAN_UP).replace("<person>", "person").split()
    return " ".join(words[:max_words] if max_words else words)


def build_vocabulary(captions: Iterable[str], size: int) -> list[str]:
    """A lower-case WordPiece vocabulary of `size` entries or less, special tokens first ([PAD] is 0).

    The same captions in any order give the same vocabulary. The letters are always in it, even if they alone
    make it larger than `size`. ConfigError if `size` cannot hold more than the special tokens.
    """
    if size <= len(SPECIAL_TOKENS):
        raise ConfigError(f"a vocabulary of {size} holds no words; write a size above {len(SPECIAL_TOKENS)}")
    from tokenizers import Tokenizer as Pipeline
    from tokenizers import models, normalizers, pre_tokenizers, trainers

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    pipeline = Pipeline(models.WordPiece(unk_token="[UNK]"))
    pipeline.normalizer = normalizers.BertNormalizer(lowercase=True)
    pipeline.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    texts = list(captions)
    first, inner = _letters(texts, pipeline)
    trainer = trainers.WordPieceTrainer(
        vocab_size=size,
        # tokenizers numbers inner letters by chance and breaks ties by number: so number them beforehand
        special_tokens=[*SPECIAL_TOKENS, *first, *(f"##{letter}" for letter in inner)],
        limit_alphabet=MAX_LETTERS,
        initial_alphabet=first,
        show_progress=False,
    )
    pipeline.train_from_iterator(texts, trainer)
    ids: dict[str, int] = pipeline.get_vocab()
    return sorted(ids, key=lambda token: ids[token])


def _letters(texts: Iterable[str], pipeline: Any) -> tuple[list[str], list[str]]:
    """The commonest letters, and those of them that stand behind another in a word; both sorted."""
    counts: Counter[str] = Counter()
    inner: set[str] = set()
    for chunk, times in Counter(chunk for text in texts for chunk in text.split()).items():
        normal = pipeline.normalizer.normalize_str(chunk)
        for word, _ in pipeline.pre_tokenizer.pre_tokenize_str(normal):
            counts.update(dict.fromkeys(word, times))
            inner.update(word[1:])
    common = sorted(counts, key=lambda letter: (-counts[letter], letter))[:MAX_LETTERS]
    return sorted(common), sorted(inner.intersection(common))


def write_vocabulary(tokens: Iterable[str], path: Path) -> None:
    """Write `vocab.txt`, one token per line, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text("".join(f"{token}\n" for token in tokens), encoding="utf-8")
    os.replace(scratch, path)


class Tokenizer:
    """BERT's uncased WordPiece (transformers' BertTokenizer); [SEP] only where the family wants it."""

    def __init__(self, vocab: str | Path, inputs: Inputs) -> None:
        """`vocab` is a vocab.txt or the folder that holds one; `inputs` tells the length and the separator.

        ConfigError if there is no such file or if it lacks a special token.
        """
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else it warns in every forked worker
        from transformers import BertTokenizer  # a second to import: not before it is needed

        tokens = _read_vocabulary(find_vocabulary(Path(vocab).expanduser()))
        self._tokenizer: Any = BertTokenizer(vocab=tokens).backend_tokenizer
        self.length = inputs.text_length
        self.separator = inputs.separator
        self.vocab_size = len(tokens)
        self.pad, self.unk = tokens["[PAD]"], tokens["[UNK]"]
        self.cls: int | None = tokens["[CLS]"]
        self.sep: int | None = tokens["[SEP]"]
        self.mask: int | None = tokens["[MASK]"]

    @cached_property
    def continues(self) -> Flags:
        """[V] pieces that go on with the word before them."""
        return np.array([token.startswith("##") for token in self._tokens()])

    @cached_property
    def function_words(self) -> Flags:
        """[V] words of `FUNCTION_WORDS`, tokens without a letter or digit, and special tokens."""
        special = set(SPECIAL_TOKENS)
        return np.array(
            [
                token in special or token.lower() in FUNCTION_WORDS or not any(letter.isalnum() for letter in token)
                for token in self._tokens()
            ]
        )

    @cached_property
    def ordinary(self) -> Ids:
        """[W] the ids that stand for text: neither special nor `[unused7]`."""
        special = set(SPECIAL_TOKENS)
        kept = [i for i, token in enumerate(self._tokens()) if token not in special and not _UNUSED.fullmatch(token)]
        return np.array(kept, dtype=np.int64)

    def _tokens(self) -> list[str]:
        return [self.token(i) for i in range(self.vocab_size)]

    def encode(self, caption: str) -> Ids:
        """int64 [L <= length]: [CLS], as many tokens as fit, and [SEP] where the family wants it."""
        room = self.length - 1 - self.separator
        ids = self._tokenizer.encode(caption, add_special_tokens=False).ids[:room]
        return np.array([self.cls, *ids, *([self.sep] if self.separator else [])], dtype=np.int64)

    def token(self, i: int) -> str:
        """The token of id `i`."""
        return str(self._tokenizer.id_to_token(i))

    def decode(self, ids: Sequence[int]) -> str:
        """The words that the ids stand for, special tokens left out."""
        special = {self.pad, self.cls, self.sep}
        return " ".join(self.token(i) for i in ids if i not in special).replace(" ##", "")


def find_vocabulary(path: Path) -> Path:
    """The vocab.txt that `path` is or holds; ConfigError if there is none."""
    file = path / "vocab.txt" if path.is_dir() else path
    if file.is_file():
        return file
    folder = file.parent
    there = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    near = did_you_mean(file.name, there)
    raise ConfigError(
        f"no vocabulary at '{file}'; write the path of a vocab.txt, or of the folder that holds it"
        + (near if near.startswith("; did") else "")
    )


def _read_vocabulary(file: Path) -> dict[str, int]:
    """{token: id}, the id being the line. ConfigError if it is no vocabulary of a BERT."""
    try:
        lines = file.read_text(encoding="utf-8").rstrip("\n").split("\n")
    except UnicodeDecodeError as error:
        reason = f"vocabulary {file} is not UTF-8 text; write the path of a BERT vocab.txt"
        raise ConfigError(reason) from error
    tokens = {token: i for i, token in enumerate(lines)}
    missing = [name for name in SPECIAL_TOKENS if name not in tokens]
    if missing:
        raise ConfigError(f"vocabulary {file} lacks {', '.join(missing)}; write the path of a BERT vocab.txt")
    if len(tokens) != len(lines):
        twice = next(token for i, token in enumerate(lines) if tokens[token] != i)
        raise ConfigError(f"vocabulary {file} holds '{twice}' twice; every line is one token of its own")
    return tokens
