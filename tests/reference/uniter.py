"""UNITER's five pre-training tasks, each on its own batch, and steps that accumulate some of them, in the authors'
names.

The authors pack words and regions without a gap; no layer depends on places, so ours are picked out in their order.
Their two classification tasks share one head, and so do they here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.reference.compare import Absent, Folder, Loose, Value
from vlscale import optimizers
from vlscale.families import uniter
from vlscale.model import Encodings, PretrainModel, Task
from vlscale.objectives import itm, mlm, mrc, mrc_kl, mrfr, wra
from vlscale.optim import OptimConfig, lr_at
from vlscale.types import IGNORE, Batch, Loss, Moment, Text, Visual
from vlscale.weights import fill, find

Tensors = dict[str, Tensor]
TASKS = ("mlm", "mrfr", "mrc", "mrckl", "itm")
UNDECAYED = ("bias", "LayerNorm.weight")  # optim/misc.py; norms of other names do decay
LEAST_LR = 1e-8  # optim/sched.py
NOISE = "a key bias has no gradient but for rounding, which AdamW turns into steps of up to the learning rate"


def run(folder: Folder) -> dict[str, dict[str, Value]]:
    """{outputs file: {name: tensor}}: every task's pass and gradients, then the optimizer's steps."""
    return {
        "outputs.safetensors": {**_tasks(folder)},
        "optimizer.safetensors": _steps(folder),
        "downstream.safetensors": {"*": Absent("fine-tuning is a later part")},
    }


def family_config(config: dict[str, Any]) -> uniter.Config:
    """Our sizes from a reference folder's config.json."""
    return uniter.Config(
        hidden=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        intermediate=config["intermediate_size"],
        vocab=config["vocab_size"],
        max_positions=config["max_position_embeddings"],
        segments=config["type_vocab_size"],
        dropout=config["hidden_dropout_prob"],
        feats=config["img_dim"],
        classes=config["img_label_dim"],
        text_length=config["max_position_embeddings"],
    )


def _tasks(folder: Folder) -> Tensors:
    runner, found, totals = _Runner(folder), {}, {}
    for task in TASKS:
        values = runner.watched(task)
        runner.model.zero_grad()
        torch.autograd.backward(runner.loss(task))
        gradients = runner.gradients()
        found |= {f"{task}/{name}": value for name, value in values.items()}
        found |= {f"grad/{task}/{name}": value for name, value in gradients.items()}
        totals |= {name: value + totals.get(name, 0) for name, value in gradients.items()}
    found |= {f"grad/{name}": value for name, value in totals.items()}
    return found | {"total_loss": torch.stack([found[f"{task}/loss"] for task in TASKS]).sum()}


def _steps(folder: Folder) -> dict[str, Value]:
    """Gradients summed over the micro-batches of a step, clipped, then the optimizer."""
    runner, options = _Runner(folder), folder.config["optimizer_reference"]
    optimizer, number = runner.optimizer(options), options["accumulation"]
    found: dict[str, Value] = {}
    for index, task in enumerate(options["micro_tasks"]):
        loss = runner.loss(task)
        torch.autograd.backward(loss)
        found[f"micro_{index}_loss"] = loss.detach()
        step, inside = divmod(index + 1, number)
        if inside:
            continue
        norm = nn.utils.clip_grad_norm_(runner.model.parameters(), options["grad_norm"])
        lr = _lr(step, options)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # what a step does not use moves on by its moments
        found |= {f"step_{step}_lr": torch.tensor(lr), f"step_{step}_grad_norm": norm}
        found |= {f"step_{step}/{name}": value for name, value in runner.after(step * options["lr"]).items()}
    if _all_alike(folder.tensors("optimizer.safetensors")):
        last = {name: value for name, value in found.items() if name.startswith(f"step_{step}/")}
        for each in range(1, step):
            found |= {name.replace(f"step_{step}/", f"step_{each}/"): value for name, value in last.items()}
    return found


def _all_alike(stored: Tensors) -> bool:
    """Whether the parameters stored for every step are the same ones: those after the last, then."""
    parameters = {name.partition("/")[2] for name in stored if "/" in name}
    steps = {name.partition("/")[0] for name in stored if "/" in name}
    return all(
        torch.equal(stored[f"{one}/{name}"], stored[f"{other}/{name}"])
        for name in parameters
        for one in steps
        for other in steps
    )


def _lr(step: int, options: dict[str, Any]) -> float:
    """The authors' rise is `step / warmup` of the learning rate, so that the first step has some."""
    lr, warmup = options["lr"], options["warmup_steps"]
    config = OptimConfig(lr=lr, warmup=warmup - 1, warmup_lr=lr / warmup, schedule="linear")
    return max(lr_at(step, config, options["num_train_steps"] - 1), LEAST_LR)


