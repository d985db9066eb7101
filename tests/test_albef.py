"""The family: what it offers, its dtype rules, and its published size."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.models import albef_batch, albef_model
from vlscale.errors import ConfigError
from vlscale.families import albef
from vlscale.types import Moment


def test_published_size() -> None:
    with torch.device("meta"):
        family = albef.build(albef.Config())
    ours = sum(parameter.numel() for parameter in family.parameters())
    # The authors' model counts 209,937,725; its matching and masked-word heads are objectives' here.
    heads = (768 * 2 + 2) + (768 * 768 + 768 + 2 * 768 + 30522)
    assert ours + heads == 209_937_725


def test_streams() -> None:
    model, batch = albef_model(), albef_batch()
    text = model.family.encode_text(batch.text["clean"])
    visual = model.family.encode_visual(batch.visual["clean"])
    fused = model.family.fuse(text, visual)
    assert text.embed is not None
    assert fused.text is not None
    assert fused.pooled is not None
    torch.testing.assert_close(text.embed.norm(dim=1), torch.ones(4))
    assert visual.hidden.shape == (4, 1 + 4, 16)
    assert torch.equal(fused.pooled, fused.text[:, 0])


def test_padding_changes_no_token() -> None:
    model = albef_model()
    plain, padded = albef_batch(), albef_batch(padding=3)
    short = model.family.encode_text(plain.text["clean"])
    long = model.family.encode_text(padded.text["clean"])
    length = plain.text["clean"].ids.shape[1]
    mask = plain.text["clean"].mask
    torch.testing.assert_close(short.hidden[mask], long.hidden[:, :length][mask])
    torch.testing.assert_close(short.embed, long.embed)


def test_causal_text_does_not_see_what_comes_later() -> None:
    model, batch = albef_model(), albef_batch()
    text = model.family.encode_text(batch.text["clean"])
    visual = model.family.encode_visual(batch.visual["clean"])
    changed = text._replace(hidden=text.hidden.clone())
    changed.hidden[:, 3:] += 1.0
    before = model.family.fuse(text, visual, causal=True).text
    after = model.family.fuse(changed, visual, causal=True).text
    assert before is not None
    assert after is not None
    torch.testing.assert_close(before[:, :3], after[:, :3])


def test_bf16_keeps_hidden_states_small_and_embeddings_fp32() -> None:
    model, batch = albef_model().to(torch.bfloat16), albef_batch()
    text = model.family.encode_text(batch.text["clean"])
    assert text.embed is not None
    assert text.hidden.dtype == torch.bfloat16
    assert text.embed.dtype == torch.float32
    assert model.family.temperature().dtype == torch.float32
    losses = model(batch, Moment(1)).losses
    assert {loss.value.dtype for loss in losses.values()} == {torch.float32}


@pytest.mark.parametrize("wrong", [{"image_size": 20}, {"heads": 3}, {"text_length": 99}])
def test_sizes_that_do_not_divide(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"family\."):
        albef.build(replace(albef.tiny(), **wrong))
