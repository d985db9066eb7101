"""A folder of clips, each with what is said in it: in files of captions for all of them, or beside it.

Beside a clip: `.srt`, `.vtt` or `.csv` (start, end, text), a `.json` (Whisper's segments, YouTube's events, lists of
start, end and text; or a sample's own json with `sentences`, `caption` or `qa`), or a `.txt` of captions, one a line.
What files of captions hold: `timed`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlscale.data.clips import Clip
from vlscale.data.formats.base import Options, files_in
from vlscale.data.formats.folder import beside
from vlscale.data.formats.timed import Timed, read_lines, read_timed
from vlscale.data.making.write import Sample, Source
from vlscale.errors import DataError

__all__ = ["Options", "source"]

KINDS = {"mp4": "mp4", "m4v": "mp4", "mov": "mp4", "webm": "webm", "mkv": "webm", "gif": "gif"}  # end -> field
TOLD = ("sentences", "sub", "caption", "qa", "question")  # of a sample's own json


@dataclass(frozen=True)
class Item:
    """One clip and what files of captions say of it; without a `path`, it is only named there."""

    path: Path | None
    record: dict[str, object] | None


def source(paths: Sequence[Path], options: Options) -> Source[Item]:
    """The clips in `paths` and the folders below them. DataError if there is none."""
    files = files_in(paths, rf".*\.({'|'.join(KINDS)})", "clip (mp4, webm or gif)")
    named = [(file.relative_to(folder).with_suffix("").as_posix(), file) for folder, file in files]
    return _Clips(told(named, options))


def told(files: Sequence[tuple[str, Path]], options: Options) -> list[tuple[str, Item]]:
    """(name, item) of the files, and of what captions name besides; of `options.split` alone where there is one."""
    if not options.captions:
        if options.split:
            raise DataError("--split is told by --captions, and there are none; give them, or leave it out")
        return [(name, Item(path, None)) for name, path in files]
    timed: Timed = read_timed(options.captions)
    wanted = timed.names(options.split)
    chosen, found = set(wanted), {name: timed.find(name) for name, _ in files}
    there = [
        (name, Item(path, timed.of(name)))
        for name, path in files
        if found[name] in chosen or (found[name] is None and not options.split)
    ]
    missing = chosen - set(found.values())
    return [*there, *((name, Item(None, None)) for name in wanted if name in missing)]


class _Clips:
    """The source of such clips. To other processes goes nothing: each item carries all."""

    def __init__(self, files: list[tuple[str, Item]]) -> None:
        self._files = files

    def __reduce__(self) -> tuple[type[_Clips], tuple[list[tuple[str, Item]]]]:
        return _Clips, ([],)

    def items(self) -> Iterator[tuple[str, Item]]:
        """(name, item) of every clip."""
        return iter(self._files)

    def sample(self, name: str, item: Item) -> Sample:
        """The sample with its clip as it is, its sides and its seconds. ValueError if it cannot be used."""
        path, record = spoken(item, "clip")
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ValueError(f"it cannot be read ({error.strerror})") from error
        with Clip(data) as clip:
            sizes = {"width": clip.width, "height": clip.height, "duration": round(clip.duration, 3)}
        return Sample({**record, **sizes}, more=((KINDS[path.suffix.lower()[1:]], data),))


def spoken(item: Item, what: str) -> tuple[Path, dict[str, object]]:
    """(its file, what is said in it). ValueError if one of them is lacking."""
    if item.path is None:
        raise ValueError(f"the captions name it, and there is no such {what}")
    record = texts_beside(item.path) if item.record is None else item.record
    if not record:
        where = (
            "no srt, vtt, csv, json or txt beside it holds a text" if item.record is None else "the captions have none"
        )
        raise ValueError(f"nothing is said in it: {where}")
    return item.path, record


def texts_beside(path: Path) -> dict[str, object]:
    """What files of the same name say. ValueError if one cannot be read."""
    for end in (".srt", ".vtt", ".csv", ".json"):
        if (file := path.with_suffix(end)).is_file():
            if end == ".json" and re.search(rb"^\s*\{", file.read_bytes()[:64]):
                record = beside(path)
                if set(TOLD) & set(record):
                    return record
            try:
                return Timed(line._replace(video=path.name) for line in read_lines(file)).of(path.name)
            except DataError as error:
                raise ValueError(str(error)) from error
    return beside(path)
