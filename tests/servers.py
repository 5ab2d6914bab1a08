"""A web server of a folder that knows ranges and can be made to fail."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

Fault = Callable[["Handler", bytes], bytes | None]
"""Given the answer's bytes: others instead, or None if it has answered itself."""


@dataclass
class Served:
    """A running server.

    Attributes:
        requests: path and range of all requests for bytes, in order.
        faults: by the end of a path; each is asked about every answer for it.
        busy, most_at_once: requests that are being answered, and the most that ever were.
    """

    url: str
    requests: list[tuple[str, str]] = field(default_factory=list)
    faults: dict[str, Fault] = field(default_factory=dict)
    busy: int = 0
    most_at_once: int = 0

    def paths(self) -> list[str]:
        """Paths of all requests but those that only ask for a size."""
        return [path for path, part in self.requests if part != "bytes=0-0"]


class Handler(BaseHTTPRequestHandler):
    folder: Path
    served: Served
    lock: threading.Lock

    def do_GET(self) -> None:
        with self.lock:
            self.served.requests.append((self.path, self.headers.get("Range", "")))
            self.served.busy += 1
            self.served.most_at_once = max(self.served.most_at_once, self.served.busy)
        try:
            # A client may have been killed, or have had enough.
            with suppress(BrokenPipeError, ConnectionResetError):
                self.answer()
        finally:
            with self.lock:
                self.served.busy -= 1

    def answer(self) -> None:
        path = self.folder / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        content = path.read_bytes()
        size = len(content)
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first = int(match[1]) if match else 0
        last = min(int(match[2]), size - 1) if match and match[2] else size - 1
        if match and first >= size:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{size}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        part: bytes | None = content[first : last + 1]
        for name, fault in self.served.faults.items():
            if self.path.endswith(name) and part is not None:
                part = fault(self, part)
        if part is None:
            return
        self.send_response(206 if match else 200)
        if match:
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.send_header("Content-Length", str(last - first + 1))
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def first(count: int, fault: Fault) -> Fault:
    """A fault of the first answers with bytes of more than one, which goes away."""
    left = [count]

    def sometimes(handler: Handler, content: bytes) -> bytes | None:
        if len(content) < 2 or not left[0]:
            return content
        left[0] -= 1
        return fault(handler, content)

    return sometimes


def flipped(_: Handler, content: bytes) -> bytes:
    """A bit of another value in the middle of all but single bytes."""
    place = len(content) // 2
    return content if len(content) < 2 else content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def cut(_: Handler, content: bytes) -> bytes:
    """Half of what was announced."""
    return content[: max(1, len(content) // 2)]


def status(code: int) -> Fault:
    """An error instead of an answer."""

    def answer(handler: Handler, _: bytes) -> None:
        handler.send_error(code)

    return answer


@contextmanager
def serve(folder: Path) -> Iterator[Served]:
    """Serve a folder on a free port of this machine."""
    handler = type("HandlerOfFolder", (Handler,), {"folder": folder, "lock": threading.Lock()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    served = Served(f"http://127.0.0.1:{server.server_address[1]}")
    handler.served = served  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
