"""Hiding words: whole words, words with meaning, exact numbers, the fallback, and where random words come from."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.shard_files import write_vocabulary
from vlscale.data.masking import Count, Ids, MaskTokens
from vlscale.data.text import SPECIAL_TOKENS, Tokenizer
from vlscale.data.views import parse
from vlscale.errors import ConfigError
from vlscale.types import IGNORE, Inputs

WORDS = ["[unused0]", "[unused1]", "!", "the", "a", "of", "horse", "##s", "skate", "##board", "##er", "red", "##the"]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("words")
    write_vocabulary([*SPECIAL_TOKENS, *WORDS], folder / "vocab.txt")
    return Tokenizer(folder, Inputs(image_size=0, text_length=100, separator=True))


def draw(mask: MaskTokens, text: str, words: Tokenizer, times: int = 300) -> list[tuple[list[str], list[str]]]:
    """(what is seen, what was hidden) of the same text under other seeds."""
    ids = words.encode(text)
    out = []
    for seed in range(times):
        masked, labels = mask(ids, words, np.random.default_rng(seed))
        assert np.array_equal(labels[labels != IGNORE], ids[labels != IGNORE])
        assert np.array_equal(masked[labels == IGNORE], ids[labels == IGNORE])
        out.append(([words.token(i) for i in masked], [words.token(i) for i in labels if i != IGNORE]))
    return out


def test_the_draws_of_a_run_do_not_change(words: Tokenizer) -> None:
    """Two numbers per token, one more if nothing was picked, and one per random word: as runs were masked before."""
    ids = words.encode("the horses of a red skateboarder !" * 4)
    for seed, prob in ((0, 0.15), (1, 0.15), (2, 0.6), (3, 1e-9)):
        masked, labels = MaskTokens(prob=prob)(ids, words, np.random.default_rng(seed))
        rng = np.random.default_rng(seed)
        draws = rng.random((2, len(ids)))
        open_ = ids > 4
        picked = open_ & (draws[0] < prob)
        if not picked.any():
            picked[rng.choice(np.flatnonzero(open_))] = True
        want = np.where(picked & (draws[1] < 0.8), words.mask, ids)
        swapped = picked & (draws[1] >= 0.8) & (draws[1] < 0.9)
        want[swapped] = rng.integers(words.vocab_size, size=int(swapped.sum()))
        assert labels.tolist() == np.where(picked, ids, IGNORE).tolist()
        assert masked.tolist() == want.tolist()


def test_whole_words(words: Tokenizer) -> None:
    mask = MaskTokens(prob=0.3, words="whole", mask_share=1.0, random_share=0.0)
    hidden = Counter(" ".join(label) for _, label in draw(mask, "red skateboarders", words, 1000))
    assert set(hidden) == {"red", "skate ##board ##er ##s", "red skate ##board ##er ##s"}
    assert hidden["red skate ##board ##er ##s"] / 1000 == pytest.approx(0.09, abs=0.03)
    alone = Counter(" ".join(label) for _, label in draw(MaskTokens(prob=1e-9, words="whole"), "red horses", words))
    assert set(alone) == {"red", "horse ##s"}
    assert alone["red"] / 300 == pytest.approx(0.5, abs=0.1)


def test_a_words_pieces_are_replaced_each_for_itself(words: Tokenizer) -> None:
    mask = MaskTokens(prob=1.0, words="whole", mask_share=0.5, random_share=0.0)
    assert ["[CLS]", "[MASK]", "##board", "[SEP]"] in [seen for seen, _ in draw(mask, "skateboard", words)]


def test_a_piece_behind_a_special_token_starts_a_word(words: Tokenizer) -> None:
    ids = np.array([words.cls, words.encode("horses")[2], words.encode("horses")[1], words.sep])
    mask = MaskTokens(prob=1e-9, words="whole")
    found = {tuple(mask(ids, words, np.random.default_rng(seed))[1] != IGNORE) for seed in range(30)}
    assert found == {(False, True, False, False), (False, False, True, False)}


def test_words_with_meaning_only(words: Tokenizer) -> None:
    mask = MaskTokens(prob=1.0, content_only=True)
    for _, label in draw(mask, "the horses of a red skateboard !", words, 20):
        assert label == ["horse", "##s", "red", "skate", "##board"]
    assert all(label == [] for _, label in draw(mask, "the of !", words, 20))
    # a piece that reads like a function word is part of another word
    assert all(label == ["a", "##s"] for _, label in draw(mask, "the as", words, 20))
    assert all("the" in label for _, label in draw(MaskTokens(prob=1.0), "the horse", words, 20))


def test_uniters_fallback_is_the_first_word_and_its_mask(words: Tokenizer) -> None:
    mask = MaskTokens(prob=1e-9, fallback="first", mask_share=0.0, random_share=0.0)
    want = (["[CLS]", "[MASK]", "horse", "[SEP]"], ["the"])
    assert draw(mask, "the horse", words, 20) == [want] * 20
    whole = MaskTokens(prob=1e-9, fallback="first", words="whole", content_only=True)
    assert all(label == ["horse", "##s"] for _, label in draw(whole, "the horses red", words, 20))
    none = MaskTokens(prob=1e-9, fallback="first", at_least_one=False)
    assert all(label == [] for _, label in draw(none, "the horse", words, 20))


def test_random_words_from_words_only(words: Tokenizer) -> None:
    replaced = {"prob": 1.0, "mask_share": 0.0, "random_share": 1.0}
    seen = Counter(
        token
        for tokens, _ in draw(MaskTokens(**replaced, random_from="words"), "red " * 20, words)
        for token in tokens[1:-1]
    )
    assert set(seen) == set(WORDS) - {"[unused0]", "[unused1]"}
    assert all(times / 6000 == pytest.approx(1 / 11, abs=0.015) for times in seen.values())
    everything = {token for tokens, _ in draw(MaskTokens(**replaced), "red " * 20, words) for token in tokens}
    assert {"[unused1]", "[PAD]", "[MASK]"} <= everything


def test_vlps_number() -> None:
    vlp = Count(0.15, 1, 3)
    # round half to even: 0.15 * 10 = 1.5 -> 2, and 2.5 of half of 5 -> 2
    assert [vlp(n) for n in (1, 3, 9, 10, 16, 17, 20, 99)] == [1, 1, 1, 2, 2, 3, 3, 3]
    assert Count(0.5, 0, 9)(5) == 2
    assert Count(0.15, 0, 3)(1) == 0


def test_an_exact_number_uniformly_and_the_last_separator_with_it(words: Tokenizer) -> None:
    mask = MaskTokens(count=Count(0.15, 1, 3), separator=True, mask_share=1.0, random_share=0.0)
    drawn = draw(mask, "the red horse of", words, 1000)
    hidden = Counter(token for _, label in drawn for token in label)
    assert all(len(label) == 1 for _, label in drawn)
    assert set(hidden) == {"the", "red", "horse", "of", "[SEP]"}
    assert all(times / 1000 == pytest.approx(0.2, abs=0.04) for times in hidden.values())
    many = draw(mask, "the red horse of " * 10, words, 20)  # 40 tokens, of which 15 in 100 would be 6
    assert all(len(label) == 3 for _, label in many)
    ids = np.array([words.cls, 10, words.sep, 11, words.sep])
    mask = MaskTokens(prob=1.0, separator=True)
    assert (mask(ids, words, np.random.default_rng(0))[1] != IGNORE).tolist() == [False, True, False, True, True]


def test_an_exact_number_of_whole_words(words: Tokenizer) -> None:
    mask = MaskTokens(count=Count(0.5, 1, 9), words="whole")
    drawn = Counter(" ".join(label) for _, label in draw(mask, "horses skateboarders", words))
    assert set(drawn) == {"horse ##s", "skate ##board ##er ##s"}


def test_a_vocabulary_without_a_mask_token_is_refused() -> None:
    bare: Any = SimpleNamespace(pad=0, cls=None, sep=None, mask=None, vocab_size=9)
    ids: Ids = np.array([5, 6])
    with pytest.raises(ConfigError, match="the vocabulary has no mask token"):
        MaskTokens()(ids, bare, np.random.default_rng(0))


def test_the_options_in_a_recipe() -> None:
    options = {"count": {"share": 0.2, "most": 2}, "separator": True}
    made = parse({"text.masked": {"mask_tokens": options}}).text["masked"].mask_tokens
    assert made == MaskTokens(count=Count(0.2, 1, 2), separator=True)
    uniter = parse({"text.masked": {"mask_tokens": {"fallback": "first", "random_from": "words"}}}).text["masked"]
    assert uniter.mask_tokens == MaskTokens(fallback="first", random_from="words")
    with pytest.raises(ConfigError, match=r"mask_tokens.words: should be pieces or whole \(got 'wholes'\)"):
        parse({"text.masked": {"mask_tokens": {"words": "wholes"}}})
    with pytest.raises(ConfigError, match=r"mask_tokens.count.most: should be a whole number from 4 on \(got 3\)"):
        parse({"text.masked": {"mask_tokens": {"count": {"least": 4, "most": 3}}}})
    with pytest.raises(ConfigError, match=r"count.moost is not an option; did you mean 'most'"):
        parse({"text.masked": {"mask_tokens": {"count": {"moost": 3}}}})


def test_a_vocabulary_tells_what_its_tokens_are(words: Tokenizer, tmp_path: Path) -> None:
    assert [words.token(i) for i in np.flatnonzero(words.continues)] == ["##s", "##board", "##er", "##the"]
    assert [words.token(i) for i in np.flatnonzero(words.function_words)] == [*SPECIAL_TOKENS, "!", "the", "a", "of"]
    assert [words.token(i) for i in words.ordinary] == WORDS[2:]
