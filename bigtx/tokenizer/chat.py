"""The content of a chat, and its format as a Jinja template for other programs."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from bigtx.utils.errors import DataError

ASSISTANT = "assistant"
"""The role of a model's answers."""

_FORMAT = """\
{%- for message in messages %}
{%- if message['role'] not in roles %}
{{- raise_exception('unknown role ' ~ message['role'] ~ '; this tokenizer knows ' ~ roles | join(', ')) }}
{%- endif %}
{{- '<|' + message['role'] + '|>' + message['content'] + end }}
{%- endfor %}
{%- if add_generation_prompt %}
{%- if 'assistant' not in roles %}
{{- raise_exception('there is no role assistant to answer in') }}
{%- endif %}
{{- '<|assistant|>' }}
{%- endif %}
"""


def check_messages(messages: Sequence[Mapping[str, Any]], roles: Collection[str]) -> None:
    """Refuse messages that are not a valid chat.

    Args:
        roles: the roles for which the tokenizer has a piece.

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
            raise DataError(f"Message {number} of a chat is {message!r:.80}; it needs a role and a content.")
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or role not in roles:
            raise DataError(f"Message {number} of a chat has the role {role!r:.80}; this tokenizer knows {known}.")
        if not isinstance(content, str):
            raise DataError(f"Message {number} of a chat ({role}) has the content {content!r:.80}; it must be a text.")


def chat_template(roles: Collection[str], end: str, begin: str = "") -> str:
    """Return the format of `Tokenizer.encode_chat` as a chat_template.jinja of Hugging Face tokenizers.

    Args:
        end: the piece that ends a message.
        begin: the first pieces of a chat.
    """
    # JSON's strings and lists are valid in Jinja too.
    names, quoted = json.dumps(list(roles)), json.dumps(end, ensure_ascii=False)
    first = f"{{{{- {json.dumps(begin, ensure_ascii=False)} }}}}\n" if begin else ""
    return f"{{%- set roles = {names} %}}\n{{%- set end = {quoted} %}}\n{first}{_FORMAT}"
