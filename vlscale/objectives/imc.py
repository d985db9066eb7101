"""Contrast within one modality: two views of a picture (MoCo, He et al. 2020), and the same text twice (TCL, Yang et
al. 2022, section 3.2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vlscale import distributed
from vlscale.errors import ConfigError
from vlscale.nn import contrast
from vlscale.nn.queue import QueueOptions
from vlscale.objectives.base import EncodingsLike, FamilyLike, Objective, embed_of
from vlscale.types import Batch, Keys, Loss

SIDES = {"both": ("image", "text"), "visual": ("image",), "text": ("text",)}
TERMS = {"image": "i2i", "text": "t2t"}


@dataclass(frozen=True)
class Config(QueueOptions):
    """Options; the queues `image` and `text` are those of `itc`. TCL's weight is 1/3, next to `itc` and `lmi`."""

    weight: float = 1.0
    text: str = "clean"  # view, of both networks: the positive pair differs by dropout and the twin's weights alone
    visual: str = "clean"  # view
    momentum_visual: str | None = None  # view that the twin sees; None = the same (TCL, MoCo: a second augmentation)
    sides: Literal["both", "visual", "text"] = "both"  # MoCo: visual
    batch_keys: Literal["all", "own"] = "all"  # columns before the queue's: the batch's keys, or the own one (MoCo)
    scope: Literal["rank", "global"] = "rank"  # whose keys those are: of this micro-batch, or of the whole step
    same_picture: Literal["negative", "positive", "excluded"] = "negative"  # other keys of the same picture


