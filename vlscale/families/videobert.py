"""VideoBERT: one BERT over words and visual words (Sun et al. 2019, arXiv 1904.01766). The authors published neither
code nor weights: what the paper leaves open is said where it is chosen."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlscale.errors import ConfigError
from vlscale.families.base import Family, Rename, Renames, Size, check_divides
from vlscale.nn.attention import attention_mask
from vlscale.nn.bert import NORM_EPS, PAD, WordHead, bert_layers, init_normal
from vlscale.nn.single_stream import Pooler, real
from vlscale.nn.transformer import Stack, layer_flops, scale_matrices
from vlscale.types import Dims, Fused, Inputs, Marks, Stream, Text, Visual

_BLOCK = r"family.stack.blocks.\1."  # names of a layer's parameters
TEXT, VIDEO = 0, 1  # rows of the segment table; [>] is text's, the [SEP] behind visual words video's (not in the paper)


@dataclass(frozen=True)
class Config:
    """Sizes; the defaults are the paper's, and BERT large's where it names that."""

    hidden: int = 1024  # BERT large, as are the next five
    layers: int = 24
    heads: int = 16
    intermediate: int = 4096
    vocab: int = 30522  # of bert-large-uncased; the paper says 30,000
    max_positions: int = 512
    dropout: float = 0.1  # hidden and attention
    codes: int = 20736  # hierarchical k-means, 12^4
    text_length: int = 64  # not in the paper; [CLS] counted
    frames: int = 64  # most visual words of a sample: not in the paper, but 16 where a video has no speech
    cls: int = 101  # ids in bert-large-uncased's vocabulary of what the family puts in itself, as are the next three
    sep: int = 102
    mask: int = 103
    video_start: int = 1  # [>], which no vocabulary has: [unused0]
    # how centroids of another width than `hidden` enter the table. pca: their first axes, or zeros behind them
    fit_codebook: Literal["none", "pca"] = "none"
    init_scale: float = 1.0  # on the matrices' start of 0.02, which was chosen for width 768

    @property
    def inputs(self) -> Inputs:
        """What the data plane feeds this family."""
        marks = Marks(self.cls, self.sep, self.mask, self.video_start)
        return Inputs(0, self.text_length, False, frames=self.frames, codes=self.codes, marks=marks)


class Embeddings(nn.Module):
    """A token's row of the table, its position and its segment, summed and normalised."""

    def __init__(self, positions: int, width: int, dropout: float) -> None:
        super().__init__()
        self.position = nn.Embedding(positions, width)
        self.segment = nn.Embedding(2, width)
        self.norm = nn.LayerNorm(width, NORM_EPS)
        self.dropout = nn.Dropout(dropout)
        self.apply(init_normal)

    def forward(self, rows: Tensor, places: Tensor, segments: Tensor) -> Tensor:
        """rows [B, S, D], places and segments [B, S] int64 -> [B, S, D]."""
        out: Tensor = self.dropout(self.norm(rows + self.position(places) + self.segment(segments)))
        return out


class Sequence(NamedTuple):
    """[CLS] words [>] visual words [SEP], or one modality alone between [CLS] and [SEP]; padding stays where it is."""

    rows: Tensor  # [B, S, D] of the table
    mask: Tensor  # [B, S] bool
    segments: Tensor  # [B, S] int64, 0 for padding
    places: Tensor  # [B, S] int64, as if padding stood at the end


