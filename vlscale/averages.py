"""The momentum twin at every ZeRO stage: fp32 averages of the fp32 masters, kept where ZeRO keeps the masters.

| stage | averages on a rank | what a step costs |
|---|---|---|
| plain PyTorch, 0 | whole | one lerp, one rounding copy |
| 1, 2 | of its part of each group's flat master | the same on 1/W, and one all-gather per group at training precision |
| 3 | of its part of each sub-group's flat master | the same on 1/W, and an all-gather of the small parameters |

At stages 1 to 3 whole flat buffers are followed, so what a group holds beside the twin's partners (the heads of
the objectives) rides along: 4 bytes per such parameter over W, and at stages 1 and 2 its place in the flat twin.
With the optimizer offloaded, masters and averages are on the host. In fp32 a twin is its own average wherever it
lies beside the masters. A frozen parameter's twin is the same for ever: it has no average.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlscale import distributed
from vlscale.nn import momentum
from vlscale.saving.state import Span, place

Pairs = Sequence[tuple[nn.Parameter, nn.Parameter]]  # (online, twin)


@dataclass(frozen=True)
class Averages:
    """What this rank keeps of a momentum twin. Made by `whole`, `partitioned` or `sharded`."""

    masters: Sequence[Tensor] = ()  # fp32, moved by the optimizer
    averages: Sequence[Tensor] = ()  # fp32, of the masters' shapes and beside them
    rounded: Sequence[tuple[Tensor, Tensor]] = ()  # (a place in the twin, what of the averages is shown there)
    gathered: Sequence[tuple[Tensor, Tensor]] = ()  # (a flat twin, this rank's part of it)
    small: Sequence[Any] = ()  # stage 3: parameters of the twin that ZeRO also keeps whole on every rank

    @torch.no_grad()
    def update(self, coefficient: float) -> None:
        """average <- coefficient * average + (1 - coefficient) * master; the twin follows. All ranks take part."""
        momentum.update(self.averages, self.masters, coefficient)
        self.show()

    @torch.no_grad()
    def show(self) -> None:
        """Round the averages into the twin, and bring every rank what it sees of the others' parts."""
        if self.rounded:
            places, shown = zip(*self.rounded, strict=True)
            torch._foreach_copy_(list(places), list(shown))
        for flat, part in self.gathered:
            distributed.gather_parts_(flat, part)
        if self.small:
            for parameter in self.small:
                parameter.partition()
            self.small[0].all_gather(list(self.small))


def whole(pairs: Pairs, spans: Sequence[Span]) -> Averages:
    """Every rank keeps all of it: plain PyTorch and ZeRO 0.

    Args:
        pairs: (online, twin), none frozen.
        spans: of every trainable parameter, whole.
    """
    masters = {span.parameter: span.flat for span in spans}
    twins = [twin.data for _, twin in pairs]
    averages = [twin.float() for twin in twins]  # an fp32 tensor is returned as it is
    return Averages(
        [masters[online].detach() for online, _ in pairs], averages, _to_round(zip(twins, averages, strict=True))
    )


@torch.no_grad()
def partitioned(pairs: Pairs, weights: Sequence[Tensor], masters: Sequence[Tensor]) -> Averages:
    """Each rank keeps its part of each group: ZeRO 1 and 2. The twin's parameters become views of flat buffers.

    Args:
        pairs: (online, twin), none frozen; both whole on every rank.
        weights: [n] each, flat training-precision weights of each group, of which the online parameters are views.
        masters: [n / W] each, this rank's part of each group's fp32 masters.
    """
    flats: dict[int, Tensor] = {}
    for mine, twin in pairs:
        group, start = place(mine, weights)
        if group not in flats:
            flats[group] = weights[group].detach().clone()
        flat = flats[group]
        twin.data = flat[start : start + mine.numel()].view_as(twin).copy_(twin)
    followed = [masters[group].detach() for group in flats]
    parts = [flat.chunk(distributed.world_size())[distributed.rank()] for flat in flats.values()]
    averages = [part.to(master.device, torch.float32) for part, master in zip(parts, followed, strict=True)]
    gathered = list(zip(flats.values(), parts, strict=True))
    return Averages(followed, averages, _to_round(zip(parts, averages, strict=True)), gathered)


@torch.no_grad()
def sharded(pairs: Pairs, spans: Sequence[Span]) -> Averages:
    """Each rank keeps its part of each parameter: ZeRO 3. Nothing is gathered but what ZeRO keeps whole anyway.

    Args:
        pairs: (online, twin), none frozen; both partitioned.
        spans: of every trainable parameter that has a part here.
    """
    averages: dict[Tensor, Tensor] = {}
    rounded = []
    twins = dict(pairs)
    for span in spans:
        if span.parameter not in twins:
            continue
        shard: Tensor = twins[span.parameter].ds_tensor  # type: ignore[attr-defined]
        if span.flat not in averages:
            averages[span.flat] = span.flat.detach().clone()
        average = averages[span.flat]
        shown = average[span.start : span.start + shard.numel()].view_as(shard).copy_(shard)  # padding too
        if shard.dtype == average.dtype and shard.device == average.device:
            shard.data = shown
        rounded.append((shard.data, shown))
    masters = [master.detach() for master in averages]
    small = [twin for _, twin in pairs if getattr(twin, "ds_persist", False)]
    return Averages(masters, list(averages.values()), _to_round(rounded), (), small)


def _to_round(shown: Any) -> list[tuple[Tensor, Tensor]]:
    """Without the places that are the averages themselves."""
    return [(place, average) for place, average in shown if place.data_ptr() != average.data_ptr()]
