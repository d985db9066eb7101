"""CLIP: contrastive language-image pre-training (Radford et al. 2021, arXiv 2103.00020). A ViT and a causal text
transformer that meet only in their unit-length embeddings. Code: mlfoundations/open_clip at 89fb801."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlscale.errors import ConfigError
from vlscale.families.base import Family, Rename, Renames
from vlscale.nn.attention import causal_mask
from vlscale.nn.temperature import LogitScale
from vlscale.nn.transformer import PreNormBlock, Stack, quick_gelu
from vlscale.nn.vit import ClassAndPositions, PatchEmbedding, resize_positions
from vlscale.types import Dims, Inputs, Stream, Text, Visual

NORM_EPS = 1e-5  # torch's default, which the authors keep
WORD_STD, POSITION_STD = 0.02, 0.01  # src/open_clip/model.py, init_parameters


@dataclass(frozen=True)
class Config:
    """Sizes; the defaults are ViT-B/32's (src/open_clip/model_configs/ViT-B-32.json)."""

    image_size: int = 224
    patch: int = 32
    visual_width: int = 768
    visual_layers: int = 12
    visual_heads: int = 12  # head_width 64
    visual_intermediate: int = 3072  # mlp_ratio 4
    hidden: int = 512  # of the text transformer, as are the next four
    heads: int = 8
    text_layers: int = 12
    intermediate: int = 2048
    vocab: int = 49408
    text_length: int = 77  # positions, start and end token counted
    embed: int = 512
    quick_gelu: bool = False  # OpenAI's weights and open_clip's "-quickgelu" models want True
    # Where a text is read: `end`, its last real token; `largest`, the first token with the largest id. The same
    # in CLIP's vocabulary, where the end token has the largest id; of other vocabularies only `end` is right.
    pool: Literal["end", "largest"] = "end"
    temperature: float = 0.07  # paper, section 2.5; SigLIP starts at 0.1 (arXiv 2303.15343, section 3.2)
    scale_least: float = 1.0  # of 1 / temperature; open_clip_train/train.py clamps the logarithm to [0, ln 100]
    scale_greatest: float = 100.0

    @property
    def inputs(self) -> Inputs:
        """What the data plane feeds this family: the end token ends every text."""
        return Inputs(self.image_size, self.text_length, separator=True)


