"""Files of web servers, by the standard library: streamed, and continued after a lost connection."""

from __future__ import annotations

import base64
import contextlib
import http
import http.client
import netrc
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

from bigtx.data.storage.remote import RefusedError, RemoteFile, TransientError, name_of, retried, without_secrets
from bigtx.utils import __version__

TIMEOUT_SECONDS = 60.0
"""The time that a server may take to respond."""

_TRANSIENT_STATUS = {408, 425, 429, 500, 502, 503, 504}
_SKIP_BYTES = 1 << 20
_ASKED_FOR_VERSION = 4
_MIRRORS = (
    "its server sends different versions of it in turn (ETag), as several mirrors with one name do, so bigtx "
    "cannot check whether its parts belong together; name one of the mirrors, or copy it and read the copy"
)
_ENCODINGS = {"gzip": (".gz", ".tgz"), "x-gzip": (".gz", ".tgz"), "zstd": (".zst", ".zstd", ".tzst"), "br": (".br",)}
"""The content encodings that a server may report for a file that is stored compressed, by the suffix of its name."""


def stat(url: str) -> tuple[int, str]:
    """Return the size in bytes and version (ETag, else the time of change) of a file.

    The first byte is requested, since a signed URL often does not allow HEAD requests.

    Raises:
        OSError: it cannot be reached, or the server does not report its size.
    """
    with retried(lambda: _open(url, 0, 1), url) as response:
        size = _total_size(response)
        if size is None:
            raise RefusedError("its server does not report its size; copy it and read the copy")
        return size, _version(response)


def read_range(url: str, start: int | None = None, end: int | None = None) -> bytes:
    """Return a file's bytes, or those from start to end (exclusive), in one request.

    Raises:
        FileNotFoundError: there is no such file.
        TransientError: a retry may help.
        OSError: a retry does not help, e.g. because the file ends before `end`.
    """
    with _sorted_errors(url), _open(url, start, end) as response:
        if start is not None and response.status != http.HTTPStatus.PARTIAL_CONTENT:
            raise RefusedError("its server does not send parts of files, or the file is shorter than expected")
        content: bytes = response.read()
        return content


class StoredFile(RemoteFile):
    """A file of a web server.

    Args:
        version: the version from `stat`; "" accepts any.
        seeks: refuse to skip bytes by reading them if the server does not support ranges.

    Raises:
        OSError: it cannot be opened, or differs from the file that `stat` found.
    """

    def __init__(self, url: str, size: int, version: str, *, seeks: bool = False) -> None:
        super().__init__(url, size)
        self._expected_version = version
        self._seeks = seeks
        self._response: Any = None
        self._response_position = 0

    def fetch(self, buffer: memoryview) -> int:
        """Read from the open response, or from a new one at the position."""
        try:
            if self._response is None or self._response_position != self.position:
                self._connect()
            count = self._response.readinto(buffer)
        except (OSError, http.client.HTTPException) as error:
            self._disconnect()
            raise _sorted_out(error, self.path) from None
        if not count:
            self._disconnect()
        self._response_position += count
        return count

    def close(self) -> None:
        """Close the connection."""
        self._disconnect()
        super().close()

    def _connect(self) -> None:
        self._disconnect()
        response = _open(self.path, self.position or None)
        self._response, self._response_position = response, self.position
        if self._expected_version and _version(response) != self._expected_version:
            self._disconnect()
            raise RefusedError(self._why_other_version())
        if _total_size(response) not in (None, self.size):
            raise RefusedError(f"it has {_total_size(response):,} bytes, but had {self.size:,} when it was listed")
        if self.position and response.status != http.HTTPStatus.PARTIAL_CONTENT:
            if self._seeks:
                raise RefusedError(
                    "its server cannot send parts of files, which parquet needs; copy it and read the copy"
                )
            self._skip(response)

    def _why_other_version(self) -> str:
        """Request it a few more times: a file that has its old version again was not changed, but is on several
        machines.
        """
        for _ in range(_ASKED_FOR_VERSION):
            with _open(self.path, 0, 1) as response:
                if _version(response) == self._expected_version:
                    return _MIRRORS
        return "it was changed since it was listed"

    def _skip(self, response: Any) -> None:
        left = self.position
        while left and (part := response.read(min(left, _SKIP_BYTES))):
            left -= len(part)
        if left:
            raise TransientError("the connection was lost")

    def _disconnect(self) -> None:
        if self._response is not None:
            self._response.close()
            self._response = None


