"""CVLP's steps by our family, objectives and PretrainModel, in the names of an independent implementation.

Its queue of unnormalised vectors alone (`queue_unit`) is run by the same objective around a network that gives back
what it is fed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.reference.compare import Folder
from vlscale.families import cvlp
from vlscale.families.base import Family
from vlscale.model import Encodings, PretrainModel
from vlscale.nn import contrast, momentum
from vlscale.nn.queue import KeyQueue
from vlscale.objectives import itm, mlm, region_nce
from vlscale.types import IGNORE, Batch, Dims, Fused, Inputs, Moment, Pass, Stream, Text, Visual
from vlscale.weights import fill, find

Tensors = dict[str, Tensor]
VIEWS: dict[str, Any] = {"text": "masked", "visual": "masked"}
KEPT = {"keep_l": "text_stack", "keep_r": "visual_stack", "keep_x": "cross_stack"}
UNIT_QUEUE = 7  # of the folder's README


def run(folder: Folder) -> dict[str, Tensors]:
    """{outputs file: {name: tensor}} of all steps and of the queue alone."""
    return {"outputs.safetensors": {**Runner(folder).train(), **_queue_alone(folder)}}


def family_config(config: dict[str, Any], boxes: int) -> cvlp.Config:
    """Our sizes from a reference folder's config.json; `boxes` numbers tell a region's place."""
    return cvlp.Config(
        hidden=config["hidden"],
        heads=config["heads"],
        intermediate=config["inter"],
        vocab=config["vocab"],
        max_positions=config["max_pos"],
        dropout=config["dropout"],
        text_layers=config["l_layers"],
        visual_layers=config["r_layers"],
        cross_layers=config["x_layers"],
        text_length=config["L"],
        regions=config["n"],
        feats=config["feat"],
        boxes=boxes,
    )


class Runner:
    """Both networks under the stored weights, and what each step leaves behind."""

    def __init__(self, folder: Folder) -> None:
        self.config = folder.config
        self.inputs, weights = folder.tensors("batch.safetensors"), folder.tensors("weights.safetensors")
        family = cvlp.build(family_config(self.config, self.inputs["step1/boxes"].shape[-1]))
        self.words = mlm.build(mlm.Config(soften=0.0, **VIEWS), family)
        self.pairs = itm.build(itm.Config(negatives="loader", **VIEWS), family)
        options = {"queue": self.config["K"], "temperature": self.config["tau"]}
        regions = region_nce.build(region_nce.Config(**options), family)
        self.masked_only = region_nce.build(region_nce.Config(regions="masked", **options), family)
        self.model = PretrainModel(family, {"mlm": self.words, "itm": self.pairs, "region_nce": regions})
        fill(self.model, weights, cvlp.PUBLISHED)
        ours = dict(self.model.named_parameters())
        targets = {name: find(name, cvlp.PUBLISHED)[1] for name in weights}
        self.names = {name: ours[found[0]] for name, found in targets.items() if found}
        self.queue = self.model.key_queues()["regions"]
        self.queue.keys.copy_(self.inputs["queue_before"])
        self.queue.pointer.fill_(self.inputs["queue_ptr_before"])
        self.queue.filled.fill_(self.inputs["queue_valid_before"])
        trained = [each for each in self.model.parameters() if each.requires_grad]
        self.optimizer = torch.optim.SGD(trained, lr=self.config["lr"])

    def train(self) -> Tensors:
        """All steps; the key network moves first, with the query network as it is then."""
        out: Tensors = {}
        for step in range(1, self.config["steps"] + 1):
            name = f"step{step}/"
            inputs = {key.removeprefix(name): value for key, value in self.inputs.items() if key.startswith(name)}
            pairs = self.model.momentum_pairs()
            momentum.update([key.data for _, key in pairs], [query.data for query, _ in pairs], self.config["m"])
            self._drop(inputs)
            self.optimizer.zero_grad()
            made, values = self._forward(inputs, step)
            torch.autograd.backward(self.model.total(made.losses, {}))
            if step == 1:
                out |= {f"grad/{key}": each.grad.clone() for key, each in self.names.items() if each.grad is not None}
            self.optimizer.step()
            self.model.commit([made.keys], step, "step")
            ring = _ring(self.queue)
            values |= {"queue_after": ring["queue"]}
            values |= {f"queue_{key}_after": ring[key] for key in ("ptr", "valid")}
            values |= {f"param_after/{key}": each.detach().clone() for key, each in self.names.items()}
            out |= {name + key: value for key, value in values.items()}
        return out

    def _drop(self, inputs: Tensors) -> None:
        """Skip those layers of the key network that were drawn."""
        for flags, stack in KEPT.items():
            kept = tuple(bool(flag) for flag in inputs[flags])
            self.model.twin.get_submodule(stack).kept = kept  # type: ignore[union-attr,assignment]

    def _forward(self, inputs: Tensors, step: int) -> tuple[Pass, Tensors]:
        """The model's pass over a batch, and what it looks at."""
        seen: list[Encodings] = []
        hook = self.model.objectives["region_nce"].register_forward_pre_hook(lambda _m, given: seen.append(given[0]))
        batch = _batch(inputs)
        made: Pass = self.model(batch, Moment(step))
        hook.remove()
        with torch.no_grad():
            values = {**self._states(seen[0], batch), **self._contrast(seen[0]), **self._losses(made, seen[0], batch)}
        return made, {name: value.detach().clone() for name, value in values.items()}

    def _states(self, enc: Encodings, batch: Batch) -> Tensors:
        query, key = enc.fused("masked", "masked"), enc.momentum.fused("masked", "clean")
        assert query.text is not None
        assert query.visual is not None
        assert query.pooled is not None
        assert key.text is not None
        assert key.visual is not None
        family, text, regions = self.model.family, batch.text["masked"], batch.visual["masked"]
        assert isinstance(family, cvlp.Cvlp)
        assert regions.boxes is not None
        return {
            "text_embedding": family.text_embeddings(text.ids, text.segments),
            "visn_embedding": family.region_embeddings(regions.feats, regions.boxes),
            "query_lang": query.text,
            "query_visn": query.visual,
            "pooled": query.pooled,
            "key_lang": key.text,
            "key_visn": key.visual,
            "mlm_logits": self.words.head(query.text, family.word_embedding.weight),
            "matched_logits": self.pairs.logits(query.pooled),
        }

    def _contrast(self, enc: Encodings) -> Tensors:
        """Unit features, and their similarities to their own key and to the queue."""
        found = (enc.fused("masked", "masked").visual, enc.momentum.fused("masked", "clean").visual)
        queries, keys = (F.normalize(each.flatten(0, 1), dim=1) for each in found if each is not None)
        temperature = torch.tensor([self.config["tau"]])
        positives = (queries * keys).sum(dim=1, keepdim=True) / temperature
        negatives = contrast.logits(queries, self.queue.keys[self.queue.valid()], temperature)
        return {
            "query_regions": queries,
            "key_regions": keys,
            "contrast_logits": torch.cat([positives, negatives], dim=1),
        }

    def _losses(self, made: Pass, enc: Encodings, batch: Batch) -> Tensors:
        return {
            "loss_mlm": made.losses["mlm"].value,
            "loss_matched": made.losses["itm"].value,
            "loss_contrast": made.losses["region_nce"].value,
            "loss_contrast_masked_regions_only": self.masked_only(enc, batch).value,
            "loss_total": self.model.total(made.losses, {}),
        }


