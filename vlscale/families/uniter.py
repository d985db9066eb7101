"""UNITER: one BERT over words and detected regions (Chen et al. 2020, arXiv 1909.11740). The authors' code:
ChenRocks/UNITER."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlscale.errors import ConfigError
from vlscale.families.base import Family, Rename, Renames, Size, bert_sizes, check_divides, check_positions
from vlscale.nn.attention import attention_mask
from vlscale.nn.bert import NORM_EPS, BertEmbeddings, bert_layers, init_normal
from vlscale.nn.single_stream import Pooler, left_to_right, real
from vlscale.nn.transformer import Stack, scale_matrices
from vlscale.types import Dims, Fused, Inputs, Stream, Text, Visual

BOXES = 7  # x1/W, y1/H, x2/W, y2/H, w/W, h/H and the area share (data/data.py)
REGION_SEGMENT = 1  # row of the words' segment table that regions carry (model/model.py)


@dataclass(frozen=True)
class Config:
    """Sizes; the defaults are UNITER-base (config/uniter-base.json)."""

    hidden: int = 768
    layers: int = 12
    heads: int = 12
    intermediate: int = 3072
    vocab: int = 28996  # BERT's cased vocabulary
    max_positions: int = 512
    segments: int = 2
    dropout: float = 0.1  # hidden and attention
    feats: int = 2048  # utils/const.py, as the next
    classes: int = 1601  # of the detector; 0 = background
    regions: int = 100  # config/pretrain-*.json: max_bb
    text_length: int = 62  # config/pretrain-*.json: max_txt_len 60, and [CLS], [SEP]
    init_scale: float = 1.0  # on the matrices' start of 0.02, which was chosen for width 768

    @property
    def inputs(self) -> Inputs:
        """What the data plane feeds this family."""
        return Inputs(0, self.text_length, True, self.regions, self.feats, BOXES, self.classes, "corners_size_area")


class RegionEmbeddings(nn.Module):
    """Features and place, each projected and normalised, summed with a segment and normalised again.

    A hidden region's features (zero by its view) have a learned vector added before the projection.
    """

    def __init__(self, feats: int, width: int, dropout: float) -> None:
        super().__init__()
        self.mask = nn.Embedding(1, feats)
        self.projection = nn.Linear(feats, width)
        self.projection_norm = nn.LayerNorm(width, NORM_EPS)
        self.place = nn.Linear(BOXES, width)
        self.place_norm = nn.LayerNorm(width, NORM_EPS)
        self.norm = nn.LayerNorm(width, NORM_EPS)
        self.dropout = nn.Dropout(dropout)
        self.apply(init_normal)

    def forward(self, feats: Tensor, boxes: Tensor, picked: Tensor | None, segment: Tensor) -> Tensor:
        """feats [B, R, F], boxes [B, R, 7], picked [B, R] bool, segment [D] -> [B, R, D]."""
        dtype = self.place.weight.dtype
        feats = feats.to(dtype)
        if picked is not None:
            vector = self.mask(torch.zeros(1, dtype=torch.int64, device=feats.device))
            feats = feats + picked[..., None] * vector
        seen = self.projection_norm(self.projection(feats)) + self.place_norm(self.place(boxes.to(dtype)))
        out: Tensor = self.dropout(self.norm(seen + segment))
        return out


class Uniter(Family):
    """Embeddings of words, embeddings of regions, and one stack over both.

    Raises:
        ConfigError: sizes that do not divide or fit.
    """

    offers = frozenset({"text", "visual", "fuse", "regions", "detector", "tied_regions", "single_stream"})

    def __init__(self, config: Config) -> None:
        super().__init__()
        _check(config)
        self.config = config
        c = config
        self.text_embeddings = BertEmbeddings(c.vocab, c.hidden, c.max_positions, c.segments, c.dropout)
        self.region_embeddings = RegionEmbeddings(c.feats, c.hidden, c.dropout)
        self.stack = Stack(bert_layers(c.layers, c.hidden, c.heads, c.intermediate, c.dropout))
        self.pooler = Pooler(c.hidden)
        for part in (self.stack, self.pooler):
            scale_matrices(part, c.init_scale)
        self.dims = Dims(c.hidden, c.hidden, c.hidden, vocab=c.vocab, feats=c.feats, classes=c.classes)
        self.inputs = c.inputs

    @property
    def word_embedding(self) -> nn.Embedding:
        """[V, D], tied to the masked-word head."""
        return self.text_embeddings.word

    @property
    def region_projection(self) -> nn.Linear:
        """F -> D, tied to the feature head."""
        return self.region_embeddings.projection

    def encode_text(self, text: Text) -> Stream:
        """The embeddings: the modalities meet in the first layer."""
        return Stream(self.text_embeddings(text.ids, text.segments), text.mask)

    def encode_visual(self, visual: Visual) -> Stream:
        """The embeddings; feats [B, R, F], boxes [B, R, 7]."""
        assert visual.boxes is not None, "UNITER reads the regions' boxes"
        row = torch.full((1,), REGION_SEGMENT, device=visual.feats.device)
        segment = self.text_embeddings.segment(row)[0]
        hidden = self.region_embeddings(visual.feats, visual.boxes, visual.picked, segment)
        return Stream(hidden, visual.mask)

    def fuse(self, text: Stream | None, visual: Stream | None, causal: bool = False) -> Fused:
        """All layers over words and regions, each of which sees all; pooled = tanh of a linear map of [CLS]."""
        assert text is not None, "UNITER fuses a text with regions"
        assert visual is not None, "UNITER fuses a text with regions"
        mask = torch.cat([real(text), real(visual)], dim=1)
        length = text.hidden.shape[1]
        words = torch.arange(mask.shape[1], device=mask.device) < length
        seen = left_to_right(mask, words) if causal else attention_mask(mask)
        hidden = self.stack(torch.cat([text.hidden, visual.hidden], dim=1), seen)
        return Fused(text=hidden[:, :length], visual=hidden[:, length:], pooled=self.pooler(hidden))

    def flops(self, text_tokens: int) -> dict[str, int]:
        """See `Family.flops`; of the most regions."""
        c = self.config
        tokens = text_tokens + c.regions
        products = 4 * c.hidden * c.hidden + 2 * c.hidden * c.intermediate
        layer = 2 * tokens * products + 2 * 2 * tokens * tokens * c.hidden
        return {
            "encode_text": 0,  # look-ups
            "encode_visual": 2 * c.regions * (c.feats + BOXES) * c.hidden,
            "fuse": c.layers * layer + 2 * c.hidden * c.hidden,
        }


def _check(config: Config) -> None:
    check_divides(config, ("hidden", "heads"))
    check_positions(config.text_length, config.max_positions)
    if config.segments <= REGION_SEGMENT:
        raise ConfigError(f"family.segments is {config.segments}, but regions carry segment {REGION_SEGMENT}; give 2")


build = Uniter


def tiny() -> Config:
    """A miniature with every part of the published model."""
    return Config(
        hidden=16,
        layers=2,
        heads=2,
        intermediate=32,
        vocab=64,
        max_positions=16,
        feats=12,
        classes=7,
        regions=6,
        text_length=12,
    )


def _turn(tensor: Tensor, shape: torch.Size) -> Tensor:
    return tensor.T


def _first_rows(tensor: Tensor, shape: torch.Size) -> Tensor:
    return tensor[: shape[0]]


def _last_row(tensor: Tensor, shape: torch.Size) -> Tensor:
    """Of two, the first is always zero in the authors' forward pass."""
    return tensor[1:]


