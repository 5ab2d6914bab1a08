"""What a chat may consist of, before it becomes ids."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from bigtx.utils.errors import DataError

ASSISTANT = "assistant"
"""The role that a model speaks in."""


def check_messages(messages: Sequence[Mapping[str, Any]], roles: Collection[str]) -> None:
    """Refuse what is no chat.

    Args:
        roles: that the tokenizer has a piece for.

    Raises:
        DataError: there is no message, or one lacks a known role or a text.
    """
    known = ", ".join(roles)
    if not isinstance(messages, (list, tuple)) or not messages:
        raise DataError(
            f"A chat is a list of messages, each with a role and a content, and has at least one; not {messages!r:.80}."
        )
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping):
            raise DataError(f"Message {number} of a chat is {message!r:.80}; it has to have a role and a content.")
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or role not in roles:
            raise DataError(f"Message {number} of a chat has the role {role!r:.80}; this tokenizer knows {known}.")
        if not isinstance(content, str):
            raise DataError(
                f"Message {number} of a chat ({role}) has the content {content!r:.80}; it has to be a text."
            )
