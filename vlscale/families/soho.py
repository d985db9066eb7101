"""SOHO (Huang et al. 2021, arXiv 2104.03135): a ResNet's grid through a visual dictionary, and a BERT over words and
cells. The authors' code: researchmm/soho at 95824a8 (its released model is the small one of the ablations)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlscale.errors import ConfigError
from vlscale.families.base import Family, Rename, Renames, Size, bert_sizes, check_positions
from vlscale.nn.attention import attention_mask
from vlscale.nn.bert import INIT_STD, BertEmbeddings, bert_layers
from vlscale.nn.cnn import BLOCKS, STRIDE, BatchNorm, Convolution, ResNet
from vlscale.nn.dictionary import Dictionary, same_code
from vlscale.nn.single_stream import left_to_right, real
from vlscale.nn.transformer import Stack, scale_matrices
from vlscale.types import Dims, Fused, Inputs, Stream, Text, Visual

WAVELENGTH = 10000.0  # of the sine positions; SOHO/models/necks/necks.py, as DETR


@dataclass(frozen=True)
class Config:
    """Sizes; the defaults are the paper's main model. Released small model: depth 18, layers 3, mask_prob 0.015."""

    # side of square pictures, for views without `keep_ratio` (authors: shorter side 600, longer at most 1000)
    image_size: int = 640
    depth: int = 101  # of the ResNet; paper, section 4.2
    stem: int = 64  # He et al. 2016
    base: int = 64
    frozen_stages: int = 1  # configs/Pretrain/soho_res18_pre.py: the stem and stage 1 learn nothing
    live_statistics: bool = True  # BatchNorm by the micro-batch's statistics (authors); False = the running ones
    codes: int = 2048  # soho_res18_pre.py: num_tokens
    decay: float = 0.4  # soho_res18_pre.py: decay of the dictionary's averages
    gate: bool = True  # SimpleVDforPreGate: a learned mix of value and cell; False = their sum, as in the paper
    mask_prob: float = 0.15  # paper: share of pictures with a hidden code; soho_res18_pre.py: 0.015
    hidden: int = 768  # bert-base-uncased, as are the next six
    heads: int = 12
    layers: int = 12
    intermediate: int = 3072
    vocab: int = 30522
    max_positions: int = 512
    segments: int = 2
    dropout: float = 0.1  # hidden and attention; SOHO/models/languages/bert.py
    text_length: int = 16  # soho_res18_pre.py: [CLS] and [SEP] counted
    init_scale: float = 1.0  # on the matrices' start of 0.02, which was chosen for width 768

    @property
    def inputs(self) -> Inputs:
        """What the data plane feeds this family."""
        return Inputs(self.image_size, self.text_length, separator=True, any_size=True)


