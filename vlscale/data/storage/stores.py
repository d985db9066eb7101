"""Shards that lie elsewhere: HTTP(S), S3 and what speaks like it, and whatever else fsspec knows.

A store that does not answer, breaks off or stalls is asked again, at growing intervals, from the byte that was reached.
"""

from __future__ import annotations

import fnmatch
import logging
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from html.parser import HTMLParser
from importlib import import_module
from typing import Any, NamedTuple, Protocol, TypeVar
from urllib.parse import unquote, urljoin, urlsplit, urlunsplit

from vlscale.errors import ConfigError, DataError

PIPE = "pipe:"  # and a command that prints a shard
PIECE = 2**20  # bytes that are handed on at a time
BLOCK = 8 * PIECE  # bytes of one request to a store that fsspec opens
FIRST_CONTACT = 60.0  # seconds for a store that has never answered: its name may be wrong
SHORTEST_WAIT, LONGEST_WAIT = 0.1, 15.0  # seconds between two tries
TOLD_AFTER = 5.0  # seconds away before a warning
BUSY = (408, 425, 429)  # client errors of HTTP that pass: timeout, too early, too many requests
GLOB = re.compile(r"[*?\[]")
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
_ASSIGNED = re.compile(r"""^(\s*\w+=("[^"]*"|'[^']*'|\\.|[^\s"'\\])*(\s|$))+""")  # variables before a command
_COMMAND = re.compile(r"[\w./+-]+")
_MARKS = ("ETag", "etag", "md5Hash", "crc32c", "mtime", "LastModified", "last_modified", "updated", "created")
_log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class StoreOptions:
    """How remote and compressed shards are read."""

    cache: str | None = None  # folder; None = `shards` in the cache folder of the user
    cache_gigabytes: float = 32.0  # 10^9 bytes that it may hold; 0 = samples are read one by one, by ranges
    patience: float = 1800.0  # seconds that a store may be away
    timeout: float = 30.0  # seconds without a byte after which a connection counts as dead
    pipe: bool = False  # whether `pipe:` names, which run a command, are allowed
    windowed: bool = False  # few shards are read at a time, so a cache smaller than the data set still serves


class Stat(NamedTuple):
    """What a store tells of an object."""

    size: int  # bytes
    mark: str  # changes with the content: the ETag or time of change; empty where the store has none


class Store(Protocol):
    """One kind of store. DataError is final; any other error may pass and is tried again."""

    def stat(self, url: str) -> Stat:
        """Size and mark of an object."""
        ...

    def stream(self, url: str, start: int, stop: int, stat: Stat) -> Iterator[bytes]:
        """The bytes [start, stop), which may break off; DataError if the object is no longer that of `stat`."""
        ...

    def glob(self, pattern: str) -> list[str]:
        """The objects that a pattern names."""
        ...


