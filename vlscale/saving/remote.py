"""Checkpoints in a store: S3 by boto3, what else fsspec knows by its file systems.

    URL/step_00001000/    rank_00000.safetensors ... state.json manifest.json
    URL/latest            the name of the newest one
    URL/config.yaml ...   what a run needs to go on elsewhere

A store has no renames. A checkpoint counts from its `manifest.json` on, which is written after all other files and
removed before any of them; a store shows an object whole or not at all.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from vlscale.data.storage.stores import scheme, shown
from vlscale.errors import ConfigError
from vlscale.saving.pieces import Writable
from vlscale.saving.targets import LATEST, MANIFEST, PREFIX, Listed, state_and_manifest, step_name, to_prune

PART = 64 * 2**20  # bytes of S3's parts; they grow, as there may be 10,000
GROW = 1000  # parts after which they double


class Files(Protocol):
    """What is asked of a store; names are relative to the run's URL."""

    def find(self, prefix: str) -> dict[str, int]:
        """{name: bytes} of all that begin so."""
        ...

    def put(self, name: str, content: bytes) -> None:
        """Write a small object."""
        ...

    def create(self, name: str) -> AbstractContextManager[Writable]:
        """An object of any size; not there if the block fails."""
        ...

    def get(self, name: str, path: Path) -> None:
        """An object to a file."""
        ...

    def remove(self, names: Iterable[str]) -> None:
        """Objects, of which some may be absent."""
        ...

    def forget(self, prefix: str, but: str) -> None:
        """Give back the room of objects that begin so, and not like `but`, whose writer was killed."""
        ...


class Remote:
    """A run's checkpoints under a URL. See `targets.Target`; all that a store says no to is an OSError."""

    def __init__(self, url: str) -> None:
        """ConfigError for a URL of no kind that is known, or if a package for it is absent."""
        if not scheme(url):
            raise ConfigError(f"checkpoint.to '{url}' is no URL; write one such as s3://bucket/run, or null for --out")
        if scheme(url) in ("file", "local"):  # fsspec neither syncs these files nor shows them at once
            raise ConfigError(f"checkpoint.to '{url}' is no store; leave it out: --out is the folder of checkpoints")
        self.place = shown(url).rstrip("/")
        self._files = _open(url.rstrip("/"), self.place)

    def steps(self) -> list[int]:
        """See `Target.steps`."""
        whole = [name.split("/")[0] for name in self._found(PREFIX) if name.endswith(f"/{MANIFEST}")]
        return sorted(int(name.removeprefix(PREFIX)) for name in whole if name.removeprefix(PREFIX).isdigit())

    @contextmanager
    def create(self, step: int, name: str) -> Iterator[Writable]:
        """See `Target.create`."""
        with self._asking():
            self._files.remove([f"{step_name(step)}/{MANIFEST}"])  # of a broken or given-up one of the same step
            with self._files.create(f"{step_name(step)}/{name}") as file:
                yield file

    def commit(self, step: int, files: Mapping[str, Listed], state: Mapping[str, Any]) -> None:
        """See `Target.commit`."""
        with self._asking():
            there = self._files.find(f"{step_name(step)}/")
            for name, (size, _) in files.items():
                if there.get(f"{step_name(step)}/{name}") != size:
                    place = f"{self.place}/{step_name(step)}/{name}"
                    raise OSError(
                        f"{place} is not there for rank 0; checkpoint.to must be a store that all ranks share"
                    )
            for name, text in state_and_manifest(files, state).items():
                self._files.put(f"{step_name(step)}/{name}", text.encode())

    def keep(self, name: str, text: str) -> None:
        """A file of the run beside its checkpoints."""
        with self._asking():
            self._files.put(name, text.encode())

    def discard(self, step: int) -> None:
        """See `Target.discard`."""
        with suppress(OSError):
            self._remove(step)

    def clear(self, step: int) -> None:
        """See `Target.clear`."""
        with suppress(OSError):
            begun = {name.split("/")[0] for name in self._found(PREFIX)}
            for name in begun - {step_name(each) for each in (*self.steps(), step)}:
                with self._asking():
                    self._files.remove(self._files.find(f"{name}/"))
            with self._asking():
                self._files.forget(PREFIX, but=f"{step_name(step)}/")

    def prune(self, step: int, keep: int, keep_every: int) -> None:
        """See `Target.prune`."""
        with suppress(OSError):  # what cannot be removed harms nobody
            for each in to_prune(self.steps(), step, keep, keep_every):
                self._remove(each)

    def name_latest(self, step: int) -> None:
        """See `Target.name_latest`."""
        with self._asking():
            self._files.put(LATEST, f"{step_name(step)}\n".encode())

    def go_back(self, step: int) -> None:
        """See `Target.go_back`."""
        self.name_latest(step)
        for each in self.steps():
            if each > step:
                self._remove(each)

    def room(self) -> str:
        """See `Target.room`."""
        return "the store does not tell how much is free"

    def get(self, name: str, path: Path) -> None:
        """A file under the URL, to a local one."""
        with self._asking():
            self._files.get(name, path)

    def kept(self, names: Iterable[str]) -> list[str]:
        """Those that `keep` wrote."""
        there = self._found("")
        return [name for name in names if name in there]

    def _found(self, prefix: str) -> dict[str, int]:
        with self._asking():
            return self._files.find(prefix)

    def _remove(self, step: int) -> None:
        with self._asking():
            self._files.remove([f"{step_name(step)}/{MANIFEST}"])
            self._files.remove(self._files.find(f"{step_name(step)}/"))

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """What the store, or what asks it, raises is an OSError; without the URL's secrets."""
        try:
            yield
        except (OSError, AssertionError, GeneratorExit, KeyboardInterrupt, SystemExit):
            raise
        except Exception as error:
            raise OSError(f"{self.place}: {type(error).__name__}: {str(error)[:300]}") from error


