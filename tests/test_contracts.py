"""Every family and every objective, found by walking the folders, keeps the contract."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import vlscale.families
import vlscale.objectives
from tests.models import batch_for
from tests.whole_steps import check_whole
from vlscale.data.regions import PLACES, Regions
from vlscale.families.base import Family
from vlscale.model import PretrainModel
from vlscale.objectives.base import Objective
from vlscale.types import Batch, Moment

# Of two streams (ViLBERT, LXMERT, CVLP), what changes only one of them after their last exchange.
TEXT_ALONE = ("text_coattention_stack.blocks.1", "text_fusion_stack.blocks.2", "cross_stack.blocks.1.text")
VISUAL_LAST = "cross_stack.blocks.1.visual"
VISUAL_ALONE = ("visual_coattention_stack.blocks.1", "visual_fusion_stack.blocks.1", VISUAL_LAST)

# HERO's: of hidden frames, and of sentences that are asked for.
UNHIDDEN = ("frame_projection.mask", "frame_transform.mask")
QUERIES = "query_encoder"
TOKENS = "token_head"  # VideoBERT's, over words and visual words

# What an objective may leave untouched on its own: (part of a parameter's name, why).
EXCUSED = {
    "itc": ("fusion_stack",),  # it contrasts before the modalities meet
    "itm": (
        *("text_proj", "visual_proj", "temperature", "embeddings.mask", "mask_token"),
        *(VISUAL_LAST, *UNHIDDEN, QUERIES, TOKENS),
    ),  # embeddings only draw negatives; it sees nothing hidden
    "mlm": (
        "text_proj",
        "visual_proj",
        "temperature",
        "pooler",
        "embeddings.mask",
        "mask_token",
        *VISUAL_ALONE,
        *("frame_transform", "clip_places", "temporal_stack", *UNHIDDEN, QUERIES),  # HERO's beyond the sentences
    ),  # it embeds nothing
    "imc": ("fusion_stack",),
    "lmi": ("fusion_stack",),
    "sigmoid": ("fusion_stack",),
    "margin": ("fusion_stack", "temperature", "cross_embeddings", "pooler"),  # as mil_nce
    "mil_nce": ("fusion_stack", "temperature", "cross_embeddings", "pooler"),  # bare dot products
    "mrfr": ("pooler", QUERIES, *TEXT_ALONE),  # the pair as one vector is not asked
    "mrc": ("pooler", *TEXT_ALONE),  # the same
    "mrc_kl": ("pooler", *TEXT_ALONE),  # the same
    "mrm_nce": ("pooler", *TEXT_ALONE),  # the same
    "region_nce": ("pooler", *TEXT_ALONE),  # the same
    "wra": ("pooler", "embeddings.mask"),  # it sees no hidden region
    "tag_contrast": (
        *("text_proj", "visual_proj", "temperature", "embeddings.mask", "mask_token"),
        *(VISUAL_LAST, *UNHIDDEN, QUERIES, TOKENS),
    ),  # as mlm
    "masked_object": ("pooler", *TEXT_ALONE),  # as mrc
    "answer": ("text_proj", "visual_proj", "temperature", VISUAL_LAST, *UNHIDDEN, QUERIES, TOKENS),  # it embeds nothing
    "caption": ("pooler",),  # it asks for words
    "mvw": ("pooler",),  # as mrfr
    "mfm": ("pooler", QUERIES),  # as mrfr
    "fom": ("pooler", *UNHIDDEN, QUERIES),  # as mrfr, and it sees no hidden frame
    "vsm": ("pooler", *UNHIDDEN, "vsm.query", "vsm.start", "vsm.end"),  # as fom; its local part is not in every step
    "pair_nce": ("score.bias",),  # a softmax over scores does not see what is added to all
    "seq2seq": ("pooler", "mask_token"),  # only words are asked, beside all of the picture
}

# What no objective reaches: [CLS]'s place and the only segment are padding to LXMERT's tables.
FROZEN = {"lxmert": ("text_embeddings.segment",), "cvlp": ("text_embeddings.segment",)}


def modules(package: ModuleType) -> list[ModuleType]:
    names = [found.name for found in pkgutil.iter_modules(package.__path__) if found.name != "base"]
    return [importlib.import_module(f"{package.__name__}.{name}") for name in names]


FAMILIES = modules(vlscale.families)
OBJECTIVES = modules(vlscale.objectives)
PAIRS = [(family, objective) for family in FAMILIES for objective in OBJECTIVES]


def short(module: ModuleType) -> str:
    return module.__name__.rpartition(".")[2]


def changed(config: Any, changes: dict[str, Any]) -> Any:
    known = {name: value for name, value in changes.items() if name in config.__dataclass_fields__}
    return dataclasses.replace(config, **known)


def miniature(family: ModuleType, changes: dict[str, Any] | None = None) -> tuple[Any, Family]:
    torch.manual_seed(0)
    config = changed(family.tiny(), changes or {})
    return config, family.build(config)


def built(family: ModuleType, objective: ModuleType, **changes: Any) -> tuple[Any, PretrainModel]:
    """The family's miniature with one objective; `changes` go to whichever `Config` has them.

    Skips a pair that cannot go together.
    """
    config, network = miniature(family, changes)
    negatives = {} if "temperature" in network.offers else {"negatives": "loader"}  # hard ones are drawn by embeddings
    options = changed(objective.Config(), {"queue": 8, "queue_start": "random", **negatives, **changes})
    (kind,) = {each for each in vars(objective).values() if isinstance(each, type) and Objective in each.__bases__}
    if kind.needs - network.offers:
        pytest.skip(f"{short(objective)} needs {sorted(kind.needs - network.offers)}")
    return config, PretrainModel(network, {short(objective): objective.build(options, network)})


def batch_of(config: Any) -> Batch:
    """Every second pair matches, for objectives that read it."""
    batch = batch_for(config.inputs, config.vocab)
    return dataclasses.replace(batch, matched=torch.arange(len(batch)) % 2 == 0)


@pytest.mark.parametrize("family", FAMILIES, ids=short)
def test_family_file(family: ModuleType) -> None:
    config, network = miniature(family)
    assert config.__dataclass_params__.frozen
    assert family.PUBLISHED.rows
    assert network.published is family.PUBLISHED
    assert sum(parameter.numel() for parameter in network.parameters()) < 50_000
    assert network.inputs == config.inputs
    alone = {"fuse_text", "fuse_visual"} if "alone" in network.offers else set()
    assert {"encode_text", "encode_visual", "fuse", "decode", "tower"} | alone >= set(network.flops(8))
    for tensor in [*network.parameters(), *network.buffers()]:
        assert tensor.ndim > 0


READS_REGIONS = [family for family in FAMILIES if family.tiny().inputs.regions]


@pytest.mark.parametrize("family", READS_REGIONS, ids=short)
def test_places_have_as_many_numbers_as_the_family_reads(family: ModuleType) -> None:
    """In its miniature and at its published sizes."""
    for config in (family.tiny(), family.Config()):
        inputs = config.inputs
        boxes = np.array([[1.0, 2.0, 3.0, 5.0], [0.0, 0.0, 8.0, 6.0]], dtype=np.float32)
        fields = {"class_confidence": np.ones(2, dtype=np.float32)}
        found = Regions(np.ones((2, inputs.feats), dtype=np.float32), boxes, (8.0, 6.0), fields)
        assert PLACES[inputs.geometry](found).shape == (2, inputs.boxes)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=short)
def test_objective_file(objective: ModuleType) -> None:
    config = objective.Config()
    assert config.__dataclass_params__.frozen
    assert config.weight == 1.0


@pytest.mark.parametrize(("family", "objective"), PAIRS, ids=[f"{short(f)}-{short(o)}" for f, o in PAIRS])
def test_pair_trains(family: ModuleType, objective: ModuleType) -> None:
    config, model = built(family, objective)
    batch = batch_of(config)
    unwritten = () if "decode" in model.objectives[short(objective)].needs else ("decoder_",)
    excused = (*EXCUSED.get(short(objective), ()), *FROZEN.get(short(family), ()), *unwritten)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    total = model.total(model(batch, Moment(2)).losses, model.counts(batch))
    assert torch.isfinite(total)
    total.backward()  # type: ignore[no-untyped-call]
    for name, parameter in model.named_parameters():
        assert parameter.ndim > 0, name
        reached = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        if not parameter.requires_grad:
            assert parameter.grad is None, name
        elif not any(part in name for part in excused):
            assert reached, f"no gradient reaches {name}"
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), f"forward changed {name}"
    model.eval()
    with torch.no_grad():
        model(batch, Moment(2))
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), f"evaluation changed {name}"


WHOLE = [(f, o) for f, o in PAIRS if "scope" in o.Config.__dataclass_fields__]


@pytest.mark.parametrize(("family", "objective"), WHOLE, ids=[f"{short(f)}-{short(o)}" for f, o in WHOLE])
def test_scope_global_does_not_depend_on_micro_batches(family: ModuleType, objective: ModuleType) -> None:
    def make() -> PretrainModel:
        return built(family, objective, scope="global", dropout=0.0)[1]

    config, model = built(family, objective, scope="global")
    check_whole(make, batch_of(config), world=1, number=2, sizes=(2, 2) if model.even() else (1, 3))


@pytest.mark.parametrize(("family", "objective"), PAIRS, ids=[f"{short(f)}-{short(o)}" for f, o in PAIRS])
def test_asked_views_and_passes_agree(family: ModuleType, objective: ModuleType) -> None:
    config, model = built(family, objective)
    asked = model.objectives[short(objective)]
    named = {part for name in asked.passes() for part in name.removeprefix("momentum.").split(":")[1:]}  # type: ignore
    assert {view.partition(".")[2] for view in model.views() if not view.startswith("pairs.")} == named
    online, _ = asked.head_flops(batch_of(config))  # type: ignore[operator]
    assert online > 0


def test_a_zero_dimensional_parameter_is_refused() -> None:
    _, network = miniature(FAMILIES[0])
    network.extra = torch.nn.Parameter(torch.tensor(1.0))
    with pytest.raises(AssertionError, match="zero-dimensional"):
        PretrainModel(network, {})
