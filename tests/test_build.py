"""What can be wrong between a family, the objectives and the views of a recipe."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from tests.shard_files import WORDS, sample, write_samples, write_tar, write_vocabulary
from vlscale import build, config, vocabulary
from vlscale.data import text, views
from vlscale.data.scenes import embedded as scenes
from vlscale.data.shards import Shards
from vlscale.data.text import SPECIAL_TOKENS
from vlscale.errors import ConfigError, DataError
from vlscale.families import albef
from vlscale.families.base import Family
from vlscale.model import PretrainModel
from vlscale.objectives import mlm
from vlscale.options import TextConfig

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
        "add e.g. 'views.text.masked={mask_tokens: {}}'"
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


def test_a_run_goes_on_with_the_vocabulary_and_the_answers_that_it_began_with(tmp_path: Path) -> None:
    given, shards = tmp_path / "vocab.txt", write_samples(tmp_path / "shards", 12, 5, {})
    data = (f"data.train={shards}", f"data.val={shards}", "data.batch=4", "family.vocab=256", f"text.vocab={given}")
    run = config.load("quickstart", [*SMALL, *data])
    request = build.Request(run, "ds_configs/zero2.json", tmp_path / "run")
    write_vocabulary([*SPECIAL_TOKENS, *WORDS], given)
    began = build.setup(request)
    build.write_folder(run, began)
    assert build.setup(request).vocabulary == began.vocabulary
    with pytest.raises(ConfigError, match="--out /proc/run cannot be written"):
        build.write_folder(run, replace(began, out=Path("/proc/run")))
    kept = tmp_path / "run" / vocabulary.TOKENIZER
    assert json.loads(text.read_tokenizer(kept)) == json.loads(began.vocabulary)  # the way out that is named
    write_vocabulary([*SPECIAL_TOKENS, *reversed(WORDS)], given)
    with pytest.raises(ConfigError, match=r"text.vocab=.*/vocab.txt does not hold what the run began with"):
        build.setup(request)

    listed = tmp_path / "listed.txt"
    run = config.load("lxmert_tiny", [f"text.answers={listed}"])
    listed.write_text("yes\nno\n")
    answers = vocabulary.find_answers(run.text, tmp_path / "run", began.train, 9500)
    (tmp_path / "run" / vocabulary.ANSWERS).write_text(f"{answers}\n")
    assert vocabulary.find_answers(run.text, tmp_path / "run", began.train, 9500).splitlines() == ["yes", "no"]
    listed.write_text("no\nyes\n")
    with pytest.raises(ConfigError, match=r"text.answers=.*/listed.txt does not hold .* --resume .*/run text.answers="):
        vocabulary.find_answers(run.text, tmp_path / "run", began.train, 9500)


def test_a_vocabulary_is_built_once_for_the_same_captions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And anew when a caption has changed, even if the shard's size has not."""
    monkeypatch.setenv("VLSCALE_CACHE", str(tmp_path / "cache"))
    built = []
    build_vocabulary = text.build_vocabulary
    monkeypatch.setattr(text, "build_vocabulary", lambda *given: built.append(0) or build_vocabulary(*given))

    def find(size: int = 100, tags: bool = False) -> str:
        shards = Shards(str(tmp_path / "shards" / "*.tar"), tmp_path / "index")
        return vocabulary.find_tokenizer(TextConfig(), tmp_path, shards, size, questions=False, tags=tags)

    write_samples(tmp_path / "shards", 6, 3, {0: sample(0, "a walrus")})
    first = find()
    assert "walrus" in first
    assert find() == first
    assert len(built) == 1
    assert find(size=30) != first
    find(tags=True)
    assert len(built) == 3
    write_samples(tmp_path / "shards", 6, 3, {0: sample(0, "a beaver")})
    assert "beaver" in find()
    assert len(built) == 4
    (tmp_path / "file").write_text("a cache folder that cannot be made")
    monkeypatch.setenv("VLSCALE_CACHE", str(tmp_path / "file"))
    assert "beaver" in find()


def test_texts_that_are_too_long_are_told_with_the_options_to_write(tmp_path: Path) -> None:
    long = "a red blue green thing number 1 2 3 4 5 6 7 8 9"
    shards = write_samples(tmp_path / "shards", 12, 5, {n: sample(n, long) for n in range(3)})
    given = tmp_path / "vocab.txt"
    write_vocabulary([*SPECIAL_TOKENS, *WORDS], given)

    def warnings(*options: str) -> tuple[str, ...]:
        data = (f"data.train={shards}", f"data.val={shards}", "data.batch=4", "family.vocab=256", f"text.vocab={given}")
        run = config.load("quickstart", [*SMALL, *data, *options])
        return build.setup(build.Request(run, "ds_configs/zero2.json", tmp_path / "run")).warnings

    assert warnings("family.text_length=24") == ()
    (warning,) = warnings("family.text_length=12", "text.max_words=12")
    assert warning == (
        "25% of the training texts are cut by text.max_words=12 and family.text_length=12, which loses 13% of all "
        "words; write text.max_words=15 family.text_length=16 to keep 95% of the texts whole"
    )
    (warning,) = warnings("family.text_length=12")
    assert "are cut by family.text_length=12, which" in warning
    assert warnings("family.text_length=16", "text.max_words=15") == ()


def test_validation_shards_that_would_fail_after_step_1(tmp_path: Path) -> None:
    good = write_samples(tmp_path / "good", 12, 5, {})
    given = tmp_path / "vocab.txt"
    write_vocabulary([*SPECIAL_TOKENS, *WORDS], given)
    common = (*SMALL, f"data.train={good}", "data.batch=4", "family.vocab=256", f"text.vocab={given}")

    def request(val: str, *more: str) -> build.Request:
        return build.Request(
            config.load("quickstart", [*common, f"data.val={val}", *more]), "ds_configs/zero2.json", None
        )

    silent = write_samples(tmp_path / "silent", 3, 5, {1: sample(1)[:1]})
    with pytest.raises(DataError, match=r"sample 's001' of shard .*silent.* has no caption"):
        build.setup(request(silent, "data.bad_always=0"))
    with pytest.raises(DataError, match=r"empty.tar holds no samples"):
        build.setup(request(str(write_tar(tmp_path / "empty.tar", []))))


def test_a_family_of_regions_needs_shards_with_regions() -> None:
    tree = config.dump(config.load("quickstart", SMALL))
    tree |= {"family": {"name": "uniter"}, "objectives": {"mlm": {"soften": 0.0}}}
    tree["data"] |= {"train": [str(path) for path in scenes.ensure().train]}
    tree["optim"]["scale"] = {}
    tree.pop("recipe")
    request = build.Request(config.from_tree("mine", tree), "ds_configs/zero2.json", None)
    with pytest.raises(DataError, match=r"has no 'regions.npz' but png, json; `launchers/shards.py regions` adds one"):
        build.setup(request)