def _after_zeros(tensor: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(tensor), tensor])


def _norm(source: str, target: str, optional: bool = False) -> list[Rename]:
    """A LayerNorm, whose parts BERT called gamma and beta before 2019."""
    return [
        Rename(rf"{source}\.(?:weight|gamma)", (f"{target}.weight",), optional=optional),
        Rename(rf"{source}\.(?:bias|beta)", (f"{target}.bias",), optional=optional),
    ]


def _bert(source: str) -> list[Rename]:
    """Rows for a BERT: word embeddings, layers and pooler."""
    layer, block = source + r"encoder\.layer\.(\d+)\.", r"family.stack.blocks.\1."
    table = source + r"embeddings\."
    return [
        Rename(table + r"word_embeddings\.weight", ("family.text_embeddings.word.weight",)),
        Rename(table + r"position_embeddings\.weight", ("family.text_embeddings.position.weight",), _first_rows),
        Rename(table + r"token_type_embeddings\.weight", ("family.text_embeddings.segment.weight",)),
        Rename(table + "position_ids"),  # 0, 1, 2, ...
        *_norm(table + "LayerNorm", "family.text_embeddings.norm"),
        Rename(layer + r"attention\.self\.(query|key|value)\.(\w+)", (block + r"attention.\2.\3",)),
        Rename(layer + r"attention\.output\.dense\.(\w+)", (block + r"attention.output.\2",)),
        *_norm(layer + r"attention\.output\.LayerNorm", block + "attention_norm"),
        Rename(layer + r"intermediate\.dense\.(\w+)", (block + r"mlp.fc1.\2",)),
        Rename(layer + r"output\.dense\.(\w+)", (block + r"mlp.fc2.\2",)),
        *_norm(layer + r"output\.LayerNorm", block + "mlp_norm"),
        Rename(source + r"pooler\.dense\.(\w+)", (r"family.pooler.dense.\1",)),
    ]


