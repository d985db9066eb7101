"""What can be wrong between a family, the objectives and the views of a recipe."""

from __future__ import annotations

from types import ModuleType

import pytest

from vlscale import build, config
from vlscale.data import scenes, views
from vlscale.errors import ConfigError, DataError
from vlscale.families import albef
from vlscale.families.base import Family
from vlscale.model import PretrainModel
from vlscale.objectives import mlm

SMALL = ("family.visual_layers=1", "family.text_layers=1", "family.fusion_layers=1", "objectives.itc.queue=8")


class Dual(Family):
    """Two towers that never meet."""

    offers = frozenset({"text", "visual"})

    def __init__(self, config: albef.Config) -> None:
        super().__init__()
        whole = albef.build(config)
        self.dims, self.inputs = whole.dims, whole.inputs
        self.word = whole.word_embedding

    @property
    def word_embedding(self):  # type: ignore[no-untyped-def]
        return self.word


def dual() -> ModuleType:
    module = ModuleType("vlscale.families.dual")
    module.Config = albef.Config  # type: ignore[attr-defined]
    module.build = Dual  # type: ignore[attr-defined]
    return module


def test_an_objective_that_the_family_cannot_serve() -> None:
    family = Dual(albef.tiny())
    with pytest.raises(ConfigError) as caught:
        PretrainModel(family, {"mlm": mlm.build(mlm.Config(), family)})
    assert str(caught.value) == (
        "objective 'mlm' needs ['fuse', 'text', 'visual'], but family 'Dual' offers ['text', 'visual']; "
        "take it out of objectives or choose a family that offers ['fuse']"
    )


def test_the_same_from_a_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    run = config.load("quickstart", SMALL)
    real = config.pick
    monkeypatch.setattr(config, "pick", lambda folder, name: dual() if folder == "families" else real(folder, name))
    with pytest.raises(ConfigError, match=r"objective 'itc' needs .* but family 'Dual' offers"):
        build.build_model(run)


def test_a_view_that_nobody_gives() -> None:
    run = config.load("quickstart", SMALL)
    kept = {name: options for name, options in run.views.items() if name != "text.masked"}
    tree = {**config.dump(run), "views": kept}
    tree.pop("recipe")
    with pytest.raises(ConfigError) as caught:
        build.build_model(config.from_tree("mine", tree))
    assert str(caught.value) == (
        "the objectives read the view(s) ['text.masked'], but views gives ['text.clean', 'visual.clean']; "
        "add e.g. views.text.masked={}"
    )


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("views.text.masked.mask_token.prob=0.3", "did you mean 'mask_tokens'"),
        ("views.text.masked.mask_tokens.prop=0.3", "did you mean 'prob'"),
        ("views.visual.clean.flipp={}", "did you mean 'flip'"),
        ("views.visual.clean.flip.prob=2", "prob"),
    ],
)
def test_mistyped_views(override: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        views.parse(config.load("quickstart", [override]).views)


def test_a_model_is_a_function_of_the_seed() -> None:
    def norms(seed: int) -> list[float]:
        model = build.build_model(config.load("quickstart", [*SMALL, f"seed={seed}"]))
        return [float(each.detach().norm()) for each in model.parameters()]

    assert norms(1) == norms(1)
    assert norms(1) != norms(2)


def test_a_family_of_regions_needs_shards_with_regions() -> None:
    tree = config.dump(config.load("quickstart", SMALL))
    tree |= {"family": {"name": "uniter"}, "objectives": {"mlm": {"soften": 0.0}}}
    tree["data"] |= {"train": [str(path) for path in scenes.ensure().train]}
    tree.pop("recipe")
    request = build.Request(config.from_tree("mine", tree), "ds_configs/zero2.json", None)
    with pytest.raises(DataError, match=r"has no 'regions.npz' but png, json; `launchers/shards.py regions` adds one"):
        build.setup(request)
