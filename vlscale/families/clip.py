"""CLIP: contrastive language-image pre-training (Radford et al. 2021, arXiv 2103.00020). A ViT and a causal text
transformer that meet only in their unit-length embeddings. Code: mlfoundations/open_clip at 89fb801.

And SigLIP (Zhai et al. 2023, arXiv 2303.15343), whose towers differ in the options that say so. Code:
google-research/big_vision (models/vit.py, models/proj/image_text/text_transformer.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlscale.errors import ConfigError
from vlscale.families.base import Family, Rename, Renames, Size, check_divides
from vlscale.nn.attention import causal_mask
from vlscale.nn.clip import ACTIVATIONS, TokensAndPositions, clip_blocks, init_siglip, init_text_blocks
from vlscale.nn.temperature import LogitScale
from vlscale.nn.transformer import Stack, layer_flops
from vlscale.nn.vit import (
    CLIP_PIXELS,
    HALVES,
    AttentionPool,
    ClassAndPositions,
    PatchEmbedding,
    Positions,
    resize_positions,
)
from vlscale.types import Dims, Inputs, Stream, Text, Visual, lengthened

CHOICES = {"pool": ("end", "largest", "last"), "visual_pool": ("class", "map"), "gelu": ("erf", "quick", "tanh")}


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
    gelu: Literal["erf", "quick", "tanh"] = "erf"  # OpenAI's weights: quick; SigLIP: tanh
    norm_eps: float = 1e-5  # torch's default, which the authors keep; SigLIP: 1e-6
    # `map` is SigLIP's image tower: attention pooling, no class token, no LayerNorm before the blocks, no projection
    # behind them, pixels in [-1, 1]; the whole family then starts as big_vision's does.
    visual_pool: Literal["class", "map"] = "class"
    causal: bool = True  # SigLIP: False, every token sees all `text_length` places, padding included
    # Where a text is read: `end`, its last real token; `largest`, the first token with the largest id. The same
    # in CLIP's vocabulary, where the end token has the largest id; of other vocabularies only `end` is right.
    # `last`: the last of `text_length` places, end token or padding (SigLIP pads with its end token).
    pool: Literal["end", "largest", "last"] = "end"
    pad: int = 0  # id that texts are filled up with where `causal` is False; SigLIP: 1
    text_bias: bool = False  # of the text's projection; SigLIP: True
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

    offers = frozenset({"text", "visual", "embed", "temperature"})

    def __init__(self, config: Config) -> None:
        super().__init__()
        _check(config)
        self.config = c = config
        self.image_encoder = ImageTower(config)
        self.text_tokens = TokensAndPositions(c.vocab, c.hidden, c.text_length)
        self.text_stack = Stack(clip_blocks(c.text_layers, c.hidden, c.heads, c.intermediate, c.gelu, c.norm_eps))
        self.text_stack.apply(init_text_blocks(c.hidden, c.text_layers))
        self.text_norm = nn.LayerNorm(c.hidden, c.norm_eps)
        self.text_proj = nn.Linear(c.hidden, c.embed, bias=c.text_bias)
        self.visual_pool: AttentionPool | None = None
        self.visual_proj: nn.Module = nn.Identity()
        if c.visual_pool == "map":
            sizes = (c.visual_width, c.visual_heads, c.visual_intermediate)
            self.visual_pool = AttentionPool(*sizes, c.norm_eps, ACTIVATIONS[c.gelu])
            self.apply(init_siglip)
        else:
            self.visual_proj = nn.Linear(c.visual_width, c.embed, bias=False)
        for projection in (self.text_proj, self.visual_proj):
            if isinstance(projection, nn.Linear):
                nn.init.normal_(projection.weight, std=projection.in_features**-0.5)
        if c.text_bias:
            nn.init.zeros_(self.text_proj.bias)
        self.temperature = LogitScale(c.temperature, c.scale_least, c.scale_greatest)
        self.dims = Dims(text=c.hidden, visual=c.visual_width, fused=0, embed=c.embed, vocab=c.vocab)
        self.inputs = c.inputs

    @property
    def word_embedding(self) -> nn.Embedding:
        """[V, D]."""
        return self.text_tokens.word

    def encode_text(self, text: Text) -> Stream:
        """Every token sees itself and those before it, so that padding behind a text changes nothing in it.

        hidden = states after the last LayerNorm, [B, L, D]; embed = unit projection of the place that `pool` names.
        Where `causal` is False L is `text_length`.
        """
        if not self.config.causal:
            text = self._filled(text)
        seen = causal_mask(text.ids.shape[1], text.ids.device) if self.config.causal else None
        hidden = self.text_norm(self.text_stack(self.text_tokens(text.ids), seen))
        rows = torch.arange(len(hidden), device=hidden.device)
        return Stream(hidden, text.mask, _unit(self.text_proj(hidden[rows, self.ends(text)])))

    def ends(self, text: Text) -> Tensor:
        """[B] int64, the position that a text is read at."""
        if self.config.pool == "last":
            return text.ids.new_full((len(text.ids),), text.ids.shape[1] - 1)
        if self.config.pool == "largest":
            return text.ids.argmax(dim=1)  # the first of equal ones
        places = torch.arange(text.ids.shape[1], device=text.ids.device)
        return (places * text.mask).argmax(dim=1)

    def _filled(self, text: Text) -> Text:
        """The text with `pad` in every place up to `text_length` that it does not fill."""
        mask = lengthened(text.mask, self.config.text_length)
        ids = lengthened(text.ids, self.config.text_length).masked_fill(~mask, self.config.pad)
        return Text(ids, mask)

    def encode_visual(self, visual: Visual) -> Stream:
        """The ViT; feats are pixels [B, 3, H, W].

        hidden = states after the last LayerNorm, [B, 1 + R, D]; embed = unit projection of the class token. With
        attention pooling there is no class token, and the embedding is what the pooling gives.
        """
        hidden = self.image_encoder(visual.feats)
        pooled = hidden[:, 0] if self.visual_pool is None else self.visual_pool(hidden)
        return Stream(hidden, visual.mask, _unit(self.visual_proj(pooled)))

    def flops(self, text_tokens: int) -> dict[str, int]:
        """See `Family.flops`."""
        c, width = self.config, self.config.visual_width
        patches = (c.image_size // c.patch) ** 2
        pooled = c.visual_pool == "map"
        vit = layer_flops(patches if pooled else patches + 1, width, c.visual_intermediate)
        text = layer_flops(text_tokens if c.causal else c.text_length, c.hidden, c.intermediate)
        patch_map = 2 * patches * 3 * c.patch**2 * width
        head = 2 * width * c.embed
        if pooled:  # query, output and MLP of one place; keys, values and attention of all
            head = 4 * width * (width + c.visual_intermediate) + 4 * patches * width * (width + 1)
        return {
            "encode_text": c.text_layers * text + 2 * c.hidden * c.embed,
            "encode_visual": patch_map + c.visual_layers * vit + head,
        }


class ImageTower(nn.Module):
    """CLIP's ViT: patches without bias, and a LayerNorm before the blocks as well as after; or SigLIP's, which has
    neither that LayerNorm nor a class token."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        c, width, patches = config, config.visual_width, (config.image_size // config.patch) ** 2
        siglip = c.visual_pool == "map"
        self.patches = PatchEmbedding(width, c.patch, bias=siglip, statistics=HALVES if siglip else CLIP_PIXELS)
        self.tokens = Positions(width, patches) if siglip else ClassAndPositions(width, patches)
        for table in self.tokens.parameters():
            nn.init.normal_(table, std=width**-0.5)
        self.pre_norm = nn.Identity() if siglip else nn.LayerNorm(width, c.norm_eps)
        sizes = (c.visual_layers, width, c.visual_heads, c.visual_intermediate)
        self.stack = Stack(clip_blocks(*sizes, c.gelu, c.norm_eps), once=True)
        self.norm = nn.LayerNorm(width, c.norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, H, W], uint8 or normalised -> [B, 1 + R, D], without class token [B, R, D]."""
        out: Tensor = self.norm(self.stack(self.pre_norm(self.tokens(self.patches(pixels)))))
        return out


def _unit(projected: Tensor) -> Tensor:
    return F.normalize(projected.float(), dim=1)


def _check(config: Config) -> None:
    check_divides(config, ("image_size", "patch"), ("visual_width", "visual_heads"), ("hidden", "heads"))
    for name, known in CHOICES.items():
        if getattr(config, name) not in known:
            raise ConfigError(f"family.{name} is '{getattr(config, name)}'; write {' or '.join(known)}")
    if config.pool == "last" and config.causal:
        raise ConfigError("family.pool last reads texts that are filled up; write family.causal=false, or pool=end")
    if config.visual_pool == "map" and config.embed != config.visual_width:
        raise ConfigError(
            f"with family.visual_pool map the image's embedding is family.visual_width {config.visual_width} wide, "
            f"but family.embed is {config.embed}; write family.embed={config.visual_width}"
        )
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


def _to_scalar(tensor: Tensor) -> Tensor:
    return tensor.reshape(())


def _one_table(tensor: Tensor) -> Tensor:
    return tensor[0]


def _row(
    source: str,
    target: str,
    change: Callable[[Tensor, torch.Size], Tensor] | None = None,
    back: Callable[[Tensor], Tensor] | None = None,
) -> Rename:
    """To the family, and to its momentum twin where the model has one; `module.` is DDP's."""
    return Rename(r"(?:module\.)?" + source, (f"family.{target}", f"twin.{target}"), change, back=back)


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
        _row(r"visual\.class_embedding", "image_encoder.tokens.class_token", _class_token, torch.flatten),
        _row(r"visual\.positional_embedding", "image_encoder.tokens.positions", _positions, _one_table),
        _row(r"visual\.conv1\.weight", "image_encoder.patches.projection.weight"),
        _row(r"visual\.ln_pre\.(\w+)", r"image_encoder.pre_norm.\1"),
        *_resblocks(r"visual\.", "image_encoder.stack."),
        _row(r"visual\.ln_post\.(\w+)", r"image_encoder.norm.\1"),
        _row(r"visual\.proj", "visual_proj.weight", _turn, torch.t),
        _row(TEXT + r"token_embedding\.weight", "text_tokens.word.weight"),
        _row(TEXT + r"positional_embedding", "text_tokens.positions.weight", _first_rows),
        *_resblocks(TEXT, "text_stack."),
        _row(TEXT + r"ln_final\.(\w+)", r"text_norm.\1"),
        _row(TEXT + r"text_projection", "text_proj.weight", _turn, torch.t),
        _row("logit_scale", "temperature.value", _to_one, _to_scalar),
        Rename(r"(?:module\.)?logit_bias", ("objectives.sigmoid.bias",), _to_one, optional=True, back=_to_scalar),
        Rename(r"input_resolution|context_length|vocab_size"),  # numbers that OpenAI's files carry along
    ),
    fills=r"(?:family|twin)\..*",
)

