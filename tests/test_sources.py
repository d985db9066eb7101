from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.shard_files import write_samples
from vlscale import config
from vlscale.data.options import DataConfig
from vlscale.data.sources import make_order, open_sources, unused_weights
from vlscale.errors import ConfigError, DataError


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, str]:
    """Two data sets of 6 and 9 samples in shards of 3."""
    for name, count in (("coco", 6), ("vg", 9)):
        write_samples(tmp_path / name, count, 3, {})
    return {name: str(tmp_path / name / "*.tar") for name in ("coco", "vg")}


def data_of(**keys: Any) -> DataConfig:
    made: DataConfig = config.build(DataConfig, keys, "data")
    return made


def test_sources_are_mixed_by_their_weights(folders: dict[str, str], tmp_path: Path) -> None:
    data = data_of(train=folders, weights={"coco": 3, "vg": 1}, batch=4)
    shards, sources = open_sources(data.train or (), (), tmp_path / "cache")
    assert len(shards) == 15
    assert [(source.name, source.starts) for source in sources] == [("coco", (0, 3, 6)), ("vg", (6, 9, 12, 15))]
    served = make_order(sources, data, 0)(range(4096))
    assert (served < 6).sum() == 3 * (served >= 6).sum()
    by_step = make_order(sources, data_of(train=folders, weights={"coco": 1, "vg": 1}, mix="step", batch=4), 0)
    assert all(len(set((step < 6).tolist())) == 1 for step in by_step(range(400)).reshape(-1, 4))


def test_named_sources_without_weights_are_one_data_set(folders: dict[str, str], tmp_path: Path) -> None:
    data = data_of(train=folders)
    shards, sources = open_sources(data.train or (), (), tmp_path / "cache")
    assert sorted(make_order(sources, data, 0)(range(15)).tolist()) == list(range(len(shards)))


def test_the_embedded_set_may_be_a_source(folders: dict[str, str], tmp_path: Path) -> None:
    drawn = [Path(path) for path in (tmp_path / "coco").glob("*.tar")]
    shards, sources = open_sources({"drawn": "embedded", "vg": folders["vg"]}, drawn, tmp_path / "cache")
    assert [source.count for source in sources] == [6, 9]
    assert len(shards) == 15


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"weights": {"coco": 1, "vgg": 1}}, r"data\.weights\.vgg is no source of data\.train; did you mean 'vg'"),
        ({"weights": {"coco": 1}}, r"no weight for 'vg'; write data\.weights\.vg=1"),
        ({"weights": {"coco": 1, "vg": 0}}, r"data\.weights\.vg should be above 0"),
        ({"mix": "step"}, r"data\.mix=step draws one source per step by data\.weights"),
    ],
)
def test_mistakes(folders: dict[str, str], tmp_path: Path, keys: dict[str, Any], says: str) -> None:
    data = data_of(train=folders, **keys)
    _, sources = open_sources(data.train or (), (), tmp_path / "cache")
    with pytest.raises(ConfigError, match=says):
        make_order(sources, data, 0)


def test_a_misspelt_embedded(tmp_path: Path) -> None:
    for given in (["embeded"], {"a": "embeded"}):
        with pytest.raises(DataError, match="no shard matches 'embeded'; did you mean 'embedded'"):
            open_sources(given, (), tmp_path)


def test_weights_without_names_are_told(folders: dict[str, str], tmp_path: Path) -> None:
    data = data_of(train=folders["coco"], weights={"coco": 2, "vg": 3}, mix="step")
    _, sources = open_sources(data.train or (), (), tmp_path / "cache")
    assert sorted(make_order(sources, data, 0)(range(6)).tolist()) == list(range(6))
    assert "data.weights (coco 2, vg 3) and data.mix are not used" in unused_weights(data)
    assert not unused_weights(data_of(train=folders, weights={"coco": 2, "vg": 3}))
    with pytest.raises(DataError, match="named twice"):
        open_sources({"a": folders["coco"], "b": folders["coco"]}, (), tmp_path / "cache")


def test_a_recipe_and_an_override_name_sources(folders: dict[str, str]) -> None:
    overrides = [f"data.train={{coco: '{folders['coco']}', vg: ['{folders['vg']}']}}", "data.weights={coco: 1, vg: 2}"]
    run = config.load("quickstart", overrides)
    assert run.data.train == {"coco": folders["coco"], "vg": (folders["vg"],)}
    assert config.from_tree("quickstart", {k: v for k, v in config.dump(run).items() if k != "recipe"}) == run
