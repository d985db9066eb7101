"""LXMERT (Tan and Bansal 2019, arXiv 1908.07490): language layers, object-relationship layers, and cross-modality
layers over a text and a detector's regions. The network itself stands in `nn/lxmert.py`, for CVLP has it too. The
authors' code: airsplay/lxmert at 0db1182."""

from __future__ import annotations

from dataclasses import dataclass

from vlscale.errors import ConfigError
from vlscale.families.base import Family, Rename, Renames, Size, bert_sizes
from vlscale.nn.lxmert import (
    BERT_NAMES,
    POSITIONS,
    REGION_NAMES,
    WORD_HEAD_NAMES,
    Sizes,
    TwoStreams,
    first_rows,
)
from vlscale.types import Fused, Stream


@dataclass(frozen=True)
class Config(Sizes):
    """Sizes; the defaults are the published model's."""


class Lxmert(TwoStreams, Family):
    """Text alone and regions alone, then both together; no causal reading.

    Raises:
        ConfigError: sizes that do not divide, or a text longer than the positions.
    """

    offers = frozenset({"text", "visual", "fuse", "regions", "detector"})

    def __init__(self, config: Config) -> None:
        fault = config.fault()
        if fault is not None:
            raise ConfigError(fault)
        super().__init__(config)
        self.config = config

    def fuse(self, text: Stream | None, visual: Stream | None, causal: bool = False) -> Fused:
        """See `TwoStreams.exchange`.

        Raises:
            ConfigError: `causal`, which regions that have seen the whole text would undo.
        """
        if causal:
            raise ConfigError("LXMERT has no causal reading, for its regions see the whole text; take another family")
        return self.exchange(text, visual)


build = Lxmert


def tiny() -> Config:
    """A miniature with every part of the published model."""
    return Config(
        hidden=16,
        heads=2,
        intermediate=32,
        vocab=64,
        max_positions=16,
        text_layers=2,
        visual_layers=1,
        cross_layers=2,
        text_length=12,
        regions=6,
        feats=10,
        classes=7,
    )


def _rows(prefix: str, names: tuple[tuple[str, str], ...], optional: bool = False) -> list[Rename]:
    """To the family, and to its momentum twin where the model has one."""
    return [Rename(prefix + theirs, (f"family.{ours}", f"twin.{ours}"), optional=optional) for theirs, ours in names]


def _positions(prefix: str) -> Rename:
    source, target = POSITIONS
    return Rename(prefix + source, (f"family.{target}", f"twin.{target}"), first_rows)


def _heads(prefix: str) -> list[Rename]:
    """Rows for BERT's masked-word head, whose decoder is the word embedding."""
    rows = [
        Rename(rf"{prefix}cls\.predictions\.{theirs}", (f"objectives.mlm.head.{ours}",), optional=True)
        for theirs, ours in WORD_HEAD_NAMES
    ]
    return [*rows, Rename(rf"{prefix}cls\.predictions\.decoder\.(?:weight|bias)")]


def _pretexts(prefix: str) -> list[Rename]:
    """Rows for the heads that are LXMERT's own."""
    pairs = (
        (r"cls\.seq_relationship\.(\w+)", r"itm.head.\1"),
        (r"obj_predict_head\.transform\.dense\.(\w+)", r"masked_object.head.dense.\1"),
        (r"obj_predict_head\.transform\.LayerNorm\.(\w+)", r"masked_object.head.norm.\1"),
        (r"obj_predict_head\.decoder_dict\.obj\.(\w+)", r"masked_object.head.decoders.objects.\1"),
        (r"obj_predict_head\.decoder_dict\.attr\.(\w+)", r"masked_object.head.decoders.attributes.\1"),
        (r"obj_predict_head\.decoder_dict\.feat\.(\w+)", r"masked_object.head.decoders.features.\1"),
        (r"answer_head\.logit_fc\.0\.(\w+)", r"answer.head.dense.\1"),
        (r"answer_head\.logit_fc\.2\.(\w+)", r"answer.head.norm.\1"),
        (r"answer_head\.logit_fc\.3\.(\w+)", r"answer.head.decoder.\1"),
    )
    return [Rename(prefix + theirs, (f"objectives.{ours}",), optional=True) for theirs, ours in pairs]


MODULE = r"(?:module\.)?"  # of files that several GPUs have written
NETWORK = rf"{MODULE}(?:bert|lxmert)\."  # the authors' name; transformers'
PUBLISHED = Renames(
    (
        *_rows(NETWORK, BERT_NAMES),
        _positions(NETWORK),
        *_rows(NETWORK, REGION_NAMES),
        *_heads(MODULE),
        *_pretexts(MODULE),
    ),
    fills=r"family\..*",
)

REGIONS = NETWORK + r"encoder\.visn_fc\."
SIZES = (
    *bert_sizes(NETWORK, layers="text_layers"),
    Size("visual_layers", NETWORK + r"encoder\.r_layers\.(\d+)\..*"),
    Size("cross_layers", NETWORK + r"encoder\.x_layers\.(\d+)\..*"),
    Size("feats", REGIONS + r"visn_fc\.weight", 1),
    Size("boxes", REGIONS + r"box_fc\.weight", 1),
    Size("classes", MODULE + r"obj_predict_head\.decoder_dict\.obj\.weight", 0),
)

# bert-base-uncased; it has more layers than the language stack, and its next-sentence head told something else.
INIT_TEXT = Renames(
    (
        *_rows(r"(?:bert\.)?", BERT_NAMES, optional=True),
        _positions(r"(?:bert\.)?"),
        Rename(r"(?:bert\.)?embeddings\.position_ids"),  # 0, 1, 2, ...
        *_heads(""),
        Rename(r"cls\.seq_relationship\.\w+"),
    ),
    fills=r"family\.(?:text_embeddings|text_stack|pooler)\..*",
)

Lxmert.published, Lxmert.init_text = PUBLISHED, INIT_TEXT
