"""The raw fields of a shard to a picture or regions and to texts, with a sentence for whatever is missing."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from vlscale.data import regions as region_data
from vlscale.data.clip_windows import Timed
from vlscale.data.decode import MAX_PIXELS, Crop, Encoded, Pixels
from vlscale.data.regions import Regions
from vlscale.data.shards import Shards
from vlscale.errors import DataError

if TYPE_CHECKING:
    from vlscale.types import Inputs

TEXT_FIELDS = ("json", "txt")
REGION_FIELD = "regions.npz"
MAX_TEXT_BYTES = 1 << 22  # of a json or txt: thousands of captions and boxes
MAX_MEMBER_BYTES = 1 << 28  # of anything else
MAX_CAPTION = 100_000  # characters
MAX_CAPTIONS = 10_000  # of one sample, questions included
MAX_SIDE = 1_000_000  # pixels of a picture that regions lie in
MAX_TIME = 1e9  # seconds at which a sentence begins or ends
MAX_REASON = 300  # characters; a reason may quote what was found
PICTURE_FIELDS = tuple(f"{number}{end}" for number in ("", "0.") for end in ("jpg", "jpeg", "png", "webp"))
CLIP_FIELDS = ("mp4", "gif", "webm")
FRAME_FIELD, WORD_FIELD = "frames.npz", "visual_words.npz"


class BrokenSampleError(DataError):
    """One sample cannot be used; training goes on with the next one, counts it and names it."""

    def __init__(self, shard: str, key: str, reason: str) -> None:
        """`reason` is a clause that names the field and what is wrong with it."""
        super().__init__(shard, key, reason)
        self.shard = shard
        self.key = key
        self.reason = reason if len(reason) <= MAX_REASON else reason[:MAX_REASON] + " ..."

    def __str__(self) -> str:
        return f"sample '{printable(self.key)}' of shard {self.shard}: {printable(self.reason)}"


class Bad(NamedTuple):
    """A sample that was skipped."""

    shard: str
    key: str
    reason: str


def printable(text: str) -> str:
    """`text` with control characters as escapes: what a shard holds may not write to the terminal as it likes."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def picture_field(fields: Collection[str]) -> str | None:
    """The field that holds the (first) picture, or None."""
    for name in PICTURE_FIELDS:
        if name in fields:
            return name
    return None


class Picture:
    """The picture of a sample, read but not decoded. What is wrong with it is a BrokenSampleError."""

    def __init__(self, shards: Shards, i: int, max_pixels: int = MAX_PIXELS) -> None:
        """BrokenSampleError if sample `i` has none, or none of a known kind with at most `max_pixels`."""
        self._shards, self._number = shards, i
        sizes = shards.sizes(i)
        field = picture_field(sizes)
        if field is None:
            raise self._broken(f"has no picture (jpg, png or webp) but {', '.join(sizes)}")
        self._field = field
        try:
            _check_sizes({field: sizes[field]}, MAX_MEMBER_BYTES)
            self.size = sizes[field]  # bytes
            self._encoded = Encoded(shards.read(i, (field,))[field], max_pixels)
        except ValueError as error:
            raise self._undecodable(error) from error
        self.height, self.width = self._encoded.height, self._encoded.width  # pixels

    def whole(self) -> Pixels:
        """uint8 RGB [H, W, 3]: see `Encoded.whole`."""
        try:
            return self._encoded.whole()
        except ValueError as error:
            raise self._undecodable(error) from error

    def crops(self, wanted: Sequence[Crop], into: Sequence[Pixels | None] = ()) -> list[Pixels]:
        """uint8 RGB [*size, 3] of every crop: see `Encoded.crops`."""
        try:
            return self._encoded.crops(wanted, into)
        except ValueError as error:
            raise self._undecodable(error) from error

    def _undecodable(self, error: ValueError) -> BrokenSampleError:
        return self._broken(f"the picture in '{self._field}' cannot be decoded: {error}")

    def _broken(self, reason: str) -> BrokenSampleError:
        return BrokenSampleError(self._shards.shard(self._number), self._shards.key(self._number), reason)


def picture(shards: Shards, i: int) -> Pixels:
    """The picture of sample `i`, uint8 RGB [H, W, 3]; BrokenSampleError if missing or undecodable."""
    return Picture(shards, i).whole()


def regions(shards: Shards, i: int, inputs: Inputs, wanted: frozenset[str]) -> Regions:
    """What a detector found in sample `i`: as many of its regions as the family reads, with its widths.

    BrokenSampleError if the sample has no `regions.npz` or if that lacks what is `wanted` (names of
    `vlscale.data.regions.FIELDS`).
    """
    if REGION_FIELD not in shards.fields(i):
        has = ", ".join(shards.fields(i))
        reason = f"has no '{REGION_FIELD}' but {has}; `launchers/shards.py regions` adds one to pictures"
        raise BrokenSampleError(shards.shard(i), shards.key(i), reason)
    try:
        raw = {**read_members(shards, i, ("json",)), **read_members(shards, i, (REGION_FIELD,), MAX_MEMBER_BYTES)}
        found = region_data.parse(raw[REGION_FIELD], inputs.regions, wanted, _size(raw))
        region_data.check_widths(found, inputs)
    except ValueError as error:
        raise BrokenSampleError(shards.shard(i), shards.key(i), f"its '{REGION_FIELD}': {error}") from error
    return found


