"""Local mutual information: formulas by hand, padding, pooling, and a step in parts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.models import albef_batch
from tests.whole_steps import check_whole
from vlscale.errors import ConfigError
from vlscale.families import albef
from vlscale.model import Encodings, PretrainModel
from vlscale.objectives import imc, itc, itm, lmi, mlm
from vlscale.types import Batch, Moment

TEMPERATURE = 0.07


def model_of(image_size: int = 16, **options: Any) -> PretrainModel:
    """ALBEF's miniature (patches of 8 pixels), its twin elsewhere."""
    torch.manual_seed(0)
    family = albef.build(replace(albef.tiny(), dropout=0.0, image_size=image_size))
    model = PretrainModel(family, {"lmi": lmi.build(lmi.Config(momentum_visual="augmented", **options), family)})
    with torch.no_grad():
        for _, twin in model.momentum_pairs():
            twin.add_(0.1 * torch.randn_like(twin))
    return model


def two_views(size: int = 4, padding: int = 0, enlarged: int = 1, short: bool = False) -> Batch:
    """Two pictures of each sample; `short`: sample 1 has [CLS] alone."""
    batch, other = albef_batch(size, padding), albef_batch(size, seed=1)
    pictures = {"clean": batch.visual["clean"], "augmented": other.visual["clean"]}
    large = {
        view: each._replace(feats=each.feats.repeat_interleave(enlarged, 2).repeat_interleave(enlarged, 3))
        for view, each in pictures.items()
    }
    text = batch.text["clean"]
    if short:
        text = text._replace(
            mask=text.mask & ((torch.arange(size) != 1)[:, None] | (torch.arange(text.ids.shape[1]) < 1))
        )
    return replace(batch, text={"clean": text}, visual=large)


def encodings(model: PretrainModel, batch: Batch) -> Encodings:
    at = Moment(1)
    return Encodings(model.family, batch, at, model.key_queues(), model.momentum_encodings(batch, at))


def globals_of(enc: Encodings) -> tuple[Tensor, Tensor]:
    image, text = enc.visual("clean").embed, enc.text("clean").embed
    assert image is not None
    assert text is not None
    return image, text


def by_hand(enc: Encodings, grid: int, window: int) -> tuple[Tensor, Tensor]:
    """(image, text): loops over rows and local features."""
    (image, text), twin = globals_of(enc), enc.momentum
    patches = F.normalize(twin.family.visual_proj(twin.visual("augmented").hidden[:, 1:]), dim=-1)
    rows = patches.view(len(patches), grid, grid, -1)
    cells = [
        torch.stack(
            [
                rows[n, y : y + window, x : x + window].flatten(0, 1).mean(0)
                for y in range(0, grid, window)
                for x in range(0, grid, window)
            ]
        )
        for n in range(len(rows))
    ]
    stream = twin.text("clean")
    assert stream.mask is not None
    tokens = F.normalize(twin.family.text_proj(stream.hidden), dim=-1)
    words = [tokens[n, 1:][stream.mask[n, 1:]] for n in range(len(tokens))]
    return mean_terms(image, cells), mean_terms(text, words)


def mean_terms(queries: Tensor, local: list[Tensor]) -> Tensor:
    """Mean over samples of the mean over their local features; samples without any are left out."""
    means = []
    for n, own in enumerate(local):
        others = torch.cat([each for m, each in enumerate(local) if m != n])
        terms = []
        for feature in own:
            logits = torch.cat([feature[None], others]) @ queries[n] / TEMPERATURE
            terms.append(F.cross_entropy(logits[None], torch.zeros(1, dtype=torch.int64)))
        if terms:
            means.append(torch.stack(terms).mean())
    return torch.stack(means).mean()


