"""OSCAR (Li et al. 2020, arXiv 2004.06165) and OSCAR+ (VinVL, Zhang et al. 2021, arXiv 2101.00529): a BERT over a
caption, the names of the objects that a detector saw (tags), and its regions. Code: microsoft/Oscar at 266075f."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlscale.families.base import Family, Rename, Renames, Size, bert_sizes, check_divides, check_positions
from vlscale.nn.attention import attention_mask
from vlscale.nn.bert import NORM_EPS, BertEmbeddings, bert_layers, init_normal
from vlscale.nn.single_stream import Pooler, left_to_right, real
from vlscale.nn.transformer import Stack, scale_matrices
from vlscale.types import Dims, Fused, Inputs, Stream, Text, Visual


@dataclass(frozen=True)
class Config:
    """Sizes; the defaults are OSCAR base's. OSCAR+ differs in `region_norm`."""

    hidden: int = 768  # bert-base-uncased, as are the next six
    heads: int = 12
    layers: int = 12
    intermediate: int = 3072
    vocab: int = 30522
    max_positions: int = 512
    segments: int = 2  # 0 = words, 1 = tags
    dropout: float = 0.1  # hidden (the authors' command: --drop_out 0.1) and attention (bert-base-uncased)
    text_length: int = 35  # run_oscarplus_pretrain.py: max_seq_length; words, tags, [CLS] and two [SEP]
    regions: int = 50  # run_oscarplus_pretrain.py: max_img_seq_length
    feats: int = 2048  # paper, section 3
    boxes: int = 6  # x1/W, y1/H, x2/W, y2/H, w/W, h/H: run_oscarplus_pretrain.py, img_feature_dim 2054
    classes: int = 1601  # Visual Genome's objects and the background; for objectives alone
    region_norm: bool = False  # OSCAR+: a LayerNorm over the region embeddings (use_img_layernorm)
    init_scale: float = 1.0  # on the matrices' start of 0.02, which was chosen for width 768

    @property
    def inputs(self) -> Inputs:
        """What the data plane feeds this family: words [SEP] tags [SEP], told apart by `Text.segments`."""
        return Inputs(
            image_size=0,
            text_length=self.text_length,
            separator=True,
            regions=self.regions,
            feats=self.feats,
            boxes=self.boxes,
            classes=self.classes,
            geometry="corners_size",
            tags=True,
        )


class Oscar(Family):
    """Words, tags and regions as one sequence; regions have neither position nor segment.

    Raises:
        ConfigError: sizes that do not divide, or a text longer than the positions.
    """

    offers = frozenset({"text", "visual", "fuse", "causal", "regions", "detector", "single_stream"})

    def __init__(self, config: Config) -> None:
        super().__init__()
        _check(config)
        self.config = c = config
        self.text_embeddings = BertEmbeddings(c.vocab, c.hidden, c.max_positions, c.segments, c.dropout)
        self.region_embeddings = RegionEmbeddings(c.feats + c.boxes, c.hidden, c.region_norm, c.dropout)
        self.stack = Stack(bert_layers(c.layers, c.hidden, c.heads, c.intermediate, c.dropout))
        self.pooler = Pooler(c.hidden)
        for part in (self.region_embeddings, self.stack, self.pooler):
            scale_matrices(part, c.init_scale)
        self.dims = Dims(c.hidden, c.hidden, c.hidden, vocab=c.vocab, feats=c.feats, classes=c.classes)
        self.inputs = c.inputs

    @property
    def word_embedding(self) -> nn.Embedding:
        """[V, D], tied to the masked-word head."""
        return self.text_embeddings.word

    def encode_text(self, text: Text) -> Stream:
        """Embeddings alone, [B, L, D]; segment 0 = words, 1 = tags."""
        return Stream(self.text_embeddings(text.ids, text.segments), text.mask)

    def encode_visual(self, visual: Visual) -> Stream:
        """Embeddings alone, [B, R, D]."""
        assert visual.boxes is not None, "OSCAR reads where its regions are"
        return Stream(self.region_embeddings(visual.feats, visual.boxes), visual.mask)

    def fuse(self, text: Stream | None, visual: Stream | None, causal: bool = False) -> Fused:
        """All layers over words, tags and regions; pooled = tanh(linear([CLS])).

        With `causal` a word or tag sees the regions and what stands before it; regions see regions.
        """
        assert text is not None, "OSCAR reads a text beside regions"
        assert visual is not None, "OSCAR reads a text beside regions"
        length, regions = text.hidden.shape[1], visual.hidden.shape[1]
        mask = torch.cat([real(text), real(visual)], dim=1)
        words = torch.arange(length + regions, device=mask.device) < length
        seen = left_to_right(mask, words) if causal else attention_mask(mask)
        hidden = self.stack(torch.cat([text.hidden, visual.hidden], dim=1), seen)
        return Fused(text=hidden[:, :length], visual=hidden[:, length:], pooled=self.pooler(hidden))

    def flops(self, text_tokens: int) -> dict[str, int]:
        """See `Family.flops`."""
        c = self.config
        tokens = text_tokens + c.regions
        products = 4 * c.hidden**2 + 2 * c.hidden * c.intermediate  # query, key, value, output; the two of the MLP
        layer = 2 * tokens * products + 2 * 2 * tokens**2 * c.hidden
        return {
            "encode_text": 0,
            "encode_visual": 2 * c.regions * (c.feats + c.boxes) * c.hidden,
            "fuse": c.layers * layer + 2 * c.hidden**2,
        }


