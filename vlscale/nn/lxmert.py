"""The network that LXMERT (Tan and Bansal 2019, arXiv 1908.07490, section 2) and CVLP train: text alone, regions
alone, then layers in which each looks at the other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlscale.nn.attention import Attention, attention_mask
from vlscale.nn.bert import NORM_EPS, BertEmbeddings, bert_layers, init_normal
from vlscale.nn.single_stream import Pooler, real
from vlscale.nn.transformer import PostNormBlock, Stack, scale_matrices
from vlscale.types import Dims, Fused, Inputs, Stream, Text, Visual


@dataclass(frozen=True)
class Sizes:
    """The defaults are the published model's; there is no other. The authors' code: airsplay/lxmert at 0db1182."""

    hidden: int = 768  # bert-base-uncased, as are the next seven
    heads: int = 12
    intermediate: int = 3072
    vocab: int = 30522
    max_positions: int = 512
    segments: int = 2
    dropout: float = 0.1  # hidden and attention
    init_scale: float = 1.0  # on the layers' and pooler's start of 0.02, which was chosen for width 768
    text_layers: int = 9  # run/lxmert_pretrain.bash: --llayers, --rlayers, --xlayers
    visual_layers: int = 5
    cross_layers: int = 5
    text_length: int = 20  # src/pretrain/lxmert_pretrain.py: max_seq_length, special tokens counted
    regions: int = 36  # data/mscoco_imgfeat: *_obj36.tsv
    feats: int = 2048  # src/lxrt/modeling.py, VisualConfig
    boxes: int = 4  # x1 / W, y1 / H, x2 / W, y2 / H: src/pretrain/lxmert_data.py
    classes: int = 1600  # VisualConfig: obj_id_num; for objectives alone

    @property
    def inputs(self) -> Inputs:
        """What the data plane feeds this network."""
        return Inputs(0, self.text_length, True, self.regions, self.feats, self.boxes, self.classes, "corners")

    def fault(self) -> str | None:
        """What is wrong with these sizes, if anything is."""
        if self.hidden % self.heads:
            return (
                f"family.hidden {self.hidden} is not a multiple of family.heads {self.heads}; choose sizes that divide"
            )
        if self.text_length > self.max_positions:
            return f"family.text_length {self.text_length} exceeds family.max_positions {self.max_positions}"
        return None


class RegionEmbeddings(nn.Module):
    """The mean of two normalised linear maps, of a region's features and of its box; neither position nor segment."""

    def __init__(self, feats: int, boxes: int, width: int, dropout: float) -> None:
        super().__init__()
        self.feature = nn.Linear(feats, width)
        self.feature_norm = nn.LayerNorm(width, NORM_EPS)
        self.box = nn.Linear(boxes, width)
        self.box_norm = nn.LayerNorm(width, NORM_EPS)
        self.dropout = nn.Dropout(dropout)
        self.apply(init_normal)

    def forward(self, feats: Tensor, boxes: Tensor) -> Tensor:
        """feats [B, R, F], boxes [B, R, 4] -> [B, R, D]."""
        dtype = self.feature.weight.dtype
        seen, place = self.feature_norm(self.feature(feats.to(dtype))), self.box_norm(self.box(boxes.to(dtype)))
        out: Tensor = self.dropout((seen + place) / 2)
        return out


