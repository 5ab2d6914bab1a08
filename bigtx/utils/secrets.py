"""Removal of secrets from everything that a run writes.

A secret is known by its key (`api_key`, `HF_TOKEN`, `password`), by its shape (an AWS key id, a private key, a
password inside a URL), or because the environment holds it under such a key (the value of WANDB_API_KEY, say).
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

HIDDEN = "<hidden>"

# A count of tokens is not a secret: `max_tokens`, `tokenizer` and `pad_token_id` must not match, `HF_TOKEN` must.
_SECRET_KEY = re.compile(
    r"(api|access|secret|private|signing|encryption|account)[-_]?key(?!s?_?(path|file))|secret|passw(or)?d|passphrase"
    r"|credential|(^|[-_./])(auth|bearer|access|refresh|id|session|security)?[-_]?token$|(^|[-_./])(pw|pwd|jwt|sas)$",
    re.IGNORECASE,
)
_SPECIAL_TOKEN_KEY = re.compile(r"(pad|bos|eos|unk|mask|sep|cls|begin|end|image|special)[-_]token$", re.IGNORECASE)

_SECRET_SHAPE = re.compile(
    r"\b(AKIA|ASIA)[0-9A-Z]{16}\b"
    r"|\bhf_[A-Za-z0-9]{20,}|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}|\bglpat-[\w-]{16,}"
    r"|\bsk-[\w-]{20,}|\bxox[abprs]-[\w-]{10,}|\bAIza[\w-]{30,}|\bwandb_v\d_\w{20,}"
    r"|\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]{8,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(-----END [A-Z ]*PRIVATE KEY-----|$)"
    r"|(?<=://)[^/\s:@]*:[^/\s@]+(?=@)"
    r"|(?<=[?&])[\w.-]*?(signature|credential|sig|token|secret|passw(or)?d|pwd|api[-_]?key|auth)=[^&\s]+"
    r"|(?<=\bbearer\s)[\w.~+/-]{16,}=*|(?<=\bauthorization:\sbasic\s)[\w+/-]+=*",
    re.DOTALL | re.IGNORECASE,
)
# Options in a command line, a config or JSON: --api-key VALUE, password: VALUE, "token": "VALUE". A key begins where a
# word begins, so that the search does not start at each letter of a long word.
_OPTION = re.compile(r"(?<![\w.-])(?P<key>[\w.-]*[A-Za-z_])(?P<sign>[\"']?\s*[=:]\s*|\s+)")
_VALUE = re.compile(r"(?P<quote>[\"'])?(?P<value>(?(quote)[^\"'\n]{8,}|(?!\()[^\s,;'\"]{8,}))")

_SHORTEST_SECRET = 8


def is_secret_key(key: str) -> bool:
    """Return whether a setting or variable of this name is taken to hold a secret."""
    return bool(_SECRET_KEY.search(key)) and not _SPECIAL_TOKEN_KEY.search(key)


def scrub(value: Any) -> Any:
    """Return a copy of nested dicts, lists and texts in which every secret is replaced by `<hidden>`.

    Numbers, booleans and None are returned as they are, with any key.
    """
    return _scrub(value, _environment_secrets())


def scrub_text(text: str) -> str:
    """Replace secrets as `scrub` does, in one text, e.g. a line of a log or a command line."""
    return _scrub_text(text, _environment_secrets())


def _environment_secrets() -> list[str]:
    return _secrets_among(tuple(os.environ.items()))


@functools.lru_cache(maxsize=1)
def _secrets_among(variables: tuple[tuple[str, str], ...]) -> list[str]:
    # PWD is every shell's working folder, and all paths below it would be hidden.
    values = [value for key, value in variables if key != "PWD" and _is_secret_variable(key)]
    # In a URL and in JSON, a secret may be written in another way.
    forms = {form for value in values for form in (value, quote(value, safe=""), json.dumps(value)[1:-1])}
    # Where one secret contains another, the longer one goes first.
    return sorted((form for form in forms if len(form) >= _SHORTEST_SECRET), key=len, reverse=True)


def _is_secret_variable(key: str) -> bool:
    # Among settings, `key` is also the name of an entry; a variable such as OPENAI_KEY holds one.
    return is_secret_key(key) or key.upper().endswith(("_KEY", "_PAT", "CONNECTION_STRING"))


def _scrub(value: Any, secrets: list[str]) -> Any:
    if isinstance(value, Mapping):
        return {_scrub(key, secrets): _scrub_member(key, member, secrets) for key, member in value.items()}
    if isinstance(value, (list, tuple)):
        # In a command line, ["--password", "..."], the previous option says what the value is.
        options = ["", *(member if str(member).startswith("--") else "" for member in value)]
        return [_scrub_member(option, member, secrets) for option, member in zip(options, value, strict=False)]
    return _scrub_text(value, secrets) if isinstance(value, str) else value


def _scrub_member(key: Any, value: Any, secrets: list[str]) -> Any:
    is_secret = isinstance(key, str) and "=" not in key and is_secret_key(key.lstrip("-"))
    return HIDDEN if is_secret and isinstance(value, str) and value else _scrub(value, secrets)


def _scrub_text(text: str, secrets: list[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    return _hide_options(_SECRET_SHAPE.sub(HIDDEN, text))


def _hide_options(text: str) -> str:
    """Return the text with the values of secret options hidden."""
    parts, place = [], 0
    while option := _OPTION.search(text, place):
        value = _VALUE.match(text, option.end()) if _is_of_secret(option) else None
        if value:
            parts += [text[place : value.start("value")], HIDDEN]
            place = value.end()
        else:
            # What follows an ordinary word may be an option itself: "with password=...".
            parts.append(text[place : option.end("key")])
            place = option.end("key")
    return "".join([*parts, text[place:]])


def _is_of_secret(option: re.Match[str]) -> bool:
    # Prose has a word after a word ("the password was"): without a sign, only what looks like an option counts.
    is_option = option["sign"].strip() or option["key"].startswith("--")
    return bool(is_option) and is_secret_key(option["key"].lstrip("-"))
