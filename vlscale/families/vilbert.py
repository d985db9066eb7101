"""ViLBERT: two streams with co-attention (Lu et al. 2019, arXiv 1908.02265). A BERT for text and a narrower, shorter
transformer for a detector's regions, which exchange keys and values between layers.

The authors' code: facebookresearch/vilbert-multi-task (vilbert/vilbert.py, config/bert_base_6layer_6conect.json).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from vlscale.errors import ConfigError
from vlscale.families.base import Family, Rename, Renames, bert_sizes, check_divides, check_positions
from vlscale.nn.attention import attention_mask
from vlscale.nn.bert import NORM_EPS, BertEmbeddings, bert_layers, init_normal
from vlscale.nn.coattention import CoattentionBlock, Sections
from vlscale.nn.transformer import Stack, layer_flops, scale_matrices
from vlscale.types import Dims, Fused, Inputs, Stream, Text, Visual

BOXES = 5  # x1 / W, y1 / H, x2 / W, y2 / H, share of the picture's area
WHOLE = (0.0, 0.0, 1.0, 1.0, 1.0)  # the box of the slot that stands for the whole picture


@dataclass(frozen=True)
class Config:
    """Sizes; the defaults are the published base model's (config/bert_base_6layer_6conect.json)."""

    hidden: int = 768  # of the text stream, as are the next six; bert-base-uncased
    heads: int = 12
    text_layers: int = 12
    intermediate: int = 3072
    vocab: int = 30522
    max_positions: int = 512
    segments: int = 2
    visual_width: int = 1024  # v_hidden_size
    visual_heads: int = 8
    visual_layers: int = 6
    visual_intermediate: int = 1024
    coattention_width: int = 1024  # bi_hidden_size; also the width of the pooled vectors
    coattention_heads: int = 8
    # Co-attention layer k stands before text layer text_coattention[k] and before region layer visual_coattention[k].
    text_coattention: tuple[int, ...] = (6, 7, 8, 9, 10, 11)  # t_biattention_id
    visual_coattention: tuple[int, ...] = (0, 1, 2, 3, 4, 5)  # v_biattention_id
    fusion: Literal["product", "sum"] = "product"  # fusion_method: mul
    dropout: float = 0.1  # hidden, attention and pooled, of both streams
    init_scale: float = 1.0  # on the layers' and poolers' start of 0.02, which was chosen for width 768
    text_length: int = 36  # train_concap.py: max_seq_length, special tokens counted
    regions: int = 36  # section 3.1: 10 to 36 boxes; concept_cap_dataset.py: region_len
    feats: int = 2048  # v_feature_size
    classes: int = 1601  # v_target_size: 1600 of Visual Genome and background

    @property
    def inputs(self) -> Inputs:
        """What the data plane feeds this family."""
        return Inputs(0, self.text_length, True, self.regions, self.feats, BOXES, self.classes, "corners_area")


