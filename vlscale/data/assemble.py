"""One sample in all its views: which text and which picture stand together, and what is hidden of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.random import Generator

from vlscale.data import tags as tag_data
from vlscale.data.clip_samples import ClipAssembler
from vlscale.data.collate import RegionSample, Sample
from vlscale.data.decode import MAX_PIXELS, Crop, Pixels
from vlscale.data.masking import Ids
from vlscale.data.phrases import Phrase, Texts
from vlscale.data.regions import PLACES, Floats, Regions
from vlscale.data.samples import BrokenSampleError, Picture, regions
from vlscale.data.shards import Shards
from vlscale.data.text import Tokenizer
from vlscale.data.views import Draw, Views
from vlscale.types import IGNORE, Inputs


class Pair(NamedTuple):
    """Which samples a pair is made of."""

    words: int  # whose words
    tags: int  # whose tags; -1 = the words of `foreign` in their place
    picture: int  # whose picture
    foreign: int  # the other sample that was drawn, or the sample itself
    matched: bool
    swapped: int  # 0 = all its own, 1 = foreign tags, 2 = foreign words


class Prepared(NamedTuple):
    """A sample whose picture, if it is to have one, is read but not decoded."""

    sample: Sample
    picture: Picture | None = None
    crops: Sequence[Crop] = ()  # of each view


class Assembler:
    """Samples of one data set for one family."""

    def __init__(
        self,
        shards: Shards,
        inputs: Inputs,
        tokenizer: Tokenizer,
        texts: Texts,
        fields: frozenset[str],
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        """`fields` of `Visual` are those that someone reads, beside features and boxes; `max_pixels` of a picture."""
        self._shards = shards
        self._inputs = inputs
        self._tokenizer = tokenizer
        self._texts = texts
        self._fields = fields
        self._max_pixels = max_pixels
        self._clips = ClipAssembler(shards, inputs, tokenizer, texts, max_pixels) if inputs.frames else None

    def __call__(self, i: int, views: Views, draw: Draw) -> Prepared:
        """Sample `i` as `views` want it; then `show` its picture.

        BrokenSampleError if it cannot be used, or the one it was paired with.
        """
        pair = self._pair(i, views, draw)
        if self._clips is not None:
            return Prepared(self._clip(i, pair, views, draw, self._clips))
        phrase = self._phrase(pair.words, "caption", views, draw)
        ids, lost, segments = phrase.ids, phrase.lost, None
        if self._inputs.tags:
            named = self._phrase(pair.foreign, "tags", views, draw) if pair.tags < 0 else self._texts.tags(pair.tags)
            ids, segments, cut = tag_data.join(ids, named.ids, self._inputs.text_length)
            lost += named.lost + sum(self._tokenizer.count_words(part) for part in cut)
        text = {
            name: view(ids, self._tokenizer, draw(f"text.{name}")) if view.changes else (ids, None)
            for name, view in views.text.items()
        }
        seen = self._regions(pair.picture, views, draw) if views.regions else None
        if views.mismatch and views.mismatch.labels == "blanked" and not pair.matched:
            text, seen = _blanked(text, seen)
        sample = Sample(
            number=i,
            key=self._shards.key(i),
            text=text,
            visual={},
            regions=seen,
            lost_words=lost,
            segments=segments,
            matched=pair.matched if views.mismatch else None,
            tags_swapped=pair.swapped if views.swap_tags else None,
            answer=(phrase.answer if pair.matched else IGNORE) if views.answers else None,
        )
        if not views.visual:
            return Prepared(sample)
        picture = Picture(self._shards, pair.picture, self._max_pixels)
        height, width, size = picture.height, picture.width, self._inputs.image_size
        shown = [view.crop(height, width, size, draw(f"visual.{name}")) for name, view in views.visual.items()]
        return Prepared(sample, picture, shown)

    def show(self, prepared: Prepared, views: Views, draw: Draw, rooms: Mapping[str, Pixels]) -> Sample:
        """The sample with its picture, decoded and changed. BrokenSampleError if that is damaged.

        `rooms`: where it is to lie, [S, S, 3] by view; where there is none it is the sample's own.
        """
        sample, picture, wanted = prepared
        if picture is None:
            return sample
        parts = picture.crops(wanted, [rooms.get(name) for name in views.visual])
        for (name, view), part in zip(views.visual.items(), parts, strict=True):
            shown = view(part, draw(f"augment.{name}")) if view.changes else part
            room = rooms.get(name)
            if room is None:
                sample.visual[name] = shown
            elif shown is not room:
                room[:] = shown
        return sample

    def _clip(self, i: int, pair: Pair, views: Views, draw: Draw, assemble: ClipAssembler) -> Sample:
        clips = assemble(pair.words, pair.picture, views, draw)
        if views.mismatch and views.mismatch.labels == "blanked" and not pair.matched:
            clips = clips.blanked()
        matched = pair.matched if views.mismatch else None
        return Sample(i, self._shards.key(i), {}, {}, clips=clips, lost_words=clips.lost_words, matched=matched)

    def _pair(self, i: int, views: Views, draw: Draw) -> Pair:
        pair = Pair(i, i, i, i, matched=True, swapped=0)
        if views.mismatch:
            rng = draw("pairs.mismatch")
            if rng.random() < views.mismatch.prob:
                other = self._other(i, rng)
                part = {"words": other, "tags": other} if views.mismatch.replace == "text" else {"picture": other}
                pair = pair._replace(foreign=other, matched=False, **part)
        if views.swap_tags:
            swap, rng = views.swap_tags, draw("pairs.swap_tags")
            chance, either = rng.random(2).tolist()
            if chance < swap.words:
                other = self._other(i, rng)
                pair = pair._replace(words=other, foreign=other, swapped=2)
            elif chance < swap.words + swap.tags:
                other = self._other(i, rng)
                sentence = swap.source == "either" and either < 0.5
                pair = pair._replace(tags=-1 if sentence else other, foreign=other, swapped=1)
        return pair

    def _other(self, i: int, rng: Generator) -> int:
        """Any sample but `i`, uniformly; `i` itself in a data set of one."""
        drawn = int(rng.integers(max(1, len(self._shards) - 1)))
        return (drawn + (drawn >= i)) % len(self._shards)

    def _phrase(self, i: int, stream: str, views: Views, draw: Draw) -> Phrase:
        """One of the sample's texts per access, drawn anew (ALBEF); questions only where the task wants them."""
        texts = [phrase for phrase in self._texts(i) if views.answers or not phrase.asked]
        if not texts:
            raise BrokenSampleError(self._shards.shard(i), self._shards.key(i), "has questions but no caption")
        return texts[int(draw(stream).integers(len(texts)))] if len(texts) > 1 else texts[0]

    def _regions(self, i: int, views: Views, draw: Draw) -> RegionSample:
        assert self._inputs.geometry, "a family that reads regions says how their places are told"
        found = self._found(i)

        def other(rng: Generator) -> Floats | None:
            """The feature of a region of another picture (LXMERT draws it from the whole data set)."""
            feats = self._found(self._other(i, rng)).feats
            return feats[rng.integers(len(feats))] if len(feats) else None

        shown = {name: view(found.feats, other, draw(f"visual.{name}")) for name, view in views.regions.items()}
        return RegionSample(found.feats, PLACES[self._inputs.geometry](found), found.fields, shown)

    def _found(self, i: int) -> Regions:
        return regions(self._shards, i, self._inputs, self._fields)


def _blanked(
    text: dict[str, tuple[Ids, Ids | None]], seen: RegionSample | None
) -> tuple[dict[str, tuple[Ids, Ids | None]], RegionSample | None]:
    """The same with nothing left to restore."""
    silent = {
        name: (ids, None if labels is None else np.full_like(labels, IGNORE)) for name, (ids, labels) in text.items()
    }
    if seen is None:
        return silent, None
    shown = {
        name: (feats, None if picked is None else np.zeros_like(picked)) for name, (feats, picked) in seen.views.items()
    }
    return silent, seen._replace(views=shown)
