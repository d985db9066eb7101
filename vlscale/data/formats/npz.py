"""A folder of npz files with regions, one per picture, under any of the usual names (`base.NAMES`).

Bottom-up attention's own (`features`, `boxes`, `objects_id`, `img_w`), its PyTorch ports (`x`, `bbox`, `image_w`) and
UNITER's (`norm_bb`, `conf`, `soft_labels`). A picture, json or txt of the same name goes into the sample. Arrays of
objects, such as the `info` of the ports, are passed over: nothing is unpickled.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlscale.data.arrays import read_arrays
from vlscale.data.formats.base import NAMES, Extras, Options, detections, files_in
from vlscale.data.formats.folder import beside, picture, picture_beside
from vlscale.data.making.write import Sample, Source

__all__ = ["Options", "source"]

WANTED = tuple(name for names in NAMES.values() for name in names)


def source(paths: Sequence[Path], options: Options) -> Source[Path]:
    """The npz files in `paths` and the folders below them. DataError if there is none."""
    files = [
        (str(file.relative_to(folder).with_suffix("")), file)
        for folder, file in files_in(paths, r".*\.npz", "npz file")
    ]
    return _Npz(files, Extras(options))


@dataclass(frozen=True)
class _Npz:
    files: list[tuple[str, Path]]
    extras: Extras

    def items(self) -> Iterator[tuple[str, Path]]:
        return iter(self.files)

    def sample(self, name: str, item: Path) -> Sample:
        try:
            arrays = read_arrays(item.read_bytes(), WANTED)
        except OSError as error:
            raise ValueError(f"it cannot be read ({error.strerror})") from error
        regions = detections(arrays)
        record = {"width": regions.width, "height": regions.height}  # of the picture that the boxes lie in
        sample = self.extras.sample(name, regions, {**beside(item), **record})
        found = picture_beside(item)
        return sample._replace(picture=picture(found)) if found else sample
