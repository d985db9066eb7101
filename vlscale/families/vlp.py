"""VLP: one transformer that reads regions and a caption from left to right or in both directions (Zhou et al. 2020,
arXiv 1909.11059). The authors' code: LuoweiZhou/VLP at 74c4d85."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlscale.errors import ConfigError
from vlscale.families.base import Family, Rename, Renames, Size, bert_sizes, check_divides
from vlscale.nn.attention import attention_mask
from vlscale.nn.bert import init_normal
from vlscale.nn.single_stream import Pooler, left_to_right, real
from vlscale.nn.transformer import PostNormBlock, Stack, scale_matrices
from vlscale.types import Dims, Fused, Inputs, Stream, Text, Visual

NORM_EPS = 1e-5  # pytorch_pretrained_bert/modeling.py: BertLayerNorm, unlike BERT's own 1e-12
PLACE_EPS = 1e-5  # vlp/seq2seq_loader.py: F.layer_norm of a region's place and classes
BOTH_WAYS, FROM_THE_LEFT = (0, 1), (4, 5)  # segments of picture and sentence: seq2seq_loader.py, new_segment_ids


@dataclass(frozen=True)
class Config:
    """Sizes; the defaults are the published model's."""

    hidden: int = 768  # bert-base-cased, as are the next five
    heads: int = 12
    layers: int = 12
    intermediate: int = 3072
    vocab: int = 28996
    max_positions: int = 512
    segments: int = 6  # vlp/run_img2txt_dist.py: type_vocab_size with new_segment_ids
    dropout: float = 0.1  # hidden and attention; bert_config.json
    text_length: int = 22  # run_img2txt_dist.py: max_len_b 20, [CLS] and [SEP]
    separator_id: int = 102  # of [SEP] in the cased vocabulary: it also stands behind the regions
    regions: int = 100  # run_img2txt_dist.py: len_vis_input
    feats: int = 2048  # the detector's fc6; modeling.py, BertForPreTrainingLossMask, as are the next three
    inner: int = 2048  # its fc7
    boxes: int = 6  # x1, x2 in the greatest x, y1, y2 in the greatest y, area, score
    classes: int = 1601  # Visual Genome's objects and the background
    init_scale: float = 1.0  # on the matrices' start of 0.02, which was chosen for width 768

    @property
    def inputs(self) -> Inputs:
        """What the data plane feeds this family."""
        return Inputs(
            image_size=0,
            text_length=self.text_length,
            separator=True,
            regions=self.regions,
            feats=self.feats,
            boxes=self.boxes,
            classes=self.classes,
            geometry="extent_area_score",
            fields=frozenset({"class_probs", "class_confidence"}),
        )


class Vlp(Family):
    """[CLS] regions [SEP] sentence [SEP] as one sequence, whose first part never looks at the sentence when that is
    read from left to right.

    Raises:
        ConfigError: sizes that do not divide or fit.
    """

    offers = frozenset({"text", "visual", "fuse", "causal", "regions", "detector", "single_stream"})

    def __init__(self, config: Config) -> None:
        super().__init__()
        _check(config)
        self.config = c = config
        self.words = WordsAndPositions(c.vocab, c.hidden, c.max_positions)
        self.content = RegionContent(c.feats, c.inner, c.hidden, c.dropout)
        self.place = RegionPlace(c.boxes + c.classes, c.hidden, c.dropout)
        self.joined = Joined(c.segments, c.hidden, c.dropout)
        blocks = [PostNormBlock(c.hidden, c.heads, c.intermediate, NORM_EPS, c.dropout) for _ in range(c.layers)]
        self.stack = Stack(blocks)
        self.stack.apply(init_normal)
        self.pooler = Pooler(c.hidden)
        for part in (self.stack, self.pooler):
            scale_matrices(part, c.init_scale)
        self.dims = Dims(
            text=c.hidden,
            visual=c.hidden,
            fused=c.hidden,
            vocab=c.vocab,
            feats=c.feats,
            classes=c.classes,
            norm_eps=NORM_EPS,
        )
        self.inputs = c.inputs

    @property
    def word_embedding(self) -> nn.Embedding:
        """[V, D], tied to the masked-word head."""
        return self.words.word

    def encode_text(self, text: Text) -> Stream:
        """Words and positions, [B, L, D]: [CLS] is at 0, the sentence behind the regions and their [SEP]."""
        places = torch.arange(text.ids.shape[1], device=text.ids.device)
        return Stream(self.words(text.ids, torch.where(places > 0, places + self.config.regions + 1, 0)), text.mask)

    def encode_visual(self, visual: Visual) -> Stream:
        """What a region shows and where it is, [B, R, D]; zero for a hidden region."""
        assert visual.boxes is not None, "VLP reads where its regions are"
        assert visual.class_probs is not None, "VLP reads what the detector takes its regions for"
        hidden = self.content(visual.feats) + self.place(visual.boxes, visual.class_probs)
        if visual.picked is not None:
            hidden = hidden.masked_fill(visual.picked[..., None], 0.0)
        return Stream(hidden, visual.mask)

    def fuse(self, text: Stream | None, visual: Stream | None, causal: bool = False) -> Fused:
        """All layers; pooled = tanh(linear([CLS])).

        With `causal` the sentence sees [CLS], the regions and itself up to each word, and those see each other;
        the segments tell the network so.
        """
        assert text is not None, "VLP reads a sentence beside regions"
        assert visual is not None, "VLP reads a sentence beside regions"
        behind = self.words(
            torch.full((len(text.hidden), 1), self.config.separator_id, device=text.hidden.device),
            torch.full((1,), self.config.regions + 1, device=text.hidden.device),
        )
        written, regions = real(text), visual.hidden.shape[1]
        hidden = torch.cat([text.hidden[:, :1], visual.hidden, behind, text.hidden[:, 1:]], dim=1)
        mask = torch.cat([written[:, :1], real(visual), torch.ones_like(written[:, :1]), written[:, 1:]], dim=1)
        sentence = torch.arange(mask.shape[1], device=mask.device) >= regions + 2
        seen = left_to_right(mask, sentence) if causal else attention_mask(mask)
        hidden = self.stack(self.joined(hidden, segments_of(mask, sentence, causal)), seen)
        return Fused(
            text=torch.cat([hidden[:, :1], hidden[:, regions + 2 :]], dim=1),
            visual=hidden[:, 1 : regions + 1],
            pooled=self.pooler(hidden),
        )

    def flops(self, text_tokens: int) -> dict[str, int]:
        """See `Family.flops`."""
        c = self.config
        tokens = text_tokens + c.regions + 1
        products = 4 * c.hidden**2 + 2 * c.hidden * c.intermediate  # query, key, value, output; the two of the MLP
        layer = 2 * tokens * products + 2 * 2 * tokens**2 * c.hidden
        region = c.feats * c.inner + c.inner * c.hidden + (c.boxes + c.classes) * c.hidden
        return {
            "encode_text": 0,
            "encode_visual": 2 * c.regions * region,
            "fuse": c.layers * layer + 2 * c.hidden**2,
        }


