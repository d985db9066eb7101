"""Words and the names of a picture's objects as one text: [CLS] words [SEP] tags [SEP] (OSCAR)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from vlscale.data.masking import Ids


class Tagged(NamedTuple):
    """One text."""

    ids: Ids  # [L]
    segments: Ids  # [L] 0 = words with their [CLS] and [SEP], 1 = tags and theirs
    cut: tuple[Ids, Ids]  # the last words and the last tags, for which there was no room


def join(words: Ids, tags: Ids, length: int) -> Tagged:
    """At most `length` ids of two texts [CLS] ... [SEP] each; the longer loses its last token until both fit.

    Where they are equally long the tags lose one (Oscar: oscar_tsv.py).
    """
    start, end = words[:1], words[-1:]
    kept, named = words[1:-1], tags[1:-1]
    room = length - 3  # [CLS] and two [SEP]
    surplus = len(kept) + len(named) - room
    if surplus > 0:
        longer = abs(len(kept) - len(named))
        alone = min(surplus, longer)  # cut from the longer one until they are equal, then in turn, tags first
        rest = surplus - alone
        cut_words, cut_tags = rest // 2, rest - rest // 2
        if len(kept) > len(named):
            cut_words += alone
        else:
            cut_tags += alone
        kept, named = kept[: len(kept) - cut_words], named[: len(named) - cut_tags]
    cut = words[1 + len(kept) : -1], tags[1 + len(named) : -1]
    ids = np.concatenate([start, kept, end, named, end])
    segments = (np.arange(len(ids)) >= len(kept) + 2).astype(np.int64)
    return Tagged(ids, segments, cut)