class RegionEmbeddings(nn.Module):
    """One linear map of a region's features and box, and OSCAR+'s LayerNorm."""

    def __init__(self, inner: int, width: int, norm: bool, dropout: float) -> None:
        super().__init__()
        self.projection = nn.Linear(inner, width)
        self.norm = nn.LayerNorm(width, NORM_EPS) if norm else None
        self.dropout = nn.Dropout(dropout)
        self.apply(init_normal)

    def forward(self, feats: Tensor, boxes: Tensor) -> Tensor:
        """feats [B, R, F], boxes [B, R, 6] -> [B, R, D]."""
        dtype = self.projection.weight.dtype
        hidden = self.projection(torch.cat([feats.to(dtype), boxes.to(dtype)], dim=2))
        out: Tensor = self.dropout(hidden if self.norm is None else self.norm(hidden))
        return out


def _check(config: Config) -> None:
    check_divides(config, ("hidden", "heads"))
    check_positions(config.text_length, config.max_positions)


build = Oscar


def tiny() -> Config:
    """A miniature with every part of the published models."""
    return Config(
        hidden=16,
        heads=2,
        layers=2,
        intermediate=32,
        vocab=64,
        max_positions=16,
        text_length=12,
        regions=5,
        feats=10,
        boxes=6,
        classes=7,
        region_norm=True,
    )


def _row(source: str, target: str, optional: bool = False) -> Rename:
    """To the family, and to its momentum twin where the model has one."""
    return Rename(source, (f"family.{target}", f"twin.{target}"), optional=optional)


def _bert(source: str) -> list[Rename]:
    """Rows for BERT's embeddings, layers and pooler; before 2019 a LayerNorm's gain and shift were gamma and beta."""
    layer, block = source + r"encoder\.layer\.(\d+)\.", r"stack.blocks.\1."
    rows = [
        _row(source + r"embeddings\.word_embeddings\.weight", "text_embeddings.word.weight"),
        _row(source + r"embeddings\.token_type_embeddings\.weight", "text_embeddings.segment.weight"),
        Rename(
            source + r"embeddings\.position_embeddings\.weight",
            ("family.text_embeddings.position.weight", "twin.text_embeddings.position.weight"),
            lambda table, shape: table[: shape[0]],
        ),
        Rename(source + r"embeddings\.position_ids"),  # 0, 1, 2, ...
        _row(layer + r"attention\.self\.(query|key|value)\.(\w+)", block + r"attention.\2.\3"),
        _row(layer + r"attention\.output\.dense\.(\w+)", block + r"attention.output.\2"),
        _row(layer + r"intermediate\.dense\.(\w+)", block + r"mlp.fc1.\2"),
        _row(layer + r"output\.dense\.(\w+)", block + r"mlp.fc2.\2"),
        _row(source + r"pooler\.dense\.(\w+)", r"pooler.dense.\1"),
    ]
    for part, letter in (("weight", "(?:weight|gamma)"), ("bias", "(?:bias|beta)")):
        rows.append(_row(source + rf"embeddings\.LayerNorm\.{letter}", f"text_embeddings.norm.{part}"))
        rows.append(_row(layer + rf"attention\.output\.LayerNorm\.{letter}", block + f"attention_norm.{part}"))
        rows.append(_row(layer + rf"output\.LayerNorm\.{letter}", block + f"mlp_norm.{part}"))
    return rows


def _word_head() -> list[Rename]:
    """Rows for BERT's masked-word head; its decoder is the word embedding."""
    source, ours = r"cls\.predictions\.", "objectives.mlm.head."
    return [
        Rename(source + "bias", (f"{ours}bias",), optional=True),
        Rename(source + r"transform\.dense\.(\w+)", (rf"{ours}dense.\1",), optional=True),
        Rename(source + r"transform\.LayerNorm\.(?:weight|gamma)", (f"{ours}norm.weight",), optional=True),
        Rename(source + r"transform\.LayerNorm\.(?:bias|beta)", (f"{ours}norm.bias",), optional=True),
        Rename(source + r"decoder\.(?:weight|bias)"),
    ]


PUBLISHED = Renames(
    (
        *_bert(r"bert\."),
        _row(r"bert\.img_embedding\.(\w+)", r"region_embeddings.projection.\1"),
        _row(r"bert\.LayerNorm\.(\w+)", r"region_embeddings.norm.\1"),
        *_word_head(),
        Rename(r"cls\.seq_relationship\.(\w+)", (r"objectives.tag_contrast.head.\1",), optional=True),
    ),
    fills=r"family\..*",
)

# bert-base-uncased; its next-sentence head told something else.
INIT_TEXT = Renames(
    (*_bert(r"(?:bert\.)?"), *_word_head(), Rename(r"cls\.seq_relationship\.\w+")),
    fills=r"family\.(?:text_embeddings|stack|pooler)\..*",
)

SIZES = (
    *bert_sizes(r"bert\."),
    Size("feats", r"bert\.img_embedding\.weight", 1, lambda width, known: width - int(known["boxes"])),
)

Oscar.published, Oscar.init_text = PUBLISHED, INIT_TEXT
