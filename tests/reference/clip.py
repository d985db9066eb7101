"""CLIP's steps and the SigLIP loss by our family, objectives and PretrainModel, in open_clip's names.

With two ranks our objectives are compared with the authors' exact variants (`clip_local1_grad1`, all of
SigLIP's). How the authors' three other variants gather features stands in this file, around our towers and
logits, so that those tensors are compared as well.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.distributed.spawn import run_ranks
from tests.reference.compare import Folder
from vlscale import distributed
from vlscale.families import clip
from vlscale.model import Encodings, PretrainModel
from vlscale.nn import contrast
from vlscale.objectives import itc, sigmoid
from vlscale.types import Batch, Loss, Moment, Text, Visual
from vlscale.weights import fill, find

Tensors = dict[str, Tensor]
RANKS = 2
FIRST = "s0/"  # the step whose batch the SigLIP loss and the ranks share
GATHERS = ((False, False), (False, True), (True, False), (True, True))  # (local_loss, gather_with_grad)
EXCHANGES = ("bidir", "shift", "reduce", "gather")  # ways to send texts round, one result
TURNED = ("visual.proj", "text_projection")  # the authors write x @ matrix
UNDECAYED = ("class_embedding", "positional_embedding")
WATCHED = {  # our modules: what the authors' name for the output is
    r"image_encoder\.patches\.projection": "vis_patch",
    r"image_encoder\.pre_norm": "vis_ln_pre",
    r"image_encoder\.stack\.blocks\.(\d+)": r"vis_block\1",
    r"image_encoder\.norm": "vis_ln_post",
    r"visual_proj": "image_features_unnormalized",
    r"text_stack\.blocks\.(\d+)": r"text_block\1",
    r"text_norm": "text_ln_final",
    r"text_proj": "text_features_unnormalized",
}


def run(folder: Folder) -> dict[str, dict[str, Tensor]]:
    """{outputs file: {name: tensor}}: the steps, the SigLIP loss, and both with two ranks."""
    torch.manual_seed(0)  # of starts that the authors' weights replace
    found = {**_steps(folder), **_siglip(folder)}
    ranks = run_ranks(_on_rank, RANKS, folder)
    for name in {name for own in ranks for name in own}:
        for rank, own in enumerate(ranks):
            variant, _, rest = name.partition("/")
            value = torch.stack([each[name] for each in ranks]).mean(dim=0) if "ddp_grad/" in rest else own[name]
            found[f"w2/{variant}/r{rank}/{rest}"] = value
    return {"outputs.safetensors": found}


def family_config(config: dict[str, Any]) -> clip.Config:
    """Our sizes from a reference folder's config.json."""
    vision, text = config["vision"], config["text"]
    return clip.Config(
        image_size=vision["image_size"],
        patch=vision["patch_size"],
        visual_width=vision["width"],
        visual_layers=vision["layers"],
        visual_heads=vision["width"] // vision["head_width"],
        visual_intermediate=round(vision["width"] * config["mlp_ratio"]),
        hidden=text["width"],
        heads=text["heads"],
        text_layers=text["layers"],
        intermediate=round(text["width"] * config["mlp_ratio"]),
        vocab=text["vocab_size"],
        text_length=text["context_length"],
        embed=config["embed_dim"],
        gelu="quick" if config["quick_gelu"] else "erf",
        pool="largest",
    )


def _steps(folder: Folder) -> Tensors:
    """Consecutive steps on one process."""
    runner, batches = _Runner(folder, "itc"), folder.tensors("batch.safetensors")
    optimizer = runner.optimizer()
    found: Tensors = {}
    for step in sorted({name.split("/")[0] for name in batches}, key=lambda name: int(name[1:])):
        seen = runner.forward(_batch(batches, f"{step}/"))
        torch.autograd.backward(seen.loss.value)
        values = {**seen.everything(), **runner.norms("grad")}
        if f"{step}/" == FIRST:
            found |= {f"grad/{name}": value for name, value in runner.gradients().items()}
        optimizer.step()
        runner.clamp()
        after = runner.parameters()
        values |= runner.norms("param")
        values |= {"logit_scale_after": after["logit_scale"], "visual_proj_after": after["visual.proj"]}
        found |= {f"{step}/{name}": value for name, value in values.items()}
        optimizer.zero_grad(set_to_none=True)
    return found


def _siglip(folder: Folder) -> Tensors:
    """The SigLIP loss of the whole batch on one process."""
    runner = _Runner(folder, "sigmoid")
    seen = runner.forward(_batch(folder.tensors("batch.safetensors"), FIRST))
    torch.autograd.backward(seen.loss.value)
    found = seen.everything()
    kept = ("loss", "logit_scale_exp", "grad_image_features", "grad_text_features")
    bias = runner.parameters()["logit_bias"]
    values = {
        **{name: found[name] for name in kept},
        "loss_chunk2": found["loss"],
        "logits": found["logits_per_image"] + bias,
        **{f"grad/{name}": value for name, value in runner.gradients().items()},
    }
    return {f"siglip/{name}": value for name, value in values.items()}