class Clip(Family):
    """Pictures and texts on their own.

    Raises:
        ConfigError: sizes that do not divide, or limits in the wrong order.
    """

    offers = frozenset({"text", "visual", "embed"})

    def __init__(self, config: Config) -> None:
        super().__init__()
        _check(config)
        self.config = c = config
        self.image_encoder = ImageTower(config)
        self.text_tokens = TokensAndPositions(c.vocab, c.hidden, c.text_length)
        self.text_stack = Stack(_blocks(c.text_layers, c.hidden, c.heads, c.intermediate, c.quick_gelu))
        self.text_stack.apply(_init_text_blocks(c.hidden, c.text_layers))
        self.text_norm = nn.LayerNorm(c.hidden, NORM_EPS)
        self.text_proj = nn.Linear(c.hidden, c.embed, bias=False)
        self.visual_proj = nn.Linear(c.visual_width, c.embed, bias=False)
        for projection in (self.text_proj, self.visual_proj):
            nn.init.normal_(projection.weight, std=projection.in_features**-0.5)
        self.temperature = LogitScale(c.temperature, c.scale_least, c.scale_greatest)
        self.dims = Dims(text=c.hidden, visual=c.visual_width, fused=0, embed=c.embed, vocab=c.vocab)
        self.inputs = c.inputs

    @property
    def word_embedding(self) -> nn.Embedding:
        """[V, D]."""
        return self.text_tokens.word

    def encode_text(self, text: Text) -> Stream:
        """Every token sees itself and those before it, so that padding behind a text changes nothing in it.

        hidden = states after the last LayerNorm, [B, L, D]; embed = unit projection of the token that `pool` names.
        """
        seen = causal_mask(text.ids.shape[1], text.ids.device)
        hidden = self.text_norm(self.text_stack(self.text_tokens(text.ids), seen))
        rows = torch.arange(len(hidden), device=hidden.device)
        return Stream(hidden, text.mask, _unit(self.text_proj(hidden[rows, self.ends(text)])))

    def ends(self, text: Text) -> Tensor:
        """[B] int64, the position that a text is read at."""
        if self.config.pool == "largest":
            return text.ids.argmax(dim=1)  # the first of equal ones
        places = torch.arange(text.ids.shape[1], device=text.ids.device)
        return (places * text.mask).argmax(dim=1)

    def encode_visual(self, visual: Visual) -> Stream:
        """The ViT; feats are pixels [B, 3, H, W].

        hidden = states after the last LayerNorm, [B, 1 + R, D]; embed = unit projection of the class token.
        """
        hidden = self.image_encoder(visual.feats)
        return Stream(hidden, visual.mask, _unit(self.visual_proj(hidden[:, 0])))

    def flops(self, text_tokens: int) -> dict[str, int]:
        """See `Family.flops`."""
        c = self.config
        patches = (c.image_size // c.patch) ** 2
        vit = _layer_flops(patches + 1, c.visual_width, c.visual_intermediate)
        text = _layer_flops(text_tokens, c.hidden, c.intermediate)
        patch_map = 2 * patches * 3 * c.patch**2 * c.visual_width
        return {
            "encode_text": c.text_layers * text + 2 * c.hidden * c.embed,
            "encode_visual": patch_map + c.visual_layers * vit + 2 * c.visual_width * c.embed,
        }


class ImageTower(nn.Module):
    """CLIP's ViT: patches without bias, and a LayerNorm before the blocks as well as after."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        c, width = config, config.visual_width
        self.patches = PatchEmbedding(width, c.patch, bias=False)
        self.tokens = ClassAndPositions(width, (c.image_size // c.patch) ** 2)
        for table in self.tokens.parameters():
            nn.init.normal_(table, std=width**-0.5)
        self.pre_norm = nn.LayerNorm(width, NORM_EPS)
        blocks = _blocks(c.visual_layers, width, c.visual_heads, c.visual_intermediate, c.quick_gelu)
        self.stack = Stack(blocks, once=True)
        self.norm = nn.LayerNorm(width, NORM_EPS)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, H, W], uint8 or normalised -> [B, 1 + R, D]."""
        out: Tensor = self.norm(self.stack(self.pre_norm(self.tokens(self.patches(pixels)))))
        return out


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


def _blocks(number: int, width: int, heads: int, inner: int, quick: bool) -> list[PreNormBlock]:
    """Blocks at torch's own start, which `nn.MultiheadAttention` has and the authors' image tower keeps."""
    activation = quick_gelu if quick else F.gelu
    blocks = [PreNormBlock(width, heads, inner, NORM_EPS, activation=activation) for _ in range(number)]
    for block in blocks:
        nn.init.xavier_uniform_(block.attention.qkv.weight)
        nn.init.zeros_(block.attention.qkv.bias)
        nn.init.zeros_(block.attention.output.bias)
    return blocks


def _init_text_blocks(width: int, layers: int) -> Callable[[nn.Module], None]:
    """The text blocks' matrices (src/open_clip/model.py, init_parameters); biases stay. For `Module.apply`."""
    into_residual = width**-0.5 * (2 * layers) ** -0.5

    def init(module: nn.Module) -> None:
        if isinstance(module, PreNormBlock):
            nn.init.normal_(module.attention.qkv.weight, std=width**-0.5)
            nn.init.normal_(module.attention.output.weight, std=into_residual)
            nn.init.normal_(module.mlp.fc1.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(module.mlp.fc2.weight, std=into_residual)

    return init


def _unit(projected: Tensor) -> Tensor:
    return F.normalize(projected.float(), dim=1)


def _layer_flops(tokens: int, width: int, inner: int) -> int:
    products = 4 * width * width + 2 * width * inner  # query, key, value, output; the two of the MLP
    return 2 * tokens * products + 2 * 2 * tokens * tokens * width


def _check(config: Config) -> None:
    for whole, part in (("image_size", "patch"), ("visual_width", "visual_heads"), ("hidden", "heads")):
        if getattr(config, whole) % getattr(config, part):
            raise ConfigError(
                f"family.{whole} {getattr(config, whole)} is not a multiple of "
                f"family.{part} {getattr(config, part)}; choose sizes that divide"
            )
    if config.pool not in ("end", "largest"):
        raise ConfigError(f"family.pool is '{config.pool}'; write end or largest")
    least, start, greatest = config.scale_least, config.temperature, config.scale_greatest
    if not (start > 0 and 0 < least <= 1 / start <= greatest):
        raise ConfigError(
            f"1 / family.temperature ({start}) does not lie within family.scale_least {least} and "
            f"family.scale_greatest {greatest}; choose a positive start between them"
        )


build = Clip


def tiny() -> Config:
    """A miniature with every part of the published model."""
    return Config(
        image_size=16,
        patch=8,
        visual_width=16,
        visual_layers=2,
        visual_heads=2,
        visual_intermediate=32,
        hidden=16,
        heads=2,
        text_layers=2,
        intermediate=32,
        vocab=64,
        text_length=12,
        embed=8,
    )


def _to_one(tensor: Tensor, shape: torch.Size) -> Tensor:
    return tensor.reshape(1)


def _turn(tensor: Tensor, shape: torch.Size) -> Tensor:
    return tensor.T


def _class_token(tensor: Tensor, shape: torch.Size) -> Tensor:
    return tensor.reshape(1, 1, -1)


def _first_rows(tensor: Tensor, shape: torch.Size) -> Tensor:
    return tensor[: shape[0]]


def _positions(tensor: Tensor, shape: torch.Size) -> Tensor:
    return resize_positions(tensor[None], shape)


def _row(source: str, target: str, change: Callable[[Tensor, torch.Size], Tensor] | None = None) -> Rename:
    """To the family, and to its momentum twin where the model has one; `module.` is DDP's."""
    return Rename(r"(?:module\.)?" + source, (f"family.{target}", f"twin.{target}"), change)


def _resblocks(source: str, ours: str) -> list[Rename]:
    """Rows for one tower's blocks; query, key and value are stacked alike here and there."""
    theirs, block = source + r"transformer\.resblocks\.(\d+)\.", ours + r"blocks.\1."
    return [
        _row(theirs + r"ln_1\.(\w+)", block + r"attention_norm.\2"),
        _row(theirs + r"attn\.in_proj_(\w+)", block + r"attention.qkv.\2"),
        _row(theirs + r"attn\.out_proj\.(\w+)", block + r"attention.output.\2"),
        _row(theirs + r"ln_2\.(\w+)", block + r"mlp_norm.\2"),
        _row(theirs + r"mlp\.c_fc\.(\w+)", block + r"mlp.fc1.\2"),
        _row(theirs + r"mlp\.c_proj\.(\w+)", block + r"mlp.fc2.\2"),
    ]


TEXT = r"(?:text\.)?"  # open_clip's CustomTextCLIP has the text tower under this name

# open_clip's names, which are OpenAI's.
PUBLISHED = Renames(
    (
        _row(r"visual\.class_embedding", "image_encoder.tokens.class_token", _class_token),
        _row(r"visual\.positional_embedding", "image_encoder.tokens.positions", _positions),
        _row(r"visual\.conv1\.weight", "image_encoder.patches.projection.weight"),
        _row(r"visual\.ln_pre\.(\w+)", r"image_encoder.pre_norm.\1"),
        *_resblocks(r"visual\.", "image_encoder.stack."),
        _row(r"visual\.ln_post\.(\w+)", r"image_encoder.norm.\1"),
        _row(r"visual\.proj", "visual_proj.weight", _turn),
        _row(TEXT + r"token_embedding\.weight", "text_tokens.word.weight"),
        _row(TEXT + r"positional_embedding", "text_tokens.positions.weight", _first_rows),
        *_resblocks(TEXT, "text_stack."),
        _row(TEXT + r"ln_final\.(\w+)", r"text_norm.\1"),
        _row(TEXT + r"text_projection", "text_proj.weight", _turn),
        _row("logit_scale", "temperature.value", _to_one),
        Rename(r"(?:module\.)?logit_bias", ("objectives.sigmoid.bias",), _to_one, optional=True),
        Rename(r"input_resolution|context_length|vocab_size"),  # numbers that OpenAI's files carry along
    ),
    fills=r"(?:family|twin)\..*",
)

Clip.published = PUBLISHED
