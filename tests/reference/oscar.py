"""OSCAR's and OSCAR+'s pre-training step by our family, objectives and PretrainModel, in the authors' names.

Which of the two it is stands in the folder's config.json.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from tests.reference.compare import Folder
from vlscale import optimizers
from vlscale.families import oscar
from vlscale.model import Encodings, PretrainModel
from vlscale.objectives import mlm, tag_contrast
from vlscale.optim import OptimConfig, lr_at
from vlscale.types import IGNORE, Batch, Moment, Text, Visual
from vlscale.weights import fill, find

Tensors = dict[str, Tensor]
BOXES = 6  # numbers of a region's place, the last ones of its row
TOY = OptimConfig("adamw_transformers", lr=0.01, weight_decay=0.01, schedule="linear", warmup=2)  # folder's README
TOY_STEPS = 8  # that the toy schedule is long


def run(folder: Folder) -> dict[str, Tensors]:
    """{outputs file: {name: tensor}}."""
    inputs = folder.tensors("batch.safetensors")
    return {"outputs.safetensors": {**_step(folder, inputs), **_toy(inputs)}}


def family_config(config: dict[str, Any]) -> oscar.Config:
    """Our sizes from a reference folder's config.json."""
    return oscar.Config(
        hidden=config["hidden"],
        heads=config["heads"],
        layers=config["layers"],
        intermediate=config["inter"],
        vocab=config["vocab"],
        max_positions=config["max_pos"],
        dropout=config["dropout"],
        text_length=config["seq_len"],
        regions=config["max_img"],
        feats=config["img_feature_dim"] - BOXES,
        boxes=BOXES,
        region_norm=bool(config["use_img_layernorm"]),
    )


def _step(folder: Folder, inputs: Tensors) -> Tensors:
    """Encodings, logits, losses and the gradient of their sum."""
    config = folder.config
    family = oscar.build(family_config(config))
    words = mlm.build(mlm.Config(soften=0.0), family)
    contrast = tag_contrast.build(tag_contrast.Config(classes=config["num_contrast_classes"]), family)
    model = PretrainModel(family, {"mlm": words, "tag_contrast": contrast})
    weights = folder.tensors("weights.safetensors")
    fill(model, weights, oscar.PUBLISHED)
    batch, found = _batch(inputs, config), _watched(family)
    made = model(batch, Moment(1))
    total = model.total(made.losses, {})
    torch.autograd.backward(total)
    gradients = {f"grad/{name}": parameter.grad for name, parameter in _names(model, weights).items()}
    with torch.no_grad():
        enc = Encodings(family, batch, Moment(1), {})
        text, fused = enc.text("masked").hidden, enc.fused("masked", "clean")
        assert fused.text is not None
        assert fused.visual is not None
        assert fused.pooled is not None
        last = torch.cat([fused.text, fused.visual], dim=1)
        values = {
            "text_embeddings": text,
            "encoder_input": torch.cat([text, enc.visual("clean").hidden], dim=1),
            "last_hidden": last,
            "pooled": fused.pooled,
            "mlm_logits": words.head(last, family.word_embedding.weight),
            "contrastive_logits": contrast.logits(fused.pooled),
        }
    losses = {
        "loss_mlm": made.losses["mlm"].value,
        "loss_contrastive": made.losses["tag_contrast"].value,
        "loss_total": total,
    }
    kept = {name: value for name, value in gradients.items() if value is not None}
    return {name: value.detach() for name, value in {**found, **values, **losses, **kept}.items()}


def _batch(inputs: Tensors, config: dict[str, Any]) -> Batch:
    length = config["seq_len"]
    mask, labels = inputs["attention_mask"].bool(), inputs["masked_lm_labels"]
    labels = labels.masked_fill(labels == config["mlm_ignore_index"], IGNORE)
    assert (labels[:, length:] == IGNORE).all(), "no region is to be told as a word"
    regions = inputs["img_feats"]
    return Batch(
        text={"masked": Text(inputs["input_ids"], mask[:, :length], labels[:, :length], inputs["token_type_ids"])},
        visual={"clean": Visual(regions[..., :-BOXES], mask[:, length:], regions[..., -BOXES:])},
        pair_id=torch.arange(len(mask)),
        tags_swapped=inputs["next_sentence_label"],
    )


def _watched(family: nn.Module) -> Tensors:
    """Where the states after each layer will appear under the authors' names."""
    found: Tensors = {}
    for name, module in family.named_modules():
        number = re.fullmatch(r"stack\.blocks\.(\d+)", name)
        if number:
            place = f"hidden_layer{number.group(1)}"
            module.register_forward_hook(lambda _m, _i, out, place=place: found.update({place: out}))
    return found


def _names(model: PretrainModel, weights: Tensors) -> dict[str, nn.Parameter]:
    """{authors' parameter name: our parameter}, by the rename table."""
    ours = dict(model.named_parameters())
    targets = {name: find(name, oscar.PUBLISHED)[1] for name in weights}
    return {name: ours[found[0]] for name, found in targets.items() if found}


def _toy(inputs: Tensors) -> Tensors:
    """Steps of the optimizer on two tensors under the linear schedule, with given gradients."""
    w, b = (nn.Parameter(inputs[f"optim/{name}0"].clone()) for name in ("w", "b"))
    optimizer = optimizers.build([("w", w), ("b", b)], TOY)
    found: Tensors = {}
    for step, gradients in enumerate(zip(inputs["optim/gw"], inputs["optim/gb"], strict=True), start=1):
        w.grad, b.grad = gradients
        rate = lr_at(step, TOY, TOY_STEPS)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        values = {"w": w.detach().clone(), "b": b.detach().clone(), "lr": torch.tensor(rate)}
        found |= {f"optim/step{step}/{name}": value for name, value in values.items()}
    return found
