"""TCL's pre-training steps: ALBEF's network and runner, a second view for the twin, and two more objectives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.reference import albef
from tests.reference.compare import Folder
from vlscale.model import Encodings
from vlscale.nn import contrast
from vlscale.objectives import imc, itc, lmi
from vlscale.objectives.base import FamilyLike
from vlscale.types import Visual

THIRD = 1 / 3  # the authors' mean of six terms, of which each objective gives the mean of two
NEVER = 10_000.0  # what the authors write where there is no pair


def run(folder: Folder) -> dict[str, albef.Values]:
    """{outputs file: {name: tensor}} of every step, in one process and as two ranks."""
    return albef.run_steps(folder, _Runner)


class _Runner(albef.Runner):
    """ALBEF's with the twin on the second view, and its contrast among six terms."""

    twin_view = "augmented"

    def build_contrasts(self, family: FamilyLike) -> dict[str, Any]:
        """Contrast across modalities, within each, and of whole and parts."""
        view, queue = self.twin_view, self.config["queue_size"]
        self.lmi = lmi.build(lmi.Config(weight=THIRD, momentum_visual=view), family)
        return {
            "itc": itc.build(itc.Config(weight=THIRD, momentum_visual=view, queue=queue), family),
            "imc": imc.build(imc.Config(weight=THIRD, momentum_visual=view, queue=queue), family),
            "lmi": self.lmi,
        }

    def views(self, inputs: albef.Tensors) -> dict[str, Visual]:
        """Two of each picture."""
        return {"clean": Visual(inputs["image"]), "augmented": Visual(inputs["image_aug"])}

    def contrast_values(self, enc: Encodings, losses: albef.Losses) -> albef.Tensors:
        """ALBEF's, and those of the four further terms."""
        cells, words, real = self.lmi.local_features(enc)
        patches = enc.momentum.visual(self.twin_view).hidden[:, 1:]
        queries, temperature = albef.embeds(enc, "clean"), enc.family.temperature()
        every = torch.ones(cells.shape[:2], dtype=torch.bool)
        within, local = losses["imc"].metrics, losses["lmi"].metrics
        return {
            **super().contrast_values(enc, losses),
            "sim_i2i": self.similarities(enc, "i2i"),
            "sim_t2t": self.similarities(enc, "t2t"),
            "image_feat_m_local": F.normalize(enc.momentum.family.visual_proj(patches), dim=-1),
            "image_feat_m_local_pooled": cells,
            "text_feat_m_local": words,
            "lmi_logits_image": _local_logits(queries["i"], cells, every, temperature),
            "lmi_logits_text": _local_logits(queries["t"], words, real, temperature),
            "loss_i2i": within["imc/i2i"],
            "loss_t2t": within["imc/t2t"],
            "loss_i2i_local": local["lmi/image"],
            "loss_t2t_local": local["lmi/text"],
        }


def _local_logits(queries: Tensor, features: Tensor, real: Tensor, temperature: Tensor) -> Tensor:
    """[B, K, 1 + B * K] as the authors lay them out: a positive, then everything, the own sample's left out.

    Args:
        queries: [B, E].
        features: [B, K, E].
        real: [B, K] bool; a feature that is not real is right as a positive and never a negative.
        temperature: [1].
    """
    number, size, _ = features.shape
    every = contrast.logits(queries, features.flatten(0, 1), temperature).view(number, number, size)
    own = torch.eye(number, dtype=torch.bool)
    positives = every[own].masked_fill(~real, NEVER)
    negatives = every.masked_fill(~real, -NEVER).masked_fill(own[:, :, None], -NEVER)
    return torch.cat([positives[:, :, None], negatives.flatten(1)[:, None].expand(-1, size, -1)], dim=2)
