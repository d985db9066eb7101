"""UniVL's two stages by our family, objectives and PretrainModel, its losses by themselves, and its optimizer, in the
authors' names."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.reference.compare import Folder
from tests.tables import Tables
from vlscale import optimizers
from vlscale.families import univl
from vlscale.model import Encodings, PretrainModel, Task
from vlscale.nn.single_stream import Pooler, real
from vlscale.objectives import caption, margin, mfm, mil_nce, mlm, pair_nce
from vlscale.objectives.base import FamilyLike, Objective
from vlscale.optim import OptimConfig, lr_at
from vlscale.types import IGNORE, Batch, Moment, Text, Visual
from vlscale.weights import fill, find

Tensors = dict[str, Tensor]
KINDS = {"mil": "mil_nce", "maxmargin": "margin"}  # of the joint loss
LOSSES = {"mlm": "cmlm", "mfm": "cmfm", "pair_nce": "align", "caption": "decoder"}  # ours: theirs
PARTS = 1000  # of a step, so that any share of the steps is a whole number for the warm-up


def run(folder: Folder) -> dict[str, Tensors]:
    """{outputs file: {name: tensor}}."""
    runner = _Runner(folder)
    found = {**runner.encoded(), **runner.fused(), **runner.losses(), **_alone(folder), **_steps(folder)}
    return {"outputs.safetensors": {name: value.detach() for name, value in found.items()}}


def family_config(config: dict[str, Any]) -> univl.Config:
    """Our sizes from a reference folder's config.json; dropout is off."""
    return univl.Config(
        hidden=config["hidden_size"],
        heads=config["num_attention_heads"],
        intermediate=config["intermediate_size"],
        text_layers=config["text_layers"],
        visual_layers=config["visual_layers"],
        cross_layers=config["cross_layers"],
        decoder_layers=config["decoder_layers"],
        vocab=config["vocab_size"],
        segments=config["type_vocab_size"],
        max_positions=config["bert_positions"],
        visual_positions=config["visual_positions"],
        cross_positions=config["cross_positions"],
        dropout=0.0,
        text_length=config["max_words"],
        frames=config["max_frames"],
        feats=config["video_dim"],
    )


def joint(config: dict[str, Any], family: FamilyLike, normalize: bool) -> dict[str, Objective]:
    """The two forms of the joint loss."""
    options = margin.Config(
        margin=config["margin"],
        same_video=config["hard_negative_rate"] if config["negative_weighting"] and config["batch_size"] > 1 else None,
        normalize=normalize,
        scope="rank",
    )
    once = mil_nce.Config(anchors="middle", positives="once", scope="rank")
    return {"mil_nce": mil_nce.build(once, family), "margin": margin.build(options, family)}


def _batch(inputs: Tensors) -> Batch:
    """Rows in the order of their videos."""
    flat = {name: value.flatten(0, 1) for name, value in inputs.items() if value.ndim > 2}
    mask, written = flat["attention_mask"].bool(), flat["decoder_mask"].bool()
    clean = Text(flat["input_ids"], mask, segments=flat["token_type_ids"])
    labels = flat["pairs_token_labels"]
    frames = Visual(flat["video"], flat["video_mask"].bool())
    return Batch(
        text={
            "clean": clean,
            "masked": clean._replace(ids=flat["pairs_masked_text"], labels=labels.masked_fill(labels < 0, IGNORE)),
            "target": Text(
                flat["input_caption_ids"], written, flat["output_caption_ids"].masked_fill(~written, IGNORE)
            ),
        },
        visual={
            "clean": frames,
            "masked": frames._replace(
                feats=flat["masked_video"], picked=flat["video_labels_index"] >= 0, targets=flat["video"]
            ),
        },
        pair_id=torch.arange(len(inputs["input_ids"])),
    )


