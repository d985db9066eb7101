"""Image-text matching with hard negatives from the micro-batch (ALBEF, equation 4 and section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlscale.errors import ConfigError
from vlscale.objectives.base import EncodingsLike, FamilyLike, Objective
from vlscale.types import Batch, Fused, Loss, Stream


@dataclass(frozen=True)
class Config:
    """Options. Negatives are drawn in proportion to softmax(similarity / temperature)."""

    weight: float = 1.0
    text: str = "clean"  # view
    visual: str = "clean"  # view
    keys: Literal["momentum", "online"] = "momentum"  # whose embeddings the online ones are compared with
    same_picture: Literal["negative", "excluded"] = "excluded"  # authors: negative
    epsilon: float = 1e-4  # added to each weight: 64 weights can underflow to one-hot (ALBEF issues 18, 93)


class Itm(Objective):
    """A true pair among three: each text with a wrong picture, each picture with a wrong text."""

    needs = frozenset({"text", "visual", "embed", "fuse"})

    def __init__(self, config: Config, family: FamilyLike) -> None:
        super().__init__()
        self.config = config
        self.weight = config.weight
        self.momentum = config.keys == "momentum"
        self.views = frozenset({f"text.{config.text}", f"visual.{config.visual}"})
        self.embed = family.dims.embed
        self.head = nn.Linear(family.dims.fused, 2)  # column 1 = match

    def forward(self, enc: EncodingsLike, batch: Batch) -> Loss:
        """Mean cross-entropy over B matched and 2 B mismatched pairs, [] fp32.

        Raises:
            ConfigError: a micro-batch of one sample has no negative.
        """
        if len(batch) < 2:
            raise ConfigError(
                "objectives.itm draws negatives within a micro-batch and got one sample; "
                "set data.micro_batch to at least 2"
            )
        text, visual = enc.text(self.config.text), enc.visual(self.config.visual)
        true = _pooled(enc.fused(self.config.text, self.config.visual))
        with torch.no_grad():
            picture_of_text, text_of_picture = self.draw(*self.weights(enc, batch.pair_id))
        false = _pooled(
            enc.family.fuse(_join(text, _rows(text, text_of_picture)), _join(_rows(visual, picture_of_text), visual))
        )
        logits = self.logits(torch.cat([true, false]))
        labels = torch.arange(len(logits), device=logits.device) < len(batch)
        accuracy = (logits.detach().argmax(dim=1) == labels).float().mean()
        return Loss(F.cross_entropy(logits, labels.long()), {"itm/accuracy": accuracy})

    def logits(self, pooled: Tensor) -> Tensor:
        """[N, D] -> [N, 2] fp32; column 1 = match."""
        out: Tensor = self.head(pooled).float()
        return out

    def weights(self, enc: EncodingsLike, ids: Tensor) -> tuple[Tensor, Tensor]:
        """How likely each column is drawn: [B, B] pictures for each text, [B, B] texts for each picture."""
        source = enc.momentum if self.momentum else enc
        image, text = _embed(enc.visual(self.config.visual)), _embed(enc.text(self.config.text))
        image_keys = _embed(source.visual(self.config.visual))
        text_keys = _embed(source.text(self.config.text))
        temperature = enc.family.temperature()
        allowed = self._allowed(ids)
        t2i = (text @ image_keys.T / temperature).softmax(dim=1) + self.config.epsilon
        i2t = (image @ text_keys.T / temperature).softmax(dim=1) + self.config.epsilon
        return t2i * allowed, i2t * allowed

    def draw(self, t2i: Tensor, i2t: Tensor) -> tuple[Tensor, Tensor]:
        """[B] int64 pictures for the texts, then [B] int64 texts for the pictures; torch's global RNG."""
        pictures = torch.multinomial(t2i, 1)[:, 0]
        return pictures, torch.multinomial(i2t, 1)[:, 0]

    def passes(self) -> dict[str, float]:
        """The shared ones, and two fusion passes for the 2 B mismatched rows."""
        text, visual = self.config.text, self.config.visual
        own = [f"encode_text:{text}", f"encode_visual:{visual}"]
        shared = [*own, f"fuse:{text}:{visual}", *(f"momentum.{name}" for name in own if self.momentum)]
        return {**dict.fromkeys(shared, 1.0), "fuse": 2.0}

    def head_flops(self, batch: Batch) -> tuple[int, int]:
        """The head on 3 B rows; the two similarity matrices of the draw."""
        head = 2 * 3 * len(batch) * self.head.in_features * self.head.out_features
        return head, 2 * 2 * len(batch) ** 2 * self.embed

    def _allowed(self, ids: Tensor) -> Tensor:
        others = ~torch.eye(len(ids), dtype=torch.bool, device=ids.device)
        if self.config.same_picture == "negative":
            return others
        allowed = ids[:, None] != ids[None, :]
        # A row whose whole micro-batch shows one picture has only its other captions to draw from.
        return torch.where(allowed.any(dim=1, keepdim=True), allowed, others)


def _pooled(fused: Fused) -> Tensor:
    assert fused.pooled is not None, "a family that offers `fuse` fills Fused.pooled"
    return fused.pooled


def _embed(stream: Stream) -> Tensor:
    assert stream.embed is not None, "a family that offers `embed` fills Stream.embed"
    return stream.embed


def _rows(stream: Stream, index: Tensor) -> Stream:
    return Stream(stream.hidden[index], None if stream.mask is None else stream.mask[index])


def _join(first: Stream, second: Stream) -> Stream:
    masks = [part.mask for part in (first, second) if part.mask is not None]
    return Stream(torch.cat([first.hidden, second.hidden]), torch.cat(masks) if masks else None)


build = Itm
