"""HERO: a cross-modal transformer over each sentence with its frames, and a temporal one over all frames of the clip
(Li et al. 2020, arXiv 2005.00200). The authors' code: linjieli222/HERO."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlscale.errors import ConfigError
from vlscale.families.base import Family, Rename, Renames, Size, bert_sizes, check_divides, check_positions
from vlscale.nn.attention import attention_mask
from vlscale.nn.bert import BertEmbeddings, bert_layers
from vlscale.nn.hero import EPS, FrameProjection, Places, QueryEncoder
from vlscale.nn.single_stream import Pooler, real
from vlscale.nn.transformer import Stack, layer_flops, scale_matrices
from vlscale.types import Dims, Fused, Inputs, Stream, Text, Visual

SEGMENT = 1  # row of the segment table that words and frames carry (model/encoder.py)


@dataclass(frozen=True)
class Config:
    """Sizes; the defaults are the authors' (config/hero_pretrain.json)."""

    hidden: int = 768
    layers: int = 6  # of the cross-modal transformer
    heads: int = 12
    intermediate: int = 3072
    vocab: int = 50272  # RoBERTa's 50265, and rows up to a multiple of 8
    max_positions: int = 514
    segments: int = 2  # RoBERTa's one row, twice
    sentence_frames: int = 100  # most frames of one sentence
    temporal_layers: int = 3
    temporal_heads: int = 12
    temporal_intermediate: int = 3072
    temporal_positions: int = 514
    query_heads: int = 12
    query_positions: int = 514
    dropout: float = 0.1  # hidden and attention
    feats: int = 4352  # utils/const.py: SlowFast 2304, ResNet-152 2048
    frames: int = 100  # config/pretrain-tv-16gpu.json: max_clip_len
    text_length: int = 61  # config: max_txt_len 60 of one sentence, and its start
    sentences: int = 60  # ours; the authors take all that a clip has
    init_scale: float = 1.0  # on the matrices' start of 0.02, which was chosen for width 768

    @property
    def inputs(self) -> Inputs:
        """What the data plane feeds this family."""
        return Inputs(
            0, self.text_length, separator=False, feats=self.feats, frames=self.frames, sentences=self.sentences
        )


