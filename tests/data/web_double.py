"""A web server for tests, with the faults that real ones have."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.server
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

LOGIN = "user:secret-word"


@dataclass
class Web:
    """What the server has, and what it does.

    Attributes:
        files: contents by path.
        faults: by path, called with the number of requests before; returns a fault or "".
        requests: (method, path with query, range) as they came.
    """

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    faults: dict[str, Callable[[int], str]] = field(default_factory=dict)
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    needs_login: bool = False


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers for the server's `web`."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.send_error(403)  # As for an address that was signed for reading.

    def do_GET(self) -> None:
        web = self.server.web  # type: ignore[attr-defined]
        path = unquote(urlsplit(self.path).path)
        number = sum(unquote(urlsplit(asked).path) == path for _, asked, _ in web.requests)
        web.requests.append((self.command, self.path, self.headers.get("Range", "")))
        fault = web.faults.get(path, lambda _: "")(number)
        login = f"Basic {base64.b64encode(LOGIN.encode()).decode()}"
        if web.needs_login and self.headers.get("Authorization") != login:
            self.send_error(401)
        elif fault.isdigit():
            self.send_error(int(fault))
        elif fault.startswith("to "):
            self.send_response(302)
            self.send_header("Location", fault.removeprefix("to "))
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif path not in web.files:
            self.send_error(404)
        else:
            self._send(path, fault)

    def _send(self, path: str, fault: str) -> None:
        web = self.server.web  # type: ignore[attr-defined]
        content = web.files[path]
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        begin, end = 0, len(content)
        if match and "no ranges" not in fault:
            begin, end = int(match[1]), min(int(match[2] or len(content)) + 1, len(content))
            if begin >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(content)}")
        else:
            self.send_response(200)
        if "no length" not in fault:
            self.send_header("Content-Length", str(end - begin))
        if fault.startswith("encoding "):
            self.send_header("Content-Encoding", fault.removeprefix("encoding "))
        self.send_header("ETag", web.versions.get(path, f'"{hashlib.sha256(content).hexdigest()[:16]}"'))
        if "no length" in fault:
            self.close_connection = True
        self.end_headers()
        sent = content[begin:end]
        if fault.startswith("cut "):
            # At a place of the file, whichever part of it was asked for.
            sent = sent[: max(0, int(fault.removeprefix("cut ")) - begin)]
            self.close_connection = True
        if fault == "slow":
            time.sleep(0.5)
        with contextlib.suppress(ConnectionError):  # The client may have seen enough.
            self.wfile.write(sent)


def start(web: Web) -> http.server.ThreadingHTTPServer:
    """Serve on loopback until `shutdown`."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.web = web  # type: ignore[attr-defined]
    web.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    return server