class Vilbert(Family):
    """Text alone and regions alone, then co-attention layers between layers of either stream.

    A slot with the mean feature stands before the regions, for the whole picture. Both streams see all of each
    other, so there is no causal reading.

    Raises:
        ConfigError: sizes that do not divide, or co-attention layers in no order.
    """

    offers = frozenset({"text", "visual", "fuse", "regions", "detector"})

    def __init__(self, config: Config) -> None:
        super().__init__()
        _check(config)
        self.config = c = config
        self.text_embeddings = BertEmbeddings(c.vocab, c.hidden, c.max_positions, c.segments, c.dropout)
        self.region_embeddings = RegionEmbeddings(c.feats, c.visual_width, c.dropout)
        text = bert_layers(c.text_layers, c.hidden, c.heads, c.intermediate, c.dropout)
        visual = bert_layers(c.visual_layers, c.visual_width, c.visual_heads, c.visual_intermediate, c.dropout)
        alone = (c.text_coattention[0], c.visual_coattention[0])
        self.text_stack, self.visual_stack = Stack(text[: alone[0]]), Stack(visual[: alone[1]])
        self.text_fusion_stack = Sections(text[alone[0] :], first=alone[0])
        self.visual_fusion_stack = Sections(visual[alone[1] :], first=alone[1])
        self.text_coattention_stack = Sections(_halves(c, c.hidden, c.visual_width, c.intermediate))
        self.visual_coattention_stack = Sections(_halves(c, c.visual_width, c.hidden, c.visual_intermediate))
        self.text_pooler = Pooler(c.hidden, c.coattention_width)
        self.visual_pooler = Pooler(c.visual_width, c.coattention_width)
        for part in self.children():
            if isinstance(part, Stack | Pooler):
                scale_matrices(part, c.init_scale)
        self.dropout = nn.Dropout(c.dropout)
        self.dims = Dims(
            text=c.hidden,
            visual=c.visual_width,
            fused=c.hidden,
            vocab=c.vocab,
            feats=c.feats,
            classes=c.classes,
            pooled=c.coattention_width,
        )
        self.inputs = c.inputs

    @property
    def word_embedding(self) -> nn.Embedding:
        """[V, D], tied to the masked-word head."""
        return self.text_embeddings.word

    def encode_text(self, text: Text) -> Stream:
        """Embeddings and the layers before the first co-attention; hidden [B, L, D]."""
        hidden = self.text_stack(self.text_embeddings(text.ids, text.segments), attention_mask(text.mask))
        return Stream(hidden, text.mask)

    def encode_visual(self, visual: Visual) -> Stream:
        """The slot of the whole picture and the regions; hidden and mask [B, 1 + R, ...]."""
        feats, boxes, mask = whole_picture_first(visual)
        return Stream(self.visual_stack(self.region_embeddings(feats, boxes), attention_mask(mask)), mask)

    def fuse(self, text: Stream | None, visual: Stream | None, causal: bool = False) -> Fused:
        """Co-attention layers and the layers between and after them.

        text [B, L, D] and visual [B, R, Dv] (regions alone) are the last states; pooled [B, E] joins the poolings of
        [CLS] and of the whole picture.

        Raises:
            ConfigError: `causal`, which regions that have seen the whole text would undo.
        """
        assert text is not None, "ViLBERT fuses a text with regions"
        assert visual is not None, "ViLBERT fuses a text with regions"
        if causal:
            raise ConfigError("ViLBERT has no causal reading, for its regions see the whole text; take another family")
        words, regions = text.hidden, visual.hidden
        text_mask, visual_mask = attention_mask(text.mask), attention_mask(visual.mask)
        starts = zip(self.config.text_coattention, self.config.visual_coattention, strict=True)
        stops = [*starts, (self.config.text_layers, self.config.visual_layers)]
        for number, ((text_start, visual_start), (text_stop, visual_stop)) in enumerate(pairwise(stops)):
            words, regions = (
                self.text_coattention_stack.section(number, number + 1, words, regions, visual_mask),
                self.visual_coattention_stack.section(number, number + 1, regions, words, text_mask),
            )
            words = self.text_fusion_stack.section(text_start, text_stop, words, text_mask)
            regions = self.visual_fusion_stack.section(visual_start, visual_stop, regions, visual_mask)
        return Fused(text=words, visual=regions[:, 1:], pooled=self._pool(words, regions))

    def _pool(self, words: Tensor, regions: Tensor) -> Tensor:
        said, seen = self.text_pooler(words), self.visual_pooler(regions)
        pooled: Tensor = self.dropout(said * seen if self.config.fusion == "product" else said + seen)
        return pooled

    def flops(self, text_tokens: int) -> dict[str, int]:
        """See `Family.flops`."""
        c = self.config
        slots = 1 + c.regions
        text = layer_flops(text_tokens, c.hidden, c.intermediate)
        visual = layer_flops(slots, c.visual_width, c.visual_intermediate)
        alone = (c.text_coattention[0], c.visual_coattention[0])
        # Each stream's queries and outputs, and its keys and values for the other: four products per token.
        exchange = 2 * 4 * c.coattention_width * (text_tokens * c.hidden + slots * c.visual_width)
        exchange += 2 * 2 * 2 * text_tokens * slots * c.coattention_width
        mlps = text_tokens * c.hidden * c.intermediate + slots * c.visual_width * c.visual_intermediate
        between = (c.text_layers - alone[0]) * text + (c.visual_layers - alone[1]) * visual
        poolers = 2 * c.coattention_width * (c.hidden + c.visual_width)
        return {
            "encode_text": alone[0] * text,
            "encode_visual": 2 * slots * (c.feats + BOXES) * c.visual_width + alone[1] * visual,
            "fuse": len(c.text_coattention) * (exchange + 2 * 2 * mlps) + between + poolers,
        }


class RegionEmbeddings(nn.Module):
    """A linear map of the feature and one of the box, summed and normalised."""

    def __init__(self, feats: int, width: int, dropout: float) -> None:
        super().__init__()
        self.feature = nn.Linear(feats, width)
        self.box = nn.Linear(BOXES, width)
        self.norm = nn.LayerNorm(width, NORM_EPS)
        self.dropout = nn.Dropout(dropout)
        self.apply(init_normal)

    def forward(self, feats: Tensor, boxes: Tensor) -> Tensor:
        """feats [B, R, F], boxes [B, R, 5] -> [B, R, D]."""
        dtype = self.feature.weight.dtype
        out: Tensor = self.dropout(self.norm(self.feature(feats.to(dtype)) + self.box(boxes.to(dtype))))
        return out


