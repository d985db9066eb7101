"""MIL-NCE's objective, text network and schedule: our objective, a `PretrainModel` and real ranks.

The text network and the linear video head of the authors' two-rank run are small modules here. The S3D video
network is not built yet; its tensors are named as absent.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from tests.distributed.spawn import run_ranks
from tests.reference.compare import Absent, Folder, Loose, Value
from vlscale import distributed, optim
from vlscale.families.base import Family
from vlscale.model import PretrainModel
from vlscale.objectives import mil_nce
from vlscale.types import Batch, Dims, Inputs, Moment, Stream, Text, Visual

Tensors = dict[str, Tensor]
ABSENT = Absent("the S3D video network is not built yet")
VIDEO_NETWORK = ("s3d/*", "s3d_s2d/*", "block/*", "pool/*", "s2d/*")
WORD = re.compile(r"[\w']+")


def run(folder: Folder) -> dict[str, dict[str, Value]]:
    """{outputs file: {name: tensor}}."""
    found: dict[str, Value] = dict.fromkeys(VIDEO_NETWORK, ABSENT)
    found |= {**_loss(folder), **_text(folder), **_one_process(folder), "schedule/lr": _schedule(folder)}
    config = folder.config["ranks"]
    ranks = run_ranks(_on_rank, config["world"], folder)
    for rank, own in enumerate(ranks):
        for name, value in own.items():
            # losses and parameters are averaged over ranks, as engines do; the authors' ranks all make the whole loss
            averaged = name.endswith("loss") or name.startswith("ddp_grad/")
            value = torch.stack([each[name] for each in ranks]).mean(dim=0) if averaged else value
            found[f"ranks/rank{rank}/{name}"] = value
    return {"outputs.safetensors": found}


class TextNet(nn.Module):
    """Frozen word vectors, linear, ReLU, the greatest over all word slots (padding too), linear."""

    def __init__(self, weights: Tensors, prefix: str) -> None:
        super().__init__()
        own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        hidden, width = own["fc1.weight"].shape
        self.word_embd = nn.Embedding(len(own["word_embd.weight"]), width)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, len(own["fc2.bias"]))
        self.load_state_dict(own)
        self.word_embd.requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        """[n, L] int64 -> [n, E]."""
        words: Tensor = self.fc1(self.word_embd(ids)).relu()
        embed: Tensor = self.fc2(words.amax(dim=1))
        return embed


class Towers(Family):
    """Each view's tensor through its module; `nn.Identity` where it holds embeddings already."""

    offers = frozenset({"text", "visual", "embed"})

    def __init__(self, video: nn.Module, text: nn.Module, width: int) -> None:
        super().__init__()
        self.dims = Dims(width, width, width, embed=width)
        self.inputs = Inputs(0, 1, False)
        self.video_fc, self.text_module = video, text

    def encode_text(self, text: Text) -> Stream:
        """See `Family`."""
        embed = self.text_module(text.ids)
        return Stream(embed[:, None], None, embed)

    def encode_visual(self, visual: Visual) -> Stream:
        """See `Family`."""
        embed = self.video_fc(visual.feats)
        return Stream(embed[:, None], None, embed)


@dataclass
class Found:
    """One forward and backward of the objective."""

    loss: Tensor
    everyone: tuple[Tensor, ...]  # what was gathered: clips [G, E], captions [G, K, E]
    gradients: Tensors  # of the towers' parameters


def contrast(family: Towers, clips: Tensor, texts: Tensor, gradient: Literal["exact", "authors"]) -> Found:
    """Clips [b, ...] and texts [b * K, ...] through the towers and the objective."""
    objective = mil_nce.build(mil_nce.Config(gradient=gradient), family)
    gathered: list[tuple[Tensor, ...]] = []
    objective.register_forward_pre_hook(lambda _, inputs: gathered.append(inputs[2]))
    batch = Batch(
        {"clean": Text(texts, torch.ones(texts.shape, dtype=torch.bool))},
        {"clean": Visual(clips)},
        pair_id=torch.arange(len(clips)),
    )
    loss = PretrainModel(family, {"mil_nce": objective})(batch, Moment(1)).losses["mil_nce"].value
    loss.backward()
    gradients = {name: each.grad for name, each in family.named_parameters() if each.grad is not None}
    return Found(loss.detach(), tuple(each.detach() for each in gathered[0]), gradients)


def embeddings(clips: Tensor, texts: Tensor, gradient: Literal["exact", "authors"] = "exact") -> tuple[Found, Tensors]:
    """The objective on embeddings, and their gradients."""
    clips, texts = (each.clone().requires_grad_() for each in (clips, texts))
    found = contrast(Towers(nn.Identity(), nn.Identity(), clips.shape[1]), clips, texts, gradient)
    assert clips.grad is not None
    assert texts.grad is not None
    return found, {"video": clips.grad, "text": texts.grad}


