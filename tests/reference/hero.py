"""HERO's four pre-training tasks (and their variants), each on its own batch, in the authors' names.

The authors' rows are the sentences of all videos, one after the other; ours are as many for every video as the most of
them have. Their positions are packed, frames first; ours are padded frames, then padded words.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.reference.compare import Folder, Loose, Value
from vlscale.families import hero
from vlscale.model import Encodings, PretrainModel, Task
from vlscale.objectives import fom, mfm, mlm, mrfr, vsm
from vlscale.objectives.base import Objective
from vlscale.types import IGNORE, Batch, Moment, Text, Visual
from vlscale.weights import fill, find

Tensors = dict[str, Tensor]
TASKS = {"mlm": "mlm", "mfm-nce": "mfm", "mffr": "mfm", "fom": "fom", "vsm": "vsm", "vsm_hard": "vsm"}  # their inputs
HARD = 20000  # steps before the hard negatives


def run(folder: Folder) -> dict[str, dict[str, Value]]:
    """{outputs file: {name: tensor}}."""
    runner, found = _Runner(folder), dict[str, Tensor]()
    for task in TASKS:
        found |= {f"{task}/{name}": value for name, value in runner.losses(task).items()}
        found |= {f"{task}/grad/{name}": value for name, value in runner.gradients().items()}
    found |= {**runner.words(), **runner.frames(), **runner.order(), **runner.matching()}
    values: dict[str, Value] = {name: value.detach() for name, value in found.items()}
    return {"outputs.safetensors": values | {"vsm/frame_output_f_encoder": runner.sentences()}}


def family_config(config: dict[str, Any]) -> hero.Config:
    """Our sizes from a reference folder's config.json; dropout is off."""
    sentence, clip, query = (config[f"{part}_config"] for part in ("f", "c", "q"))
    assert query["num_hidden_layers"] == 0, "queries pass the sentences' layers"
    return hero.Config(
        hidden=sentence["hidden_size"],
        layers=sentence["num_hidden_layers"],
        heads=sentence["num_attention_heads"],
        intermediate=sentence["intermediate_size"],
        vocab=sentence["vocab_size"],
        max_positions=sentence["max_position_embeddings"],
        segments=sentence["type_vocab_size"],
        sentence_frames=config["max_frm_seq_len"],
        temporal_layers=clip["num_hidden_layers"],
        temporal_heads=clip["num_attention_heads"],
        temporal_intermediate=clip["intermediate_size"],
        temporal_positions=clip["max_position_embeddings"],
        query_heads=query["num_attention_heads"],
        query_positions=query["max_position_embeddings"],
        dropout=0.0,
        feats=config["vfeat_dim"],
        frames=max(config["n_frames"]),
        text_length=min(config["max_txt_len"], sentence["max_position_embeddings"]),
        sentences=max(map(len, config["subtitles"])),
    )


class _Layout(NamedTuple):
    """Where the authors' rows and packed positions lie among ours."""

    rows: Tensor  # [N] int64, ours [videos * most sentences] of each of their sentences
    spans: Tensor  # [videos * most sentences, 2] int64
    order: Tensor  # [N, S] int64, in [frames ; words] of each packed position
    words: Tensor  # [N, L] bool

    def rowed(self, theirs: Tensor, fill: int) -> Tensor:
        """[N, ...] -> [videos * most sentences, ...]."""
        whole = theirs.new_full((len(self.spans), *theirs.shape[1:]), fill)
        whole[self.rows] = theirs
        return whole


def _layout(subtitles: list[list[tuple[int, list[int]]]], order: Tensor, real: Tensor, length: int) -> _Layout:
    most = max(map(len, subtitles))
    spans = torch.zeros(len(subtitles) * most, 2, dtype=torch.int64)
    rows = []
    for video, sentences in enumerate(subtitles):
        for place, (_, frames) in enumerate(sentences):
            rows.append(video * most + place)
            if frames:
                assert frames == list(range(frames[0], frames[-1] + 1)), "a sentence's frames follow one another"
                spans[rows[-1]] = torch.tensor([frames[0], frames[-1] + 1])
    frames_wide = int(order.max()) + 1 - length  # their first row of words begins there
    both = torch.zeros(len(order), frames_wide + length, dtype=torch.int64)
    both = both.scatter_reduce(1, order, real, "amax").bool()
    return _Layout(torch.tensor(rows), spans, order, both[:, frames_wide:])


class _Inputs(NamedTuple):
    """One task's tensors as ours."""

    layout: _Layout
    batch: Batch


