"""CBT: contrastive bidirectional transformers over frames' features, beside a frozen BERT (Sun et al. 2019, arXiv
1906.05743). The authors published neither code nor weights: what the paper leaves open is said where it is chosen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlscale.errors import ConfigError
from vlscale.families.base import Family, Rename, Renames, Size, check_divides, check_positions
from vlscale.nn.attention import attention_mask
from vlscale.nn.bert import INIT_STD, NORM_EPS, BertEmbeddings, bert_layers, init_normal
from vlscale.nn.single_stream import real
from vlscale.nn.transformer import Stack, layer_flops, scale_matrices
from vlscale.nn.video import FrameTower, TowerKind
from vlscale.types import Dims, Fused, Inputs, Stream, Text, Visual

VIDEO, TEXT = 0, 1  # rows of the cross transformer's segment table


@dataclass(frozen=True)
class Config:
    """Sizes; the defaults are the paper's for long videos where it tells them, else BERT's."""

    hidden: int = 768  # of BERT base, which the text encoder is
    visual_layers: int = 2  # the paper's CBT visual, as the next
    visual_heads: int = 4
    visual_intermediate: int = 3072  # not in the paper
    cross_layers: int = 1  # the paper: shallow
    cross_heads: int = 4  # not in the paper, as the next
    cross_intermediate: int = 3072
    text_layers: int = 12  # bert-base-uncased, as the next five
    heads: int = 12
    text_intermediate: int = 3072
    vocab: int = 30522
    max_positions: int = 512
    segments: int = 2
    freeze_text: bool = True  # no gradient, no optimizer state, no dropout; saved like all else
    dropout: float = 0.1  # not in the paper
    feats: int = 1024  # of S3D
    frames: int = 20  # not in the paper: most features of a clip, 1.5 s each; with a tower, most frames of pixels
    visual_positions: int = 512  # not in the paper
    text_length: int = 64  # not in the paper; [CLS] and [SEP] counted
    tower: TowerKind = ""  # what makes features of pixels; s3d trained with the rest is the paper's use on short clips
    window: int = 16  # frames of one feature of an S3D tower
    image_size: int = 112  # pixels, with a tower
    freeze_tower: bool = False  # as freeze_text; `init.vision` fills it
    init_scale: float = 1.0  # on the matrices' start of 0.02, which was chosen for width 768
    tower_divided: int = 1  # every width of the tower; for miniatures

    @property
    def inputs(self) -> Inputs:
        """What the data plane feeds this family."""
        if not self.tower:
            return Inputs(0, self.text_length, True, feats=self.feats, frames=self.frames)
        window = self.window if self.tower.startswith("s3d") else 1
        return Inputs(self.image_size, self.text_length, True, frames=self.frames, window=window)


class FrameEmbeddings(nn.Module):
    """Learned positions are added to frames' embeddings, and the sum is normalised."""

    def __init__(self, positions: int, width: int, dropout: float) -> None:
        super().__init__()
        self.position = nn.Embedding(positions, width)
        self.norm = nn.LayerNorm(width, NORM_EPS)
        self.dropout = nn.Dropout(dropout)
        self.apply(init_normal)

    def forward(self, frames: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        positions = torch.arange(frames.shape[1], device=frames.device)
        out: Tensor = self.dropout(self.norm(frames + self.position(positions)))
        return out


class PairEmbeddings(nn.Module):
    """A learned token, frames and words become one sequence: a segment is added to frames and to words, and all is
    normalised. Both have seen positions of their own; there are none here."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.empty(width).normal_(std=INIT_STD))
        self.segment = nn.Embedding(2, width)
        self.norm = nn.LayerNorm(width, NORM_EPS)
        self.dropout = nn.Dropout(dropout)
        self.apply(init_normal)

    def forward(self, frames: Tensor, words: Tensor) -> Tensor:
        """frames [B, T, D], words [B, L, D] -> [B, 1 + T + L, D]."""
        rows = torch.tensor([VIDEO, TEXT], device=frames.device)
        video, text = self.segment(rows)
        token = self.token.expand(len(frames), 1, -1)
        out: Tensor = self.dropout(self.norm(torch.cat([token, frames + video, words + text], dim=1)))
        return out


class Cbt(Family):
    """Frames through a shallow transformer, words through BERT, and both through a shallow transformer.

    A hidden frame's embedding is a zero vector before its position is added.

    Raises:
        ConfigError: sizes that do not divide or fit.
    """

    offers = frozenset({"text", "visual", "fuse", "pairs", "regions", "frames"})

    def __init__(self, config: Config) -> None:
        super().__init__()
        _check(config)
        self.config = config
        c = config
        self.tower = FrameTower(c.tower, c.image_size, c.window, c.freeze_tower, c.tower_divided)
        feats = self.tower.width or c.feats
        self.visual_projection = nn.Linear(feats, c.hidden)
        self.visual_embeddings = FrameEmbeddings(c.visual_positions, c.hidden, c.dropout)
        visual = bert_layers(c.visual_layers, c.hidden, c.visual_heads, c.visual_intermediate, c.dropout)
        self.visual_stack = Stack(visual)
        dropout = 0.0 if c.freeze_text else c.dropout
        self.text_embeddings = BertEmbeddings(c.vocab, c.hidden, c.max_positions, c.segments, dropout)
        nn.init.zeros_(self.text_embeddings.segment.weight)  # BERT's fill it; weights without such a table add nothing
        self.text_stack = Stack(bert_layers(c.text_layers, c.hidden, c.heads, c.text_intermediate, dropout))
        self.pair_embeddings = PairEmbeddings(c.hidden, c.dropout)
        cross = bert_layers(c.cross_layers, c.hidden, c.cross_heads, c.cross_intermediate, c.dropout)
        self.cross_stack = Stack(cross)
        init_normal(self.visual_projection)
        for part in (self.visual_projection, self.visual_stack, self.text_stack, self.cross_stack):
            scale_matrices(part, c.init_scale)
        if c.freeze_text:
            self.text_embeddings.requires_grad_(False)
            self.text_stack.requires_grad_(False)
        verbs = {"encode_text": c.freeze_text, "tower": c.freeze_tower}
        self.frozen = frozenset(verb for verb, frozen in verbs.items() if frozen)
        self.dims = Dims(c.hidden, c.hidden, c.hidden, vocab=c.vocab, feats=feats, frame_keys=c.hidden)
        self.inputs = c.inputs

    @property
    def word_embedding(self) -> nn.Embedding:
        """[V, D], tied to the masked-word head."""
        return self.text_embeddings.word

    def encode_text(self, text: Text) -> Stream:
        """BERT."""
        hidden = self.text_stack(self.text_embeddings(text.ids, text.segments), attention_mask(text.mask))
        return Stream(hidden, text.mask)

    def encode_visual(self, visual: Visual) -> Stream:
        """The visual transformer; feats [B, T, F], or pixels [B, T, 3, H, W] for a tower."""
        visual = self.tower(visual)
        keys = self.frame_keys(visual)
        seen = keys if visual.picked is None else keys.masked_fill(visual.picked[..., None], 0.0)
        hidden = self.visual_stack(self.visual_embeddings(seen), attention_mask(visual.mask))
        return Stream(hidden, visual.mask, keys=keys)

    def frame_keys(self, visual: Visual) -> Tensor:
        """[B, T, D] embeddings of the frames' features, those before hiding where the view has them."""
        feats = visual.feats if visual.targets is None else visual.targets
        out: Tensor = self.visual_projection(feats.to(self.visual_projection.weight.dtype))
        return out

    def fuse(self, text: Stream | None, visual: Stream | None, causal: bool = False) -> Fused:
        """The cross transformer over token, frames and words; pooled = state of the token."""
        assert text is not None, "CBT fuses a text with a clip"
        assert visual is not None, "CBT fuses a text with a clip"
        frames = visual.hidden.shape[1]
        mask = torch.cat([real(visual), real(text)], dim=1)
        mask = torch.cat([mask.new_ones(len(mask), 1), mask], dim=1)
        hidden = self.cross_stack(self.pair_embeddings(visual.hidden, text.hidden), attention_mask(mask))
        return Fused(text=hidden[:, 1 + frames :], visual=hidden[:, 1 : 1 + frames], pooled=hidden[:, 0])

    def flops(self, text_tokens: int) -> dict[str, int]:
        """See `Family.flops`; of the most frames."""
        c = self.config
        places = self.tower.places(c.frames)
        embed = 2 * places * self.visual_projection.in_features * c.hidden
        visual = layer_flops(places, c.hidden, c.visual_intermediate)
        cross = layer_flops(1 + places + text_tokens, c.hidden, c.cross_intermediate)
        return {
            "encode_text": c.text_layers * layer_flops(text_tokens, c.hidden, c.text_intermediate),
            "tower": self.tower.flops(c.frames),
            "encode_visual": embed + c.visual_layers * visual,
            "fuse": c.cross_layers * cross,
        }


def _check(config: Config) -> None:
    check_divides(config, ("hidden", "visual_heads"), ("hidden", "cross_heads"), ("hidden", "heads"))
    check_positions(config.text_length, config.max_positions)
    if config.tower == "s3d_space_to_depth" and (config.window % 2 or config.image_size % 2):
        raise ConfigError(
            f"family.tower s3d_space_to_depth reads blocks of two frames and pixels, and family.window is "
            f"{config.window}, family.image_size {config.image_size}; write even ones"
        )
    if config.freeze_tower and not config.tower:
        raise ConfigError("family.freeze_tower freezes a tower, and family.tower names none; leave it out")
    if config.frames > config.visual_positions:
        raise ConfigError(
            f"family.frames {config.frames} exceeds family.visual_positions {config.visual_positions}; "
            "give as many positions as a clip has frames"
        )


build = Cbt


def tiny() -> Config:
    """A miniature with every part of the published model."""
    return Config(
        hidden=16,
        visual_layers=2,
        visual_heads=2,
        visual_intermediate=32,
        cross_heads=2,
        cross_intermediate=32,
        text_layers=1,
        heads=2,
        text_intermediate=32,
        vocab=64,
        max_positions=16,
        feats=12,
        frames=6,
        visual_positions=8,
        text_length=12,
    )


def _layers(ours: str) -> list[Rename]:
    """Rows for one of the three stacks."""
    source, block = rf"{ours}_layers\.(\d+)\.", rf"family.{ours}_stack.blocks.\1."
    names = {
        "attn_out": "attention.output",
        "attn_norm": "attention_norm",
        "ffn_in": "mlp.fc1",
        "ffn_out": "mlp.fc2",
        "ffn_norm": "mlp_norm",
    }
    rows = [Rename(source + rf"{theirs}\.(\w+)", (block + rf"{mine}.\2",)) for theirs, mine in names.items()]
    return [Rename(source + r"(query|key|value)\.(\w+)", (block + r"attention.\2.\3",)), *rows]


# No checkpoint was published. These names are those of the reference tensors.
PUBLISHED = Renames(
    (
        Rename(r"visual_projection\.(\w+)", (r"family.visual_projection.\1",)),
        Rename(r"visual_positions\.weight", ("family.visual_embeddings.position.weight",)),
        Rename(r"visual_norm\.(\w+)", (r"family.visual_embeddings.norm.\1",)),
        *_layers("visual"),
        Rename(r"text_words\.weight", ("family.text_embeddings.word.weight",)),
        Rename(r"text_positions\.weight", ("family.text_embeddings.position.weight",)),
        Rename(r"text_segments\.weight", ("family.text_embeddings.segment.weight",)),
        Rename(r"text_norm\.(\w+)", (r"family.text_embeddings.norm.\1",)),
        *_layers("text"),
        Rename(r"cross_cls", ("family.pair_embeddings.token",)),
        Rename(r"cross_segments\.weight", ("family.pair_embeddings.segment.weight",)),
        Rename(r"cross_norm\.(\w+)", (r"family.pair_embeddings.norm.\1",)),
        *_layers("cross"),
        Rename(r"visual_tower\.(.+)", (r"family.tower.encoder.\1",), optional=True),
        Rename(r"score_hidden\.(\w+)", (r"objectives.pair_nce.dense.\1",), optional=True),
        Rename(r"score_out\.(\w+)", (r"objectives.pair_nce.score.\1",), optional=True),
    ),
    fills=r"family\.(?!text_embeddings\.segment\.).*",
)

SIZES = (
    Size("vocab", r"text_words\.weight", 0),
    Size("hidden", r"text_words\.weight", 1),
    Size("max_positions", r"text_positions\.weight", 0),
    Size("visual_positions", r"visual_positions\.weight", 0),
    Size("feats", r"visual_projection\.weight", 1),
    *(Size(f"{part}_layers", rf"{part}_layers\.(\d+)\..*") for part in ("text", "visual", "cross")),
    *(Size(f"{part}_intermediate", rf"{part}_layers\.0\.ffn_in\.weight", 0) for part in ("text", "visual", "cross")),
)


def _norm(source: str, target: str) -> list[Rename]:
    """A LayerNorm, whose parts BERT called gamma and beta before 2019."""
    return [
        Rename(rf"{source}\.(?:weight|gamma)", (f"{target}.weight",)),
        Rename(rf"{source}\.(?:bias|beta)", (f"{target}.bias",)),
    ]


def _first_rows(tensor: Tensor, shape: torch.Size) -> Tensor:
    return tensor[: shape[0]]


def _bert(source: str) -> list[Rename]:
    """Rows for a BERT without its pooler."""
    layer, block = source + r"encoder\.layer\.(\d+)\.", r"family.text_stack.blocks.\1."
    table, ours = source + r"embeddings\.", "family.text_embeddings."
    return [
        Rename(table + r"word_embeddings\.weight", (f"{ours}word.weight",)),
        Rename(table + r"position_embeddings\.weight", (f"{ours}position.weight",), _first_rows),
        Rename(table + r"token_type_embeddings\.weight", (f"{ours}segment.weight",)),
        Rename(table + "position_ids"),  # 0, 1, 2, ...
        *_norm(table + "LayerNorm", f"{ours}norm"),
        Rename(layer + r"attention\.self\.(query|key|value)\.(\w+)", (block + r"attention.\2.\3",)),
        Rename(layer + r"attention\.output\.dense\.(\w+)", (block + r"attention.output.\2",)),
        *_norm(layer + r"attention\.output\.LayerNorm", block + "attention_norm"),
        Rename(layer + r"intermediate\.dense\.(\w+)", (block + r"mlp.fc1.\2",)),
        Rename(layer + r"output\.dense\.(\w+)", (block + r"mlp.fc2.\2",)),
        *_norm(layer + r"output\.LayerNorm", block + "mlp_norm"),
    ]


# bert-base-uncased, which the text encoder is and stays.
INIT_TEXT = Renames(
    (
        *_bert(r"(?:bert\.)?"),
        Rename(r"(?:bert\.)?pooler\.dense\.\w+"),
        Rename(r"cls\.(?:predictions|seq_relationship)\..*"),
    ),
    fills=r"family\.(?:text_embeddings|text_stack)\..*",
)

Cbt.published, Cbt.init_text = PUBLISHED, INIT_TEXT