class _Runner:
    """The model of both stages under the authors' weights."""

    def __init__(self, folder: Folder) -> None:
        config = folder.config
        family = univl.build(family_config(config))
        masked = {"text": "masked", "visual": "masked"}
        self.heads = {
            "mlm": mlm.build(mlm.Config(**masked, soften=0.0, scope="rank"), family),
            "mfm": mfm.build(mfm.Config(**masked, head="tied", scope="rank"), family),
            "pair_nce": pair_nce.build(pair_nce.Config(**masked, scope="rank"), family),
            "caption": caption.build(caption.Config(padding="counted", scope="rank"), family),
        }
        objectives: dict[str, Objective] = {**self.heads, **joint(config, family, normalize=True)}
        tasks = {f"stage1/{kind}": Task((name,)) for kind, name in KINDS.items()}
        tasks |= {f"stage2/{kind}": Task((name, *self.heads)) for kind, name in KINDS.items()}
        self.family, self.model = family, PretrainModel(family, objectives, tasks)
        self.weights = folder.tensors("weights.safetensors")
        fill(self.model, self.weights, univl.PUBLISHED)
        self.batch = _batch(folder.tensors("batch.safetensors"))

    @torch.no_grad()
    def encoded(self) -> Tensors:
        """What the two encoders make."""
        family, batch = self.family, self.batch
        enc = Encodings(family, batch, Moment(1), {})
        text, visual = enc.text("clean"), enc.visual("clean")
        assert text.embed is not None
        assert visual.embed is not None
        pooler = Pooler(text.hidden.shape[2])  # nobody reads it, so it is no part of the family
        pooler.dense.weight.copy_(self.weights["bert.pooler.dense.weight"])
        pooler.dense.bias.copy_(self.weights["bert.pooler.dense.bias"])
        normalized = family.frame_keys(batch.visual["clean"])
        scores = text.embed @ visual.embed.T
        cosines = F.normalize(text.embed) @ F.normalize(visual.embed).T
        return {
            "stage1/normalized_video": normalized,
            "text_embedding_output": family.text_embeddings(batch.text["clean"].ids, batch.text["clean"].segments),
            "text_sequence_output": text.hidden,
            "text_pooled": pooler(text.hidden),
            "text_mean_pooled": text.embed,
            "visual_embedding_output": family.frame_embeddings(normalized),
            "visual_sequence_output": visual.hidden,
            "video_mean_pooled": visual.embed,
            "stage1/mil/sim_matrix": scores,
            "stage1/maxmargin/sim_matrix": cosines,
            "stage2/mil/sim_matrix_joint": scores,
            "stage2/maxmargin/sim_matrix_joint": cosines,
        }

    @torch.no_grad()
    def fused(self) -> Tensors:
        """What the cross encoder, the decoder and the heads make."""
        family, batch = self.family, self.batch
        enc = Encodings(family, batch, Moment(1), {})
        both, words = enc.fused("masked", "masked"), family.word_embedding.weight
        assert both.text is not None
        assert both.visual is not None
        assert both.pooled is not None
        length = batch.text["target"].ids.shape[1]
        write = self.heads["caption"].head
        return {
            "stage2/text_sequence_output_masked": enc.text("masked").hidden,
            "stage2/masked_video_normalized": family.frame_keys(batch.visual["masked"]),
            "stage2/visual_sequence_output_masked": enc.visual("masked").hidden,
            "stage2/cross_output": torch.cat([both.text, both.visual], dim=1),
            "stage2/cross_pooled": both.pooled,
            "stage2/concat_mask": torch.cat([real(enc.text("masked")), real(enc.visual("masked"))], dim=1).long(),
            "stage2/mlm_logits": self.heads["mlm"].head(both.text, words),
            "stage2/mfm_prediction": self.heads["mfm"].head(both.visual, family.region_projection.weight.T),
            "stage2/align_scores": self.heads["pair_nce"].scores(enc, batch)[0],
            "stage2/decoder_logits": write(enc.decoded("target", "masked", "masked", length), words),
            "caption/decoder_logits_unmasked": write(enc.decoded("target", "clean", "clean", length), words),
        }

    def losses(self) -> Tensors:
        """Of each stage and kind, with gradients."""
        found: Tensors = {}
        for name, task in self.model.tasks.items():
            self.model.zero_grad()
            batch = Batch(self.batch.text, self.batch.visual, self.batch.pair_id, task=name)
            losses = self.model(batch, Moment(1)).losses
            total = self.model.total(losses, {})
            torch.autograd.backward(total)
            gradients = {f"{name}/grad/{theirs}": value for theirs, value in self._gradients().items()}
            stage_one = len(task.objectives) == 1
            found |= gradients | {f"{name}/loss" if stage_one else f"{name}/loss_total": total}
            for ours, loss in losses.items():
                found[f"{name}/loss_{LOSSES.get(ours, 'joint')}"] = loss.value
        return found

    def _gradients(self) -> Tensors:
        """{authors' parameter name: gradient}."""
        ours = dict(self.model.named_parameters())
        targets = {
            name: next((each for each in find(name, univl.PUBLISHED)[1] if each in ours), "") for name in self.weights
        }
        found = {name: ours[target].grad for name, target in targets.items() if target}
        return {name: value.clone() for name, value in found.items() if value is not None}


@torch.no_grad()
def _alone(folder: Folder) -> Tensors:
    """The losses of a matrix of scores: of texts that are its rows, and of videos along the axes."""
    scores, config = folder.tensors("batch.safetensors")["sim_loss_input"], folder.config
    family = Tables(torch.eye(len(scores)), scores)
    rows = torch.arange(len(scores))[:, None]
    batch = Batch(
        text={"clean": Text(rows, torch.ones_like(rows, dtype=torch.bool))},
        visual={"clean": Visual(rows)},
        pair_id=torch.arange(config["batch_size"]),
    )
    model = PretrainModel(family, joint(config, family, normalize=False))
    losses = model(batch, Moment(1)).losses
    pairs = pair_nce.build(pair_nce.Config(), univl.build(univl.tiny()))
    pairs.scores = lambda *_: (scores, 0)  # type: ignore[method-assign]
    return {
        "sim_loss/mil_nce": losses["mil_nce"].value,
        "sim_loss/max_margin": losses["margin"].value,
        "sim_loss/cross_entropy_rows": pairs(Encodings(family, batch, Moment(1), {}), batch).value,
    }


def _steps(folder: Folder) -> Tensors:
    """The optimizer's steps on two parameters with given gradients; the second has a tenth of the rate, and no
    decay."""
    inputs, options = folder.tensors("batch.safetensors"), folder.config["bertadam"]
    config = OptimConfig(
        "adam_bert",
        lr=options["lr"],
        eps=1e-6,
        weight_decay=options["weight_decay"],
        no_decay=("param1",),
        clip_each=1.0,
        schedule="linear",
        warmup=round(options["warmup"] * options["t_total"] * PARTS),
        scale={"param1": 0.1},
    )
    names = ("param0", "param1")
    parameters = {name: nn.Parameter(inputs[f"bertadam/{name}"].clone()) for name in names}
    optimizer = optimizers.build(parameters.items(), config)
    found: Tensors = {}
    for step in range(1, options["steps"] + 1):
        for number, parameter in enumerate(parameters.values()):
            parameter.grad = inputs[f"bertadam/grads{number}"][step - 1].clone()
        for group in optimizer.param_groups:
            group["lr"] = lr_at((step - 1) * PARTS + 1, config, options["t_total"] * PARTS) * group["scale"]
        optimizer.step()
        found |= {f"bertadam/step{step}/{name}": each.detach().clone() for name, each in parameters.items()}
    return found