class Pooler(nn.Module):
    """ReLU of a linear map of the first state (not BERT's tanh)."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, out)
        self.apply(init_normal)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, L, D] -> [B, E]."""
        out: Tensor = self.dense(hidden[:, 0]).relu()
        return out


def whole_picture_first(visual: Visual) -> tuple[Tensor, Tensor, Tensor | None]:
    """Features [B, 1 + R, F], boxes [B, 1 + R, 5] and mask [B, 1 + R] with the slot of the whole picture in front.

    Its feature is the mean over real regions as they are fed, a hidden one counting as the zeros that it is
    (jiasenlu/vilbert_beta, concept_cap_dataset.py).
    """
    assert visual.boxes is not None, "ViLBERT reads boxes"
    feats, mask = visual.feats, visual.mask
    real = torch.ones(feats.shape[:2], device=feats.device) if mask is None else mask.float()
    total = (feats.float() * real[..., None]).sum(dim=1, keepdim=True)
    mean = (total / real.sum(dim=1).clamp(min=1.0)[:, None, None]).to(feats.dtype)
    box = visual.boxes.new_tensor(WHOLE).expand(len(feats), 1, -1)
    seen = None if mask is None else torch.cat([torch.ones_like(mask[:, :1]), mask], dim=1)
    return torch.cat([mean, feats], dim=1), torch.cat([box, visual.boxes], dim=1), seen


def _halves(c: Config, width: int, context_width: int, mlp: int) -> list[CoattentionBlock]:
    halves = [
        CoattentionBlock(width, context_width, c.coattention_width, c.coattention_heads, mlp, NORM_EPS, c.dropout)
        for _ in c.text_coattention
    ]
    for half in halves:
        half.apply(init_normal)
    return halves


def _check(config: Config) -> None:
    check_divides(
        config, ("hidden", "heads"), ("visual_width", "visual_heads"), ("coattention_width", "coattention_heads")
    )
    check_positions(config.text_length, config.max_positions)
    if not len(config.text_coattention) == len(config.visual_coattention) > 0:
        raise ConfigError(
            f"family.text_coattention names {len(config.text_coattention)} layers and family.visual_coattention "
            f"{len(config.visual_coattention)}; give one of each per co-attention layer, and at least one"
        )
    for name, layers in (("text", config.text_layers), ("visual", config.visual_layers)):
        places = getattr(config, f"{name}_coattention")
        if list(places) != sorted(places) or places[0] < 0 or places[-1] > layers:
            raise ConfigError(
                f"family.{name}_coattention {places} should rise within 0 and family.{name}_layers {layers}"
            )
    if config.fusion not in ("product", "sum"):
        raise ConfigError(f"family.fusion is '{config.fusion}'; write product or sum")


build = Vilbert


def tiny() -> Config:
    """A miniature with every part of the published model."""
    return Config(
        hidden=16,
        heads=2,
        text_layers=3,
        intermediate=32,
        vocab=64,
        max_positions=16,
        visual_width=24,
        visual_heads=2,
        visual_layers=2,
        visual_intermediate=24,
        coattention_width=12,
        coattention_heads=2,
        text_coattention=(1, 2),
        visual_coattention=(0, 1),
        text_length=12,
        regions=6,
        feats=10,
        classes=7,
    )


def _swap(tensor: Tensor, shape: torch.Size) -> Tensor:
    """The authors' first row says that a pair matches, our second."""
    return tensor.flip(0)


def _norm(source: str, *targets: str, optional: bool = False) -> list[Rename]:
    """Rows for a LayerNorm, whose parts had other names before 2019; {part} in a target is weight or bias."""
    return [
        Rename(rf"{source}\.{letters}", tuple(each.format(part=part) for each in targets), optional=optional)
        for part, letters in (("weight", "(?:weight|gamma)"), ("bias", "(?:bias|beta)"))
    ]


def _bert(source: str) -> list[Rename]:
    """Rows for BERT's embeddings and layers."""
    words, ours = rf"{source}embeddings\.", "family.text_embeddings."
    return [
        Rename(words + r"word_embeddings\.weight", (f"{ours}word.weight",)),
        Rename(words + r"position_embeddings\.weight", (f"{ours}position.weight",), lambda rows, size: rows[: size[0]]),
        Rename(words + r"token_type_embeddings\.weight", (f"{ours}segment.weight",)),
        Rename(words + r"position_ids"),  # 0, 1, 2, ...
        *_norm(words + "LayerNorm", ours + "norm.{part}"),
        *_layers(rf"{source}encoder\.layer", "text"),
    ]