class Hero(Family):
    """Each sentence meets the frames that it spans; what becomes of these joins all frames of the clip, which then
    meet one another.

    Frames that no sentence spans enter by their features alone, and those that several span by the sum of what each
    made of them. `fuse` of a text alone is a query: `pooled` is its vector, which frames are searched by.

    Raises:
        ConfigError: sizes that do not divide or fit.
    """

    offers = frozenset({"text", "visual", "fuse", "regions", "frames", "frame_order", "alone", "queries"})

    def __init__(self, config: Config) -> None:
        super().__init__()
        _check(config)
        self.config = config
        c = config
        self.text_embeddings = BertEmbeddings(c.vocab, c.hidden, c.max_positions, c.segments, c.dropout, EPS, pad=None)
        self.frame_projection = FrameProjection(c.feats, c.hidden)
        self.frame_places = Places(c.sentence_frames, c.hidden, c.dropout)
        self.stack = Stack(bert_layers(c.layers, c.hidden, c.heads, c.intermediate, c.dropout))
        self.frame_transform = FrameProjection(c.feats, c.hidden, c.dropout)
        self.clip_places = Places(c.temporal_positions, c.hidden, c.dropout)
        temporal = bert_layers(c.temporal_layers, c.hidden, c.temporal_heads, c.temporal_intermediate, c.dropout)
        self.temporal_stack = Stack(temporal)
        self.pooler = Pooler(c.hidden)
        self.query_encoder = QueryEncoder(c.hidden, c.query_heads, c.query_positions, c.dropout)
        for part in (self.stack, self.temporal_stack, self.pooler, self.query_encoder):
            scale_matrices(part, c.init_scale)
        self.dims = Dims(c.hidden, c.hidden, c.hidden, vocab=c.vocab, feats=c.feats, norm_eps=EPS)
        self.inputs = c.inputs

    @property
    def word_embedding(self) -> nn.Embedding:
        """[V, D], tied to the masked-word head."""
        return self.text_embeddings.word

    def frame_keys(self, visual: Visual) -> Tensor:
        """[B, T, F] the features as they are read."""
        return visual.feats

    def encode_text(self, text: Text) -> Stream:
        """The embeddings [B * S, L, D] of S sentences of each clip."""
        return Stream(self.text_embeddings(text.ids, torch.full_like(text.ids, SEGMENT)), text.mask, spans=text.spans)

    def encode_visual(self, visual: Visual) -> Stream:
        """The projected features of frames; `skip` is what they give the clip beside what their sentences do.

        Of a view that has an `order`, `picked` says which frames take part, and none is hidden.
        """
        picked = visual.picked if visual.order is None else None
        hidden = self.frame_projection(visual.feats, picked)
        skip = self.frame_transform(visual.feats, picked).relu()
        return Stream(hidden, visual.mask, skip=skip, order=visual.order)

    def fuse(self, text: Stream | None, visual: Stream | None, causal: bool = False) -> Fused:
        """Sentences [B * S, L, D] with their frames, then all frames [B, T, D]; pooled [B, D] = tanh of a linear map of
        the first frame's state. Of a text alone pooled [B * S, D] is its query vector."""
        if visual is None:
            assert text is not None, "one modality at least"
            words = self.stack(text.hidden, attention_mask(real(text)))
            return Fused(words, None, self.query_encoder(words, real(text)))
        mask = real(visual)
        assert visual.skip is not None, "`encode_visual` gives it"
        states, words = visual.skip, None
        if text is not None:
            words, met = self._sentences(text, visual.hidden, mask)
            states = states + met
        if visual.order is not None:
            states = moved(states, visual.order, mask)
        hidden = self.temporal_stack(self.clip_places(states), attention_mask(mask))
        return Fused(words, hidden, self.pooler(hidden))

    def _sentences(self, text: Stream, frames: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Words [B * S, L, D], and what all sentences made of each frame [B, T, D]."""
        assert text.spans is not None, "HERO reads which frames a sentence goes with"
        clips, length, _ = frames.shape
        first, end = text.spans.unbind(dim=1)
        most = min(int((end - first).max()), self.config.sentence_frames)
        places = first[:, None] + torch.arange(most, device=first.device)  # [B * S, N]
        clip = torch.arange(len(first), device=first.device) // (len(first) // clips)
        index = clip[:, None] * length + places.clamp(max=length - 1)
        there = (places < end[:, None]) & mask.flatten()[index]
        segment = self.text_embeddings.segment(torch.full((1,), SEGMENT, device=first.device))
        seen = self.frame_places(frames.flatten(0, 1)[index] * there[..., None] + segment)
        joined = torch.cat([seen, text.hidden], dim=1)
        both = torch.cat([there, real(text)], dim=1)
        some = both.any(dim=1)  # clips have different numbers of sentences
        states = torch.zeros_like(joined)
        states[some] = self.stack(joined[some], attention_mask(both[some])).to(states.dtype)
        met = torch.zeros_like(frames).flatten(0, 1)
        met = met.index_add(0, index[there], states[:, :most][there].to(met.dtype))
        return states[:, most:], met.view(frames.shape)

    def flops(self, text_tokens: int) -> dict[str, int]:
        """See `Family.flops`; of the most sentences, which share the most frames among them. `fuse_text` is that of one
        query."""
        c = self.config
        tokens = text_tokens + -(-c.frames // c.sentences)
        sentences = c.sentences * c.layers * layer_flops(tokens, c.hidden, c.intermediate)
        temporal = c.temporal_layers * layer_flops(c.frames, c.hidden, c.temporal_intermediate) + 2 * c.hidden**2
        query = 2 * text_tokens * c.hidden * (5 * c.hidden + 2 * text_tokens + 2)
        return {
            "encode_text": 0,  # look-ups
            "encode_visual": 2 * 2 * c.frames * c.feats * c.hidden,
            "fuse": sentences + temporal,
            "fuse_visual": temporal,
            "fuse_text": c.layers * layer_flops(text_tokens, c.hidden, c.intermediate) + query,
        }


def moved(states: Tensor, order: Tensor, mask: Tensor) -> Tensor:
    """[B, T, D] with each frame at the place that `order` [B, T] names; padding (`mask` [B, T] False) stays."""
    places = torch.where(mask, order, torch.arange(order.shape[1], device=order.device))
    return torch.zeros_like(states).scatter(1, places[..., None].expand_as(states), states)


def _check(config: Config) -> None:
    check_divides(config, ("hidden", "heads"), ("hidden", "temporal_heads"), ("hidden", "query_heads"))
    check_positions(config.text_length, min(config.max_positions, config.query_positions))
    if config.segments <= SEGMENT:
        raise ConfigError(f"family.segments is {config.segments}, but all carry segment {SEGMENT}; give 2")
    if config.frames > config.temporal_positions:
        raise ConfigError(
            f"family.frames {config.frames} exceeds family.temporal_positions {config.temporal_positions}"
        )


build = Hero


def tiny() -> Config:
    """A miniature with every part of the published model."""
    return Config(
        hidden=16,
        layers=2,
        heads=2,
        intermediate=32,
        vocab=64,
        max_positions=16,
        sentence_frames=6,
        temporal_layers=1,
        temporal_heads=2,
        temporal_intermediate=32,
        temporal_positions=16,
        query_heads=2,
        query_positions=16,
        feats=12,
        frames=6,
        text_length=12,
        sentences=3,
    )


def _last_row(tensor: Tensor, shape: torch.Size) -> Tensor:
    """Of two, the first is always zero in the authors' forward pass."""
    return tensor[1:]


def _after_zeros(tensor: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(tensor), tensor])


