"""VideoBERT's five losses by our family and objectives, in the names of an independent implementation.

It packs words and visual words without a gap; we leave padding where it stands and tell each token its packed place, so
that ours are put into theirs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tests.reference.compare import Folder
from vlscale.data.visual_words import Codebook
from vlscale.families import videobert
from vlscale.model import Encodings, PretrainModel, Task
from vlscale.objectives import itm, mlm, mvw
from vlscale.types import HIDDEN, IGNORE, Batch, Moment, Text, Visual
from vlscale.weights import fill, find

Tensors = dict[str, Tensor]
REGIMES = {"text_only": "text", "video_only": "visual", "joint": "both"}
MISSING = -1  # label of a position that no loss counts there


def run(folder: Folder) -> dict[str, Tensors]:
    """{outputs file: {name: tensor}} of one step of all regimes."""
    runner = Runner(folder)
    words = visual_words(folder.tensors("batch.safetensors"))
    found: Tensors = {"visual_tokens": words, "visual_token_ids": words + folder.config["first_visual_id"]}
    for regime in REGIMES:
        found |= runner.values(regime)
    return {"outputs.safetensors": {**found, **runner.step()}}


def family_config(config: dict[str, Any]) -> videobert.Config:
    """Our sizes from a reference folder's config.json."""
    special = config["special"]
    assert config["first_visual_id"] == config["text_vocab"], "visual words stand behind the words"
    longest = config["positions"] // 2 - 1
    return videobert.Config(
        hidden=config["hidden_size"],
        layers=config["layers"],
        heads=config["heads"],
        intermediate=config["intermediate"],
        vocab=config["text_vocab"],
        codes=config["n_visual"],
        max_positions=config["positions"],
        text_length=longest,
        frames=longest,
        dropout=0.0,
        **{name: special[name] for name in ("cls", "sep", "mask", "video_start")},
    )


def visual_words(inputs: Tensors) -> Tensor:
    """The words of the stored features by the stored tree."""
    number = sum(name.startswith("centroids/level") for name in inputs)
    levels = tuple(inputs[f"centroids/level{level}"].numpy() for level in range(number))
    return torch.from_numpy(Codebook(levels, ())(inputs["features"].numpy()).codes)