class VideoBert(Family):
    """Rows of one frozen table of words and visual words, and one stack over both.

    Where a token stands depends on how long the other modality is, so the streams hold rows alone.

    Raises:
        ConfigError: sizes that do not divide or fit.
    """

    offers = frozenset({"text", "visual", "fuse", "alone", "visual_words"})

    def __init__(self, config: Config) -> None:
        super().__init__()
        _check(config)
        self.config = c = config
        # words, then visual words: the codebook's leaves (`init.codebook`). The paper freezes it, and so the
        # tied output
        self.tokens = nn.Embedding(c.vocab + c.codes, c.hidden)
        init_normal(self.tokens)
        self.tokens.requires_grad_(False)
        self.embeddings = Embeddings(c.max_positions, c.hidden, c.dropout)
        self.stack = Stack(bert_layers(c.layers, c.hidden, c.heads, c.intermediate, c.dropout))
        self.pooler = Pooler(c.hidden)
        self.token_head = WordHead(c.hidden, c.vocab + c.codes)
        for part in (self.stack, self.pooler, self.token_head):
            scale_matrices(part, c.init_scale)
        with torch.no_grad():
            self.tokens.weight.mul_(c.init_scale)  # the head's reach, where no BERT fills it
        self.dims = Dims(c.hidden, c.hidden, c.hidden, vocab=c.vocab + c.codes)
        self.inputs = c.inputs
        self.init_text, self.init_codebook = _init_text(c), _init_codebook(c)

    @property
    def word_embedding(self) -> nn.Embedding:
        """[V + K, D] words, then visual words; frozen."""
        return self.tokens

    def token_logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V + K], tied to the table."""
        out: Tensor = self.token_head(hidden, self.tokens.weight)
        return out

    def encode_text(self, text: Text) -> Stream:
        """The words' rows; [CLS] is the first."""
        return Stream(self.tokens(text.ids), text.mask)

    def encode_visual(self, visual: Visual) -> Stream:
        """The visual words' rows; codes [B, T], a hidden one is [MASK]."""
        assert visual.codes is not None, "VideoBERT reads visual words"
        ids = torch.where(visual.codes < 0, self.config.mask, self.config.vocab + visual.codes)
        ids = ids if visual.mask is None else ids.masked_fill(~visual.mask, PAD)
        return Stream(self.tokens(ids), visual.mask)

    def sequence(self, text: Stream | None, visual: Stream | None) -> Sequence:
        """What the stack reads: of both, or of one alone."""
        some = text or visual
        assert some is not None, "VideoBERT reads words, visual words, or both"
        c, rows, device = self.config, len(some.hidden), some.hidden.device
        cls, start, sep = self.tokens(torch.tensor([c.cls, c.video_start, c.sep], device=device))
        one = torch.ones(rows, 1, dtype=torch.bool, device=device)
        parts: list[tuple[Tensor, Tensor, int]] = []
        if text is not None:
            parts.append((text.hidden, real(text), TEXT))
        if visual is not None:
            before, segment = (cls, VIDEO) if text is None else (start, TEXT)
            parts.append((before.expand(rows, 1, -1), one, segment))
            parts.append((visual.hidden, real(visual), VIDEO))
        parts.append((sep.expand(rows, 1, -1), one, parts[-1][2]))
        mask = torch.cat([mask for _, mask, _ in parts], dim=1)
        segments = torch.cat([mask * segment for _, mask, segment in parts], dim=1)
        behind = mask.sum(dim=1, keepdim=True) + (~mask).cumsum(dim=1)  # padding follows what is real
        places = torch.where(mask, mask.cumsum(dim=1), behind) - 1
        return Sequence(torch.cat([each for each, _, _ in parts], dim=1), mask, segments, places)

    def embed(self, sequence: Sequence) -> Tensor:
        """[B, S, D] what the first layer sees."""
        places = sequence.places.clamp(max=self.config.max_positions - 1)  # only padding goes beyond
        out: Tensor = self.embeddings(sequence.rows, places, sequence.segments)
        return out

    def fuse(self, text: Stream | None, visual: Stream | None, causal: bool = False) -> Fused:
        """All layers over the sequence; pooled = tanh of a linear map of [CLS]."""
        sequence = self.sequence(text, visual)
        hidden = self.stack(self.embed(sequence), attention_mask(sequence.mask))
        words = 0 if text is None else text.hidden.shape[1]
        return Fused(
            text=None if text is None else hidden[:, :words],
            visual=None if visual is None else hidden[:, words + 1 : -1],  # [>] or [CLS] before, [SEP] behind
            pooled=self.pooler(hidden),
        )

    def flops(self, text_tokens: int) -> dict[str, int]:
        """See `Family.flops`; of the most visual words."""
        c = self.config

        def fuse(tokens: int) -> int:
            return c.layers * layer_flops(tokens, c.hidden, c.intermediate) + 2 * c.hidden * c.hidden

        return {
            "encode_text": 0,  # look-ups
            "encode_visual": 0,
            "fuse": fuse(text_tokens + c.frames + 2),
            "fuse_text": fuse(text_tokens + 1),
            "fuse_visual": fuse(c.frames + 2),
        }


