"""LXMERT's pre-training pass and BertAdam steps by our family, objectives and PretrainModel, in the authors' names.

Parameters after earlier steps may have been stored without a copy, and then hold those after the last one. Such
tensors cannot be compared; the next step's loss and gradient norm tell of the same parameters.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from tests.reference.compare import Absent, Folder, Value
from vlscale import optimizers
from vlscale.errors import ConfigError
from vlscale.families import lxmert
from vlscale.model import Encodings, PretrainModel
from vlscale.objectives import answer, itm, masked_object, mlm
from vlscale.optim import OptimConfig, lr_at
from vlscale.types import IGNORE, Batch, Moment, Pass, Text, Visual
from vlscale.weights import fill, find

Tensors = dict[str, Tensor]
VIEWS: dict[str, Any] = {"text": "masked", "visual": "masked"}
PARTS = {"obj": "objects", "attr": "attributes", "feat": "features"}
LOSSES = {"mask_lm": "mlm", "matched": "itm", "qa": "answer"}
STEPS = "optimizer.safetensors"
NO_COPY = Absent(
    "stored without a copy: to the last bit what is stored after the last step, though losses moved between"
)


def run(folder: Folder) -> dict[str, dict[str, Value]]:
    """{outputs file: {name: tensor}}: the pass and its gradients, then the optimizer's steps."""
    values: dict[str, Value] = {**Runner(folder).values()}
    steps: dict[str, Value] = {**Runner(folder).steps()}
    for step in without_copy(folder.tensors(STEPS)):
        own = f"step_{step}/"
        steps = {name: value for name, value in steps.items() if not name.startswith(own)} | {f"{own}*": NO_COPY}
    return {"outputs.safetensors": values, STEPS: steps}


def without_copy(stored: Tensors) -> list[int]:
    """Steps whose stored parameters all equal those after the last step, though the loss of the same batch moves."""
    last = sum(name.endswith("_loss") for name in stored)

    def parameters(step: int) -> dict[str, Tensor]:
        own = f"step_{step}/"
        return {name.removeprefix(own): value for name, value in stored.items() if name.startswith(own)}

    end = parameters(last)
    moved = not all(stored[f"step_{step}_loss"].equal(stored["step_1_loss"]) for step in range(1, last + 1))
    same = [step for step in range(1, last) if all(value.equal(end[name]) for name, value in parameters(step).items())]
    return same if moved else []


def family_config(config: dict[str, Any]) -> lxmert.Config:
    """Our sizes from a reference folder's config.json."""
    return lxmert.Config(
        hidden=config["hidden_size"],
        heads=config["num_attention_heads"],
        intermediate=config["intermediate_size"],
        vocab=config["vocab_size"],
        max_positions=config["max_position_embeddings"],
        segments=config["type_vocab_size"],
        dropout=config["hidden_dropout_prob"],
        text_layers=config["l_layers"],
        visual_layers=config["r_layers"],
        cross_layers=config["x_layers"],
        text_length=config["max_seq_length"],
        regions=config["n_box"],
        feats=config["visual_feat_dim"],
        boxes=config["visual_pos_dim"],
        classes=config["obj_id_num"],
    )


