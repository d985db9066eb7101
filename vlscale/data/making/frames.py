"""`frames.npz` of a sample: features of its frames, of one or several rates."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

Stream = tuple[NDArray[Any], float]  # features [T, F], and how many rows there are a second


def write_frames(streams: Sequence[Stream], dtype: str = "float16") -> bytes:
    """The bytes of `frames.npz`, the same for the same features: `features` as `dtype` and `times` in seconds.

    A second stream is `features_2` and `times_2`, and so on. ValueError if features do not fit into `dtype`.
    """
    arrays: dict[str, NDArray[Any]] = {}
    for number, (rows, rate) in enumerate(streams, start=1):
        end = f"_{number}" if number > 1 else ""
        with np.errstate(over="ignore"):  # what does not fit becomes infinite, and is refused
            arrays[f"features{end}"] = rows.astype(dtype)
        if not np.isfinite(arrays[f"features{end}"]).all():
            raise ValueError(f"its features are too large for {dtype}; write them as float32")
        arrays[f"times{end}"] = (np.arange(len(rows)) / rate).astype(np.float32)
    out = BytesIO()
    np.savez(out, **arrays)  # type: ignore[arg-type]
    return out.getvalue()
