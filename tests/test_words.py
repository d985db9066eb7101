"""Whole words as tokens: how they are cut, counted and read, and vectors from word2vec's files."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.shard_files import write_tar
from vlscale import vocabulary
from vlscale.data.shards import Shards
from vlscale.data.text import Tokenizer, read_tokenizer
from vlscale.data.words import build_words, read_words, vectors_of, word_level
from vlscale.errors import ConfigError
from vlscale.options import TextConfig
from vlscale.types import Inputs

INPUTS = Inputs(0, 5, separator=False, words=True)
WORDS = ["the", "don't", "Cut", "2", "egg"]
VECTORS = {word: np.arange(3, dtype=np.float32) + i for i, word in enumerate(WORDS)}


def tokenizer(cased: bool = True) -> Tokenizer:
    return vocabulary.make_tokenizer(word_level(WORDS if cased else map(str.lower, WORDS), cased), INPUTS)


def write_binary(path: Path, newlines: bool = False, cut: int | None = None) -> Path:
    parts = [f"{len(VECTORS)} 3\n".encode()]
    parts += [word.encode() + b" " + each.tobytes() + b"\n" * newlines for word, each in VECTORS.items()]
    path.write_bytes(b"".join(parts)[:cut])
    return path


def write_text(path: Path, header: bool) -> Path:
    lines = ["5 3"] * header + [f"{word} {' '.join(map(str, each))}" for word, each in VECTORS.items()]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_words_and_apostrophes_and_nothing_unknown() -> None:
    found = tokenizer()
    assert found.encode("don't Cut: the 2 (zzz) eggs; [PAD] egg!").tolist() == [2, 3, 1, 4, 5]
    assert found.encode("CUT The").tolist() == []  # capital letters tell words apart
    assert tokenizer(cased=False).encode("CUT The").tolist() == [3, 1]
    assert found.fit("the the the the egg egg").ids.tolist() == [1, 1, 1, 1, 5]
    assert found.fit("the the the the egg egg").lost == 1
    assert found.known("the zzz egg").tolist() == [True, False, True]
    assert (found.pad, found.vocab_size, found.decode([1, 5, 0])) == (0, 6, "the egg")


def test_the_commonest_words_in_any_order_of_captions() -> None:
    captions = ["b a a c", "a b", "C d"]
    assert build_words(captions, 4, cased=True) == build_words(captions[::-1], 4, cased=True) == ["a", "b", "C"]
    assert build_words(captions, 9, cased=False) == ["a", "b", "c", "d"]
    assert build_words(captions, 9, cased=True, known={"c", "d"}) == ["c", "d"]
    with pytest.raises(ConfigError, match=r"no word that init\.text has a vector for"):
        build_words(captions, 9, cased=True, known={"e"})


def test_a_list_of_words(tmp_path: Path) -> None:
    file = tmp_path / "words.txt"
    file.write_text("\n".join(WORDS) + "\n")
    np.save(tmp_path / "words.npy", np.array(WORDS))
    assert read_words(file, True) == read_words(tmp_path / "words.npy", True) == WORDS
    kept = tmp_path / "tokenizer.json"
    kept.write_text(read_tokenizer(file, cased=True, words=True))
    assert Tokenizer(kept, INPUTS).encode("the egg").tolist() == [1, 5]
    file.write_text("Egg\negg\n")
    with pytest.raises(ConfigError, match=r"holds 'egg' twice.*write text\.cased=true"):
        read_words(file, cased=False)
    file.write_text("\n")
    with pytest.raises(ConfigError, match="holds no word"):
        read_words(file, cased=False)
    np.save(tmp_path / "pickled.npy", np.array(WORDS, dtype=object))
    with pytest.raises(ConfigError, match="cannot be read as a list of words"):
        read_words(tmp_path / "pickled.npy", cased=True)


@pytest.mark.parametrize("kind", ["bin", "bin with newlines", "bin.gz", "txt", "vec"])
def test_vectors_of_published_layouts(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"vectors.{kind.split()[0]}"
    if kind.startswith("bin"):
        write_binary(path, newlines="newlines" in kind)
    else:
        write_text(path, header=kind == "vec")
    if kind == "bin.gz":
        path.write_bytes(gzip.compress(path.read_bytes()))
    found = dict(vectors_of(path))
    assert list(found) == WORDS
    for word, vector in VECTORS.items():
        np.testing.assert_array_equal(found[word], vector)
    assert list(dict(vectors_of(path, {"egg", "zzz"}))) == ["egg"]


def test_words_with_spaces_as_in_gloves(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the 1 2 3\n. . . 4 5 6\negg 7 8 9\n")
    assert {word: vector.tolist() for word, vector in vectors_of(tmp_path / "a.txt", {"the", "egg"})} == {
        "the": [1, 2, 3],
        "egg": [7, 8, 9],
    }


def test_vectors_that_are_none(tmp_path: Path) -> None:
    whole = len(write_binary(tmp_path / "a.bin").read_bytes())
    for cut in (3, whole - 1, whole // 2):
        with pytest.raises(ConfigError, match="cannot be read as word vectors"):
            list(vectors_of(write_binary(tmp_path / "a.bin", cut=cut)))
    damaged = bytearray(gzip.compress(b"the 1 2 3\n" * 1000))
    damaged[20:40] = bytes(20)
    (tmp_path / "a.txt.gz").write_bytes(damaged)
    with pytest.raises(ConfigError, match="cannot be read as word vectors"):
        list(vectors_of(tmp_path / "a.txt.gz"))
    (tmp_path / "b.txt").write_text("the 1 2 3\negg 1 2\n")
    with pytest.raises(ConfigError, match="line 2 has 2 numbers, not 3"):
        list(vectors_of(tmp_path / "b.txt"))
    with pytest.raises(ConfigError, match="No such file"):
        list(vectors_of(tmp_path / "c.txt"))


def test_a_table_is_filled_in_the_order_of_the_ids(tmp_path: Path) -> None:
    table = nn.Embedding(8, 3)  # wider than the vocabulary
    file = write_binary(tmp_path / "a.bin")
    assert vocabulary.fill_words(table, tokenizer(), str(file)).startswith("5 of 5 words")
    assert table.weight[1:6].tolist() == [VECTORS[word].tolist() for word in WORDS]
    assert not table.weight[[0, 6, 7]].any()
    rows = np.stack([np.zeros(3, np.float32), *VECTORS.values()])
    for given in (rows, rows[1:]):  # with padding's row, and without
        np.save(tmp_path / "rows.npy", given)
        again = nn.Embedding(8, 3)
        vocabulary.fill_words(again, tokenizer(), str(tmp_path / "rows.npy"))
        torch.testing.assert_close(again.weight, table.weight)


def test_vectors_that_do_not_fit(tmp_path: Path) -> None:
    file = write_binary(tmp_path / "a.bin")
    with pytest.raises(ConfigError, match=r"write family\.word_width=3"):
        vocabulary.fill_words(nn.Embedding(6, 4), tokenizer(), str(file))
    other = vocabulary.make_tokenizer(word_level(["x", "y", "egg"], cased=True), INPUTS)
    with pytest.raises(ConfigError, match="vectors for 1 of the vocabulary's 3 words"):
        vocabulary.fill_words(nn.Embedding(6, 3), other, str(file))
    np.save(tmp_path / "rows.npy", np.zeros((4, 3), np.float32))
    with pytest.raises(ConfigError, match="the vocabulary has 5 words and padding"):
        vocabulary.fill_words(nn.Embedding(6, 3), tokenizer(), str(tmp_path / "rows.npy"))


def test_a_runs_vocabulary_holds_words_with_vectors_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLSCALE_CACHE", str(tmp_path / "cache"))
    captions = ["Cut the egg", "don't cut the tomato"]
    members = [(f"{i}.json", json.dumps({"caption": caption}).encode()) for i, caption in enumerate(captions)]
    write_tar(tmp_path / "a.tar", members)
    shards = Shards([str(tmp_path / "a.tar")])
    options = TextConfig(cased=True, clean_up=False)

    def found(vectors: str | None) -> dict[str, int]:
        made = vocabulary.find_tokenizer(
            options, tmp_path / "run", shards, 20, questions=False, tags=False, words=True, vectors=vectors
        )
        ids: dict[str, int] = json.loads(made)["model"]["vocab"]
        return ids

    assert set(found(None)) == {"[PAD]", "Cut", "the", "egg", "don't", "cut", "tomato"}
    assert found(str(write_binary(tmp_path / "a.bin"))) == {"[PAD]": 0, "the": 1, "Cut": 2, "don't": 3, "egg": 4}
