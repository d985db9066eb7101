"""SigLIP's loss (Zhai et al. 2023, equation 1 and algorithm 1): each pair of the batch is judged for itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vlscale import distributed
from vlscale.nn import contrast
from vlscale.objectives.base import EncodingsLike, FamilyLike, Objective, embed_of
from vlscale.types import Batch, Loss


@dataclass(frozen=True)
class Config:
    """Options; the authors' scale, 10 at the start, is the family's temperature."""

    weight: float = 1.0
    text: str = "clean"  # view
    visual: str = "clean"  # view
    bias: float = -10.0  # at the start, where nearly all pairs are negatives
    scope: Literal["rank", "global"] = "global"  # texts of this micro-batch, or of the whole step


class Sigmoid(Objective):
    """Every picture with every text: does the text belong to it? The logit is scale * (i . t) + bias.

    With `scope: global` no rank ever holds all texts where a step has one micro-batch per rank: texts travel
    round the ring of ranks (section 3.3). Steps of several micro-batches share them as other objectives do.
    """

    needs = frozenset({"text", "visual", "embed", "temperature"})

    def __init__(self, config: Config, family: FamilyLike) -> None:
        super().__init__()
        self.config = config
        self.weight = config.weight
        self.whole = config.scope == "global"
        self.views = frozenset({f"text.{config.text}", f"visual.{config.visual}"})
        self.embed = family.dims.embed
        self.bias = nn.Parameter(torch.full((1,), config.bias))
        self.temperature = (family.temperature,)  # in a tuple: it is the family's submodule, not ours

    def share(self, enc: EncodingsLike, batch: Batch) -> tuple[Tensor, ...]:
        """The texts' embeddings [b, E]; nothing where they go round the ring."""
        _, text = self._embeds(enc)
        return () if enc.alone else (text,)

    def forward(self, enc: EncodingsLike, batch: Batch, shared: tuple[Tensor, ...] = ()) -> Loss:
        """Sum over all pairs of own pictures and texts in scope, over the number of own pictures, [] fp32."""
        image, text = self._embeds(enc)
        temperature = enc.family.temperature()
        scale, bias = 1 / temperature, self.bias.float()
        if shared:
            total = contrast.sigmoid_pairs(image, shared[0], scale, bias, enc.first)
        elif self.whole:
            total = ring_pairs(image, text, scale, bias)
        else:
            total = contrast.sigmoid_pairs(image, text, scale, bias, 0)
        with torch.no_grad():
            found = scale * (image.float() * text.float()).sum(dim=1) + bias > 0
        metrics = {
            "sigmoid/bias": bias.detach()[0],
            "sigmoid/recall": found.float().mean(),  # share of true pairs that it takes for true
            "temperature": temperature.detach()[0],
        }
        return Loss(total / len(image), metrics)

    def limits(self) -> list[tuple[nn.Parameter, float, float]]:
        """The temperature's."""
        return [self.temperature[0].limits()]

    def passes(self) -> dict[str, float]:
        """Text and picture alone."""
        return {f"encode_text:{self.config.text}": 1.0, f"encode_visual:{self.config.visual}": 1.0}

    def head_flops(self, batch: Batch) -> tuple[int, int]:
        """The similarity matrix."""
        columns = len(batch) * (distributed.world_size() if self.whole else 1)
        return 2 * len(batch) * columns * self.embed, 0

    def _embeds(self, enc: EncodingsLike) -> tuple[Tensor, Tensor]:
        return embed_of(enc.visual(self.config.visual)), embed_of(enc.text(self.config.text))


def ring_pairs(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """`contrast.sigmoid_pairs` of this rank's pictures with the texts of all ranks, in memory linear in b.

    Every rank takes part with as many rows. The gradient to text is that of the sum over ranks of what each
    makes of the result; it is gathered on the way, before backward, and so is right only if ALL RANKS WEIGH
    THE RESULT ALIKE, as they do in a loss that is a plain mean (`PretrainModel.total`).

    Args:
        image: [b, E] of this rank.
        text: [b, E] of this rank; row i belongs to image row i.
        scale: [1].
        bias: [1].

    Returns:
        [] fp32, with gradient to those of the four that want one.
    """
    inputs = (image.float(), text.float(), scale.float(), bias.float())
    total: Tensor = _Ring.apply(*inputs, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
    return total


class _Ring(torch.autograd.Function):
    """A block of texts travels with the gradient that it has met so far; after W hops both are home."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, wanted: bool) -> Tensor:
        needs = [wanted and need for need in ctx.needs_input_grad[:4]]
        total = image.new_zeros(())
        gradients = [torch.zeros_like(each) for each in (image, text, scale, bias)]
        ranks = distributed.world_size()
        for hop in range(ranks):
            pairs, found = _block([image, text, scale, bias], needs, first=0 if hop == 0 else None)
            total += pairs
            for whole, part in zip(gradients, found, strict=True):
                if part is not None:
                    whole += part
            if needs[1]:
                text, gradients[1] = distributed.pass_on(torch.cat([text, gradients[1]], dim=1)).chunk(2, dim=1)
            elif hop < ranks - 1:
                text = distributed.pass_on(text)
        ctx.save_for_backward(*(whole if need else None for whole, need in zip(gradients, needs, strict=True)))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return *(None if whole is None else whole * gradient for whole in ctx.saved_tensors), None


def _block(inputs: list[Tensor], needs: list[bool], first: int | None) -> tuple[Tensor, list[Tensor | None]]:
    """The sum over one block of pairs, and its gradients to those inputs that need one."""
    leaves = [each.detach().requires_grad_(need) for each, need in zip(inputs, needs, strict=True)]
    image, text, scale, bias = leaves
    with torch.set_grad_enabled(any(needs)):
        total = contrast.sigmoid_pairs(image, text, scale, bias, first)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    found = iter(torch.autograd.grad(total, wanted) if wanted else ())
    return total.detach(), [next(found) if need else None for need in needs]


build = Sigmoid
