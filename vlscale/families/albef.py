"""ALBEF: align before fuse (Li et al. 2021, arXiv 2107.07651). A ViT, the lower half of a BERT for text, and
its upper half with cross-attention for fusion. The authors' code: salesforce/ALBEF at b9727e4."""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlscale.families.base import Family, Rename, Renames, Size, bert_sizes, check_divides, check_positions
from vlscale.nn.attention import attention_mask
from vlscale.nn.bert import BertEmbeddings, bert_layers
from vlscale.nn.temperature import Temperature
from vlscale.nn.transformer import Stack, layer_flops, scale_matrices
from vlscale.nn.vit import ImageEncoder, resize_positions
from vlscale.types import Dims, Fused, Inputs, Stream, Text, Visual


@dataclass(frozen=True)
class Config:
    """Sizes; the defaults are the published model's."""

    image_size: int = 256  # configs/Pretrain.yaml: image_res
    patch: int = 16  # ViT-B/16, models/model_pretrain.py
    visual_width: int = 768
    visual_layers: int = 12
    visual_heads: int = 12
    visual_intermediate: int = 3072
    hidden: int = 768  # configs/config_bert.json, as are all sizes of the text and fusion layers
    heads: int = 12
    text_layers: int = 6  # config_bert.json: fusion_layer
    fusion_layers: int = 6
    intermediate: int = 3072
    vocab: int = 30522
    max_positions: int = 512
    segments: int = 2
    dropout: float = 0.1  # hidden and attention, of the text and fusion layers; the ViT has none
    embed: int = 256  # configs/Pretrain.yaml: embed_dim
    init_scale: float = 1.0  # on the matrices' start of 0.02, which was chosen for width 768
    temperature: float = 0.07  # configs/Pretrain.yaml: temp
    temperature_least: float = 0.001  # models/model_pretrain.py, clamp
    temperature_greatest: float = 0.5
    text_length: int = 25  # Pretrain.py: tokens, [CLS] counted
    separator: bool = False  # models/tokenization_bert.py: one text is [CLS] + tokens, without [SEP]

    @property
    def inputs(self) -> Inputs:
        """What the data plane feeds this family."""
        return Inputs(self.image_size, self.text_length, self.separator)


