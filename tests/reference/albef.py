"""ALBEF's pre-training steps by our family, objectives and PretrainModel, in the authors' names.

The authors move the twin at the start of a forward pass with the parameters before the optimizer's step, and
clamp the temperature there; so does this runner, before each forward. Everything else is the model's own.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tests.reference.compare import Folder, Loose
from vlscale.families import albef
from vlscale.model import Encodings, PretrainModel
from vlscale.nn import contrast, momentum
from vlscale.objectives import itc, itm, mlm
from vlscale.objectives.base import FamilyLike
from vlscale.types import Batch, Loss, Moment, Pass, Text, Visual
from vlscale.weights import fill, find

Tensors = dict[str, Tensor]
Losses = dict[str, Loss]
Values = dict[str, Tensor | Loose]
NOISE = (
    "a key bias adds the same to every score of a query: its gradient is 0 but for rounding, which AdamW "
    "turns into steps of up to the learning rate; checked to stay within that bound"
)
WATCHED = ("logits", "weights")  # methods of the matching objective


def run(folder: Folder) -> dict[str, Values]:
    """{outputs file: {name: tensor}} of every step, in one process and as two ranks."""
    return run_steps(folder, Runner)


def run_steps(folder: Folder, runner: type[Runner]) -> dict[str, Values]:
    """The same by another runner."""
    computed = {"outputs.safetensors": runner(folder).train({"": folder.tensors("batch.safetensors")})}
    inputs = folder.tensors("ddp2_batch.safetensors")
    if inputs:
        ranks = sorted({name.split("/")[0] for name in inputs})
        parts = {f"{rank}/": _under(inputs, f"{rank}/") for rank in ranks}
        computed["ddp2_outputs.safetensors"] = runner(folder).train(parts)
    return computed


def _under(tensors: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def family_config(config: dict[str, Any]) -> albef.Config:
    """Our sizes from a reference folder's config.json."""
    return albef.Config(
        image_size=config["image_res"],
        patch=config["patch_size"],
        visual_width=config["vision_width"],
        visual_layers=config["vision_depth"],
        visual_heads=config["vision_heads"],
        visual_intermediate=round(config["vision_width"] * config["mlp_ratio"]),
        hidden=config["hidden_size"],
        heads=config["num_attention_heads"],
        text_layers=config["fusion_layer"],
        fusion_layers=config["num_hidden_layers"] - config["fusion_layer"],
        intermediate=config["intermediate_size"],
        vocab=config["vocab_size"],
        max_positions=config["max_position_embeddings"],
        segments=config["type_vocab_size"],
        dropout=config["dropout"],
        embed=config["embed_dim"],
        temperature=config["temp"],
        text_length=config["text_len"],
    )