class Stores:
    """Any object by its URL, patiently. Safe to use from several threads; can be pickled."""

    def __init__(self, options: StoreOptions) -> None:
        self.options = options
        self._answered: set[str] = set()  # hosts that did at least once
        self._restart()

    def _restart(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[str, Store] = {}
        self._away: set[str] = set()  # hosts whose outage has been told

    def __getstate__(self) -> dict[str, object]:
        return {"options": self.options, "_answered": self._answered}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._restart()

    def stat(self, url: str) -> Stat:
        """Size and mark of an object. DataError if it is not there, or the store stays away."""
        return self._insist(url, lambda store: store.stat(url))

    def glob(self, pattern: str) -> list[str]:
        """The objects that a pattern names, sorted. DataError if the store cannot tell."""
        return sorted(self._insist(pattern, lambda store: store.glob(pattern)))

    def pieces(self, url: str, start: int, stop: int, stat: Stat) -> Iterator[bytes]:
        """The bytes [start, stop) in pieces of any size, across outages of up to `patience` seconds each.

        DataError if the object is gone, is no longer that of `stat`, or the store stays away.
        """
        store, outage = self._store(url), _Outage(self, url)
        while start < stop:
            try:
                for piece in store.stream(url, start, stop, stat):
                    start += len(piece)
                    outage.over()
                    yield piece
                if start < stop:
                    raise OSError("the answer ended early")
            except Exception as error:
                outage.wait(error)

    def read(self, url: str, start: int, stop: int, stat: Stat) -> bytes:
        """The bytes [start, stop), as `pieces`."""
        return b"".join(self.pieces(url, start, stop, stat))

    def _insist(self, url: str, ask: Callable[[Store], T]) -> T:
        store, outage = self._store(url), _Outage(self, url)
        while True:
            try:
                answer = ask(store)
                outage.over()
                return answer
            except Exception as error:
                outage.wait(error)

    def _store(self, url: str) -> Store:
        kind = scheme(url)
        with self._lock:
            if kind not in self._open:
                self._open[kind] = _open(url, kind, self.options.timeout)
            return self._open[kind]


class _Outage:
    """The tries that failed since a store last answered one request."""

    def __init__(self, stores: Stores, url: str) -> None:
        self._stores, self._url = stores, url
        self._host = urlsplit(url).netloc.rpartition("@")[2]
        self._random = random.Random()  # not the run's: how often a store failed must not change its draws
        self._began = time.monotonic()
        self._tries = 0

    def over(self) -> None:
        """The store answered."""
        self._began, self._tries = time.monotonic(), 0
        self._stores._answered.add(self._host)
        self._stores._away.discard(self._host)

    def wait(self, error: Exception) -> None:
        """Sleep before the next try. DataError if the error cannot pass, or patience is at its end."""
        if isinstance(error, (ConfigError, DataError, TypeError, AttributeError, MemoryError)):
            raise error
        reason = _reason(error, self._url)
        if isinstance(error, (ValueError, ImportError)):
            raise DataError(f"shard {shown(self._url)} cannot be asked for: {reason}") from error
        patience = self._stores.options.patience
        if self._host not in self._stores._answered:
            patience = min(patience, FIRST_CONTACT)
        away = time.monotonic() - self._began
        if away >= patience:
            raise DataError(
                f"shard {shown(self._url)} could not be read for {away:.0f} s; the last error: {reason}; "
                "mend the store, or raise data.store_patience"
            ) from error
        self._tries += 1
        if away >= TOLD_AFTER and self._host not in self._stores._away:
            self._stores._away.add(self._host)
            _log.warning("%s does not answer (%s); trying again for up to %.0f s", self._host, reason, patience)
        delay = min(LONGEST_WAIT, SHORTEST_WAIT * 2.0 ** min(self._tries, 20))
        time.sleep(min(delay * self._random.uniform(0.5, 1.0), patience - away))


def scheme(url: str) -> str:
    """`https` of `https://...`; empty for a path."""
    found = _SCHEME.match(url)
    return found[1].lower() if found else ""


def is_pattern(url: str) -> bool:
    """Whether it names objects by a glob."""
    path = url.partition("://")[2].partition("/")[2]
    return bool(GLOB.search(path.partition("?")[0] if scheme(url) in ("http", "https") else path))


def shown(url: str) -> str:
    """A URL as it may be printed: without password, query and fragment, and a command without its arguments.

    Those may let others in.
    """
    if url.startswith(PIPE):
        words = _ASSIGNED.sub("", url.removeprefix(PIPE), 1).split()
        return f"{PIPE}{words[0]} ..." if words and _COMMAND.fullmatch(words[0]) else f"{PIPE} ..."
    if not scheme(url):
        return url
    try:
        parts = urlsplit(url)
    except ValueError:
        return re.split(r"[?#]", re.sub(r"//.*@", "//", url))[0]
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _reason(error: Exception, url: str) -> str:
    """The error in words that tell no secret of the URL."""
    text = str(error).replace(url, shown(url))
    text = re.sub(r"//[^/@\s]*@", "//", re.sub(r"\?[^\s'\")]*=[^\s'\")]*", "", text))
    return f"{type(error).__name__}: {text[:300]}"


def _open(url: str, kind: str, timeout: float) -> Store:
    try:
        if kind in ("http", "https"):
            return _Http(timeout)
        return _S3(timeout) if kind == "s3" else _Fsspec(url)
    except ImportError as error:
        advice = "pip install 'vlscale[stores]'" if kind in ("http", "https", "s3") else "install it"
        raise ConfigError(f"{kind}:// needs a package that is absent ({error}); {advice}") from error
    except ValueError as error:
        raise ConfigError(f"'{shown(url)}' begins with no kind of store we know; write https://, s3://, ...") from error


def _check_status(status: int, url: str) -> None:
    """DataError for an answer that no other try will better, OSError for one that may pass."""
    if status < 400:
        return
    if status in (412, 416):
        raise changed(url)
    if status < 500 and status not in BUSY:
        kinds = {404: "is not there", 410: "is not there", 401: "may not be read", 403: "may not be read"}
        words = kinds.get(status, "cannot be asked for")
        raise DataError(f"shard {shown(url)} {words} (HTTP {status}); mend the URL, or the rights to read it")
    raise OSError(f"HTTP {status}")


def changed(url: str) -> DataError:
    """The error for an object that is no longer what was indexed."""
    return DataError(f"shard {shown(url)} changed while it was in use; start the run anew on what it holds now")


class _Http:
    """Web servers, by `requests`: its proxies, certificates and ~/.netrc."""

    def __init__(self, timeout: float) -> None:
        self._requests = import_module("requests")
        self._timeout = timeout
        self._local = threading.local()

    def _get(self, url: str, span: str | None) -> AbstractContextManager[Any]:
        """The answer to a GET, its body unread; a session of its own for each thread keeps connections open."""
        if not hasattr(self._local, "session"):
            self._local.session = self._requests.Session()
        headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={span}"} if span else {})}
        found: AbstractContextManager[Any] = self._local.session.get(
            url, headers=headers, stream=True, timeout=self._timeout
        )
        return found

    def stat(self, url: str) -> Stat:
        with self._get(url, "0-0") as answer:  # not HEAD, for which a signed URL is not valid
            total = answer.headers.get("Content-Range", "").rpartition("/")[2]
            if answer.status_code == 416 and total == "0":
                return Stat(0, "")
            _check_status(answer.status_code, url)
            if answer.status_code == 206:
                answer.raw.read()  # one byte; the connection then serves the next shard
            else:
                total = answer.headers.get("Content-Length", "")
            if not total.isdigit():
                raise DataError(f"the server does not tell the size of shard {shown(url)}; use one that does")
            return Stat(int(total), _mark(answer))

    def stream(self, url: str, start: int, stop: int, stat: Stat) -> Iterator[bytes]:
        with self._get(url, f"{start}-{stop - 1}") as answer:
            _check_status(answer.status_code, url)
            ranged = answer.status_code == 206
            total = answer.headers.get("Content-Range" if ranged else "Content-Length", "").rpartition("/")[2]
            if _mark(answer) != stat.mark or (total.isdigit() and int(total) != stat.size):
                raise changed(url)
            skip, left = 0 if ranged else start, stop - start  # a server without ranges sends all of it
            for piece in answer.raw.stream(PIECE, decode_content=False):
                part = piece[skip:][:left]
                skip, left = max(0, skip - len(piece)), left - len(part)
                if part:
                    yield part
                if not left:
                    return

    def glob(self, pattern: str) -> list[str]:
        folder, _, name = pattern.rpartition("/")
        if is_pattern(folder):
            raise ConfigError(f"'{shown(pattern)}': a web server lists one folder; write * in the last part only")
        with self._get(folder + "/", None) as answer:
            _check_status(answer.status_code, folder + "/")
            links = _Links()
            links.feed(answer.text)
        found = {urljoin(folder + "/", link).partition("?")[0] for link in links.found}
        return [url for url in found if fnmatch.fnmatchcase(unquote(url), unquote(f"{folder}/{name}"))]


def _mark(answer: Any) -> str:
    return str(answer.headers.get("ETag") or answer.headers.get("Last-Modified") or "")


class _Links(HTMLParser):
    """The links of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Called by `feed`."""
        self.found += [value for name, value in attrs if tag == "a" and name == "href" and value]


class _S3:
    """S3 and what speaks like it, by `boto3`: its environment variables, profiles and roles."""

    def __init__(self, timeout: float) -> None:
        boto3, botocore = import_module("boto3"), import_module("botocore")
        session = boto3.session.Session()
        options: dict[str, Any] = {"retries": {"total_max_attempts": 1}, "max_pool_connections": 32}
        if session.get_credentials() is None:
            options["signature_version"] = botocore.UNSIGNED  # a public bucket
        config = import_module("botocore.config").Config(connect_timeout=timeout, read_timeout=timeout, **options)
        self._client = session.client("s3", config=config)
        self._refused = import_module("botocore.exceptions").ClientError

    def _ask(self, method: str, url: str, arguments: dict[str, Any]) -> dict[str, Any]:
        try:
            answer: dict[str, Any] = getattr(self._client, method)(**arguments)
            return answer
        except self._refused as error:
            _check_status(int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500)), url)
            raise

    def stat(self, url: str) -> Stat:
        answer = self._ask("head_object", url, _place(url))
        return Stat(int(answer["ContentLength"]), str(answer.get("ETag", "")))

    def stream(self, url: str, start: int, stop: int, stat: Stat) -> Iterator[bytes]:
        condition = {"IfMatch": stat.mark} if stat.mark else {}
        answer = self._ask("get_object", url, {**_place(url), **condition, "Range": f"bytes={start}-{stop - 1}"})
        with closing(answer["Body"]) as body:
            if str(answer.get("ETag", "")) != stat.mark:
                raise changed(url)
            yield from body.iter_chunks(PIECE)

    def glob(self, pattern: str) -> list[str]:
        place = _place(pattern)
        bucket, key = place["Bucket"], place["Key"]
        asked: dict[str, Any] = {"Bucket": bucket, "Prefix": GLOB.split(key)[0]}
        found: list[str] = []
        while True:
            answer = self._ask("list_objects_v2", pattern, asked)
            found += [each["Key"] for each in answer.get("Contents", [])]
            if not answer.get("IsTruncated"):
                break
            asked["ContinuationToken"] = answer["NextContinuationToken"]
        deep = "**" in key
        matches = (each for each in found if fnmatch.fnmatchcase(each, key))
        return [f"s3://{bucket}/{each}" for each in matches if deep or each.count("/") == key.count("/")]


def _place(url: str) -> dict[str, str]:
    bucket, _, key = url.partition("://")[2].partition("/")
    return {"Bucket": bucket, "Key": key}


class _Fsspec:
    """Any other store that has a file system of fsspec."""

    def __init__(self, url: str) -> None:
        self._files, _ = import_module("fsspec").core.url_to_fs(url)

    def stat(self, url: str) -> Stat:
        try:
            info = self._files.info(url)
        except (FileNotFoundError, PermissionError) as error:
            _check_status(404 if isinstance(error, FileNotFoundError) else 403, url)
            raise
        mark = next((str(info[name]) for name in _MARKS if info.get(name)), "")
        return Stat(int(info["size"]), mark)

    def stream(self, url: str, start: int, stop: int, stat: Stat) -> Iterator[bytes]:
        if self.stat(url) != stat:
            raise changed(url)
        for begin in range(start, stop, BLOCK):
            yield self._files.cat_file(url, start=begin, end=min(begin + BLOCK, stop))

    def glob(self, pattern: str) -> list[str]:
        return [str(self._files.unstrip_protocol(path)) for path in self._files.glob(pattern)]