class Runner:
    """The model under the authors' weights, and its batch."""

    def __init__(self, folder: Folder) -> None:
        self.config = folder.config
        self.family = family = lxmert.build(family_config(self.config))
        self.words = mlm.build(mlm.Config(soften=0.0, **VIEWS), family)
        self.pairs = itm.build(itm.Config(negatives="loader", **VIEWS), family)
        self.objects = masked_object.build(
            masked_object.Config(
                parts=tuple(PARTS[name] for name in self.config["visual_losses"]),
                attribute_classes=self.config["attr_id_num"],
                scale=self.config["visual_loss_weight"],
            ),
            family,
        )
        self.answers = answer.build(answer.Config(answers=self.config["num_answers"]), family)
        self.model = PretrainModel(
            family,
            {"mlm": self.words, "itm": self.pairs, "masked_object": self.objects, "answer": self.answers},
        ).eval()
        weights = folder.tensors("weights.safetensors")
        fill(self.model, weights, lxmert.PUBLISHED)
        ours = dict(self.model.named_parameters())
        targets = {name: find(name, lxmert.PUBLISHED)[1] for name in weights}
        self.names = {name: ours[found[0]] for name, found in targets.items() if found}
        self.batch = _batch(folder.tensors("batch.safetensors"))

    def values(self) -> Tensors:
        """Everything of one pass, and the gradient of its total."""
        found = self._watched()
        made, total = self._losses()
        torch.autograd.backward(total)
        values = {**found, **self._heads(), **self._named_losses(made, total)}
        gradients = {f"grad/{name}": each.grad for name, each in self.names.items() if each.grad is not None}
        return {name: value.detach() for name, value in {**values, **gradients}.items()}

    def steps(self) -> Tensors:
        """The same batch again and again: clip the global norm, then `adam_bert`."""
        options = self.config["optimizer_reference"]
        _check(options)
        config = OptimConfig(
            name="adam_bert",
            lr=options["lr"],
            betas=(options["b1"], options["b2"]),
            eps=options["eps"],
            weight_decay=options["weight_decay"],
            no_decay=(),
            schedule="linear",
            warmup=round(options["warmup"] * options["t_total"]),
        )
        optimizer = optimizers.build(self.model.named_parameters(), config)
        found: Tensors = {}
        for step in range(1, options["steps"] + 1):
            optimizer.zero_grad()
            _, total = self._losses()
            torch.autograd.backward(total)
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), options["clip_global_norm"])
            for group in optimizer.param_groups:
                group["lr"] = lr_at(step, config, options["t_total"])
            optimizer.step()
            found |= {f"step_{step}_loss": total.detach(), f"step_{step}_grad_norm": norm}
            found |= {f"step_{step}/{name}": each.detach().clone() for name, each in self.names.items()}
        return found

    def _losses(self) -> tuple[Pass, Tensor]:
        made: Pass = self.model(self.batch, Moment(1))
        return made, self.model.total(made.losses, {})

    def _named_losses(self, made: Pass, total: Tensor) -> Tensors:
        losses = {f"loss_{theirs}": made.losses[ours].value for theirs, ours in LOSSES.items()}
        metrics = made.losses["masked_object"].metrics
        parts = {f"loss_{name}": metrics[f"masked_object/{PARTS[name]}"] for name in self.config["visual_losses"]}
        return {**losses, **parts, "total_loss": total}

    @torch.no_grad()
    def _heads(self) -> Tensors:
        """What each head makes of the last states, of every word and region."""
        enc = Encodings(self.family, self.batch, Moment(1), {})
        fused = enc.fused("masked", "masked")
        assert fused.text is not None
        assert fused.visual is not None
        assert fused.pooled is not None
        regions = fused.visual.flatten(0, 1)
        told = self.objects.head(regions, torch.ones(len(regions), dtype=torch.bool))
        shape = fused.visual.shape[:2]
        return {
            "lang_output": fused.text,
            "visn_output": fused.visual,
            "pooled_output": fused.pooled,
            "lm_scores": self.words.head(fused.text, self.family.word_embedding.weight),
            "matched_scores": self.pairs.logits(fused.pooled),
            "answer_scores": self.answers.head(fused.pooled),
            **{f"{name}_scores": told[PARTS[name]].unflatten(0, shape) for name in self.config["visual_losses"]},
        }

    def _watched(self) -> Tensors:
        """Where the states after each layer will appear under the authors' names."""
        found: Tensors = {}
        length = self.batch.text["masked"].ids.shape[1]

        def keep(name: str, out: Tensor) -> None:
            layer = re.fullmatch(r"(text|visual|cross)_stack\.blocks\.(\d+)", name)
            if name in ("text_embeddings", "region_embeddings"):
                found["lang_embedding" if name == "text_embeddings" else "visn_embedding"] = out
            elif layer and layer.group(1) == "cross":
                found[f"cross_layer_{layer.group(2)}_lang"] = out[:, :length]
                found[f"cross_layer_{layer.group(2)}_visn"] = out[:, length:]
            elif layer:
                found[f"{'lang' if layer.group(1) == 'text' else 'visn'}_layer_{layer.group(2)}"] = out

        for name, module in self.family.named_modules():
            module.register_forward_hook(lambda _m, _i, out, name=name: keep(name, out))
        return found


def _check(options: dict[str, Any]) -> None:
    """Raises ConfigError: steps of a kind that we do not have."""
    for name, value in (("optim", "BertAdam"), ("schedule", "warmup_linear")):
        if options[name] != value:
            raise ConfigError(f"optimizer_reference.{name} is {options[name]} in config.json; this runner has {value}")


def _batch(inputs: Tensors) -> Batch:
    def ignored(labels: Tensor) -> Tensor:
        return labels.masked_fill(labels == -1, IGNORE)

    text = Text(
        inputs["input_ids"], inputs["input_mask"].bool(), ignored(inputs["lm_label_ids"]), inputs["segment_ids"]
    )
    regions = Visual(
        inputs["visual_feats"],
        boxes=inputs["boxes"],
        picked=inputs["feat_weights"].bool(),
        targets=inputs["feat_labels"],
        classes=inputs["obj_labels"],
        class_confidence=inputs["obj_weights"],
        attributes=inputs["attr_labels"],
        attribute_confidence=inputs["attr_weights"],
    )
    return Batch(
        text={"masked": text},
        visual={"masked": regions},
        pair_id=torch.arange(len(inputs["ans"])),
        matched=inputs["matched_labels"].bool(),
        answers=ignored(inputs["ans"]),
    )
