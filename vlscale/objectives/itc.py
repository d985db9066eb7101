"""Image-text contrast (InfoNCE): CLIP's, or with momentum keys, queues and soft targets ALBEF's (equations 1, 2, 6)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from vlscale import distributed
from vlscale.errors import ConfigError
from vlscale.nn import contrast
from vlscale.nn.momentum import softening
from vlscale.nn.queue import KeyQueue, QueueOptions
from vlscale.objectives.base import EncodingsLike, FamilyLike, Objective, embed_of
from vlscale.types import Batch, Keys, Loss


@dataclass(frozen=True)
class Config(QueueOptions):
    """Options; the defaults are ALBEF's (configs/Pretrain.yaml)."""

    weight: float = 1.0
    text: str = "clean"  # view
    visual: str = "clean"  # view
    momentum_visual: str | None = None  # view that the twin sees; None = the same (TCL: a second augmentation)
    soften: float = 0.4  # share of the twin's similarities in the targets
    soften_warmup: int = 0  # steps from 0 to that share; the authors take one epoch
    scope: Literal["rank", "global"] = "rank"  # columns before the queue's: of this micro-batch, or of the whole step
    same_picture: Literal["negative", "positive", "excluded"] = "negative"  # other captions of the same picture


class Side(NamedTuple):
    """One direction: rows that look for their partner among columns and a queue."""

    queries: Tensor  # [b, E], with gradient
    teachers: Tensor  # [b, E] the same samples by the twin
    partners: Tensor  # [b, E] their own columns, taken before the gather: their gradient need not travel
    columns: Tensor  # [C, E] of the other modality
    queue: KeyQueue | None


class Both(NamedTuple):
    """What the two directions have in common."""

    ids: Tensor  # [b] int64 pair ids
    column_ids: Tensor | None  # [C] int64; None where `same_picture` is negative
    temperature: Tensor  # [1]
    share: float  # of soft targets


