"""Who may write into a run folder, and what is in it before step 1."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from vlscale import __version__, config, run_folder
from vlscale.errors import ConfigError

BASE = ("seed=1", "data.batch=64", "objectives.itc.queue=1024", "optim.lr=1e-3", "optim.scale={temperature: 0.05}")


def tree(*overrides: str) -> dict[str, Any]:
    return config.dump(config.load("quickstart", [*BASE, *overrides]))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A folder that holds the run `quickstart`."""
    folder = tmp_path / "runs" / "a"
    run_folder.write(folder, tree(), {"train_batch_size": 64}, ["one", "one", "two"])
    return folder


def test_a_new_folder(tmp_path: Path) -> None:
    run_folder.check(tmp_path / "new", tree(), "auto")
    run_folder.check(tmp_path / "new", tree(), "never")
    (tmp_path / "empty").mkdir()
    run_folder.check(tmp_path / "empty", tree(), "auto")
    assert not (tmp_path / "new").exists()


def test_the_same_run_goes_on(out: Path) -> None:
    run_folder.check(out, tree(), "auto")


@pytest.mark.parametrize(
    "override",
    [
        *("steps=7", "logging.every=3", "logging.sample_keys=true", "evaluation.every=0", "evaluation.limit=3"),
        *("data.workers=3", "data.bad_budget=0.5", "data.bad_always=7"),
    ],
)
def test_what_may_change(out: Path, override: str) -> None:
    run_folder.check(out, tree(override), "auto")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("seed=7", "seed (1 there, 7 here) differ;"),
        ("data.batch=32", "data.batch (64 there, 32 here) differ;"),
        ("data.micro_batch=32", "data.micro_batch (None there, 32 here) differ;"),
        ("views.text.masked.mask_tokens.prob=0.3", "views.text.masked.mask_tokens.prob (0.15 there, 0.3 here) differ;"),
        ("objectives.itc.queue=8", "objectives.itc.queue (1024 there, 8 here) differ;"),
        ("tasks.words.objectives=mlm", "tasks.words"),
        ("optim.scale={}", "optim.scale.temperature (0.05 there, None here) differ;"),
        ("optim.lr=1", "optim.lr (0.001 there, 1.0 here) differ;"),
    ],
)
def test_another_run_is_refused_with_the_keys(out: Path, override: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        run_folder.check(out, tree(override), "auto")
    assert caught.value.exit_code == 2
    assert says in str(caught.value)
    assert "give another --out" in str(caught.value)


def test_the_way_to_another_micro_batch_is_told(out: Path) -> None:
    with pytest.raises(ConfigError, match=r"go on with --resume CHECKPOINT --out NEW$"):
        run_folder.check(out, tree("data.micro_batch=32"), "auto")


def test_only_some_keys_are_asked_for(out: Path) -> None:
    other = tree("optim.lr=1", "optim.scale.temperature=2", "optim.clip_each=1")
    assert run_folder.differing(out, other, ("family", "optim.clip")) == ""
    assert run_folder.differing(out, other, ("optim.scale",)) == "optim.scale.temperature (0.05 there, 2.0 here) differ"


def test_many_differences_are_counted(out: Path) -> None:
    other = tree("seed=7", "data.batch=32", "family.hidden=8", "family.heads=2", "family.patch=4", "optim.clip=3")
    with pytest.raises(ConfigError, match="and 2 more differ"):
        run_folder.check(out, other, "auto")


def test_never_refuses_any_run(out: Path) -> None:
    with pytest.raises(ConfigError, match="holds a run already and --resume never was given"):
        run_folder.check(out, tree(), "never")


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("dear")
    for folder in (tmp_path, tmp_path / "thesis.tex"):
        with pytest.raises(ConfigError, match="exists and is not a run folder; give another one"):
            run_folder.check(folder, tree(), "auto")


def test_what_an_early_end_left_is_no_other_run(tmp_path: Path) -> None:
    (tmp_path / "hangs").mkdir()
    (tmp_path / ".config.yaml.partial").write_text("reci")
    run_folder.check(tmp_path, tree(), "auto")


def test_a_broken_config_is_a_sentence(out: Path) -> None:
    (out / "config.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="cannot be read"):
        run_folder.check(out, tree(), "auto")
    (out / "config.yaml").write_text("just words")
    with pytest.raises(ConfigError):
        run_folder.check(out, tree(), "auto")


def test_what_is_written(out: Path) -> None:
    assert config.load(str(out / "config.yaml")) == config.load("quickstart", BASE)
    assert yaml.safe_load((out / "config.yaml").read_text()) == tree()
    assert json.loads((out / "ds_config.json").read_text()) == {"train_batch_size": 64}
    found = json.loads((out / "environment.json").read_text())
    assert found["command"] == sys.argv
    assert found["world_size"] == 3
    assert found["hosts"] == ["one", "two"]
    assert found["packages"]["vlscale"] == __version__
    assert set(found["packages"]) >= {"torch", "deepspeed", "transformers", "numpy"}
    assert {"git_commit", "git_diff", "python", "platform", "started"} <= set(found)
    assert [path.name for path in out.glob(".*")] == [".lock"]


def test_the_default_name() -> None:
    assert re.fullmatch(r"runs/quickstart-\d{8}-\d{6}", str(run_folder.default_name("quickstart")))
