"""Objectives: formulas by hand, and what may not change."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.models import albef_batch, albef_model
from vlscale.errors import ConfigError
from vlscale.families import albef
from vlscale.model import Encodings, PretrainModel
from vlscale.objectives import itc, itm, mlm
from vlscale.types import IGNORE, Batch, Moment


def encodings(model: PretrainModel, batch: Batch, step: int = 1) -> Encodings:
    at = Moment(step)
    return Encodings(model.family, batch, at, model.key_queues(), model.momentum_encodings(batch, at))


def moved_twin(model: PretrainModel) -> PretrainModel:
    """Twin and online differ, so that sharing them by mistake shows."""
    torch.manual_seed(9)
    with torch.no_grad():
        for _, twin in model.momentum_pairs():
            twin.add_(0.1 * torch.randn_like(twin))
    return model


def embeds(enc: Encodings) -> tuple[Tensor, Tensor]:
    image, text = enc.visual("clean").embed, enc.text("clean").embed
    assert image is not None
    assert text is not None
    return image, text


def test_itc_by_hand() -> None:
    model, batch = moved_twin(albef_model()), albef_batch()
    objective: Any = model.objectives["itc"]
    enc = encodings(model, batch)
    (image, text), (image_m, text_m) = embeds(enc), embeds(enc.momentum)
    total = torch.zeros(())
    for query, teacher, keys, queue in (
        (image, image_m, text_m, model.key_queues()["text"]),
        (text, text_m, image_m, model.key_queues()["image"]),
    ):
        columns = torch.cat([keys, queue.keys])
        target = 0.4 * (teacher @ columns.T / 0.07).softmax(1)
        target[torch.arange(4), torch.arange(4)] += 0.6
        total = total - (target * (query @ columns.T / 0.07).log_softmax(1)).sum(1).mean() / 2
    torch.testing.assert_close(objective(enc, batch).value, total)


def test_itc_without_twin_is_plain_infonce_with_gradient_on_both_sides() -> None:
    model, batch = albef_model(queue=0, soften=0.0), albef_batch()
    assert model.twin is None
    enc = encodings(model, batch)
    image, text = embeds(enc)
    logits = image @ text.T / 0.07
    want = (F.cross_entropy(logits, torch.arange(4)) + F.cross_entropy(logits.T, torch.arange(4))) / 2
    loss = model.objectives["itc"](enc, batch)
    torch.testing.assert_close(loss.value, want)
    given = torch.autograd.grad(loss.value, [image, text], retain_graph=True)
    torch.testing.assert_close(given, torch.autograd.grad(want, [image, text]))


@pytest.mark.parametrize("soften", [0.0, 0.4])
@pytest.mark.parametrize("same_picture", ["positive", "excluded"])
def test_itc_other_captions_of_the_same_picture(same_picture: Any, soften: float) -> None:
    family = albef.build(replace(albef.tiny(), dropout=0.0))
    options = itc.Config(queue=4, soften=soften, queue_start="empty", same_picture=same_picture)
    model = moved_twin(PretrainModel(family, {"itc": itc.build(options, family)}))
    for name, queue in model.key_queues().items():
        torch.manual_seed(len(name))
        queue.push(F.normalize(torch.randn(3, 8), dim=1), torch.tensor([7, 3, 5]), 1)
    batch = replace(albef_batch(), pair_id=torch.tensor([7, 7, 5, 2]))
    enc = encodings(model, batch)
    (image, text), (image_m, text_m) = embeds(enc), embeds(enc.momentum)
    total = torch.zeros(())
    for query, teacher, keys, name in ((image, image_m, text_m, "text"), (text, text_m, image_m, "image")):
        columns = torch.cat([keys, model.key_queues()[name].keys[:3]])
        same = batch.pair_id[:, None] == torch.tensor([7, 7, 5, 2, 7, 3, 5])
        own = torch.eye(4, 7, dtype=torch.bool)
        out = same & ~own if same_picture == "excluded" else torch.zeros_like(same)
        true = (same if same_picture == "positive" else own).float()
        soft = (teacher @ columns.T / 0.07).masked_fill(out, -torch.inf).softmax(1)
        target = (1 - soften) * true / true.sum(1, keepdim=True) + soften * soft
        logs = (query @ columns.T / 0.07).masked_fill(out, -torch.inf).log_softmax(1).masked_fill(out, 0.0)
        total = total - (target * logs).sum(1).mean() / 2
    torch.testing.assert_close(model.objectives["itc"](enc, batch).value, total)


def test_itc_empty_queue_weighs_nothing() -> None:
    batch = albef_batch()
    losses = []
    for queue in (0, 8):
        torch.manual_seed(0)
        family = albef.build(replace(albef.tiny(), dropout=0.0))
        objective = itc.build(itc.Config(queue=queue, soften=0.4, queue_start="empty"), family)
        model = PretrainModel(family, {"itc": objective})
        loss = model(batch, Moment(1)).losses["itc"].value
        loss.backward()
        gradient = model.family.temperature.value.grad
        assert gradient is not None
        assert torch.isfinite(gradient).all()
        losses.append(loss.detach())
    torch.testing.assert_close(*losses)


def test_forward_changes_nothing_and_commit_pushes_this_batch() -> None:
    model, batch = moved_twin(albef_model()), albef_batch()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    enc = encodings(model, batch, step=3)
    made = model(batch, Moment(3))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    model.commit([made.keys], 3, "micro_batch")  # these queues take theirs once per step
    queue = model.key_queues()["text"]
    assert queue.pointer.item() == 0
    model.commit([made.keys], 3, "step")
    torch.testing.assert_close(queue.keys[:4], embeds(enc.momentum)[1])
    assert queue.ids[:4].tolist() == [-1] * 4  # nobody asks whose they are
    assert queue.entered[:4].tolist() == [3] * 4
    assert queue.pointer.item() == 4
    assert model.queue_metrics(5)["queue/text/age_steps"] == pytest.approx((4 * 2 + 4 * 5) / 8)


def test_itm_draws_by_similarity_and_never_the_partner() -> None:
    model, batch = moved_twin(albef_model()), albef_batch()
    batch = replace(batch, pair_id=torch.tensor([5, 5, 6, 7]))
    objective: Any = model.objectives["itm"]
    enc = encodings(model, batch)
    _, text = embeds(enc)
    image_m, text_m = embeds(enc.momentum)
    t2i, i2t = objective.weights(enc, batch.pair_id, image_m, text_m, batch.pair_id)
    want = (text @ image_m.T / 0.07).softmax(1) + 1e-4
    for row, column in ((0, 0), (0, 1), (1, 0), (1, 1), (2, 2), (3, 3)):
        want[row, column] = 0.0
        assert i2t[row, column] == 0
    torch.testing.assert_close(t2i, want)
    for _ in range(20):
        pictures, texts = objective.draw(enc, t2i, i2t)
        assert not (batch.pair_id[pictures] == batch.pair_id).any()
        assert not (batch.pair_id[texts] == batch.pair_id).any()
    only = objective._allowed(0, torch.tensor([1, 1]), torch.tensor([1, 1]))
    assert only.tolist() == [[False, True], [True, False]]


def test_itm_rows() -> None:
    model, batch = albef_model(), albef_batch()
    objective: Any = model.objectives["itm"]
    pictures, texts = torch.tensor([1, 2, 3, 0]), torch.tensor([3, 0, 1, 2])
    objective.draw = lambda enc, t2i, i2t: (pictures, texts)
    enc = encodings(model, batch)
    loss = objective(enc, batch)
    text, visual = enc.text("clean"), enc.visual("clean")
    assert text.mask is not None
    masks = text.mask

    def logit(text_row: int, visual_row: int) -> Tensor:
        one = text._replace(hidden=text.hidden[[text_row]], mask=masks[[text_row]])
        pooled = model.family.fuse(one, visual._replace(hidden=visual.hidden[[visual_row]])).pooled
        out: Tensor = objective.head(pooled)[0]
        return out

    rows = [logit(n, n) for n in range(4)] + [logit(n, int(pictures[n])) for n in range(4)]
    rows += [logit(int(texts[n]), n) for n in range(4)]
    labels = torch.tensor([1] * 4 + [0] * 8)
    torch.testing.assert_close(loss.value, F.cross_entropy(torch.stack(rows), labels))


def test_itm_with_the_loaders_negatives() -> None:
    family = albef.build(replace(albef.tiny(), dropout=0.0))
    objective = itm.build(itm.Config(negatives="loader"), family)
    model, batch = PretrainModel(family, {"itm": objective}), albef_batch()
    assert model.twin is None
    assert "embed" not in objective.needs
    for matched, labels in ((None, [1, 1, 1, 1]), (torch.tensor([True, False, False, True]), [1, 0, 0, 1])):
        loss = model(replace(batch, matched=matched), Moment(1)).losses["itm"]
        pooled = encodings(model, batch).fused("clean", "clean").pooled
        torch.testing.assert_close(loss.value, F.cross_entropy(objective.head(pooled), torch.tensor(labels)))


def test_itm_head_starts_as_its_authors() -> None:
    family = albef.build(replace(albef.tiny(), hidden=1024, dropout=0.0))
    pairs = itm.build(itm.Config(negatives="loader"), family)
    assert pairs.head.weight.std().item() == pytest.approx(0.02, rel=0.1)  # BERT's
    assert not pairs.head.bias.any()
    hard = itm.build(itm.Config(), family)  # torch's: uniform, of both
    assert hard.head.weight.abs().max() <= 1 / 32
    assert hard.head.bias.any()
    soho = itm.build(itm.Config(negatives="loader", bias=False), family)
    assert [name for name, _ in soho.named_parameters()] == ["head.weight"]


def test_itm_needs_two_samples() -> None:
    with pytest.raises(ConfigError, match="micro_batch"):
        albef_model()(albef_batch(size=1), Moment(1))


def test_mlm_by_hand_and_its_count() -> None:
    model, batch = moved_twin(albef_model()), albef_batch()
    objective: Any = model.objectives["mlm"]
    enc = encodings(model, batch)
    labels = batch.text["masked"].labels
    assert labels is not None
    table, table_m = model.family.word_embedding.weight, enc.momentum.family.word_embedding.weight
    logits = objective.head(enc.fused("masked", "clean").text, table)
    teacher = objective.head_twin(enc.momentum.fused("masked", "clean").text, table_m).softmax(-1)
    picked = labels != IGNORE
    hard = F.cross_entropy(logits[picked], labels[picked])
    soft = -(teacher * logits.log_softmax(-1)).sum(-1)[picked].mean()
    torch.testing.assert_close(objective(enc, batch).value, 0.6 * hard + 0.4 * soft)
    assert model.counts(batch) == {"mlm": picked.sum()}
    legacy = -(teacher * logits.log_softmax(1)).sum(-1)[picked].mean()
    objective.config = replace(objective.config, legacy_token_axis=True, scope="rank")
    torch.testing.assert_close(objective(enc, batch).value, 0.6 * hard + 0.4 * legacy)
    assert objective.count(batch) is None


@pytest.mark.parametrize("soften", [0.0, 0.4])
def test_mlm_without_labels_is_zero_with_zero_gradient(soften: float) -> None:
    model, batch = albef_model(soften=soften), albef_batch()
    masked = batch.text["masked"]
    assert masked.labels is not None
    text = {**batch.text, "masked": masked._replace(labels=torch.full_like(masked.labels, IGNORE))}
    loss = model(replace(batch, text=text), Moment(1)).losses["mlm"].value
    assert loss.item() == 0.0
    loss.backward()
    head: Any = model.objectives["mlm"].head
    assert all(not each.grad.any() for each in head.parameters())


def test_padding_cannot_change_a_loss() -> None:
    values = []
    for padding in (0, 4):
        model = moved_twin(albef_model())
        torch.manual_seed(3)
        losses = model(albef_batch(padding=padding), Moment(2)).losses
        values.append({name: loss.value for name, loss in losses.items()})
    torch.testing.assert_close(values[0], values[1])


def test_metrics_and_limits() -> None:
    model = albef_model()
    metrics = model(albef_batch(), Moment(2)).losses["itc"].metrics
    assert {"temperature", "itc/accuracy"} <= set(metrics)
    assert set(model.queue_metrics(2)) >= {"queue/image/filled", "queue/text/age_steps"}
    assert all(value.ndim == 0 and not value.requires_grad for value in metrics.values())
    contrast: Any = model.objectives["itc"]
    ((parameter, least, greatest),) = contrast.limits()
    assert parameter is model.family.temperature.value
    assert (least, greatest) == (0.001, 0.5)
    pairs = {id(twin) for _, twin in model.momentum_pairs()}
    words: Any = model.objectives["mlm"]
    assert {id(each) for each in words.head_twin.parameters()} <= pairs
    assert mlm.build(mlm.Config(soften=0.0), model.family).twins() == []
    assert not itm.build(itm.Config(keys="online"), model.family).momentum