def _on_rank(folder: Folder) -> Tensors:
    """All variants on this rank's half of the batch, {variant/tensor: value}; gradients before the mean over ranks."""
    batch = _batch(folder.tensors("batch.safetensors"), FIRST, distributed.rank(), RANKS)
    found: Tensors = {}
    for local, with_gradient in GATHERS:
        runner = _Runner(folder, "itc", scope="global")
        seen = runner.forward(batch)
        gathered = _gather_as_authors(seen, local, with_gradient)
        loss = seen.loss.value if local and with_gradient else gathered.loss  # ours, or the authors'
        values = {**gathered.values(), **runner.backward(seen, loss)}
        found |= {f"clip_local{local:d}_grad{with_gradient:d}/{name}": value for name, value in values.items()}
    runner = _Runner(folder, "sigmoid")
    seen = runner.forward(batch)
    values = runner.backward(seen, seen.loss.value)
    for exchange in EXCHANGES:
        found |= {f"siglip_{exchange}/{name}": value for name, value in values.items()}
    return found


class _Gathered(NamedTuple):
    """What one of the authors' gather variants computes on a rank."""

    loss: Tensor
    image_logits: Tensor
    text_logits: Tensor
    labels: Tensor

    def values(self) -> Tensors:
        """Under the authors' names."""
        return {
            "logits_per_image": self.image_logits.detach(),
            "logits_per_text": self.text_logits.detach(),
            "labels": self.labels,
        }


def _gather_as_authors(seen: _Seen, local: bool, with_gradient: bool) -> _Gathered:
    """src/open_clip/loss.py: own rows or all rows against all columns, which carry a gradient or not."""
    own = [seen.image, seen.text]
    size, first = len(seen.image), distributed.rank() * len(seen.image)
    everyone = distributed.gather(own if with_gradient else [part.detach() for part in own])
    if not (local or with_gradient):  # the rank's own part is put back with its gradient
        everyone = [
            torch.cat([whole[:first], part, whole[first + size :]]) for whole, part in zip(everyone, own, strict=True)
        ]
    rows = own if local else everyone
    temperature = seen.temperature()
    image_logits = contrast.logits(rows[0], everyone[1], temperature)
    text_logits = contrast.logits(rows[1], everyone[0], temperature)
    labels = torch.arange(len(rows[0])) + (first if local else 0)
    loss = (F.cross_entropy(image_logits, labels) + F.cross_entropy(text_logits, labels)) / 2
    return _Gathered(loss, image_logits, text_logits, labels)


