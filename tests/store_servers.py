"""A web server on the loopback that misbehaves as it is told."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from werkzeug.exceptions import NotFound
from werkzeug.serving import WSGIRequestHandler, make_server
from werkzeug.utils import send_file
from werkzeug.wrappers import Response

App = Callable[[dict[str, Any], Any], Iterable[bytes]]


class Store:
    """What a server does, and what it was asked."""

    def __init__(self, app: App) -> None:
        self.app = app
        self.url = ""
        self.asked: list[str] = []  # "GET /name bytes=0-9"
        self.fault: Callable[[int], str] = lambda number: ""  # of the n-th request: drop, stall, or an HTTP status
        self.until = threading.Event()  # ends stalls
        self._lock = threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        with self._lock:
            asked = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']} {environ.get('HTTP_RANGE', '')}"
            fault = self.fault(len(self.asked))
            self.asked.append(asked.strip())
        if fault.isdigit():
            return Response("no", int(fault))(environ, start_response)
        answer = self.app(environ, start_response)
        whole = b"".join(answer)
        getattr(answer, "close", bool)()
        return self._body(whole, fault)

    def _body(self, whole: bytes, fault: str) -> Iterator[bytes]:
        if not fault:
            yield whole
            return
        yield whole[: len(whole) // 2]
        if fault == "stall":
            self.until.wait(20)


class _Quiet(WSGIRequestHandler):
    def log(self, type: str, message: str, *args: Any) -> None:
        pass


@contextmanager
def serving(app: App) -> Iterator[Store]:
    """The server, until the block ends."""
    store = Store(app)
    server = make_server("127.0.0.1", 0, store, threaded=True, request_handler=_Quiet)
    store.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield store
    finally:
        store.until.set()
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def s3(bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Store, Any]]:
    """An S3 server with an empty bucket, which the environment names, and a client of boto3's for it."""
    import boto3
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "of-a-test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with serving(DomainDispatcherApplication(create_backend_app)) as store:
        monkeypatch.setenv("AWS_ENDPOINT_URL", store.url)
        client = boto3.client("s3")
        client.create_bucket(Bucket=bucket)
        yield store, client
        client.close()


def files(folder: Path, ranges: bool = True) -> App:
    """The files of a folder, and a page that lists it."""

    def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        path = folder / environ["PATH_INFO"].strip("/")
        if path.is_dir():
            links = "".join(f'<a href="{each.name}">{each.name}</a>' for each in sorted(path.iterdir()))
            return Response(links, mimetype="text/html")(environ, start_response)
        if not path.is_file():
            return NotFound()(environ, start_response)
        if not ranges:
            environ.pop("HTTP_RANGE", None)
        return send_file(path, environ)(environ, start_response)

    return app
