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
from vlscale.nn import momentum
from vlscale.objectives import itc, itm, mlm
from vlscale.types import Batch, Loss, Text, Visual
from vlscale.weights import fill, find

Tensors = dict[str, Tensor]
Losses = dict[str, Loss]
Values = dict[str, Tensor | Loose]
NOISE = (
    "a key bias adds the same to every score of a query: its gradient is 0 but for rounding, which AdamW "
    "turns into steps of up to the learning rate; checked to stay within that bound"
)
WATCHED = (("itc", "logits"), ("itc", "targets"), ("itm", "logits"), ("itm", "weights"))


def run(folder: Folder) -> dict[str, Values]:
    """{outputs file: {name: tensor}} of every step, in one process and as two ranks."""
    single = _Runner(folder).train({"": folder.tensors("batch.safetensors")})
    inputs = folder.tensors("ddp2_batch.safetensors")
    computed = {"outputs.safetensors": single}
    if inputs:
        ranks = sorted({name.split("/")[0] for name in inputs})
        parts = {f"{rank}/": _under(inputs, f"{rank}/") for rank in ranks}
        computed["ddp2_outputs.safetensors"] = _Runner(folder).train(parts)
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


class _Runner:
    """The model under the authors' weights, its optimizer, and what each step leaves behind."""

    def __init__(self, folder: Folder) -> None:
        self.config = folder.config
        self.family = family = albef.build(family_config(self.config))
        self.itc = itc.build(itc.Config(queue=self.config["queue_size"]), family)
        self.itm = itm.build(itm.Config(epsilon=0.0, same_picture="negative"), family)
        self.mlm = mlm.build(mlm.Config(scope="rank"), family)
        self.model = PretrainModel(family, {"itc": self.itc, "itm": self.itm, "mlm": self.mlm})
        weights = folder.tensors("weights.safetensors")
        fill(self.model, weights, albef.PUBLISHED)
        self.names = self._names(weights)
        self.shapes = {name: weights[name].shape for name in self.names}
        self.order = self.config.get("param_order", sorted(self.names))
        self.optimizer = self._optimizer(self.config["optimizer"])

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
        return torch.optim.AdamW(
            [
                {"params": groups[True], "weight_decay": options["weight_decay"]},
                {"params": groups[False], "weight_decay": 0.0},
            ],
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
            state = self._queue("before")
            self._backward([losses for losses, _, _ in own.values()])
            self.optimizer.step()
            for _, _, pending in own.values():  # rank 0's keys, then rank 1's
                self.itc.pending = pending
                self.model.commit("all")
            shared: Values = {**state, **self._queue("after"), **self._gradients(), **self._after(number + 1)}
            for rank, (_, values, _) in own.items():
                out |= {f"{rank}s{number}/{name}": value for name, value in {**values, **shared}.items()}
            if number == steps[0] and "" in ranks:  # the first step's gradients also stand without a prefix
                out |= {name: value for name, value in shared.items() if name.startswith("grad/")}
        return out

    def _forward(self, inputs: Tensors) -> tuple[Losses, Tensors, itc.Pending | None]:
        """One rank's losses, everything recorded on the way, and the keys that wait for `commit`."""
        with _Recorder(self, inputs) as recorder:
            losses = self.model(recorder.batch, 1)
            values = recorder.values(losses)
        return losses, {**values, **self._alone(losses)}, self.itc.pending

    def _backward(self, ranks: list[Losses]) -> None:
        """The gradient of the total, averaged over ranks."""
        self.optimizer.zero_grad(set_to_none=True)
        for losses in ranks:
            torch.autograd.backward(self.model.total(losses, {}) / len(ranks))

    @torch.no_grad()
    def _before(self, number: int) -> None:
        """The share of soft targets of this step, the temperature's limits, and the twin's move."""
        shares = self.config["alpha"]
        share = shares[min(number, len(shares) - 1)] if isinstance(shares, list) else shares
        self.itc.config = replace(self.itc.config, soften=share)
        self.mlm.config = replace(self.mlm.config, soften=share)
        for parameter, least, greatest in self.itc.limits():
            parameter.clamp_(least, greatest)
        pairs = [(online.data, twin.data) for online, twin in self.model.momentum_pairs()]
        averages, sources = [twin for _, twin in pairs], [online for online, _ in pairs]
        momentum.update(averages, sources, self.config["momentum"])

    def _queue(self, when: str) -> Tensors:
        image, text = self.itc.image_queue, self.itc.text_queue
        assert image is not None
        assert text is not None
        return {
            f"image_queue_{when}": image.keys.T.clone(),
            f"text_queue_{when}": text.keys.T.clone(),
            f"queue_ptr_{when}": image.pointer.clone(),
        }

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
        for objective, name in (("itc", "ita"), ("itm", "itm"), ("mlm", "mlm")):
            found = torch.autograd.grad(
                losses[objective].value,
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

    def __init__(self, runner: _Runner, inputs: Tensors) -> None:
        self.runner = runner
        self.inputs = inputs
        self.batch = _batch(inputs)
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
        self.hooks.append(runner.itc.register_forward_pre_hook(self._keep_encodings))
        for objective, method in WATCHED:
            self._watch(getattr(runner, objective), f"{objective}.{method}")
        forced = (self.inputs["neg_image_idx"], self.inputs["neg_text_idx"])
        runner.itm.draw = lambda t2i, i2t: forced  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()
        for objective, method in WATCHED:
            del getattr(self.runner, objective).__dict__[method]
        del self.runner.itm.__dict__["draw"]

    def _keep_encodings(self, _module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.enc = inputs[0]

    def _watch(self, objective: nn.Module, name: str) -> None:
        method = name.split(".")[1]
        plain = getattr(objective, method)

        def watched(*inputs: Any) -> Any:
            result = plain(*inputs)
            self.calls[name].append(result)
            return result

        objective.__dict__[method] = watched

    @torch.no_grad()
    def values(self, losses: Losses) -> Tensors:
        """Everything under the authors' names."""
        found = {**self._encodings(), **self._layers(), **self._contrast(), **self._losses(losses)}
        return {name: value.detach().clone() for name, value in found.items()}

    def _encodings(self) -> Tensors:
        enc = self.enc
        assert enc is not None
        twin, head, head_twin = enc.momentum, self.runner.mlm.head, self.runner.mlm.head_twin
        assert head_twin is not None
        masked, masked_m = enc.fused("masked", "clean").text, twin.fused("masked", "clean").text
        logits_m = head_twin(masked_m, twin.family.word_embedding.weight)
        return {
            "image_embeds": enc.visual("clean").hidden,
            "image_embeds_m": twin.visual("clean").hidden,
            "image_feat": enc.visual("clean").embed,
            "image_feat_m": twin.visual("clean").embed,
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

    def _contrast(self) -> Tensors:
        i2t, t2i, i2t_soft, t2i_soft = self.calls["itc.logits"]
        targets_i2t, targets_t2i = self.calls["itc.targets"]
        (weights_t2i, weights_i2t), (logits,) = self.calls["itm.weights"][0], self.calls["itm.logits"]
        return {
            "sim_i2t": i2t,
            "sim_t2i": t2i,
            "sim_i2t_m": i2t_soft,
            "sim_t2i_m": t2i_soft,
            "target_i2t": targets_i2t,
            "target_t2i": targets_t2i,
            "itm_weights_t2i": weights_t2i,
            "itm_weights_i2t": weights_i2t,
            "itm_logits": logits,
        }

    def _losses(self, losses: Losses) -> Tensors:
        contrast, words, legacy = losses["itc"], losses["mlm"], self._legacy()
        return {
            "loss_i2t": contrast.metrics["itc/i2t"],
            "loss_t2i": contrast.metrics["itc/t2i"],
            "loss_ita": contrast.value,
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


def _batch(inputs: Tensors) -> Batch:
    mask = inputs["attention_mask"].bool()
    return Batch(
        text={
            "clean": Text(inputs["input_ids"], mask),
            "masked": Text(inputs["mlm_input_ids"], mask, inputs["mlm_labels"]),
        },
        visual={"clean": Visual(inputs["image"])},
        pair_id=torch.arange(len(mask)),
    )
