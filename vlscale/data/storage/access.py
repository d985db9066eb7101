"""The bytes of a shard, wherever it lies: a file, a store, or packed inside either."""

from __future__ import annotations

import hashlib
import os
import select
import subprocess
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, TypeVar, cast

from vlscale.data.storage.cache import Cache, Entry, Room
from vlscale.data.storage.stores import PIECE, PIPE, Stat, StoreOptions, Stores, changed, scheme, shown
from vlscale.errors import DataError

MAX_OPEN_FILES = 128  # local shards kept open per thread; with `MAX_MAPPED` far below the usual 1,024 descriptors
GAP = 2**16  # bytes between two members below which one request for both is cheaper than two
SMALL = 2**19  # bytes of a sample up to which all of it is fetched at once: who asks for one member asks for others
LOCAL_WINDOW, REMOTE_WINDOW = 2**16, 4 * 2**20  # bytes read at a time when headers are scanned
MOST_UNPACKED = (2**26, 200)  # a packed shard may hold so many bytes, or so many times its own size
GZIP = b"\x1f\x8b"
OTHER_PACKINGS = (b"BZh", b"\xfd7z", b"\x28\xb5\x2f\xfd")  # bzip2, xz, zstd
Span = tuple[int, int]  # (offset, size) in bytes
T = TypeVar("T")
Read = Callable[[int, int], bytes]  # (offset, size) -> bytes


class Origin(NamedTuple):
    """A shard as it was found."""

    url: str  # or path, or `pipe:` and a command
    stat: Stat
    place: str  # 32 hex digits that tell where it lies

    @staticmethod
    def of(url: str, stat: Stat) -> Origin:
        """A URL without its query: a signature in it may change."""
        remote = url.startswith(PIPE) or scheme(url)
        where = url if url.startswith(PIPE) else shown(url) if remote else os.path.realpath(url)
        return Origin(url, stat, hashlib.sha256(where.encode()).hexdigest()[:32])

    @property
    def stamp(self) -> tuple[int, int]:
        """What tells another state of the shard."""
        return self.stat.size, int.from_bytes(hashlib.sha256(self.stat.mark.encode()).digest()[:7], "big")