def _word_head() -> list[Rename]:
    """Rows for BERT's masked-word head; its decoder is the word embedding."""
    source, ours = r"cls\.predictions\.", "objectives.mlm.head."
    return [
        Rename(source + "bias", (f"{ours}bias",), optional=True),
        Rename(source + r"transform\.dense\.(\w+)", (rf"{ours}dense.\1",), optional=True),
        *_norm(source + r"transform\.LayerNorm", f"{ours}norm", optional=True),
        Rename(source + r"decoder\.(?:weight|bias)"),
    ]


def _region_head(source: str, *objectives: str) -> list[Rename]:
    """Rows for a head over regions, which several objectives may have started from."""
    ours = [f"objectives.{name}.head." for name in objectives]
    return [
        Rename(rf"{source}\.net\.0\.(\w+)", tuple(rf"{head}dense.\1" for head in ours), optional=True),
        Rename(rf"{source}\.net\.2\.(\w+)", tuple(rf"{head}norm.\1" for head in ours), optional=True),
        Rename(rf"{source}\.net\.3\.(\w+)", tuple(rf"{head}decoder.\1" for head in ours), optional=True),
    ]


# The authors' checkpoints. Their feature head has the image projection's matrix, transposed.
PUBLISHED = Renames(
    (
        *_bert(r"uniter\."),
        Rename(
            r"uniter\.img_embeddings\.mask_embedding\.weight",
            ("family.region_embeddings.mask.weight",),
            _last_row,
            back=_after_zeros,
        ),
        Rename(r"uniter\.img_embeddings\.img_linear\.(\w+)", (r"family.region_embeddings.projection.\1",)),
        *_norm(r"uniter\.img_embeddings\.img_layer_norm", "family.region_embeddings.projection_norm"),
        Rename(r"uniter\.img_embeddings\.pos_linear\.(\w+)", (r"family.region_embeddings.place.\1",)),
        *_norm(r"uniter\.img_embeddings\.pos_layer_norm", "family.region_embeddings.place_norm"),
        *_norm(r"uniter\.img_embeddings\.LayerNorm", "family.region_embeddings.norm"),
        *_word_head(),
        *_region_head("feat_regress", "mrfr")[:2],  # its last matrix stands by itself
        Rename(r"feat_regress\.weight", ("objectives.mrfr.head.decoder.weight",), _turn, optional=True, back=torch.t),
        Rename(
            r"feat_regress\.bias", ("objectives.mrfr.head.bias", "objectives.mrfr.head.decoder.bias"), optional=True
        ),
        *_region_head("region_classifier", "mrc", "mrc_kl"),
        Rename(r"itm_output\.(\w+)", (r"objectives.itm.head.\1",), optional=True),
    ),
    fills=r"family\..*",
)

# bert-base-cased, which the authors start from; what embeds regions is new.
INIT_TEXT = Renames(
    (
        *_bert(r"(?:bert\.)?"),
        *_word_head(),
        Rename(r"cls\.seq_relationship\.\w+"),
    ),
    fills=r"family\.(?:text_embeddings|stack|pooler)\..*",
)

SIZES = (
    *bert_sizes(r"uniter\."),
    Size("feats", r"uniter\.img_embeddings\.img_linear\.weight", 1),
    Size("classes", r"region_classifier\.net\.3\.bias", 0),
)

Uniter.published, Uniter.init_text = PUBLISHED, INIT_TEXT
