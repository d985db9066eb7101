"""MIL-NCE's family: towers by hand, both stems, two ranks against one, the authors' names there and back."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.models import batch_for
from tests.reference import milnce as runner
from tests.reference.compare import Folder
from tests.shard_files import reference_folder
from tests.whole_steps import check_whole
from vlscale import config, convert
from vlscale.errors import ConfigError
from vlscale.families import milnce
from vlscale.flops import step_flops
from vlscale.model import PretrainModel
from vlscale.nn.s3d import s3d_flops
from vlscale.objectives import mil_nce
from vlscale.types import Batch, Text

TINY = milnce.tiny()
K = 3  # candidates of a clip


def family_of(sizes: milnce.Config = TINY) -> milnce.MilNce:
    torch.manual_seed(0)
    return milnce.build(sizes)


def model() -> PretrainModel:
    family = family_of()
    return PretrainModel(family, {"mil_nce": mil_nce.build(mil_nce.Config(), family)})


def bags(size: int = 4) -> Batch:
    """Clips with several candidate captions each."""
    batch = batch_for(TINY.inputs, TINY.vocab, size)
    several = batch_for(TINY.inputs, TINY.vocab, size * K, seed=1).text["clean"]
    return replace(batch, text={"clean": several}, answers=None, matched=None)


def test_published_size() -> None:
    with torch.device("meta"):
        family = milnce.build(milnce.Config())
    video = sum(each.numel() for part in (family.video, family.visual_proj) for each in part.parameters())
    text = sum(each.numel() for part in (family.words.linear, family.text_proj) for each in part.parameters())
    assert (video, text) == (9_649_872, 301 * 2048 + 2049 * 512)
    assert family.word_embedding.weight.shape == (66_250, 300)
    assert not family.word_embedding.weight.requires_grad


def test_towers_by_hand() -> None:
    family, batch = family_of(), bags()
    text, visual = batch.text["clean"], batch.visual["clean"]
    for row, (ids, mask) in enumerate(zip(text.ids, text.mask, strict=True)):
        vectors = torch.cat([family.word_embedding(ids[mask]), torch.zeros(TINY.text_length - int(mask.sum()), 8)])
        embed = family.text_proj(family.words.linear(vectors).relu().amax(dim=0))
        torch.testing.assert_close(family.encode_text(text).embed[row], embed)
    stream = family.encode_visual(visual)
    assert stream.hidden.shape == (4, 1, TINY.video.width)
    torch.testing.assert_close(stream.embed, family.visual_proj(family.video(visual.feats).mean(dim=(2, 3, 4))))
    assert (stream.embed.norm(dim=1) - 1).abs().max() > 1e-2  # lengths count


def test_two_ranks_are_one_large_batch() -> None:
    check_whole(model, bags(), world=2, number=1)


def test_flops() -> None:
    found = step_flops(model(), bags()).forward
    clip = s3d_flops(TINY.video, TINY.frames, TINY.image_size, TINY.image_size) + 2 * TINY.video.width * 8
    caption = 2 * 12 * 8 * 16 + 2 * 16 * 8
    assert found == 4 * clip + 4 * K * caption + 2 * 2 * 4 * 4 * K * 8


def test_mistakes() -> None:
    with pytest.raises(ConfigError, match=r"family\.mixed should hold 9 stages"):
        milnce.build(replace(TINY, mixed=TINY.mixed[:8]))
    with pytest.raises(ConfigError, match=r"family\.frames is 5 .* write even numbers"):
        milnce.build(replace(TINY, space_to_depth=True, frames=5))


@pytest.mark.parametrize("prefix", ["s3d", "s3d_s2d"])
def test_authors_weights_there_and_back(prefix: str, tmp_path: Path) -> None:
    """As their repository stores them, under `state_dict` and behind DDP's `module.`; or bare, with the other stem."""
    folder = Folder.open(reference_folder("milnce"))
    weights = folder.tensors("weights.safetensors")
    text = {name: each for name, each in weights.items() if name.startswith("text_module.")}
    theirs = {**runner.own(weights, f"{prefix}."), **text}
    file = tmp_path / ("authors.pth" if prefix == "s3d" else "authors.safetensors")
    if prefix == "s3d":
        torch.save({"state_dict": {f"module.{name}": each for name, each in theirs.items()}}, file)
    else:
        save_file(theirs, file)
    sizes = runner.family_config(folder.config, prefix == "s3d_s2d")
    untold = {size.key for size in milnce.SIZES}
    overrides = [f"family.{key}={json.dumps(each)}" for key, each in asdict(sizes).items() if key not in untold]
    convert.from_published("milnce", str(file), str(tmp_path / "ours"), None, overrides)
    tree = yaml.safe_load((tmp_path / "ours" / "config.yaml").read_text())
    assert config.family_of(tree["family"]) == ("milnce", sizes)
    convert.into_published("milnce", str(tmp_path / "ours"), str(tmp_path / "back.safetensors"))
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == {name for name in theirs if "num_batches" not in name}
    for name, tensor in back.items():
        assert torch.equal(tensor, theirs[name]), name


def test_padding_words_are_an_option() -> None:
    text = bags().text["clean"]
    alone = family_of(replace(TINY, padding_words=False))
    longer = Text(torch.nn.functional.pad(text.ids, (0, 4)), torch.nn.functional.pad(text.mask, (0, 4)))
    torch.testing.assert_close(alone.encode_text(longer).embed, alone.encode_text(text).embed)