class Access:
    """Reads shards. Safe to use from several threads and after a fork; can be pickled."""

    def __init__(self, options: StoreOptions, folder: Path) -> None:
        """`folder` is the cache where `options` name none."""
        self.stores = Stores(options)
        limit = int(options.cache_gigabytes * 1e9)
        self._cache = Cache(Path(options.cache).expanduser() if options.cache else folder, limit) if limit else None
        self._whole = options.windowed and self._cache is not None  # remote shards are fetched whole
        self._local = threading.local()

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_local"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._local = threading.local()

    def find(self, url: str) -> Origin:
        """Size and state of a shard. DataError if it is not there."""
        if url.startswith(PIPE):
            return Origin.of(url, Stat(0, ""))
        if scheme(url):
            return Origin.of(url, self.stores.stat(url))
        try:
            status = os.stat(url)
        except OSError as error:
            raise DataError(f"shard {url} cannot be opened ({error.strerror}); mend its path or rights") from error
        return Origin.of(url, _state(status))

    def choose(self, origins: Sequence[Origin]) -> None:
        """Fetch remote shards whole if the cache can hold them all; else samples are read by ranges."""
        remote = sum(origin.stat.size for origin in origins if scheme(origin.url))
        self._whole = self._whole or (self._cache is not None and remote <= self._cache.limit)

    def is_packed(self, origin: Origin) -> bool:
        """Whether it is compressed, or known only by running a command."""
        if origin.url.startswith(PIPE):
            return True
        return b"".join(self.read(origin, False, [(0, min(2, origin.stat.size))])) == GZIP

    def read(self, origin: Origin, packed: bool, spans: Sequence[Span], around: Span = (0, 0)) -> list[bytes]:
        """The bytes of each span of the tar. DataError if they cannot be had, or the shard has changed.

        `around` is the sample that they lie in.
        """
        kept = not packed and not scheme(origin.url)
        descriptor = self._file(origin) if kept else self._cached(origin, packed)
        if descriptor is None:
            return self._ranged(origin, spans, around)
        try:
            data = [os.pread(descriptor, size, offset) for offset, size in spans]
        except OSError as error:
            raise _unreadable(origin.url, error) from error
        finally:
            if not kept:
                os.close(descriptor)
        for part, (_, size) in zip(data, spans, strict=True):
            if len(part) < size:
                raise DataError(f"shard {shown(origin.url)} became shorter after it was indexed; copy it again")
        return data

    def prefetch(self, origin: Origin, packed: bool) -> None:
        """Begin to fetch a shard into the cache, if it is absent; one at a time, and what fails is left to `read`."""
        busy = getattr(self._local, "fetching", None)
        if not (packed or scheme(origin.url)) or not self._whole or (busy is not None and busy.is_alive()):
            return
        if self._cache is not None and self._cache.has(self._entry(origin, packed)):
            return

        def fetch() -> None:
            with suppress(DataError):
                descriptor = self._cached(origin, packed)
                if descriptor is not None:
                    os.close(descriptor)

        self._local.fetching = threading.Thread(target=fetch, name="prefetch", daemon=True)
        self._local.fetching.start()

    @contextmanager
    def scanning(self, origin: Origin, packed: bool) -> Iterator[tuple[Read, int]]:
        """(a function that reads small spans in rising order, the tar's length in bytes)."""
        with self._opened(origin, packed) as descriptor:
            if descriptor is None:
                length, window = origin.stat.size, REMOTE_WINDOW

                def fetch(offset: int, size: int) -> bytes:
                    return self.stores.read(origin.url, offset, offset + size, origin.stat)
            else:
                with _reading(origin.url):
                    length, window = os.fstat(descriptor).st_size, LOCAL_WINDOW

                def fetch(offset: int, size: int) -> bytes:
                    with _reading(origin.url):
                        return os.pread(descriptor, size, offset)

            yield _Window(fetch, length, window).read, length

    @contextmanager
    def _opened(self, origin: Origin, packed: bool) -> Iterator[int | None]:
        """A descriptor of the tar; None if it lies in a store and is read by ranges."""
        if not packed and not scheme(origin.url):
            yield self._file(origin)
            return
        descriptor = self._cached(origin, packed)
        try:
            yield descriptor
        finally:
            if descriptor is not None:
                os.close(descriptor)

    def _file(self, origin: Origin) -> int:
        """One of the most recently used descriptors of this thread."""
        return self._own(_OpenFiles)(origin)

    def _cached(self, origin: Origin, packed: bool) -> int | None:
        """A descriptor of a shard in the cache, which is put there first if need be."""
        entry = self._entry(origin, packed)
        if not packed:
            if self._cache is None or not self._whole:
                return None
            return self._cache.open(entry, lambda *call: self._download(origin, *call))
        if self._cache is None:
            raise DataError(
                f"shard {shown(origin.url)} is compressed and is read from the cache, which data.cache_gigabytes=0 "
                "turns off; unpack it to a plain .tar, or leave that key out"
            )
        descriptor = self._cache.open(entry, lambda *call: self._unpack(origin, *call))
        if descriptor is None:
            raise DataError(
                f"shard {shown(origin.url)} does not fit, unpacked, into the cache of {self._cache.limit / 1e9:g} GB "
                f"in {self._cache.folder} beside what was just read; raise data.cache_gigabytes"
            )
        return descriptor

    @staticmethod
    def _entry(origin: Origin, packed: bool) -> Entry:
        name = hashlib.sha256(f"{origin.place}{origin.stamp}{packed}".encode()).hexdigest()[:32]
        return Entry(name, None if packed else origin.stat.size)

    def _download(self, origin: Origin, descriptor: int, there: int, room: Room) -> bool:
        os.lseek(descriptor, there, os.SEEK_SET)
        for piece in self.stores.pieces(origin.url, there, origin.stat.size, origin.stat):
            _write(descriptor, piece)
        return True

    def _unpack(self, origin: Origin, descriptor: int, there: int, room: Room) -> bool:
        if origin.url.startswith(PIPE):
            pieces = _run(origin.url.removeprefix(PIPE), self.stores.options.patience)
            most = cast(Cache, self._cache).limit
        else:
            remote = bool(scheme(origin.url))
            url, stat = origin.url, origin.stat
            pieces = self.stores.pieces(url, 0, stat.size, stat) if remote else _pieces(url)
            most = max(MOST_UNPACKED[0], MOST_UNPACKED[1] * stat.size)
        written = 0
        try:
            for data in _unpacked(pieces):
                written += len(data)
                if written > most:
                    raise DataError(
                        f"shard {shown(origin.url)} unpacks to more than {most / 1e9:.3g} GB, which no picture does; "
                        "unpack it by hand if that is right"
                    )
                if not room(written):
                    return False
                _write(descriptor, data)
        except (zlib.error, EOFError) as error:
            raise DataError(f"shard {shown(origin.url)} cannot be unpacked ({error}); copy or make it again") from error
        return True

    def _ranged(self, origin: Origin, spans: Sequence[Span], around: Span) -> list[bytes]:
        """By requests to the store, one for spans that lie close together."""
        ahead = self._own(_Ahead)
        held: dict[Span, bytes] = {}
        if 0 < around[1] <= SMALL:
            ahead.read(self.stores, origin, around[0], sum(around))
        for run in _runs(sorted(set(spans))):
            start, stop = run[0][0], run[-1][0] + run[-1][1]
            data = ahead.read(self.stores, origin, start, stop)
            held.update({(offset, size): data[offset - start : offset - start + size] for offset, size in run})
        return [held[span] for span in spans]

    def _own(self, kind: type[T]) -> T:
        """This thread's own object of a kind."""
        objects: dict[type, object] = self._local.__dict__.setdefault("objects", {})
        if kind not in objects:
            objects[kind] = kind()
        return cast(T, objects[kind])


