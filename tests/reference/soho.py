"""SOHO's pre-training steps by our family, objectives and PretrainModel, in the authors' names.

The authors move the dictionary inside a forward pass, between finding a cell's entry and taking its value; ours moves
after the step. This runner puts our dictionary's own parts in their order.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.distributed.spawn import run_ranks
from tests.reference.compare import Folder
from vlscale import distributed, optimizers
from vlscale.families import soho
from vlscale.model import Encodings, PretrainModel
from vlscale.nn import moving
from vlscale.nn.dictionary import Dictionary
from vlscale.objectives import itm, mlm, mvm
from vlscale.optim import OptimConfig, SgdConfig
from vlscale.types import Batch, Loss, Moment, Pass, Text, Visual
from vlscale.weights import fill, find

Tensors = dict[str, Tensor]
STEP_SIZE = 32.0  # of the stored pictures: int8 / 32
FIGURES = {"embed": "table", "cluster_size": "size", "embed_avg": "total", "cluster_sum": "used"}
LOSSES = {"loss_mlm": "mlm", "loss_mvm": "mvm", "loss_itm": "itm"}
WATCHED = {  # our modules: what the authors' name for the output is
    "trunk": "backbone_out",
    "cell_norm": "neck_conv_out",
    "value_map": "neck_pos_line_out",
    "gate.norm": "neck_gate_logits",
}
# The authors' optimizer (README): SGD for the trunk, AdamW for all else, clipped together, everything decays.
CLIP = 10.0
OPTIM = OptimConfig(
    "adamw_transformers",
    sgd=SgdConfig(("backbone.",), lr_scale=100.0, momentum=0.9, weight_decay=1e-4),
    lr=1e-4,
    betas=(0.9, 0.999),
    eps=1e-6,
    weight_decay=0.01,
    no_decay=(),
)


def run(folder: Folder) -> dict[str, Tensors]:
    """{outputs file: {name: tensor}}."""
    parts = (_train, _eval, _without_gate, _optimize, _dictionaries)
    return {"outputs.safetensors": {name: value for part in parts for name, value in part(folder).items()}}


def family_config(folder: Folder) -> soho.Config:
    """Our sizes from a reference folder."""
    c, weights = folder.config, folder.tensors("weights.safetensors")
    return soho.Config(
        image_size=c["pad"][0],
        depth=c["depth"],
        stem=c["stem"],
        base=c["base"],
        frozen_stages=c["frozen_stages"],
        codes=c["num_tokens"],
        decay=c["decay"],
        hidden=c["hidden"],
        heads=c["heads"],
        layers=c["layers"],
        intermediate=c["inter"],
        vocab=c["vocab"],
        max_positions=c["max_pos"],
        segments=len(weights["language.bert.embeddings.token_type_embeddings.weight"]),
        dropout=c["authors_config"]["language"]["hidden_dropout_prob"],
        text_length=c["L"],
    )


def _train(folder: Folder) -> Tensors:
    """Consecutive forward passes in training mode; the first with all it makes, and its gradients."""
    runner, found = Runner(folder), {}
    for number, step in enumerate(runner.steps):
        made, values = runner.forward(step)
        values |= {**runner.figures("vd_after/"), **runner.statistics("bn_after/")}
        if number == 0:
            runner.backward(made)
            found |= runner.gradients("grad/")
        found |= {f"train/{step}/{name}": value for name, value in values.items()}
    return found


def _eval(folder: Folder) -> Tensors:
    """The first batch in evaluation mode, with gradients."""
    runner = Runner(folder)
    runner.model.eval()
    made, values = runner.forward(runner.steps[0])
    runner.backward(made)
    return {**{f"eval/{name}": value for name, value in values.items()}, **runner.gradients("grad_eval/")}


def _without_gate(folder: Folder) -> Tensors:
    """The first batch by the neck that adds value and cell."""
    runner = Runner(folder, gate=False)
    return {f"nogate/{name}": value for name, value in runner.forward(runner.steps[0])[1].items()}


def _optimize(folder: Folder) -> Tensors:
    """Steps of the authors' optimizer."""
    runner, found = Runner(folder), {}
    optimizer = optimizers.build(runner.parameters().items(), OPTIM)
    for group in optimizer.param_groups:
        group["lr"] = OPTIM.lr * group["scale"]
    for step in runner.steps:
        made, values = runner.forward(step)
        runner.backward(made)
        norm = nn.utils.clip_grad_norm_([each for group in optimizer.param_groups for each in group["params"]], CLIP)
        optimizer.step()
        after = {f"param/{name}": each.detach().clone() for name, each in runner.parameters().items()}
        kept = {"loss_total": values["loss_total"], "grad_norm_before_clip": norm, **after}
        found |= {f"opt/{step}/{name}": value for name, value in kept.items()}
    return found


