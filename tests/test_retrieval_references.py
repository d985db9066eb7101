"""Fine-tuning for retrieval, ALBEF's and TCL's, agrees with the authors' tensors, and notices another picture."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.reference.__main__ import main
from tests.reference_folders import copied
from tests.shard_files import reference_folder

SYSTEMS = ("albef_retrieval", "tcl_retrieval")


def folder(system: str) -> Path:
    return reference_folder(system)


@pytest.mark.parametrize("system", SYSTEMS)
def test_agrees_with_the_authors(system: str) -> None:
    assert main([str(folder(system))]) == 0


@pytest.mark.parametrize("system", SYSTEMS)
def test_another_pictures_caption_is_no_positive(system: str, tmp_path: Path) -> None:
    copy = copied(folder(system), tmp_path)
    batch = load_file(copy / "batch.safetensors")
    batch["s0/idx"][-1] = batch["s0/idx"][0]
    save_file(batch, copy / "batch.safetensors")
    assert main([str(copy)]) == 1
