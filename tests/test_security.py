"""Nothing that we read runs code, no name in it becomes a path, and nothing that we write is everybody's to change."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import json
import os
import pickle
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from tests.runs import ROOT, TINY, environment
from tests.shard_files import png, write_tar
from vlscale import config, ds_config, run_folder, weights
from vlscale.data.clip_files import read_tracks
from vlscale.data.formats.recognise import refuse_pickle
from vlscale.data.regions import parse
from vlscale.data.shards import Shards
from vlscale.data.text import read_tokenizer
from vlscale.errors import CheckpointError, ConfigError, VlscaleError
from vlscale.saving import checkpoint, pieces
from vlscale.saving.targets import as_json

# --- what the code may not say ---

RUNS_CODE = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "tempfile.mktemp"),
    *("yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "yaml.Loader", "torch.hub.load"),
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "pandas.read_pickle", "runpy.run_path"),
}
MODULES = {"dill", "cloudpickle", "marshal", "shelve", "joblib", "cPickle", "_pickle", "jsonpickle"}
MUST_SAY = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}
MAY_NOT_SAY = {"shell": True, "trust_remote_code": True, "allow_pickle": True, "weights_only": False}


def dangers(text: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names]
            whole = [f"{names[0]}.{each.name}" for each in node.names] if isinstance(node, ast.ImportFrom) else []
            yield from (name for name in (*names, *whole) if name.split(".")[0] in MODULES or name in RUNS_CODE)
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        said = {each.arg: each.value.value for each in node.keywords if isinstance(each.value, ast.Constant)}
        if name in RUNS_CODE or name.endswith(".extractall"):
            yield f"line {node.lineno}: {name}"
        wanted = MUST_SAY.get(name.replace("numpy.", "np."))
        if wanted is not None and said.get(wanted[0]) is not wanted[1]:
            yield f"line {node.lineno}: {name} without {wanted[0]}={wanted[1]}"
        yield from (f"line {node.lineno}: {key}" for key, value in said.items() if MAY_NOT_SAY.get(key, ...) is value)


@pytest.mark.parametrize("folder", ["vlscale", "launchers", "slurm"])
def test_no_line_of_ours_runs_what_it_reads(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    assert {str(file): list(dangers(file.read_text())) for file in files if list(dangers(file.read_text()))} == {}


@pytest.mark.parametrize(
    "text",
    [
        *("torch.load(file)", "torch.load(file, weights_only=False)", "np.load(f)", "np.load(f, allow_pickle=True)"),
        *("yaml.load(text)", "import dill", "from pickle import load", "pickle.loads(data)", "eval(text)"),
        *("subprocess.run(command, shell=True)", "os.system(command)", "tar.extractall(folder)"),
        "AutoModel.from_pretrained(folder, trust_remote_code=True)",
    ],
)
def test_a_line_that_would_is_found(text: str) -> None:
    assert list(dangers(text)) != []


def test_what_is_harmless_passes() -> None:
    assert list(dangers("model.eval(); yaml.safe_load(t); torch.load(f, weights_only=True); re.compile(x)")) == []


# --- what files may do ---


class Bomb:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def in_numpy(bomb: Bomb) -> bytes:
    buffer = BytesIO()
    np.savez(buffer, features=np.array([bomb], dtype=object), boxes=np.zeros((1, 4), dtype=np.float32))
    return buffer.getvalue()


def checkpoint_of(folder: Path, content: bytes, name: str = "rank_00000.safetensors") -> Path:
    """Whole by its manifest, whatever the content."""
    folder.mkdir(parents=True)
    files = {name: content, "state.json": b'{"step": 1}'}
    for each, data in files.items():
        (folder / each).write_bytes(data)
    listed = {each: [len(data), hashlib.sha256(data).hexdigest()] for each, data in files.items()}
    (folder / "manifest.json").write_text(as_json({"files": listed}))
    return folder


def read_checkpoint(file: Path) -> object:
    found = checkpoint.open_checkpoint(checkpoint_of(file.parent / "step_1", file.read_bytes()))
    return pieces.Reader(found.folder).whole("master/weight")


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "weights": ("weights.bin", weights.read),
    "weights by another name": ("weights.safetensors", weights.read),
    "a checkpoint": ("file", read_checkpoint),
    "a recipe": ("recipe.yaml", lambda file: config.load(str(file))),
    "a DeepSpeed configuration": ("ds.json", lambda file: ds_config.load(str(file))),
    "a run folder": ("config.yaml", lambda file: run_folder.differing(file.parent, {})),
    "regions": ("regions.npz", lambda file: parse(file.read_bytes(), 4, frozenset(), None)),
    "features of frames": ("frames.npz", lambda file: read_tracks(file.read_bytes())),
    "a vocabulary": ("vocab.txt", lambda file: read_tokenizer(file)),
    "annotations": ("refs.json", refuse_pickle),
}


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("form", ["pickle", "torch", "numpy", "yaml"])
def test_no_file_runs_code(kind: str, form: str, tmp_path: Path) -> None:
    mark = tmp_path / "it_ran"
    name, read = READERS[kind]
    file = tmp_path / name
    if form == "torch":
        torch.save({"model": {"weight": Bomb(mark)}}, file)
    elif form == "yaml":
        file.write_text(
            f"steps: !!python/object/apply:pathlib.Path.touch\n- !!python/object/apply:pathlib.Path [{mark}]"
        )
    else:
        file.write_bytes(pickle.dumps(Bomb(mark), protocol=2) if form == "pickle" else in_numpy(Bomb(mark)))
    with contextlib.suppress(VlscaleError, ValueError):  # what is no sound file of its kind is refused; text is text
        read(file)
    assert not mark.exists()


def test_members_of_a_shard_are_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "it_ran"
    bomb = pickle.dumps(Bomb(mark))
    members = [
        ("a.png", png(1)),
        ("a.json", b'{"caption": "a dog"}'),
        ("a.pyd", bomb),
        ("a.pth", bomb),
        ("a.cls", bomb),
    ]
    shards = Shards(str(write_tar(tmp_path / "part.tar", members)))
    assert set(shards.read(0)) >= {"png", "json"}
    assert not mark.exists()


def test_a_bomb_would_leave_its_mark(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "it_ran")))
    assert (tmp_path / "it_ran").exists()


# --- names are no paths ---


@pytest.mark.parametrize("name", ["../outside", "/tmp/outside", "..", "sub/file", ".hidden"])
def test_a_checkpoint_names_files_of_its_own_alone(name: str, tmp_path: Path) -> None:
    folder = checkpoint_of(tmp_path / "run" / "step_00000001", b"")
    tree = json.loads((folder / "manifest.json").read_text())
    tree["files"][name] = [0, hashlib.sha256(b"").hexdigest()]
    (folder / "manifest.json").write_text(as_json(tree))
    with pytest.raises(CheckpointError, match="which is no file of a checkpoint"):
        checkpoint.open_checkpoint(folder)


def test_an_index_of_weights_names_files_beside_it_alone(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    save_file({"weight": torch.ones(1)}, tmp_path / "outside.safetensors")
    index = tmp_path / "in" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"weight": "../outside.safetensors"}}))
    with pytest.raises(CheckpointError, match="which is no file beside it"):
        weights.read(tmp_path / "in")


@pytest.mark.parametrize("name", ["os", "../launchers/pretrain", "vlscale.stop", "__init__", ""])
def test_a_recipe_names_families_of_ours_alone(name: str) -> None:
    with pytest.raises(ConfigError, match="no family"):
        config.pick("families", name)


def test_a_recipe_cannot_allow_commands(tmp_path: Path) -> None:
    text = config.find_recipe("quickstart").read_text()
    tree = {**yaml.safe_load(text), "data": {"batch": 8, "train": "pipe:touch it_ran", "pipe": True}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(tree))
    assert not config.load(str(tmp_path / "recipe.yaml")).data.stores().pipe
    assert config.load(str(tmp_path / "recipe.yaml"), ["data.pipe=true"]).data.stores().pipe


def test_keys_of_samples_are_no_paths(tmp_path: Path) -> None:
    """A page with pictures is all that is written, whatever the samples are called."""
    keys = ["../../outside", "/outside", "..%2foutside", "<script>alert(1)</script>"]
    members = [
        (f"{key}.{kind}", data) for key in keys for kind, data in (("png", png(1)), ("json", b'{"caption": "a"}'))
    ]
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    write_tar(folder / "part.tar", members)
    page = folder / "page.html"
    command = [sys.executable, "launchers/shards.py", "describe", str(folder / "*.tar"), "--html", str(page)]
    subprocess.run(
        command,
        cwd=ROOT,
        env={**environment(), "VLSCALE_CACHE": str(tmp_path / "cache")},
        check=True,
        capture_output=True,
    )
    outside = {path for path in tmp_path.rglob("*") if not path.is_relative_to(tmp_path / "cache")}
    assert outside == {folder.parent, folder, folder / "part.tar", page}
    assert "<script>alert" not in page.read_text()


# --- what we write ---


@pytest.mark.slow
def test_nothing_is_writable_by_everybody(tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "launchers/pretrain.py", "--out", str(out), *TINY, "steps=2", "checkpoint.every=1"]
    subprocess.run(
        command,
        cwd=ROOT,
        env=environment(),
        preexec_fn=lambda: os.umask(0),
        check=True,
        capture_output=True,
        timeout=200,
    )
    made = [out, *out.rglob("*")]
    assert len(made) > 10
    assert {str(path): oct(path.stat().st_mode) for path in made if path.stat().st_mode & stat.S_IWOTH} == {}
