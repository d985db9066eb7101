"""HowTo100M: pooling and gates by hand, padding as words, the authors' names, and what it learns."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from tests.models import batch_for
from tests.reference import howto100m as runner
from tests.reference.__main__ import main
from tests.reference.compare import Folder
from tests.runs import run_whole
from tests.shard_files import reference_folder
from vlscale import config, convert
from vlscale.errors import ConfigError
from vlscale.families import howto100m
from vlscale.flops import step_flops
from vlscale.model import PretrainModel
from vlscale.objectives import margin
from vlscale.types import Text, Visual

TINY = howto100m.tiny()


def family_of(sizes: howto100m.Config = TINY) -> howto100m.Howto100m:
    torch.manual_seed(0)
    return howto100m.build(sizes)


def texts(*lines: list[int]) -> Text:
    length = max(map(len, lines))
    ids = torch.tensor([line + [0] * (length - len(line)) for line in lines])
    return Text(ids, torch.arange(length) < torch.tensor([[len(line)] for line in lines]))


def test_published_size() -> None:
    with torch.device("meta"):
        family = howto100m.build(howto100m.Config())
    trained = sum(each.numel() for each in family.parameters() if each.requires_grad)
    linear = 301 * 4096  # of each word
    units = 3 * 4097 * 4096 + 4097 * 4096  # two gates, the text's projection and the clip's
    assert trained == linear + units
    assert not family.word_embedding.weight.requires_grad


def test_a_text_by_hand() -> None:
    family = family_of()
    text = texts([5, 9], [3])
    for line, row in zip(([5, 9], [3]), family.encode_text(text).embed, strict=True):
        vectors = torch.cat([family.word_embedding.weight[line], torch.zeros(TINY.text_length - len(line), 8)])
        pooled = family.words.linear(vectors).relu().amax(dim=0)  # padding is relu(bias)
        projected = family.text_proj.linear(pooled)
        torch.testing.assert_close(row, F.normalize(projected * family.text_proj.gate(projected).sigmoid(), dim=0))


def test_padding_is_a_word_or_is_not() -> None:
    seen, unseen = family_of(), family_of(replace(TINY, padding_words=False))
    for family in (seen, unseen):
        with torch.no_grad():
            family.words.linear.bias.fill_(5.0)  # above every word
            family.words.linear.weight.neg_()
    text, words = texts([5, 9]), torch.tensor([5, 9])
    alone = unseen.words.linear(unseen.word_embedding(words)).relu().amax(dim=0)
    projected = unseen.text_proj(alone)
    torch.testing.assert_close(unseen.encode_text(text).embed[0], F.normalize(projected, dim=0))
    assert (seen.encode_text(text).embed - unseen.encode_text(text).embed).abs().max() > 1e-4
    wider = Text(F.pad(text.ids, (0, 3)), F.pad(text.mask, (0, 3)))
    for family in (seen, unseen):  # however long the batch's padding is
        torch.testing.assert_close(family.encode_text(wider).embed, family.encode_text(text).embed)


def test_a_text_without_a_known_word() -> None:
    empty = Text(torch.zeros(1, 0, dtype=torch.int64), torch.zeros(1, 0, dtype=torch.bool))
    for padding in (True, False):
        assert torch.isfinite(family_of(replace(TINY, padding_words=padding)).encode_text(empty).embed).all()


def test_streams_are_pooled_and_normalised_on_their_own() -> None:
    family, feats = family_of(), torch.randn(2, 4, 10)
    mask = torch.tensor([[True, True, True, False], [False, False, False, False]])
    found = family.pool(Visual(feats, mask))
    first, second = feats[0, :3, :6].amax(dim=0), feats[0, :3, 6:].amax(dim=0)
    torch.testing.assert_close(found[0], torch.cat([first / first.norm(), second / second.norm()]))
    assert (found[1] == 0).all()  # no frame
    embed = family.encode_visual(Visual(feats, mask)).embed
    assert embed is not None
    torch.testing.assert_close(embed.norm(dim=1), torch.ones(2))
    with pytest.raises(ConfigError, match=r"family\.streams is empty"):
        howto100m.build(replace(TINY, streams=()))


def test_flops() -> None:
    family = family_of()
    model = PretrainModel(family, {"margin": margin.build(margin.Config(), family)})
    batch = batch_for(TINY.inputs, TINY.vocab)
    sizes = 12 * 2 * 8 * 12 + 2 * 12 * 16 + 2 * 16 * 16 + 2 * 10 * 16 + 2 * 16 * 16  # words, then two units
    assert step_flops(model, batch).forward == 4 * sizes + 2 * 2 * 4 * 4 * 16


def test_agrees_with_the_authors(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    assert main([str(reference_folder("howto100m")), "--json", str(report)]) == 0
    found = json.loads(report.read_text())
    assert len(found["compared"]) == 23
    assert found["not_compared"] == []


def test_authors_weights_there_and_back(tmp_path: Path) -> None:
    folder = Folder.open(reference_folder("howto100m"))
    theirs = folder.tensors("weights.safetensors")
    save_file(theirs, tmp_path / "authors.safetensors")
    sizes = runner.family_config(folder.config)
    overrides = [f"family.text_length={sizes.text_length}", f"family.vocab={sizes.vocab}"]
    with pytest.raises(ConfigError, match=r"shapes do not tell their streams; add e\.g\. family\.streams=\["):
        convert.from_published("howto100m", str(tmp_path / "authors.safetensors"), str(tmp_path / "x"), None, overrides)
    overrides.append(f"family.streams={list(sizes.streams)}")
    convert.from_published("howto100m", str(tmp_path / "authors.safetensors"), str(tmp_path / "ours"), None, overrides)
    tree = yaml.safe_load((tmp_path / "ours" / "config.yaml").read_text())
    assert config.family_of(tree["family"]) == ("howto100m", sizes)
    convert.into_published("howto100m", str(tmp_path / "ours"), str(tmp_path / "back.safetensors"))
    back = load_file(tmp_path / "back.safetensors")
    assert back.pop("word_vectors.weight").shape == (sizes.vocab, sizes.word_width)  # which the authors do not store
    assert back.keys() == {name for name in theirs if "batch_norm" not in name}
    for name, tensor in back.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.slow
def test_learns_on_the_embedded_videos(tmp_path: Path) -> None:
    run_whole(1, tmp_path / "run", "--recipe", "howto100m_tiny", "steps=120", "seed=1", shrunk=False)
    found = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    for way in ("i2t", "t2i"):
        assert found[f"eval/retrieval/{way}_r1"] > 10 * found["eval/retrieval/chance_r1"]