def segments_of(mask: Tensor, sentence: Tensor, causal: bool) -> Tensor:
    """[B, T] int64 from mask [B, T] bool and which places are the sentence's [T] bool; padding of a sentence is 0."""
    picture, words = FROM_THE_LEFT if causal else BOTH_WAYS
    return torch.where(sentence, torch.where(mask, words, 0), picture)


class WordsAndPositions(nn.Module):
    """Word and position embeddings, summed."""

    def __init__(self, vocab: int, width: int, max_positions: int) -> None:
        super().__init__()
        self.word = nn.Embedding(vocab, width)
        self.position = nn.Embedding(max_positions, width)
        self.apply(init_normal)

    def forward(self, ids: Tensor, places: Tensor) -> Tensor:
        """ids [B, L] int64, places [L] int64 -> [B, L, D]."""
        out: Tensor = self.word(ids) + self.position(places)
        return out


class RegionContent(nn.Module):
    """Linear, ReLU, linear, ReLU; at torch's own start, as the authors' second layer and the next class."""

    def __init__(self, feats: int, inner: int, width: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(feats, inner)
        self.fc2 = nn.Linear(inner, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, feats: Tensor) -> Tensor:
        """[B, R, F] -> [B, R, D]."""
        out: Tensor = self.dropout(self.fc2(self.fc1(feats.to(self.fc1.weight.dtype)).relu()).relu())
        return out


class RegionPlace(nn.Module):
    """A region's box and the detector's distribution, each normalised, through a linear layer and ReLU."""

    def __init__(self, inner: int, width: int, dropout: float) -> None:
        super().__init__()
        self.linear = nn.Linear(inner, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, boxes: Tensor, class_probs: Tensor) -> Tensor:
        """boxes [B, R, 6], class_probs [B, R, classes] -> [B, R, D]."""
        even = [F.layer_norm(part.float(), part.shape[-1:], eps=PLACE_EPS) for part in (boxes, class_probs)]
        out: Tensor = self.dropout(self.linear(torch.cat(even, dim=2).to(self.linear.weight.dtype)).relu())
        return out


class Joined(nn.Module):
    """The segment added to words and regions, and their LayerNorm."""

    def __init__(self, segments: int, width: int, dropout: float) -> None:
        super().__init__()
        self.segment = nn.Embedding(segments, width)
        self.norm = nn.LayerNorm(width, NORM_EPS)
        self.dropout = nn.Dropout(dropout)
        self.apply(init_normal)

    def forward(self, hidden: Tensor, segments: Tensor) -> Tensor:
        """hidden [B, T, D], segments [B, T] int64 -> [B, T, D]."""
        out: Tensor = self.dropout(self.norm(hidden + self.segment(segments)))
        return out


def _check(config: Config) -> None:
    check_divides(config, ("hidden", "heads"))
    needed = config.regions + 1 + config.text_length
    if needed > config.max_positions:
        raise ConfigError(
            f"family.regions {config.regions} and family.text_length {config.text_length} take {needed} positions with "
            f"the [SEP] between them, but family.max_positions is {config.max_positions}"
        )
    if config.segments <= max(FROM_THE_LEFT):
        raise ConfigError(f"family.segments is {config.segments}; VLP tells {max(FROM_THE_LEFT) + 1} segments apart")
    if config.separator_id >= config.vocab:
        raise ConfigError(f"family.separator_id {config.separator_id} is not in a vocabulary of {config.vocab}")


build = Vlp


def tiny() -> Config:
    """A miniature with every part of the published model."""
    return Config(
        hidden=16,
        heads=2,
        layers=2,
        intermediate=32,
        vocab=64,
        max_positions=24,
        text_length=12,
        separator_id=2,
        regions=5,
        feats=10,
        inner=12,
        classes=7,
    )


def _row(source: str, target: str) -> Rename:
    """To the family, and to its momentum twin where the model has one."""
    return Rename(source, (f"family.{target}", f"twin.{target}"))


def _first_rows(table: Tensor, shape: torch.Size) -> Tensor:
    return table[: shape[0]]


def _six_segments(table: Tensor, shape: torch.Size) -> Tensor:
    """Of BERT's two: pictures start as its first, sentences read from the left as its second (from_pretrained)."""
    return table if table.shape == shape else table[[0, 1, 0, 0, 0, 1]]


def _bert(source: str) -> list[Rename]:
    """Rows for BERT's embeddings, layers and pooler; before 2019 a LayerNorm's gain and shift were gamma and beta."""
    layer, block = source + r"encoder\.layer\.(\d+)\.", r"stack.blocks.\1."
    both = ("family.{}", "twin.{}")
    tables = {
        "position_embeddings": ("words.position.weight", _first_rows),
        "token_type_embeddings": ("joined.segment.weight", _six_segments),
    }
    rows = [
        Rename(source + rf"embeddings\.{theirs}\.weight", tuple(name.format(ours) for name in both), change)
        for theirs, (ours, change) in tables.items()
    ]
    rows += [
        _row(source + r"embeddings\.word_embeddings\.weight", "words.word.weight"),
        Rename(source + r"embeddings\.position_ids"),  # 0, 1, 2, ...
        _row(layer + r"attention\.self\.(query|key|value)\.(\w+)", block + r"attention.\2.\3"),
        _row(layer + r"attention\.output\.dense\.(\w+)", block + r"attention.output.\2"),
        _row(layer + r"intermediate\.dense\.(\w+)", block + r"mlp.fc1.\2"),
        _row(layer + r"output\.dense\.(\w+)", block + r"mlp.fc2.\2"),
        _row(source + r"pooler\.dense\.(\w+)", r"pooler.dense.\1"),
    ]
    for part, letter in (("weight", "(?:weight|gamma)"), ("bias", "(?:bias|beta)")):
        rows.append(_row(source + rf"embeddings\.LayerNorm\.{letter}", f"joined.norm.{part}"))
        rows.append(_row(layer + rf"attention\.output\.LayerNorm\.{letter}", block + f"attention_norm.{part}"))
        rows.append(_row(layer + rf"output\.LayerNorm\.{letter}", block + f"mlp_norm.{part}"))
    return rows


def _word_head() -> list[Rename]:
    """Rows for the masked-word head; its decoder is the word embedding."""

    def row(source: str, target: str) -> Rename:
        ours = tuple(f"objectives.{name}.head.{target}" for name in ("seq2seq", "mlm"))
        return Rename(r"cls\.predictions\." + source, ours, optional=True)

    return [
        row("bias", "bias"),
        row(r"transform\.dense\.(\w+)", r"dense.\1"),
        row(r"transform\.LayerNorm\.(?:weight|gamma)", "norm.weight"),
        row(r"transform\.LayerNorm\.(?:bias|beta)", "norm.bias"),
        Rename(r"cls\.predictions\.decoder\.(?:weight|bias)"),
    ]


PUBLISHED = Renames(
    (
        *_bert(r"bert\."),
        *_word_head(),
        _row(r"vis_embed\.0\.(\w+)", r"content.fc1.\1"),
        _row(r"vis_embed\.2\.(\w+)", r"content.fc2.\1"),
        _row(r"vis_pe_embed\.0\.(\w+)", r"place.linear.\1"),
        Rename(r"ans_classifier\.[02]\.\w+"),  # of models trained further for answering
    ),
    fills=r"family\..*",
)

# UniLM or bert-base-cased.
INIT_TEXT = Renames(
    (*_bert(r"(?:bert\.)?"), *_word_head(), Rename(r"cls\.seq_relationship\.\w+")),
    fills=r"family\.(?:words|joined|stack|pooler)\..*",
)

SIZES = (
    *bert_sizes(r"bert\."),
    Size("feats", r"vis_embed\.0\.weight", 1),
    Size("inner", r"vis_embed\.0\.weight", 0),
    Size("classes", r"vis_pe_embed\.0\.weight", 1, lambda width, known: width - int(known["boxes"])),
)

Vlp.published, Vlp.init_text = PUBLISHED, INIT_TEXT