def _check(config: Config) -> None:
    check_divides(config, ("hidden", "heads"))
    longest = config.text_length + config.frames + 2
    if longest > config.max_positions:
        raise ConfigError(
            f"family.text_length {config.text_length}, family.frames {config.frames}, [>] and [SEP] are {longest} "
            f"tokens, more than family.max_positions {config.max_positions}"
        )
    for name in ("cls", "sep", "mask", "video_start"):
        if not 0 < getattr(config, name) < config.vocab:
            raise ConfigError(
                f"family.{name} is {getattr(config, name)}; write an id of the vocabulary, 1 to {config.vocab - 1}"
            )


build = VideoBert


def tiny() -> Config:
    """A miniature with every part of the published model."""
    return Config(
        hidden=16,
        layers=2,
        heads=2,
        intermediate=32,
        vocab=64,
        max_positions=24,
        codes=9,
        text_length=12,
        frames=6,
        cls=2,
        sep=3,
        mask=4,
        video_start=63,
    )


def _leaves(tensor: Tensor, shape: torch.Size, config: Config) -> Tensor:
    """The codebook's last level [k^(L-1), k, F] as rows [K, D]; of another width by a fixed map: along the axes of the
    greatest spread, or with zeros behind."""
    rows, width = tensor.flatten(0, -2), config.hidden
    if len(rows) != config.codes:
        raise ValueError(f"the codebook has {len(rows)} visual words; write family.codes={len(rows)}")
    if rows.shape[1] == width:
        return rows
    if config.fit_codebook == "none":
        raise ValueError(
            f"the codebook's centroids have {rows.shape[1]} numbers and family.hidden is {width}; write "
            "family.fit_codebook=pca, or a family.hidden of that width"
        )
    if rows.shape[1] < width:
        return F.pad(rows, (0, width - rows.shape[1]))
    _, axes = torch.linalg.eigh(rows.double().T @ rows.double())  # by ascending spread
    fitted: Tensor = rows.double() @ axes[:, -width:]
    return fitted.to(rows.dtype)


def _init_codebook(config: Config) -> Renames:
    """A codebook's file (`vlscale.data.visual_words`): its leaves are the visual words' rows."""
    rows = partial(_leaves, config=config)
    return Renames(
        (
            Rename("leaves", ("family.tokens.weight",), rows, rows="last"),
            Rename(r"level\d+"),
            Rename(r"counts/\w+"),
        ),
        fills=r"family\.tokens\.weight",
    )


def _vocabulary(tensor: Tensor, shape: torch.Size, config: Config) -> Tensor:
    """What a BERT has for each of its words."""
    if len(tensor) != config.vocab:
        raise ValueError(f"it knows {len(tensor)} words; write family.vocab={len(tensor)}")
    return tensor


