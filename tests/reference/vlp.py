"""VLP's pre-training step by our family, objective and PretrainModel, in the authors' names, and greedy decoding.

The pretext over hidden regions, off in the published model, stands in this file, around our family's states.
Decoding makes every pass whole; the authors keep earlier positions' states, which comes to the same.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tests.reference.compare import Folder
from vlscale import optimizers
from vlscale.families import vlp
from vlscale.model import PretrainModel
from vlscale.nn.single_stream import left_to_right
from vlscale.objectives import seq2seq
from vlscale.optim import OptimConfig, lr_at
from vlscale.types import IGNORE, Batch, Loss, Moment, Stream, Text, Visual
from vlscale.weights import fill, find

Tensors = dict[str, Tensor]
LEFT_TO_RIGHT = 3  # in task_idx
RATIOS = [number / 20 for number in range(1, 20)]  # of dropped samples; the folder stores one of them
DECODED = 5  # tokens, by the folder's README
TOY_STEPS = 20  # and so on: by the folder's README
TOY = OptimConfig("adam_bert", lr=0.01, eps=1e-6, weight_decay=0.01, clip_each=1.0, schedule="linear", warmup=2)
WATCHED = {r"joined": "embeddings", r"stack\.blocks\.(\d+)": r"hidden_layer\1", r"pooler": "pooled"}
BESIDE = {"content": "vis_embed_out", "place": "vis_pe_embed_out"}


def run(folder: Folder) -> dict[str, Tensors]:
    """{outputs file: {name: tensor}}."""
    inputs = folder.tensors("batch.safetensors")
    found = {**_step(folder, inputs), **_hidden_regions(folder, inputs), **_decode(folder, inputs), **_toy(inputs)}
    return {"outputs.safetensors": {name: value.detach() for name, value in found.items()}}


def family_config(config: dict[str, Any]) -> vlp.Config:
    """Our sizes from a reference folder's config.json."""
    return vlp.Config(
        hidden=config["hidden"],
        heads=config["heads"],
        layers=config["layers"],
        intermediate=config["inter"],
        vocab=config["vocab"],
        max_positions=config["max_pos"],
        segments=config["type_vocab_size"],
        dropout=config["dropout"],
        text_length=config["max_len_b"] + 2,
        separator_id=config["special_ids"]["[SEP]"],
        regions=config["nreg"],
        feats=config["feat"],
        inner=config["fc7"],
        classes=config["classes"],
    )


class _Runner:
    """The model under the authors' weights, on one of the folder's batches."""

    def __init__(self, folder: Folder, inputs: Tensors) -> None:
        config = folder.config
        self.inputs = inputs
        self.family = vlp.build(family_config(config))
        options = seq2seq.Config(bidirectional=config["bi_prob"], scope="rank")
        self.objective = seq2seq.build(options, self.family)
        whole = inputs["task_idx"] != LEFT_TO_RIGHT
        self.objective.whole_text = lambda enc: whole  # type: ignore[method-assign]
        self.model = PretrainModel(self.family, {"seq2seq": self.objective})
        self.weights = folder.tensors("weights.safetensors")
        fill(self.model, self.weights, vlp.PUBLISHED)
        self.batch = _batch(inputs, config["nreg"])

    def forward(self) -> tuple[Loss, Tensors]:
        """The loss, and what modules gave on the way, samples in the batch's order."""
        outputs: dict[str, list[Tensor]] = defaultdict(list)
        hooks = []
        for name, module in self.family.named_modules():
            place = _place(name)
            if place:
                keep = outputs[place].append
                hooks.append(module.register_forward_hook(lambda _m, _i, out, keep=keep: keep(out)))
        loss = self.model(self.batch, Moment(1)).losses["seq2seq"]
        for hook in hooks:
            hook.remove()
        return loss, {place: self._in_order(made) for place, made in outputs.items()}

    def _in_order(self, made: list[Tensor]) -> Tensor:
        """Of a module that ran once, or for each of the two ways to read."""
        if len(made) == 1:
            return made[0]
        whole = self.inputs["task_idx"] != LEFT_TO_RIGHT
        out = torch.empty(len(whole), *made[0].shape[1:])
        for rows, part in zip((~whole, whole), made, strict=True):
            out[rows] = part[: int(rows.sum())].detach()
        return out

    def gradients(self) -> Tensors:
        """{authors' parameter name: gradient}."""
        ours = dict(self.model.named_parameters())
        named = {
            name: next((each for each in find(name, vlp.PUBLISHED)[1] if each in ours), "") for name in self.weights
        }
        found = {name: ours[target].grad for name, target in named.items() if target}
        return {f"grad/{name}": value for name, value in found.items() if value is not None}


def _place(module: str) -> str:
    """The authors' name of a module's output; empty where they have none."""
    for pattern, place in WATCHED.items():
        match = re.fullmatch(pattern, module)
        if match:
            return match.expand(place)
    return BESIDE.get(module, "")


def _step(folder: Folder, inputs: Tensors) -> Tensors:
    runner = _Runner(folder, inputs)
    loss, found = runner.forward()
    torch.autograd.backward(loss.value)
    last = found[f"hidden_layer{folder.config['layers'] - 1}"]
    places = inputs["masked_pos"][..., None].expand(-1, -1, last.shape[2])
    found |= {
        "last_hidden": last,
        "mlm_logits_at_masked_pos": runner.objective.head(last.gather(1, places), runner.family.word_embedding.weight),
        "loss_mlm": loss.value,
        "loss_total": runner.model.total({"seq2seq": loss}, {}),
        **runner.gradients(),
    }
    for ratio in RATIOS:
        runner.objective.config = replace(runner.objective.config, drop_worst=ratio)
        with torch.no_grad():
            found[f"drop_worst_{ratio}/loss_mlm"] = runner.forward()[0].value
    return found


