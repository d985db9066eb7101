from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import tokenizers

from tests.shard_files import INPUTS, WORDS, make_tokenizer, write_vocabulary
from vlscale import build, config, vocabulary
from vlscale.data.text import (
    AS_IT_IS,
    SPECIAL_TOKENS,
    Tokenizer,
    build_vocabulary,
    clean_text,
    first_words,
    read_tokenizer,
    wordpiece,
)
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
    assert first_words(clean_text(caption, 30), 30) == expected


def test_clean_up_keeps_the_first_words() -> None:
    caption = " ".join(str(n) for n in range(50))
    assert first_words(clean_text(caption, 30), 30).split() == [str(n) for n in range(30)]
    assert len(first_words(clean_text(caption, 0), 0).split()) == 50
    assert first_words(caption, AS_IT_IS) == caption


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


# --- other tokenizers --------------------------------------------------------------------------------------


CASED = [*SPECIAL_TOKENS, "[unused1]", "!", "A", "Dog", "##s", "a", "dog", "é", "e"]
CLIP_PIECES = ["!", "a", "d", "g", "o", "s", "!</w>", "a</w>", "d</w>", "g</w>", "o</w>", "s</w>", ",</w>", "'", "do"]
CLIP_PIECES += ["dog</w>", "'s</w>", "<|startoftext|>", "<|endoftext|>"]
CLIP_MERGES = ["#version: 0.2", "d o", "do g</w>", "' s</w>", ""]
PADDED = Inputs(image_size=0, text_length=6, separator=True)


def write_clip(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(CLIP_PIECES)}))
    (folder / "merges.txt").write_text("\n".join(CLIP_MERGES))
    return folder


