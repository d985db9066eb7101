"""Whole words as tokens, and their vectors from published files: what the dual encoders of video read.

A word is a run of letters, digits, underscores and apostrophes; one that the vocabulary lacks is dropped. Padding is
0, word i of the vocabulary (from 0) has id i + 1.
"""

from __future__ import annotations

import gzip
import os
import re
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from vlscale.errors import ConfigError

PATTERN = r"[\w']+"
PAD = "[PAD]"
MOST_LETTERS = 2000  # bytes of a word in a file of vectors; GoogleNews's longest are near 100
Vectors = NDArray[np.float32]


def words_of(text: str) -> list[str]:
    """The words of a text, in its own case."""
    return re.findall(PATTERN, text)


def build_words(captions: Iterable[str], size: int, cased: bool, known: Collection[str] | None = None) -> list[str]:
    """The commonest words of the captions, `size` - 1 or less, the same for captions in any order.

    Those of `known` alone, where it is given. ConfigError if there are none.
    """
    counts: Counter[str] = Counter()
    for caption in captions:
        counts.update(words_of(caption if cased else caption.lower()))
    if known is not None:
        counts = Counter({word: times for word, times in counts.items() if word in known})
    found = sorted(counts, key=lambda word: (-counts[word], word))[: size - 1]
    if not found:
        where = " that init.text has a vector for; see whether both are cased alike (text.cased)" if known else ""
        raise ConfigError(f"the training captions hold no word{where}")
    return found


def word_level(words: Iterable[str], cased: bool) -> str:
    """The tokenizer of the words in order, as the text of a tokenizer.json."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    ids = {PAD: 0} | {word: i for i, word in enumerate(words, start=1)}
    pipeline = Tokenizer(models.WordLevel(ids, unk_token=PAD))  # unknown = padding: `Tokenizer` drops it
    if not cased:
        pipeline.normalizer = normalizers.Lowercase()
    pipeline.pre_tokenizer = pre_tokenizers.Split(Regex(PATTERN), behavior="removed", invert=True)
    pipeline.add_special_tokens([PAD])
    pipeline.enable_padding(pad_id=0, pad_token=PAD)
    return str(pipeline.to_str())


def read_words(file: Path, cased: bool) -> list[str]:
    """The words of a file, one a line, or of a .npy with an array of them (MIL-NCE's s3d_dict.npy).

    ConfigError if it cannot be read, or holds a word twice or none.
    """
    try:
        if file.suffix == ".npy":
            words = [str(word) for word in np.load(file, allow_pickle=False)]
        else:
            words = [line for line in file.read_text(encoding="utf-8").split("\n") if line]
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"text.vocab={file} cannot be read as a list of words ({error}); write one word a line"
        ) from None
    if not cased:
        words = [word.lower() for word in words]
    seen = Counter(words)
    twice = next((word for word in words if seen[word] > 1), None)
    if twice is not None:
        hint = "" if cased else ", capital letters aside: write text.cased=true"
        raise ConfigError(f"text.vocab={file} holds '{twice}' twice{hint}; every line is one word of its own")
    if not words:
        raise ConfigError(f"text.vocab={file} holds no word; write one word a line")
    return words


def vectors_of(path: str | Path, wanted: Collection[str] | None = None) -> Iterator[tuple[str, Vectors]]:
    """(word, its vector [D]) of a file in word2vec's binary (.bin) or text layout (.txt, .vec; GloVe's too), plain or
    .gz: those `wanted`, in the file's order.

    Raises:
        ConfigError: it is missing, or is not laid out so.
    """
    file = Path(path).expanduser()
    binary = ".bin" in file.suffixes
    opened = gzip.open if file.suffix == ".gz" else open
    try:
        with opened(file, "rb") as stream:
            yield from (_binary if binary else _lines)(stream, wanted)  # type: ignore[arg-type]
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise ConfigError(
            f"init.text={file} cannot be read as word vectors ({error}); give a word2vec file (.bin, .txt or .vec, "
            f"perhaps .gz), or a table .npy in the order of text.vocab"
        ) from None


def _binary(stream: IO[bytes], wanted: Collection[str] | None) -> Iterator[tuple[str, Vectors]]:
    header = stream.readline(100).split()
    if len(header) != 2 or not all(number.isdigit() for number in header):
        raise ValueError("its first line is not 'words dimensions'")
    count, width = (int(number) for number in header)
    for number in range(count):
        word = bytearray()
        while (letter := stream.read(1)) != b" ":
            if not letter or len(word) > MOST_LETTERS:
                raise ValueError(f"it is cut off, or no longer words and vectors, after {number} of {count} words")
            if letter != b"\n":  # some writers end each vector so
                word += letter
        data = stream.read(4 * width)
        if len(data) < 4 * width:
            raise ValueError(f"it is cut off after {number} of {count} words")
        name = word.decode("utf-8", errors="replace")
        if wanted is None or name in wanted:
            yield name, np.frombuffer(data, dtype="<f4").astype(np.float32)


def _lines(stream: IO[bytes], wanted: Collection[str] | None) -> Iterator[tuple[str, Vectors]]:
    width = 0
    for number, line in enumerate(stream, start=1):
        word, *numbers = line.decode("utf-8").rstrip("\n ").rsplit(" ", width or -1)  # GloVe's "at name@domain.com"
        if number == 1 and len(numbers) == 1:
            continue  # word2vec's 'words dimensions'
        width = width or len(numbers)
        if not numbers or len(numbers) != width:
            raise ValueError(f"line {number} has {len(numbers)} numbers, not {width}")
        if wanted is None or word in wanted:
            yield word, np.array(numbers, dtype=np.float32)