SIZES = (
    Size("patch", r"visual\.conv1\.weight", 2),
    Size("image_size", r"visual\.positional_embedding", 0, lambda rows, known: isqrt(rows - 1) * int(known["patch"])),
    Size("visual_width", r"visual\.conv1\.weight", 0),
    Size("visual_layers", r"visual\.transformer\.resblocks\.(\d+)\..*"),
    Size("visual_intermediate", r"visual\.transformer\.resblocks\.0\.mlp\.c_fc\.weight", 0),
    Size("hidden", TEXT + r"token_embedding\.weight", 1),
    Size("vocab", TEXT + r"token_embedding\.weight", 0),
    Size("text_length", TEXT + r"positional_embedding", 0),
    Size("text_layers", TEXT + r"transformer\.resblocks\.(\d+)\..*"),
    Size("intermediate", TEXT + r"transformer\.resblocks\.0\.mlp\.c_fc\.weight", 0),
    Size("embed", r"visual\.proj", 1),
)

Clip.published = PUBLISHED


def _all_positions(tensor: Tensor, shape: torch.Size) -> Tensor:
    return resize_positions(tensor[None], shape, kept=0)


def _query_or_rest(tensor: Tensor, shape: torch.Size) -> Tensor:
    """Of stacked query, key and value, the first third or the two others."""
    query, rest = tensor[: len(tensor) // 3], tensor[len(tensor) // 3 :]
    return query if len(query) == shape[0] else rest


def _hf_layers(source: str, ours: str) -> list[Rename]:
    """Rows for one tower's blocks in transformers' names."""
    theirs, block = source + r"encoder\.layers\.(\d+)\.", ours + r"blocks.\1."
    stacked = (f"family.{block}attention.qkv.\\2", f"twin.{block}attention.qkv.\\2")
    return [
        _row(theirs + r"layer_norm1\.(\w+)", block + r"attention_norm.\2"),
        *(Rename(theirs + rf"self_attn\.{each}_proj\.(\w+)", stacked, part=(i, 3)) for i, each in enumerate("qkv")),
        _row(theirs + r"self_attn\.out_proj\.(\w+)", block + r"attention.output.\2"),
        _row(theirs + r"layer_norm2\.(\w+)", block + r"mlp_norm.\2"),
        _row(theirs + r"mlp\.(\w+)\.(\w+)", block + r"mlp.\2.\3"),
    ]


IMAGE, WORDS, HEAD = r"vision_model\.", r"text_model\.", r"vision_model\.head\."
POOL = tuple(f"{model}.visual_pool.{layer}.\\1" for model in ("family", "twin") for layer in ("query", "key_value"))

# transformers' names of SigLIP (SiglipModel), in which the authors' weights are spread.
SIGLIP = Renames(
    (
        _row(IMAGE + r"embeddings\.patch_embedding\.(\w+)", r"image_encoder.patches.projection.\1"),
        _row(
            IMAGE + r"embeddings\.position_embedding\.weight",
            "image_encoder.tokens.positions",
            _all_positions,
            _one_table,
        ),
        *_hf_layers(IMAGE, "image_encoder.stack."),
        _row(IMAGE + r"post_layernorm\.(\w+)", r"image_encoder.norm.\1"),
        _row(HEAD + "probe", "visual_pool.query_token.value"),
        Rename(HEAD + r"attention\.in_proj_(\w+)", POOL, _query_or_rest, joined=True),
        _row(HEAD + r"attention\.out_proj\.(\w+)", r"visual_pool.output.\1"),
        _row(HEAD + r"layernorm\.(\w+)", r"visual_pool.norm.\1"),
        _row(HEAD + r"mlp\.(\w+)\.(\w+)", r"visual_pool.mlp.\1.\2"),
        _row(WORDS + r"embeddings\.token_embedding\.weight", "text_tokens.word.weight"),
        _row(WORDS + r"embeddings\.position_embedding\.weight", "text_tokens.positions.weight", _first_rows),
        *_hf_layers(WORDS, "text_stack."),
        _row(WORDS + r"final_layer_norm\.(\w+)", r"text_norm.\1"),
        _row(WORDS + r"head\.(\w+)", r"text_proj.\1"),
        _row("logit_scale", "temperature.value", _to_one),
        Rename("logit_bias", ("objectives.sigmoid.bias",), _to_one, optional=True),
    ),
    fills=PUBLISHED.fills,
)
