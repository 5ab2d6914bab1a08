"""Places written as URLs: which of them bigtx reads. Imports nothing, so that a config can be checked with it."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

PROTOCOLS = ("http", "https", "s3", "gs")
"""Protocols that bigtx reads."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:(//|:)|pipe:")


def is_url(place: str) -> bool:
    """Return whether a place is meant as a URL, one that bigtx reads or not; all else are paths."""
    return _URL.match(place) is not None


def url_problem(url: str) -> str | None:
    """Return why bigtx does not read a URL, as a phrase; None if it does."""
    protocol, _, rest = url.partition(":")
    if protocol == "file":
        return "is a file of this machine; write its plain path"
    if "::" in url or protocol not in PROTOCOLS or not rest.startswith("//"):
        return f"is no URL that bigtx reads; write one that begins with {', '.join(f'{name}://' for name in PROTOCOLS)}"
    parts = urlsplit(url)
    if not parts.netloc:
        return "names no host or bucket"
    if "@" in parts.netloc:
        return "holds a name or password, which configs and logs would show; put them into ~/.netrc"
    return None
