"""MoCo's steps (v1, v2) by our objective, queue and momentum update around a stand-in network.

The key network sees the batch shuffled over ranks, so that its BatchNorm statistics tell nothing of who
belongs together (He et al. 2020, section 3.3). No family of ours has BatchNorm; the shuffle is this runner's.
Ranks are run one after the other; each starts a step from rank 0's BatchNorm statistics, which is what
DistributedDataParallel does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.reference.compare import Folder
from vlscale.families.base import Family
from vlscale.model import Encodings, PretrainModel
from vlscale.nn import contrast, momentum
from vlscale.nn.temperature import Temperature
from vlscale.objectives import imc
from vlscale.types import Batch, Dims, Inputs, Moment, Pass, Stream, Visual

Tensors = dict[str, Tensor]


def run(folder: Folder) -> dict[str, Tensors]:
    """{outputs file: {name: tensor}} of both variants, each with every number of ranks."""
    computed = {}
    for variant in folder.config["variants"]:
        own = Folder.open(folder.path / variant)
        inputs, found = own.tensors("batch.safetensors"), dict[str, Tensor]()
        for world in own.config["world_sizes"]:
            found |= _Runner(own).train(inputs, world)
        computed[f"{variant}/outputs.safetensors"] = found
    return computed


class StandIn(Family):
    """Two convolutions, the mean over pixels, and a linear or two-layer head; a fixed temperature."""

    offers = frozenset({"visual", "embed", "temperature"})

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        first, second, width = config["c1"], config["c2"], config["dim"]
        options = {"eps": config["bn_eps"], "momentum": config["bn_momentum"]}
        self.conv1 = nn.Conv2d(3, first, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(first, **options)
        self.conv2 = nn.Conv2d(first, second, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(second, **options)
        mlp = nn.Sequential(nn.Linear(second, second), nn.ReLU(), nn.Linear(second, width))
        self.fc = mlp if config["mlp_head"] else nn.Linear(second, width)
        temperature = config["temperature"]
        self.temperature = Temperature(temperature, temperature, temperature).requires_grad_(False)
        self.dims, self.inputs = Dims(text=0, visual=width, fused=0, embed=width), Inputs(config["image"], 0, False)
        self.made: Stream | None = None  # what `encode_visual` gives: the runner has made it from a shuffled batch

    def encode_visual(self, visual: Visual) -> Stream:
        """hidden [B, 1, dim] before, embed [B, dim] after normalisation."""
        if self.made is not None:
            return self.made
        hidden = F.relu(self.bn1(self.conv1(visual.feats)))
        out = self.fc(F.relu(self.bn2(self.conv2(hidden))).mean(dim=(2, 3)))
        return Stream(out[:, None], None, F.normalize(out, dim=1))


class _Runner:
    """The model under the authors' weights, and its optimizer."""

    def __init__(self, folder: Folder) -> None:
        self.config = config = folder.config
        family = StandIn(config)
        options = imc.Config(queue=config["K"], sides="visual", batch_keys="own", momentum_visual="augmented")
        self.model = PretrainModel(family, {"imc": imc.build(options, family)})
        self.model.copies_buffers = False  # the key network gathers BatchNorm statistics of its own
        self.queue = self.model.key_queues()["image"]
        assert isinstance(self.model.twin, StandIn)
        self.networks = {"encoder_q": family, "encoder_k": self.model.twin}
        weights = folder.tensors("weights.safetensors")
        for prefix, network in self.networks.items():
            own = {name.removeprefix(f"{prefix}."): value for name, value in weights.items() if prefix in name}
            missing, unexpected = network.load_state_dict(own, strict=False)
            assert (missing, unexpected) == (["temperature.value"], [])
        self.queue.keys.copy_(weights["queue"].T)
        self.queue.pointer.copy_(weights["queue_ptr"])
        self.optimizer = torch.optim.SGD(
            [each for each in family.parameters() if each.requires_grad],
            lr=config["lr"],
            momentum=config["sgd_momentum"],
            weight_decay=config["weight_decay"],
        )

    def train(self, inputs: Tensors, world: int) -> Tensors:
        """All steps of `world` ranks."""
        out: Tensors = {}
        for number in range(self.config["steps"]):
            names = [f"w{world}/r{rank}/s{number}/" for rank in range(world)]
            ranks = [{key.removeprefix(name): inputs[key] for key in inputs if key.startswith(name)} for name in names]
            for name, found in zip(names, self._step(ranks, number + 1), strict=True):
                out |= {name + key: value for key, value in found.items()}
        return out

    def _step(self, ranks: list[Tensors], step: int) -> list[Tensors]:
        """What each rank sees and has after the step."""
        pairs, twin = self.model.momentum_pairs(), self.networks["encoder_k"]
        momentum.update([key.data for _, key in pairs], [query.data for query, _ in pairs], self.config["m"])
        self.optimizer.zero_grad()
        shuffled, ends = self._shuffled_keys(ranks)
        unshuffled = torch.cat([own["encoder_k_out_shuffled"] for own in shuffled])[ranks[0]["idx_shuffle"].argsort()]
        made, seen = [], []
        for rank, out in enumerate(unshuffled.chunk(len(ranks))):
            self._restore(ends[rank])
            twin.made = Stream(out[:, None], None, F.normalize(out, dim=1))
            one, values = self._forward(ranks[rank])
            torch.autograd.backward(self.model.total(one.losses, {}) / len(ranks))
            ends[rank], twin.made = self._statistics(), None
            made.append(one)
            seen.append({**shuffled[rank], **values})
        self.optimizer.step()
        self.model.commit([one.keys for one in made], step, "step")
        self._restore(ends[0])  # rank 0's go to all
        after = self._after()
        own = [{f"after/{name}": value for name, value in end.items()} for end in ends]
        return [{**values, **after, **end} for values, end in zip(seen, own, strict=True)]

    @torch.no_grad()
    def _shuffled_keys(self, ranks: list[Tensors]) -> tuple[list[Tensors], list[Tensors]]:
        """What each rank's key network makes of its slice of the shuffled batch, and its statistics then."""
        start, found, ends = self._statistics(), [], []
        everyone = torch.cat([inputs["im_k"] for inputs in ranks])[ranks[0]["idx_shuffle"]]
        for pictures in everyone.chunk(len(ranks)):
            self._restore(start)
            out = self.networks["encoder_k"].encode_visual(Visual(pictures)).hidden[:, 0]
            found.append({"encoder_k_out_shuffled": out, "im_k_after_shuffle_mean": pictures.mean(dim=(1, 2, 3))})
            ends.append(self._statistics())
        return found, ends

    def _forward(self, inputs: Tensors) -> tuple[Pass, Tensors]:
        """The model's pass over one rank's batch, and what it looks at."""
        seen: list[Encodings] = []
        hook = self.model.objectives["imc"].register_forward_pre_hook(lambda _module, given: seen.append(given[0]))
        views = {"clean": Visual(inputs["im_q"]), "augmented": Visual(inputs["im_k"])}
        made: Pass = self.model(Batch({}, views, torch.arange(len(inputs["im_q"]))), Moment(step=1))
        hook.remove()
        online, key = seen[0].visual("clean"), seen[0].momentum.visual("augmented").embed
        assert online.embed is not None
        assert key is not None
        temperature = seen[0].family.temperature()
        positives = (online.embed * key).sum(dim=1, keepdim=True) / temperature
        logits = torch.cat([positives, contrast.logits(online.embed, self.queue.keys, temperature)], dim=1)
        values = {
            "encoder_q_out": online.hidden[:, 0],
            "q": online.embed,
            "k": key,
            "logits": logits,
            "labels": torch.zeros(len(logits), dtype=torch.int64),  # the positive is column 0
            "loss": made.losses["imc"].value,
        }
        return made, {name: value.detach().clone() for name, value in values.items()}

    def _after(self) -> Tensors:
        """Gradients, parameters and the queue after a step."""
        out = {"queue_after": self.queue.keys.T.clone(), "queue_ptr_after": self.queue.pointer.clone()}
        for prefix, network in self.networks.items():
            for name, parameter in network.named_parameters():
                out[f"after/{prefix}.{name}"] = parameter.detach().clone()
                if parameter.grad is not None:
                    out[f"grad/{prefix}.{name}"] = parameter.grad.clone()
        return out

    def _statistics(self) -> Tensors:
        """BatchNorm's, of both networks."""
        return {
            f"{prefix}.{name}": buffer.clone()
            for prefix, network in self.networks.items()
            for name, buffer in network.named_buffers()
        }

    def _restore(self, statistics: Tensors) -> None:
        for prefix, network in self.networks.items():
            for name, buffer in network.named_buffers():
                buffer.copy_(statistics[f"{prefix}.{name}"])
