"""The chat format of `Tokenizer.encode_chat` as the Jinja template that Hugging Face tokenizers render chats with."""

from __future__ import annotations

import json

from bigtx.tokenizer.tokenizer import Tokenizer

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


def chat_template(tokenizer: Tokenizer) -> str | None:
    """The template; None for a tokenizer without chat roles."""
    if not tokenizer.role_ids:
        return None
    # JSON's strings and lists are Jinja's too.
    roles = json.dumps(list(tokenizer.role_ids))
    end = json.dumps(tokenizer.id_to_piece(tokenizer.end_id), ensure_ascii=False)
    return f"{{%- set roles = {roles} %}}\n{{%- set end = {end} %}}\n{_FORMAT}"
