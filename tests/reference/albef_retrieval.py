"""ALBEF's fine-tuning for retrieval: its pre-training runner without words to restore, positives by picture.

Every key of the row's picture, of the batch and of the queue, is a positive (`same_picture: positive`), and no
picture is drawn as its own negative (`same_picture: excluded`). The authors clamp no temperature here.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tests.reference import albef as pretraining
from tests.reference.compare import Folder
from vlscale.families import albef
from vlscale.model import Encodings, PretrainModel
from vlscale.nn import momentum
from vlscale.objectives import itc, itm
from vlscale.objectives.base import FamilyLike
from vlscale.types import Batch, Moment, Pass, Text
from vlscale.weights import fill

Tensors = pretraining.Tensors
ADAMW = {"betas": (0.9, 0.999), "eps": 1e-8}  # as in the pre-training folder's config.json
SEGMENTS = "text_encoder.embeddings.token_type_embeddings.weight"


def run(folder: Folder) -> dict[str, pretraining.Values]:
    """{outputs file: {name: tensor}} of every step."""
    return pretraining.run_steps(folder, Runner)


class Runner(pretraining.Runner):
    """The model under the authors' weights; what a step leaves behind is recorded as in pre-training."""

    def __init__(self, folder: Folder) -> None:
        weights = folder.tensors("weights.safetensors")
        rates = {name: folder.config[name] for name in ("lr", "weight_decay")}
        sizes = {"type_vocab_size": len(weights[SEGMENTS])}
        self.config = {**folder.config, **sizes, "optimizer": {**ADAMW, **rates}}
        self.family = family = albef.build(pretraining.family_config(self.config))
        options = itm.Config(epsilon=0.0, same_picture="excluded", momentum_visual=self.twin_view)
        self.itm = itm.build(options, family)
        self.contrasts = self.build_contrasts(family)
        self.model = PretrainModel(family, {**self.contrasts, "itm": self.itm})
        fill(self.model, weights, albef.PUBLISHED)
        self.names = self._names(weights)
        self.shapes = {name: weights[name].shape for name in self.names}
        self.order = self.config.get("param_order", sorted(self.names))
        self.optimizer = self._optimizer(self.config["optimizer"])

    def build_contrasts(self, family: FamilyLike) -> dict[str, Any]:
        """The objectives whose weighted sum the authors call ita."""
        return {"itc": itc.build(itc.Config(queue=self.config["queue_size"], same_picture="positive"), family)}

    def _before(self, number: int) -> None:
        """The share of soft targets of this step, and the twin's move."""
        shares = self.config["alpha"]
        self.share = shares[min(number, len(shares) - 1)] if isinstance(shares, list) else shares
        contrasts = self.contrasts["itc"]
        contrasts.config = replace(contrasts.config, soften=self.share)
        pairs = self.model.momentum_pairs()
        with torch.no_grad():
            momentum.update([twin.data for _, twin in pairs], [one.data for one, _ in pairs], self.config["momentum"])

    def _forward(self, inputs: Tensors) -> tuple[Pass, Tensors]:
        """What the model makes of one batch, and everything recorded on the way."""
        text = Text(inputs["input_ids"], inputs["attention_mask"].bool())
        batch = Batch({"clean": text}, self.views(inputs), pair_id=inputs["idx"])
        calls, encodings = self._watch_matching(inputs), []
        hook = self.itm.register_forward_pre_hook(lambda _, given: encodings.append(given[0]))
        made = self.model(batch, Moment(step=1))
        hook.remove()
        with torch.no_grad():
            values = {**self._values(encodings[0], batch.pair_id, made.losses), **_matching(calls)}
        values |= {"loss_itm": made.losses["itm"].value, "loss_total": self.model.total(made.losses, {})}
        return made, {name: value.detach().clone() for name, value in values.items()}

    def _watch_matching(self, inputs: Tensors) -> dict[str, list[Any]]:
        """Results of the matching objective's methods, by name; its draws are the authors'."""
        forced = (inputs["neg_image_idx"], inputs["neg_text_idx"])
        calls: dict[str, list[Any]] = defaultdict(list)
        for method in pretraining.WATCHED:
            plain = getattr(type(self.itm), method)

            def watched(*given: Any, plain: Any = plain, method: str = method) -> Any:
                calls[method].append(plain(self.itm, *given))
                return calls[method][-1]

            self.itm.__dict__[method] = watched
        self.itm.draw = lambda enc, t2i, i2t: forced  # type: ignore[method-assign]
        return calls

    def _values(self, enc: Encodings, ids: Tensor, losses: pretraining.Losses) -> Tensors:
        """Features, similarities and targets under the authors' names."""
        values = self.contrast_values(enc, losses)
        columns = torch.cat([ids, enc.queue("image").ids])
        same = (ids[:, None] == columns).float()
        values["sim_targets"] = hard = same / same.sum(dim=1, keepdim=True)
        for name in ("i2t", "t2i"):
            values[f"target_{name}"] = torch.lerp(hard, values[f"sim_{name}_m"].softmax(dim=1), self.share)
        own, twins = pretraining.embeds(enc, "clean"), pretraining.embeds(enc.momentum, self.twin_view)
        names = {"image_feat": own["i"], "text_feat": own["t"], "image_feat_m": twins["i"], "text_feat_m": twins["t"]}
        return {**values, **names}

    def _alone(self, losses: pretraining.Losses) -> Tensors:
        """The folder has no gradients of single losses."""
        return {}

    def _queues(self, when: str) -> Tensors:
        """The pre-training runner's, and the pictures' ids."""
        return {**super()._queues(when), f"idx_queue_{when}": self.model.key_queues()["image"].ids[None].clone()}


def _matching(calls: dict[str, list[Any]]) -> Tensors:
    (weights_t2i, weights_i2t), logits = calls["weights"][0], calls["logits"][0]
    return {"itm_weights_t2i": weights_t2i, "itm_weights_i2t": weights_i2t, "itm_logits": logits}