class Sentence(NamedTuple):
    """A caption, or a question with its answer."""

    text: str
    answer: str | None = None


def sentences(shards: Shards, i: int, questions: bool = False) -> list[Sentence]:
    """The captions of sample `i` (`caption`, string or list, of its json, else its txt); with `questions` those too.

    Questions are `qa` of the json, [{"q": ..., "a": ...}], or `question` and `answer`. Of a clip, captions are its
    sentences: see `timed_sentences`. BrokenSampleError if there is no text, if one is empty, or if the json is not
    valid.
    """
    try:
        raw = read_members(shards, i, TEXT_FIELDS)
        record = _record(raw)
        asked = _questions(record) if questions else []
        told = [] if asked and not _says(raw, record) else [each.text for each in _timed(raw, record, shards.fields(i))]
        if len(told) + len(asked) > MAX_CAPTIONS:
            raise ValueError(f"has {len(told) + len(asked)} captions and questions; at most {MAX_CAPTIONS} are read")
        return [*map(Sentence, told), *asked]
    except ValueError as error:
        raise BrokenSampleError(shards.shard(i), shards.key(i), str(error)) from error


def timed_sentences(shards: Shards, i: int, needed: bool = True) -> list[Timed]:
    """The sentences of the clip of sample `i`, in the order of their starts.

    They are `sentences` or `sub` of its json, [{"start": seconds, "end": seconds, "text": ...}], or its lists `start`,
    `end` and `text`; else its captions, or its questions each with its answer, which go with the whole clip.
    BrokenSampleError as of `sentences`, or if a time cannot be. Where no text is `needed`, a sample without one has an
    empty one.
    """
    try:
        raw = read_members(shards, i, TEXT_FIELDS)
        record = _record(raw)
        if not needed and not _says(raw, record):
            return [Timed("")]
        return sorted(_timed(raw, record, shards.fields(i)), key=lambda each: each.start)
    except ValueError as error:
        raise BrokenSampleError(shards.shard(i), shards.key(i), str(error)) from error


def tags(shards: Shards, i: int) -> str:
    """The names of the objects of sample `i`, joined by spaces: `tags` of its json, else those of its `objects`.

    Empty where nothing is named; BrokenSampleError if the json is not valid.
    """
    try:
        record = _record(read_members(shards, i, ("json",)))
        named = record.get("tags")
        if named is None:
            objects = [each for each in _listed(record, "objects") if isinstance(each, dict)]
            named = [each.get("name") or each.get("label") or "" for each in objects]
        named = named if isinstance(named, list) else [named]
        return _checked(" ".join(str(each) for each in named if isinstance(each, str | int | float)), "the tags")
    except ValueError as error:
        raise BrokenSampleError(shards.shard(i), shards.key(i), str(error)) from error


def every_answer(shards: Shards) -> Iterator[str]:
    """The answers of all questions of a data set."""
    for i in range(len(shards)):
        try:
            yield from (each.answer for each in sentences(shards, i, questions=True) if each.answer is not None)
        except BrokenSampleError:
            continue


def read_members(shards: Shards, i: int, fields: Sequence[str], most: int = MAX_TEXT_BYTES) -> dict[str, bytes]:
    """These members of sample `i`. ValueError if one has more than `most` bytes, which are not read then."""
    _check_sizes({field: size for field, size in shards.sizes(i).items() if field in fields}, most)
    return shards.read(i, fields)


def _check_sizes(sizes: Mapping[str, int], most: int) -> None:
    for field, size in sizes.items():
        if size > most:
            raise ValueError(f"its '{field}' has {size} bytes; at most {most} are read")