class Albef(Family):
    """Text alone, picture alone, then text that looks at the picture.

    Raises:
        ConfigError: sizes that do not divide.
    """

    offers = frozenset({"text", "visual", "fuse", "embed", "temperature"})

    def __init__(self, config: Config) -> None:
        super().__init__()
        _check(config)
        self.config = config
        c = config
        self.image_encoder = ImageEncoder(
            c.image_size, c.patch, c.visual_width, c.visual_layers, c.visual_heads, c.visual_intermediate
        )
        self.text_embeddings = BertEmbeddings(c.vocab, c.hidden, c.max_positions, c.segments, c.dropout)
        self.text_stack = Stack(bert_layers(c.text_layers, c.hidden, c.heads, c.intermediate, c.dropout))
        fusion = bert_layers(c.fusion_layers, c.hidden, c.heads, c.intermediate, c.dropout, c.visual_width)
        self.fusion_stack = Stack(fusion, first=c.text_layers)
        for stack in (self.image_encoder, self.text_stack, self.fusion_stack):
            scale_matrices(stack, c.init_scale)
        self.text_proj = nn.Linear(c.hidden, c.embed)
        self.visual_proj = nn.Linear(c.visual_width, c.embed)
        self.temperature = Temperature(c.temperature, c.temperature_least, c.temperature_greatest)
        self.dims = Dims(text=c.hidden, visual=c.visual_width, fused=c.hidden, embed=c.embed, vocab=c.vocab)
        self.inputs = c.inputs

    @property
    def word_embedding(self) -> nn.Embedding:
        """[V, D], tied to the masked-word head."""
        return self.text_embeddings.word

    def encode_text(self, text: Text) -> Stream:
        """Embeddings and the text-only layers; embed = unit projection of [CLS]."""
        hidden = self.text_stack(self.text_embeddings(text.ids, text.segments), attention_mask(text.mask))
        return Stream(hidden, text.mask, _unit(self.text_proj(hidden[:, 0])))

    def encode_visual(self, visual: Visual) -> Stream:
        """The ViT; feats are pixels [B, 3, H, W]; embed = unit projection of the class token."""
        hidden = self.image_encoder(visual.feats)
        return Stream(hidden, visual.mask, _unit(self.visual_proj(hidden[:, 0])))

    def fuse(self, text: Stream | None, visual: Stream | None, causal: bool = False) -> Fused:
        """The fusion layers: text attends to itself, then to the image tokens; pooled = state of [CLS]."""
        assert text is not None, "ALBEF fuses a text with a picture"
        assert visual is not None, "ALBEF fuses a text with a picture"
        hidden = self.fusion_stack(
            text.hidden, attention_mask(text.mask, causal), visual.hidden, attention_mask(visual.mask)
        )
        return Fused(text=hidden, visual=None, pooled=hidden[:, 0])

    def flops(self, text_tokens: int) -> dict[str, int]:
        """See `Family.flops`."""
        c = self.config
        patches = (c.image_size // c.patch) ** 2
        vit = layer_flops(patches + 1, c.visual_width, c.visual_intermediate)
        bert = layer_flops(text_tokens, c.hidden, c.intermediate)
        keys = 2 * 2 * (patches + 1) * c.visual_width * c.hidden
        queries = 2 * 2 * text_tokens * c.hidden * c.hidden
        cross = keys + queries + 2 * 2 * text_tokens * (patches + 1) * c.hidden
        patch_map = 2 * patches * 3 * c.patch**2 * c.visual_width
        return {
            "encode_text": c.text_layers * bert + 2 * c.hidden * c.embed,
            "encode_visual": patch_map + c.visual_layers * vit + 2 * c.visual_width * c.embed,
            "fuse": c.fusion_layers * (bert + cross),
        }


def _unit(projected: Tensor) -> Tensor:
    return F.normalize(projected.float(), dim=1)


def _check(config: Config) -> None:
    check_divides(config, ("image_size", "patch"), ("visual_width", "visual_heads"), ("hidden", "heads"))
    check_positions(config.text_length, config.max_positions)


build = Albef


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
        text_layers=1,
        fusion_layers=1,
        intermediate=32,
        vocab=64,
        max_positions=16,
        embed=8,
        text_length=12,
    )


def _to_one(tensor: Tensor, shape: torch.Size) -> Tensor:
    return tensor.reshape(1)


def _turn(tensor: Tensor, shape: torch.Size) -> Tensor:
    return tensor.T


def _flat(tensor: Tensor, shape: torch.Size) -> Tensor:
    return tensor.flatten()


def _as_row(tensor: Tensor) -> Tensor:
    return tensor[None]


def _to_scalar(tensor: Tensor) -> Tensor:
    return tensor.reshape(())


def _first_rows(tensor: Tensor, shape: torch.Size) -> Tensor:
    return tensor[: shape[0]]


def _bert(source: str, ours: str, cross: bool, optional: bool) -> list[Rename]:
    """Rows for BERT's embeddings and layers; a layer lands in the stack that has its number."""

    def row(name: str, *targets: str) -> Rename:
        return Rename(source + name, tuple(ours + target for target in targets), optional=optional)

    def both(name: str, target: str) -> Rename:
        return row(name, f"text_stack.{target}", f"fusion_stack.{target}")

    rows = []
    layer = r"encoder\.layer\.(\d+)\."
    crossing = (("attention", "attention"), ("crossattention", "cross"))[: 2 if cross else 1]
    for part, letter in (("weight", "(?:weight|gamma)"), ("bias", "(?:bias|beta)")):  # gamma: before 2019
        rows.append(row(rf"embeddings\.LayerNorm\.{letter}", f"text_embeddings.norm.{part}"))
        rows.append(both(rf"{layer}output\.LayerNorm\.{letter}", rf"blocks.\1.mlp_norm.{part}"))
        for theirs, mine in crossing:
            rows.append(both(rf"{layer}{theirs}\.output\.LayerNorm\.{letter}", rf"blocks.\1.{mine}_norm.{part}"))
    for theirs, mine in crossing:
        module = mine if mine == theirs else f"{mine}_attention"
        rows.append(both(rf"{layer}{theirs}\.self\.(query|key|value)\.(\w+)", rf"blocks.\1.{module}.\2.\3"))
        rows.append(both(rf"{layer}{theirs}\.output\.dense\.(\w+)", rf"blocks.\1.{module}.output.\2"))
    return [
        row(r"embeddings\.word_embeddings\.weight", "text_embeddings.word.weight"),
        Rename(
            source + r"embeddings\.position_embeddings\.weight",
            (f"{ours}text_embeddings.position.weight",),
            change=_first_rows,
            optional=optional,
        ),
        row(r"embeddings\.token_type_embeddings\.weight", "text_embeddings.segment.weight"),
        Rename(source + r"embeddings\.position_ids"),  # 0, 1, 2, ...
        *rows,
        both(layer + r"intermediate\.dense\.(\w+)", r"blocks.\1.mlp.fc1.\2"),
        both(layer + r"output\.dense\.(\w+)", r"blocks.\1.mlp.fc2.\2"),
    ]