class Soho(Family):
    """The picture's cells, each mixed with its dictionary entry; then words and cells as one sequence.

    In the view `masked` a picture's picked cell, and all its cells of the same code, are hidden.

    Raises:
        ConfigError: sizes that do not divide, an unknown depth, or a picture without a cell.
    """

    offers = frozenset({"text", "visual", "fuse", "causal", "codes"})

    def __init__(self, config: Config) -> None:
        super().__init__()
        _check(config)
        self.config = c = config
        self.trunk = ResNet(c.depth, c.stem, c.base, c.frozen_stages, c.live_statistics)
        self.cell_convolution = Convolution(self.trunk.width, c.hidden)
        self.cell_norm = BatchNorm(c.hidden, c.live_statistics, over_ranks=True)
        self.dictionary = Dictionary(c.codes, c.hidden, c.decay)
        self.value_map = nn.Linear(c.hidden, c.hidden)
        self.gate = Gate(c.hidden, c.live_statistics) if c.gate else None
        self.mask_token = MaskToken(c.hidden)
        self.visual_norm = nn.LayerNorm(c.hidden)
        self.text_embeddings = BertEmbeddings(c.vocab, c.hidden, c.max_positions, c.segments, c.dropout)
        self.stack = Stack(bert_layers(c.layers, c.hidden, c.heads, c.intermediate, c.dropout))
        scale_matrices(self.stack, c.init_scale)
        self.dims = Dims(c.hidden, c.hidden, c.hidden, vocab=c.vocab)
        self.inputs = c.inputs

    @property
    def word_embedding(self) -> nn.Embedding:
        """[V, D], tied to the masked-word head."""
        return self.text_embeddings.word

    @property
    def code_table(self) -> Tensor:
        """[K, D] the dictionary's entries; no gradient."""
        return self.dictionary.table

    def pick(self, visual: Visual, cell: Tensor, kept: Tensor) -> Tensor:
        """[B, R] bool: one cell, uniformly, of pictures where `kept` < mask_prob, by uniform draws [B] each."""
        height, width = visual.feats.shape[2:]
        cells = _cells(height) * _cells(width)
        places = torch.arange(cells, device=cell.device)
        return (places == (cell * cells).long()[:, None]) & (kept < self.config.mask_prob)[:, None]

    def encode_text(self, text: Text) -> Stream:
        """Embeddings alone, [B, L, D]."""
        return Stream(self.text_embeddings(text.ids, text.segments), text.mask)

    def encode_visual(self, visual: Visual) -> Stream:
        """Pixels [B, 3, H, W] to R = (H / 64) (W / 64) cells, row by row, with their codes.

        `mask` and `picked` [B, R] are of cells. Where they have n times as many rows, each picture stands n times
        in a row, for as many captions.
        """
        maps = F.max_pool2d(self.trunk(visual.feats), 2)
        rows = next((len(part) for part in (visual.picked, visual.mask) if part is not None), len(maps))
        maps = maps.repeat_interleave(rows // len(maps), dim=0) if rows > len(maps) else maps
        maps = self.cell_norm(self.cell_convolution(maps))  # [B, D, h, w]
        height, width = maps.shape[2:]
        cells = maps.flatten(2).transpose(1, 2)  # [B, R, D]
        values, codes = self.dictionary(cells)
        values = self.value_map(values)
        mixed = values + cells if self.gate is None else self.gate(values, cells, height)
        hidden = None
        if visual.picked is not None:
            hidden = same_code(codes, visual.picked, visual.mask)
            mixed = self.mask_token(mixed, hidden)
        mask = torch.ones_like(codes, dtype=torch.bool) if visual.mask is None else visual.mask
        places = sine_positions(mask.view(-1, height, width), self.config.hidden)
        return Stream(self.visual_norm(mixed + places.to(mixed.dtype)), visual.mask, codes=codes, picked=hidden)

    def fuse(self, text: Stream | None, visual: Stream | None, causal: bool = False) -> Fused:
        """All layers over words, then cells; pooled = state of [CLS].

        With `causal` a word sees the cells and what stands before it; cells see cells.
        """
        assert text is not None, "SOHO reads a text beside a picture"
        assert visual is not None, "SOHO reads a text beside a picture"
        length, cells = text.hidden.shape[1], visual.hidden.shape[1]
        mask = torch.cat([real(text), real(visual)], dim=1)
        words = torch.arange(length + cells, device=mask.device) < length
        seen = left_to_right(mask, words) if causal else attention_mask(mask)
        hidden = self.stack(torch.cat([text.hidden, visual.hidden], dim=1), seen)
        return Fused(text=hidden[:, :length], visual=hidden[:, length:], pooled=hidden[:, 0])

    def flops(self, text_tokens: int) -> dict[str, int]:
        """See `Family.flops`; of pictures as large as `config.image_size` says."""
        return self.flops_of(text_tokens, self.config.image_size, self.config.image_size)

    def flops_of(self, text_tokens: int, height: int, width: int) -> dict[str, int]:
        """See `Family.flops_of`."""
        c = self.config
        cells = _cells(height) * _cells(width)
        tokens = text_tokens + cells
        products = 4 * c.hidden**2 + 2 * c.hidden * c.intermediate  # query, key, value, output; the two of the MLP
        layer = 2 * tokens * products + 2 * 2 * tokens**2 * c.hidden
        neck = self.trunk.width + c.codes + c.hidden + (2 * 2 if c.gate else 0)  # convolution, distances, map, gate
        trunk = self.trunk.flops(height, width)
        return {
            "encode_text": 0,
            "encode_visual": trunk + 2 * cells * c.hidden * neck,
            "fuse": c.layers * layer,
        }


class Gate(nn.Module):
    """A cell's entry and the cell itself, weighed by a softmax over the two (SOHO/models/necks/necks.py)."""

    def __init__(self, width: int, live: bool) -> None:
        super().__init__()
        self.convolution = Convolution(2 * width, 2)
        self.norm = BatchNorm(2, live, over_ranks=True)

    def forward(self, values: Tensor, cells: Tensor, height: int) -> Tensor:
        """[B, R, D] twice -> [B, R, D]; R is `height` rows of the grid."""
        both = torch.cat([values, cells], dim=2).transpose(1, 2)
        both = both.reshape(*both.shape[:2], height, -1)  # [B, 2 D, h, w]
        weights: Tensor = self.norm(self.convolution(both)).softmax(dim=1).flatten(2)[..., None]  # [B, 2, R, 1]
        return weights[:, 0] * values + weights[:, 1] * cells


class MaskToken(nn.Module):
    """A learned vector in the place of hidden cells."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.zeros(1, width))
        nn.init.normal_(self.vector, std=INIT_STD)

    def forward(self, cells: Tensor, hidden: Tensor) -> Tensor:
        """[B, R, D], [B, R] bool -> [B, R, D]."""
        return torch.where(hidden[..., None], self.vector, cells)


def sine_positions(mask: Tensor, width: int) -> Tensor:
    """DETR's sine code of a grid (Carion et al. 2020, appendix A.4), [B, h * w, D]: half of it for y, then for x.

    A place is the count of real cells up to it in its column or row, divided by that of the whole column or row.

    Args:
        mask: [B, h, w] bool, True = a cell of the picture.
        width: D, a multiple of 4.
    """
    half = torch.arange(width // 2, device=mask.device)
    wavelengths = WAVELENGTH ** (half.div(2, rounding_mode="floor") * 2 / (width / 2))
    codes = []
    for axis in (1, 2):
        count = mask.cumsum(axis, dtype=torch.float32)
        place = count / (count.narrow(axis, -1, 1) + 1e-6) * 2 * math.pi
        angles = place[..., None] / wavelengths
        codes.append(torch.stack([angles[..., 0::2].sin(), angles[..., 1::2].cos()], dim=4).flatten(3))
    return torch.cat(codes, dim=3).flatten(1, 2)


def _cells(length: int) -> int:
    """Cells along a side of so many pixels: the trunk rounds up, the pooling down."""
    return -(-length // STRIDE) // 2


def _check(config: Config) -> None:
    for whole, part in (("hidden", config.heads), ("hidden", 4)):
        if getattr(config, whole) % part:
            raise ConfigError(
                f"family.{whole} {getattr(config, whole)} is not a multiple of {part} (heads, or the four parts of a "
                f"position); choose sizes that divide"
            )
    if config.depth not in BLOCKS:
        raise ConfigError(f"family.depth {config.depth} is no ResNet; write one of {', '.join(map(str, BLOCKS))}")
    if not -1 <= config.frozen_stages <= 4:
        raise ConfigError(f"family.frozen_stages {config.frozen_stages} is not -1 (none), 0 (the stem) or up to 4")
    if _cells(config.image_size) < 1:
        raise ConfigError(f"family.image_size {config.image_size} leaves no cell; write at least {STRIDE + 1}")
    check_positions(config.text_length, config.max_positions)


build = Soho


def tiny() -> Config:
    """A miniature with every part of the published model; its BatchNorm does not tell one micro-batch from two."""
    return Config(
        image_size=128,
        depth=18,
        stem=4,
        base=3,
        live_statistics=False,
        codes=12,
        mask_prob=0.75,
        hidden=16,
        heads=2,
        layers=2,
        intermediate=32,
        vocab=64,
        max_positions=16,
        text_length=12,
    )


def _trunk(source: str) -> list[Rename]:
    """Rows for a ResNet in the names of torchvision and mmcls."""
    ours, block = "family.trunk.", source + r"layer(\d)\.(\d+)\."
    rows = [
        Rename(source + r"conv1\.weight", (f"{ours}stem.convolution.weight",)),
        Rename(source + r"bn1\.num_batches_tracked"),
        Rename(source + r"bn1\.(\w+)", (rf"{ours}stem.norm.\1",)),
        Rename(block + r"(?:bn\d|downsample\.1)\.num_batches_tracked"),
        Rename(block + r"downsample\.([01])\.(\w+)", (rf"{ours}stages.\1.\2.shortcut.\3.\4",)),
    ]
    for place in range(3):
        rows.append(Rename(block + rf"conv{place + 1}\.(\w+)", (rf"{ours}stages.\1.\2.convolutions.{place}.\3",)))
        rows.append(Rename(block + rf"bn{place + 1}\.(\w+)", (rf"{ours}stages.\1.\2.norms.{place}.\3",)))
    return rows


def _bert(source: str, every_layer: bool) -> list[Rename]:
    """Rows for BERT's embeddings and layers; a start from a longer BERT takes its first layers."""
    layer, block = source + r"encoder\.layer\.(\d+)\.", r"family.stack.blocks.\1."
    embeddings, optional = source + r"embeddings\.", not every_layer
    rows = [
        Rename(embeddings + r"word_embeddings\.weight", ("family.text_embeddings.word.weight",)),
        Rename(embeddings + r"token_type_embeddings\.weight", ("family.text_embeddings.segment.weight",)),
        Rename(
            embeddings + r"position_embeddings\.weight",
            ("family.text_embeddings.position.weight",),
            lambda table, shape: table[: shape[0]],
        ),
        Rename(embeddings + r"position_ids"),  # 0, 1, 2, ...
        Rename(layer + r"attention\.self\.(query|key|value)\.(\w+)", (block + r"attention.\2.\3",), optional=optional),
        Rename(layer + r"attention\.output\.dense\.(\w+)", (block + r"attention.output.\2",), optional=optional),
        Rename(layer + r"intermediate\.dense\.(\w+)", (block + r"mlp.fc1.\2",), optional=optional),
        Rename(layer + r"output\.dense\.(\w+)", (block + r"mlp.fc2.\2",), optional=optional),
    ]
    for part, letter in (("weight", "(?:weight|gamma)"), ("bias", "(?:bias|beta)")):
        norms = ((r"attention\.output", "attention_norm"), ("output", "mlp_norm"))
        rows.append(Rename(embeddings + rf"LayerNorm\.{letter}", (f"family.text_embeddings.norm.{part}",)))
        for theirs, mine in norms:
            rows.append(
                Rename(layer + rf"{theirs}\.LayerNorm\.{letter}", (f"{block}{mine}.{part}",), optional=optional)
            )
    return rows


_FIGURES = (("embed", "table"), ("cluster_size", "size"), ("embed_avg", "total"), ("cluster_sum", "used"))

# The authors' checkpoints. `mask_l_fc` is the word embedding.
PUBLISHED = Renames(
    (
        *_trunk(r"backbone\."),
        Rename(r"neck\.(?:conv|gate_fc)\.bn\.num_batches_tracked"),
        Rename(r"neck\.conv\.conv\.weight", ("family.cell_convolution.weight",)),
        Rename(r"neck\.conv\.bn\.(\w+)", (r"family.cell_norm.\1",)),
        Rename(r"neck\.gate_fc\.conv\.weight", ("family.gate.convolution.weight",), optional=True),
        Rename(r"neck\.gate_fc\.bn\.(\w+)", (r"family.gate.norm.\1",), optional=True),
        Rename(r"neck\.ln\.(\w+)", (r"family.visual_norm.\1",)),
        Rename(r"neck\.mask_emb\.weight", ("family.mask_token.vector",)),
        Rename(r"neck\.pos_line\.(\w+)", (r"family.value_map.\1",)),
        *(Rename(rf"neck\.vq\.{theirs}", (f"family.dictionary.{ours}",)) for theirs, ours in _FIGURES),
        *_bert(r"language\.bert\.", every_layer=True),
        Rename(r"mask_l_fc\.weight"),
        Rename(r"head\.match_class\.weight", ("objectives.itm.head.weight",), optional=True),
    ),
    fills=r"family\..*",
)

# bert-base-uncased; a model of fewer layers takes the first.
INIT_TEXT = Renames(
    (
        *_bert(r"(?:bert\.)?", every_layer=False),
        Rename(r"(?:bert\.)?pooler\.dense\.\w+"),
        Rename(r"cls\.(?:predictions|seq_relationship)\.[\w.]+"),
    ),
    fills=r"family\.(?:text_embeddings|stack)\..*",
)

# A ResNet trained on ImageNet, in torchvision's names.
INIT_VISION = Renames((*_trunk(""), Rename(r"fc\.\w+")), fills=r"family\.trunk\..*")

SIZES = (
    *bert_sizes(r"language\.bert\."),
    Size("stem", r"backbone\.conv1\.weight", 0),
    Size("base", r"backbone\.layer1\.0\.conv1\.weight", 0),
    Size("depth", r"backbone\.(layer\d\.\d+\.conv\d)\.weight", None, lambda layers, known: layers + 2),
    Size("codes", r"neck\.vq\.embed", 0),
)

Soho.published, Soho.init_text, Soho.init_vision = PUBLISHED, INIT_TEXT, INIT_VISION
