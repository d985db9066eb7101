"""What CLIP's and SigLIP's towers are made of, and how their weights start."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlscale.nn.attention import SelfAttention
from vlscale.nn.transformer import Mlp, PreNormBlock, quick_gelu
from vlscale.nn.vit import AttentionPool, PatchEmbedding

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "erf": F.gelu,
    "quick": quick_gelu,
    "tanh": partial(F.gelu, approximate="tanh"),
}
WORD_STD, POSITION_STD = 0.02, 0.01  # open_clip src/open_clip/model.py, init_parameters


class TokensAndPositions(nn.Module):
    """Word and position embeddings, summed."""

    def __init__(self, vocab: int, width: int, length: int) -> None:
        super().__init__()
        self.word = nn.Embedding(vocab, width)
        self.positions = nn.Embedding(length, width)
        nn.init.normal_(self.word.weight, std=WORD_STD)
        nn.init.normal_(self.positions.weight, std=POSITION_STD)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [B, L] int64 -> [B, L, D]."""
        out: Tensor = self.word(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        return out


def clip_blocks(number: int, width: int, heads: int, inner: int, gelu: str, eps: float) -> list[PreNormBlock]:
    """Blocks at torch's own start, which `nn.MultiheadAttention` has and the authors' image tower keeps."""
    blocks = [PreNormBlock(width, heads, inner, eps, activation=ACTIVATIONS[gelu]) for _ in range(number)]
    for block in blocks:
        nn.init.xavier_uniform_(block.attention.qkv.weight)
        nn.init.zeros_(block.attention.qkv.bias)
        nn.init.zeros_(block.attention.output.bias)
    return blocks


def init_text_blocks(width: int, layers: int) -> Callable[[nn.Module], None]:
    """The text blocks' matrices (open_clip src/open_clip/model.py); biases stay. For `Module.apply`."""
    into_residual = width**-0.5 * (2 * layers) ** -0.5

    def init(module: nn.Module) -> None:
        if isinstance(module, PreNormBlock):
            nn.init.normal_(module.attention.qkv.weight, std=width**-0.5)
            nn.init.normal_(module.attention.output.weight, std=into_residual)
            nn.init.normal_(module.mlp.fc1.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(module.mlp.fc2.weight, std=into_residual)

    return init


def init_siglip(module: nn.Module) -> None:
    """big_vision's start, flax's own where it says nothing: Xavier in attention and MLPs, else 1 / sqrt(fan in) and
    biases at 0. For `Module.apply`."""
    if isinstance(module, SelfAttention):
        _xavier(*module.qkv.weight.chunk(3), module.output.weight)
    elif isinstance(module, AttentionPool):
        _xavier(module.query.weight, *module.key_value.weight.chunk(2), module.output.weight)
        for layer in (module.query, module.key_value, module.output):
            nn.init.zeros_(layer.bias)
    elif isinstance(module, Mlp):
        _xavier(module.fc1.weight, module.fc2.weight)
        for layer in (module.fc1, module.fc2):
            nn.init.normal_(layer.bias, std=1e-6)  # models/vit.py, MlpBlock
    elif isinstance(module, PatchEmbedding):
        fan_in = module.projection.weight[0].numel()
        nn.init.normal_(module.projection.weight, std=fan_in**-0.5)
        if module.projection.bias is not None:
            nn.init.zeros_(module.projection.bias)
    elif isinstance(module, TokensAndPositions):
        for table in (module.word, module.positions):
            nn.init.normal_(table.weight, std=table.embedding_dim**-0.5)


def _xavier(*matrices: Tensor) -> None:
    for matrix in matrices:
        nn.init.xavier_uniform_(matrix)