class Itc(Objective):
    """Each picture finds its text among the batch's keys and the queue's, and each text its picture."""

    needs = frozenset({"text", "visual", "embed", "temperature"})

    def __init__(self, config: Config, family: FamilyLike) -> None:
        super().__init__()
        if config.scope == "global" and config.queue_push == "micro_batch":
            raise ConfigError(
                "objectives.itc has scope=global, whose keys are the whole step's, and queue_push=micro_batch; "
                "write queue_push=step"
            )
        self.config = config
        self.weight = config.weight
        self.momentum = config.queue > 0 or config.soften > 0
        self.whole = config.scope == "global"
        self.twin_view = config.momentum_visual or config.visual
        self.views = frozenset({f"text.{config.text}", f"visual.{config.visual}"})
        if self.momentum:
            self.views |= {f"visual.{self.twin_view}"}
        self.embed = family.dims.embed
        self.temperature = (family.temperature,)  # in a tuple: it is the family's submodule, not ours

    def share(self, enc: EncodingsLike, batch: Batch) -> tuple[Tensor, ...]:
        """Image keys, text keys [b, E] (in the queue's type) and, where they matter, pair ids."""
        image, text = self._embeds(enc)
        if self.momentum:
            image, text = self._twins(enc)
        if self.config.queue > 0 and self.config.queue_dtype == "bf16":
            image, text = image.bfloat16(), text.bfloat16()
        return (image, text) if self.config.same_picture == "negative" else (image, text, batch.pair_id)

    def forward(self, enc: EncodingsLike, batch: Batch, shared: tuple[Tensor, ...] = ()) -> Loss:
        """Mean of the two directions' soft cross-entropies over this rank's rows, [] fp32."""
        image, text = self._embeds(enc)
        image_twin, text_twin = self._twins(enc) if self.momentum else (image, text)
        image_keys, text_keys, *ids = shared or (image_twin, text_twin, batch.pair_id)
        both = Both(
            ids=batch.pair_id,
            column_ids=ids[0] if ids else None,
            temperature=enc.family.temperature(),
            share=softening(enc.step, self.config.soften, self.config.soften_warmup),
        )
        i2t, i2t_right = self._direction(Side(image, image_twin, text_twin, text_keys, self._queue(enc, "text")), both)
        t2i, t2i_right = self._direction(Side(text, text_twin, image_twin, image_keys, self._queue(enc, "image")), both)
        metrics = {
            "itc/i2t": i2t.detach(),
            "itc/t2i": t2i.detach(),
            "itc/accuracy": (i2t_right + t2i_right) / 2,
            "temperature": both.temperature.detach()[0],
        }
        return Loss((i2t + t2i) / 2, metrics)

    def _direction(self, side: Side, both: Both) -> tuple[Tensor, Tensor]:
        """Mean over rows of log-sum-exp - (the target's mean key) . query / temperature, and the accuracy.

        Soft targets need no matrix: sum_j target_j * logit_j is the query times the mean of the keys under the
        target, and of the twin's softmax that mean is attention with the twin's query (equation 6).
        """
        left_out, apart = self._apart(both)
        partner = side.partners.to(side.columns.dtype).float()
        positive = (side.queries * partner).sum(dim=1) / both.temperature
        total, best = contrast.log_sum_exp(side.queries, side.columns, both.temperature, apart=apart)
        if apart is not None:  # the partner has the row's own id
            total = torch.logaddexp(total, positive)
        if side.queue is not None:
            total = torch.logaddexp(total, side.queue.log_sum_exp(side.queries, both.temperature, left_out))
        target = self._true_keys(side, both) if self.config.same_picture == "positive" else partner
        if self.config.soften > 0:
            target = torch.lerp(target, self._soft_keys(side, both, partner), both.share)
        loss = (total - (side.queries * target).sum(dim=1) / both.temperature).mean()
        right = positive.detach() >= best - 1e-5 * (1 + best.abs())  # rounding apart, the partner is the best
        return loss, right.float().mean()

    def _apart(self, both: Both) -> tuple[Tensor | None, tuple[Tensor, Tensor] | None]:
        """Ids whose keys are left out, of the queue's and of the batch's columns."""
        if self.config.same_picture != "excluded":
            return None, None
        assert both.column_ids is not None, "`share` gives ids unless same_picture is negative"
        return both.ids, (both.ids, both.column_ids)

    def _true_keys(self, side: Side, both: Both) -> Tensor:
        """[b, E] mean of all keys of the row's picture, of the batch and of the queue."""
        assert both.column_ids is not None, "`share` gives ids unless same_picture is negative"
        total, count = contrast.sum_of_id(both.ids, side.columns, both.column_ids)
        if side.queue is not None:
            more, further = side.queue.sum_of_id(both.ids)
            total, count = total + more, count + further
        return total / count[:, None]

    @torch.no_grad()
    def _soft_keys(self, side: Side, both: Both, partner: Tensor) -> Tensor:
        """[b, E] mean of the keys under the twin's softmax over all columns."""
        left_out, apart = self._apart(both)
        found = contrast.soft_keys(side.teachers, side.columns, both.temperature, apart=apart)
        if apart is not None:
            own = (side.teachers * partner).sum(dim=1) / both.temperature
            found = contrast.join_soft_keys(found, (partner, own))
        if side.queue is not None:
            found = contrast.join_soft_keys(found, side.queue.soft_keys(side.teachers, both.temperature, left_out))
        return found[0]

    def queues(self) -> Mapping[str, tuple[QueueOptions, int]]:
        """Image keys and text keys."""
        return dict.fromkeys(("image", "text"), (self.config, self.embed)) if self.config.queue > 0 else {}

    def keys(self, enc: EncodingsLike, batch: Batch, shared: tuple[Tensor, ...]) -> Mapping[str, Keys]:
        """The twin's embeddings."""
        if self.config.queue == 0:
            return {}
        image, text, *ids = shared or (*self._twins(enc), batch.pair_id)
        known = ids[0] if ids and self.config.same_picture != "negative" else None
        return {name: Keys(keys.detach(), known, self.whole) for name, keys in (("image", image), ("text", text))}

    def limits(self) -> list[tuple[nn.Parameter, float, float]]:
        """The temperature's."""
        return [self.temperature[0].limits()]

    def passes(self) -> dict[str, float]:
        """Text and picture alone, also by the twin if its keys are used."""
        own = [f"encode_text:{self.config.text}", f"encode_visual:{self.config.visual}"]
        twin = [f"momentum.encode_text:{self.config.text}", f"momentum.encode_visual:{self.twin_view}"]
        return dict.fromkeys(own + (twin if self.momentum else []), 1.0)

    def head_flops(self, batch: Batch) -> tuple[int, int]:
        """The similarity matrices."""
        columns = len(batch) * (distributed.world_size() if self.whole else 1) + self.config.queue
        both = 2 * 2 * len(batch) * columns * self.embed
        return both, 2 * both if self.config.soften > 0 else 0

    def _embeds(self, enc: EncodingsLike) -> tuple[Tensor, Tensor]:
        return embed_of(enc.visual(self.config.visual)), embed_of(enc.text(self.config.text))

    def _twins(self, enc: EncodingsLike) -> tuple[Tensor, Tensor]:
        return embed_of(enc.momentum.visual(self.twin_view)), embed_of(enc.momentum.text(self.config.text))

    def _queue(self, enc: EncodingsLike, name: str) -> KeyQueue | None:
        return enc.queue(name) if self.config.queue > 0 else None


build = Itc