@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize(("grid", "pool", "window"), [(2, 0, 1), (4, 0, 2), (4, 1, 4), (4, 4, 1)])
def test_by_hand(grid: int, pool: int, window: int, short: bool) -> None:
    model, batch = model_of(image_size=8 * grid, pool=pool), two_views(enlarged=grid // 2, short=short)
    enc = encodings(model, batch)
    image, text = by_hand(enc, grid, window)
    loss = model.objectives["lmi"](enc, batch)
    torch.testing.assert_close(loss.metrics["lmi/image"], image.detach())
    torch.testing.assert_close(loss.metrics["lmi/text"], text.detach())
    torch.testing.assert_close(loss.value, (image + text) / 2)
    asked = list(globals_of(enc))
    given = torch.autograd.grad(loss.value, asked, retain_graph=True)
    torch.testing.assert_close(given, torch.autograd.grad((image + text) / 2, asked))


def test_gradient_reaches_global_features_and_temperature_alone() -> None:
    model = model_of()
    model(two_views(), Moment(1)).losses["lmi"].value.backward()
    assert model.twin is not None
    assert all(parameter.grad is None for parameter in model.twin.parameters())
    family: Any = model.family
    for parameter in (family.temperature.value, family.visual_proj.weight, family.text_proj.weight):
        assert bool(parameter.grad.any())
    assert all(parameter.grad is None for parameter in family.fusion_stack.parameters())


@pytest.mark.parametrize("scope", ["rank", "global"])
def test_padding_and_nothing_to_contrast_with(scope: str) -> None:
    values = []
    for padding in (0, 3):
        values.append(model_of(scope=scope)(two_views(padding=padding, short=True), Moment(1)).losses["lmi"].value)
    torch.testing.assert_close(values[0], values[1])
    alone = model_of(scope=scope)(two_views(size=1), Moment(1)).losses["lmi"].value
    assert alone.item() == 0.0
    alone.backward()


def test_captions_without_words_contribute_nothing() -> None:
    model, batch = model_of(), two_views()
    text = batch.text["clean"]
    mute = text._replace(mask=text.mask & (torch.arange(text.ids.shape[1]) < 1))
    loss = model(replace(batch, text={"clean": mute}), Moment(1)).losses["lmi"]
    assert loss.metrics["lmi/text"].item() == 0.0
    loss.value.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_a_grid_that_does_not_divide_counts_every_patch() -> None:
    grid = torch.arange(25.0).view(1, 25, 1)
    pooled = lmi._pooled(grid, 0)[0, :, 0]  # windows of 2 on 5 x 5: two cells per side, which share the middle
    torch.testing.assert_close(pooled, torch.tensor([6.0, 8.0, 16.0, 18.0]))


@pytest.mark.parametrize(("patches", "pool"), [(5, 0), (4, 3), (0, 0)])
def test_no_such_pooling(patches: int, pool: int) -> None:
    with pytest.raises(ConfigError, match=rf"got {patches} patches"):
        lmi._pooled(torch.zeros(1, patches, 2), pool)


def whole_model() -> PretrainModel:
    return model_of(scope="global")


def tcl_model() -> PretrainModel:
    """All of TCL's objectives over the whole step."""
    torch.manual_seed(0)
    family = albef.build(replace(albef.tiny(), dropout=0.0))
    view: dict[str, Any] = {"momentum_visual": "augmented"}
    objectives = {
        "itc": itc.build(itc.Config(weight=1 / 3, queue=24, scope="global", **view), family),
        "imc": imc.build(imc.Config(weight=1 / 3, queue=24, scope="global", **view), family),
        "lmi": lmi.build(lmi.Config(weight=1 / 3, scope="global", **view), family),
        "itm": itm.build(itm.Config(scope="global", **view), family),
        "mlm": mlm.build(mlm.Config(**view), family),
    }
    return PretrainModel(family, objectives)


@pytest.mark.parametrize("make", [whole_model, tcl_model])
@pytest.mark.parametrize(("world", "number"), [(1, 2), (1, 4), (2, 1), (2, 2)])
def test_a_step_in_parts_equals_one_batch(world: int, number: int, make: Any) -> None:
    batch = two_views(8, short=True)
    check_whole(make, replace(batch, text={**albef_batch(8).text, **batch.text}), world, number)
