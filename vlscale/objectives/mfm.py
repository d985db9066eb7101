"""Masked frame modelling: the features of a hidden frame, found among those of other frames (CBT, Sun et al. 2019,
arXiv 1906.05743; UniVL's CMFM, Luo et al. 2020, arXiv 2002.06353; HERO's MNCE, Li et al. 2020, arXiv 2005.00200)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vlscale import distributed
from vlscale.errors import ConfigError
from vlscale.nn import contrast
from vlscale.nn.region_head import RegionHead, hidden_regions
from vlscale.objectives.base import EncodingsLike, FamilyLike, Objective
from vlscale.types import Batch, Loss, Visual, lengthened


@dataclass(frozen=True)
class Config:
    """Options. CBT: head none, states visual; UniVL: head tied, text masked; HERO: candidates hidden_and_predicted,
    padding counted, scope rank. CBT's and UniVL's authors take the candidates of one rank too."""

    weight: float = 1.0
    text: str = "clean"  # view; not read with `states: visual`
    visual: str = "masked"  # view
    states: Literal["fused", "visual"] = "fused"  # what predicts: beside a text, or of the frames alone
    # what stands between a state and the keys: a head, one with the matrix that features enter the family by, nothing
    head: Literal["untied", "tied", "none"] = "untied"
    # all: the keys of every frame of the batch; video: of the same sample's frames;
    # hidden_and_predicted: the keys of hidden frames, and what is predicted in the places of all others
    candidates: Literal["all", "video", "hidden_and_predicted"] = "all"
    padding: Literal["excluded", "counted"] = "excluded"  # counted: what is predicted in empty places too
    temperature: float = 1.0
    scope: Literal["rank", "global"] = "global"  # candidates and mean: of this micro-batch, or of the whole step


class Mfm(Objective):
    """-log softmax at a hidden frame's own key, among the keys of candidates, by dot products.

    The keys are `Family.frame_keys` of the frames before anything was hidden; gradient reaches them too.
    """

    fields = frozenset({"targets"})
    needs = frozenset({"text", "visual", "fuse", "regions", "frames"})  # with `states: visual` fewer

    def __init__(self, config: Config, family: FamilyLike) -> None:
        super().__init__()
        width = family.dims.frame_keys or family.dims.feats
        _check(config, family.dims.visual, width)
        self.config = config
        self.weight = config.weight
        self.views = frozenset({f"visual.{config.visual}"})
        if config.states == "fused":
            self.views |= {f"text.{config.text}"}
        else:
            self.needs = frozenset({"visual", "frames"})
        if config.head == "tied":
            self.needs = self.needs | {"tied_regions"}
        self.uneven = config.candidates == "video"
        self.whole = config.scope == "global" and config.candidates == "all"
        self.width, self.window = width, family.inputs.window
        self.frames = -(-family.inputs.frames // self.window)
        self.head = None
        if config.head != "none":
            self.head = RegionHead(family.dims.visual, width, config.head == "tied", family.dims.norm_eps)

    def share(self, enc: EncodingsLike, batch: Batch) -> tuple[Tensor, ...]:
        """Keys [b, n, T, F] and which frames are real [b, n, T] bool; n clips a sample, T the family's most frames."""
        if self.config.states == "fused":
            enc.text(self.config.text)
        enc.visual(self.config.visual)
        real = self._real(batch)
        keys = lengthened(self._keys(enc, batch), max(self.frames, real.shape[1]))
        real = lengthened(real, keys.shape[1])
        return tuple(part.view(len(batch), -1, *part.shape[1:]) for part in (keys, real))

    def forward(self, enc: EncodingsLike, batch: Batch, shared: tuple[Tensor, ...] = ()) -> Loss:
        """Mean over hidden frames, [] fp32; 0 if none is hidden."""
        picked = self.picked(batch)  # [b * n, T]
        one = torch.full((1,), self.config.temperature, device=picked.device)
        if self.config.candidates == "video":
            positives, others, best, number = self._within(enc, batch, picked, one)
        else:
            queries, pool, real = self._candidates(enc, batch, picked, shared)
            itself = self._numbers(enc, batch, shared)[picked]
            positives = (queries * pool.index_select(0, itself).float()).sum(dim=1) / one
            columns = torch.arange(len(pool), device=pool.device)
            others, best = contrast.log_sum_exp(queries, pool, one, real, (itself, columns))
            number = real.sum().expand(len(positives))
        terms = torch.logaddexp(positives, others) - positives
        right = positives.detach() > best + 1e-5 * (1 + best.abs())  # rounding apart, better than every other
        hidden = max(len(terms), 1)
        metrics = {"mfm/accuracy": right.sum() / hidden, "mfm/chance": (1 / number.clamp(min=1)).sum() / hidden}
        return Loss(terms.sum() / hidden, metrics)

    def _candidates(
        self, enc: EncodingsLike, batch: Batch, picked: Tensor, shared: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [M, F] fp32; candidates [C, F], all places in order, and which of them exist [C] bool."""
        states, real = self._states(enc), self._real(batch)
        if self.config.candidates == "all":
            keys, real = shared or (self._keys(enc, batch), real)
            return self._predict(enc, states[picked]), keys.flatten(0, -2), real.flatten()
        predicted = self._predict(enc, states)  # [b * n, T, F]
        pool = torch.where(picked[..., None], self._keys(enc, batch).float(), predicted)
        if self.config.padding == "counted":
            real = torch.ones_like(real)
        return predicted[picked], pool.flatten(0, 1), real.flatten()

    def _numbers(self, enc: EncodingsLike, batch: Batch, shared: tuple[Tensor, ...]) -> Tensor:
        """[b * n, T] int64, the places of own frames among the candidates."""
        rows, frames = self._real(batch).shape
        first, length = 0, frames
        if shared:
            first, length = enc.first * rows // len(batch), shared[0].shape[2]
        places = torch.arange(rows * length, device=shared[0].device if shared else batch.pair_id.device)
        return (places + first * length).view(rows, length)[:, :frames]

    def _within(
        self, enc: EncodingsLike, batch: Batch, picked: Tensor, temperature: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Own logit, log-sum-exp of the others, their greatest, and the number of candidates, [M] each, where only
        frames of the same sample count."""
        samples = len(batch)
        queries = self._predict(enc, self._states(enc)[picked])
        asked, real = (each.view(samples, -1) for each in (picked, self._real(batch)))  # [b, n * T]
        filled = queries.new_zeros((*asked.shape, self.width)).masked_scatter(asked[..., None], queries)
        keys = self._keys(enc, batch).float().view(filled.shape)
        with torch.autocast(keys.device.type, enabled=False):
            products = (filled / temperature) @ keys.transpose(1, 2)  # [b, n * T, n * T]
        own = torch.eye(asked.shape[1], dtype=torch.bool, device=keys.device)
        others = products.masked_fill(~real[:, None] | own, contrast.NEVER)[asked]
        number = real.sum(dim=1, keepdim=True).expand(asked.shape)[asked]
        return products.diagonal(dim1=1, dim2=2)[asked], others.logsumexp(dim=1), others.detach().amax(dim=1), number

    def picked(self, batch: Batch) -> Tensor:
        """[b * n, T] bool, real frames that are hidden; of a window the first tells."""
        return hidden_regions(self._visual(batch))[:, :: self.window]

    def count(self, batch: Batch) -> Tensor | None:
        """[] int64 hidden frames; None with `scope: rank`."""
        return self.picked(batch).sum() if self.config.scope == "global" else None

    def passes(self) -> dict[str, float]:
        """The frames, with `states: fused` the text and both together."""
        text, visual = self.config.text, self.config.visual
        names = [f"encode_visual:{visual}"]
        if self.config.states == "fused":
            names += [f"encode_text:{text}", f"fuse:{text}:{visual}"]
        return dict.fromkeys(names, 1.0)

    def head_flops(self, batch: Batch) -> tuple[int, int]:
        """The head, and the products with all candidates."""
        rows, frames = self._real(batch).shape
        places, hidden = rows * frames, int(self.picked(batch).sum())
        asked = hidden
        if self.config.candidates == "hidden_and_predicted":
            asked = places
        head = self.head.flops(asked) if self.head is not None else 0
        if self.config.candidates == "video":
            return head + 2 * places * places // len(batch) * self.width, 0
        if self.whole:
            places = rows * max(self.frames, frames) * distributed.world_size()
        return head + 2 * hidden * places * self.width, 0

    def _states(self, enc: EncodingsLike) -> Tensor:
        """[b * n, T, D]."""
        if self.config.states == "visual":
            return enc.visual(self.config.visual).hidden
        states = enc.fused(self.config.text, self.config.visual).visual
        assert states is not None, "a family that offers `regions` fills Fused.visual"
        return states

    def _predict(self, enc: EncodingsLike, states: Tensor) -> Tensor:
        """[..., D] -> [..., F] fp32."""
        if self.head is None:
            return states.float()
        tied = self.config.head == "tied"
        out: Tensor = self.head(states, enc.family.region_projection.weight.T) if tied else self.head(states)
        return out.float()

    def _keys(self, enc: EncodingsLike, batch: Batch) -> Tensor:
        """[b * n, T, F]."""
        made = enc.visual(self.config.visual).keys
        if made is not None:
            return made
        visual = self._visual(batch)
        assert visual.targets is not None, "the masked view carries the features it hid"
        return enc.family.frame_keys(visual._replace(feats=visual.targets, picked=None))

    def _real(self, batch: Batch) -> Tensor:
        """[b * n, T] bool."""
        visual = self._visual(batch)
        mask = visual.mask
        if mask is None:
            mask = torch.ones(visual.feats.shape[:2], dtype=torch.bool, device=visual.feats.device)
        return mask[:, :: self.window]

    def _visual(self, batch: Batch) -> Visual:
        return batch.visual[self.config.visual]


def _check(config: Config, states: int, keys: int) -> None:
    if config.head == "none" and states != keys:
        raise ConfigError(
            f"objectives.mfm has head=none, but states are {states} wide and the keys {keys}; write head=untied"
        )
    if config.candidates == "hidden_and_predicted" and config.scope == "global":
        raise ConfigError(
            "objectives.mfm has candidates=hidden_and_predicted, which are this micro-batch's own, and scope=global; "
            "write scope=rank"
        )
    if config.padding == "counted" and config.candidates != "hidden_and_predicted":
        raise ConfigError(
            f"objectives.mfm has padding=counted, which only candidates=hidden_and_predicted can have, "
            f"and candidates={config.candidates}; leave padding out"
        )
    if config.temperature <= 0:
        raise ConfigError(f"objectives.mfm.temperature should be above 0 (got {config.temperature:g})")


build = Mfm
