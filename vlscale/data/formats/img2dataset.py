"""What img2dataset wrote with output_format=files: folders of 000000012.jpg with a json and a txt beside each.

Its tars (output_format=webdataset) are shards already. Of its json the url, the sums and the sizes are kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlscale.data.formats.base import PICTURES, Options, files_in
from vlscale.data.formats.folder import beside
from vlscale.data.formats.listed import listed_sample, text
from vlscale.data.making.write import Sample, Source
from vlscale.errors import DataError

__all__ = ["Options", "source"]

LEFT_OUT = ("status", "error_message", "exif", "width", "height", "key")  # what is of the download, or told anew
ELSEWHERE = (  # the end of a file, what to do with such
    (".tar", "holds shards already: train on them as they are (data.train='{}/*.tar')"),
    (".parquet", "holds parquet files; write output_format=webdataset to img2dataset, whose tars are shards"),
    (".tfrecord", "holds tfrecord files; write output_format=webdataset to img2dataset, whose tars are shards"),
)


def source(paths: Sequence[Path], options: Options) -> Source[Path]:
    """The pictures in `paths` and the folders below them. DataError if there is none."""
    pattern = rf".*({'|'.join(PICTURES)})"
    try:
        files = [
            (str(file.relative_to(folder).with_suffix("")), file)
            for folder, file in files_in(paths, pattern, "picture of img2dataset")
        ]
    except DataError as error:
        for end, what in ELSEWHERE:
            for path in paths:
                folder = path if path.is_dir() else path.parent
                if path.suffix == end or next(folder.glob(f"*{end}"), None):
                    raise DataError(f"{path} {what.format(folder)}") from error
        raise
    return _Files(files)


@dataclass(frozen=True)
class _Files:
    files: list[tuple[str, Path]]

    def items(self) -> Iterator[tuple[str, Path]]:
        return iter(self.files)

    def sample(self, name: str, item: Path) -> Sample:
        kept = {key: value for key, value in beside(item).items() if value is not None and key not in LEFT_OUT}
        if "caption" not in kept:
            raise ValueError("it has no caption in a json or txt beside it")
        told = kept["caption"] if isinstance(kept["caption"], list) else [kept["caption"]]
        return listed_sample({**kept, "caption": [text({"caption": each}, "caption") for each in told]}, [item])
