"""MIL-NCE: by hand, over ranks and micro-batches, and the authors' gradient."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.distributed.spawn import run_ranks
from tests.reference.__main__ import main
from tests.reference.compare import Absent, Folder, judge
from tests.reference_folders import copied
from tests.shard_files import reference_folder
from tests.tables import Gradients, Tables, mean, rows, step, tables
from tests.whole_steps import check_whole
from vlscale.errors import DataError
from vlscale.model import PretrainModel
from vlscale.objectives import mil_nce
from vlscale.objectives.base import Objective
from vlscale.types import Batch, Loss, Moment

K = 3  # candidates


def objectives(family: Tables) -> dict[str, Objective]:
    return {"mil_nce": mil_nce.build(mil_nce.Config(), family)}


def of_authors(family: Tables) -> dict[str, Objective]:
    return {"mil_nce": mil_nce.build(mil_nce.Config(gradient="authors"), family)}


def loss_of(family: Tables, size: int, candidates: int) -> Loss:
    with torch.no_grad():
        found: dict[str, Loss] = PretrainModel(family, objectives(family))(rows(0, size, candidates), Moment(1)).losses
    return found["mil_nce"]


def wanted(family: Tables) -> tuple[Tensor, Gradients]:
    """Loss and gradients of the whole batch, equation 1 with the positives in both halves of the denominator."""
    scores = (family.image @ family.text.T).view(len(family.image), len(family.image), -1)  # s_ijk
    both = torch.cat([scores, scores.transpose(0, 1)], dim=1).flatten(1)
    own = scores[torch.arange(len(scores)), torch.arange(len(scores))]
    loss = -(own.exp().sum(1) / both.exp().sum(1)).log().mean()
    image, text = torch.autograd.grad(loss, [family.image, family.text])
    return loss.detach(), {"family.image": image, "family.text": text}


def check(found: tuple[Tensor, Gradients], family: Tables, factor: float = 1.0) -> None:
    loss, gradients = wanted(family)
    torch.testing.assert_close(found[0], loss, rtol=1e-6, atol=1e-6)
    assert found[1].keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 1e-2, f"{name} tests nothing"
        torch.testing.assert_close(found[1][name], gradient * factor, rtol=1e-5, atol=1e-6, msg=name)


def test_by_hand() -> None:
    family = Tables(torch.tensor([[1.0], [2.0]]), torch.tensor([[0.5], [1.0], [-1.0], [3.0]]))
    e = math.exp
    first = e(0.5) + e(1) + e(-1) + e(3) + e(0.5) + e(1) + e(1) + e(2)  # clip 1's captions, then its own to clip 2
    second = e(1) + e(2) + e(-2) + e(6) + e(-1) + e(3) + e(-2) + e(6)
    want = (math.log(first / (e(0.5) + e(1))) + math.log(second / (e(-2) + e(6)))) / 2
    found = loss_of(family, 2, candidates=2)
    assert float(found.value) == pytest.approx(want, rel=1e-6)
    assert float(found.metrics["mil_nce/accuracy"]) == 0.5  # clip 1 likes a caption of clip 2 best


def test_perfect_clips_cost_log_2() -> None:
    family = Tables(50 * torch.eye(4), torch.eye(4).repeat_interleave(K, 0))
    assert float(loss_of(family, 4, K).value) == pytest.approx(math.log(2), abs=1e-5)


def test_large_scores_stay_finite() -> None:
    family = tables(4, candidates=K)
    with torch.no_grad():
        family.image *= 1000
    assert torch.isfinite(loss_of(family, 4, K).value)


def test_candidates_of_a_clip_are_neighbours_in_any_order() -> None:
    family, turned = tables(4, candidates=K), tables(4, candidates=K)
    with torch.no_grad():
        turned.text.copy_(family.text.view(4, K, -1).flip(1).flatten(0, 1))
    torch.testing.assert_close(loss_of(family, 4, K).value, loss_of(turned, 4, K).value)
    with torch.no_grad():
        turned.text.copy_(family.text.view(4, K, -1).transpose(0, 1).flatten(0, 1))  # candidate-major
    assert abs(float(loss_of(family, 4, K).value - loss_of(turned, 4, K).value)) > 1e-2


def clips_of(videos: int, clips: int, candidates: int = 1) -> Batch:
    """`rows` whose clips are several of one video."""
    return replace(rows(0, videos * clips, candidates), pair_id=torch.arange(videos))


def univl(family: Tables) -> dict[str, Objective]:
    return {"mil_nce": mil_nce.build(mil_nce.Config(anchors="middle", positives="once"), family)}


def test_univls_form_by_hand() -> None:
    """Of each video the middle clip: the texts of all its clips against all texts, and its own text against the clips
    of other videos."""
    family = Tables(torch.tensor([[1.0], [2.0], [-1.0], [0.5]]), torch.tensor([[0.5], [1.0], [-1.0], [3.0]]))
    e = math.exp
    first = e(1) + e(2) + e(-2) + e(6) + e(-1) + e(0.5)  # clip 1 beside all texts, then text 1 beside clips 2 and 3
    second = e(0.25) + e(0.5) + e(-0.5) + e(1.5) + e(3) + e(6)  # clip 3; text 3 beside clips 0 and 1
    want = (math.log(first / (e(1) + e(2))) + math.log(second / (e(-0.5) + e(1.5)))) / 2
    model = PretrainModel(family, univl(family))
    found = model(clips_of(2, 2), Moment(1)).losses["mil_nce"]
    assert float(found.value.detach()) == pytest.approx(want, rel=1e-6)
    assert float(found.metrics["mil_nce/accuracy"]) == 0.5  # clip 1 likes text 3 best


def test_positives_counted_once_cost_nothing_at_best() -> None:
    family = Tables(50 * torch.eye(4), torch.eye(4).repeat_interleave(K, 0))
    once = mil_nce.build(mil_nce.Config(positives="once"), family)
    found = PretrainModel(family, {"mil_nce": once})(rows(0, 4, K), Moment(1)).losses["mil_nce"]
    assert float(found.value.detach()) == pytest.approx(0.0, abs=1e-5)


def test_univls_form_over_micro_batches() -> None:
    def make() -> PretrainModel:
        family = tables(8, candidates=1)
        return PretrainModel(family, univl(family))

    check_whole(make, clips_of(4, 2), world=1, number=2)


def test_every_clip_of_a_video_is_compared() -> None:
    family = tables(6, candidates=K)
    found = PretrainModel(family, objectives(family))(clips_of(3, 2, K), Moment(1)).losses["mil_nce"]
    torch.testing.assert_close(found.value.detach(), wanted(family)[0])


def test_uneven_candidates_are_refused() -> None:
    batch = rows(0, 3, 1)
    batch.text["clean"] = rows(0, 4, 1).text["clean"]
    family = tables(4)
    with pytest.raises(DataError, match="4 captions"):
        PretrainModel(family, objectives(family))(batch, Moment(1))


def test_one_process() -> None:
    check(step(objectives, tables(4, candidates=K), 4, 1, K), tables(4, candidates=K))
    check(step(of_authors, tables(4, candidates=K), 4, 1, K), tables(4, candidates=K))


def on_rank(build: Any, size: int, of: int, total: int) -> tuple[Tensor, Gradients]:
    return step(build, tables(total, candidates=K), size, of, K)


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_are_one_large_batch(world: int) -> None:
    found: list[tuple[Tensor, Gradients]] = run_ranks(on_rank, world, objectives, 2, 1, 2 * world)
    check(mean(found), tables(2 * world, candidates=K))


def test_authors_gradient_is_a_share_of_it() -> None:
    found: list[tuple[Tensor, Gradients]] = run_ranks(on_rank, 2, of_authors, 2, 1, 4)
    check(mean(found), tables(4, candidates=K), factor=0.5)


def of_rank(family: Tables) -> dict[str, Objective]:
    return {"mil_nce": mil_nce.build(mil_nce.Config(scope="rank"), family)}


def test_scope_rank_sees_its_own_clips_alone() -> None:
    found: list[tuple[Tensor, Gradients]] = run_ranks(on_rank, 2, of_rank, 2, 1, 4)
    whole = tables(4, candidates=K)
    for rank, (loss, _) in enumerate(found):
        clips, captions = slice(2 * rank, 2 * rank + 2), slice(2 * K * rank, 2 * K * (rank + 1))
        alone = Tables(whole.image.detach()[clips], whole.text.detach()[captions])
        torch.testing.assert_close(loss, wanted(alone)[0])


@pytest.mark.parametrize("of", [2, 4])
def test_several_micro_batches_are_one_large_batch(of: int) -> None:
    check(step(objectives, tables(8, candidates=K), 8 // of, of, K), tables(8, candidates=K))


def test_several_micro_batches_on_two_ranks_are_one_large_batch() -> None:
    found: list[tuple[Tensor, Gradients]] = run_ranks(on_rank, 2, objectives, 2, 2, 8)
    check(mean(found), tables(8, candidates=K))


def test_products_count_every_caption() -> None:
    objective = objectives(tables(4, candidates=K))["mil_nce"]
    assert objective.head_flops(rows(0, 4, K)) == (2 * 2 * 4 * 4 * K * 6, 0)


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    """A writable copy of the authors' tensors."""
    return copied(reference_folder("milnce"), tmp_path)


