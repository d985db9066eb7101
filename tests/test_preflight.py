from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.shard_files import INPUTS, make_tokenizer, sample, shared, write_samples, write_tar, write_vocabulary
from vlscale import preflight
from vlscale.data.bad import Budget
from vlscale.data.phrases import every_text
from vlscale.data.shards import Shards
from vlscale.data.text import Tokenizer, build_vocabulary
from vlscale.errors import ConfigError, DataError
from vlscale.types import Inputs


def run(folder: Path, shards: Shards, tokenizer: Tokenizer | None = None, **other: Any) -> preflight.Report:
    options: dict[str, Any] = {
        "batch": 4,
        "max_words": 30,
        "out": folder / "runs",
        "disk": 300,
    }
    return preflight.check(shards, tokenizer or make_tokenizer(folder), INPUTS, **{**options, **other})


def make_shards(folder: Path, special: dict[int, list[tuple[str, bytes]]]) -> Shards:
    return Shards(write_samples(folder / "shards", 12, 5, special), folder / "cache")


def test_a_sound_start(tmp_path: Path) -> None:
    report = run(tmp_path, make_shards(tmp_path, {}))
    assert (report.samples, report.shards) == (12, 3)
    assert 0 < report.seconds < 10


@pytest.mark.parametrize(
    ("special", "says"),
    [
        ({7: sample(7, "")}, r"sample 's007' of shard .*part-001.tar: a caption in 'json' is empty"),
        ({7: sample(7, "?!")}, r"sample 's007' .* the caption '\?!' is nothing but punctuation"),
        ({7: sample(7)[:1]}, "sample 's007' .*has no caption"),
        ({7: sample(7)[1:]}, "sample 's007' .*has no picture .* but json"),
        ({i: sample(i, picture=b"x") for i in range(5, 10)}, "none of the first 5 samples .*part-001.tar"),
    ],
)
def test_unusable_samples_are_named(tmp_path: Path, special: Any, says: str) -> None:
    with pytest.raises(DataError, match=says):
        run(tmp_path, make_shards(tmp_path, special))


def test_a_share_of_broken_samples_is_left_to_the_loader(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, {7: sample(7, "?!"), 8: sample(8)[1:]})
    assert run(tmp_path, shards, budget=Budget(0.1, 0)).samples == 12
    more = make_shards(tmp_path, {7: sample(7, "?!"), 9: sample(9, ""), 11: sample(11, "")})
    says = (
        r"3 of the 12 samples looked at cannot be used, more than data\.bad_budget=0\.1 allows; the first: sample "
        r"'s007' .* nothing but punctuation; .* write data\.bad_budget=0\.25$"
    )
    with pytest.raises(DataError, match=says):
        run(tmp_path, more, budget=Budget(0.1, 0))
    assert run(tmp_path, more, budget=Budget(0.25, 0)).samples == 12
    with pytest.raises(DataError, match=r"3 of the 12 .*, more than data\.bad_always=2 allows"):
        run(tmp_path, more, budget=Budget(0.1, 2))
    assert run(tmp_path, more, budget=Budget(0.0, 3)).samples == 12


@pytest.mark.parametrize("broken", [lambda i: sample(i, ""), lambda i: sample(i)[:1], lambda i: sample(i)[1:]])
def test_where_all_that_come_first_are_broken_no_budget_helps(tmp_path: Path, broken: Any) -> None:
    for numbers in (range(5), range(5, 10), range(12)):
        with pytest.raises(DataError, match=r"none of the first 5 samples of a shard can be used; the last: sample"):
            run(tmp_path, make_shards(tmp_path, {i: broken(i) for i in numbers}), budget=Budget(1.0, 100))


def test_one_broken_picture_is_left_to_the_loader(tmp_path: Path) -> None:
    assert run(tmp_path, make_shards(tmp_path, {5: sample(5, picture=b"x")})).samples == 12


def test_too_few_samples(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds 12 samples but a step takes 13; .* write data.batch=12 or less"):
        run(tmp_path, make_shards(tmp_path, {}), batch=13)


def test_an_empty_shard(tmp_path: Path) -> None:
    empty = write_tar(tmp_path / "empty.tar", [])
    with pytest.raises(DataError, match=r"shard .*empty.tar holds no samples"):
        run(tmp_path, Shards(empty, tmp_path / "cache"))


def test_an_empty_member_is_named_without_reading(tmp_path: Path) -> None:
    special = {7: sample(7, picture=b""), 9: [*sample(9)[:1], ("s009.txt", b"")]}
    shards = make_shards(tmp_path, special)
    with pytest.raises(DataError, match=r"'png' of sample 's007' of shard .*part-001.tar is empty, and 1 more member"):
        run(tmp_path, shards)
    beside = {7: [*sample(7), ("s007.txt", b""), ("s007.cls", b"")]}  # of these nothing is asked
    assert run(tmp_path, make_shards(tmp_path, beside)).samples == 12
    texts = Inputs(image_size=0, text_length=12, separator=False)
    preflight.check_members(make_shards(tmp_path, {7: sample(7, picture=b"")}), texts)


def test_a_foreign_vocabulary(tmp_path: Path) -> None:
    special = {i: sample(i, "ein kleiner roter Kreis") for i in range(12)}
    with pytest.raises(ConfigError, match=r"does not know 100% of the captions' words"):
        run(tmp_path, make_shards(tmp_path, special))


def test_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"runs has [\d.]+ GiB free but the checkpoints need 1024.0 GiB"):
        run(tmp_path, make_shards(tmp_path, {}), disk=2**40)


def test_of_a_large_data_set_some_texts_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "ALL_TEXTS", 10)
    monkeypatch.setattr(preflight, "SOME_TEXTS", 3)
    looked_at = preflight._looked_at(make_shards(tmp_path, {}), seed=0)
    assert {0, 5, 10} <= set(looked_at)
    assert 3 <= len(looked_at) <= 6


def test_real_shards(tmp_path: Path) -> None:
    names = ("openstax_figures", "noto_emoji")
    shards = Shards([str(shared() / "open" / name / f"{name}-val-*.tar") for name in names], tmp_path / "cache")
    write_vocabulary(build_vocabulary(every_text(shards, range(len(shards)), 0), 3000), tmp_path / "vocab.txt")
    tokenizer = Tokenizer(tmp_path, Inputs(image_size=64, text_length=25, separator=False))
    assert run(tmp_path, shards, tokenizer).samples == 356
