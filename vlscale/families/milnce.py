"""MIL-NCE (Miech et al. 2020, arXiv 1912.06430): S3D-G over pixels and a maximum over words meet in one space whose
vectors keep their length. Code: antoine77340/MIL-NCE_HowTo100M at b282b15 (s3dg.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vlscale.errors import ConfigError
from vlscale.families.base import Family, Rename, Renames, Size
from vlscale.nn.s3d import STAGES, Norms, S3d, S3dSizes, s3d_flops
from vlscale.nn.word_pool import WordPool, pool
from vlscale.types import Dims, Inputs, Stream, Text, Visual

BRANCHES = ("b0", "b1a", "b1b", "b2a", "b2b", "b3")  # of `mixed`, in the order of a stage's numbers


@dataclass(frozen=True)
class Config:
    """Sizes; the defaults are the published ones."""

    image_size: int = 224  # args.py; the paper: 200
    frames: int = 16  # args.py, at 5 a second; the paper: 32 at 10
    stem: int = 64  # s3dg.py:217-262, as the next two
    second: int = 192
    mixed: tuple[tuple[int, ...], ...] = tuple(STAGES.values())  # of mixed_3b to mixed_5c: b0, b1, b1, b2, b2, b3
    space_to_depth: bool = False  # the stem of the weights that were trained on TPUs
    live_statistics: bool = True  # BatchNorm by the micro-batch's statistics; False = the running ones
    norm_over_ranks: bool = False  # BatchNorm statistics of all ranks together (paper) or of each (their repository)
    conv_start: Literal["uniform", "kaiming_normal"] = "uniform"  # args.py, weight_init
    vocab: int = 66250  # of s3d_dict.npy, padding counted
    word_width: int = 300  # word2vec's
    text_width: int = 2048  # s3dg.py:158-215
    text_length: int = 20  # video_loader.py, max_words; raw sentences are cut at 16 by s3dg.py
    embed: int = 512
    train_words: bool = False
    padding_words: bool = True  # empty places take part in the maximum over words; False = words alone

    @property
    def inputs(self) -> Inputs:
        """What the data plane feeds this family."""
        return Inputs(self.image_size, self.text_length, False, frames=self.frames, words=True)

    @property
    def video(self) -> S3dSizes:
        """The video network's."""
        norms = Norms(self.live_statistics, self.norm_over_ranks)
        return S3dSizes(self.stem, self.second, self.mixed, self.space_to_depth, norms, self.conv_start)


class MilNce(Family):
    """Clips and texts on their own; embeddings are compared by bare dot products, so their lengths count.

    Raises:
        ConfigError: another number of stages or branches; frames that do not part into blocks for space to depth.
    """

    offers = frozenset({"text", "visual", "embed"})
    text_proj: nn.Linear
    visual_proj: nn.Linear

    def __init__(self, config: Config) -> None:
        super().__init__()
        _check(config)
        self.config = c = config
        self.words = WordPool(c.vocab, c.word_width, c.text_width, c.text_length, c.padding_words, c.train_words)
        self.text_proj = nn.Linear(c.text_width, c.embed)
        self.video = S3d(c.video)
        self.visual_proj = nn.Linear(c.video.width, c.embed)
        self.dims = Dims(text=c.text_width, visual=c.video.width, fused=0, embed=c.embed, vocab=c.vocab)
        self.inputs = c.inputs

    @property
    def word_embedding(self) -> nn.Embedding:
        """[V, D] word vectors; row 0 is padding."""
        return self.words.vectors

    def encode_text(self, text: Text) -> Stream:
        """hidden = words one by one, [B, L, D]; embed = a linear map of their maximum, of any length."""
        words = self.words(text)
        return Stream(words.hidden, words.mask, self.text_proj(pool(words)).float())

    def encode_visual(self, visual: Visual) -> Stream:
        """S3D-G; feats are pixels [B, T, 3, H, W], black where a clip is short.

        hidden = the last stage's map, [B, T / 8 * H / 32 * W / 32, D]; embed = a linear map of its mean, of any length.
        """
        hidden = self.video(visual.feats).flatten(2).transpose(1, 2)
        return Stream(hidden, None, self.visual_proj(hidden.mean(dim=1)).float())

    def flops(self, text_tokens: int) -> dict[str, int]:
        """See `Family.flops`; texts are always `text_length` long."""
        c = self.config
        video = s3d_flops(c.video, c.frames, c.image_size, c.image_size)
        return {
            "encode_text": self.words.flops() + 2 * c.text_width * c.embed,
            "encode_visual": video + 2 * c.video.width * c.embed,
        }