class _Redirects(urllib.request.HTTPRedirectHandler):
    """A handler that follows redirects to web servers only."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if urlsplit(newurl).scheme.lower() not in ("http", "https"):
            raise RefusedError("its server redirects to another protocol, which is not followed")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener() -> urllib.request.OpenerDirector:
    # Built here, because the standard one opens file:, ftp: and data: too.
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _Redirects(),
    ):
        opener.add_handler(handler)
    return opener


def _open(url: str, start: int | None = None, end: int | None = None) -> Any:
    """Return the response of a server, 416 (for an empty file) included; an `http.client.HTTPResponse` or similar.

    Args:
        start, end: the bytes to request, `end` exclusive; None: from the first, to the last.
    """
    with _sorted_errors(url):
        request = _request(url)
        if start is not None:
            request.add_header("Range", f"bytes={start}-{'' if end is None else end - 1}")
        try:
            response = _unencoded(_opener().open(request, timeout=TIMEOUT_SECONDS), url)
        except urllib.error.HTTPError as error:
            if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                return error
            raise
        sent = response.headers.get("Content-Range", "")
        if response.status == http.HTTPStatus.PARTIAL_CONTENT and not sent.startswith(f"bytes {start or 0}-"):
            response.close()
            raise RefusedError("its server sends a part of it that was not requested")
        return response


def _unencoded(response: Any, url: str) -> Any:
    """Refuse a response whose bytes are not the file's."""
    encoding = (response.headers.get("Content-Encoding") or "identity").strip().lower()
    if encoding == "identity" or name_of(url).lower().endswith(_ENCODINGS.get(encoding, ())):
        return response
    response.close()
    raise RefusedError(
        f"its server sends it compressed (Content-Encoding: {encoding[:40]}), although the plain file was "
        "requested; switch that off for this file, or copy it with a program that decompresses it (curl --compressed) "
        "and read the copy"
    )


def _request(url: str) -> urllib.request.Request:
    parts = urlsplit(url)
    path = quote(parts.path, safe="/%:=&+,;@!$'()*~")
    headers = {"User-Agent": f"bigtx/{__version__}", "Accept-Encoding": "identity"}
    request = urllib.request.Request(urlunsplit((parts.scheme, parts.netloc, path, parts.query, "")), headers=headers)
    login = _login_from_netrc(parts.hostname or "")
    if login:
        # Not for redirects: another host must not get it.
        request.add_unredirected_header("Authorization", f"Basic {base64.b64encode(login.encode()).decode()}")
    return request


def _login_from_netrc(host: str) -> str:
    """Return `name:password` of a host in ~/.netrc; "" if it has none."""
    try:
        found = netrc.netrc().authenticators(host)
    except (OSError, netrc.NetrcParseError):
        return ""
    return f"{found[0]}:{found[2]}" if found else ""


@contextlib.contextmanager
def _sorted_errors(url: str) -> Iterator[None]:
    """Convert the errors of a request to temporary and permanent ones."""
    try:
        yield
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _sorted_out(error, url) from None


def _sorted_out(error: Exception, url: str) -> OSError:
    """Return the error as a temporary or a permanent one, without secrets."""
    if isinstance(error, (TransientError, RefusedError, FileNotFoundError)):
        return error
    if isinstance(error, urllib.error.HTTPError):
        # The server's message may contain the address of a redirect, with its keys.
        said = f"its server responds with {error.code} {http.client.responses.get(error.code, '')}".rstrip()
        error.close()
        if error.code in (http.HTTPStatus.NOT_FOUND, http.HTTPStatus.GONE):
            return FileNotFoundError(said)
        return TransientError(said) if error.code in _TRANSIENT_STATUS else RefusedError(said)
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(cause, ssl.SSLCertVerificationError):
        return RefusedError(f"its server's certificate is not trusted: {cause.verify_message}")
    if isinstance(cause, (ValueError, http.client.InvalidURL)):
        return RefusedError("its address is not valid")
    if isinstance(cause, http.client.HTTPException):
        return TransientError("the connection was lost")
    reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(cause)
    return TransientError(without_secrets(reason, url))


def _total_size(response: Any) -> int | None:
    """Return the bytes of the whole file, if the response says so."""
    if response.status in (http.HTTPStatus.PARTIAL_CONTENT, http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE):
        size = response.headers.get("Content-Range", "").rpartition("/")[2]
    else:
        size = response.headers.get("Content-Length", "")
    return int(size) if size.isdecimal() else None


def _version(response: Any) -> str:
    return response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
