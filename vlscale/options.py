"""The sections of a recipe that belong to the run as a whole; `data.options` and `optim` have the two large ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vlscale.data.text import AS_IT_IS
from vlscale.errors import ConfigError


@dataclass(frozen=True)
class TextConfig:
    """How captions become token ids."""

    vocab: str | None = None  # a tokenizer's file or folder (`data.text`); None = built from the training captions
    cased: bool = False  # the vocabulary tells capital letters from small ones (bert-base-cased)
    clean_up: bool = True  # ALBEF's: lower case, no punctuation, `max_words`; False = captions as they are
    max_words: int = 30  # words of a caption kept by the clean-up
    answers: str | None = None  # a file with one answer a line, or a JSON list; None = the training data's commonest

    def __post_init__(self) -> None:
        if self.cased and self.clean_up:
            reason = "text.cased reads capital letters, which the clean-up takes away; write text.clean_up=false"
            raise ConfigError(reason)

    @property
    def kept_words(self) -> int:
        """Of a caption, as `data.text.clean_text` takes it."""
        return self.max_words if self.clean_up else AS_IT_IS


@dataclass(frozen=True)
class TaskConfig:
    """The objectives of one kind of step, and its share of the steps."""

    objectives: tuple[str, ...]
    share: float = 1.0
    modality: Literal["both", "text", "visual"] = "both"  # read alone, of families that can


@dataclass(frozen=True)
class MomentumConfig:
    """The momentum twin: average <- coefficient * average + (1 - coefficient) * online, per optimizer step."""

    coefficient: float = 0.995
    schedule: Literal["constant", "cosine"] = "constant"
    drop_layers: float = 0.0  # chance that a layer of the twin is skipped in a step (CVLP: 0.5)
    drop_every: Literal[1, 2] = 1  # which layers may be: each of a stack, or the second, fourth, ... (CVLP's code)
    buffers: Literal["copied", "own"] = "copied"  # the twin's BatchNorm statistics: the online ones, or its own (MoCo)


@dataclass(frozen=True)
class CheckpointConfig:
    """When the run is saved and where; `every` counts optimizer steps, and the last step is always saved."""

    every: int = 1000
    keep: int = 2  # the newest so many
    keep_every: int = 0  # and for ever those of steps that it divides; 0 = none
    failures: int = 3  # saves in a row that may fail (a full disk, ...) until the run ends
    background: bool = True  # the run waits for a copy in host memory only; False = until all is written
    to: str | None = None  # a store's URL, such as s3://bucket/run; None = `checkpoints` in the run folder


@dataclass(frozen=True)
class NonFiniteConfig:
    """How many steps may be skipped because their gradients are not finite."""

    budget: int = 10  # so many of them end the run ...
    window: int = 1000  # ... where they lie within so many steps


@dataclass(frozen=True)
class SpikeConfig:
    """When a logged loss is a spike, and what becomes of it."""

    factor: float = 10.0  # robust deviations (1.4826 MAD, at least 1 % of the median) above the median
    window: int = 100  # logged lines of the task that the median is of
    roll_back: bool = False  # go on from the last checkpoint before it, past the data that led to it
    budget: int = 3  # so many roll-backs; the next spike ends the run

    def __post_init__(self) -> None:
        if not self.factor > 0:
            raise ConfigError(f"spikes.factor should be above 0 (got {self.factor})")


@dataclass(frozen=True)
class EvaluationConfig:
    """When the validation shards are evaluated; `every` 0 = only at the end."""

    every: int = 1000
    limit: int = 5000  # samples at most
    windows: int = 1  # of a clip, spread evenly, whose embeddings retrieval averages

    def __post_init__(self) -> None:
        if self.windows < 1:
            raise ConfigError(f"evaluation.windows should be at least 1 (got {self.windows})")


@dataclass(frozen=True)
class LoggingConfig:
    """What is written while training."""

    every: int = 10
    sample_keys: bool = False
    tensorboard: bool = True


@dataclass(frozen=True)
class WatchdogConfig:
    """Seconds without a sign of life after which a rank says where it stands and the run ends; 0 = never."""

    start: float = 1800.0  # reading shards, building, and the first step with what it compiles
    step: float = 600.0  # from then on; every step, batch of an evaluation and collective is a sign of life


@dataclass(frozen=True)
class InitConfig:
    """Local folders (or files) with weights to start from."""

    text: str | None = None  # published weights of a tower, as the next
    vision: str | None = None
    codebook: str | None = None  # of visual words: a file that `launchers/visual_words.py grow` made
    weights: str | None = None  # of the whole model in our names: a converted folder, a checkpoint, a merged file
