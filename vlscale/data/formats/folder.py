"""A folder of pictures, with a txt or json beside each or one file of captions for all."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlscale.data.decode import picture_size
from vlscale.data.formats.base import PICTURES, Options, files_in, texts_of
from vlscale.data.formats.captions import Texts, read_texts
from vlscale.data.making.write import Sample, Source

__all__ = ["Options", "source"]


def source(paths: Sequence[Path], options: Options) -> Source[Path | None]:
    """The pictures in `paths` and the folders below them. DataError if there is none."""
    files: list[tuple[str, Path | None]] = [
        (str(file.relative_to(folder).with_suffix("")), file)
        for folder, file in files_in(paths, r".*\.(jpe?g|png|webp)", "picture (jpg, png or webp)")
    ]
    if not options.captions:
        return _Folder(files, None)
    texts = read_texts(options.captions)
    found = {texts.find(name) for name, _ in files}
    return _Folder([*files, *((name, None) for name in texts.names() if name not in found)], texts)


@dataclass(frozen=True)
class _Folder:
    files: list[tuple[str, Path | None]]  # None: a text without a picture
    texts: Texts | None

    def items(self) -> Iterator[tuple[str, Path | None]]:
        return iter(self.files)

    def sample(self, name: str, item: Path | None) -> Sample:
        if item is None:
            raise ValueError("the captions name it, and there is no such picture")
        record = texts_of(self.texts, name) if self.texts else beside(item)
        if not {"caption", "qa", "question"} & set(record):
            raise ValueError("it has no text in a txt or json beside it, and no --captions are given")
        field, data = picture(item)
        width, height = picture_size(data)
        return Sample({**record, "width": width, "height": height}, (field, data))


def picture(path: Path) -> tuple[str, bytes]:
    """(field, bytes as they are) of a picture. ValueError if it cannot be read."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"it cannot be read ({error.strerror})") from error
    return path.suffix.lower()[1:], data


def picture_beside(path: Path) -> Path | None:
    """The picture of the same name, or None."""
    return next((near for end in PICTURES if (near := path.with_suffix(end)).is_file()), None)


def beside(path: Path) -> dict[str, object]:
    """What a json and a txt of the same name hold; each line of the txt is a caption. ValueError if broken."""
    record: dict[str, object] = {}
    try:
        if (file := path.with_suffix(".json")).is_file():
            found = json.loads(file.read_bytes())
            if not isinstance(found, dict):
                raise ValueError(f"{file.name} holds a {type(found).__name__}; it should be an object")
            record = found
        if (file := path.with_suffix(".txt")).is_file() and record.get("caption") is None:
            lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
            if lines:
                record["caption"] = lines if len(lines) > 1 else lines[0]
    except (UnicodeDecodeError, json.JSONDecodeError, OSError) as error:
        raise ValueError(f"{file.name} cannot be read ({error})") from error
    return record