def _check(config: Config) -> None:
    if len(config.mixed) != len(STAGES) or any(len(stage) != len(BRANCHES) for stage in config.mixed):
        raise ConfigError(
            f"family.mixed should hold {len(STAGES)} stages ({', '.join(STAGES)}) of {len(BRANCHES)} channel counts "
            f"({', '.join(BRANCHES)}) each"
        )
    if config.space_to_depth and (config.frames % 2 or config.image_size % 2):
        raise ConfigError(
            f"family.space_to_depth halves time and space, but family.frames is {config.frames} and "
            f"family.image_size {config.image_size}; write even numbers"
        )


build = MilNce


def tiny() -> Config:
    """A miniature with every part of the published model."""
    return Config(
        image_size=32,
        frames=4,
        stem=4,
        second=6,
        mixed=((4, 4, 5, 4, 4, 4),) * len(STAGES),
        live_statistics=False,
        conv_start="kaiming_normal",
        vocab=64,
        word_width=8,
        text_width=16,
        text_length=12,
        embed=8,
    )


def _row(source: str, target: str, change: Callable[[Tensor, torch.Size], Tensor] | None = None) -> Rename:
    return Rename(source, (f"family.{target}", f"twin.{target}"), change)


def _convolution(source: str, ours: str) -> list[Rename]:
    """Rows of one convolution with its norm, and of the second of a separable one; `ours` may name groups."""
    rows = []
    for place, number in enumerate(("1", "2")):
        rows += [
            _row(rf"{source}conv{number}\.weight", f"video.stages.{ours}convolutions.{place}.weight"),
            Rename(rf"{source}bn{number}\.num_batches_tracked"),  # nothing reads it: momentum is fixed
            *(
                _row(rf"{source}bn{number}\.{part}", f"video.stages.{ours}norms.{place}.{part}")
                for part in ("weight", "bias", "running_mean", "running_var")
            ),
        ]
    return rows


STAGE = r"(mixed_\w+)\."

# The authors' names. Convolutions of branches 1 and 2 are called a and b; that of branch 3, behind its pool, b.
PUBLISHED = Renames(
    (
        *_convolution(r"(conv1|conv_2b|conv_2c)\.", r"\1."),
        _row(r"gating\.fc\.(\w+)", r"video.stages.gating.linear.\1"),
        *_convolution(STAGE + r"conv_b0\.", r"\1.branches.0.0."),
        *_convolution(STAGE + r"conv_b(1|2)_a\.", r"\1.branches.\2.0."),
        *_convolution(STAGE + r"conv_b(1|2)_b\.", r"\1.branches.\2.1."),
        *_convolution(STAGE + r"conv_b3_b\.", r"\1.branches.3.1."),
        _row(STAGE + r"gating_b(\d)\.fc\.(\w+)", r"video.stages.\1.gates.\2.linear.\3"),
        _row(r"fc\.(\w+)", r"visual_proj.\1"),
        _row(r"text_module\.word_embd\.weight", "words.vectors.weight"),
        _row(r"text_module\.fc1\.(\w+)", r"words.linear.\1"),
        _row(r"text_module\.fc2\.(\w+)", r"text_proj.\1"),
    ),
    fills=r"(?:family|twin)\..*",
)

SIZES = (
    Size("stem", r"conv1\.conv1\.weight", 0),
    Size("space_to_depth", r"conv1\.conv1\.weight", 1, lambda channels, known: channels == 24),
    Size("second", r"conv_2c\.conv1\.weight", 0),
    Size("vocab", r"text_module\.word_embd\.weight", 0),
    Size("word_width", r"text_module\.word_embd\.weight", 1),
    Size("text_width", r"text_module\.fc1\.weight", 0),
    Size("embed", r"fc\.weight", 0),
)

MilNce.published = PUBLISHED
