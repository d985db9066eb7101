from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from tests.distributed.spawn import run_ranks
from vlscale import distributed
from vlscale.data.retrieval import RetrievalBatch
from vlscale.errors import ConfigError, DataError
from vlscale.evaluation.retrieval import Features, evaluate, ranks
from vlscale.types import Stream, Text, Visual

CPU = torch.device("cpu")


class Looker(nn.Module):
    """Embeds the mean colour of a picture, and of a caption the three numbers that it consists of."""

    offers = frozenset({"text", "visual", "embed", "temperature"})

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.calls = 0

    def encode_visual(self, visual: Visual) -> Stream:
        self.calls += 1
        embed = self.drop(visual.feats.float().mean(dim=(2, 3)))
        return Stream(embed[:, None], None, embed)

    def encode_text(self, text: Text) -> Stream:
        embed = self.drop(text.ids.float())
        return Stream(embed[:, None], text.mask, embed)


def features(visual: list[list[float]], text: list[list[float]], owner: list[int]) -> Features:
    return Features(torch.tensor(visual), torch.tensor(text), torch.arange(len(visual)), torch.tensor(owner))


def batches(numbers: list[int], size: int) -> Iterator[RetrievalBatch]:
    """Pictures whose first caption is exact and whose second is vague, two per picture."""
    for start in range(0, len(numbers), size):
        some = torch.tensor(numbers[start : start + size])
        colours = torch.stack([some * 37 % 101, some * 61 % 103, some * 17 % 97], dim=1) + 1
        pixels = colours[:, :, None, None].expand(-1, -1, 2, 2).to(torch.uint8)
        noise = torch.stack([some * 13 % 29, some * 7 % 31, some * 5 % 23], dim=1)
        captions = torch.stack([colours + noise // 4, colours + noise], dim=1).flatten(0, 1)
        text = Text(captions, torch.ones_like(captions, dtype=torch.bool))
        yield RetrievalBatch(Visual(pixels), text, some.repeat_interleave(2), some)


def on_ranks(uneven: bool) -> tuple[dict[str, float], int, int]:
    numbers = list(range(40))
    rank, world = distributed.rank(), distributed.world_size()
    mine = (numbers if rank == 0 else []) if uneven else numbers[rank::world]
    family = Looker()
    found = evaluate(family, batches(mine, 7), CPU)
    return found.metrics, family.calls, len(found.examples)


def test_places_by_hand() -> None:
    image_to_text, text_to_image = ranks(
        features([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]], [[1.0, 0.0], [0.6, 0.8], [0.8, 0.6]], [0, 1, 2])
    )
    # scores, pictures in rows: [1, .6, .8], [0, .8, .6], [.6, 1, .96]
    assert image_to_text.tolist() == [1, 1, 2]
    assert text_to_image.tolist() == [1, 2, 1]


def test_the_best_of_several_captions_counts_and_a_silent_picture_is_a_candidate() -> None:
    image_to_text, text_to_image = ranks(
        features([[1.0, 0.0], [0.0, 1.0], [0.9, 0.1]], [[0.0, 1.0], [1.0, 0.0], [0.5, 0.9]], [0, 0, 1])
    )
    assert image_to_text.tolist() == [1, 2]  # picture 2 has no caption
    assert text_to_image.tolist() == [3, 1, 1]


@pytest.mark.parametrize("value", [1.0, float("nan")])
def test_ties_and_nan_count_against_us(value: float) -> None:
    same = [[value, 0.0]] * 4
    image_to_text, text_to_image = ranks(features(same, same, [0, 1, 2, 3]))
    assert image_to_text.tolist() == text_to_image.tolist() == [4, 4, 4, 4]


def test_order_of_pictures_does_not_matter() -> None:
    torch.manual_seed(0)
    visual, text = torch.randn(30, 8), torch.randn(60, 8)
    owner = torch.arange(30).repeat_interleave(2)
    straight = ranks(Features(visual, text, torch.arange(30), owner))
    order = torch.randperm(30)
    mixed = ranks(Features(visual[order], text, torch.arange(30)[order], owner))
    assert all(torch.equal(*pair) for pair in zip(straight, mixed, strict=True))


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    many = Features(torch.randn(20, 8), torch.randn(50, 8), torch.arange(20) * 3, torch.randint(20, (50,)) * 3)
    whole = ranks(many)
    monkeypatch.setattr("vlscale.evaluation.retrieval.CHUNK", 7)
    assert all(torch.equal(*pair) for pair in zip(whole, ranks(many), strict=True))


def test_figures_and_examples_of_one_process() -> None:
    family = Looker()
    family.train()
    family.drop.eval()
    found = evaluate(family, batches(list(range(40)), 7), CPU, decode=str)
    names = {name.removeprefix("eval/retrieval/") for name in found.metrics}
    recalls = {f"{way}_r{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)}
    assert names == recalls | {"i2t_median_rank", "t2i_median_rank", "candidates", "chance_r1"}
    assert found.metrics["eval/retrieval/candidates"] == 40
    assert found.metrics["eval/retrieval/chance_r1"] == 1 / 40
    assert found.metrics["eval/retrieval/i2t_r10"] > 0.8 > found.metrics["eval/retrieval/t2i_r1"] > 0.3
    assert found.examples[1].picture.tolist() == [[[38] * 2] * 2, [[62] * 2] * 2, [[18] * 2] * 2]
    assert found.examples[1].caption == "[41, 63, 19]"
    assert family.training
    assert not family.drop.training  # every module as it was


def test_two_ranks_find_what_one_finds() -> None:
    [(alone, _, _)] = run_ranks(on_ranks, 1, False)
    (first, calls, examples), (second, same_calls, no_examples) = run_ranks(on_ranks, 2, False)
    assert first == second == alone
    assert calls == same_calls
    assert examples > no_examples == 0


def test_a_rank_without_pictures_keeps_step() -> None:
    [(alone, _, _)] = run_ranks(on_ranks, 1, True)
    (first, calls, _), (second, same_calls, _) = run_ranks(on_ranks, 2, True)
    assert first == second == alone
    assert calls == same_calls == 6


def test_what_cannot_be_evaluated_is_said() -> None:
    with pytest.raises(DataError, match=r"data\.val"):
        evaluate(Looker(), iter([]), CPU)
    family = Looker()
    family.offers = frozenset({"text", "visual"})
    with pytest.raises(ConfigError, match="'Looker' does not offer"):
        evaluate(family, iter([]), CPU)
