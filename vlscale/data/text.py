"""Captions to token ids: ALBEF's clean-up, WordPiece vocabularies built from captions, and tokenizers from files."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vlscale.data.words import read_words, word_level
from vlscale.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from vlscale.types import Inputs

Ids = NDArray[np.int64]  # [L] token ids
Flags = NDArray[np.bool_]

VOCABULARIES = ("vocab.txt", "tokenizer.json", "vocab.json")  # what a folder may hold, best first
CLIP_VOCABULARY, CLIP_MERGES = VOCABULARIES[2], "merges.txt"
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
AS_IT_IS = -1  # for `max_words`: no clean-up
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
MASK_TOKENS = ("[MASK]", "<mask>")
PAD_TOKENS = ("[PAD]", "<pad>")
MANY_CAPITALS = 0.01  # share of tokens with capital letters from which a vocabulary is a cased one
_STARTS_WORD = ("\u2581", "\u0120")  # the blank before a word in sentencepiece and in byte-level vocabularies
_ENDS_WORD = "</w>"  # in CLIP's
_UNUSED = re.compile(r"\[unused\d+\]")
_CLEAN_UP = str.maketrans({**dict.fromkeys(",.'!?\"()*#:;~"), "-": " ", "/": " "})


def clean_text(text: str, max_words: int) -> str:
    """ALBEF's clean-up (`pre_caption` in its dataset/utils.py), all words of it: lower case, no punctuation.

    `max_words` = `AS_IT_IS` leaves the text alone but for blanks around it. The result is empty if nothing but
    punctuation was there.
    """
    if max_words == AS_IT_IS:
        return text.strip()
    return " ".join(text.lower().translate(_CLEAN_UP).replace("<person>", "person").split())


def first_words(text: str, max_words: int) -> str:
    """The first `max_words` words of a clean text; all of them where it is 0 or `AS_IT_IS`."""
    return " ".join(text.split(" ", max_words)[:max_words]) if max_words > 0 else text


def build_vocabulary(captions: Iterable[str], size: int, cased: bool = False) -> list[str]:
    """A WordPiece vocabulary, lower-case if not `cased`, of `size` entries or less, special tokens first ([PAD] is 0).

    The same captions in any order give the same vocabulary. The letters are always in it, even if they alone
    make it larger than `size`. ConfigError if `size` cannot hold more than the special tokens.
    """
    if size <= len(SPECIAL_TOKENS):
        raise ConfigError(f"a vocabulary of {size} holds no words; write a size above {len(SPECIAL_TOKENS)}")
    from tokenizers import Tokenizer as Pipeline
    from tokenizers import models, normalizers, pre_tokenizers, trainers

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    pipeline = Pipeline(models.WordPiece(unk_token="[UNK]"))
    pipeline.normalizer = normalizers.BertNormalizer(lowercase=not cased)
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


class Fitted(NamedTuple):
    """A text that has been made to fit."""

    ids: Ids  # [L]
    lost: int  # words behind the last token that fitted; one that is cut in two counts


class Tokenizer:
    """A tokenizer of Hugging Face's library, and what the family wants of it.

    None is a token that it does not have. What it puts before and after a text are `cls` and `sep`, whatever their
    names: CLIP's start and end tokens, T5's `</s>`.
    """

    def __init__(self, vocab: str | Path, inputs: Inputs, cased: bool = False) -> None:
        """`vocab` and `cased` as in `read_tokenizer`; `inputs` tells the length and whether the end token is wanted.

        ConfigError if there is no such file, if it does not serve, or if it lacks an end token that is wanted.
        """
        from tokenizers import Tokenizer as Pipeline

        self._pipeline: Any = Pipeline.from_str(read_tokenizer(vocab, cased))
        self.length = inputs.text_length
        self.separator = inputs.separator
        self.vocab_size: int = 1 + max(self._pipeline.get_vocab().values())
        before, after = _around(self._pipeline)
        self.cls: int | None = before[0] if before else None
        self.sep: int | None = after[0] if after else None
        self.mask: int | None = self._first(MASK_TOKENS)
        unk = _unknown(self._pipeline)
        self.unk: int | None = None if unk in (self.cls, self.sep) else unk  # CLIP's spells every byte
        padding = self._pipeline.padding or {}
        known = (padding.get("pad_id"), self._first(PAD_TOKENS), self.sep)
        self.pad: int = next((i for i in known if i is not None), 0)
        wordwise = _model(self._pipeline)["type"] == "WordLevel"
        self.drops = wordwise and self.unk is not None and self.unk == padding.get("pad_id")  # unknown words
        if self.separator and self.sep is None:
            raise ConfigError(
                f"the family reads texts that end in a token of their own, and the tokenizer of {vocab} adds none; "
                f"give a text.vocab whose tokenizer ends a text in [SEP], </s> or the like"
            )

    def encode(self, text: str) -> Ids:
        """int64 [L <= length]: the start token, as many tokens as fit, and the end token where the family wants it."""
        return self.fit(text).ids

    def fit(self, text: str) -> Fitted:
        """What `encode` gives, and how many words it had no room for."""
        start = [] if self.cls is None else [self.cls]
        end = [self.sep] if self.separator else []
        room = self.length - len(start) - len(end)
        ids = self._tokens_of(text)
        lost = self.count_words(ids[room:]) if len(ids) > room else 0
        return Fitted(np.array([*start, *ids[:room], *end], dtype=np.int64), lost)

    def needed(self, text: str) -> int:
        """The length at which the whole text fits."""
        return len(self._tokens_of(text)) + (self.cls is not None) + self.separator

    def count_words(self, ids: Iterable[int]) -> int:
        """How many words the ids are, or are a part of."""
        return len(self.decode(ids).split())

    def _tokens_of(self, text: str) -> list[int]:
        # `encode` also keeps the places of tokens in the text, which takes a fifth longer; a batch is no faster
        found: list[int] = self._pipeline.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return [i for i in found if i != self.unk] if self.drops else found

    def known(self, text: str) -> Flags:
        """Which tokens of a text the vocabulary knows, [L], those that are dropped counted."""
        ids = self._pipeline.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return np.array([i != self.unk for i in ids], dtype=np.bool_)

    def token(self, i: int) -> str:
        """The token of id `i`."""
        return str(self._pipeline.id_to_token(i))

    def decode(self, ids: Iterable[int]) -> str:
        """The words that the ids stand for, padding, start and end tokens left out."""
        left_out = {self.pad, self.cls, self.sep}
        text = self._pipeline.decode([int(i) for i in ids if i not in left_out], skip_special_tokens=False)
        return str(text).replace(_ENDS_WORD, " ").strip()

    @cached_property
    def continues(self) -> Flags:
        """[V] pieces that go on with the word before them. ConfigError if the tokenizer marks the ends of words."""
        prefix = _model(self._pipeline).get("continuing_subword_prefix")
        if prefix:
            return np.array([token.startswith(prefix) for token in self._tokens])
        starts: Flags = np.array([token.startswith(_STARTS_WORD) for token in self._tokens])
        if not starts.any():
            raise ConfigError(
                "mask_tokens.words: whole and content_only need to know where a word starts, and this tokenizer's "
                "pieces do not tell; write words: pieces and content_only: false"
            )
        return ~(starts | self._special)

    @cached_property
    def function_words(self) -> Flags:
        """[V] words of `FUNCTION_WORDS`, tokens without a letter or digit, and special tokens."""
        bare = [token.lstrip("".join(_STARTS_WORD)).lower() for token in self._tokens]
        flags = [word in FUNCTION_WORDS or not any(letter.isalnum() for letter in word) for word in bare]
        function_words: Flags = self._special | np.array(flags)
        return function_words

    @cached_property
    def ordinary(self) -> Ids:
        """[W] the ids that stand for text: neither special nor `[unused7]`."""
        unused = np.array([_UNUSED.fullmatch(token) is not None for token in self._tokens])
        return np.flatnonzero(~self._special & ~unused)

    @cached_property
    def _tokens(self) -> list[str]:
        return [self.token(i) for i in range(self.vocab_size)]

    @cached_property
    def _special(self) -> Flags:
        flags = np.zeros(self.vocab_size, dtype=np.bool_)
        flags[[i for i, token in self._pipeline.get_added_tokens_decoder().items() if token.special]] = True
        return flags

    def _first(self, names: Iterable[str]) -> int | None:
        found = (self._pipeline.token_to_id(name) for name in names)
        return next((i for i in found if i is not None), None)


def read_tokenizer(vocab: str | Path, cased: bool = False, words: bool = False) -> str:
    """The tokenizer that a file or folder holds, as the text of a tokenizer.json.

    Args:
        vocab: BERT's vocab.txt, a tokenizer.json, or a folder with one of them or with CLIP's vocab.json and
            merges.txt (bpe_simple_vocab_16e6 in transformers' files).
        cased: a vocab.txt tells capital letters from small ones (bert-base-cased).
        words: the file lists whole words (`data.words`), where it is no tokenizer.json.

    Raises:
        ConfigError: there is no such file, or it is not what its name says.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else it warns in every forked worker
    file = find_vocabulary(Path(vocab).expanduser())
    if file.name == CLIP_VOCABULARY:
        return _clip_tokenizer(file)
    if file.suffix == ".json":
        return _tokenizer_json(file)
    if words:
        return word_level(read_words(file, cased), cased)
    return wordpiece(_read_vocabulary(file, cased), cased)


def wordpiece(tokens: Iterable[str], cased: bool = False) -> str:
    """BERT's tokenizer (transformers' BertTokenizer) of the tokens in order, as the text of a tokenizer.json."""
    from transformers import BertTokenizer  # a second to import: not before it is needed

    ids = {token: i for i, token in enumerate(tokens)}
    return str(BertTokenizer(vocab=ids, do_lower_case=not cased).backend_tokenizer.to_str())


def find_vocabulary(path: Path) -> Path:
    """The file of `VOCABULARIES` that `path` is or holds; ConfigError if there is none."""
    found = [path / name for name in VOCABULARIES if (path / name).is_file()] if path.is_dir() else [path]
    if found and found[0].is_file():
        return found[0]
    file = path / VOCABULARIES[0] if path.is_dir() else path
    there = [entry.name for entry in file.parent.iterdir()] if file.parent.is_dir() else []
    near = did_you_mean(file.name, there)
    raise ConfigError(
        f"no vocabulary at '{file}'; write the path of a vocab.txt or tokenizer.json, or of a folder that holds one "
        f"of them or CLIP's vocab.json and merges.txt" + (near if near.startswith("; did") else "")
    )


def _read_vocabulary(file: Path, cased: bool) -> list[str]:
    """The tokens, one per line. ConfigError if it is no vocabulary of a BERT, or of the other case."""
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
    capitals = [token for token in lines if token != token.lower() and token not in SPECIAL_TOKENS]
    if cased != (len(capitals) > MANY_CAPITALS * len(lines)):
        has = f"words with capital letters, such as '{capitals[0]}'" if capitals and not cased else "lower-case words"
        raise ConfigError(f"vocabulary {file} holds {has}; write text.cased={str(not cased).lower()}")
    return lines


def _clip_tokenizer(file: Path) -> str:
    """CLIP's byte-level BPE (transformers' CLIPTokenizer); its authors pad with 0 (clip/clip.py, tokenize)."""
    from transformers import CLIPTokenizer

    merges = file.with_name(CLIP_MERGES)
    try:
        vocabulary = json.loads(file.read_text(encoding="utf-8"))
        pairs = merges.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise ConfigError(f"CLIP's tokenizer is {file} with {merges.name} beside it, and one cannot be read") from error
    if not isinstance(vocabulary, dict) or "<|startoftext|>" not in vocabulary:
        raise ConfigError(
            f"{file} is not CLIP's vocabulary; export the tokenizer as tokenizer.json, and name that file"
        )
    rules = [tuple(pair.split()) for pair in pairs if pair and not pair.startswith("#version")]
    pipeline = CLIPTokenizer(vocab=vocabulary, merges=rules).backend_tokenizer
    pipeline.enable_padding(pad_id=0, pad_token=pipeline.id_to_token(0))
    return str(pipeline.to_str())


def _tokenizer_json(file: Path) -> str:
    """Any fast tokenizer, at full length; its padding token is that of a tokenizer_config.json beside it."""
    from tokenizers import Tokenizer as Pipeline

    try:
        pipeline = Pipeline.from_file(str(file))
    except Exception as error:  # the library raises no other
        raise ConfigError(f"{file} is no tokenizer of the tokenizers library ({error}); export it anew") from error
    pipeline.no_truncation()
    name = _padding_name(file.with_name("tokenizer_config.json"))
    given = pipeline.padding or {}
    pad = pipeline.token_to_id(name) if name is not None else given.get("pad_id")
    pipeline.no_padding()  # of a fixed length
    if pad is not None:
        pipeline.enable_padding(pad_id=pad, pad_token=pipeline.id_to_token(pad))
    return str(pipeline.to_str())


def _padding_name(file: Path) -> str | None:
    if not file.is_file():
        return None
    token = json.loads(file.read_text(encoding="utf-8")).get("pad_token")
    name: str | None = token["content"] if isinstance(token, dict) else token
    return name


def _around(pipeline: Any) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts before and after a text."""
    bare = pipeline.encode("a", add_special_tokens=False).ids
    whole = pipeline.encode("a").ids
    start = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    return whole[:start], whole[start + len(bare) :]


def _model(pipeline: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(pipeline.to_str())["model"]
    return found


def _unknown(pipeline: Any) -> int | None:
    """The id of what the tokenizer cannot spell."""
    model = _model(pipeline)
    name = model.get("unk_token")
    found: int | None = model.get("unk_id") if name is None else pipeline.token_to_id(name)
    return found
