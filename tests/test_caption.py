"""Caption: a decoder's words by hand, and what of the padding counts."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.models import batch_for
from tests.shard_files import make_tokenizer
from vlscale.data.masking import Write
from vlscale.data.views import parse
from vlscale.errors import ConfigError
from vlscale.families import univl
from vlscale.model import Encodings, PretrainModel
from vlscale.objectives import caption
from vlscale.types import IGNORE, Batch, Loss, Moment

TINY = univl.tiny()


def model_of(**options: Any) -> PretrainModel:
    torch.manual_seed(0)
    family = univl.build(replace(TINY, dropout=0.0))
    for parameter in family.parameters():  # far from the start, where every word is as likely
        torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.3)
    return PretrainModel(family, {"caption": caption.build(caption.Config(**options), family)})


def loss_of(model: PretrainModel, batch: Batch) -> Loss:
    return model(batch, Moment(1)).losses["caption"]  # type: ignore[no-any-return]


def batch_of(padding: int = 0) -> Batch:
    return batch_for(TINY.inputs, TINY.vocab, padding=padding)


def logits_of(model: PretrainModel, batch: Batch, length: int = 0) -> Tensor:
    """[B, L, V]."""
    states = Encodings(model.family, batch, Moment(1), {}).decoded("target", "masked", "masked", length)
    head: Any = model.objectives["caption"].head
    logits: Tensor = head(states, model.family.word_embedding.weight)
    return logits


def labels_of(batch: Batch) -> Tensor:
    labels = batch.text["target"].labels
    assert labels is not None
    return labels


def test_mean_over_words_by_hand() -> None:
    model, batch = model_of(), batch_of()
    logits, labels = logits_of(model, batch), labels_of(batch)
    terms = [
        torch.logsumexp(logits[row, place], 0) - logits[row, place, labels[row, place]]
        for row, place in (labels != IGNORE).nonzero().tolist()
    ]
    found = loss_of(model, batch)
    torch.testing.assert_close(found.value, torch.stack(terms).mean())
    right = (logits.argmax(dim=2) == labels)[labels != IGNORE].float().mean()
    torch.testing.assert_close(found.metrics["caption/accuracy"], right)
    assert found.labels is not None
    assert sorted(found.labels["caption/accuracy"].tolist()) == sorted(labels[labels != IGNORE].tolist())
    counts = model.counts(batch)
    assert int(counts["caption"]) == len(terms)


def test_counted_padding_by_hand() -> None:
    """Every place up to the longest text that the family reads counts, and behind the words [PAD] is right."""
    model, batch = model_of(padding="counted"), batch_of()
    logits, labels = logits_of(model, batch, TINY.text_length), labels_of(batch)
    assert logits.shape[:2] == (4, TINY.text_length)
    whole = F.pad(labels, (0, TINY.text_length - labels.shape[1]), value=IGNORE).clamp(min=0)
    found = loss_of(model, batch)
    torch.testing.assert_close(found.value, F.cross_entropy(logits.flatten(0, 1), whole.flatten()))
    assert int(model.counts(batch)["caption"]) == 4 * TINY.text_length
    plain = loss_of(model_of(), batch)
    torch.testing.assert_close(found.metrics["caption/accuracy"], plain.metrics["caption/accuracy"])  # of words


@pytest.mark.parametrize("padding", ["ignored", "counted"])
def test_more_padding_changes_nothing(padding: Any) -> None:
    model = model_of(padding=padding)
    torch.testing.assert_close(loss_of(model, batch_of(0)).value, loss_of(model, batch_of(3)).value)


def test_a_rank_without_words_costs_nothing() -> None:
    batch = batch_of()
    silent = batch.text["target"]._replace(labels=torch.full_like(labels_of(batch), IGNORE))
    found = loss_of(model_of(), replace(batch, text={**batch.text, "target": silent}))
    assert float(found.value.detach()) == 0.0
    assert model_of(scope="rank").counts(batch) == {}


def test_a_word_sees_what_comes_before_it_and_the_video() -> None:
    model, batch = model_of(), batch_of()
    before = logits_of(model, batch)
    target = batch.text["target"]
    ids = target.ids.clone()
    ids[:, 3] = (ids[:, 3] + 1) % TINY.vocab
    after = logits_of(model, replace(batch, text={**batch.text, "target": target._replace(ids=ids)}))
    torch.testing.assert_close(after[:, :3], before[:, :3])
    assert ((after - before)[:, 3:5].abs().amax(dim=2) > 1e-4).all()
    video = batch.visual["masked"]
    other = video._replace(feats=video.feats.flip(1))
    assert (logits_of(model, replace(batch, visual={**batch.visual, "masked": other})) - before).abs().max() > 1e-3


def test_what_is_written(tmp_path: Path) -> None:
    """[CLS] and the words are read, the words and [SEP] are right; the last word and [CLS] are never hidden."""
    tokens = make_tokenizer(tmp_path)
    ids = np.array([tokens.cls, *range(10, 18), tokens.sep])
    read, labels = Write(prob=0.0)(ids, tokens, np.random.default_rng(0))
    assert read.tolist() == ids[:-1].tolist()
    assert labels.tolist() == ids[1:].tolist()
    hidden = np.zeros(len(read), dtype=int)
    for seed in range(300):
        read, labels = Write(prob=0.4)(ids, tokens, np.random.default_rng(seed))
        assert labels.tolist() == ids[1:].tolist()
        hidden += read == tokens.mask
    assert hidden[[0, -1]].tolist() == [0, 0]
    assert (abs(hidden[1:-1] / 300 - 0.4 * 0.8) < 0.1).all()
    empty = np.array([tokens.cls, tokens.sep])
    read, labels = Write()(empty, tokens, np.random.default_rng(0))
    assert (read.tolist(), labels.tolist()) == ([tokens.cls], [tokens.sep])


def test_a_view_is_masked_or_written() -> None:
    views = parse({"text.target": {"write": {"prob": 0.1}}}, TINY.inputs)
    assert views.text["target"].write == Write(0.1)
    with pytest.raises(ConfigError, match=r"views\.text\.target\.write: should be left out beside mask_tokens"):
        parse({"text.target": {"write": {}, "mask_tokens": {}}}, TINY.inputs)
    with pytest.raises(ConfigError, match=r"write\.prob: should be a number in \[0, 1\]"):
        parse({"text.target": {"write": {"prob": 2}}}, TINY.inputs)


def test_flops_of_the_head() -> None:
    batch = batch_of()
    each = 2 * TINY.hidden * (TINY.hidden + TINY.vocab)
    words = int((labels_of(batch) != IGNORE).sum())
    assert model_of().objectives["caption"].head_flops(batch) == (words * each, 0)  # type: ignore[operator]
    counted = model_of(padding="counted").objectives["caption"]
    assert counted.head_flops(batch) == (4 * TINY.text_length * each, 0)  # type: ignore[operator]


def test_the_start_is_a_guess() -> None:
    torch.manual_seed(0)
    family = univl.build(replace(TINY, dropout=0.0))
    model = PretrainModel(family, {"caption": caption.build(caption.Config(), family)})
    assert float(loss_of(model, batch_of()).value.detach()) == pytest.approx(math.log(TINY.vocab), rel=0.02)