class _Runner:
    """Our model under the authors' weights."""

    def __init__(self, folder: Folder) -> None:
        self.config = config = folder.config
        self.family = hero.build(family_config(config))
        asked = vsm.Config(
            margin=config["margin"],
            video_weight=config["lw_neg_ctx"],
            query_weight=config["lw_neg_q"],
            span_weight=config["lw_st_ed"],
            span_share=1.0,
            hard_from=HARD,
            hard_pool=config["hard_pool_size"],
            hard_weight=config["hard_neg_weight"],
            padding="counted",
            scope="rank",
        )
        self.weights = folder.tensors("weights.safetensors")
        places = len(self.weights["v_encoder.fom_output.linear_2.bias"])
        self.mlm = mlm.build(mlm.Config(soften=0.0, scope="rank"), self.family)
        self.mrfr = mrfr.build(mrfr.Config(error="norm", scope="rank"), self.family)
        self.mfm = mfm.build(
            mfm.Config(candidates="hidden_and_predicted", padding="counted", scope="rank"), self.family
        )
        self.fom = fom.build(fom.Config(places=places, scope="rank"), self.family)
        self.vsm = vsm.build(asked, self.family)
        objectives: dict[str, Objective] = {
            "mlm": self.mlm,
            "mrfr": self.mrfr,
            "mfm": self.mfm,
            "fom": self.fom,
            "vsm": self.vsm,
        }
        self.objectives = {"mfm-nce": "mfm", "mffr": "mrfr", "vsm_hard": "vsm"}
        tasks = {task: Task((self.objectives.get(task, task),)) for task in TASKS}
        self.model = PretrainModel(self.family, objectives, tasks)
        fill(self.model, self.weights, hero.PUBLISHED)
        ours = dict(self.model.named_parameters())
        found = {name: [each for each in find(name, hero.PUBLISHED)[1] if each in ours] for name in self.weights}
        self.names: dict[str, list[nn.Parameter]] = {
            name: [ours[each] for each in targets] for name, targets in found.items() if targets
        }
        every = folder.tensors("batch.safetensors")
        self.tensors = {task: _under(every, f"{task}/") for task in ("mlm", "mfm", "fom", "vsm")}
        self.inputs = {task: self._inputs(task, tensors) for task, tensors in self.tensors.items()}

    def losses(self, task: str) -> Tensors:
        """Of one task, whose gradients are then left behind."""
        inputs, name = self.inputs[TASKS[task]], self.objectives.get(task, task)
        self.model.zero_grad()
        made = self.model.ask(
            {name: self.model.objectives[name]},  # type: ignore[dict-item]
            self._encodings(task),
            inputs.batch,
            {},
        )
        loss = made.losses[name]
        torch.autograd.backward(loss.value)
        found = {"loss": loss.value}
        if name == "vsm":
            weights = {
                "neg_ctx": ("video", self.vsm.config.video_weight),
                "neg_q": ("query", self.vsm.config.query_weight),
                "st_ed": ("span", self.vsm.config.span_weight),
            }
            found |= {
                f"loss_{theirs}_weighted": loss.metrics[f"vsm/{part}"] * weight
                for theirs, (part, weight) in weights.items()
            }
        return found

    def gradients(self) -> Tensors:
        """{authors' name: gradient in their shape} of what has one."""
        found = {}
        for name, parameters in self.names.items():
            gradients = [each.grad for each in parameters if each.grad is not None]
            if gradients:
                missing = len(self.weights[name]) - len(gradients[0])  # the mask table's first row, which is zero
                found[name] = F.pad(gradients[0], (0, 0) * (gradients[0].ndim - 1) + (missing, 0)).clone()
        return found

    @torch.no_grad()
    def words(self) -> Tensors:
        """Of hidden words."""
        batch = self.inputs["mlm"].batch
        states, labels = self._encodings("mlm").fused("masked", "clean").text, batch.text["masked"].labels
        assert states is not None
        assert labels is not None
        assert self.mlm.head is not None
        logits = self.mlm.head(states[labels != IGNORE], self.family.word_embedding.weight)
        terms = F.cross_entropy(logits, labels[labels != IGNORE], reduction="none")
        return {"mlm/logits": logits, "mlm/loss_per_token": terms}

    @torch.no_grad()
    def frames(self) -> Tensors:
        """Of hidden frames."""
        enc, batch = self._encodings("mffr"), self.inputs["mfm"].batch
        visual = batch.visual["masked"]
        assert visual.picked is not None
        assert visual.targets is not None
        targets, predicted = visual.targets[visual.picked], self.mrfr.features(enc, visual.picked)
        others = self.mrfr.features(enc, ~visual.picked)
        logits = predicted @ torch.cat([targets, others]).T
        return {
            "mffr/squared_error": (predicted - targets).square(),
            "mfm/pred": predicted,
            "mfm/neg_pred": others,
            "mfm-nce/loss_per_frame": F.cross_entropy(logits, torch.arange(len(logits)), reduction="none"),
        }

    @torch.no_grad()
    def order(self) -> Tensors:
        """Of all places of the shuffled frames."""
        picked = torch.ones_like(self.inputs["fom"].batch.visual["shuffled"].feats[..., 0], dtype=torch.bool)
        return {"fom/logits": self.fom.logits(self._encodings("fom"), picked)}

    @torch.no_grad()
    def matching(self) -> Tensors:
        """Of queries and videos."""
        enc, batch = self._encodings("vsm"), self.inputs["vsm"].batch
        states, queries = enc.fused("clean", "clean").visual, enc.fused("query", "").pooled
        mask = batch.visual["clean"].mask
        assert states is not None
        assert queries is not None
        assert mask is not None
        videos, frames = mask.shape
        spans = self.vsm.spans(queries.expand(videos, -1, -1), states, mask)
        first, last = (
            each.view(videos, len(queries), frames).transpose(0, 1).masked_fill(~mask, -1e4) for each in spans
        )
        return {
            "vsm/clip_output": states,
            "vsm/query_vector": queries,
            "vsm/query_video_scores": vsm.best_frame(queries, states, mask),
            "vsm/start_logits": first,
            "vsm/end_logits": last,
        }

    @torch.no_grad()
    def sentences(self) -> Loose:
        """States of all sentences with their frames, in the authors' rows and places."""
        made: list[Tensor] = []
        hook = self.family.stack.register_forward_hook(lambda _, __, hidden: made.append(hidden))
        self._encodings("vsm").fused("clean", "clean")
        hook.remove()
        order, real = self.inputs["vsm"].layout.order, self.tensors["vsm"]["f_attn_masks"].bool()
        states = made[0].gather(1, order[..., None].expand(-1, -1, made[0].shape[2]))  # empty rows pass no layer
        slack = torch.zeros_like(states).masked_fill(~real[..., None], torch.inf)
        return Loose(states, slack, "places without a frame or word, which nothing reads and which are ours to fill")

    def _encodings(self, task: str) -> Encodings:
        step = HARD + 1 if task == "vsm_hard" else 1
        return Encodings(self.family, self.inputs[TASKS[task]].batch, Moment(step), {})

    def _inputs(self, task: str, tensors: Tensors) -> _Inputs:
        ids = tensors["input_ids" if task == "mlm" else "f_sub_input_ids"]
        order, real = (tensors[name if task == "mlm" else f"f_{name}"] for name in ("gather_index", "attn_masks"))
        layout = _layout(self.config["subtitles"], order, real, ids.shape[1])
        text = Text(layout.rowed(ids, 1), layout.rowed(layout.words, 0), spans=layout.spans)
        texts = {"clean": text}
        if task == "mlm":
            texts = {"masked": text._replace(labels=layout.rowed(_labels(tensors, layout), IGNORE))}
        if task == "vsm":
            spans = tensors["targets"] + torch.tensor([0, 1])
            texts["query"] = Text(tensors["query_input_ids"], tensors["query_attn_masks"].bool(), spans=spans)
            videos = tensors["q_vidx"]
            assert torch.equal(videos, torch.arange(len(videos)) // (len(videos) // len(self.config["subtitles"])))
        visuals = {"clean": self._clips(tensors, layout)}
        if task == "mfm":
            picked = tensors["c_v_masks"]
            targets = torch.zeros_like(tensors["c_v_feats"])
            targets[picked] = tensors["feat_targets"]
            visuals = {"masked": visuals["clean"]._replace(picked=picked, targets=targets)}
        if task == "fom":
            chosen = tensors["targets"] >= 0
            visuals = {"shuffled": visuals["clean"]._replace(order=tensors["shuffled_orders"], picked=chosen)}
        videos = torch.arange(len(self.config["subtitles"]))
        return _Inputs(layout, Batch(texts, visuals, videos))

    def _clips(self, tensors: Tensors, layout: _Layout) -> Visual:
        """The clips' frames; for words alone the authors have only those that some sentence spans."""
        if "c_v_feats" in tensors:
            return Visual(tensors["c_v_feats"], tensors["c_attn_masks"].bool())
        number = torch.tensor(self.config["n_frames"])
        most = len(layout.spans) // len(number)
        feats = torch.zeros(len(number), int(number.max()), tensors["v_feat"].shape[2])
        for row, found in zip(layout.rows.tolist(), tensors["v_feat"], strict=True):
            first, end = layout.spans[row].tolist()
            feats[row // most, first:end] = found[: end - first]
        return Visual(feats, torch.arange(feats.shape[1]) < number[:, None])


def _labels(tensors: Tensors, layout: _Layout) -> Tensor:
    """[N, L] what was at each hidden word, `IGNORE` elsewhere."""
    labels = torch.full(layout.words.shape, IGNORE)
    row, packed = tensors["txt_mask_tgt"].nonzero(as_tuple=True)
    frames = int(layout.order.max()) + 1 - layout.words.shape[1]
    labels[row, layout.order[row, packed] - frames] = tensors["txt_labels"]
    return labels


def _under(tensors: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