def _layers(source: str, stream: str) -> list[Rename]:
    """Rows for the layers of one stream; a layer lands in the stack that has its number."""
    layer = rf"{source}\.(\d+)\."
    blocks = [rf"family.{stream}_{stack}.blocks.\1." for stack in ("stack", "fusion_stack")]

    def row(name: str, target: str) -> Rename:
        return Rename(layer + name, tuple(block + target for block in blocks))

    return [
        row(r"attention\.self\.(query|key|value)\.(\w+)", r"attention.\2.\3"),
        row(r"attention\.output\.dense\.(\w+)", r"attention.output.\2"),
        row(r"intermediate\.dense\.(\w+)", r"mlp.fc1.\2"),
        row(r"output\.dense\.(\w+)", r"mlp.fc2.\2"),
        *_norm(layer + r"attention\.output\.LayerNorm", *(block + "attention_norm.{part}" for block in blocks)),
        *_norm(layer + r"output\.LayerNorm", *(block + "mlp_norm.{part}" for block in blocks)),
    ]


def _half(stream: str, letter: str, own: int, other: int) -> list[Rename]:
    """Rows for one stream's half of the co-attention layers; the authors number the streams."""
    layer, block = r"bert\.encoder\.c_layer\.(\d+)\.", rf"family.{stream}_coattention_stack.blocks.\1."
    return [
        Rename(rf"{layer}biattention\.query{own}\.(\w+)", (block + r"attention.query.\2",)),
        Rename(rf"{layer}biattention\.(key|value){other}\.(\w+)", (block + r"attention.\2.\3",)),
        Rename(rf"{layer}biOutput\.dense{own}\.(\w+)", (block + r"attention.output.\2",)),
        Rename(rf"{layer}biOutput\.q_dense{own}\.\w+"),  # the authors hold it and never use it
        Rename(rf"{layer}{letter}_intermediate\.dense\.(\w+)", (block + r"mlp.fc1.\2",)),
        Rename(rf"{layer}{letter}_output\.dense\.(\w+)", (block + r"mlp.fc2.\2",)),
        *_norm(rf"{layer}biOutput\.LayerNorm{own}", block + "attention_norm.{part}"),
        *_norm(rf"{layer}{letter}_output\.LayerNorm", block + "mlp_norm.{part}"),
    ]


def _head(source: str, *objectives: str) -> list[Rename]:
    """Rows for the transform of a head, for whichever of the objectives the model has."""
    heads = [f"objectives.{name}.head." for name in objectives]
    dense = tuple(rf"{head}dense.\1" for head in heads)
    return [
        Rename(source + r"transform\.dense\.(\w+)", dense, optional=True),
        *_norm(source + r"transform\.LayerNorm", *(head + "norm.{part}" for head in heads), optional=True),
    ]


WORD_HEAD = (
    *_head(r"cls\.predictions\.", "mlm"),
    Rename(r"cls\.predictions\.bias", ("objectives.mlm.head.bias",), optional=True),
    Rename(r"cls\.predictions\.decoder\.(?:weight|bias)"),  # the word embedding, and the same bias
)
REGIONS = ("mrc_kl", "mrfr", "mrm_nce")  # visual_target 0, 1, 2

# The authors' checkpoints of pre-training.
PUBLISHED = Renames(
    (
        *_bert(r"bert\."),
        *_layers(r"bert\.encoder\.v_layer", "visual"),
        *_half("visual", "v", 1, 2),
        *_half("text", "t", 2, 1),
        Rename(r"bert\.v_embeddings\.image_embeddings\.(\w+)", (r"family.region_embeddings.feature.\1",)),
        Rename(r"bert\.v_embeddings\.image_location_embeddings\.(\w+)", (r"family.region_embeddings.box.\1",)),
        *_norm(r"bert\.v_embeddings\.LayerNorm", "family.region_embeddings.norm.{part}"),
        Rename(r"bert\.t_pooler\.(\w+\.\w+)", (r"family.text_pooler.\1",)),
        Rename(r"bert\.v_pooler\.(\w+\.\w+)", (r"family.visual_pooler.\1",)),
        *WORD_HEAD,
        *_head(r"cls\.imagePredictions\.", *REGIONS),
        Rename(
            r"cls\.imagePredictions\.(decoder\.\w+)",
            tuple(rf"objectives.{name}.head.\1" for name in REGIONS),
            optional=True,
        ),
        Rename(
            r"cls\.bi_seq_relationship\.(\w+)", (r"objectives.itm.head.\1",), _swap, optional=True, back=torch.flipud
        ),
    )
)

# bert-base-uncased: the text stream; regions and co-attention start anew.
INIT_TEXT = Renames(
    (*_bert(r"(?:bert\.)?"), *WORD_HEAD, Rename(r"(?:bert\.)?pooler\.dense\.\w+|cls\.seq_relationship\.\w+")),
    fills=r"family\.text_(?:embeddings|stack|fusion_stack)\..*",
)

SIZES = bert_sizes(r"bert\.", layers="text_layers")  # of the other streams there is one published size

Vilbert.published, Vilbert.init_text = PUBLISHED, INIT_TEXT
