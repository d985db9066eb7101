"""Video-subtitle matching by hand, its rules at the edges, and in parts: micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.models import batch_for
from tests.whole_steps import check_whole
from vlscale import two_pass
from vlscale.errors import ConfigError
from vlscale.families import hero
from vlscale.families.base import Family
from vlscale.local_engine import LocalEngine
from vlscale.model import PretrainModel
from vlscale.objectives import vsm
from vlscale.optim import OptimConfig
from vlscale.types import IGNORE, Batch, Dims, Fused, Inputs, Loss, Moment, Stream, Text, Visual

VIDEOS, QUERIES, FRAMES, WIDTH = 4, 2, 7, 5
SPANS = [(0, 2), (3, 4), (6, 7), (2, 2), (1, 5), (4, 5), (0, 1), (2, 6)]  # of each query
LENGTHS = [7, 7, 5, 6]
EMPTY = 5  # a query that its video lacks


class Given(Family):
    """Frames are their features, queries the words' one embedding."""

    offers = frozenset({"text", "visual", "fuse", "regions", "queries"})

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VIDEOS * QUERIES, WIDTH)
        self.dims = Dims(WIDTH, WIDTH, WIDTH, feats=WIDTH)
        self.inputs = Inputs(0, 1, False, feats=WIDTH, frames=FRAMES)

    def encode_text(self, text: Text) -> Stream:
        """Words."""
        return Stream(self.words(text.ids), text.mask)

    def encode_visual(self, visual: Visual) -> Stream:
        """Frames."""
        return Stream(visual.feats, visual.mask)

    def fuse(self, text: Stream | None, visual: Stream | None, causal: bool = False) -> Fused:
        """They do not meet."""
        assert text is not None
        return Fused(None, None, text.hidden[:, 0]) if visual is None else Fused(None, visual.hidden, None)


def model_of(**options: Any) -> PretrainModel:
    torch.manual_seed(0)
    family = Given()
    objective = vsm.build(vsm.Config(**{"span_share": 1.0, **options}), family)
    nn.init.normal_(objective.start.weight)
    nn.init.normal_(objective.end.weight)
    return PretrainModel(family, {"vsm": objective})


def batch_of() -> Batch:
    generator = torch.Generator().manual_seed(1)
    feats = torch.randn(VIDEOS, FRAMES, WIDTH, generator=generator)
    mask = torch.arange(FRAMES) < torch.tensor(LENGTHS)[:, None]
    ids = torch.arange(VIDEOS * QUERIES)[:, None]
    asked = ids != EMPTY
    text = Text(ids, torch.ones_like(asked)), Text(ids, asked, spans=torch.tensor(SPANS))
    clips = {"clean": Visual(feats, mask)}
    return Batch({"clean": text[0], "query": text[1]}, clips, torch.tensor([3, 1, 4, 3]))  # the first and last are one