def two_rank_towers(folder: Folder) -> Towers:
    """The linear video head and text network of the authors' two-rank run."""
    weights = folder.tensors("weights.safetensors")
    head = {name: weights[f"two_rank.video_fc.{name}"] for name in ("weight", "bias")}
    video = nn.Linear(head["weight"].shape[1], head["weight"].shape[0])
    video.load_state_dict(head)
    return Towers(video, TextNet(weights, "two_rank.text_module."), len(head["bias"]))


def _loss(folder: Folder) -> Tensors:
    """The loss on one process."""
    inputs = folder.tensors("batch.safetensors")
    clips, texts = inputs["milnce/video_embd"], inputs["milnce/text_embd"]
    found, gradients = embeddings(clips, texts)
    alone, _ = embeddings(clips, texts[:: folder.config["milnce"]["candidates"]])
    return {
        "milnce/loss": found.loss,
        "milnce/loss_one_candidate": alone.loss,
        **{f"milnce/grad_{name}_embd": value for name, value in gradients.items()},
    }


def _one_process(folder: Folder) -> Tensors:
    """Both ranks' batch in one process."""
    inputs = folder.tensors("batch.safetensors")
    found, gradients = embeddings(inputs["ranks/video_embd"], inputs["ranks/text_embd"])
    model = contrast(two_rank_towers(folder), inputs["ranks/video_in"], inputs["ranks/text_ids"], "exact")
    values = {
        "loss": found.loss,
        "model_loss": model.loss,
        **{f"grad_{name}": value for name, value in gradients.items()},
        **{f"model_grad/{name}": value for name, value in model.gradients.items()},
    }
    return {f"ranks/single_process/{name}": value for name, value in values.items()}


def _on_rank(folder: Folder) -> Tensors:
    """This rank's clips, in the authors' way: gradients before the mean over ranks."""
    ranks = distributed.world_size()
    inputs = {
        name: value.chunk(ranks)[distributed.rank()]
        for name, value in folder.tensors("batch.safetensors").items()
        if name.startswith("ranks/")
    }
    found, gradients = embeddings(inputs["ranks/video_embd"], inputs["ranks/text_embd"], "authors")
    model = contrast(two_rank_towers(folder), inputs["ranks/video_in"], inputs["ranks/text_ids"], "authors")
    clips, captions = model.everyone
    return {
        "loss": found.loss,
        "model_loss": model.loss,
        "gathered_video": clips,
        "gathered_text": captions.flatten(0, 1),
        **{f"grad_{name}": value for name, value in gradients.items()},
        **{f"ddp_grad/{name}": value for name, value in model.gradients.items()},
    }


def _text(folder: Folder) -> Tensors:
    """The text network on word ids and on sentences."""
    net = TextNet(folder.tensors("weights.safetensors"), "text_module.")
    embed = net(folder.tensors("batch.safetensors")["text_ids"])
    embed.square().sum().backward()
    ids = word_ids(folder.config["sentences"], folder.config["words"], folder.config["text"]["max_words"])
    assert net.fc1.weight.grad is not None
    assert net.fc2.bias.grad is not None
    return {
        "text/embedding": embed.detach(),
        "text/grad/fc1.weight": net.fc1.weight.grad,
        "text/grad/fc2.bias": net.fc2.bias.grad,
        "text/word_ids_of_sentences": ids,
        "text/embedding_of_sentences": net(ids).detach(),
    }


def word_ids(sentences: list[str], words: list[str], length: int) -> Tensor:
    """[n, length] int64: word i of the list has id i + 1, unknown words are dropped, 0 fills up."""
    known = {word: number for number, word in enumerate(words, start=1)}
    rows = [[known[word] for word in WORD.findall(sentence) if word in known][:length] for sentence in sentences]
    return torch.tensor([row + [0] * (length - len(row)) for row in rows])


def _schedule(folder: Folder) -> Loose:
    """Our learning rates of two steps more than the schedule is long."""
    given = folder.config["schedule"]
    steps = given["total_steps"]
    config = optim.OptimConfig(lr=given["lr"], schedule="cosine", warmup=given["warmup_steps"])
    rates = torch.tensor([optim.lr_at(step, config, steps) for step in range(1, steps + 3)])
    beyond = torch.arange(1, steps + 3) > steps + 1
    why = "after the last step the authors' cosine rises again, ours stays at its end"
    return Loose(rates, beyond * given["lr"], why)