def _open(url: str, place: str) -> Files:
    kind = scheme(url)
    try:
        return _S3(url) if kind == "s3" else _Fsspec(url)
    except ImportError as error:
        advice = "pip install 'vlscale[stores]'" if kind == "s3" else "install it"
        raise ConfigError(f"{kind}:// needs a package that is absent ({error}); {advice}") from error
    except ValueError as error:
        raise ConfigError(f"'{place}' begins with no kind of store we know; write s3://, gs://, ...") from error


class _Fsspec:
    """Any store with a file system of fsspec that shows files when they are closed."""

    def __init__(self, url: str) -> None:
        self._fs, root = import_module("fsspec").core.url_to_fs(url)
        self._root = str(root).rstrip("/") + "/"

    def find(self, prefix: str) -> dict[str, int]:
        self._fs.invalidate_cache()
        folder = self._root + prefix.rpartition("/")[0]
        try:
            found = {str(name): each["size"] for name, each in self._fs.find(folder, detail=True).items()}
        except FileNotFoundError:
            return {}
        return {name[len(self._root) :]: found[name] for name in found if name.startswith(self._root + prefix)}

    def put(self, name: str, content: bytes) -> None:
        with self.create(name) as file:
            file.write(memoryview(content))

    @contextmanager
    def create(self, name: str) -> Iterator[Writable]:
        path = self._root + name
        self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        file = self._fs.open(path, "wb", autocommit=False)
        try:
            yield file
        except BaseException:
            with suppress(Exception):
                file.discard()
            raise
        file.close()
        file.commit()

    def get(self, name: str, path: Path) -> None:
        self._fs.get_file(self._root + name, str(path))

    def remove(self, names: Iterable[str]) -> None:
        for name in names:
            with suppress(FileNotFoundError):
                self._fs.rm_file(self._root + name)

    def forget(self, prefix: str, but: str) -> None:
        """There is no way to ask."""


class _S3:
    """S3 and what speaks like it, by `boto3`: its environment variables, profiles and roles."""

    def __init__(self, url: str) -> None:
        boto3 = import_module("boto3")
        config = import_module("botocore.config").Config(retries={"mode": "standard", "total_max_attempts": 8})
        self._client = boto3.session.Session().client("s3", config=config)
        self._bucket, _, root = url.partition("://")[2].partition("/")
        self._root = f"{root}/" if root else ""

    def _at(self, name: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._root + name}

    def find(self, prefix: str) -> dict[str, int]:
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=self._root + prefix)
        found = [each for page in pages for each in page.get("Contents", ())]
        return {each["Key"][len(self._root) :]: each["Size"] for each in found}

    def put(self, name: str, content: bytes) -> None:
        self._client.put_object(**self._at(name), Body=content)

    @contextmanager
    def create(self, name: str) -> Iterator[Writable]:
        upload = _Upload(self._client, self._at(name))
        try:
            yield upload
            upload.close()
        except BaseException:
            with suppress(Exception):
                upload.abort()
            raise

    def get(self, name: str, path: Path) -> None:
        try:
            self._client.download_file(self._bucket, self._root + name, str(path))
        except self._client.exceptions.ClientError as error:
            if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") == 404:
                raise FileNotFoundError(f"s3://{self._bucket}/{self._root}{name} is not there") from error
            raise

    def remove(self, names: Iterable[str]) -> None:
        for name in names:
            self._client.delete_object(**self._at(name))

    def forget(self, prefix: str, but: str) -> None:
        pages = self._client.get_paginator("list_multipart_uploads")
        for page in pages.paginate(Bucket=self._bucket, Prefix=self._root + prefix):
            for each in page.get("Uploads", ()):
                if not each["Key"].startswith(self._root + but):
                    at = {"Bucket": self._bucket, "Key": each["Key"], "UploadId": each["UploadId"]}
                    self._client.abort_multipart_upload(**at)


class _Upload:
    """An object of S3 that is sent in parts as it is written; it is there once it is closed."""

    def __init__(self, client: Any, at: dict[str, str]) -> None:
        self._client = client
        self._at = {**at, "UploadId": client.create_multipart_upload(**at)["UploadId"]}
        self._parts: list[dict[str, Any]] = []
        self._waiting = io.BytesIO()

    def write(self, data: memoryview, /) -> int:
        """Take bytes; a part is sent when it is full."""
        self._waiting.write(data)
        if self._waiting.tell() >= PART << (len(self._parts) // GROW):
            self._send()
        return len(data)

    def close(self) -> None:
        """Send what is left and show the object."""
        if self._waiting.tell() or not self._parts:
            self._send()
        self._client.complete_multipart_upload(**self._at, MultipartUpload={"Parts": self._parts})

    def abort(self) -> None:
        """Take back what was sent."""
        self._client.abort_multipart_upload(**self._at)

    def _send(self) -> None:
        number = len(self._parts) + 1
        body = self._waiting.getvalue()
        sent = self._client.upload_part(**self._at, PartNumber=number, Body=body)
        self._parts.append({"ETag": sent["ETag"], "PartNumber": number})
        self._waiting = io.BytesIO()