def _first_rows(tensor: Tensor, shape: torch.Size) -> Tensor:
    return tensor[: shape[0]]


def _up_to(tensor: Tensor, shape: torch.Size) -> Tensor:
    """Rows of zeros up to ours, of a vocabulary that is padded (model/encoder.py: pad_vocab)."""
    return torch.cat([tensor, tensor.new_zeros((max(0, shape[0] - len(tensor)), *tensor.shape[1:]))])


def _repeated(tensor: Tensor, shape: torch.Size) -> Tensor:
    """RoBERTa's only segment, as often as we have rows."""
    return tensor[:1].expand(shape)


def _part(source: str, *targets: str, optional: bool = False) -> Rename:
    """A row for weight and bias of one layer; `source` has no group."""
    return Rename(rf"{source}\.(weight|bias)", tuple(rf"{target}.\1" for target in targets), optional=optional)


def _layers(source: str, stack: str) -> list[Rename]:
    """Rows for all layers of a BERT."""
    layer, block = source + r"encoder\.layer\.(\d+)\.", rf"family.{stack}.blocks.\1."
    return [
        Rename(layer + r"attention\.self\.(query|key|value)\.(\w+)", (block + r"attention.\2.\3",)),
        *(Rename(rf"{layer}{theirs}\.(\w+)", (rf"{block}{ours}.\2",)) for theirs, ours in _LAYER),
    ]


def _every_second(source: str, stack: str, number: int) -> list[Rename]:
    """Rows for `number` of a BERT's layers, the second of each two."""
    rows: list[Rename] = []
    for i in range(number):
        layer, block = rf"{source}encoder\.layer\.{2 * i + 1}\.", f"family.{stack}.blocks.{i}."
        rows.append(
            Rename(layer + r"attention\.self\.(query|key|value)\.(\w+)", (block + r"attention.\1.\2",), optional=True)
        )
        rows += [_part(layer + theirs, block + ours, optional=True) for theirs, ours in _LAYER]
    return rows


def _word_head(source: str) -> list[Rename]:
    return [
        Rename(source + r"decoder\.(?:weight|bias)"),  # tied
        _part(source + "dense", "objectives.mlm.head.dense", optional=True),
        _part(source + "(?:LayerNorm|layer_norm)", "objectives.mlm.head.norm", optional=True),
        Rename(source + "bias", ("objectives.mlm.head.bias",), _up_to, optional=True),
    ]


_LAYER = (
    (r"attention\.output\.dense", "attention.output"),
    (r"attention\.output\.LayerNorm", "attention_norm"),
    (r"intermediate\.dense", "mlp.fc1"),
    (r"output\.dense", "mlp.fc2"),
    (r"output\.LayerNorm", "mlp_norm"),
)
_F, _C, _Q = r"v_encoder\.f_encoder\.", r"v_encoder\.c_encoder\.", r"q_feat_attn\."
_V, _FEATURES = r"v_encoder\.", ("objectives.mrfr.head.", "objectives.mfm.head.")


def _mask(source: str, target: str) -> Rename:
    return Rename(source + r"mask_embedding\.weight", (f"family.{target}.mask.weight",), _last_row, back=_after_zeros)


