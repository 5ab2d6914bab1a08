"""Files of object stores (S3 and compatible ones, Google Cloud Storage), by fsspec's file systems."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from bigtx.data.storage.remote import RefusedError, RemoteFile, TransientError, retried, scheme_of, without_secrets
from bigtx.utils.errors import DataError

Result = TypeVar("Result")

_PACKAGES = {"s3": ("s3fs", "S3FileSystem"), "gs": ("gcsfs", "GCSFileSystem")}
# Requests are retried here only, not by the library: its retries would multiply with these.
_SETTINGS: dict[str, dict[str, Any]] = {"s3": {"config_kwargs": {"retries": {"total_max_attempts": 1}}}, "gs": {}}
_VERSION_KEYS = ("ETag", "etag", "generation", "LastModified", "updated", "mtime")


@functools.cache
def file_system(scheme: str) -> Any:
    """Return fsspec's file system of `s3` or `gs`, with the keys that the provider's own tools find.

    Raises:
        DataError: its package is missing.
    """
    package, name = _PACKAGES[scheme]
    try:
        module = importlib.import_module(package)
    except ImportError as error:
        raise DataError(
            f"Access to {scheme}:// needs {package}, which is missing ({error.name}): pip install 'bigtx[{scheme}]'."
        ) from None
    found = getattr(module, name)(use_listings_cache=False, skip_instance_cache=True, **_SETTINGS[scheme])
    if scheme == "s3":
        found.retries = 1
    return found


def stat(url: str) -> tuple[int, str]:
    """Return the size in bytes and version of an object; size -1 for a folder.

    Raises:
        OSError: it does not exist, or cannot be reached.
    """
    return _described(_asked(url, lambda: file_system(scheme_of(url)).info(url)))


def find(folder: str) -> dict[str, tuple[int, str]]:
    """Return the size and version of all objects below a folder, by their URLs."""
    return _objects(folder, lambda: file_system(scheme_of(folder)).find(folder, detail=True))


def glob(pattern: str) -> dict[str, tuple[int, str]]:
    """Return the size (-1 for a folder) and version of all matches, by their URLs."""
    return _objects(pattern, lambda: file_system(scheme_of(pattern)).glob(pattern, detail=True))


def read_range(url: str, start: int | None, end: int | None) -> bytes:
    """Return an object's bytes, or those from start to end (exclusive), in one request.

    Raises:
        FileNotFoundError: there is no such object.
        TransientError: a retry may help.
        OSError: a retry does not help.
    """
    content: bytes = _answer(url, lambda: file_system(scheme_of(url)).cat_file(url, start=start, end=end))
    return content


def put(file: Path, url: str) -> None:
    """Upload a file, with retries, and compare the size that has arrived.

    Raises:
        OSError: it could not be uploaded.
    """

    def upload() -> None:
        system = file_system(scheme_of(url))
        _answer(url, lambda: system.put_file(str(file), url))
        arrived, _ = _described(_answer(url, lambda: system.info(url)))
        if arrived != file.stat().st_size:
            raise TransientError(f"{arrived:,} bytes arrived instead of {file.stat().st_size:,}")

    retried(upload, url)


class StoredFile(RemoteFile):
    """An object.

    Args:
        version: the version from `stat`; "" accepts any.
        seeks: whether the reader jumps in the file.

    Raises:
        OSError: it cannot be opened, or differs from the one that `stat` found.
    """

    def __init__(self, url: str, size: int, version: str, *, seeks: bool = False) -> None:
        super().__init__(url, size)
        if not seeks:
            self.chunk_bytes = 8 << 20  # Responses of object stores are slow.
        if version and stat(url) != (size, version):
            raise RefusedError("it was changed since it was listed")

    def fetch(self, buffer: memoryview) -> int:
        """Request exactly the bytes that the buffer can hold."""
        content = read_range(self.path, self.position, self.position + len(buffer))
        buffer[: len(content)] = content
        return len(content)


def _objects(url: str, call: Callable[[], dict[str, Any]]) -> dict[str, tuple[int, str]]:
    scheme = scheme_of(url)
    found = {f"{scheme}://{path}": _described(info) for path, info in _asked(url, call).items()}
    # Some tools mark a folder by an empty object.
    return {path: about for path, about in found.items() if not path.endswith("/")}


def _described(info: dict[str, Any]) -> tuple[int, str]:
    if info.get("type") == "directory":
        return -1, ""
    version = next((str(info[key]) for key in _VERSION_KEYS if info.get(key)), "")
    return int(info.get("size") or 0), version


def _asked(url: str, call: Callable[[], Result]) -> Result:
    return retried(lambda: _answer(url, call), url)


def _answer(url: str, call: Callable[[], Result]) -> Result:
    """Return the result of a call of the library; convert its errors to an OSError without secrets."""
    try:
        return call()
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no {url}") from None
    except DataError:
        raise
    except PermissionError as error:
        raise RefusedError(f"access is refused: {without_secrets(str(error), url)}") from None
    except Exception as error:
        said = without_secrets(f"{type(error).__name__}: {error}", url)
        if "Credentials" in type(error).__name__:
            raise RefusedError(
                f"no keys were found ({said}); set them up as for the provider's own tools, or for a public bucket "
                f"FSSPEC_{scheme_of(url).upper()}_ANON=true"
            ) from None
        raise TransientError(said) from None