def test_agrees_with_the_authors_and_says_what_is_absent(reference: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored = load_file(reference / "outputs.safetensors")
    report = reference.parent / "report.json"
    assert main([str(reference), "--json", str(report)]) == 0
    found = json.loads(report.read_text())
    own = {name for name in stored if not name.endswith("num_batches_tracked")}
    assert {row["name"] for row in found["compared"]} == own
    absent = [left["name"] for left in found["not_compared"] if "counts batches" in left["why"]]
    assert sorted(absent) == sorted(set(stored) - own)
    assert (
        f"{len(own)} compared, 0 outside tolerance, {len(found['not_compared'])} not compared"
        in capsys.readouterr().out
    )


def test_a_changed_and_an_unnamed_tensor_fail(reference: Path) -> None:
    file = reference / "outputs.safetensors"
    stored = load_file(file)
    save_file({**stored, "ranks/rank1/model_loss": stored["ranks/rank1/model_loss"] * 1.01}, file)
    assert main([str(reference)]) == 1
    save_file({**stored, "ranks/new": torch.ones(1)}, file)
    assert main([str(reference)]) == 1


def test_absent_covers_the_names_of_its_pattern_alone(tmp_path: Path) -> None:
    save_file({"a/x": torch.ones(1), "b": torch.ones(1)}, tmp_path / "outputs.safetensors")
    folder, absent = Folder(tmp_path, {}), Absent("not built")
    good = judge(folder, "s", {"outputs.safetensors": {"a/*": absent, "b": torch.ones(1)}})
    assert good.ok
    assert good.not_compared == [{"name": "a/x", "why": "not built"}]
    assert not judge(folder, "s", {"outputs.safetensors": {"a/*": absent}}).ok  # b is missing
    assert not judge(folder, "s", {"outputs.safetensors": {"*": absent}}).ok  # nothing compared is no success
    wrong = judge(folder, "s", {"outputs.safetensors": {"a/*": absent, "a/x": torch.zeros(1), "b": torch.ones(1)}})
    assert not wrong.ok  # what has a value is compared