class CrossBlock(nn.Module):
    """A cross-modality layer: both streams look at each other through ONE attention, then each goes its own way.

    Each stream's queries meet the other as it was before the layer; norm(x + attention(x, other)); then
    self-attention and MLP of its own, as in a BERT layer. Words and regions stand in one tensor, so that the layer
    is an ordinary block of a `Stack`.
    """

    def __init__(self, width: int, heads: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.cross_attention = Attention(width, heads, width, dropout)
        self.cross_norm = nn.LayerNorm(width, NORM_EPS)
        self.text = PostNormBlock(width, heads, inner, NORM_EPS, dropout)
        self.visual = PostNormBlock(width, heads, inner, NORM_EPS, dropout)
        self.dropout = nn.Dropout(dropout)
        self.apply(init_normal)

    def forward(self, hidden: Tensor, text_mask: Tensor, visual_mask: Tensor | None = None) -> Tensor:
        """[B, L + R, D] -> [B, L + R, D]; masks [B, 1, 1, L] and [B, 1, 1, R], as in `attention.attend`."""
        length = text_mask.shape[-1]
        words, regions = hidden[:, :length], hidden[:, length:]
        met = [self.cross_attention(words, regions, visual_mask), self.cross_attention(regions, words, text_mask)]
        hidden = self.cross_norm(hidden + self.dropout(torch.cat(met, dim=1)))
        words, regions = hidden[:, :length], hidden[:, length:]
        return torch.cat([self.text(words, text_mask), self.visual(regions, visual_mask)], dim=1)


class WideHead(nn.Module):
    """Linear to twice the width, GELU, LayerNorm, linear: to LXMERT's answers, and to what CVLP's code contrasts
    (src/lxrt/modeling.py of both)."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, 2 * width)
        self.norm = nn.LayerNorm(2 * width, NORM_EPS)
        self.decoder = nn.Linear(2 * width, out)
        self.apply(init_normal)

    def forward(self, states: Tensor) -> Tensor:
        """[..., D] -> [..., out]."""
        out: Tensor = self.decoder(self.norm(F.gelu(self.dense(states))))
        return out

    def flops(self, rows: int) -> int:
        """FLOPs of one forward pass over so many states."""
        return 2 * rows * self.dense.out_features * (self.dense.in_features + self.decoder.out_features)


class TwoStreams(nn.Module):
    """What a family of this network inherits beside `Family`: all but `fuse`, which it makes of `exchange`.

    The first rows of the position and segment tables, which stand for [CLS]'s place and for the only segment in use,
    keep their start: the authors' tables take index 0 for padding in all three (src/lxrt/modeling.py).
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = c = sizes
        self.text_embeddings = BertEmbeddings(c.vocab, c.hidden, c.max_positions, c.segments, c.dropout)
        self.text_embeddings.position.padding_idx = self.text_embeddings.segment.padding_idx = 0
        self.region_embeddings = RegionEmbeddings(c.feats, c.boxes, c.hidden, c.dropout)
        self.text_stack = Stack(bert_layers(c.text_layers, c.hidden, c.heads, c.intermediate, c.dropout))
        self.visual_stack = Stack(bert_layers(c.visual_layers, c.hidden, c.heads, c.intermediate, c.dropout))
        crossing = (CrossBlock(c.hidden, c.heads, c.intermediate, c.dropout) for _ in range(c.cross_layers))
        self.cross_stack = Stack(crossing)
        self.pooler = Pooler(c.hidden)
        for part in (self.text_stack, self.visual_stack, self.cross_stack, self.pooler):
            scale_matrices(part, c.init_scale)
        self.dims = Dims(c.hidden, c.hidden, c.hidden, vocab=c.vocab, feats=c.feats, classes=c.classes)
        self.inputs = c.inputs

    @property
    def word_embedding(self) -> nn.Embedding:
        """[V, D], tied to the masked-word head."""
        return self.text_embeddings.word

    def encode_text(self, text: Text) -> Stream:
        """Embeddings and language layers; hidden [B, L, D]."""
        embedded = self.text_embeddings(text.ids, text.segments)
        return Stream(self.text_stack(embedded, attention_mask(text.mask)), text.mask)

    def encode_visual(self, visual: Visual) -> Stream:
        """Embeddings and the layers over regions alone; hidden [B, R, D]."""
        assert visual.boxes is not None, "the network reads where its regions are"
        embedded = self.region_embeddings(visual.feats, visual.boxes)
        return Stream(self.visual_stack(embedded, attention_mask(visual.mask)), visual.mask)

    def exchange(self, text: Stream | None, visual: Stream | None) -> Fused:
        """The cross-modality layers; text [B, L, D], visual [B, R, D], pooled [B, D] = tanh(linear([CLS]))."""
        assert text is not None, "the network fuses a text with regions"
        assert visual is not None, "the network fuses a text with regions"
        length = text.hidden.shape[1]
        hidden = torch.cat([text.hidden, visual.hidden], dim=1)
        hidden = self.cross_stack(hidden, attention_mask(real(text)), attention_mask(visual.mask))
        return Fused(text=hidden[:, :length], visual=hidden[:, length:], pooled=self.pooler(hidden))

    def flops(self, text_tokens: int) -> dict[str, int]:
        """See `Family.flops`; of the most regions."""
        c = self.sizes
        projections = 2 * 4 * c.hidden**2  # query, key, value, output, of each token

        def layers(tokens: int) -> int:
            return tokens * (projections + 2 * 2 * c.hidden * c.intermediate) + 2 * 2 * tokens**2 * c.hidden

        scores = 2 * 2 * 2 * text_tokens * c.regions * c.hidden  # and values, both ways
        cross = (text_tokens + c.regions) * projections + scores + layers(text_tokens) + layers(c.regions)
        return {
            "encode_text": c.text_layers * layers(text_tokens),
            "encode_visual": 2 * c.regions * (c.feats + c.boxes) * c.hidden + c.visual_layers * layers(c.regions),
            "fuse": c.cross_layers * cross + 2 * c.hidden**2,
        }


def _norms(*rows: tuple[str, str]) -> tuple[tuple[str, str], ...]:
    """LayerNorms, whose parts had other names before 2019."""
    letters = (("weight", "(?:weight|gamma)"), ("bias", "(?:bias|beta)"))
    return tuple((rf"{theirs}\.{each}", f"{ours}.{part}") for theirs, ours in rows for part, each in letters)


def _layers(theirs: str, ours: str) -> tuple[tuple[str, str], ...]:
    layer, block = rf"{theirs}\.(\d+)\.", rf"{ours}.blocks.\1."
    return (
        (layer + r"attention\.self\.(query|key|value)\.(\w+)", block + r"attention.\2.\3"),
        (layer + r"attention\.output\.dense\.(\w+)", block + r"attention.output.\2"),
        (layer + r"intermediate\.dense\.(\w+)", block + r"mlp.fc1.\2"),
        (layer + r"output\.dense\.(\w+)", block + r"mlp.fc2.\2"),
        *_norms((layer + r"attention\.output\.LayerNorm", block + "attention_norm")),
        *_norms((layer + r"output\.LayerNorm", block + "mlp_norm")),
    )


def _cross_layers(theirs: str, ours: str) -> tuple[tuple[str, str], ...]:
    layer, block = rf"{theirs}\.(\d+)\.", rf"{ours}.blocks.\1."
    rows = [
        (layer + r"visual_attention\.att\.(query|key|value)\.(\w+)", block + r"cross_attention.\2.\3"),
        (layer + r"visual_attention\.output\.dense\.(\w+)", block + r"cross_attention.output.\2"),
        *_norms((layer + r"visual_attention\.output\.LayerNorm", block + "cross_norm")),
    ]
    for short, stream in (("lang", "text"), ("visn", "visual")):
        rows += [
            (layer + rf"{short}_self_att\.self\.(query|key|value)\.(\w+)", block + rf"{stream}.attention.\2.\3"),
            (layer + rf"{short}_self_att\.output\.dense\.(\w+)", block + rf"{stream}.attention.output.\2"),
            (layer + rf"{short}_inter\.dense\.(\w+)", block + rf"{stream}.mlp.fc1.\2"),
            (layer + rf"{short}_output\.dense\.(\w+)", block + rf"{stream}.mlp.fc2.\2"),
            *_norms((layer + rf"{short}_self_att\.output\.LayerNorm", block + f"{stream}.attention_norm")),
            *_norms((layer + rf"{short}_output\.LayerNorm", block + f"{stream}.mlp_norm")),
        ]
    return tuple(rows)


# (regular expression for LXMERT's name, ours); BERT's names are among them.
BERT_NAMES = (
    (r"embeddings\.word_embeddings\.weight", "text_embeddings.word.weight"),
    (r"embeddings\.token_type_embeddings\.weight", "text_embeddings.segment.weight"),
    *_norms((r"embeddings\.LayerNorm", "text_embeddings.norm")),
    *_layers(r"encoder\.layer", "text_stack"),
    (r"pooler\.dense\.(\w+)", r"pooler.dense.\1"),
)
POSITIONS = (r"embeddings\.position_embeddings\.weight", "text_embeddings.position.weight")  # ours may be fewer
REGION_NAMES = (
    (r"encoder\.visn_fc\.visn_fc\.(\w+)", r"region_embeddings.feature.\1"),
    (r"encoder\.visn_fc\.box_fc\.(\w+)", r"region_embeddings.box.\1"),
    *_norms((r"encoder\.visn_fc\.visn_layer_norm", "region_embeddings.feature_norm")),
    *_norms((r"encoder\.visn_fc\.box_layer_norm", "region_embeddings.box_norm")),
    *_layers(r"encoder\.r_layers", "visual_stack"),
    *_cross_layers(r"encoder\.x_layers", "cross_stack"),
)
WORD_HEAD_NAMES = (  # its decoder is the word embedding
    (r"bias", "bias"),
    (r"transform\.dense\.(\w+)", r"dense.\1"),
    *_norms((r"transform\.LayerNorm", "norm")),
)


def first_rows(table: Tensor, shape: torch.Size) -> Tensor:
    """As many rows of a published table as ours has."""
    return table[: shape[0]]