class _Layout(NamedTuple):
    """Where the authors' packed positions lie among padded words, then padded regions."""

    order: Tensor  # [B, S] int64
    words: Tensor  # [B, L] bool
    regions: Tensor  # [B, R] bool

    def packed(self, text: Tensor, visual: Tensor) -> Tensor:
        """[B, L, D], [B, R, D] -> [B, S, D]."""
        both = torch.cat([text, visual], dim=1)
        return both.gather(1, self.order[..., None].expand(-1, -1, both.shape[2]))


def _layout(inputs: Tensors) -> _Layout:
    order, length = inputs["gather_index"], inputs["input_ids"].shape[1]
    both = torch.zeros(len(order), length + inputs["img_feat"].shape[1], dtype=torch.int64)
    real = both.scatter_reduce(1, order, inputs["attn_masks"], "amax").bool()
    return _Layout(order, real[:, :length], real[:, length:])


def _batch(task: str, inputs: Tensors, layout: _Layout) -> Batch:
    """Masked positions are in the view `masked`, whatever the task hides."""
    ids, feats, boxes = inputs["input_ids"], inputs["img_feat"], inputs["img_pos_feat"]
    text, visual = Text(ids, layout.words), Visual(feats, layout.regions, boxes)
    texts, visuals = {"clean": text}, {"clean": visual}
    if "txt_labels" in inputs:
        labels = inputs["txt_labels"]
        texts["masked"] = text._replace(labels=labels.masked_fill(labels < 0, IGNORE))
    if "img_masks" in inputs:
        picked = inputs["img_masks"]
        visuals["masked"] = visual._replace(
            picked=picked,
            targets=_placed(inputs.get("feat_targets"), picked),
            class_probs=_placed(inputs.get("label_targets"), picked),
        )
    matched = inputs["targets"].bool() if "targets" in inputs else None
    return Batch(texts, visuals, torch.arange(len(ids)), task=task, matched=matched)


def _placed(rows: Tensor | None, picked: Tensor) -> Tensor | None:
    """Rows [M, ...] of the picked regions -> [B, R, ...], 0 elsewhere."""
    if rows is None:
        return None
    whole = rows.new_zeros(*picked.shape, *rows.shape[1:])
    whole[picked] = rows
    return whole