class Runner:
    """The model under the authors' weights, its optimizer, and what each step leaves behind."""

    twin_view = "clean"  # of the pictures

    def __init__(self, folder: Folder) -> None:
        self.config = folder.config
        self.family = family = albef.build(family_config(self.config))
        view = self.twin_view
        self.itm = itm.build(itm.Config(epsilon=0.0, same_picture="negative", momentum_visual=view), family)
        self.mlm = mlm.build(mlm.Config(scope="rank", momentum_visual=view), family)
        self.contrasts = self.build_contrasts(family)
        self.model = PretrainModel(family, {**self.contrasts, "itm": self.itm, "mlm": self.mlm})
        weights = folder.tensors("weights.safetensors")
        fill(self.model, weights, albef.PUBLISHED)
        self.names = self._names(weights)
        self.shapes = {name: weights[name].shape for name in self.names}
        self.order = self.config.get("param_order", sorted(self.names))
        self.optimizer = self._optimizer(self.config["optimizer"])

    def build_contrasts(self, family: FamilyLike) -> dict[str, Any]:
        """The objectives whose weighted sum the authors call ita."""
        return {"itc": itc.build(itc.Config(queue=self.config["queue_size"]), family)}

    def views(self, inputs: Tensors) -> dict[str, Visual]:
        """The pictures of one rank."""
        return {"clean": Visual(inputs["image"])}

    def ita(self, losses: Losses) -> Tensor:
        """The authors' loss_ita."""
        return torch.stack([losses[name].value * each.weight for name, each in self.contrasts.items()]).sum()

    def contrast_values(self, enc: Encodings, losses: Losses) -> Tensors:
        """Similarities, targets and losses of the contrastive objectives."""
        values = {"loss_ita": self.ita(losses)}
        for name in ("i2t", "t2i"):
            values[f"loss_{name}"] = losses["itc"].metrics[f"itc/{name}"]
            values[f"sim_{name}"] = self.similarities(enc, name)
            values[f"sim_{name}_m"] = self.similarities(enc, name, teacher=True)
            soft, hard = values[f"sim_{name}_m"].softmax(dim=1), torch.eye(*values[f"sim_{name}"].shape)
            values[f"target_{name}"] = torch.lerp(hard, soft, self.share)
        return values

    def similarities(self, enc: Encodings, name: str, teacher: bool = False) -> Tensor:
        """Embeddings (the twin's for `teacher`) against the twin's and a queue; `name` is i2t, t2i, ..."""
        twins = embeds(enc.momentum, self.twin_view)
        rows, queue = twins if teacher else embeds(enc, "clean"), enc.queue({"i": "image", "t": "text"}[name[2]])
        return contrast.logits(rows[name[0]], torch.cat([twins[name[2]], queue.keys]), enc.family.temperature())

    def _names(self, weights: Tensors) -> dict[str, nn.Parameter]:
        """{authors' parameter name: our parameter}, by the rename table."""
        ours = dict(self.model.named_parameters())
        targets = {name: find(name, albef.PUBLISHED)[1] for name in weights}
        return {
            name: next(ours[target] for target in found if target in ours)
            for name, found in targets.items()
            if any(target in ours for target in found)
        }

    def _optimizer(self, options: dict[str, Any]) -> torch.optim.AdamW:
        """AdamW with the authors' rule: no decay for what they hold as one-dimensional, and for biases."""
        groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for name, parameter in self.names.items():
            if parameter.requires_grad:
                spared = len(self.shapes[name]) == 1 or name.endswith(".bias")
                groups[not spared].append(parameter)
        decays = {True: options["weight_decay"], False: 0.0}
        return torch.optim.AdamW(
            [{"params": groups[decay], "weight_decay": decays[decay]} for decay in groups],
            lr=options["lr"],
            betas=tuple(options["betas"]),
            eps=options["eps"],
        )

    def train(self, ranks: dict[str, Tensors]) -> Values:
        """All steps; `ranks` maps a prefix of the output names to that rank's inputs."""
        out: Values = {}
        steps = sorted({int(name.split("/")[0][1:]) for part in ranks.values() for name in part})
        for number in steps:
            self._before(number)
            own = {rank: self._forward(_under(inputs, f"s{number}/")) for rank, inputs in ranks.items()}
            state = self._queues("before")
            self._backward([made.losses for made, _ in own.values()])
            self.optimizer.step()
            self.model.commit([made.keys for made, _ in own.values()], number + 1, "step")
            shared: Values = {**state, **self._queues("after"), **self._gradients(), **self._after(number + 1)}
            for rank, (_, values) in own.items():
                out |= {f"{rank}s{number}/{name}": value for name, value in {**values, **shared}.items()}
            if number == steps[0] and "" in ranks:  # the first step's gradients also stand without a prefix
                out |= {name: value for name, value in shared.items() if name.startswith("grad/")}
        return out

    def _forward(self, inputs: Tensors) -> tuple[Pass, Tensors]:
        """What the model makes of one rank's inputs, and everything recorded on the way."""
        with _Recorder(self, inputs) as recorder:
            made = self.model(recorder.batch, Moment(step=1))
            values = recorder.values(made.losses)
        return made, {**values, **self._alone(made.losses)}

    def _backward(self, ranks: list[Losses]) -> None:
        """The gradient of the total, averaged over ranks."""
        self.optimizer.zero_grad(set_to_none=True)
        for losses in ranks:
            torch.autograd.backward(self.model.total(losses, {}) / len(ranks))

    @torch.no_grad()
    def _before(self, number: int) -> None:
        """The share of soft targets of this step, the temperature's limits, and the twin's move."""
        shares = self.config["alpha"]
        self.share = shares[min(number, len(shares) - 1)] if isinstance(shares, list) else shares
        for objective in (self.contrasts["itc"], self.mlm):
            objective.config = replace(objective.config, soften=self.share)
        for parameter, least, greatest in self.contrasts["itc"].limits():
            parameter.clamp_(least, greatest)
        pairs = self.model.momentum_pairs()
        momentum.update([twin.data for _, twin in pairs], [one.data for one, _ in pairs], self.config["momentum"])

    def _queues(self, when: str) -> Tensors:
        queues = self.model.key_queues()
        keys = {f"{name}_queue_{when}": queue.keys.T.clone() for name, queue in queues.items()}
        return {**keys, f"queue_ptr_{when}": queues["image"].pointer.clone()}

    def _gradients(self) -> Tensors:
        found = {name: parameter.grad for name, parameter in self.names.items()}
        gradients = [found[name] for name in self.order]
        norms = [0.0 if gradient is None else float(gradient.norm()) for gradient in gradients]
        shaped = {
            f"grad/{name}": value.clone().view(self.shapes[name]) for name, value in found.items() if value is not None
        }
        return {**shaped, "grad_norm_all": torch.tensor(norms)}

    def _alone(self, losses: Losses) -> Tensors:
        """The gradient of each objective's loss on its own; the graph is kept."""
        trained = {name: each for name, each in self.names.items() if each.requires_grad}
        out = {}
        for name, loss in (("ita", self.ita(losses)), ("itm", losses["itm"].value), ("mlm", losses["mlm"].value)):
            found = torch.autograd.grad(
                loss,
                list(trained.values()),
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            for author, value in zip(trained, found, strict=True):
                out[f"grad_{name}/{author}"] = value.view(self.shapes[author])
        return out

    def _after(self, steps: int) -> Values:
        """Parameters after the optimizer's step, and all their norms; key biases loosely (see NOISE)."""
        norms = torch.tensor([float(self.names[name].detach().norm()) for name in self.order])
        slack = torch.zeros(len(self.order))
        after: Values = {}
        for name, parameter in self.names.items():
            value = parameter.detach().clone().view(self.shapes[name])
            bound = self._noise(name, value) * steps
            after[f"after/{name}"] = Loose(value, bound, NOISE) if bound.any() else value
            if name in self.order:
                slack[self.order.index(name)] = bound.norm()
        return {**after, "param_norm_after": Loose(norms, slack, NOISE)}

    def _noise(self, name: str, value: Tensor) -> Tensor:
        """How far rounding may carry each entry in one step: the learning rate, ours and theirs."""
        bound = torch.zeros_like(value)
        if name.endswith("key.bias"):
            bound.fill_(2 * self.config["optimizer"]["lr"])
        if name.endswith("qkv.bias"):  # queries, keys, values
            bound.chunk(3)[1].fill_(2 * self.config["optimizer"]["lr"])
        return bound


class _Recorder:
    """Watches one forward pass of one rank: the encodings, each block's outputs, logits, targets, weights."""

    def __init__(self, runner: Runner, inputs: Tensors) -> None:
        self.runner = runner
        self.inputs = inputs
        self.batch = _batch(inputs, runner.views(inputs))
        self.outputs: dict[str, list[Tensor]] = defaultdict(list)  # module -> one output per call
        self.calls: dict[str, list[Any]] = defaultdict(list)  # method -> one result per call
        self.enc: Encodings | None = None

    def __enter__(self) -> _Recorder:
        family, runner = self.runner.model.family, self.runner
        watched = {
            name: module
            for name, module in family.named_modules()
            if re.fullmatch(r".*stack\.blocks\.\d+|text_embeddings|image_encoder\.patches", name)
        }
        self.hooks = [
            module.register_forward_hook(lambda _m, _i, out, name=name: self.outputs[name].append(out))
            for name, module in watched.items()
        ]
        self.hooks.append(runner.itm.register_forward_pre_hook(self._keep_encodings))
        for method in WATCHED:
            self._watch(method)
        forced = (self.inputs["neg_image_idx"], self.inputs["neg_text_idx"])
        runner.itm.draw = lambda enc, t2i, i2t: forced  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()
        for method in (*WATCHED, "draw"):
            del self.runner.itm.__dict__[method]

    def _keep_encodings(self, _module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.enc = inputs[0]

    def _watch(self, method: str) -> None:
        plain = getattr(self.runner.itm, method)

        def watched(*inputs: Any) -> Any:
            result = plain(*inputs)
            self.calls[method].append(result)
            return result

        self.runner.itm.__dict__[method] = watched

    @torch.no_grad()
    def values(self, losses: Losses) -> Tensors:
        """Everything under the authors' names."""
        assert self.enc is not None
        contrasts = self.runner.contrast_values(self.enc, losses)
        found = {**self._encodings(), **self._layers(), **contrasts, **self._matching(), **self._losses(losses)}
        return {name: value.detach().clone() for name, value in found.items()}

    def _encodings(self) -> Tensors:
        enc = self.enc
        assert enc is not None
        twin, head, head_twin = enc.momentum, self.runner.mlm.head, self.runner.mlm.head_twin
        assert head_twin is not None
        view = self.runner.twin_view
        masked, masked_m = enc.fused("masked", "clean").text, twin.fused("masked", view).text
        logits_m = head_twin(masked_m, twin.family.word_embedding.weight)
        return {
            "image_embeds": enc.visual("clean").hidden,
            "image_embeds_m": twin.visual(view).hidden,
            "image_feat": enc.visual("clean").embed,
            "image_feat_m": twin.visual(view).embed,
            "text_embeds": enc.text("clean").hidden,
            "text_embeds_m": twin.text("clean").hidden,
            "text_feat": enc.text("clean").embed,
            "text_feat_m": twin.text("clean").embed,
            "fusion_pos": enc.fused("clean", "clean").text,
            "mlm_hidden": masked,
            "mlm_logits": head(masked, enc.family.word_embedding.weight),
            "mlm_logits_m": logits_m,
            "mlm_soft_labels": logits_m.softmax(dim=-1),
        }

    def _layers(self) -> Tensors:
        """Outputs of blocks; a stack runs several times, and its last block tells which run is which."""
        assert self.enc is not None
        config = self.runner.family.config
        runs = {
            "text_stack": self.enc.text("masked").hidden,
            "fusion_stack": self.enc.fused("masked", "clean").text,
        }
        values = {"patch_embed": self.outputs["image_encoder.patches"][0]}
        for number in range(config.visual_layers):
            values[f"vit_block{number}"] = self.outputs[f"image_encoder.stack.blocks.{number}"][0]
        layers = config.text_layers + config.fusion_layers
        for stack, final in runs.items():
            first = 0 if stack == "text_stack" else config.text_layers
            last = (config.text_layers if stack == "text_stack" else layers) - 1
            run = _which(self.outputs[f"{stack}.blocks.{last}"], final)
            for number in range(first, last + 1):
                values[f"mlm_layer{number}"] = self.outputs[f"{stack}.blocks.{number}"][run]
        clean = _which(self.outputs[f"text_stack.blocks.{config.text_layers - 1}"], self.enc.text("clean").hidden)
        values["text_embedding_output"] = self.outputs["text_embeddings"][clean]
        fused = self.outputs[f"fusion_stack.blocks.{layers - 1}"]
        values["fusion_neg"] = next(out for out in fused if len(out) == 2 * len(self.batch))
        return values

    def _matching(self) -> Tensors:
        (weights_t2i, weights_i2t), (logits,) = self.calls["weights"][0], self.calls["logits"]
        return {"itm_weights_t2i": weights_t2i, "itm_weights_i2t": weights_i2t, "itm_logits": logits}

    def _losses(self, losses: Losses) -> Tensors:
        words, legacy = losses["mlm"], self._legacy()
        return {
            "loss_itm": losses["itm"].value,
            "loss_mlm": words.value,
            "loss_mlm_hard": words.metrics["mlm/hard"],
            "loss_mlm_distill": words.metrics["mlm/soft"],
            "loss_mlm_legacy": legacy.value,
            "loss_mlm_distill_legacy": legacy.metrics["mlm/soft"],
            "loss_total": self.runner.model.total(losses, {}),
        }

    def _legacy(self) -> Loss:
        """The loss with the authors' axis mistake, on the same encodings."""
        words = self.runner.mlm
        current = words.config
        words.config = replace(current, legacy_token_axis=True)
        loss: Loss = words(self.enc, self.batch)
        words.config = current
        return loss


def _which(outputs: list[Tensor], wanted: Tensor | None) -> int:
    return next(number for number, out in enumerate(outputs) if out is wanted)


def embeds(enc: Encodings, view: str) -> Tensors:
    """[B, E] of pictures (i) and texts (t)."""
    found = {"i": enc.visual(view).embed, "t": enc.text("clean").embed}
    return {kind: each for kind, each in found.items() if each is not None}


def _batch(inputs: Tensors, views: dict[str, Visual]) -> Batch:
    mask = inputs["attention_mask"].bool()
    return Batch(
        text={
            "clean": Text(inputs["input_ids"], mask),
            "masked": Text(inputs["mlm_input_ids"], mask, inputs["mlm_labels"]),
        },
        visual=views,
        pair_id=torch.arange(len(mask)),
    )