def read_json(data: bytes) -> Any:
    """What a json holds, whoever made it. ValueError with the reason if it is not valid or absurdly deep."""
    try:
        return json.loads(data)
    except UnicodeDecodeError as error:
        raise ValueError("its text is not UTF-8; write it anew as UTF-8") from error
    except RecursionError as error:
        raise ValueError("its 'json' is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"its 'json' is not valid JSON ({error})") from error


def _record(raw: Mapping[str, bytes]) -> dict[str, Any]:
    """The json of a sample; empty where it has none, or one that is no mapping."""
    record = read_json(raw.get("json", b"{}"))
    return record if isinstance(record, dict) else {}


def _listed(record: Mapping[str, Any], name: str) -> list[Any]:
    """A list of the json; empty where there is none."""
    found = record.get(name)
    return found if isinstance(found, list) else []


def _size(raw: Mapping[str, bytes]) -> tuple[float, float] | None:
    """(width, height) of the picture; None where the json does not tell."""
    record = _record(raw)
    sides = [record.get(name) for name in ("width", "height")]
    numbers = [float(side) for side in sides if isinstance(side, int | float) and 0 < side <= MAX_SIDE]
    return (numbers[0], numbers[1]) if len(numbers) == 2 else None


def _checked(text: str, what: str) -> str:
    """`text`, which is to go to a tokenizer. ValueError if it cannot."""
    if len(text) > MAX_CAPTION:
        raise ValueError(f"{what}: {len(text)} characters; at most {MAX_CAPTION} are read")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half of a pair, as \ud800 in a json
        raise ValueError(f"{what}: a character that is none ({error.reason}); write it anew as UTF-8") from error
    return text


def _captions(raw: Mapping[str, bytes], record: Mapping[str, Any]) -> list[str]:
    if "caption" in record:
        field, found = "json", record["caption"]
    elif "txt" in raw:
        try:
            field, found = "txt", raw["txt"].decode()
        except UnicodeDecodeError as error:
            raise ValueError("its text is not UTF-8; write it anew as UTF-8") from error
    else:
        raise ValueError("has no caption: neither 'caption' in 'json' nor a 'txt'")
    listed: list[Any] = found if isinstance(found, list) else [found]
    if not listed:
        raise ValueError(f"the caption list in '{field}' is empty; write at least one caption")
    for caption in listed:
        if not isinstance(caption, str):
            kind = type(caption).__name__
            raise ValueError(f"a caption in '{field}' is a {kind}; write a string or a list of strings")
        if not caption.strip():
            raise ValueError(f"a caption in '{field}' is empty; write a text or leave the sample out")
        _checked(caption, f"a caption in '{field}'")
    return listed


def _says(raw: Mapping[str, bytes], record: Mapping[str, Any]) -> bool:
    """Whether a sample has a text that is no question."""
    return "caption" in record or "txt" in raw or bool(_listed_times(record))


def _timed(raw: Mapping[str, bytes], record: Mapping[str, Any], fields: Sequence[str]) -> list[Timed]:
    """The sentences of a sample, with their times where they have some."""
    listed = _listed_times(record)
    if len(listed) > MAX_CAPTIONS:
        raise ValueError(f"has {len(listed)} sentences; at most {MAX_CAPTIONS} are read")
    if listed:
        return [_sentence(number, each) for number, each in enumerate(listed)]
    seen = any(field in fields for field in (*CLIP_FIELDS, FRAME_FIELD, WORD_FIELD))
    asked = _questions(record) if seen and not _says(raw, record) else []
    return [Timed(f"{each.text} {each.answer}") for each in asked] or list(map(Timed, _captions(raw, record)))


def _listed_times(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """{start, end, text} of every sentence that says something; none where no text has a time."""
    for name in ("sentences", "sub"):
        found = record.get(name)
        listed = found if isinstance(found, list) else [found]
        if any(isinstance(each, dict) and ("start" in each or "end" in each) for each in listed):
            if not (isinstance(found, list) and all(isinstance(each, dict) for each in found)):
                raise ValueError(f"its '{name}' are no list of {{start, end, text}}; write one for each sentence")
            return [{"start": None, "end": None, "text": None, **each} for each in found if each.get("text") != ""]
    columns = [record.get(name) for name in ("start", "end", "text")]
    lists = [column for column in columns if isinstance(column, list)]
    if len(lists) < len(columns):
        return []
    if len({*map(len, lists)}) > 1:
        raise ValueError(
            "has {} starts, {} ends and {} texts of sentences; write as many of each".format(*map(len, lists))
        )
    named = (dict(zip(("start", "end", "text"), each, strict=True)) for each in zip(*lists, strict=True))
    return [each for each in named if each["text"] != ""]


def _sentence(number: int, told: Mapping[str, Any]) -> Timed:
    """One sentence of a list. ValueError if its time or text cannot be."""
    what, text = f"sentence {number}", told["text"]
    times = [told["start"], told["end"]]
    if not all(isinstance(time, int | float) and abs(time) < MAX_TIME for time in times):
        found = " to ".join(map(reprlib.repr, times))
        raise ValueError(f"{what} is from {found}; write seconds as 'start' and 'end'")
    if not isinstance(text, str):
        raise ValueError(f"{what} has a text of {type(text).__name__}; write a string")
    start, end = map(float, times)
    if not 0 <= start < end:
        raise ValueError(f"{what} is from {start:g} s to {end:g} s; it should end after it starts, and not before 0")
    return Timed(_checked(text, what), start, end)


def _questions(record: Mapping[str, Any]) -> list[Sentence]:
    listed = _listed(record, "qa")
    if record.get("question") is not None:
        listed = [*listed, {"q": record["question"], "a": record.get("answer")}]
    for each in listed:
        if not (isinstance(each, dict) and isinstance(each.get("q"), str) and isinstance(each.get("a"), str)):
            found = reprlib.repr(each)
            raise ValueError(f'a question in \'json\' is {found}; write {{"q": a question, "a": its answer}}')
        _checked(each["q"], "a question in 'json'")
        _checked(each["a"], "an answer in 'json'")
    return [Sentence(each["q"], each["a"]) for each in listed if each["q"].strip()]