def by_hand(model: PretrainModel, batch: Batch, hard: bool) -> dict[str, float]:
    """Mean over queries, with loops."""
    objective: Any = model.objectives["vsm"]
    family: Any = model.family
    queries = family.words.weight.detach().numpy()
    frames, ids = batch.visual["clean"].feats.numpy(), batch.pair_id.tolist()

    def score(query: int, video: int) -> float:
        q = queries[query]
        real = frames[video, : LENGTHS[video]]
        return float(max(q @ f / (np.linalg.norm(q) * np.linalg.norm(f)) for f in real))

    def hinge(right: float, others: Sequence[float]) -> float:
        terms = []
        for rank, other in enumerate(sorted(others, reverse=True)):
            weight = 1.0 if not hard else 10.0 if rank < 2 else 0.1
            terms.append(weight * max(0.0, 0.1 + other - right))
        return float(np.mean(terms))

    def series(query: int, part: nn.Conv1d) -> Tensor:
        video = query // QUERIES
        line = objective.query(torch.tensor(queries[query])).detach().numpy()
        told = np.pad([float(line @ f) for f in frames[video, : LENGTHS[video]]], 2)
        kernel = part.weight.detach().numpy()[0, 0]
        return torch.tensor([float(kernel @ told[t : t + 5]) for t in range(LENGTHS[video])])

    found: dict[str, list[float]] = {"video": [], "query": [], "span": [], "accuracy": []}
    for query in (each for each in range(VIDEOS * QUERIES) if each != EMPTY):
        video = query // QUERIES
        right = score(query, video)
        others = [each for each in range(VIDEOS) if ids[each] != ids[video]]
        found["video"].append(hinge(right, [score(query, each) for each in others]))
        asked = [each for each in range(VIDEOS * QUERIES) if each // QUERIES in others and each != EMPTY]
        found["query"].append(hinge(right, [score(each, video) for each in asked]))
        found["accuracy"].append(float(all(right > score(query, each) for each in others)))
        first, past = SPANS[query]
        if past == first or first >= LENGTHS[video]:
            found["span"].append(0.0)
            continue
        last = min(max(past - 1, first + 1), LENGTHS[video] - 1)
        ends = ((objective.start, first), (objective.end, last))
        found["span"].append(-sum(float(series(query, part).log_softmax(0)[place]) for part, place in ends))
    return {name: float(np.mean(values)) for name, values in found.items()}


@pytest.mark.parametrize("hard", [False, True])
def test_the_loss_by_hand(hard: bool) -> None:
    model, batch = model_of(hard_from=5, hard_pool=2), batch_of()
    with torch.no_grad():
        loss: Loss = model(batch, Moment(6 if hard else 5)).losses["vsm"]
    expected = by_hand(model, batch, hard)
    for name, value in expected.items():
        assert float(loss.metrics[f"vsm/{name}"]) == pytest.approx(value, rel=1e-5, abs=1e-6), name
    assert expected["video"] > 0
    assert expected["query"] > 0
    total = 8 * expected["video"] + 8 * expected["query"] + 0.01 * expected["span"]
    assert float(loss.value) == pytest.approx(total, rel=1e-5)
    counted = model.counts(batch)["vsm"]
    assert int(counted) == 7
    assert loss.labels is not None
    assert loss.labels["vsm/accuracy"].tolist() == [0, 0, 1, 1, 2, 3, 3]


def test_first_and_last_frames() -> None:
    """At least two frames, but at the end of a video; none for a sentence without frames or beyond the clip."""
    objective: Any = model_of().objectives["vsm"]
    first, last = objective.ends(batch_of())
    assert first.tolist() == [0, 3, 6, IGNORE, 1, 4, 0, 2]
    assert last.tolist() == [1, 4, 6, IGNORE, 4, 4, 1, 5]


def test_the_local_part_in_some_steps_alone() -> None:
    """Drawn for all ranks and micro-batches alike; a step without it leaves its layers in place."""
    model, batch = model_of(span_share=0.2, scope="rank"), batch_of()
    drawn = []
    for step in range(1, 201):
        made = model(batch, Moment(step, seed=3)).losses["vsm"]
        parts = made.metrics
        total = 8 * parts["vsm/video"] + 8 * parts["vsm/query"]
        drawn.append(bool((made.value.detach() - total).abs() > 1e-4))
    assert 20 < sum(drawn) < 60
    without = drawn.index(False) + 1
    model(batch, Moment(without, seed=3)).losses["vsm"].value.backward()
    assert model.get_parameter("objectives.vsm.start.weight").grad is None
    for number in range(3):
        again = model(batch, Moment(without, seed=3, number=number, of=3)).losses["vsm"]
        assert again.value.grad_fn is not None
        total = 8 * again.metrics["vsm/video"] + 8 * again.metrics["vsm/query"]
        torch.testing.assert_close(again.value.detach(), total)


def test_empty_places_may_count() -> None:
    """The authors' series goes on behind a clip's end."""
    batch, counted = batch_of(), model_of(padding="counted")
    other = batch.visual["clean"].feats.clone()
    other[2, 5:] += 1.0  # behind the third video
    changed = replace(batch, visual={"clean": batch.visual["clean"]._replace(feats=other)})
    for model, same in ((model_of(), True), (counted, False)):
        one, two = (float(model(each, Moment(1)).losses["vsm"].value.detach()) for each in (batch, changed))
        assert (one == pytest.approx(two, rel=1e-6)) is same


@pytest.mark.parametrize(("options", "words"), [({"span_share": 1.5}, "span_share"), ({"hard_pool": 0}, "hard_pool")])
def test_wrong_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        model_of(**options)


def hero_like(dropout: float = 0.0) -> PretrainModel:
    torch.manual_seed(0)
    family = hero.build(replace(hero.tiny(), dropout=dropout, init_scale=8.0))
    return PretrainModel(family, {"vsm": vsm.build(vsm.Config(span_share=1.0, hard_from=0, hard_pool=3), family)})


def hero_batch(size: int = 8) -> Batch:
    return batch_for(hero.tiny().inputs, hero.tiny().vocab, size)


def test_micro_batches_share_fused_states() -> None:
    check_whole(hero_like, hero_batch(), world=1, number=4)


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2])
def test_ranks_share_fused_states(number: int) -> None:
    check_whole(hero_like, hero_batch(), world=2, number=number)


def test_the_second_pass_draws_the_same_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = hero_like(dropout=0.3), hero_batch(4)
    shared, share = [], vsm.Vsm.share

    def noting(self: vsm.Vsm, *given: Any) -> tuple[Tensor, ...]:
        shared.append(share(self, *given))
        return shared[-1]

    monkeypatch.setattr(vsm.Vsm, "share", noting)
    batches = [batch, hero_batch(4)]
    machine = LocalEngine(model, OptimConfig(clip=0.0), torch.device("cpu"), accumulation=2)
    moments = [Moment(3, 7, number, 2) for number in range(2)]
    two_pass.passes(model, machine, batches, moments, [{}, {}])
    assert len(shared) == 4
    for looked, delivered in zip(shared[:2], shared[2:], strict=True):
        for one, other in zip(looked, delivered, strict=True):
            assert torch.equal(one, other)
    assert not torch.equal(shared[0][0], shared[1][0])
