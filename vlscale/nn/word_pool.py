"""Text towers without order: word vectors, a layer of each, and the greatest of every number (Miech et al. 2019)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from vlscale.types import Text, lengthened


class Words(NamedTuple):
    """Words one by one."""

    hidden: Tensor  # [N, L, D], never negative
    mask: Tensor  # [N, L] bool, the places that take part in the maximum


class WordPool(nn.Module):
    """Whole words through their vectors, a linear layer and ReLU; `pool` takes the maximum over them.

    Args:
        vocab: V, padding counted (id 0).
        word_width: of a vector.
        width: D.
        length: texts are padded up to it.
        padding: padding takes part in the maximum, as in the authors' code (model.py:75-79), where a text's end is
            then seen as one more word; False = words alone.
        trained: the word vectors learn; else they have no gradient and no optimizer state.
    """

    def __init__(
        self, vocab: int, word_width: int, width: int, length: int, padding: bool = True, trained: bool = False
    ) -> None:
        super().__init__()
        self.vectors = nn.Embedding(vocab, word_width)
        nn.init.normal_(self.vectors.weight, std=word_width**-0.5)  # until `init.text` fills it
        with torch.no_grad():
            self.vectors.weight[0] = 0
        self.vectors.requires_grad_(trained)
        self.linear = nn.Linear(word_width, width)
        self.length, self.padding = length, padding

    def forward(self, text: Text) -> Words:
        """ids [N, L], cut or padded to `length`."""
        ids = lengthened(text.ids[:, : self.length], self.length)
        mask = lengthened(text.mask[:, : self.length], self.length)
        hidden: Tensor = self.linear(self.vectors(ids.masked_fill(~mask, 0))).relu()
        return Words(hidden, torch.ones_like(mask) if self.padding else mask)

    def flops(self) -> int:
        """Multiply-add FLOPs (2 per MAC) of one text."""
        return 2 * self.length * self.linear.in_features * self.linear.out_features


def pool(words: Words) -> Tensor:
    """[N, D] the greatest of every number; 0 where there is no word, because none is below it."""
    return words.hidden.masked_fill(~words.mask[..., None], 0.0).amax(dim=1)
