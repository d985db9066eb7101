"""ViLBERT's pre-training losses by our family and objectives, in the authors' names.

Three models, alike but for what they restore of a hidden region: the detector's distribution (visual target 0),
its feature by squared error (1), or its feature among others (2).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tests.reference.compare import Absent, Folder, Value
from vlscale.errors import ConfigError
from vlscale.families import vilbert
from vlscale.model import Encodings, PretrainModel
from vlscale.nn.region_head import RegionHead, hidden_regions
from vlscale.objectives import itm, mlm, mrc_kl, mrfr, mrm_nce
from vlscale.types import IGNORE, Batch, Loss, Moment, Text, Visual
from vlscale.weights import fill, find

Tensors = dict[str, Tensor]
VIEWS = {"text": "masked", "visual": "masked"}
TARGETS = ("mrc_kl", "mrfr", "mrm_nce")  # by the number of the visual target
NOT_BUILT = {"dynamic_attention": False, "with_coattention": True, "task_specific_tokens": False}
EMPTY = Absent("nothing is hidden, so the authors divide by zero; ours is 0")
MATCHING = "cls.bi_seq_relationship."  # the authors' row 0 says that a pair matches, ours is row 1


def run(folder: Folder) -> dict[str, dict[str, Value]]:
    """{outputs file: {name: tensor}}."""
    found: dict[str, Value] = {}
    for number in range(len(TARGETS)):
        prefix = f"vt{number}/" if number else ""
        found |= {prefix + name: value for name, value in Runner(folder, number).values().items()}
    return {"outputs.safetensors": found}


def family_config(config: dict[str, Any]) -> vilbert.Config:
    """Our sizes from a reference folder's config.json.

    Raises:
        ConfigError: the folder was made with an option that we do not have.
    """
    for name, value in NOT_BUILT.items():
        if config.get(name, value) != value:
            raise ConfigError(f"{name} is {config[name]} in config.json; our family has no such option")
    return vilbert.Config(
        hidden=config["hidden_size"],
        heads=config["num_attention_heads"],
        text_layers=config["num_hidden_layers"],
        intermediate=config["intermediate_size"],
        vocab=config["vocab_size"],
        max_positions=config["max_position_embeddings"],
        segments=config["type_vocab_size"],
        visual_width=config["v_hidden_size"],
        visual_heads=config["v_num_attention_heads"],
        visual_layers=config["v_num_hidden_layers"],
        visual_intermediate=config["v_intermediate_size"],
        coattention_width=config["bi_hidden_size"],
        coattention_heads=config["bi_num_attention_heads"],
        text_coattention=tuple(config["t_biattention_id"]),
        visual_coattention=tuple(config["v_biattention_id"]),
        fusion={"mul": "product", "sum": "sum"}[config["fusion_method"]],  # type: ignore[arg-type]
        dropout=config["hidden_dropout_prob"],
        text_length=config["seq_len"],
        regions=config["region_len"],
        feats=config["v_feature_size"],
        classes=config["v_num_classes"],
    )


class Runner:
    """The model for one visual target under the authors' weights."""

    def __init__(self, folder: Folder, target: int) -> None:
        self.target, self.region = target, TARGETS[target]
        self.config = family_config(folder.config)
        self.inputs = folder.tensors("batch.safetensors")
        self.family = vilbert.build(self.config)
        self.model = PretrainModel(self.family, self._objectives()).eval()
        weights = chosen_weights(folder.tensors("weights.safetensors"), target)
        fill(self.model, weights, vilbert.PUBLISHED)
        ours = dict(self.model.named_parameters())
        targets = {name: find(name, vilbert.PUBLISHED)[1] for name in weights}
        self.names: dict[str, nn.Parameter] = {
            name: ours[each] for name, found in targets.items() for each in found if each in ours
        }
        self.batch = batch_of(self.inputs)

    def _objectives(self) -> dict[str, Any]:
        across, inside = (self.inputs[f"nce_draw/col_{where}"].shape[2] for where in ("across", "inside"))
        self.nce = mrm_nce.build(
            mrm_nce.Config(**VIEWS, across=across, inside=inside, padding="drawn"),  # type: ignore[arg-type]
            self.family,
        )
        self.nce.draw = lambda enc, samples: uniforms(self.inputs)  # type: ignore[method-assign]
        regions = {
            "mrc_kl": mrc_kl.build(mrc_kl.Config(**VIEWS), self.family),  # type: ignore[arg-type]
            "mrfr": mrfr.build(mrfr.Config(**VIEWS), self.family),  # type: ignore[arg-type]
            "mrm_nce": self.nce,
        }
        self.words = mlm.build(mlm.Config(**VIEWS, soften=0.0), self.family)  # type: ignore[arg-type]
        self.matching = itm.build(itm.Config(**VIEWS, negatives="loader"), self.family)  # type: ignore[arg-type]
        self.restored = regions[self.region]
        return {"mlm": self.words, "itm": self.matching, self.region: self.restored}

    def values(self) -> dict[str, Value]:
        """Everything of this visual target, without its prefix."""
        with _Watch(self) as watch:
            losses = self.model(self.batch, Moment(1)).losses
            total = self.model.total(losses, {})
            total.backward()  # type: ignore[no-untyped-call]
            found = {**watch.states(), **watch.scores()}
            if self.region == "mrm_nce":
                found["nce_logits"] = self.nce.logits(watch.enc, self.batch)
        found |= {**self._losses(losses), "total_loss": total}
        empty = self._empty(self.batch)
        with torch.no_grad():
            matched = only_matched(self.batch)
            alone = {
                **self._losses(self.model(matched, Moment(1)).losses),
                "lm_label_ids": authors_labels(matched.text["masked"].labels),
                "image_label": authors_labels(matched.visual["masked"].picked),
            }
        found |= {f"objective1/{name}": value for name, value in alone.items()}
        empty |= {f"objective1/{name}": reason for name, reason in self._empty(matched).items()}
        return {**{name: value.detach() for name, value in found.items()}, **self._gradients(), **empty}

    def _empty(self, batch: Batch) -> dict[str, Value]:
        """The losses that are no number where the authors make them."""
        counts = {"masked_lm_loss": self.words.count(batch)}
        if self.region != "mrfr":  # there they divide by at least 1
            counts["masked_image_loss"] = hidden_regions(batch.visual["masked"]).sum()
        empty: dict[str, Value] = {name: EMPTY for name, count in counts.items() if count == 0}
        return empty | ({"total_loss": EMPTY} if empty else {})

    def _losses(self, losses: dict[str, Loss]) -> Tensors:
        return {
            "masked_lm_loss": losses["mlm"].value,
            "masked_image_loss": losses[self.region].value,
            "alignment_loss": losses["itm"].value,
        }

    def _gradients(self) -> Tensors:
        gradients = {name: each.grad for name, each in self.names.items() if each.grad is not None}
        return {f"grad/{name}": _authors_order(name, value) for name, value in gradients.items()}