def _batch(inputs: Tensors, regions: int) -> Batch:
    """The sentence as our data plane has it, without the [SEP] behind the regions."""
    kept = torch.ones(inputs["input_ids"].shape[1], dtype=torch.bool)
    kept[1 : regions + 2] = False
    mask = inputs["input_mask"].diagonal(dim1=1, dim2=2).bool()  # a real token sees itself, padding does not
    labels = torch.full_like(inputs["input_ids"], IGNORE)
    rows, slots = inputs["masked_weights"].nonzero(as_tuple=True)
    labels[rows, inputs["masked_pos"][rows, slots]] = inputs["masked_lm_labels"][rows, slots]
    assert (labels[:, ~kept] == IGNORE).all(), "no region is to be told as a word"
    hidden = torch.zeros(len(mask), regions, dtype=torch.bool)
    hidden.scatter_(1, inputs["vis_masked_pos"] - 1, True)
    visual = Visual(
        inputs["vis_feats"],
        boxes=geometry(inputs["raw_boxes_x1y1x2y2_class_score"]),
        picked=hidden,
        class_probs=inputs["raw_class_probabilities"],
    )
    return Batch(
        text={"masked": Text(inputs["input_ids"][:, kept], mask[:, kept], labels[:, kept])},
        visual={"clean": visual},
        pair_id=torch.arange(len(mask)),
    )


def geometry(raw: Tensor) -> Tensor:
    """[B, R, 6] x1, y1, x2, y2 in pixels, class, score -> x1, y1, x2, y2 in the greatest x and y of a picture's
    boxes, area, score."""
    corners, score = raw[..., :4], raw[..., 5:]
    greatest = torch.maximum(corners[..., :2], corners[..., 2:]).amax(dim=1, keepdim=True) + 1e-5  # [B, 1, 2]
    even = corners / greatest.repeat(1, 1, 2)
    sides = even[..., 2:] - even[..., :2]
    return torch.cat([even, sides.prod(dim=2, keepdim=True).clamp(min=0), score], dim=2)


def _hidden_regions(folder: Folder, inputs: Tensors) -> Tensors:
    """The variant that hides regions; a hidden one's place and the pooled pair are to find its content."""
    prefix = "region_mask/"
    own = {name.removeprefix(prefix): value for name, value in inputs.items() if name.startswith(prefix)}
    runner = _Runner(folder, {**inputs, **own})
    with torch.no_grad():
        loss, found = runner.forward()
    rows = own["vis_masked_pos"][..., None] - 1
    content, place = (
        found[name].gather(1, rows.expand(-1, -1, found[name].shape[2]))
        for name in ("vis_embed_out", "vis_pe_embed_out")
    )
    alike = (place + found["pooled"][:, None]) @ content.transpose(1, 2)  # [B, hidden, hidden]
    pretext = -alike.log_softmax(dim=2).diagonal(dim1=1, dim2=2).mean()
    values = {
        "embeddings": found["embeddings"],
        "last_hidden": found[f"hidden_layer{folder.config['layers'] - 1}"],
        "pooled": found["pooled"],
        "loss_mlm": loss.value,
        "loss_region_pretext": pretext,
        "loss_total": loss.value + pretext,
    }
    return {f"{prefix}{name}": value for name, value in values.items()}


@torch.no_grad()
def _decode(folder: Folder, inputs: Tensors) -> Tensors:
    """[MASK] behind what is written, again and again; each is replaced by its likeliest word."""
    config, runner = folder.config, _Runner(folder, inputs)
    family = runner.family
    visual = family.encode_visual(runner.batch.visual["clean"])
    written, best = runner.batch.text["masked"].ids[:, :1], []
    hidden_word = torch.full_like(written, config["special_ids"]["[MASK]"])
    for _ in range(DECODED):
        ids = torch.cat([written, hidden_word], dim=1)
        stream: Stream = family.encode_text(Text(ids, torch.ones_like(ids, dtype=torch.bool)))
        states = family.fuse(stream, visual, causal=True).text
        assert states is not None
        logit, word = runner.objective.head(states[:, -1], family.word_embedding.weight).max(dim=1, keepdim=True)
        best.append(logit)
        written = torch.cat([written, word], dim=1)
    mask = torch.ones(len(written), config["nreg"] + 2 + DECODED, dtype=torch.bool)
    sentence = torch.arange(mask.shape[1]) >= config["nreg"] + 2
    return {
        "decode/ids": written[:, 1:],
        "decode/max_logit": torch.cat(best, dim=1),
        "decode/attention_mask": left_to_right(mask, sentence)[:, 0].long(),
        "decode/token_type_ids": vlp.segments_of(mask, sentence, causal=True),
    }


def _toy(inputs: Tensors) -> Tensors:
    """Steps of the optimizer on two tensors under its schedule, with given gradients."""
    w, b = (nn.Parameter(inputs[f"optim/{name}0"].clone()) for name in ("w", "b"))
    optimizer = optimizers.build([("w", w), ("b", b)], TOY)
    found: Tensors = {}
    for step, gradients in enumerate(zip(inputs["optim/gw"], inputs["optim/gb"], strict=True), start=1):
        w.grad, b.grad = gradients
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, TOY, TOY_STEPS)
        optimizer.step()
        found |= {f"optim/step{step}/w": w.detach().clone(), f"optim/step{step}/b": b.detach().clone()}
    return found