def _ring(queue: KeyQueue) -> Tensors:
    """A queue's keys, pointer and number of keys."""
    return {"queue": queue.keys.clone(), "ptr": queue.pointer[0].clone(), "valid": queue.filled[0].clone()}


def _batch(inputs: Tensors) -> Batch:
    labels = inputs["masked_lm_labels"]
    text = Text(
        inputs["input_ids"],
        inputs["attention_mask"].bool(),
        labels.masked_fill(labels == -1, IGNORE),
        inputs["token_type_ids"],
    )
    clean = Visual(inputs["visual_feats_key"], boxes=inputs["boxes"])
    masked = Visual(inputs["visual_feats_query"], boxes=inputs["boxes"], picked=inputs["region_mask"].bool())
    return Batch(
        text={"masked": text},
        visual={"clean": clean, "masked": masked},
        pair_id=torch.arange(len(labels)),
        matched=inputs["matched_label"].bool(),
    )


class _Given(Family):
    """A network that gives back the regions that it is fed."""

    offers = frozenset({"text", "visual", "fuse", "regions", "detector"})

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dims, self.inputs = Dims(text=width, visual=width, fused=width), Inputs(0, 1, False)

    def encode_text(self, text: Text) -> Stream:
        """Nothing that counts."""
        return Stream(text.ids[..., None].float(), text.mask)

    def encode_visual(self, visual: Visual) -> Stream:
        """As they are."""
        return Stream(visual.feats, visual.mask)

    def fuse(self, text: Stream | None, visual: Stream | None, causal: bool = False) -> Fused:
        """As they are."""
        assert visual is not None
        return Fused(text=None, visual=visual.hidden, pooled=None)


def _queue_alone(folder: Folder) -> Tensors:
    """One picture per step into a small queue, from empty."""
    inputs = folder.tensors("batch.safetensors")
    queries, keys = inputs["queue_unit/q"], inputs["queue_unit/k"]
    family = _Given(queries.shape[-1])
    options = region_nce.Config(queue=UNIT_QUEUE, temperature=folder.config["tau"])
    model = PretrainModel(family, {"region_nce": region_nce.build(options, family)})
    ids = torch.zeros(1, 1, dtype=torch.int64)
    out: Tensors = {}
    for step, (query, key) in enumerate(zip(queries, keys, strict=True), start=1):
        views = {"masked": Visual(query[None]), "clean": Visual(key[None])}
        made = model(Batch({"masked": Text(ids, ids == 0)}, views, torch.zeros(1)), Moment(step))
        model.commit([made.keys], step, "step")
        values = {"loss": made.losses["region_nce"].value, **_ring(model.key_queues()["regions"])}
        out |= {f"queue_unit/step{step}/{name}": value for name, value in values.items()}
    return out