# The authors' checkpoints.
PUBLISHED = Renames(
    (
        Rename(_F + r"embeddings\.(word|position)_embeddings\.weight", (r"family.text_embeddings.\1.weight",)),
        Rename(_F + r"embeddings\.token_type_embeddings\.weight", ("family.text_embeddings.segment.weight",)),
        _part(_F + r"embeddings\.LayerNorm", "family.text_embeddings.norm"),
        _mask(_F + r"img_embeddings\.", "frame_projection"),
        _part(_F + r"img_embeddings\.img_LayerNorm", "family.frame_projection.norm"),
        _part(_F + r"img_embeddings\.img_linear", "family.frame_projection.projection"),
        Rename(_F + r"img_embeddings\.position_embeddings\.weight", ("family.frame_places.position.weight",)),
        _part(_F + r"img_embeddings\.LayerNorm", "family.frame_places.norm"),
        *_layers(_F, "stack"),
        Rename(_F + r"pooler\.dense\.(?:weight|bias)"),  # no task asks it
        *_word_head(_F + r"lm_head\."),
        _mask(_V, "frame_transform"),
        _part(_V + r"frame_transform\.LayerNorm", "family.frame_transform.norm"),
        _part(_V + r"frame_transform\.net\.1", "family.frame_transform.projection"),
        Rename(_C + r"embeddings\.position_embeddings\.weight", ("family.clip_places.position.weight",)),
        _part(_C + r"embeddings\.LayerNorm", "family.clip_places.norm"),
        *_layers(_C, "temporal_stack"),
        _part(_C + r"pooler\.dense", "family.pooler.dense"),
        _part(_V + r"feat_regress\.net\.0", *(head + "dense" for head in _FEATURES), optional=True),
        _part(_V + r"feat_regress\.net\.2", *(head + "norm" for head in _FEATURES), optional=True),
        _part(_V + r"feat_regress\.net\.3", *(head + "decoder" for head in _FEATURES), optional=True),
        _part(_V + r"fom_output\.linear_1", "objectives.fom.head.dense", optional=True),
        _part(_V + r"fom_output\.LayerNorm", "objectives.fom.head.norm", optional=True),
        _part(_V + r"fom_output\.linear_2", "objectives.fom.head.decoder", optional=True),
        Rename(r"v_encoder\.(?:f_encoder\.)?pad"),  # zeros
        _part(_Q + r"query_input_proj\.LayerNorm", "family.query_encoder.norm"),
        _part(_Q + r"query_input_proj\.net\.1", "family.query_encoder.projection"),
        Rename(_Q + r"query_pos_embed\.position_embeddings\.weight", ("family.query_encoder.places.position.weight",)),
        _part(_Q + r"query_pos_embed\.LayerNorm", "family.query_encoder.places.norm"),
        Rename(
            _Q + r"query_self_attention\.self\.(query|key|value)\.(\w+)", (r"family.query_encoder.attention.\1.\2",)
        ),
        _part(_Q + r"query_self_attention\.output\.dense", "family.query_encoder.attention.output"),
        _part(_Q + r"query_self_attention\.output\.LayerNorm", "family.query_encoder.attention_norm"),
        Rename(_Q + r"modular_vector_mapping\.weight", ("family.query_encoder.score.weight",)),
        _part("video_query_linear", "objectives.vsm.query", optional=True),
        Rename(r"video_st_predictor\.weight", ("objectives.vsm.start.weight",), optional=True),
        Rename(r"video_ed_predictor\.weight", ("objectives.vsm.end.weight",), optional=True),
    ),
    fills=r"family\..*",
)

# roberta-base, every second of whose layers is the start of ours; its table of positions is read from row 0 on
# (model/encoder.py, model/embed.py). The temporal transformer, and what reads frames and queries, is new.
_R = r"(?:roberta\.)?"
INIT_TEXT = Renames(
    (
        Rename(_R + r"embeddings\.word_embeddings\.weight", ("family.text_embeddings.word.weight",), _up_to),
        Rename(
            _R + r"embeddings\.position_embeddings\.weight", ("family.text_embeddings.position.weight",), _first_rows
        ),
        Rename(
            _R + r"embeddings\.token_type_embeddings\.weight", ("family.text_embeddings.segment.weight",), _repeated
        ),
        _part(_R + r"embeddings\.LayerNorm", "family.text_embeddings.norm"),
        Rename(_R + r"embeddings\.position_ids"),  # 0, 1, 2, ...
        *_every_second(_R, "stack", 12),
        Rename(_R + r"encoder\.layer\.\d+\..*"),
        Rename(_R + r"pooler\.dense\.(?:weight|bias)"),
        *_word_head(r"lm_head\."),
    ),
    fills=r"family\.(?:text_embeddings|stack)\..*",
)

SIZES = (
    *bert_sizes(_F),
    Size("sentence_frames", _F + r"img_embeddings\.position_embeddings\.weight", 0),
    Size("feats", _F + r"img_embeddings\.img_linear\.weight", 1),
    Size("temporal_layers", _C + r"encoder\.layer\.(\d+)\..*"),
    Size("temporal_intermediate", _C + r"encoder\.layer\.0\.intermediate\.dense\.weight", 0),
    Size("temporal_positions", _C + r"embeddings\.position_embeddings\.weight", 0),
    Size("query_positions", _Q + r"query_pos_embed\.position_embeddings\.weight", 0),
)

Hero.published, Hero.init_text = PUBLISHED, INIT_TEXT