class Imc(Objective):
    """Each sample finds its own key, made by the twin, among other keys of the same modality."""

    needs = frozenset({"text", "visual", "embed", "temperature"})
    momentum = True

    def __init__(self, config: Config, family: FamilyLike) -> None:
        super().__init__()
        _check(config)
        self.config = config
        self.weight = config.weight
        self.sides = SIDES[config.sides]
        self.whole = config.scope == "global"
        self.twin_view = config.momentum_visual or config.visual
        views = set()
        if "image" in self.sides:
            views |= {f"visual.{config.visual}", f"visual.{self.twin_view}"}
        if "text" in self.sides:
            views.add(f"text.{config.text}")
        self.views = frozenset(views)
        self.needs = frozenset({"embed", "temperature", *(view.partition(".")[0] for view in views)})
        self.embed = family.dims.embed
        self.temperature = (family.temperature,)  # in a tuple: it is the family's submodule, not ours

    def share(self, enc: EncodingsLike, batch: Batch) -> tuple[Tensor, ...]:
        """The twin's keys [b, E] of each side (in the queue's type) and, where they matter, pair ids."""
        for side in self.sides:
            self._queries(enc, side)
        keys = [self._keys(enc, side) for side in self.sides]
        if self.config.queue > 0 and self.config.queue_dtype == "bf16":
            keys = [each.bfloat16() for each in keys]
        return tuple(keys) if self.config.same_picture == "negative" else (*keys, batch.pair_id)

    def forward(self, enc: EncodingsLike, batch: Batch, shared: tuple[Tensor, ...] = ()) -> Loss:
        """Mean over the sides of the cross-entropies over this rank's rows, [] fp32.

        `imc/accuracy` is the share of rows whose own key is the most similar of the batch's, queue apart.
        """
        losses, rights, metrics = [], [], {}
        for number, side in enumerate(self.sides):
            columns = shared[number] if shared else self._keys(enc, side)
            column_ids = (shared or (batch.pair_id,))[-1]  # the last tensor shared, unless same_picture is negative
            loss, right = self._side(enc, side, columns, batch.pair_id, column_ids)
            metrics[f"imc/{TERMS[side]}"] = loss.detach()
            losses.append(loss)
            rights.append(right)
        metrics["imc/accuracy"] = torch.stack(rights).mean()
        return Loss(torch.stack(losses).mean(), metrics)

    def _side(
        self, enc: EncodingsLike, side: str, columns: Tensor, ids: Tensor, column_ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mean over rows of log-sum-exp - logit of the positive, and the accuracy."""
        queries, temperature = self._queries(enc, side), enc.family.temperature()
        left_out = ids if self.config.same_picture == "excluded" else None
        apart = None if left_out is None else (left_out, column_ids)
        partner = columns.narrow(0, enc.first if self.whole else 0, len(queries)).float()
        positive = (queries * partner).sum(dim=1) / temperature
        if self.config.batch_keys == "all":
            total, best = contrast.log_sum_exp(queries, columns, temperature, apart=apart)
            if apart is not None:  # the partner has the row's own id
                total = torch.logaddexp(total, positive)
        else:
            total = positive
            with torch.no_grad():
                _, best = contrast.log_sum_exp(queries, columns, temperature, apart=apart)
        if self.config.queue > 0:
            total = torch.logaddexp(total, enc.queue(side).log_sum_exp(queries, temperature, left_out))
        if self.config.same_picture == "positive":
            target = self._true_keys(enc, side, partner, columns, ids, column_ids)
            loss = total - (queries * target).sum(dim=1) / temperature
        else:
            loss = total - positive
        right = positive.detach() >= best - 1e-5 * (1 + best.abs())  # rounding apart, the own key is the best
        return loss.mean(), right.float().mean()

    def _true_keys(
        self, enc: EncodingsLike, side: str, partner: Tensor, columns: Tensor, ids: Tensor, column_ids: Tensor
    ) -> Tensor:
        """[b, E] mean of all keys of the row's picture that are columns."""
        total, count = partner, torch.ones(len(partner), device=partner.device)
        if self.config.batch_keys == "all":
            total, count = contrast.sum_of_id(ids, columns, column_ids)
        if self.config.queue > 0:
            more, further = enc.queue(side).sum_of_id(ids)
            total, count = total + more, count + further
        return total / count[:, None]

    def queues(self) -> Mapping[str, tuple[QueueOptions, int]]:
        """Image keys, text keys."""
        return dict.fromkeys(self.sides, (self.config, self.embed)) if self.config.queue > 0 else {}

    def keys(self, enc: EncodingsLike, batch: Batch, shared: tuple[Tensor, ...]) -> Mapping[str, Keys]:
        """The twin's embeddings."""
        if self.config.queue == 0:
            return {}
        given = shared or (*(self._keys(enc, side) for side in self.sides), batch.pair_id)
        ids = None if self.config.same_picture == "negative" else given[-1]
        return {side: Keys(given[number].detach(), ids, self.whole) for number, side in enumerate(self.sides)}

    def limits(self) -> list[tuple[nn.Parameter, float, float]]:
        """The temperature's."""
        return [self.temperature[0].limits()]

    def passes(self) -> dict[str, float]:
        """Each side alone, by both networks."""
        names = []
        if "image" in self.sides:
            names += [f"encode_visual:{self.config.visual}", f"momentum.encode_visual:{self.twin_view}"]
        if "text" in self.sides:
            names += [f"{net}encode_text:{self.config.text}" for net in ("", "momentum.")]
        return dict.fromkeys(names, 1.0)

    def head_flops(self, batch: Batch) -> tuple[int, int]:
        """The similarity matrices."""
        of_batch = len(batch) * (distributed.world_size() if self.whole else 1)
        each = 2 * len(self.sides) * len(batch) * self.embed
        if self.config.batch_keys == "own":  # the batch's keys are for the accuracy alone
            return each * self.config.queue, each * of_batch
        return each * (of_batch + self.config.queue), 0

    def _queries(self, enc: EncodingsLike, side: str) -> Tensor:
        return embed_of(enc.visual(self.config.visual) if side == "image" else enc.text(self.config.text))

    def _keys(self, enc: EncodingsLike, side: str) -> Tensor:
        twin = enc.momentum
        return embed_of(twin.visual(self.twin_view) if side == "image" else twin.text(self.config.text))


def _check(config: Config) -> None:
    if config.batch_keys == "own" and config.scope == "global":
        raise ConfigError(
            "objectives.imc has batch_keys=own, whose columns are the own key and the queue's, and scope=global, "
            "which looks at the whole step's; write scope=rank"
        )
    if config.batch_keys == "own" and config.queue == 0:
        raise ConfigError("objectives.imc has batch_keys=own and queue=0, so nothing to contrast with; give a queue")
    if config.scope == "global" and config.queue_push == "micro_batch":
        raise ConfigError(
            "objectives.imc has scope=global, whose keys are the whole step's, and queue_push=micro_batch; "
            "write queue_push=step"
        )


build = Imc
