"""MIL-NCE by our family, objective, tokenizer and schedule: the video network with both stems and its blocks alone, the
text network, the loss, a `PretrainModel` and real ranks.

The linear video head of the authors' two-rank run is a small module here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tests.distributed.spawn import run_ranks
from tests.reference.compare import Absent, Folder, Loose, Value
from vlscale import distributed, optim, vocabulary
from vlscale.data.words import word_level
from vlscale.families import milnce
from vlscale.families.base import Family
from vlscale.model import PretrainModel
from vlscale.nn import moving, s3d
from vlscale.nn.word_pool import WordPool, pool
from vlscale.objectives import mil_nce
from vlscale.types import Batch, Dims, Inputs, Moment, Stream, Text, Visual
from vlscale.weights import fill, find

Tensors = dict[str, Tensor]
COUNTS = Absent("running statistics move by a fixed tenth, so that nothing counts batches")
POOLED = {"conv_2b": "maxpool_2a", "mixed_3b": "maxpool_3a", "mixed_4b": "maxpool_4a", "mixed_5b": "maxpool_5a"}
STATISTICS = ("running_mean", "running_var")
UNMOVED = "the files hold what was there before the pass, although they say after it; the blocks alone compare the move"


def run(folder: Folder) -> dict[str, dict[str, Value]]:
    """{outputs file: {name: tensor}}."""
    torch.manual_seed(0)  # of starts that the authors' weights replace
    found: dict[str, Value] = {"*.num_batches_tracked": COUNTS}
    for prefix in ("s3d", "s3d_s2d"):
        found |= _network(folder, prefix)
    for name in folder.config["blocks"]:
        found |= _block(folder, name)
    found |= {**_layers(folder), **_loss(folder), **_text(folder), **_one_process(folder)}
    found["schedule/lr"] = _schedule(folder)
    config = folder.config["ranks"]
    ranks = run_ranks(_on_rank, config["world"], folder)
    for rank, own in enumerate(ranks):
        for name, value in own.items():
            # losses and parameters are averaged over ranks, as engines do; the authors' ranks all make the whole loss
            averaged = name.endswith("loss") or name.startswith("ddp_grad/")
            value = torch.stack([each[name] for each in ranks]).mean(dim=0) if averaged else value
            found[f"ranks/rank{rank}/{name}"] = value
    return {"outputs.safetensors": found}


def family_config(config: dict[str, Any], space_to_depth: bool = False) -> milnce.Config:
    """Our sizes from a reference folder's config.json."""
    _, _, frames, _, size = config["video"]
    text = config["text"]
    return milnce.Config(
        image_size=size,
        frames=frames,
        stem=config["c1"],
        second=config["c2c"],
        mixed=tuple(tuple(config["inc"][name]) for name in s3d.STAGES),
        space_to_depth=space_to_depth,
        vocab=text["num_embeddings"],
        word_width=text["word_embedding_dim"],
        text_width=text["output_dim"],
        text_length=config["text_len"],
        embed=config["num_classes"],
    )


def own(weights: Tensors, prefix: str) -> Tensors:
    """The tensors below a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def ours(name: str, below: str = "family.") -> str:
    """Our name of a tensor of the authors', below a part of the model."""
    return find(name, milnce.PUBLISHED)[1][0].removeprefix(below)


def network(folder: Folder, prefix: str) -> milnce.MilNce:
    """The family with the video network of a prefix, and the text network."""
    weights = folder.tensors("weights.safetensors")
    family = milnce.build(family_config(folder.config, prefix == "s3d_s2d"))
    text = {name: value for name, value in weights.items() if name.startswith("text_module.")}
    fill(PretrainModel(family, {}), {**own(weights, f"{prefix}."), **text}, milnce.PUBLISHED)
    return family


def _network(folder: Folder, prefix: str) -> dict[str, Value]:
    """All stages in evaluation, with gradients of the sum of squares; then in training, with what moved."""
    family = network(folder, prefix).eval()
    seen: Tensors = {}
    for name, stage in family.video.stages.items():
        if name in POOLED:
            pooled = POOLED[name]
            stage.register_forward_pre_hook(lambda _, given, name=pooled: seen.__setitem__(name, given[0].detach()))
        stage.register_forward_hook(lambda _, given, out, name=name: seen.__setitem__(name, out.detach()))
    frames = folder.tensors("batch.safetensors")["video_uint8"].transpose(1, 2)  # [B, T, 3, H, W]
    names = own(folder.tensors("weights.safetensors"), f"{prefix}.")
    found: dict[str, Value] = {}
    for mode in ("eval", "train"):
        family.train(mode == "train")
        stream = family.encode_visual(Visual(frames))
        assert stream.embed is not None
        values = {**seen, "video_embedding": stream.embed.detach(), "mixed5c_pooled": stream.hidden.mean(dim=1)}
        values |= {f"{name}/shape": torch.tensor(each.shape) for name, each in seen.items()}
        values |= {f"{name}/mean_per_channel": each.mean(dim=(2, 3, 4)) for name, each in seen.items()}
        if mode == "eval":
            stream.embed.square().sum().backward()
            values |= {f"grad/{name}": each for name, each in _gradients(family, names).items()}
        found |= {f"{prefix}/{mode}/{name}": value.detach() for name, value in values.items()}
    before = _statistics(family, names)
    moving.move(family)
    for name, after in _statistics(family, names).items():
        found[f"{prefix}/train/{name}"] = Loose(after, (after - before[name]).abs(), UNMOVED)
    return found


