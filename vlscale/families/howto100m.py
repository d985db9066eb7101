"""HowTo100M (Miech et al. 2019, arXiv 1906.03327): clips and captions, pooled by their maximum, meet behind gated
embedding units. Code: antoine77340/howto100m at 50af0ff (model.py)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlscale.errors import ConfigError
from vlscale.families.base import Family, Rename, Renames, Size
from vlscale.nn.word_pool import WordPool, pool
from vlscale.types import Dims, Inputs, Stream, Text, Visual


@dataclass(frozen=True)
class Config:
    """Sizes; the defaults are the paper's, and those of the command in the authors' README."""

    streams: tuple[int, ...] = (2048, 2048)  # features: ResNet-152 (1 a second), ResNeXt-101 (1.5 a second)
    frames: int = 128  # most rows of features of a clip; the authors read all
    vocab: int = 66251  # MIL-NCE's dictionary of these captions, and padding; the authors look up in all GoogleNews
    word_width: int = 300  # word2vec's
    text_length: int = 20  # args.py, max_words
    embed: int = 4096  # the released weights have 6144, args.py 2048
    sentence: int = 0  # width of the pooled words (args.py, sentence_dim); 0 = `embed`
    train_words: bool = False  # word vectors are inputs to the authors, not parameters
    # Empty places up to `text_length` take part in the maximum over words (model.py:75-79); False = words alone.
    padding_words: bool = True

    @property
    def inputs(self) -> Inputs:
        """What the data plane feeds this family."""
        return Inputs(0, self.text_length, False, feats=sum(self.streams), frames=self.frames, words=True)


class Howto100m(Family):
    """Clips and texts on their own; no part of either knows an order.

    Raises:
        ConfigError: no stream of features.
    """

    offers = frozenset({"text", "visual", "embed"})
    text_proj: GatedUnit
    visual_proj: GatedUnit

    def __init__(self, config: Config) -> None:
        super().__init__()
        if not config.streams:
            raise ConfigError("family.streams is empty; write the widths of the features, e.g. [2048, 2048]")
        self.config = c = config
        width = c.sentence or c.embed
        self.words = WordPool(c.vocab, c.word_width, width, c.text_length, c.padding_words, c.train_words)
        self.text_proj = GatedUnit(width, c.embed)
        self.visual_proj = GatedUnit(sum(c.streams), c.embed)
        self.dims = Dims(text=width, visual=sum(c.streams), fused=0, embed=c.embed, vocab=c.vocab, feats=sum(c.streams))
        self.inputs = c.inputs

    @property
    def word_embedding(self) -> nn.Embedding:
        """[V, D] word vectors; row 0 is padding."""
        return self.words.vectors

    def encode_text(self, text: Text) -> Stream:
        """hidden = words one by one, [B, L, D]; embed = their maximum through the gated unit, unit length."""
        words = self.words(text)
        return Stream(words.hidden, words.mask, F.normalize(self.text_proj(pool(words)).float(), dim=1))

    def encode_visual(self, visual: Visual) -> Stream:
        """hidden = the clip's features, [B, 1, F]: per stream the maximum over frames, of unit length."""
        pooled = self.pool(visual)
        embed = self.visual_proj(pooled.to(self.visual_proj.linear.weight.dtype))
        return Stream(pooled[:, None], None, F.normalize(embed.float(), dim=1))

    def pool(self, visual: Visual) -> Tensor:
        """[B, T, F] -> [B, F]: each stream's maximum over real frames (0 without one), each of unit length."""
        feats = visual.feats.float()
        if visual.mask is not None:
            feats = feats.masked_fill(~visual.mask[..., None], -torch.inf)
            feats = feats.masked_fill(~visual.mask.any(dim=1)[:, None, None], 0.0)
        parts = torch.split(feats.amax(dim=1), list(self.config.streams), dim=1)
        return torch.cat([F.normalize(part, dim=1) for part in parts], dim=1)

    def flops(self, text_tokens: int) -> dict[str, int]:
        """See `Family.flops`; texts are always `text_length` long."""
        return {
            "encode_text": self.words.flops() + self.text_proj.flops(),
            "encode_visual": self.visual_proj.flops(),
        }


class GatedUnit(nn.Module):
    """y = Wx + b, times sigmoid(W'y + b'): "gated embedding unit" (Miech et al. 2018, arXiv 1804.02516, equation 2),
    without its normalisation."""

    def __init__(self, width: int, embed: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, embed)
        self.gate = nn.Linear(embed, embed)

    def forward(self, pooled: Tensor) -> Tensor:
        """[..., D] -> [..., E]."""
        projected = self.linear(pooled)
        gated: Tensor = projected * self.gate(projected).sigmoid()
        return gated

    def flops(self) -> int:
        """Multiply-add FLOPs of one row."""
        return 2 * self.linear.out_features * (self.linear.in_features + self.linear.out_features)


build = Howto100m


def tiny() -> Config:
    """A miniature with every part of the published model."""
    return Config(streams=(6, 4), frames=6, vocab=64, word_width=8, text_length=12, embed=16, sentence=12)


def _row(source: str, target: str, change: Callable[[Tensor, torch.Size], Tensor] | None = None) -> Rename:
    return Rename(source, (f"family.{target}", f"twin.{target}"), change)


PUBLISHED = Renames(
    (
        _row(r"text_pooling\.fc\.(\w+)", r"words.linear.\1"),
        _row(r"GU_text\.fc\.(\w+)", r"text_proj.linear.\1"),
        _row(r"GU_text\.cg\.fc\.(\w+)", r"text_proj.gate.\1"),
        _row(r"GU_video\.fc\.(\w+)", r"visual_proj.linear.\1"),
        _row(r"GU_video\.cg\.fc\.(\w+)", r"visual_proj.gate.\1"),
        _row(r"word_vectors\.weight", "words.vectors.weight"),  # our name: their files hold none
        Rename(r"GU_(?:text|video)\.cg\.batch_norm\.\w+"),  # in every file, applied nowhere (model.py:83-94)
    ),
    fills=r"(?:family|twin)\.(?!words\.vectors).*",
)


def _check_streams(width: int, known: Mapping[str, Any]) -> None:
    """ConfigError if the streams are not the file's: shapes tell their sum alone."""
    if sum(known["streams"]) != width:
        raise ConfigError(
            f"the file's clips have {width} features, and shapes do not tell their streams; add e.g. "
            f"family.streams=[{width - width // 2},{width // 2}]"
        )


SIZES = (
    Size("word_width", r"text_pooling\.fc\.weight", 1),
    Size("embed", r"GU_text\.fc\.weight", 0),
    Size("sentence", r"text_pooling\.fc\.weight", 0, lambda width, known: 0 if width == known["embed"] else width),
    Size("streams", r"GU_video\.fc\.weight", 1, _check_streams),
)

Howto100m.published = PUBLISHED
