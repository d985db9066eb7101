"""UniVL (Luo et al. 2020, arXiv 2002.06353): a text encoder, a video encoder over frames' features, a cross encoder
over both, and a decoder that writes the text anew. The authors' code: microsoft/UniVL at 8db88f3."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vlscale.errors import ConfigError
from vlscale.families.base import Family, Rename, Renames, Size, bert_sizes, check_divides, check_positions
from vlscale.nn.attention import attention_mask
from vlscale.nn.bert import NORM_EPS, BertEmbeddings, bert_layers, init_normal
from vlscale.nn.single_stream import Pooler, real
from vlscale.nn.transformer import Stack, layer_flops, scale_matrices
from vlscale.types import Dims, Fused, Inputs, Stream, Text, Visual


@dataclass(frozen=True)
class Config:
    """Sizes; the defaults are the published model's."""

    hidden: int = 768  # bert-base-uncased, as are the next two
    heads: int = 12
    intermediate: int = 3072
    text_layers: int = 12  # main_pretrain.py, as are the next three
    visual_layers: int = 6
    cross_layers: int = 2
    decoder_layers: int = 3
    vocab: int = 30522
    segments: int = 2
    max_positions: int = 512  # of text and decoder, which share them; bert and decoder-base
    visual_positions: int = 512  # visual-base
    cross_positions: int = 1024  # cross-base
    dropout: float = 0.1  # hidden and attention, of all four
    text_length: int = 48  # README: --max_words
    frames: int = 64  # README: --max_frames; the paper has 48
    feats: int = 1024  # main_pretrain.py: --video_dim, S3D's
    # stage one trains the encoders alone: the cross encoder and the decoder are there, frozen, for stage two
    stage: Literal["one", "two"] = "two"
    init_scale: float = 1.0  # on the matrices' start of 0.02, which was chosen for width 768

    @property
    def inputs(self) -> Inputs:
        """What the data plane feeds this family."""
        return Inputs(image_size=0, text_length=self.text_length, separator=True, frames=self.frames, feats=self.feats)