def _word_head(source: str, ours: str) -> list[Rename]:
    """Rows for BERT's masked-word head; its decoder is the word embedding, its decoder bias is `bias`."""
    return [
        Rename(source + r"bias", (f"{ours}bias",), optional=True),
        Rename(source + r"transform\.dense\.(\w+)", (rf"{ours}dense.\1",), optional=True),
        Rename(source + r"transform\.LayerNorm\.(?:weight|gamma)", (f"{ours}norm.weight",), optional=True),
        Rename(source + r"transform\.LayerNorm\.(?:bias|beta)", (f"{ours}norm.bias",), optional=True),
        Rename(source + r"decoder\.(?:weight|bias)"),
    ]


def _vit(source: str, ours: str, optional: bool) -> list[Rename]:
    """Rows for a ViT in timm's names, which ALBEF and DeiT share."""

    def row(name: str, target: str) -> Rename:
        return Rename(source + name, (ours + target,), optional=optional)

    table = (f"{ours}tokens.positions",)
    return [
        row("cls_token", "tokens.class_token"),
        Rename(source + "pos_embed", table, resize_positions, optional=optional),
        row(r"patch_embed\.proj\.(\w+)", r"patches.projection.\1"),
        row(r"blocks\.(\d+)\.norm1\.(\w+)", r"stack.blocks.\1.attention_norm.\2"),
        row(r"blocks\.(\d+)\.attn\.qkv\.(\w+)", r"stack.blocks.\1.attention.qkv.\2"),
        row(r"blocks\.(\d+)\.attn\.proj\.(\w+)", r"stack.blocks.\1.attention.output.\2"),
        row(r"blocks\.(\d+)\.norm2\.(\w+)", r"stack.blocks.\1.mlp_norm.\2"),
        row(r"blocks\.(\d+)\.mlp\.(fc1|fc2)\.(\w+)", r"stack.blocks.\1.mlp.\2.\3"),
        row(r"norm\.(\w+)", r"norm.\1"),
    ]


def _hugging_face_vit(ours: str) -> list[Rename]:
    """Rows for a ViT or DeiT saved by transformers, with or without its prefix."""
    source = r"(?:vit\.|deit\.)?"
    layer = rf"{source}encoder\.layer\.(\d+)\."
    block = rf"{ours}stack.blocks.\1."
    fused, positions = (rf"{block}attention.qkv.\2",), (f"{ours}tokens.positions",)
    projection = (rf"{ours}patches.projection.\1",)
    qkv = [
        Rename(rf"{layer}attention\.attention\.{name}\.(\w+)", fused, part=(number, 3))
        for number, name in enumerate(("query", "key", "value"))
    ]
    return [
        *qkv,
        Rename(source + r"embeddings\.cls_token", (f"{ours}tokens.class_token",)),
        Rename(source + r"embeddings\.position_embeddings", positions, resize_positions),
        Rename(source + r"embeddings\.patch_embeddings\.projection\.(\w+)", projection),
        Rename(rf"{layer}attention\.output\.dense\.(\w+)", (rf"{block}attention.output.\2",)),
        Rename(rf"{layer}layernorm_before\.(\w+)", (rf"{block}attention_norm.\2",)),
        Rename(rf"{layer}layernorm_after\.(\w+)", (rf"{block}mlp_norm.\2",)),
        Rename(rf"{layer}intermediate\.dense\.(\w+)", (rf"{block}mlp.fc1.\2",)),
        Rename(rf"{layer}output\.dense\.(\w+)", (rf"{block}mlp.fc2.\2",)),
        Rename(source + r"layernorm\.(\w+)", (rf"{ours}norm.\1",)),
        Rename(r"(?:vit\.|deit\.)?(?:pooler\.dense|classifier)\.\w+"),
    ]


