"""Local mutual information: a sample's global feature against its own local ones (TCL, Yang et al. 2022, section
3.3)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlscale import distributed
from vlscale.errors import ConfigError
from vlscale.nn import contrast
from vlscale.objectives.base import EncodingsLike, FamilyLike, Objective, embed_of
from vlscale.types import Batch, Loss, lengthened

CELLS = 16  # of a picture where the grid is not known: 4 x 4, the authors' at 256 pixels


@dataclass(frozen=True)
class Config:
    """Options. TCL's contrastive loss is the mean of six terms, two each of `itc`, `imc` and `lmi`; each of these
    objectives gives the mean of its two, so that TCL's weight is 1/3 for all three."""

    weight: float = 1.0
    text: str = "clean"  # view
    visual: str = "clean"  # view
    momentum_visual: str | None = None  # view that the twin sees; None = the same (TCL: a second augmentation)
    scope: Literal["rank", "global"] = "rank"  # negatives: cells of this micro-batch, or of the whole step
    pool: int = 0  # cells per side of the patch grid (TCL's retrieval model: 4); 0 = as in TCL's pre-training


class Lmi(Objective):
    """Each global feature finds the patches and words of its own sample, made by the twin.

    Per row and local feature of the own sample: cross-entropy of that one against all local features of other
    samples. Local features are made without gradient, so that it reaches the global feature and the
    temperature alone. `pool: 0` averages windows of int(sqrt(side)) patches (models/model_pretrain.py, which
    works for 16 x 16 patches: 4 x 4 cells); where the grid does not divide, windows overlap, so that every
    patch counts.
    """

    needs = frozenset({"text", "visual", "embed", "temperature"})
    momentum = True

    def __init__(self, config: Config, family: FamilyLike) -> None:
        super().__init__()
        self.config = config
        self.weight = config.weight
        self.whole = config.scope == "global"
        self.twin_view = config.momentum_visual or config.visual
        self.views = frozenset({f"text.{config.text}", f"visual.{config.visual}", f"visual.{self.twin_view}"})
        self.embed, self.text_width = family.dims.embed, family.dims.text
        self.temperature = (family.temperature,)  # in a tuple: it is the family's submodule, not ours

    def share(self, enc: EncodingsLike, batch: Batch) -> tuple[Tensor, ...]:
        """Cells [b, K, E], words [b, text_length - 1, E] and which words are real [b, text_length - 1]."""
        self._embeds(enc)
        cells, words, real = self.local_features(enc)
        length = enc.family.inputs.text_length - 1
        return cells, lengthened(words, length), lengthened(real, length)

    def forward(self, enc: EncodingsLike, batch: Batch, shared: tuple[Tensor, ...] = ()) -> Loss:
        """Mean of the image loss (over samples and cells) and the text loss, [] fp32.

        The text loss is the mean over samples of each one's mean over its words; a caption of [CLS] alone has
        no words and does not count (the authors divide by zero).
        """
        image, text = self._embeds(enc)
        cells, words, real = shared or self.local_features(enc)
        own = slice(enc.first, enc.first + len(batch)) if shared else slice(0, len(batch))
        temperature = enc.family.temperature()
        of_cells = _terms(image, cells, None, own, temperature).mean()
        mask = real[own]
        of_words = _terms(text, words, real, own, temperature).masked_fill(~mask, 0.0)
        of_samples = of_words.sum(dim=1) / mask.sum(dim=1).clamp(min=1)
        spoken = real.any(dim=1).sum().clamp(min=1)  # samples with words, among all whose mean this is a part of
        of_texts = of_samples.sum() / spoken * (len(real) / len(batch))
        metrics = {"lmi/image": of_cells.detach(), "lmi/text": of_texts.detach()}
        return Loss((of_cells + of_texts) / 2, metrics)

    def limits(self) -> list[tuple[nn.Parameter, float, float]]:
        """The temperature's."""
        return [self.temperature[0].limits()]

    def passes(self) -> dict[str, float]:
        """Text and picture alone, by both networks."""
        text, visual = self.config.text, self.config.visual
        own = [f"encode_text:{text}", f"encode_visual:{visual}"]
        return dict.fromkeys([*own, f"momentum.encode_text:{text}", f"momentum.encode_visual:{self.twin_view}"], 1.0)

    def head_flops(self, batch: Batch) -> tuple[int, int]:
        """The similarity matrices; the words' projections.

        The patches' projections, below 1 % of the pass that made them, are not counted.
        """
        words = batch.text[self.config.text].ids.shape[1] - 1
        samples = len(batch) * (distributed.world_size() if self.whole else 1)
        columns = samples * ((self.config.pool**2 or CELLS) + words)
        return 2 * len(batch) * columns * self.embed, 2 * len(batch) * words * self.text_width * self.embed

    @torch.no_grad()
    def local_features(self, enc: EncodingsLike) -> tuple[Tensor, Tensor, Tensor]:
        """The twin's local features: cells [b, K, E] (means of unit vectors), words [b, L - 1, E] (unit length),
        and which words are real [b, L - 1]."""
        twin = enc.momentum
        patches, text = twin.visual(self.twin_view).hidden[:, 1:], twin.text(self.config.text)
        assert text.mask is not None, "texts have a mask"
        cells = _pooled(_unit(twin.family.visual_proj(patches)), self.config.pool)
        return cells, _unit(twin.family.text_proj(text.hidden[:, 1:])), text.mask[:, 1:]

    def _embeds(self, enc: EncodingsLike) -> tuple[Tensor, Tensor]:
        return embed_of(enc.visual(self.config.visual)), embed_of(enc.text(self.config.text))


def _terms(queries: Tensor, everyone: Tensor, real: Tensor | None, own: slice, temperature: Tensor) -> Tensor:
    """[b, K] cross-entropies: of each row, with one local feature of the own sample, against others' local features.

    Args:
        queries: [b, E] global features.
        everyone: [C, K, E] local features of the samples that are compared.
        real: [C, K] bool, False = no negative; None = all real.
        own: where the rows' samples are among the C.
        temperature: [1].
    """
    samples, size, _ = everyone.shape
    numbers = torch.arange(samples, device=queries.device)
    positives = (queries[:, None] * everyone[own]).sum(dim=2) / temperature
    others, _ = contrast.log_sum_exp(
        queries,
        everyone.flatten(0, 1),
        temperature,
        mask=None if real is None else real.flatten(),
        apart=(numbers[own], numbers.repeat_interleave(size)),
    )
    return torch.logaddexp(positives, others[:, None]) - positives


def _pooled(patches: Tensor, per_side: int) -> Tensor:
    """[B, side * side, E] row by row -> [B, cells * cells, E] means.

    Raises:
        ConfigError: the patches form no square, or the square is smaller than the cells asked for.
    """
    number, side = patches.shape[1], math.isqrt(patches.shape[1])
    cells = per_side or (side // math.isqrt(side) if side else 0)
    if side * side != number or not 0 < cells <= side:
        raise ConfigError(
            f"objectives.lmi pools a square grid of patches to {per_side or 'about sqrt(side)'} cells per side, and "
            f"got {number} patches; write objectives.lmi.pool between 1 and {max(side, 1)} and feed square pictures"
        )
    grid = patches.transpose(1, 2).reshape(len(patches), -1, side, side)
    return F.adaptive_avg_pool2d(grid, cells).flatten(2).transpose(1, 2)


def _unit(projected: Tensor) -> Tensor:
    return F.normalize(projected.float(), dim=-1)


build = Lmi