class Univl(Family):
    """Two encoders, whose mean states are compared as they are, and what joins them.

    Raises:
        ConfigError: sizes that do not divide or fit.
    """

    offers = frozenset({"text", "visual", "embed", "fuse", "regions", "tied_regions", "frames", "decode", "pairs"})

    def __init__(self, config: Config) -> None:
        super().__init__()
        _check(config)
        self.config = c = config
        sizes = (c.hidden, c.heads, c.intermediate, c.dropout)
        self.text_embeddings = BertEmbeddings(
            c.vocab,
            c.hidden,
            c.max_positions,
            c.segments,
            c.dropout,
            pad=None,  # the decoder learns what follows the end
        )
        self.text_stack = Stack(bert_layers(c.text_layers, *sizes))
        self.frame_norm = nn.LayerNorm(c.feats, NORM_EPS)
        self.frame_embeddings = FrameEmbeddings(c.feats, c.hidden, c.visual_positions, c.dropout)
        self.visual_stack = Stack(bert_layers(c.visual_layers, *sizes))
        self.cross_embeddings = CrossEmbeddings(c.hidden, c.cross_positions, c.text_length, c.dropout)
        self.fusion_stack = Stack(bert_layers(c.cross_layers, *sizes))
        self.pooler = Pooler(c.hidden)
        self.decoder_norm = nn.LayerNorm(c.hidden, NORM_EPS)
        self.decoder_dropout = nn.Dropout(c.dropout)
        self.decoder_stack = Stack(bert_layers(c.decoder_layers, *sizes, context_width=c.hidden))
        joint = (self.cross_embeddings, self.fusion_stack, self.pooler, self.decoder_norm, self.decoder_stack)
        for part in (self.text_stack, self.visual_stack, self.frame_embeddings, *joint):
            scale_matrices(part, c.init_scale)
        if c.stage == "one":
            self.offers = Univl.offers - {"fuse", "regions", "tied_regions", "decode", "pairs"}
            for part in joint:
                part.requires_grad_(False)
        self.dims = Dims(c.hidden, c.hidden, c.hidden, embed=c.hidden, vocab=c.vocab, feats=c.feats)
        self.inputs = c.inputs

    @property
    def word_embedding(self) -> nn.Embedding:
        """[V, D], tied to both word heads; the decoder reads by it too."""
        return self.text_embeddings.word

    @property
    def region_projection(self) -> nn.Linear:
        """F -> D, tied to the frame head."""
        return self.frame_embeddings.projection

    def frame_keys(self, visual: Visual) -> Tensor:
        """[B, T, F] the normalised features, with gradient, as in the authors' code."""
        out: Tensor = self.frame_norm(visual.feats.to(self.frame_norm.weight.dtype))
        return out

    def encode_text(self, text: Text) -> Stream:
        """embed [B, D] = mean state of the words and [SEP], without [CLS]; not normalised."""
        hidden = self.text_stack(self.text_embeddings(text.ids, text.segments), attention_mask(text.mask))
        counted = text.mask.clone()
        counted[:, 0] = False
        return Stream(hidden, text.mask, _mean(hidden, counted))

    def encode_visual(self, visual: Visual) -> Stream:
        """feats [B, T, F]; embed [B, D] = mean state of the frames; not normalised."""
        hidden = self.visual_stack(self.frame_embeddings(self.frame_keys(visual)), attention_mask(visual.mask))
        stream = Stream(hidden, visual.mask)
        return stream._replace(embed=_mean(hidden, real(stream)))

    def fuse(self, text: Stream | None, visual: Stream | None, causal: bool = False) -> Fused:
        """The cross encoder over [words ; frames]; pooled = tanh of a linear map of [CLS].

        Raises:
            ConfigError: `causal`, for every word sees the frames, and they see the whole text.
        """
        assert text is not None, "UniVL fuses a text with frames"
        assert visual is not None, "UniVL fuses a text with frames"
        if causal:
            raise ConfigError("UniVL's cross encoder has no causal reading; objective `caption` writes by its decoder")
        mask = torch.cat([real(text), real(visual)], dim=1)
        joined = self.cross_embeddings(text.hidden, visual.hidden)
        hidden = self.fusion_stack(joined, attention_mask(mask))
        length = text.hidden.shape[1]
        return Fused(text=hidden[:, :length], visual=hidden[:, length:], pooled=self.pooler(hidden))

    def decode(self, text: Text, fused: Fused, mask: Tensor) -> Tensor:
        """The decoder's states [B, L, D]: words and places by the text encoder's tables, then a LayerNorm; each word
        sees itself, those before it, and the joined states of the cross encoder."""
        assert fused.text is not None, "`fuse` fills both"
        assert fused.visual is not None, "`fuse` fills both"
        places = torch.arange(text.ids.shape[1], device=text.ids.device)
        hidden = self.text_embeddings.word(text.ids) + self.text_embeddings.position(places)
        hidden = self.decoder_dropout(self.decoder_norm(hidden))
        memory = torch.cat([fused.text, fused.visual], dim=1)
        seen = attention_mask(text.mask, causal=True)
        out: Tensor = self.decoder_stack(hidden, seen, memory, attention_mask(mask))
        return out

    def flops(self, text_tokens: int) -> dict[str, int]:
        """See `Family.flops`; of the most frames, and of a text to write that is as long as the one read."""
        c, length = self.config, text_tokens
        joined = length + c.frames
        across = 2 * c.hidden**2 * (2 * length + 2 * joined) + 4 * length * joined * c.hidden
        sizes = (c.hidden, c.intermediate)
        return {
            "encode_text": c.text_layers * layer_flops(length, *sizes),
            "encode_visual": 2 * c.frames * c.feats * c.hidden + c.visual_layers * layer_flops(c.frames, *sizes),
            "fuse": c.cross_layers * layer_flops(joined, *sizes) + 2 * c.hidden**2,
            "decode": c.decoder_layers * (layer_flops(length, *sizes) + across),
        }


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """[B, D] fp32 mean of the states [B, N, D] where mask [B, N] is True; 0 where there are none."""
    counted = mask[..., None].float()
    return (hidden.float() * counted).sum(dim=1) / counted.sum(dim=1).clamp(min=1)


class FrameEmbeddings(nn.Module):
    """A linear map of each feature and its place in time, summed and normalised."""

    def __init__(self, feats: int, width: int, max_positions: int, dropout: float) -> None:
        super().__init__()
        self.projection = nn.Linear(feats, width)
        self.position = nn.Embedding(max_positions, width)
        self.norm = nn.LayerNorm(width, NORM_EPS)
        self.dropout = nn.Dropout(dropout)
        self.apply(init_normal)

    def forward(self, feats: Tensor) -> Tensor:
        """[B, T, F] -> [B, T, D]."""
        places = torch.arange(feats.shape[1], device=feats.device)
        out: Tensor = self.dropout(self.norm(self.projection(feats) + self.position(places)))
        return out