def _gradients(module: nn.Module, names: Tensors, below: str = "family.", front: str = "") -> Tensors:
    """By the authors' names; `front` is what their table needs before them."""
    parameters = dict(module.named_parameters())
    wanted = {name: parameters[target] for name in names if (target := _target(front + name, below)) in parameters}
    return {name: each.grad for name, each in wanted.items() if each.grad is not None}


def _statistics(module: nn.Module, names: Tensors, below: str = "family.", front: str = "") -> Tensors:
    buffers = dict(module.named_buffers())
    wanted = [name for name in names if name.endswith(STATISTICS)]
    return {name: buffers[_target(front + name, below)].clone() for name in wanted}


def _target(name: str, below: str) -> str:
    targets = find(name, milnce.PUBLISHED)[1]
    return targets[0].removeprefix(below) if targets else ""


def _block(folder: Folder, name: str) -> dict[str, Value]:
    """One block in evaluation, then in training with gradients of its sum under a ramp from -1 to 1."""
    sizes = folder.config["blocks"][name]
    module: nn.Module
    if name == "inception":
        module, front = s3d.Inception(sizes[0], tuple(sizes[1:])), "mixed_3b."
    elif name == "selfgating":
        module, front = s3d.SelfGating(sizes), "gating."
    else:
        before, after, *shape, separable = sizes
        triples = (tuple(each) if isinstance(each, list) else (each,) * 3 for each in shape)
        module, front = s3d.Convolution3d(before, after, *triples, separable), "conv1."
    below = f"family.video.stages.{front}"
    names = own(folder.tensors("weights.safetensors"), f"block.{name}.")
    state = {_target(front + each, below): value for each, value in names.items()}
    module.load_state_dict({each: value for each, value in state.items() if each})
    given = folder.tensors("batch.safetensors")[f"block/{name}/input"].requires_grad_()
    values = {"eval": module.eval()(given).detach()}
    out = module.train()(given)
    (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    moving.move(module)
    assert given.grad is not None
    values |= {"train": out.detach(), "train/grad_input": given.grad}
    values |= {f"train/grad/{each}": value for each, value in _gradients(module, names, below, front).items()}
    values |= {f"train/{each}": value for each, value in _statistics(module, names, below, front).items()}
    return {f"block/{name}/{each}": value for each, value in values.items()}


def _layers(folder: Folder) -> dict[str, Value]:
    """Pools and the rearrangement of space to depth."""
    inputs = folder.tensors("batch.safetensors")
    pools = (tuple(map(tuple, each)) for each in folder.config["maxpools"])
    found: dict[str, Value] = {f"pool/{i}": s3d.same_pool(inputs["pool/input"], *each) for i, each in enumerate(pools)}
    return {**found, "s2d/output": s3d.space_to_depth(inputs["s2d/input"])}


class TextNet(nn.Module):
    """The family's text network alone, of any size."""

    def __init__(self, weights: Tensors, length: int) -> None:
        super().__init__()
        vectors, first, second = (weights[f"{name}.weight"] for name in ("word_embd", "fc1", "fc2"))
        self.words = WordPool(*vectors.shape, len(first), length)
        self.text_proj = nn.Linear(len(first), len(second))
        self.load_state_dict({ours(f"text_module.{name}"): value for name, value in weights.items()})

    def forward(self, ids: Tensor) -> Tensor:
        """[n, L] int64, 0 = padding -> [n, E]."""
        embed: Tensor = self.text_proj(pool(self.words(Text(ids, ids != 0))))
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
    everyone: tuple[Tensor, ...]  # what was gathered: clips [G, n, E], captions [G, n, K, E]
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
    theirs = {"text_module.words.linear": "text_module.fc1", "text_module.text_proj": "text_module.fc2"}
    gradients = {}
    for name, each in family.named_parameters():
        layer, _, kind = name.rpartition(".")
        if each.grad is not None:
            gradients[f"{theirs.get(layer, layer)}.{kind}"] = each.grad
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
    length = folder.tensors("batch.safetensors")["ranks/text_ids"].shape[1]
    return Towers(video, TextNet(own(weights, "two_rank.text_module."), length), len(head["bias"]))


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
        "gathered_video": clips.flatten(0, 1),
        "gathered_text": captions.flatten(0, 2),
        **{f"grad_{name}": value for name, value in gradients.items()},
        **{f"ddp_grad/{name}": value for name, value in model.gradients.items()},
    }


def _text(folder: Folder) -> Tensors:
    """The text network on word ids and on sentences."""
    weights, ids = own(folder.tensors("weights.safetensors"), "text_module."), folder.tensors("batch.safetensors")
    net = TextNet(weights, ids["text_ids"].shape[1])
    embed = net(ids["text_ids"])
    embed.square().sum().backward()
    spoken = word_ids(folder.config["sentences"], folder.config["words"], folder.config["text"]["max_words"])
    assert net.words.linear.weight.grad is not None
    assert net.text_proj.bias.grad is not None
    return {
        "text/embedding": embed.detach(),
        "text/grad/fc1.weight": net.words.linear.weight.grad,
        "text/grad/fc2.bias": net.text_proj.bias.grad,
        "text/word_ids_of_sentences": spoken,
        "text/embedding_of_sentences": TextNet(weights, spoken.shape[1])(spoken).detach(),
    }


def word_ids(sentences: list[str], words: list[str], length: int) -> Tensor:
    """[n, length] int64: word i of the list has id i + 1, unknown words are dropped, 0 fills up."""
    tokenizer = vocabulary.make_tokenizer(word_level(words, cased=True), Inputs(0, length, False, words=True))
    rows = [tokenizer.encode(sentence).tolist() for sentence in sentences]
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