class Runner:
    """The model under the authors' weights."""

    def __init__(self, folder: Folder, gate: bool = True) -> None:
        config = replace(family_config(folder), gate=gate)
        self.captions = folder.config["S"]
        self.family = family = soho.build(config)
        self.mvm = mvm.build(mvm.Config(), family)
        self.itm = itm.build(itm.Config(text="masked", visual="masked", negatives="loader", bias=False), family)
        words = mlm.Config(visual="masked", soften=0.0, scope="rank", head="tied")
        self.mlm = mlm.build(words, family)
        self.model = PretrainModel(family, {"mlm": self.mlm, "mvm": self.mvm, "itm": self.itm})
        self.inputs, self.weights = folder.tensors("batch.safetensors"), folder.tensors("weights.safetensors")
        fill(self.model, self.weights, soho.PUBLISHED)
        _authors_order(family.dictionary)
        self.steps = sorted(
            {name.split("/")[0] for name in self.inputs if name.startswith("step")}, key=lambda name: int(name[4:])
        )

    def forward(self, step: str) -> tuple[Pass, Tensors]:
        """What the model makes of one batch, and everything recorded on the way."""
        batch, outputs, encodings = self.batch(step), defaultdict(list), []
        modules = dict(self.family.named_modules())
        hooks = [
            modules[ours].register_forward_hook(lambda _m, _i, out, name=name: outputs[name].append(out))
            for ours, name in WATCHED.items()
            if ours in modules
        ]
        hooks.append(self.mvm.register_forward_pre_hook(lambda _, inputs: encodings.append(inputs[0])))
        made = self.model(batch, Moment(1))
        for hook in hooks:
            hook.remove()
        self.model.commit([made.keys], 1, "step")
        with torch.no_grad():
            values = {name: value for name, (value,) in outputs.items()}
            values |= {**self.values(encodings[0], batch), **self.losses(made.losses)}
        return made, {name: value.detach().clone() for name, value in values.items()}

    def values(self, enc: Encodings, batch: Batch) -> Tensors:
        """Streams, codes and logits under the authors' names."""
        visual, text, fused = enc.visual("masked"), enc.text("masked"), enc.fused("masked", "masked")
        assert visual.codes is not None
        assert visual.picked is not None
        assert visual.mask is not None
        together = torch.cat([part for part in (fused.text, fused.visual) if part is not None], dim=1)
        height, width = self.grid(batch)
        places = soho.sine_positions(visual.mask.view(-1, height, width), self.family.config.hidden)
        logits = self.itm.logits(together[:, 0])
        cells = self.cells.flatten(0, 1)
        return {
            "visual_tokens": visual.hidden,
            "text_embeddings": text.hidden,
            "fusion_feature": together,
            "visual_attention_mask": visual.mask.long(),
            "visual_pos_sine": places.transpose(1, 2).unflatten(2, (height, width)),
            "vd_input": cells,
            "vd_indices": visual.codes.flatten(),
            "vd_quantized": self.quantised.flatten(0, 1),
            "neck_pos_line_out": self.family.value_map(self.quantised.flatten(0, 1)),
            "mvm_labels": visual.codes.masked_fill(~visual.picked, -100),
            "mvm_logits": self.mvm.logits(enc, torch.ones_like(visual.picked)),
            "mlm_logits_all_positions": self.mlm.head(together, self.family.word_embedding.weight),
            "itm_logits": logits,
            "loss_itm_per_sample": F.cross_entropy(logits, batch.matched.long(), reduction="none"),  # type: ignore[union-attr]
        }

    @property
    def cells(self) -> Tensor:
        """[B, R, D] what the dictionary was given last."""
        return self.family.dictionary.__dict__["seen"][0]

    @property
    def quantised(self) -> Tensor:
        """[B, R, D] what it gave."""
        return self.family.dictionary.__dict__["seen"][1]

    def losses(self, losses: dict[str, Loss]) -> Tensors:
        """Each loss, and their sum."""
        return {
            **{name: losses[ours].value for name, ours in LOSSES.items()},
            "loss_total": self.model.total(losses, {}),
        }

    def backward(self, made: Pass) -> None:
        """The gradient of the total."""
        self.model.zero_grad(set_to_none=True)
        torch.autograd.backward(self.model.total(made.losses, {}))

    def parameters(self) -> dict[str, nn.Parameter]:
        """{authors' name: our parameter}."""
        ours = dict(self.model.named_parameters())
        targets = {name: find(name, soho.PUBLISHED)[1] for name in self.weights}
        return {name: ours[found[0]] for name, found in targets.items() if found and found[0] in ours}

    def gradients(self, prefix: str) -> Tensors:
        """By the authors' names."""
        found = {name: each.grad for name, each in self.parameters().items()}
        return {f"{prefix}{name}": grad.clone() for name, grad in found.items() if grad is not None}

    def figures(self, prefix: str) -> Tensors:
        """The dictionary's buffers."""
        return {prefix + name: value for name, value in _figures(self.family.dictionary).items()}

    def statistics(self, prefix: str) -> Tensors:
        """All running statistics."""
        names = [name for name in self.weights if name.endswith(("running_mean", "running_var"))]
        places = {name: find(name, soho.PUBLISHED)[1][0] for name in names}
        return {prefix + name: self.model.get_buffer(ours).clone() for name, ours in places.items()}

    def grid(self, batch: Batch) -> tuple[int, int]:
        """Rows and columns of cells."""
        height, width = batch.visual["masked"].feats.shape[2:]
        return height // 64, width // 64

    def batch(self, step: str) -> Batch:
        """[B * S] captions; pictures [B], their masks and picks [B * S]."""
        own = {name.partition("/")[2]: value for name, value in self.inputs.items() if name.startswith(f"{step}/")}
        pixels = own["img_int8"].float() / STEP_SIZE
        height, width = pixels.shape[2] // 64, pixels.shape[3] // 64
        mask = torch.stack(
            [
                _authors_mask(real, pad, (height, width))
                for real, pad in zip(own["img_shape"], own["pad_shape"], strict=True)
            ]
        ).repeat_interleave(self.captions, dim=0)
        picked = (torch.arange(height * width) == own["mvm_position"]) & own["mvm_keep"].bool()[:, None]
        words = own["language_attention"].flatten(0, 1).bool()
        ids, labels = own["language_tokens"].flatten(0, 1), own["mask_labels"].flatten(0, 1)
        return Batch(
            text={"masked": Text(ids, words, labels)},
            visual={"masked": Visual(pixels, mask, picked=picked)},
            pair_id=torch.arange(len(ids)),
            matched=own["next_label"].flatten().bool(),
        )


