"""Image-text contrast with momentum keys, queues and soft targets (ALBEF, equations 1, 2 and 6)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlscale import distributed
from vlscale.nn.momentum import softening
from vlscale.nn.queue import KeyQueue
from vlscale.objectives.base import EncodingsLike, FamilyLike, Objective
from vlscale.types import Batch, Loss


@dataclass(frozen=True)
class Config:
    """Options; the defaults are ALBEF's (configs/Pretrain.yaml)."""

    weight: float = 1.0
    text: str = "clean"  # view
    visual: str = "clean"  # view
    queue: int = 65536  # keys of earlier steps on each side; 0 = none
    queue_start: Literal["random", "empty"] = "random"
    soften: float = 0.4  # share of the twin's similarities in the targets
    soften_warmup: int = 0  # steps from 0 to that share; the authors take one epoch
    scope: Literal["rank"] = "rank"  # columns: this rank's micro-batch, then the queue
    same_picture: Literal["negative", "positive"] = "negative"  # other captions of the same picture


class Pending(NamedTuple):
    """Keys that wait for `commit`."""

    image: Tensor  # [B, E]
    text: Tensor  # [B, E]
    ids: Tensor  # [B] int64
    step: int


class Itc(Objective):
    """Each picture finds its text among the micro-batch's keys and the queue, and each text its picture."""

    needs = frozenset({"text", "visual", "embed"})
    image_queue: KeyQueue | None
    text_queue: KeyQueue | None

    def __init__(self, config: Config, family: FamilyLike) -> None:
        super().__init__()
        self.config = config
        self.weight = config.weight
        self.momentum = config.queue > 0 or config.soften > 0
        self.views = frozenset({f"text.{config.text}", f"visual.{config.visual}"})
        self.embed = family.dims.embed
        self.temperature = (family.temperature,)  # in a tuple: it is the family's submodule, not ours
        self.image_queue = self.text_queue = None
        if config.queue > 0:
            self.image_queue = KeyQueue(config.queue, self.embed, config.queue_start, seed=0)
            self.text_queue = KeyQueue(config.queue, self.embed, config.queue_start, seed=1)
        self.pending: Pending | None = None

    def forward(self, enc: EncodingsLike, batch: Batch) -> Loss:
        """Mean of the two directions' soft cross-entropies over this rank's rows, [] fp32."""
        image, text = self._embeds(enc)
        temperature = enc.family.temperature()
        image_keys, text_keys = self._embeds(enc.momentum) if self.momentum else (image, text)
        i2t = self.logits(image, text_keys, self.text_queue, temperature)
        t2i = self.logits(text, image_keys, self.image_queue, temperature)
        share = softening(enc.step, self.config.soften, self.config.soften_warmup)
        with torch.no_grad():
            i2t_soft = t2i_soft = None
            if self.config.soften > 0:
                i2t_soft = self.logits(image_keys, text_keys, self.text_queue, temperature)
                t2i_soft = self.logits(text_keys, image_keys, self.image_queue, temperature)
            i2t_targets = self.targets(i2t_soft, self._positives(batch.pair_id, self.text_queue), share)
            t2i_targets = self.targets(t2i_soft, self._positives(batch.pair_id, self.image_queue), share)
        i2t_loss, t2i_loss = _soft_cross_entropy(i2t, i2t_targets), _soft_cross_entropy(t2i, t2i_targets)
        if self.image_queue is not None:
            self.pending = Pending(image_keys.detach(), text_keys.detach(), batch.pair_id, enc.step)
        metrics = {
            "itc/i2t": i2t_loss.detach(),
            "itc/t2i": t2i_loss.detach(),
            "itc/accuracy": (_accuracy(i2t) + _accuracy(t2i)) / 2,
            "temperature": temperature.detach()[0],
            **self._queue_metrics(enc.step),
        }
        return Loss((i2t_loss + t2i_loss) / 2, metrics)

    def logits(self, queries: Tensor, keys: Tensor, queue: KeyQueue | None, temperature: Tensor) -> Tensor:
        """Similarity over temperature, [B, B + queue] fp32: the micro-batch's columns, then the queue's."""
        columns = queries @ keys.T
        if queue is not None:
            stored = queries @ queue.keys.to(queries.dtype).T
            if not queue.full_from_start:  # an unused place weighs nothing and keeps 0 * log finite
                stored = stored.masked_fill(~queue.valid(), -1e4)
            columns = torch.cat([columns, stored], dim=1)
        return columns / temperature

    def targets(self, soft: Tensor | None, positives: Tensor, share: float) -> Tensor:
        """share * softmax(the twin's logits) + (1 - share) * the true columns (ALBEF, equation 6)."""
        hard = positives / positives.sum(dim=1, keepdim=True)
        return hard if soft is None else torch.lerp(hard, soft.softmax(dim=1), share)

    def commit(self) -> None:
        """Push the last micro-batch's keys of all ranks, in rank order."""
        pending, self.pending = self.pending, None
        if pending is None or self.image_queue is None or self.text_queue is None:
            return
        bits = [part.float().contiguous().view(torch.int32) for part in (pending.image, pending.text)]
        packed = torch.cat([*bits, pending.ids[:, None].contiguous().view(torch.int32)], dim=1)
        packed = distributed.gather_no_grad(packed)
        image, text = packed[:, : self.embed], packed[:, self.embed : 2 * self.embed]
        pair_ids = packed[:, 2 * self.embed :].contiguous().view(torch.int64)[:, 0]
        self.image_queue.push(image.contiguous().view(torch.float32), pair_ids, pending.step)
        self.text_queue.push(text.contiguous().view(torch.float32), pair_ids, pending.step)

    def limits(self) -> list[tuple[nn.Parameter, float, float]]:
        """The temperature's."""
        return [self.temperature[0].limits()]

    def passes(self) -> dict[str, float]:
        """Text and picture alone, also by the twin if its keys are used."""
        own = [f"encode_text:{self.config.text}", f"encode_visual:{self.config.visual}"]
        return dict.fromkeys(own + [f"momentum.{name}" for name in own if self.momentum], 1.0)

    def head_flops(self, batch: Batch) -> tuple[int, int]:
        """The similarity matrices."""
        both = 2 * 2 * len(batch) * (len(batch) + self.config.queue) * self.embed
        return both, both if self.config.soften > 0 else 0

    def _embeds(self, enc: EncodingsLike) -> tuple[Tensor, Tensor]:
        image, text = enc.visual(self.config.visual).embed, enc.text(self.config.text).embed
        assert image is not None, "a family that offers `embed` fills Stream.embed"
        assert text is not None, "a family that offers `embed` fills Stream.embed"
        return image, text

    def _positives(self, ids: Tensor, queue: KeyQueue | None) -> Tensor:
        columns = len(ids) + (queue.capacity if queue is not None else 0)
        if self.config.same_picture == "negative":
            return torch.eye(len(ids), columns, device=ids.device)
        known = ids if queue is None else torch.cat([ids, queue.ids])
        return (ids[:, None] == known[None, :]).float()

    def _queue_metrics(self, step: int) -> dict[str, Tensor]:
        named = {"image": self.image_queue, "text": self.text_queue}
        return {
            f"queue/{name}/{figure}": value
            for name, queue in named.items()
            if queue is not None
            for figure, value in queue.metrics(step).items()
        }


def _soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return -(F.log_softmax(logits, dim=1) * targets).sum(dim=1).mean()


def _accuracy(logits: Tensor) -> Tensor:
    rows = torch.arange(len(logits), device=logits.device)
    return (logits.detach()[:, : len(logits)].argmax(dim=1) == rows).float().mean()


build = Itc