def _queue(name: str) -> Rename:
    return Rename(f"{name}_queue", (f"queues.{name}.keys",), change=_turn, optional=True, back=torch.t)


# The authors' checkpoints: the online network, its twin (`_m`), and the objectives' heads and queues.
PUBLISHED = Renames(
    (
        *_vit(r"visual_encoder\.", "family.image_encoder.", False),
        *_vit(r"visual_encoder_m\.", "twin.image_encoder.", True),
        *_bert(r"text_encoder\.(?:bert\.|)", "family.", True, False),  # fine-tuned for retrieval: without `bert.`
        *_bert(r"text_encoder_m\.(?:bert\.|)", "twin.", True, True),
        *_word_head(r"text_encoder\.cls\.predictions\.", "objectives.mlm.head."),
        *_word_head(r"text_encoder_m\.cls\.predictions\.", "objectives.mlm.head_twin."),
        Rename(r"vision_proj\.(\w+)", (r"family.visual_proj.\1",)),
        Rename(r"vision_proj_m\.(\w+)", (r"twin.visual_proj.\1",), optional=True),
        Rename(r"text_proj\.(\w+)", (r"family.text_proj.\1",)),
        Rename(r"text_proj_m\.(\w+)", (r"twin.text_proj.\1",), optional=True),
        Rename(r"itm_head\.(\w+)", (r"objectives.itm.head.\1",), optional=True),
        Rename("temp", ("family.temperature.value", "twin.temperature.value"), _to_one, back=_to_scalar),
        _queue("image"),
        _queue("text"),
        Rename("queue_ptr", ("queues.image.pointer", "queues.text.pointer"), optional=True),
        Rename("idx_queue", ("queues.image.ids", "queues.text.ids"), _flat, optional=True, back=_as_row),  # retrieval
    )
)

CROSSING = r"text_encoder\.(?:bert\.|)encoder\.layer\.(\d+)\.crossattention\..*"
SIZES = (
    Size("patch", r"visual_encoder\.patch_embed\.proj\.weight", 2),
    Size("image_size", r"visual_encoder\.pos_embed", 1, lambda rows, known: isqrt(rows - 1) * int(known["patch"])),
    Size("visual_width", r"visual_encoder\.cls_token", 2),
    Size("visual_layers", r"visual_encoder\.blocks\.(\d+)\..*"),
    Size("visual_intermediate", r"visual_encoder\.blocks\.0\.mlp\.fc1\.weight", 0),
    *bert_sizes(r"text_encoder\.(?:bert\.|)", layers="text_layers"),
    Size("text_layers", CROSSING, None, lambda crossing, known: int(known["text_layers"]) - crossing),
    Size("fusion_layers", CROSSING),
    Size("embed", r"text_proj\.weight", 0),
)

# bert-base-uncased: first layers -> text layers, the others -> fusion layers; cross-attention is new.
INIT_TEXT = Renames(
    (
        *_bert(r"(?:bert\.)?", "family.", False, False),
        *_word_head(r"cls\.predictions\.", "objectives.mlm.head."),
        Rename(r"(?:bert\.)?pooler\.dense\.\w+"),
        Rename(r"cls\.seq_relationship\.\w+"),
    ),
    fills=r"family\.(?:text_embeddings|text_stack|fusion_stack)\.(?!.*\.cross_).*",
)

# DeiT-B/16-224 (ALBEF models/model_pretrain.py), in timm's names or those of transformers.
INIT_VISION = Renames(
    (
        *_vit("", "family.image_encoder.", False),
        *_hugging_face_vit("family.image_encoder."),
        Rename(r"(?:head|pre_logits\.fc)\.\w+"),
    ),
    fills=r"family\.image_encoder\..*",
)

Albef.published, Albef.init_text, Albef.init_vision = PUBLISHED, INIT_TEXT, INIT_VISION
