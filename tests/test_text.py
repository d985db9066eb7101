from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from tests.shard_files import INPUTS, WORDS, make_tokenizer
from vlscale.data.text import SPECIAL_TOKENS, Tokenizer, build_vocabulary, clean_caption, write_vocabulary
from vlscale.errors import ConfigError
from vlscale.types import Inputs


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A man, a plan; a canal: Panama!", "a man a plan a canal panama"),
        ("<Person>'s well-known T-shirt/hat", "persons well known t shirt hat"),
        ("  two\t\n  spaces  ", "two spaces"),
        ('"#1" (really?) *~', "1 really"),
        ("?!", ""),
    ],
)
def test_clean_up(caption: str, expected: str) -> None:
    assert clean_caption(caption, 30) == expected


def test_clean_up_keeps_the_first_words() -> None:
    caption = " ".join(str(n) for n in range(50))
    assert clean_caption(caption, 30).split() == [str(n) for n in range(30)]
    assert len(clean_caption(caption, 0).split()) == 50


def test_encode(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path)
    ids = tokenizer.encode("A Red thing number 7 zebra")
    assert [tokenizer.token(i) for i in ids] == ["[CLS]", "a", "red", "thing", "number", "7", "[UNK]"]
    assert ids.dtype == "int64"
    assert len(tokenizer.encode("a " * 50)) == 12
    assert (tokenizer.pad, tokenizer.unk, tokenizer.cls, tokenizer.sep, tokenizer.mask) == (0, 1, 2, 3, 4)
    assert tokenizer.vocab_size == len(WORDS) + 5
    assert pickle.loads(pickle.dumps(tokenizer)).encode("a red").tolist() == tokenizer.encode("a red").tolist()


def test_the_separator_survives_truncation(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path, Inputs(image_size=0, text_length=4, separator=True))
    assert [tokenizer.token(i) for i in tokenizer.encode("a red thing")] == ["[CLS]", "a", "red", "[SEP]"]
    assert [tokenizer.token(i) for i in tokenizer.encode("a")] == ["[CLS]", "a", "[SEP]"]


def test_a_vocabulary_is_built_the_same_from_any_order() -> None:
    captions = [f"a {size} {colour} square" for size in ("small", "large") for colour in ("red", "Green", "blue")]
    vocabulary = build_vocabulary(captions, 200)
    assert vocabulary == build_vocabulary(reversed(captions), 200)
    assert tuple(vocabulary[:5]) == SPECIAL_TOKENS
    assert {"small", "large", "red", "green", "blue", "square"} <= set(vocabulary)
    assert len(build_vocabulary(captions, 45)) == 45
    with pytest.raises(ConfigError, match="a vocabulary of 5 holds no words"):
        build_vocabulary(captions, 5)


def test_a_mistyped_vocabulary_is_told(tmp_path: Path) -> None:
    write_vocabulary(SPECIAL_TOKENS, tmp_path / "vocab.txt")
    with pytest.raises(ConfigError, match=r"no vocabulary at '.*vocba.txt'; write .*; did you mean 'vocab.txt'\?"):
        Tokenizer(tmp_path / "vocba.txt", INPUTS)
    with pytest.raises(ConfigError, match=r"no vocabulary at '.*/nowhere/x'"):
        Tokenizer(tmp_path / "nowhere" / "x", INPUTS)


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (["[PAD]", "[UNK]", "a"], r"lacks \[CLS\], \[SEP\], \[MASK\]"),
        ([*SPECIAL_TOKENS, "a", "b", "a"], "holds 'a' twice"),
    ],
)
def test_a_file_that_is_no_vocabulary(tmp_path: Path, lines: list[str], says: str) -> None:
    write_vocabulary(lines, tmp_path / "vocab.txt")
    with pytest.raises(ConfigError, match=says):
        Tokenizer(tmp_path, INPUTS)


def test_a_binary_file_is_no_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not UTF-8"):
        Tokenizer(tmp_path, INPUTS)