class _Ahead:
    """Reads of one thread from stores; in rising order within a shard, they read ever further ahead."""

    def __init__(self) -> None:
        self._origin: Origin | None = None
        self._start, self._held = 0, b""

    def read(self, stores: Stores, origin: Origin, start: int, stop: int) -> bytes:
        """The bytes [start, stop)."""
        end = self._start + len(self._held)
        if origin != self._origin or not self._start <= start <= stop <= end:
            follows = origin == self._origin and self._start < start <= end + REMOTE_WINDOW
            most = min(max(stop - start, 2 * len(self._held)), max(stop - start, REMOTE_WINDOW)) if follows else 0
            until = min(max(stop, start + most), origin.stat.size)
            self._held = stores.read(origin.url, start, until, origin.stat)
            self._origin, self._start = origin, start
        return self._held[start - self._start : stop - self._start]


def _runs(spans: Sequence[Span]) -> Iterator[list[Span]]:
    """Spans in rising order, put together where little lies between them."""
    run: list[Span] = []
    for span in spans:
        if run and span[0] - sum(run[-1]) > GAP:
            yield run
            run = []
        run.append(span)
    if run:
        yield run


class _OpenFiles:
    """The most recently used local shards of one thread, opened when first read."""

    def __init__(self) -> None:
        self._open: OrderedDict[str, int] = OrderedDict()

    def __call__(self, origin: Origin) -> int:
        descriptor = self._open.get(origin.url)
        if descriptor is None:
            if len(self._open) >= MAX_OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
            with _reading(origin.url):
                descriptor = os.open(origin.url, os.O_RDONLY | os.O_CLOEXEC)
            self._open[origin.url] = descriptor
        try:
            status = os.fstat(descriptor)
        except OSError as error:
            raise _unreadable(origin.url, error) from error
        if status.st_size < origin.stat.size:
            raise DataError(f"shard {origin.url} became shorter after it was indexed; copy it again")
        if _state(status) != origin.stat:
            raise changed(origin.url)
        self._open.move_to_end(origin.url)
        return descriptor

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)


class _Window:
    """Small reads in rising order out of large ones."""

    def __init__(self, fetch: Read, length: int, window: int) -> None:
        self._fetch, self._length, self._window = fetch, length, window
        self._start, self._held = 0, b""

    def read(self, offset: int, size: int) -> bytes:
        place = offset - self._start
        if not 0 <= place <= len(self._held) - size:
            most = min(max(size, self._window), self._length - offset)
            self._start, self._held, place = offset, self._fetch(offset, most), 0
        return self._held[place : place + size]


def _write(descriptor: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(descriptor, left) :]


def _pieces(path: str) -> Iterator[bytes]:
    with _reading(path), open(path, "rb") as file:
        while piece := file.read(PIECE):
            yield piece


def _state(status: os.stat_result) -> Stat:
    """Of a local shard."""
    return Stat(status.st_size, str(status.st_mtime_ns))


@contextmanager
def _reading(url: str) -> Iterator[None]:
    """DataError where the file system fails."""
    try:
        yield
    except OSError as error:
        raise _unreadable(url, error) from error


def _unreadable(url: str, error: OSError) -> DataError:
    return DataError(f"shard {shown(url)} cannot be read ({error.strerror}); mend its path, rights or disk")


def _unpacked(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """What gzip packed, in pieces of 4 MiB at most; what is not packed as it is."""
    unpacker = None
    start = True
    for piece in pieces:
        if start:
            unpacker = zlib.decompressobj(31) if piece.startswith(GZIP) else None
            start = False
        if unpacker is None:
            yield piece
        while piece and unpacker is not None:
            if unpacker.eof:  # another packed part follows, or padding
                if not piece.lstrip(b"\0"):
                    break
                unpacker = zlib.decompressobj(31)
            yield unpacker.decompress(piece, 4 * PIECE)
            piece = unpacker.unused_data if unpacker.eof else unpacker.unconsumed_tail
    if unpacker is not None and not unpacker.eof:
        raise EOFError("it ends too early")


def _run(command: str, patience: float) -> Iterator[bytes]:
    """What a command prints. DataError if it fails, or says nothing for `patience` seconds."""
    named = shown(PIPE + command)
    with subprocess.Popen(["/bin/sh", "-c", command], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as process:
        output = process.stdout.fileno() if process.stdout else -1
        try:
            while select.select([output], [], [], patience)[0]:
                piece = os.read(output, PIECE)
                if not piece:
                    break
                yield piece
            else:
                raise DataError(f"'{named}' printed nothing for {patience:g} s; mend the command")
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        raise DataError(f"'{named}' ended with code {process.returncode}; mend the command")
