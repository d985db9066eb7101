"""HowTo100M by our windows, family, objective and metrics: clips and their words as the data plane cuts them, both
towers, the ranking loss with its weights, gradients, ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.reference.compare import Folder
from vlscale.data.clip_windows import Timed, Window, grow
from vlscale.evaluation.retrieval import Features, ranks
from vlscale.families import howto100m
from vlscale.model import PretrainModel
from vlscale.nn.word_pool import pool
from vlscale.objectives import margin
from vlscale.types import Batch, Moment, Text, Visual
from vlscale.weights import fill, find

Tensors = dict[str, Tensor]


def run(folder: Folder) -> dict[str, dict[str, Tensor]]:
    """{outputs file: {name: tensor}}."""
    torch.manual_seed(0)  # of starts that the authors' weights replace
    inputs, weights = folder.tensors("batch.safetensors"), folder.tensors("weights.safetensors")
    family = howto100m.build(family_config(folder.config, inputs))
    fill(PretrainModel(family, {}), weights, howto100m.PUBLISHED)
    with torch.no_grad():
        vectors = inputs["word_vectors"].flatten(0, 1)
        family.word_embedding.weight[1:] = vectors
    clips = windows(folder.config, inputs)
    batch = Batch(
        {"clean": texts(folder.config, inputs, clips)},
        {"clean": frames(folder.config, inputs, clips)},
        pair_id=torch.arange(len(clips)),
    )
    found = {
        "clip_start": torch.tensor([[clip.start for clip in own] for own in clips], dtype=torch.float32),
        "clip_end": torch.tensor([[clip.end for clip in own] for own in clips], dtype=torch.float32),
        **_towers(family, batch),
        **_losses(folder.config, family, batch, weights),
        **_metrics(inputs["sim_for_metrics"]),
    }
    return {"outputs.safetensors": {name: value.detach() for name, value in found.items()}}


def family_config(config: dict[str, Any], inputs: Tensors | None = None) -> howto100m.Config:
    """Our sizes from a reference folder's config.json; without `inputs` of one word, whose vectors nobody stores."""
    spoken = inputs["word_vectors"].shape[:2].numel() if inputs else 0
    return howto100m.Config(
        streams=(config["feat2d_dim"], config["feat3d_dim"]),
        vocab=1 + max(1, spoken),  # a word each, and padding
        word_width=config["we_dim"],
        text_length=config["max_words"],
        embed=config["embd_dim"],
        sentence=max(0, config["sentence_dim"]),
    )


def windows(config: dict[str, Any], inputs: Tensors) -> list[list[Window]]:
    """Of each video the clips about the captions that the authors drew."""
    found = []
    for video, chosen in enumerate(inputs["caption_index"].tolist()):
        timed = [
            Timed(" ".join("word" for _ in range(count)), start, end)
            for count, start, end in zip(
                inputs["caption_num_words"][video].tolist(),
                inputs["caption_start"][video].tolist(),
                inputs["caption_end"][video].tolist(),
                strict=True,
            )
        ]
        found.append([grow(timed, (each,), config["min_time"], config["min_words"]) for each in chosen])
    return found


def texts(config: dict[str, Any], inputs: Tensors, clips: list[list[Window]]) -> Text:
    """Word ids [videos * clips, L]: the running words of a video have numbers of their own."""
    counts, most = inputs["caption_num_words"], inputs["word_vectors"].shape[1]
    before = counts.cumsum(dim=1) - counts
    lines = []
    for video, own in enumerate(clips):
        for clip in own:
            line = [
                1 + video * most + int(before[video, caption]) + word
                for caption in clip.texts[0]
                for word in range(int(counts[video, caption]))
            ]
            lines.append(line[: config["max_words"]])
    length = max(map(len, lines))
    ids = torch.tensor([line + [0] * (length - len(line)) for line in lines])
    return Text(ids, torch.arange(length) < torch.tensor([[len(line)] for line in lines]))


def frames(config: dict[str, Any], inputs: Tensors, clips: list[list[Window]]) -> Visual:
    """Features [videos * clips, T, F] of both streams; the shorter is stretched, one without a row is zeros."""
    found = []
    for video, own in enumerate(clips):
        for clip in own:
            streams = [
                inputs[name][video][int(clip.start * config[fps]) : int(clip.end * config[fps]) + 1]
                for name, fps in (("feat2d", "fps_2d"), ("feat3d", "fps_3d"))
            ]
            count = max(map(len, streams))
            parts = [
                each[torch.arange(count) * len(each) // count] if len(each) else each.new_zeros(count, each.shape[1])
                for each in streams
            ]
            found.append(torch.cat(parts, dim=1))
    mask = torch.arange(max(map(len, found))) < torch.tensor([[len(each)] for each in found])
    return Visual(torch.nn.utils.rnn.pad_sequence(found, batch_first=True), mask)


@torch.no_grad()
def _towers(family: howto100m.Howto100m, batch: Batch) -> Tensors:
    text, visual = batch.text["clean"], batch.visual["clean"]
    pooled, words = family.pool(visual), family.words(text)
    ids = torch.nn.functional.pad(text.ids, (0, family.config.text_length - text.ids.shape[1]))
    texts_embed, clips_embed = family.encode_text(text).embed, family.encode_visual(visual).embed
    assert texts_embed is not None
    assert clips_embed is not None
    return {
        "text": family.word_embedding(ids),
        "video": pooled,
        "text_pooled": pool(words),
        "video_fc": family.visual_proj.linear(pooled),
        "video_gated": family.visual_proj(pooled),
        "text_embedding": texts_embed,
        "video_embedding": clips_embed,
        "sim_matrix": texts_embed @ clips_embed.T,
    }


def _losses(config: dict[str, Any], family: howto100m.Howto100m, batch: Batch, weights: Tensors) -> Tensors:
    """The loss with weights and its gradients, without weights, and of the first clip of each video."""

    def loss(batch: Batch, same_video: float | None) -> Tensor:
        options = margin.Config(margin=config["margin"], same_video=same_video)
        model = PretrainModel(family, {"margin": margin.build(options, family)})
        return model(batch, Moment(1)).losses["margin"].value

    number, rate = config["n_pair"], config["hard_negative_rate"]
    first = batch.each(lambda each: each if each is batch.pair_id else each[::number])
    whole = loss(batch, rate)
    whole.backward()  # type: ignore[no-untyped-call]
    ours = {f"family.{name}": each.grad for name, each in family.named_parameters()}
    gradients: Tensors = {}
    for name in weights:
        gradient = next((ours[each] for each in find(name, howto100m.PUBLISHED)[1] if each in ours), None)
        if gradient is not None:
            gradients[f"grad/{name}"] = gradient
    videos = len(batch)
    objective = margin.build(margin.Config(same_video=rate), family)
    pair = objective.pair_weights(videos, max(2, number))  # of one clip they store a mask that the loss leaves out
    video = torch.arange(videos).repeat_interleave(number)
    return {
        "loss/weighted": whole,
        "loss/unweighted": loss(batch, None),
        "loss/n_pair1": loss(first, rate),
        "negative_weight_mask": torch.where(video[:, None] == video, pair.same, pair.other).float(),
        **gradients,
    }


def _metrics(scores: Tensor) -> Tensors:
    """From texts to clips, of a matrix of scores (rows: texts)."""
    number = torch.arange(len(scores))
    _, places = ranks(Features(visual=torch.eye(len(scores)), picture=number, text=scores, owner=number))
    recalls = {f"metric/R{k}": (places <= k).float().mean() for k in (1, 5, 10)}
    return {**recalls, "metric/MR": places.float().quantile(0.5)}