class _Runner:
    """Our model under the authors' weights, without dropout."""

    def __init__(self, folder: Folder) -> None:
        config = folder.config
        self.family = family = uniter.build(family_config(config))
        self.mlm = mlm.build(mlm.Config(soften=0.0, scope="rank"), family)
        self.mrfr = mrfr.build(mrfr.Config(decoder="tied", scope="rank"), family)
        self.mrc = mrc.build(mrc.Config(scope="rank"), family)
        self.mrc_kl = mrc_kl.build(mrc_kl.Config(reduction="elements", scope="rank"), family)
        self.mrc.head = self.mrc_kl.head
        self.itm = itm.build(itm.Config(negatives="loader"), family)
        transport = config["ot"]
        self.wra = wra.build(
            wra.Config(
                weight=config["itm_ot_lambda"],
                beta=transport["beta"],
                iterations=transport["iterations"],
                scalings=transport["k"],
            ),
            family,
        )
        assert transport["cosine_eps"] == wra.NORM_LEAST
        names = ("mlm", "mrfr", "mrc", "mrc_kl", "itm", "wra")
        tasks = {name.replace("_", ""): Task((name,)) for name in names[:4]} | {"itm": Task(("itm", "wra"))}
        self.model = PretrainModel(family, {name: getattr(self, name) for name in names}, tasks).eval()
        weights = folder.tensors("weights.safetensors")
        fill(self.model, weights, uniter.PUBLISHED)
        ours = dict(self.model.named_parameters())
        found = {name: [each for each in find(name, uniter.PUBLISHED)[1] if each in ours] for name in weights}
        self.names = {name: ours[targets[0]] for name, targets in found.items() if targets}
        self.shapes = {name: weights[name].shape for name in self.names}
        every = folder.tensors("batch.safetensors")
        self.inputs = {task: _under(every, f"{task}/") for task in TASKS}
        self.layouts = {task: _layout(inputs) for task, inputs in self.inputs.items()}
        self.batches = {task: _batch(task, inputs, self.layouts[task]) for task, inputs in self.inputs.items()}

    def losses(self, task: str) -> dict[str, Loss]:
        """By objective."""
        return self.model(self.batches[task], Moment(1)).losses  # type: ignore[no-any-return]

    def loss(self, task: str) -> Tensor:
        """[] of the whole task."""
        return self.model.total(self.losses(task), {})

    @torch.no_grad()
    def watched(self, task: str) -> Tensors:
        """Everything on the way of one task's pass, and its losses."""
        batch, layout = self.batches[task], self.layouts[task]
        enc = Encodings(self.family, batch, Moment(1), {})
        text, visual = ("masked" if "masked" in views else "clean" for views in (batch.text, batch.visual))
        words, regions = enc.text(text).hidden, enc.visual(visual).hidden
        values = {
            "txt_embedding": words,
            "img_embedding": regions,
            "embedding_output": layout.packed(words, regions),
        }

        def keep(name: str) -> Any:
            def hook(_module: nn.Module, _inputs: Any, hidden: Tensor) -> None:
                values[name] = layout.packed(*hidden.split([words.shape[1], regions.shape[1]], dim=1))

            return hook

        blocks = self.family.stack.blocks.items()
        hooks = [block.register_forward_hook(keep(f"encoder_layer_{number}")) for number, block in blocks]
        pooled = enc.fused(text, visual).pooled
        for hook in hooks:
            hook.remove()
        assert pooled is not None
        own = self._matching(enc) if task == "itm" else self._restoring(task, enc)
        return {**values, "pooled_output": pooled, **own, "loss": self.loss(task)}

    def _restoring(self, task: str, enc: Encodings) -> Tensors:
        """Scores of what is hidden, and the terms that the loss is the mean of."""
        if task == "mlm":
            labels, states = self.batches[task].text["masked"].labels, enc.fused("masked", "clean").text
            assert labels is not None
            assert states is not None
            picked = labels != IGNORE
            scores = self.mlm.head(states[picked], self.family.word_embedding.weight)
            return {"scores": scores, "loss_elementwise": F.cross_entropy(scores, labels[picked], reduction="none")}
        picked = self.inputs[task]["img_masks"]
        if task == "mrfr":
            scores = self.mrfr.features(enc, picked)
            terms = F.mse_loss(scores, self.inputs[task]["feat_targets"], reduction="none")
        elif task == "mrc":
            scores = self.mrc.logits(enc, picked)
            terms = F.cross_entropy(scores, self.mrc.labels(self.batches[task], picked), reduction="none")
        else:
            scores = self.mrc_kl.logits(enc, picked)
            terms = F.kl_div(scores.log_softmax(dim=1), self.inputs[task]["label_targets"], reduction="none")
        return {"scores": scores, "loss_elementwise": terms}

    def _matching(self, enc: Encodings) -> Tensors:
        """Scores of the pairs, and what transport makes of their words and regions."""
        inputs, layout = self.inputs["itm"], self.layouts["itm"]
        fused, labels = enc.fused("clean", "clean"), inputs["targets"]
        assert fused.text is not None
        assert fused.visual is not None
        assert fused.pooled is not None
        found, losses, scores = self.wra.align(enc), self.losses("itm"), self.itm.logits(fused.pooled)
        packed, places = layout.packed(fused.text, fused.visual), inputs["ot_inputs.ot_scatter"]
        rows = packed.new_zeros(len(packed), int(inputs["ot_inputs.scatter_max"]) + 1, packed.shape[2])
        rows = rows.scatter(1, places[..., None].expand_as(packed), packed)
        length, regions = layout.words.shape[1], layout.regions.shape[1]
        return {
            "itm_scores": scores,
            "itm_loss_per_example": F.cross_entropy(scores, labels, reduction="none"),
            "itm_loss": losses["itm"].value,
            "ot_loss": losses["wra"].value,
            "ot_txt_emb": rows[:, :length],
            "ot_img_emb": rows[:, length : length + regions],
            "ot_cost": found.cost,
            "ot_transport": found.plan.transpose(1, 2),
            "ot_distance": found.distance,
            "ot_pos_dist": found.distance[labels == 1],
            "ot_neg_dist": found.distance[labels == 0],
        }

    def gradients(self) -> Tensors:
        """{authors' name: gradient in their shape} of what has one."""
        found = {name: each.grad for name, each in self.names.items()}
        return {name: self._theirs(name, value).clone() for name, value in found.items() if value is not None}

    def after(self, moved: float) -> dict[str, Value]:
        """{authors' name: parameter in their shape}; key biases loosely, by how far they may have `moved`."""
        values = {name: self._theirs(name, each.detach()).clone() for name, each in self.names.items()}
        return {
            name: Loose(value, torch.full_like(value, 2 * moved), NOISE) if name.endswith("key.bias") else value
            for name, value in values.items()
        }

    def optimizer(self, options: dict[str, Any]) -> torch.optim.Optimizer:
        """The authors decide by their names what decays."""
        config = OptimConfig(
            "adamw_transformers",
            betas=tuple(options["betas"]),
            eps=options["eps"],
            weight_decay=options["weight_decay"],
            no_decay=UNDECAYED,
        )
        return optimizers.build(self.names.items(), config)

    def _theirs(self, name: str, value: Tensor) -> Tensor:
        missing = self.shapes[name][0] - len(value)  # the mask table's first row, which is always zero
        return value if missing == 0 else torch.cat([value.new_zeros(missing, *value.shape[1:]), value])


def _under(tensors: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
