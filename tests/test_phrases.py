from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest

from tests.shard_files import WORDS, make_tokenizer, png, write_samples, write_vocabulary
from vlscale.data import phrases
from vlscale.data.phrases import Texts, every_text, measure_cut, spread
from vlscale.data.shards import Shards
from vlscale.data.text import AS_IT_IS, SPECIAL_TOKENS, Tokenizer
from vlscale.types import Inputs

LONG = " ".join(str(n) for n in range(40))
LENGTH = Inputs(image_size=0, text_length=12, separator=True)  # ten words and two special tokens


def make_shards(folder: Path, *records: dict[str, object]) -> Shards:
    made = {
        n: [(f"s{n:03d}.png", png(0)), (f"s{n:03d}.json", json.dumps(record).encode())]
        for n, record in enumerate(records)
    }
    return Shards(write_samples(folder / "shards", len(records), len(records), made), folder / "cache")


@pytest.mark.parametrize(("max_words", "lost"), [(0, 30), (25, 30), (10, 30), (7, 33), (AS_IT_IS, 30)])
def test_words_that_do_not_fit_are_counted(tmp_path: Path, max_words: int, lost: int) -> None:
    """Whether the clean-up takes them or the family's length."""
    shards = make_shards(tmp_path, {"caption": [LONG, "a red thing"]})
    long, short = Texts(shards, make_tokenizer(tmp_path, LENGTH), max_words, None)(0)
    assert (len(long.ids) - 2, long.lost) == (40 - lost, lost)
    assert (len(short.ids) - 2, short.lost) == (3, 0)


def test_a_word_of_which_only_a_part_fits_is_lost(tmp_path: Path) -> None:
    write_vocabulary([*SPECIAL_TOKENS, "a", "##b"], tmp_path / "vocab.txt")
    tokenizer = Tokenizer(tmp_path, Inputs(image_size=0, text_length=4, separator=True))
    ids, lost = tokenizer.fit("a ab ab ab")
    assert (tokenizer.decode(ids), lost) == ("a a", 3)
    assert tokenizer.needed("a ab ab ab") == 9


def test_tags_are_read_whole_by_vocabulary_and_training(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, {"caption": "a red thing " * 20, "tags": [f"Green, {n}" for n in range(40)]})
    words, tags = every_text(shards, [0], 30, named=True)
    assert words == "a red thing " * 9 + "a red thing"
    assert tags == " ".join(f"green {n}" for n in range(40))
    found = Texts(shards, make_tokenizer(tmp_path, Inputs(0, 100, True)), 30, None).tags(0)
    assert (len(found.ids) - 2, found.lost) == (80, 0)


def test_memory_stays_flat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept stays within the bound, and what was not kept is the same."""
    bound, count = 100_000, 600
    captions = [[" ".join(WORDS[(n + k) % 60] for n in range(8)) for k in range(3)] for _ in range(count)]
    shards = make_shards(tmp_path, *({"caption": each, "tags": ["red", "blue"]} for each in captions))
    tokenizer = make_tokenizer(tmp_path, LENGTH)
    monkeypatch.setattr(phrases, "MAX_KEPT", bound)
    texts = Texts(shards, tokenizer, 0, None)
    first = [phrase.ids.tolist() for phrase in texts(0)]  # opens the shard
    sizes = []
    tracemalloc.start()
    for part in range(3):
        before = tracemalloc.get_traced_memory()[0]
        for i in range(part * count // 3, (part + 1) * count // 3):
            texts(i)
            texts.tags(i)
        sizes.append(tracemalloc.get_traced_memory()[0] - before)
    tracemalloc.stop()
    assert bound / 2 < sizes[0] < bound * 1.2
    assert abs(sizes[1]) + abs(sizes[2]) < bound / 20
    assert [phrase.ids.tolist() for phrase in texts(0)] == first == [phrase.ids.tolist() for phrase in texts(count - 1)]


def test_samples_are_spread_over_all_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = Shards(
        write_samples(tmp_path / "shards", 38, 4, {}), tmp_path / "cache"
    )  # ten, of four and the last of two
    assert list(spread(shards, 38)) == list(range(38))
    monkeypatch.setattr(phrases, "SHARDS", 4)
    assert list(spread(shards, 9)) == [0, 1, 12, 13, 24, 25, 36, 37]
    monkeypatch.setattr(phrases, "SHARDS", 100)
    assert list(spread(shards, 20)) == [n + k for n in range(0, 40, 4) for k in range(2)]
    assert list(spread(shards, 5)) == [0, 8, 16, 24, 36]


def test_how_much_is_cut(tmp_path: Path) -> None:
    lengths = [4] * 16 + [14, 15, 16, 30]
    shards = make_shards(tmp_path, *({"caption": " ".join(LONG.split()[:n])} for n in lengths), {"caption": "?!"})
    tokenizer = make_tokenizer(tmp_path, LENGTH)
    cut = measure_cut(shards, range(21), tokenizer, 15)
    assert cut.fraction == 4 / 20  # the text that cannot be used is left out
    assert cut.lost == (4 + 5 + 6 + 20) / sum(lengths)
    assert (cut.words, cut.length) == (30, 32)
    assert measure_cut(shards, range(16), tokenizer, 15) == (0.0, 0.0, 4, 6)
