"""The clips of one sample in all views: its sentences as rows of text, its frames as rows beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from vlscale.data.clip_files import Floats, Footage
from vlscale.data.clip_windows import Clips, Timed, Window, overlapping, windows
from vlscale.data.frames import Frames, FrameView
from vlscale.data.masking import Ids
from vlscale.data.phrases import Texts
from vlscale.data.shards import Shards
from vlscale.data.text import Tokenizer
from vlscale.data.views import Draw, Queries, TextView, Views
from vlscale.types import IGNORE, Inputs

Spans = NDArray[np.int64]  # [rows, 2] frames of a clip: first, one past the last
WHOLE = Window(0.0, np.inf, ())


class TextRows(NamedTuple):
    """The texts of one sample in one view."""

    ids: list[Ids]  # [L] each
    labels: list[Ids | None]  # [L] each
    spans: Spans | None = None


class ClipSample(NamedTuple):
    """The clips of one sample."""

    text: dict[str, TextRows]  # by view
    visual: dict[str, list[Frames]]  # by view, a row per clip
    lost_words: int  # of all texts of the sample, for which there was no room

    def blanked(self) -> ClipSample:
        """The same with nothing left to restore."""

        def silent(labels: NDArray[np.int64] | None) -> NDArray[np.int64] | None:
            return None if labels is None else np.full_like(labels, IGNORE)

        text = {name: rows._replace(labels=list(map(silent, rows.labels))) for name, rows in self.text.items()}
        visual = {
            name: [
                row._replace(
                    picked=None if row.picked is None else np.zeros_like(row.picked),
                    code_labels=silent(row.code_labels),
                )
                for row in rows
            ]
            for name, rows in self.visual.items()
        }
        return self._replace(text=text, visual=visual)


class ClipAssembler:
    """Clips of one data set for one family."""

    def __init__(self, shards: Shards, inputs: Inputs, tokenizer: Tokenizer, texts: Texts, max_pixels: int) -> None:
        self._shards = shards
        self._inputs = inputs
        self._tokenizer = tokenizer
        self._texts = texts
        self._max_pixels = max_pixels

    def __call__(self, words: int, picture: int, views: Views, draw: Draw) -> ClipSample:
        """The clips of sample `picture` with the sentences of sample `words`, as `views` want them.

        BrokenSampleError if one of them cannot be used.
        """
        assert views.clips is not None, "families that read clips have views of clips"
        said = self._texts.timed(words, needed=bool(views.text))
        if self._inputs.sentences:
            return self._whole(said, words, picture, views, draw)
        cut = windows(said, views.clips, draw("clips"))
        texts = [" ".join(said[j].text for j in text) for window in cut for text in window.texts]
        rows, lost = self._text(texts, None, views.text, views.clips, draw)
        visual: dict[str, list[Frames]] = {}
        if views.frames:
            if picture != words:
                cut = windows(self._texts.timed(picture, needed=False), views.clips, draw("clips"))
            visual = self._shown(picture, cut, views.clips, views.frames, draw)
        return ClipSample(rows, visual, lost)

    def _whole(self, said: Sequence[Timed], words: int, picture: int, views: Views, draw: Draw) -> ClipSample:
        """All sentences of a video beside all its frames."""
        assert views.clips is not None
        footage = Footage(self._shards, picture, self._inputs, self._max_pixels)
        begin = draw("clips.start")
        for each in said if words == picture else ():
            footage.stretch(Window(each.start, each.end, ()), views.clips, begin)
        frames, times = footage.rows(WHOLE, views.clips, self._inputs.frames, begin)
        said = said[: self._inputs.sentences]
        texts, spans = [each.text for each in said], _spans(said, times)
        query = views.text.get("query")
        asked = _asked(spans, query.queries if query else None, draw("clips.queries"))
        rest = ["" if j in asked else text for j, text in enumerate(texts)]  # its frames stay, as the authors' do
        rows: dict[str, TextRows] = {}
        lost = 0
        for chosen, where, names in (
            (rest, spans, set(views.text) - {"query"}),
            ([texts[j] for j in asked], spans[asked], {"query"}),
        ):
            read = {name: view for name, view in views.text.items() if name in names}
            found, missing = self._text(chosen, where, read, views.clips, draw)
            rows, lost = {**rows, **found}, lost + (missing if found else 0)
        return ClipSample(rows, _changed([frames], views.frames, draw), lost)

    def _text(
        self, texts: Sequence[str], spans: Spans | None, views: Mapping[str, TextView], options: Clips, draw: Draw
    ) -> tuple[dict[str, TextRows], int]:
        """(the rows of every view, how many words of the texts are lost)."""
        fitted = [self._texts.fit(text) for text in texts]
        empty = options.no_text > 0 and draw("clips.no_text").random() < options.no_text
        nothing = self._tokenizer.encode("")
        rows = {}
        for name, view in views.items():
            rng = draw(f"text.{name}")
            shown = [nothing if empty and name != "target" else each.ids for each in fitted]
            made = [view(ids, self._tokenizer, rng) for ids in shown]
            rows[name] = TextRows([ids for ids, _ in made], [labels for _, labels in made], spans)
        return rows, sum(each.lost for each in fitted)

    def _shown(
        self, i: int, cut: Sequence[Window], options: Clips, views: Mapping[str, FrameView], draw: Draw
    ) -> dict[str, list[Frames]]:
        """The frames of every window in every view."""
        footage = Footage(self._shards, i, self._inputs, self._max_pixels)
        begin = draw("clips.start")
        shown = [footage.stretch(window, options, begin) for window in cut]
        most = [self._most(window, options) for window in cut]
        if not self._inputs.image_size:
            taken = [footage.rows(window, options, few, begin)[0] for window, few in zip(shown, most, strict=True)]
            return _changed(taken, views, draw)
        times = [footage.times(window, options, few) for window, few in zip(shown, most, strict=True)]
        return {name: self._pixels(footage, times, name, view, draw) for name, view in views.items()}

    def _pixels(
        self, footage: Footage, times: Sequence[Sequence[float]], name: str, view: FrameView, draw: Draw
    ) -> list[Frames]:
        size, crop, change = self._inputs.image_size, draw(f"visual.{name}"), draw(f"augment.{name}")
        parts = [footage.pixels(each, view.crop(*footage.sides, size, crop)) for each in times]
        return [view(part, change) for part in parts]

    def _most(self, window: Window, options: Clips) -> int:
        """How many frames are read of it."""
        untimed = options.untimed_frames > 0 and not np.isfinite(window.end)
        return min(self._inputs.frames, options.untimed_frames) if untimed else self._inputs.frames


def _changed(rows: Sequence[Frames], views: Mapping[str, FrameView], draw: Draw) -> dict[str, list[Frames]]:
    generators = {name: draw(f"visual.{name}") for name in views}
    return {name: [view(row, generators[name]) for row in rows] for name, view in views.items()}


def _spans(said: Sequence[Timed], times: Floats) -> Spans:
    """[sentences, 2] the frames, of those that begin at `times`, in which each sentence is said."""
    found = [overlapping(times, each.start, each.end) for each in said]
    return np.array([[each.start, each.stop] for each in found], dtype=np.int64).reshape(-1, 2)


def _asked(spans: Spans, queries: Queries | None, rng: Generator) -> list[int]:
    """Which sentences are asked for, of those that have frames, the last one repeated where they are too few (HERO:
    data/vsm.py)."""
    framed = np.flatnonzero(spans[:, 1] > spans[:, 0])
    if queries is None or not len(framed):
        return []
    chosen = sorted(rng.permutation(framed)[: queries.number].tolist())
    return chosen + chosen[-1:] * (queries.number - len(chosen))