def _authors_mask(real: Tensor, padded: Tensor, grid: tuple[int, int]) -> Tensor:
    """[R] bool. The canvas is as wide as the padded picture is high, whatever its width: the authors' mistake."""
    side = int(padded[0])
    canvas = torch.zeros(side, side)
    canvas[: int(real[0]), : int(real[1])] = 1
    return F.interpolate(canvas[None, None], size=grid, mode="nearest").flatten() > 0


def _authors_order(dictionary: Dictionary) -> None:
    """Nearest entry, then the move over all ranks, then its value."""

    def forward(cells: Tensor) -> tuple[Tensor, Tensor]:
        codes = dictionary.nearest(cells)
        if dictionary.training:
            dictionary.note(dictionary.sums(cells, codes))
            moving.move(dictionary)
        values = dictionary.quantised(cells, codes)
        dictionary.__dict__["seen"] = (cells, values)
        return values, codes

    dictionary.forward = forward  # type: ignore[method-assign]


def _figures(dictionary: Dictionary) -> Tensors:
    return {name: dictionary.get_buffer(ours).clone() for name, ours in FIGURES.items()}


def _dictionaries(folder: Folder) -> Tensors:
    """The dictionary alone: from a cold and a warm start, and on two ranks."""
    found, inputs = {}, folder.tensors("batch.safetensors")
    for case in sorted({name.split("/")[0] for name in inputs if name.startswith("vd_")}):
        own = {name.partition("/")[2]: value for name, value in inputs.items() if name.startswith(f"{case}/")}
        if own["x"].ndim == 3:
            found |= {f"{case}/{name}": value for name, value in _alone(own, folder.config["decay"]).items()}
            continue
        for rank, values in enumerate(run_ranks(_on_rank, own["x"].shape[1], own, folder.config["decay"])):
            for name, value in values.items():
                step, _, rest = name.partition("/")
                place = f"rank{rank}/{rest}" if rest in ("indices", "quantized") else rest
                found[f"{case}/{step}/{place}"] = value
    return found


def _on_rank(given: Tensors, decay: float) -> Tensors:
    return _alone({**given, "x": given["x"][:, distributed.rank()]}, decay)


def _alone(given: Tensors, decay: float) -> Tensors:
    """Training steps on inputs [steps, N, D]; the gradient of the sum of values times their channel's number."""
    dictionary = Dictionary(*given["embed_before"].shape, decay=decay)
    for name, ours in FIGURES.items():
        if f"{name}_before" in given:
            dictionary.get_buffer(ours).copy_(given[f"{name}_before"])
    _authors_order(dictionary)
    found = {}
    for number, rows in enumerate(given["x"], start=1):
        cells = rows[None].clone().requires_grad_()
        values, codes = dictionary(cells)
        (values * torch.arange(values.shape[2])).sum().backward()
        assert cells.grad is not None
        made = {"indices": codes[0], "quantized": values[0].detach(), "grad_x": cells.grad[0], **_figures(dictionary)}
        found |= {f"step{number}/{name}": value for name, value in made.items()}
    return found
