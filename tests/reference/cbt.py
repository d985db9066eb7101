"""CBT's losses by our family and objectives, in the names of an independent implementation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tests.reference.compare import Folder
from vlscale.families import cbt
from vlscale.model import Encodings, PretrainModel
from vlscale.objectives import mfm, pair_nce
from vlscale.types import Batch, Moment, Text, Visual
from vlscale.weights import fill, find

Tensors = dict[str, Tensor]
FRAMES = mfm.Config(states="visual", head="none", scope="rank")


def run(folder: Folder) -> dict[str, Tensors]:
    """{outputs file: {name: tensor}} of one step."""
    runner = Runner(folder)
    return {"outputs.safetensors": {**runner.values(), **runner.step()}}


def family_config(config: dict[str, Any]) -> cbt.Config:
    """Our sizes from a reference folder's config.json."""
    parts = [f"{part}_{size}" for part in ("visual", "text", "cross") for size in ("layers", "heads", "intermediate")]
    return cbt.Config(
        hidden=config["hidden_size"],
        **{part.replace("text_heads", "heads"): config[part] for part in parts},
        vocab=config["text_vocab"],
        max_positions=config["positions"],
        visual_positions=config["positions"],
        feats=config["feature_dim"],
        frames=max(config["video_len"]),
        text_length=max(config["text_len"]),
        dropout=0.0,
    )


class Runner:
    """The network under the stored weights."""

    def __init__(self, folder: Folder) -> None:
        inputs, weights = folder.tensors("batch.safetensors"), folder.tensors("weights.safetensors")
        config = folder.config
        family = cbt.build(family_config(config))
        options = replace(FRAMES, weight=config["w_visual"])
        self.frames = mfm.build(options, family)
        self.same_video = mfm.build(replace(FRAMES, candidates="video"), family)
        width = len(weights["score_hidden.weight"])
        pairs = pair_nce.Config(weight=config["w_cross"], direction="video_to_text", hidden=width)
        self.pairs = pair_nce.build(pairs, family)
        self.model = PretrainModel(family, {"mfm": self.frames, "pair_nce": self.pairs})
        fill(self.model, weights, cbt.PUBLISHED)
        ours = dict(self.model.named_parameters())
        self.names = {name: ours[find(name, cbt.PUBLISHED)[1][0]] for name in weights}
        self.batch = _batch(inputs)
        self.enc = Encodings(family, self.batch, Moment(1), {})

    @torch.no_grad()
    def values(self) -> Tensors:
        """States, scores and the loss that is no part of the total."""
        enc, batch = self.enc, self.batch
        masked, clean = enc.visual("masked"), enc.visual("clean")
        picked = self.frames.picked(batch)
        assert masked.keys is not None
        assert clean.keys is not None
        assert clean.mask is not None
        fused = enc.fused("clean", "clean")
        assert fused.text is not None
        assert fused.visual is not None
        assert fused.pooled is not None
        real = clean.mask
        return {
            "visual_embedding": clean.keys,
            "visual_context": clean.hidden,
            "visual_context_masked": masked.hidden,
            "text_context": enc.text("clean").hidden,
            "cross_hidden_aligned": torch.cat([fused.pooled[:, None], fused.visual, fused.text], dim=1),
            "cross_scores": self.pairs.scores(enc, batch)[0],
            "nce_visual_logits": masked.hidden[picked] @ masked.keys[real].T,
            "nce_visual_targets": (real.flatten().cumsum(dim=0) - 1)[picked.flatten()],
            "loss/visual_same_video_negatives_only": self.same_video(enc, batch).value,
        }

    def step(self) -> Tensors:
        """Losses and gradients."""
        made = self.model(self.batch, Moment(1))
        total = self.model.total(made.losses, {})
        total.backward()  # type: ignore[no-untyped-call]
        gradients = {f"grad/{name}": each.grad for name, each in self.names.items() if each.grad is not None}
        losses = {"cross": made.losses["pair_nce"].value, "visual": made.losses["mfm"].value, "total": total}
        return {**gradients, **{f"loss/{name}": value.detach() for name, value in losses.items()}}


def _batch(inputs: Tensors) -> Batch:
    mask, picked = inputs["video_mask"].bool(), inputs["masked_positions"].bool()
    clean = Visual(inputs["features"], mask)
    hidden = clean.feats.masked_fill(picked[..., None], 0.0)
    masked = clean._replace(feats=hidden, picked=picked, targets=clean.feats)
    text = Text(inputs["text_ids"], inputs["text_mask"].bool())
    return Batch({"clean": text}, {"clean": clean, "masked": masked}, torch.arange(len(mask)))