class CrossEmbeddings(nn.Module):
    """Places that run on from words to frames, and which of the two each is, added to both; then a LayerNorm.

    Frames begin at the place behind the longest text, so that padding does not move them; the authors' texts are all
    padded to that length.
    """

    def __init__(self, width: int, max_positions: int, text_length: int, dropout: float) -> None:
        super().__init__()
        self.text_length = text_length
        self.position = nn.Embedding(max_positions, width)
        self.modality = nn.Embedding(2, width)  # text, video
        self.norm = nn.LayerNorm(width, NORM_EPS)
        self.dropout = nn.Dropout(dropout)
        self.apply(init_normal)

    def forward(self, text: Tensor, visual: Tensor) -> Tensor:
        """[B, L, D], [B, T, D] -> [B, L + T, D]."""
        words = torch.arange(text.shape[1], device=text.device)
        frames = torch.arange(visual.shape[1], device=text.device) + self.text_length
        places = torch.cat([words, frames])
        kinds = torch.cat([torch.zeros_like(words), torch.ones_like(frames)])
        hidden = torch.cat([text, visual], dim=1) + self.position(places) + self.modality(kinds)
        out: Tensor = self.dropout(self.norm(hidden))
        return out


def _check(config: Config) -> None:
    check_divides(config, ("hidden", "heads"))
    check_positions(config.text_length, config.max_positions)
    for what, needed, name in (
        ("family.frames", config.frames, "visual_positions"),
        ("family.text_length and family.frames together", config.text_length + config.frames, "cross_positions"),
    ):
        if needed > getattr(config, name):
            raise ConfigError(f"{what} take {needed} places, but family.{name} is {getattr(config, name)}; give more")


build = Univl


def tiny() -> Config:
    """A miniature with every part of the published model."""
    return Config(
        hidden=16,
        heads=2,
        intermediate=32,
        text_layers=2,
        visual_layers=1,
        cross_layers=1,
        decoder_layers=2,
        vocab=64,
        max_positions=16,
        visual_positions=8,
        cross_positions=24,
        text_length=12,
        frames=6,
        feats=10,
    )


def _norm(source: str, target: str, optional: bool = False) -> list[Rename]:
    """A LayerNorm, whose parts BERT called gamma and beta before 2019."""
    return [
        Rename(rf"{source}\.(?:weight|gamma)", (f"{target}.weight",), optional=optional),
        Rename(rf"{source}\.(?:bias|beta)", (f"{target}.bias",), optional=optional),
    ]


def _layers(source: str, stack: str, optional: bool = False) -> list[Rename]:
    """Rows for a stack of BERT's layers."""
    layer, block = source + r"encoder\.layer\.(\d+)\.", rf"family.{stack}.blocks.\1."
    plain = (
        (r"attention\.self\.(query|key|value)\.(\w+)", r"attention.\2.\3"),
        (r"attention\.output\.dense\.(\w+)", r"attention.output.\2"),
        (r"intermediate\.dense\.(\w+)", r"mlp.fc1.\2"),
        (r"output\.dense\.(\w+)", r"mlp.fc2.\2"),
    )
    return [
        *(Rename(layer + theirs, (block + ours,), optional=optional) for theirs, ours in plain),
        *_norm(layer + r"attention\.output\.LayerNorm", block + "attention_norm", optional),
        *_norm(layer + r"output\.LayerNorm", block + "mlp_norm", optional),
    ]


def _text(source: str) -> list[Rename]:
    """Rows for the text encoder, a BERT; nobody reads its pooler."""
    table = source + r"embeddings\."
    return [
        Rename(table + r"word_embeddings\.weight", ("family.text_embeddings.word.weight",)),
        Rename(table + r"position_embeddings\.weight", ("family.text_embeddings.position.weight",), _first_rows),
        Rename(table + r"token_type_embeddings\.weight", ("family.text_embeddings.segment.weight",)),
        Rename(table + "position_ids"),  # 0, 1, 2, ...
        *_norm(table + "LayerNorm", "family.text_embeddings.norm"),
        *_layers(source, "text_stack"),
        Rename(source + r"pooler\.dense\.(\w+)"),
    ]


def _first_rows(tensor: Tensor, shape: torch.Size) -> Tensor:
    return tensor[: shape[0]]


