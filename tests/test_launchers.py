"""The commands as a user types them: answers in time, one sentence for a mistake, the right exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.distributed.spawn import free_port
from tests.runs import ROOT, TINY, environment, launch, metrics, run_whole
from tests.shard_files import sample, write_samples
from vlscale.errors import DONE

LAUNCHERS = sorted(
    str(path.relative_to(ROOT)) for folder in ("launchers", "slurm") for path in (ROOT / folder).glob("*.py")
)
TINY_SHARDS = ("data.batch=4", "family.vocab=256")


@pytest.mark.parametrize("name", LAUNCHERS)
def test_help_is_quick_and_needs_no_torch(name: str) -> None:
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", name, "--help"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert time.monotonic() - began < 3
    assert done.returncode == DONE
    assert "usage" in done.stdout
    assert "--local_rank" not in done.stdout
    imported = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert not imported & {"torch", "deepspeed", "transformers", "numpy", "pydantic"}


def refusal(*arguments: str, launcher: str = "pretrain", code: int = 2) -> str:
    """What a mistake is answered with: one line, in time, and nothing else on stderr."""
    began = time.monotonic()
    done = launch(launcher, *arguments)
    assert time.monotonic() - began < 20
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    return done.stderr.strip()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--recipe", "quikstart"], "pretrain.py: no recipe 'quikstart'; did you mean 'quickstart'?"),
        (["--recipe", "mine.yaml"], "--recipe mine.yaml: no such file"),
        (["--ds_confg=a.json"], "no option --ds_confg; did you mean '--ds_config'?"),
        (["--out"], "argument --out: expected one argument; `--help` lists what there is"),
        (["steps"], "'steps' is not an override; write key.path=value"),
        (["optim.lrr=1"], "optim.lrr is not an option; did you mean 'lr'?"),
        (["objectives.mlmm.weight=1"], "no objective 'mlmm'; did you mean 'mlm'?"),
        (["family.name=albeff"], "no family 'albeff'; did you mean 'albef'?"),
        (["data.batch=wide"], "data.batch: should be a valid integer"),
    ],
)
def test_mistakes_in_words(arguments: list[str], says: str) -> None:
    assert says in refusal(*arguments)


def test_fp16_on_a_cpu() -> None:
    says = refusal("--ds_config", "ds_configs/zero2_fp16.json")
    assert "needs a GPU" in says
    assert "use ds_configs/zero2.json (bf16)" in says


def test_a_ds_config_that_is_not_there() -> None:
    assert "did you mean 'ds_configs/zero2.json'" in refusal("--ds_config", "ds_configs/zero22.json")


def test_a_nested_key_that_deepspeed_does_not_know(tmp_path: Path) -> None:
    tree = json.loads((ROOT / "ds_configs" / "zero2.json").read_text())
    tree["zero_optimization"]["overlap_com"] = True
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(tree))
    assert "overlap_com" in refusal("--ds_config", str(path), "--out", str(tmp_path / "run"), *TINY)


def test_a_mistyped_shard_path(tmp_path: Path) -> None:
    says = refusal(f"data.train={tmp_path}/nothing-*.tar", "data.val=embedded", *TINY, code=3)
    assert f"{tmp_path}/nothing-*.tar" in says


def test_an_empty_caption(tmp_path: Path) -> None:
    shards = write_samples(tmp_path / "shards", 12, 5, {7: sample(7, "")})
    says = refusal(f"data.train={shards}", f"data.val={shards}", *TINY, *TINY_SHARDS, "data.bad_always=0", code=3)
    assert "sample 's007' of shard" in says
    assert "is empty" in says


def test_an_out_that_holds_something_else(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("dear")
    assert "is not a run folder; give another one" in refusal("--out", str(tmp_path), *TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_batch_that_does_not_divide() -> None:
    assert "write data.batch=6 or 9" in refusal(*TINY, "data.micro_batch=3")


def test_an_objective_without_its_view(tmp_path: Path) -> None:
    import yaml

    tree = yaml.safe_load((ROOT / "vlscale" / "recipes" / "quickstart.yaml").read_text())
    del tree["views"]["text.masked"]
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(yaml.safe_dump(tree))
    out = tmp_path / "run"
    says = refusal("--recipe", str(recipe), "--out", str(out), *TINY)
    assert "the objectives read the view(s) ['text.masked']" in says
    assert not out.exists()


def test_a_mistyped_view_option(tmp_path: Path) -> None:
    out = tmp_path / "run"
    says = refusal("--out", str(out), *TINY, "views.text.masked.mask_tokens.prop=0.3")
    assert "did you mean 'prob'" in says
    assert not out.exists()  # else the corrected command would meet "another run"


def test_checkpoints_that_cannot_be_resumed(tmp_path: Path) -> None:
    out = tmp_path / "run"
    for path in ("", str(tmp_path / "nowhere")):
        says = refusal("--resume", path, "--out", str(out), *TINY)
        assert f"'{path}' is no folder; give a run folder" in says
    (tmp_path / "empty").mkdir()
    assert "manifest.json" in refusal("--resume", str(tmp_path / "empty"), "--out", str(out), *TINY, code=5)
    assert not out.exists()


def test_evaluate_mistakes(tmp_path: Path) -> None:
    assert "--checkpoint" in refusal(launcher="evaluate")
    assert "no task 'retrival'; did you mean 'retrieval'?" in refusal(
        *("--checkpoint", str(tmp_path), "--task", "retrival"), launcher="evaluate"
    )
    assert "is no folder" in refusal("--checkpoint", str(tmp_path / "nowhere"), launcher="evaluate")
    assert "manifest.json" in refusal("--checkpoint", str(tmp_path), launcher="evaluate", code=5)
    for option, says in (("--limit=-1", "--limit should be at least 0"), ("--batch=0", "--batch should be at least 1")):
        assert says in refusal("--checkpoint", str(tmp_path), option, launcher="evaluate")
    assert "cannot be changed here" in refusal("--checkpoint", str(tmp_path), "steps=3", launcher="evaluate")


def test_a_dry_run_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "run"
    said = run_whole(1, out, "--dry_run", "steps=40")
    for word in ("parameters", "memory per rank, ZeRO 2", "samples per step", "TFLOPs per step", "steps", "time"):
        assert word in said
    assert not out.exists()


def test_a_finished_run_says_so(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run_whole(1, out, "steps=2").splitlines()[-1] == f"done: 2 steps, in {out}"
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    began = time.monotonic()
    again = run_whole(1, out, "steps=2")
    assert time.monotonic() - began < 5
    assert again == f"{out} holds this run, finished at step 2; there is nothing left to do\n"
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}

    assert "seed (1 there, 2 here) differ" in refusal("--out", str(out), *TINY, "steps=2", "seed=2")
    assert "--resume never was given" in refusal("--out", str(out), *TINY, "steps=2", "--resume", "never")
    says = refusal(*("--resume", str(out), "--out", str(tmp_path / "b"), *TINY, "family.hidden=64", "steps=4"), code=5)
    assert "holds another model: family.hidden (32 there, 64 here) differ" in says
    other = ("optim.lr=0.1", "optim.weight_decay=0.5", "optim.clip_each=1")
    says = refusal("--resume", str(out), "--out", str(tmp_path / "b"), *TINY, *other, "steps=4", code=5)
    assert "another optimizer: optim.weight_decay (0.02 there, 0.5 here), optim.clip_each (0.0 there, 1.0" in says

    longer = run_whole(1, out, "steps=3", "--recipe", str(out / "config.yaml"), "--ds_config", "ds_configs/fp32.json")
    assert "going on after step 2" in longer
    assert [line["step"] for line in metrics(out) if "loss" in line] == [1, 2, 3]


def test_a_stop_of_standard_output_is_no_traceback(tmp_path: Path) -> None:
    """`... --dry_run | head -1` ends quietly."""
    command = f"{sys.executable} launchers/pretrain.py --help | head -c 1"
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False
    )
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("mistake", ["an empty caption", "an unknown key", "a missing view option"])
def test_two_ranks_say_it_once_and_end_with_the_code(mistake: str, tmp_path: Path) -> None:
    shards = write_samples(tmp_path / "shards", 12, 5, {7: sample(7, "")})
    arguments, code, says = {
        "an empty caption": ([f"data.train={shards}", f"data.val={shards}", *TINY_SHARDS], 3, "is empty"),
        "an unknown key": (["optim.lrr=1"], 2, "did you mean 'lr'?"),
        "a missing view option": (["views.text.masked.mask_tokens.prop=0.3"], 2, "did you mean 'prob'"),
    }[mistake]
    deepspeed = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", "2"]
    done = subprocess.run(
        [*deepspeed, f"--master_port={free_port()}", "launchers/pretrain.py", *TINY, *arguments],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert (done.stdout + done.stderr).count("pretrain.py: ") == 1
    assert says in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
