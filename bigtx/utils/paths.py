"""What a path or a URL names, for checks and messages. Imports nothing heavy."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urlsplit

PROTOCOLS = ("http", "https", "s3", "gs")
"""Protocols that bigtx reads."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:(//|:)|pipe:")


def is_url(place: str) -> bool:
    """Return whether a place is meant as a URL, whether bigtx reads it or not; all others are paths."""
    return _URL.match(place) is not None


def url_problem(url: str) -> str | None:
    """Return why bigtx does not read a URL, as a phrase; None if it does."""
    protocol, _, rest = url.partition(":")
    if protocol == "file":
        return "is a file of this machine; write its plain path"
    if "::" in url or protocol not in PROTOCOLS or not rest.startswith("//"):
        protocols = ", ".join(f"{name}://" for name in PROTOCOLS)
        return f"is not a URL that bigtx reads; write one that begins with {protocols}"
    parts = urlsplit(url)
    if not parts.netloc:
        return "names no host or bucket"
    if "@" in parts.netloc:
        return "contains a name or password, which configs and logs would show; put them into ~/.netrc"
    return None


MODEL = "a Hugging Face model"
MARKS = (
    ("a run", ("config.yaml", "environment.json")),
    ("a prepared corpus", ("train/manifest.json",)),
    ("a prepared corpus", ("validation/manifest.json",)),
    ("a tokenizer", ("bigtx_tokenizer.json",)),
    ("adapters in PEFT's format", ("adapter_config.json",)),
    (MODEL, ("config.json",)),
    ("a checkpoint or a split of a corpus", ("manifest.json",)),
)
"""Kinds of folders, the more certain ones first, and the files by which each is known."""


def kind_of_folder(folder: Path | str) -> str | None:
    """Return a folder's kind in words; None where its names do not show it."""
    for kind, names in MARKS:
        if all((Path(folder) / name).is_file() for name in names):
            return kind
    return None