def _init_text(config: Config) -> Renames:
    """bert-large-uncased, which the authors start from; its words' rows are then frozen."""
    source, layer = r"(?:bert\.)?embeddings\.", r"(?:bert\.)?encoder\.layer\.(\d+)\."
    words, head = partial(_vocabulary, config=config), r"cls\.predictions\."
    names = {"weight": "(?:weight|gamma)", "bias": "(?:bias|beta)"}  # BERT's before 2019
    norms = (
        (source + "LayerNorm", "family.embeddings.norm"),
        (layer + r"attention\.output\.LayerNorm", _BLOCK + "attention_norm"),
        (layer + r"output\.LayerNorm", _BLOCK + "mlp_norm"),
        (head + r"transform\.LayerNorm", "family.token_head.norm"),
    )
    return Renames(
        (
            *(Rename(rf"{theirs}\.{old}", (f"{ours}.{new}",)) for theirs, ours in norms for new, old in names.items()),
            Rename(source + r"word_embeddings\.weight", ("family.tokens.weight",), words, rows="first"),
            Rename(source + r"position_embeddings\.weight", ("family.embeddings.position.weight",)),
            Rename(source + r"token_type_embeddings\.weight", ("family.embeddings.segment.weight",)),
            Rename(source + "position_ids"),
            Rename(layer + r"attention\.self\.(query|key|value)\.(\w+)", (_BLOCK + r"attention.\2.\3",)),
            Rename(layer + r"attention\.output\.dense\.(\w+)", (_BLOCK + r"attention.output.\2",)),
            Rename(layer + r"intermediate\.dense\.(\w+)", (_BLOCK + r"mlp.fc1.\2",)),
            Rename(layer + r"output\.dense\.(\w+)", (_BLOCK + r"mlp.fc2.\2",)),
            Rename(r"(?:bert\.)?pooler\.dense\.(\w+)", (r"family.pooler.dense.\1",)),
            Rename(head + "bias", ("family.token_head.bias",), words, rows="first"),
            Rename(head + r"transform\.dense\.(\w+)", (r"family.token_head.dense.\1",)),
            Rename(head + r"decoder\.(?:weight|bias)"),
            Rename(r"cls\.seq_relationship\.\w+"),
        ),
        fills=r"family\.(?!token_head\.).*",
    )


def _norm(source: str, target: str) -> Rename:
    return Rename(rf"{source}\.(\w+)", (rf"{target}.\1",))


# No checkpoint was published. These names are those of the reference tensors.
PUBLISHED = Renames(
    (
        Rename(r"word_embeddings\.weight", ("family.tokens.weight",)),
        Rename(r"position_embeddings\.weight", ("family.embeddings.position.weight",)),
        Rename(r"segment_embeddings\.weight", ("family.embeddings.segment.weight",)),
        _norm("embedding_norm", "family.embeddings.norm"),
        Rename(r"layers\.(\d+)\.(query|key|value)\.(\w+)", (_BLOCK + r"attention.\2.\3",)),
        Rename(r"layers\.(\d+)\.attn_out\.(\w+)", (_BLOCK + r"attention.output.\2",)),
        Rename(r"layers\.(\d+)\.attn_norm\.(\w+)", (_BLOCK + r"attention_norm.\2",)),
        Rename(r"layers\.(\d+)\.ffn_in\.(\w+)", (_BLOCK + r"mlp.fc1.\2",)),
        Rename(r"layers\.(\d+)\.ffn_out\.(\w+)", (_BLOCK + r"mlp.fc2.\2",)),
        Rename(r"layers\.(\d+)\.ffn_norm\.(\w+)", (_BLOCK + r"mlp_norm.\2",)),
        Rename(r"pooler\.(\w+)", (r"family.pooler.dense.\1",)),
        Rename(r"mlm_transform\.(\w+)", (r"family.token_head.dense.\1",)),
        _norm("mlm_norm", "family.token_head.norm"),
        Rename("mlm_bias", ("family.token_head.bias",)),
        Rename(r"align\.(\w+)", (r"objectives.itm.head.\1",), optional=True),
    ),
    fills=r"family\..*",
)

# How many of the rows are words, and how many visual words, no shape tells.
SIZES = (
    Size("hidden", r"word_embeddings\.weight", 1),
    Size("max_positions", r"position_embeddings\.weight", 0),
    Size("intermediate", r"layers\.0\.ffn_in\.weight", 0),
    Size("layers", r"layers\.(\d+)\..*"),
)

VideoBert.published = PUBLISHED