class Runner:
    """The network under the stored weights, and a batch for each regime."""

    def __init__(self, folder: Folder) -> None:
        config, weights = folder.config, folder.tensors("weights.safetensors")
        family = videobert.build(family_config(config))
        objectives = {
            "mlm": mlm.build(mlm.Config(visual="masked", soften=0.0, scope="rank"), family),
            "mvw": mvw.build(mvw.Config(text="masked", scope="rank"), family),
            "itm": itm.build(itm.Config(negatives="loader", text="masked", visual="masked"), family),
        }
        self.own = {
            "mlm": mlm.build(replace(objectives["mlm"].config, vocabulary="own"), family),  # type: ignore[type-var]
            "mvw": mvw.build(replace(objectives["mvw"].config, vocabulary="own"), family),  # type: ignore[type-var]
        }
        tasks = {
            "text_only": Task(("mlm",), modality="text"),
            "video_only": Task(("mvw",), modality="visual"),
            "joint": Task(("itm", "mlm", "mvw"), modality="both"),
        }
        self.model = PretrainModel(family, objectives, tasks).eval()
        self.family = family
        fill(self.model, weights, videobert.PUBLISHED)
        ours = dict(self.model.named_parameters())
        self.names = {name: ours[find(name, videobert.PUBLISHED)[1][0]] for name in weights}
        self.config = config
        every = folder.tensors("batch.safetensors")
        self.inputs = {
            regime: {name.partition("/")[2]: each for name, each in every.items() if name.startswith(f"{regime}/")}
            for regime in REGIMES
        }
        self.batches = {regime: self._batch(regime) for regime in REGIMES}

    def _batch(self, regime: str) -> Batch:
        """Packed sequences taken apart: [CLS] words, and visual words."""
        inputs, config = self.inputs[regime], self.config
        ids, mask, clean = inputs["input_ids"], inputs["attention_mask"].bool(), inputs["unmasked_ids"]
        special, first = config["special"], config["first_visual_id"]
        marks = (clean == special["video_start"]) | (clean == special["sep"]) | ~mask
        video = (clean >= first) & mask
        words = ~marks & ~video if regime != "video_only" else torch.zeros_like(mask)
        labels = inputs.get("labels")
        text_labels, video_labels = inputs.get("text_labels", labels), inputs.get("video_labels", labels)
        assert text_labels is not None
        assert video_labels is not None
        texts, visuals = {}, {}
        if regime != "video_only":
            taken = words.sum(dim=1)
            text_ids = _taken(ids, words, 0)
            text_mask = torch.arange(text_ids.shape[1]) < taken[:, None]
            texts["masked"] = Text(text_ids, text_mask, _taken(_ignored(text_labels), words, IGNORE))
        if regime != "text_only":
            codes = torch.where(ids >= first, ids - first, HIDDEN)
            codes = _taken(codes, video, 0)
            visual_mask = torch.arange(codes.shape[1]) < video.sum(dim=1)[:, None]
            wanted = torch.where(video_labels == MISSING, IGNORE, video_labels - first)
            visuals["masked"] = Visual(
                torch.zeros(*codes.shape, 0), visual_mask, codes=codes, code_labels=_taken(wanted, video, IGNORE)
            )
        matched = inputs["align_labels"].bool() if "align_labels" in inputs else None
        return Batch(texts, visuals, torch.arange(len(ids)), task=regime, matched=matched)

    @torch.no_grad()
    def values(self, regime: str) -> Tensors:
        """States and logits of a regime, in the packed places, padding included."""
        enc = Encodings(self.family, self.batches[regime], Moment(1), {})
        batch = self.batches[regime]
        text = enc.text("masked") if batch.text else None
        visual = enc.visual("masked") if batch.visual else None
        sequence = self.family.sequence(text, visual)
        embedded = self.family.embed(sequence)
        hidden = self.family.stack(embedded, sequence.mask[:, None, None, :])
        length = self.inputs[regime]["input_ids"].shape[1]
        order = sequence.places.argsort(dim=1)[:, :length, None]

        def packed(states: Tensor) -> Tensor:
            return states.gather(1, order.expand(-1, -1, states.shape[2]))

        last = packed(hidden)
        found = {
            "embedding_output": packed(embedded),
            "last_hidden": last,
            "mlm_logits": self.family.token_logits(last),
        }
        if regime == "joint":
            pooled = enc.fused("masked", "masked").pooled
            assert pooled is not None
            found |= {"pooled": pooled, "align_logits": self.model.objectives["itm"].logits(pooled)}  # type: ignore
        return {f"{regime}/{name}": value for name, value in found.items()}

    def step(self) -> Tensors:
        """Losses of all regimes, and the gradients of their sum."""
        made = {regime: self.model(batch, Moment(1)).losses for regime, batch in self.batches.items()}
        config, joint = self.config, made["joint"]
        losses = {
            "text_mlm": made["text_only"]["mlm"].value,
            "video_mfm": made["video_only"]["mvw"].value,
            "joint_mlm": joint["mlm"].value,
            "joint_mfm": joint["mvw"].value,
            "align": joint["itm"].value,
        }
        names = ("w_text", "w_video", "w_joint_mlm", "w_joint_mfm", "w_align")
        weights = [config[name] for name in names]
        total = torch.stack([weight * loss for weight, loss in zip(weights, losses.values(), strict=True)]).sum()
        total.backward()  # type: ignore[no-untyped-call]
        batch = self.batches["joint"]
        enc = Encodings(self.family, batch, Moment(1), {})
        losses |= {
            "total": total,
            "joint_mlm_text_vocab_only": self.own["mlm"](enc, batch).value,
            "joint_mfm_visual_vocab_only": self.own["mvw"](enc, batch).value,
        }
        gradients = {f"grad/{name}": each.grad for name, each in self.names.items() if each.grad is not None}
        return {**gradients, **{f"loss/{name}": value.detach() for name, value in losses.items()}}


def _ignored(labels: Tensor) -> Tensor:
    return labels.masked_fill(labels == MISSING, IGNORE)


def _taken(packed: Tensor, where: Tensor, padding: int) -> Tensor:
    """[B, S] values where `where` is True, moved to the front, [B, most of any row]."""
    rows = [row[chosen] for row, chosen in zip(packed, where, strict=True)]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding)
