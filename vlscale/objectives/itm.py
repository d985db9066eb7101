"""Image-text matching with hard negatives (ALBEF, equation 4, section 3.2) of the micro-batch or the whole step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlscale import distributed
from vlscale.errors import ConfigError
from vlscale.nn.bert import init_normal
from vlscale.objectives.base import EncodingsLike, FamilyLike, Objective, embed_of
from vlscale.types import Batch, Fused, Loss, Stream, lengthened

PICTURES, TEXTS = 1, 2  # salts of the two draws


@dataclass(frozen=True)
class Config:
    """Options. Hard negatives are drawn in proportion to softmax(similarity / temperature)."""

    weight: float = 1.0
    text: str = "clean"  # view
    visual: str = "clean"  # view
    negatives: Literal["hard", "loader"] = "hard"  # loader: some of the batch's pairs do not match (`Batch.matched`)
    keys: Literal["momentum", "online"] = "momentum"  # whose embeddings the online ones are compared with
    momentum_visual: str | None = None  # view that the twin sees; None = the same (TCL: a second augmentation)
    scope: Literal["rank", "global"] = "rank"  # drawn from this micro-batch (authors), or from the whole step's batch
    same_picture: Literal["negative", "excluded"] = "excluded"  # authors: negative
    bias: bool = True  # of the head (SOHO: False)
    epsilon: float = 1e-4  # added to each weight: 64 weights can underflow to one-hot (ALBEF issues 18, 93)


class Itm(Objective):
    """Hard: a true pair among three, each text with a wrong picture, each picture with a wrong text.
    Loader: the batch's own pairs (ViLBERT, LXMERT, UNITER)."""

    needs = frozenset({"text", "visual", "fuse"})  # and with hard negatives: embed, temperature

    def __init__(self, config: Config, family: FamilyLike) -> None:
        super().__init__()
        self.config = config
        self.weight = config.weight
        self.hard = config.negatives == "hard"
        self.uneven = not self.hard
        if self.hard:
            self.needs = self.needs | {"embed", "temperature"}
        self.momentum = self.hard and config.keys == "momentum"
        self.whole = self.hard and config.scope == "global"
        self.twin_view = (config.momentum_visual or config.visual) if self.momentum else config.visual
        views = {f"text.{config.text}", f"visual.{config.visual}", f"visual.{self.twin_view}"}
        self.views = frozenset(views if self.hard else views | {"pairs.mismatch"})
        self.embed = family.dims.embed
        width = family.dims.pooled or family.dims.fused
        self.head = nn.Linear(width, 2, bias=config.bias)  # column 1 = match
        if not self.hard:  # UNITER, LXMERT and ViLBERT start it as BERT, ALBEF as torch does
            init_normal(self.head)

    def share(self, enc: EncodingsLike, batch: Batch) -> tuple[Tensor, ...]:
        """Image keys, text keys [b, E] and pair ids; the draws alone look at them, without gradient."""
        enc.text(self.config.text), enc.visual(self.config.visual)
        image, text = self._keys(enc)
        return image, text, batch.pair_id

    def forward(self, enc: EncodingsLike, batch: Batch, shared: tuple[Tensor, ...] = ()) -> Loss:
        """Mean cross-entropy over B matched and 2 B mismatched pairs, or over the batch's B pairs, [] fp32.

        Raises:
            ConfigError: there is only one sample to draw from.
        """
        if not self.hard:
            pairs = _pooled(enc.fused(self.config.text, self.config.visual))
            return self._loss(pairs, _matched(batch))
        image_keys, text_keys, ids = shared or (*self._keys(enc), batch.pair_id)
        if len(ids) < 2:
            raise ConfigError(
                "objectives.itm draws negatives among other samples and got one; set data.batch to at least 2"
                if self.whole
                else "objectives.itm draws negatives within a micro-batch and got one sample; "
                "set data.micro_batch to at least 2, or objectives.itm.scope=global"
            )
        text, visual = enc.text(self.config.text), enc.visual(self.config.visual)
        true = _pooled(enc.fused(self.config.text, self.config.visual))
        with torch.no_grad():
            pictures, texts = self.draw(enc, *self.weights(enc, batch.pair_id, image_keys, text_keys, ids))
        if self.whole:
            wrong_pictures = enc.rows("visual", self.config.visual, pictures)
            wrong_texts = enc.rows("text", self.config.text, texts)
        else:
            wrong_pictures, wrong_texts = _rows(visual, pictures), _rows(text, texts)
        false = _pooled(enc.family.fuse(_join(text, wrong_texts), _join(wrong_pictures, visual)))
        return self._loss(torch.cat([true, false]), torch.arange(3 * len(batch), device=ids.device) < len(batch))

    def _loss(self, pooled: Tensor, labels: Tensor) -> Loss:
        """Of pairs [N, D] and whether they match [N] bool."""
        logits, classes = self.logits(pooled), labels.long()
        accuracy = (logits.detach().argmax(dim=1) == classes).float().mean()
        return Loss(F.cross_entropy(logits, classes), {"itm/accuracy": accuracy}, {"itm/accuracy": classes})

    def logits(self, pooled: Tensor) -> Tensor:
        """[N, D] -> [N, 2] fp32; column 1 = match."""
        out: Tensor = self.head(pooled).float()
        return out

    def weights(
        self, enc: EncodingsLike, own: Tensor, image_keys: Tensor, text_keys: Tensor, ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        """How likely each column is drawn: [B, C] pictures for each text, [B, C] texts for each picture."""
        image, text = embed_of(enc.visual(self.config.visual)), embed_of(enc.text(self.config.text))
        temperature = enc.family.temperature()
        allowed = self._allowed(enc.first if self.whole else 0, own, ids)
        t2i = (text @ image_keys.float().T / temperature).softmax(dim=1) + self.config.epsilon
        i2t = (image @ text_keys.float().T / temperature).softmax(dim=1) + self.config.epsilon
        return t2i * allowed, i2t * allowed

    def draw(self, enc: EncodingsLike, t2i: Tensor, i2t: Tensor) -> tuple[Tensor, Tensor]:
        """[B] int64 columns: pictures for the texts, then texts for the pictures.

        Over the whole step's batch the draws are those of the sample, so that ranks do not change them; within
        a micro-batch they are torch's.
        """
        if self.whole:
            return _inverse(t2i, enc.uniforms(PICTURES)), _inverse(i2t, enc.uniforms(TEXTS))
        # what is not a number would end the run here, where the step's gradients tell all ranks to skip it
        pictures, texts = (torch.multinomial(each.nan_to_num(nan=1.0), 1)[:, 0] for each in (t2i, i2t))
        return pictures, texts

    def count(self, batch: Batch) -> Tensor | None:
        """[] int64 pairs; None with hard negatives, drawn from as many samples in each micro-batch."""
        return None if self.hard else torch.tensor(len(batch), device=batch.pair_id.device)

    def passes(self) -> dict[str, float]:
        """The shared ones, and two fusion passes for the 2 B mismatched rows."""
        text, visual = self.config.text, self.config.visual
        if not self.hard:
            return dict.fromkeys([f"encode_text:{text}", f"encode_visual:{visual}", f"fuse:{text}:{visual}"], 1.0)
        shared = [f"encode_text:{text}", f"encode_visual:{visual}", f"fuse:{text}:{visual}"]
        if self.momentum:
            shared += [f"momentum.encode_text:{text}", f"momentum.encode_visual:{self.twin_view}"]
        return {**dict.fromkeys(shared, 1.0), "fuse": 2.0}

    def head_flops(self, batch: Batch) -> tuple[int, int]:
        """The head on 3 B rows; the two similarity matrices of the draw."""
        if not self.hard:
            return 2 * len(batch) * self.head.in_features * self.head.out_features, 0
        head = 2 * 3 * len(batch) * self.head.in_features * self.head.out_features
        columns = len(batch) * (distributed.world_size() if self.whole else 1)
        return head, 2 * 2 * len(batch) * columns * self.embed

    def _keys(self, enc: EncodingsLike) -> tuple[Tensor, Tensor]:
        source = enc.momentum if self.momentum else enc
        image, text = source.visual(self.twin_view), source.text(self.config.text)
        return embed_of(image), embed_of(text)

    def _allowed(self, first: int, own: Tensor, ids: Tensor) -> Tensor:
        """[B, C] bool: everything but the partner, and but other captions of its picture where there is a choice."""
        columns = torch.arange(len(ids), device=ids.device)
        others = columns[None, :] != first + torch.arange(len(own), device=ids.device)[:, None]
        if self.config.same_picture == "negative":
            return others
        allowed = own[:, None] != ids[None, :]
        # A row whose whole batch shows one picture has only its other captions to draw from.
        return torch.where(allowed.any(dim=1, keepdim=True), allowed, others)


def _inverse(weights: Tensor, uniforms: Tensor) -> Tensor:
    """One column per row in proportion to its weights [B, C], by inverting their running sum; in fp64."""
    running = weights.double().cumsum(dim=1)
    places = torch.searchsorted(running, uniforms[:, None] * running[:, -1:], right=True)[:, 0]
    return places.clamp(max=weights.shape[1] - 1)


def _matched(batch: Batch) -> Tensor:
    return batch.matched if batch.matched is not None else torch.ones_like(batch.pair_id, dtype=torch.bool)


def _pooled(fused: Fused) -> Tensor:
    assert fused.pooled is not None, "a family that offers `fuse` fills Fused.pooled"
    return fused.pooled


def _rows(stream: Stream, index: Tensor) -> Stream:
    return Stream(stream.hidden[index], None if stream.mask is None else stream.mask[index])


def _join(first: Stream, second: Stream) -> Stream:
    """Rows of both; the shorter texts are padded."""
    if first.mask is None or second.mask is None:
        return Stream(torch.cat([first.hidden, second.hidden]), None)
    length = max(first.mask.shape[1], second.mask.shape[1])
    hidden = [lengthened(part, length) for part in (first.hidden, second.hidden)]
    mask = [lengthened(part, length) for part in (first.mask, second.mask)]
    return Stream(torch.cat(hidden), torch.cat(mask))


build = Itm