class _Watch:
    """Keeps what the network's parts give in the first pass of the model."""

    enc: Encodings

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.outputs: Tensors = {}
        self.last: Tensor = torch.empty(0)  # [B, 1 + R, Dv], the regions' last states with the whole picture's

    def __enter__(self) -> _Watch:
        family = self.runner.family
        self.hooks = [
            module.register_forward_hook(lambda _m, _i, out, name=name: self.outputs.setdefault(name, out))
            for name, module in family.named_modules()
            if name.endswith(("embeddings", "pooler")) or name.rpartition(".")[0].endswith(".blocks")
        ]
        self.hooks.append(family.visual_pooler.register_forward_pre_hook(self._keep_states))
        self.hooks.append(self.runner.words.register_forward_pre_hook(self._keep_encodings))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def _keep_states(self, _module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.last = inputs[0]

    def _keep_encodings(self, _module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.enc = inputs[0]

    def states(self) -> Tensors:
        """Embeddings, layers, final and pooled states."""
        names = {
            "text_embeddings": "text_embedding",
            "region_embeddings": "image_embedding",
            "text_pooler": "pooled_text",
            "visual_pooler": "pooled_image",
        }
        found = {names[name]: value for name, value in self.outputs.items() if name in names}
        for name, value in self.outputs.items():
            stack, blocks, number = name.partition(".blocks.")
            if blocks:
                stream = "text" if stack.startswith("text") else "image"
                meets = stack.endswith("coattention_stack")
                found[f"connection_layer_{number}_{stream}" if meets else f"{stream}_layer_{number}"] = value
        words = self.enc.fused("masked", "masked").text
        assert words is not None
        return {**found, "sequence_output_text": words, "sequence_output_image": self.last}

    def scores(self) -> Tensors:
        """What the heads make of every position, the whole picture's slot counted."""
        runner, fused = self.runner, self.enc.fused("masked", "masked")
        assert fused.text is not None
        assert fused.pooled is not None
        assert isinstance(runner.restored.head, RegionHead)
        return {
            "prediction_scores_text": runner.words.head(fused.text, runner.family.word_embedding.weight),
            "prediction_scores_image": runner.restored.head(self.last),
            "seq_relationship_score": runner.matching.logits(fused.pooled).flip(1),
        }


def chosen_weights(weights: Tensors, target: int) -> Tensors:
    """The model's weights for one visual target: others' decoders left out, its own in place."""
    own = f"visual_target_{target}."
    shared = {name: value for name, value in weights.items() if not name.startswith("visual_target_")}
    return shared | {name.removeprefix(own): value for name, value in weights.items() if name.startswith(own)}


def batch_of(inputs: Tensors) -> Batch:
    """The authors' batch; they prepend the whole picture's slot to the regions, our family does."""
    labels = inputs["lm_label_ids"]
    text = Text(
        inputs["input_ids"],
        inputs["input_mask"].bool(),
        labels.masked_fill(labels == -1, IGNORE),
        inputs["segment_ids"],
    )
    visual = Visual(
        inputs["image_feat"][:, 1:],
        inputs["image_mask"][:, 1:].bool(),
        inputs["image_loc"][:, 1:],
        picked=inputs["image_label"] == 1,
        targets=inputs["image_target_feat"],
        class_probs=inputs["image_target"],
    )
    return Batch({"masked": text}, {"masked": visual}, torch.arange(len(labels)), matched=inputs["is_next"] == 0)


def only_matched(batch: Batch) -> Batch:
    """The same batch whose pairs that do not match restore nothing (the authors' `--objective 1`)."""
    text, visual = batch.text["masked"], batch.visual["masked"]
    assert batch.matched is not None
    assert text.labels is not None
    assert visual.picked is not None
    rows = batch.matched[:, None]
    return replace(
        batch,
        text={"masked": text._replace(labels=text.labels.masked_fill(~rows, IGNORE))},
        visual={"masked": visual._replace(picked=visual.picked & rows)},
    )


def authors_labels(labels: Tensor | None) -> Tensor:
    """-1 where nothing is predicted; 1 for a hidden region."""
    assert labels is not None
    return labels.long() * 2 - 1 if labels.dtype == torch.bool else labels.masked_fill(labels == IGNORE, -1)


def uniforms(inputs: Tensors) -> Tensor:
    """[B, R, draws] in [0, 1) that make our objective choose what the authors drew, which it is asked to prove."""
    row, column, inside = (inputs[f"nce_draw/{name}"].double() for name in ("row_across", "col_across", "col_inside"))
    samples, regions = row.shape[:2]
    numbers = (samples - 1, regions, regions - 1)
    draws = torch.cat([(each + 0.5) / n for each, n in zip((row, column, inside), numbers, strict=True)], dim=2)
    drawable = torch.ones(samples, regions, dtype=torch.bool)
    index, exists = mrm_nce.negatives(draws, drawable, torch.arange(samples), row.shape[2])
    assert exists.all()
    assert torch.equal(index, inputs["nce_negative_index"]), "negatives differ from the authors'"
    return draws


def _authors_order(name: str, value: Tensor) -> Tensor:
    return value.flip(0) if name.startswith(MATCHING) else value
