"""CVLP (Shi et al. 2020, arXiv 2007.13135): LXMERT's network twice, a query network and its momentum twin, whose
layers are dropped at random. How they differ is for `region_nce` and the twin's settings (`drop_layers`) to say.

The authors' code is gao-peng-cuhk/CVLP- (at 5851373); none of their weights can be had. The names below are LXMERT's
under `query.` and `key.`, as in the stored tensors of an independent implementation of the paper.
"""

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
    """Sizes; the paper's are LXMERT's (section 4: 9, 5 and 5 layers)."""


class Cvlp(TwoStreams, Family):
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
            raise ConfigError("CVLP has no causal reading, for its regions see the whole text; take another family")
        return self.exchange(text, visual)


build = Cvlp


def tiny() -> Config:
    """A miniature with every part of the published model."""
    return Config(
        hidden=16,
        heads=2,
        intermediate=32,
        vocab=64,
        max_positions=16,
        text_layers=2,
        visual_layers=2,
        cross_layers=2,
        text_length=12,
        regions=6,
        feats=10,
        classes=7,
    )


def _network(source: str, ours: str, optional: bool) -> list[Rename]:
    """Rows for one of the two networks."""
    rows = [
        Rename(rf"{source}\.bert\.{theirs}", (f"{ours}.{mine}",), optional=optional)
        for theirs, mine in (*BERT_NAMES, *REGION_NAMES)
    ]
    theirs, mine = POSITIONS
    return [*rows, Rename(rf"{source}\.bert\.{theirs}", (f"{ours}.{mine}",), first_rows, optional=optional)]


PUBLISHED = Renames(
    (
        *_network("query", "family", optional=False),
        *_network("key", "twin", optional=True),
        *(
            Rename(rf"query\.cls\.predictions\.{theirs}", (f"objectives.mlm.head.{ours}",), optional=True)
            for theirs, ours in WORD_HEAD_NAMES
        ),
        Rename(r"query\.cls\.predictions\.decoder\.weight"),  # the word embedding
        Rename(r"query\.cls\.seq_relationship\.(\w+)", (r"objectives.itm.head.\1",), optional=True),
    ),
    fills=r"(?:family|twin)\..*",
)

NETWORK = r"query\.bert\."
SIZES = (
    *bert_sizes(NETWORK, layers="text_layers"),
    Size("visual_layers", NETWORK + r"encoder\.r_layers\.(\d+)\..*"),
    Size("cross_layers", NETWORK + r"encoder\.x_layers\.(\d+)\..*"),
    Size("feats", NETWORK + r"encoder\.visn_fc\.visn_fc\.weight", 1),
    Size("boxes", NETWORK + r"encoder\.visn_fc\.box_fc\.weight", 1),
)

Cvlp.published = PUBLISHED