def write_unigram(folder: Path, pad: str | None = "</s>") -> Path:
    """A sentencepiece vocabulary in the form that transformers exports T5's and SigLIP's in."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581a", -1.0), ("\u2581dog", -2.0), ("s", -3.0)]
    pipeline = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2))
    pipeline.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    pipeline.decoder = tokenizers.decoders.Metaspace()
    pipeline.add_special_tokens(["<pad>", "</s>", "<unk>"])
    template = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    pipeline.post_processor = template
    pipeline.enable_truncation(3)
    pipeline.enable_padding(length=9)
    folder.mkdir(exist_ok=True)
    pipeline.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": pad} if pad else {}))
    return folder


def test_a_vocabulary_with_capital_letters_is_built(tmp_path: Path) -> None:
    captions = ["Anna sees a dog", "a dog sees Anna"] * 9
    write_vocabulary(build_vocabulary(captions, 60, cased=True), tmp_path / "vocab.txt")
    tokenizer = Tokenizer(tmp_path, PADDED, cased=True)
    assert tokenizer.decode(tokenizer.encode("Anna sees a dog").tolist()) == "Anna sees a dog"
    assert "Anna" not in build_vocabulary(captions, 60)


def test_a_cased_vocabulary(tmp_path: Path) -> None:
    write_vocabulary(CASED, tmp_path / "vocab.txt")
    tokenizer = Tokenizer(tmp_path, PADDED, cased=True)
    assert [tokenizer.token(i) for i in tokenizer.encode("A Dogs é")] == ["[CLS]", "A", "Dog", "##s", "é", "[SEP]"]
    with pytest.raises(ConfigError, match=r"holds words with capital letters, such as 'A'; write text.cased=true"):
        Tokenizer(tmp_path, PADDED)
    write_vocabulary([*SPECIAL_TOKENS, "a"], tmp_path / "vocab.txt")
    with pytest.raises(ConfigError, match=r"holds lower-case words; write text.cased=false"):
        Tokenizer(tmp_path, PADDED, cased=True)


def test_clips_byte_pairs(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write_clip(tmp_path), Inputs(image_size=0, text_length=77, separator=True))
    ids = tokenizer.encode("  A\n DOG's  a, !")
    pieces = ["<|startoftext|>", "a</w>", "dog</w>", "'s</w>", "a</w>", ",</w>", "!</w>", "<|endoftext|>"]
    assert [tokenizer.token(i) for i in ids] == pieces
    assert (tokenizer.pad, tokenizer.cls, tokenizer.sep, tokenizer.mask, tokenizer.unk) == (0, 17, 18, None, None)
    assert tokenizer.decode(ids) == "a dog 's a , !"
    assert tokenizer.vocab_size == 19
    long = tokenizer.encode("dog " * 100)
    assert len(long) == 77
    assert (long[0], long[-1]) == (17, 18)  # the end token is there after truncation, and is the largest id
    assert tokenizer.sep == long.max()
    with pytest.raises(ConfigError, match="write words: pieces and content_only: false"):
        _ = tokenizer.continues


def test_a_sentencepiece_vocabulary(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write_unigram(tmp_path), PADDED)
    assert [tokenizer.token(i) for i in tokenizer.encode("a dogs")] == ["\u2581a", "\u2581dog", "s", "</s>"]
    assert tokenizer.encode("a " * 9).tolist() == [3, 3, 3, 3, 3, 1]  # the file's own lengths do not count
    assert (tokenizer.pad, tokenizer.cls, tokenizer.sep, tokenizer.mask, tokenizer.unk) == (1, None, 1, None, 2)
    assert tokenizer.decode(tokenizer.encode("a dogs")) == "a dogs"
    assert tokenizer.continues.tolist() == [False, False, False, False, False, True]
    assert tokenizer.function_words.tolist() == [True, True, True, True, False, True]  # `s` as of `it's`
    assert tokenizer.ordinary.tolist() == [3, 4, 5]
    (tmp_path / "tokenizer_config.json").unlink()
    assert Tokenizer(tmp_path / "tokenizer.json", PADDED).pad == 0  # what the file itself pads with


@pytest.mark.parametrize("kind", ["wordpiece", "cased", "clip", "unigram"])
def test_a_tokenizer_is_kept_as_one_file(kind: str, tmp_path: Path) -> None:
    """And what is read from it again is the same tokenizer."""
    if kind in ("wordpiece", "cased"):
        tokens = CASED if kind == "cased" else [token for token in CASED if token == token.lower()]
        write_vocabulary([*dict.fromkeys([*SPECIAL_TOKENS, *tokens])], tmp_path / "vocab.txt")
    elif kind == "clip":
        write_clip(tmp_path)
    else:
        write_unigram(tmp_path)
    kept = tmp_path / "kept" / "tokenizer.json"
    kept.parent.mkdir()
    kept.write_text(read_tokenizer(tmp_path, cased=kind == "cased"), encoding="utf-8")
    first, second = Tokenizer(tmp_path, PADDED, cased=kind == "cased"), Tokenizer(kept, PADDED)
    assert first.encode("a Dog's dogs").tolist() == second.encode("a Dog's dogs").tolist()
    for name in ("pad", "unk", "cls", "sep", "mask", "vocab_size"):
        assert getattr(first, name) == getattr(second, name), name


def test_a_built_vocabulary_reads_as_a_file_of_it_does(tmp_path: Path) -> None:
    tokens = build_vocabulary(["a red square", "a blue one"], 60)
    write_vocabulary(tokens, tmp_path / "vocab.txt")
    assert wordpiece(tokens) == read_tokenizer(tmp_path)


def test_files_that_are_no_tokenizers(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer.json is no tokenizer of the tokenizers library"):
        Tokenizer(tmp_path, PADDED)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"no vocabulary at '.*vocab.txt'; write the path of a vocab.txt or tok"):
        Tokenizer(tmp_path, PADDED)
    write_clip(tmp_path)
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(ConfigError, match=r"vocab.json with merges.txt beside it, and one cannot be read"):
        Tokenizer(tmp_path, PADDED)
    write_clip(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0}))
    with pytest.raises(ConfigError, match=r"is not CLIP's vocabulary; export"):
        Tokenizer(tmp_path, PADDED)


def test_a_tokenizer_without_an_end_token_is_refused_where_one_is_wanted(tmp_path: Path) -> None:
    bare = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    bare.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match=r"the tokenizer of .* adds none"):
        Tokenizer(tmp_path, PADDED)
    assert Tokenizer(tmp_path, INPUTS).encode("a").tolist() == [0]


def test_captions_as_they_are() -> None:
    assert clean_text(" A Dog, so-called! \n", AS_IT_IS) == "A Dog, so-called!"
    assert clean_text(" \n", AS_IT_IS) == ""


# --- in a run ----------------------------------------------------------------------------------------------


def setup(tmp_path: Path, recipe: str) -> tuple[config.RunConfig, build.Setting]:
    folder = write_clip(tmp_path / "clip")
    run = config.load(recipe, (f"text.vocab={folder}", "text.clean_up=false", "data.batch=8", "family.vocab=300"))
    return run, build.setup(build.Request(run, "ds_configs/zero2.json", tmp_path / "run"))


def test_the_run_folder_keeps_the_tokenizer(tmp_path: Path) -> None:
    run, setting = setup(tmp_path, "clip_tiny")
    build.write_folder(run, setting)
    kept = Tokenizer(tmp_path / "run" / vocabulary.TOKENIZER, run.family.inputs)
    assert kept.encode("a dog's").tolist() == setting.tokenizer.encode("a dog's").tolist() == [17, 1 + 6, 15, 16, 18]


def test_words_cannot_be_hidden_without_a_mask_token(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the vocabulary has no mask token, so no word of a text can be hidden"):
        setup(tmp_path, "quickstart")
    assert not (tmp_path / "run").exists()


def test_capital_letters_need_captions_that_have_them() -> None:
    with pytest.raises(ConfigError, match=r"the clean-up takes away; write text.clean_up=false"):
        config.load("quickstart", ("text.cased=true",))
    run = config.load("quickstart", ("text.cased=true", "text.clean_up=false"))
    assert run.text.kept_words == AS_IT_IS
    assert config.load("quickstart").text.kept_words == 30