class _Seen:
    """One pass of the model: its loss, both modalities' embeddings, and the outputs of the towers' modules."""

    def __init__(self, runner: _Runner) -> None:
        self.family = runner.family
        self.outputs: Tensors = {}
        self.temperatures: list[Tensor] = []  # each use of it, for its gradient
        self.enc: Encodings | None = None
        self.loss: Loss
        self.hooks = [runner.objective.register_forward_pre_hook(self._keep_encodings)]
        self.hooks.append(self.family.temperature.register_forward_hook(self._keep_temperature))
        for name, module in self.family.named_modules():
            for pattern, theirs in WATCHED.items():
                match = re.fullmatch(pattern, name)
                if match:
                    self.hooks.append(module.register_forward_hook(self._keep_output(match.expand(theirs))))

    def _keep_encodings(self, _module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.enc = inputs[0]
        for features in (self.image, self.text):
            features.retain_grad()

    def _keep_temperature(self, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.retain_grad()
            self.temperatures.append(output)

    def _keep_output(self, name: str) -> Any:
        def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            self.outputs[name] = output.detach()

        return keep

    @property
    def image(self) -> Tensor:
        """[b, E] unit length."""
        assert self.enc is not None
        embed = self.enc.visual("clean").embed
        assert embed is not None
        return embed

    @property
    def text(self) -> Tensor:
        """[b, E] unit length."""
        assert self.enc is not None
        embed = self.enc.text("clean").embed
        assert embed is not None
        return embed

    def temperature(self) -> Tensor:
        """[1], one more use of it."""
        value: Tensor = self.family.temperature()
        self._keep_temperature(self.family.temperature, (), value)
        return value

    @torch.no_grad()
    def everything(self) -> Tensors:
        """What one process without others computes, after backward."""
        temperature = self.temperature()
        return {
            **self.outputs,
            "loss": self.loss.value.detach(),
            "logit_scale_exp": 1 / temperature[0],
            "image_features": self.image.detach(),
            "text_features": self.text.detach(),
            "logits_per_image": contrast.logits(self.image, self.text, temperature),
            "logits_per_text": contrast.logits(self.text, self.image, temperature),
            **self.feature_gradients(),
        }

    def feature_gradients(self) -> Tensors:
        """Of both modalities' embeddings."""
        assert self.image.grad is not None
        assert self.text.grad is not None
        return {"grad_image_features": self.image.grad, "grad_text_features": self.text.grad}

    def scale_gradient(self) -> Tensor:
        """[] with respect to the scale s = 1 / temperature: d temperature / d s = - temperature squared."""
        used = [(each.detach(), each.grad) for each in self.temperatures if each.grad is not None]
        return torch.stack([-(value**2) * gradient for value, gradient in used]).sum()


class _Runner:
    """Our model under the authors' weights."""

    def __init__(self, folder: Folder, objective: str, scope: Any = "rank") -> None:
        self.config = folder.config
        self.family = clip.build(family_config(self.config))
        weights = folder.tensors("weights.safetensors")
        if objective == "sigmoid":
            self.objective: nn.Module = sigmoid.build(sigmoid.Config(), self.family)
            weights["logit_scale"] = torch.tensor(self.config["siglip_scale"])
            weights["logit_bias"] = torch.tensor(self.config["siglip_bias"])
        else:
            self.objective = itc.build(itc.Config(queue=0, soften=0.0, scope=scope), self.family)
        self.name = objective
        self.model = PretrainModel(self.family, {objective: self.objective})
        fill(self.model, weights, clip.PUBLISHED)
        self.shapes = {name: tensor.shape for name, tensor in weights.items()}
        ours = dict(self.model.named_parameters())
        self.names = {name: ours[find(name, clip.PUBLISHED)[1][0]] for name in weights}
        self.order = self.config.get("param_order", sorted(self.names))

    def forward(self, batch: Batch) -> _Seen:
        """One watched pass."""
        seen = _Seen(self)
        seen.loss = self.model(batch, Moment(1)).losses[self.name]
        for hook in seen.hooks:
            hook.remove()
        return seen

    def backward(self, seen: _Seen, loss: Tensor) -> Tensors:
        """The loss and its gradients on this rank; those of parameters before the mean over ranks."""
        torch.autograd.backward(loss)
        return {
            "loss": loss.detach(),
            **seen.feature_gradients(),
            "grad_logit_scale_exp_local": seen.scale_gradient(),
            **{f"ddp_grad/{name}": value for name, value in self.gradients().items()},
        }

    def optimizer(self) -> torch.optim.AdamW:
        """AdamW; tensors that the authors hold as one-dimensional, class and position embeddings do not decay."""
        groups: dict[bool, list[nn.Parameter]] = defaultdict(list)
        for name, parameter in self.names.items():
            groups[len(self.shapes[name]) > 1 and not name.endswith(UNDECAYED)].append(parameter)
        decay = {True: self.config["weight_decay"], False: 0.0}
        return torch.optim.AdamW(
            [{"params": groups[decays], "weight_decay": decay[decays]} for decays in groups],
            lr=self.config["lr"],
            betas=tuple(self.config["betas"]),
            eps=self.config["eps"],
        )

    @torch.no_grad()
    def clamp(self) -> None:
        """What the engine does after each step."""
        for parameter, least, greatest in self.objective.limits():  # type: ignore[operator]
            parameter.clamp_(least, greatest)

    def gradients(self) -> Tensors:
        """{authors' name: gradient in their shape}."""
        return dict(self._theirs({name: each.grad for name, each in self.names.items()}))

    def parameters(self) -> Tensors:
        """{authors' name: parameter in their shape}."""
        return dict(self._theirs({name: each.detach() for name, each in self.names.items()}))

    def norms(self, kind: str) -> Tensors:
        """L2 norms in the authors' order: of gradients before a step, of parameters after it."""
        values = self.gradients() if kind == "grad" else self.parameters()
        norms = torch.stack([values[name].norm() for name in self.order])
        return {"grad_norm_all" if kind == "grad" else "param_norm_after": norms}

    def _theirs(self, values: dict[str, Tensor | None]) -> Iterator[tuple[str, Tensor]]:
        for name, value in values.items():
            assert value is not None, f"no gradient reaches {name}"
            yield name, (value.T if name in TURNED else value.view(self.shapes[name])).clone()


def _batch(inputs: Tensors, prefix: str, part: int = 0, parts: int = 1) -> Batch:
    """One of so many equal parts of a step's batch. The mask ends at the end token, which has the largest id."""
    ids, pixels = (inputs[prefix + name].chunk(parts)[part] for name in ("text", "image"))
    mask = torch.arange(ids.shape[1]) <= ids.argmax(dim=1, keepdim=True)
    return Batch({"clean": Text(ids, mask)}, {"clean": Visual(pixels)}, pair_id=torch.arange(len(ids)))