def _decoder() -> list[Rename]:
    """Rows for the decoder; its words and places are the text encoder's."""
    layer, block = r"decoder\.decoder\.layer\.(\d+)\.", r"family.decoder_stack.blocks.\1."
    rows = [
        Rename(r"decoder\.embeddings\.(?:word|position)_embeddings\.weight"),
        *_norm(r"decoder\.embeddings\.LayerNorm", "family.decoder_norm"),
        Rename(layer + r"intermediate\.dense\.(\w+)", (block + r"mlp.fc1.\2",)),
        Rename(layer + r"output\.dense\.(\w+)", (block + r"mlp.fc2.\2",)),
        *_norm(layer + r"output\.LayerNorm", block + "mlp_norm"),
    ]
    for theirs, attention, norm in (
        (r"slf_attn\.", "attention", "attention_norm"),
        (r"enc_attn\.", "cross_attention", "cross_norm"),
    ):
        rows += [
            Rename(layer + theirs + r"att\.(query|key|value)\.(\w+)", (block + attention + r".\2.\3",)),
            Rename(layer + theirs + r"output\.dense\.(\w+)", (block + attention + r".output.\2",)),
            *_norm(layer + theirs + r"output\.LayerNorm", block + norm),
        ]
    return rows


def _head(source: str, *objectives: str) -> list[Rename]:
    """Rows for a head whose last matrix stands elsewhere."""
    ours = [f"objectives.{name}.head." for name in objectives]
    return [
        Rename(source + "bias", tuple(f"{head}bias" for head in ours), optional=True),
        Rename(source + r"transform\.dense\.(\w+)", tuple(rf"{head}dense.\1" for head in ours), optional=True),
        Rename(
            source + r"transform\.LayerNorm\.(?:weight|gamma)",
            tuple(f"{head}norm.weight" for head in ours),
            optional=True,
        ),
        Rename(
            source + r"transform\.LayerNorm\.(?:bias|beta)", tuple(f"{head}norm.bias" for head in ours), optional=True
        ),
        Rename(source + r"(?:decoder\.)?weight"),  # the words' or the frames' own
    ]


# The authors' checkpoints. Those of stage one end with the encoders.
PUBLISHED = Renames(
    (
        *_text(r"bert\."),
        *_norm(r"normalize_video\.visual_norm2d", "family.frame_norm"),
        Rename(r"visual\.embeddings\.word_embeddings\.(\w+)", (r"family.frame_embeddings.projection.\1",)),
        Rename(r"visual\.embeddings\.position_embeddings\.weight", ("family.frame_embeddings.position.weight",)),
        *_norm(r"visual\.embeddings\.LayerNorm", "family.frame_embeddings.norm"),
        *_layers(r"visual\.", "visual_stack"),
        Rename(r"visual\.pooler\.dense\.(\w+)"),
        Rename(r"cross\.embeddings\.position_embeddings\.weight", ("family.cross_embeddings.position.weight",)),
        Rename(r"cross\.embeddings\.token_type_embeddings\.weight", ("family.cross_embeddings.modality.weight",)),
        *_norm(r"cross\.embeddings\.LayerNorm", "family.cross_embeddings.norm"),
        *_layers(r"cross\.", "fusion_stack"),
        Rename(r"cross\.pooler\.dense\.(\w+)", (r"family.pooler.dense.\1",)),
        *_decoder(),
        *_head(r"decoder\.classifier\.cls\.predictions\.", "caption"),
        *_head(r"cls\.predictions\.", "mlm"),
        *_head(r"cls_visual\.predictions\.", "mfm", "mrfr"),
        Rename(r"similarity_dense\.(\w+)", (r"objectives.pair_nce.score.\1",), optional=True),
    ),
    fills=r"family\.(?:text_|frame_|visual_).*",
)

# bert-base-uncased, which the authors start from.
INIT_TEXT = Renames(
    (*_text(r"(?:bert\.)?"), *_head(r"cls\.predictions\.", "mlm"), Rename(r"cls\.seq_relationship\.\w+")),
    fills=r"family\.text_.*",
)


def _depth(source: str) -> str:
    return source + r"\.layer\.(\d+)\..*"


SIZES = (
    *bert_sizes(r"bert\.", layers="text_layers"),
    Size("visual_layers", _depth(r"visual\.encoder")),
    Size("cross_layers", _depth(r"cross\.encoder")),
    Size("decoder_layers", _depth(r"decoder\.decoder")),
    Size("visual_positions", r"visual\.embeddings\.position_embeddings\.weight", 0),
    Size("cross_positions", r"cross\.embeddings\.position_embeddings\.weight", 0),
    Size("feats", r"visual\.embeddings\.word_embeddings\.weight", 1),
)

Univl.published, Univl.init_text = PUBLISHED, INIT_TEXT
