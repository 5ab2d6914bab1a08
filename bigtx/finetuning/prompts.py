"""The model's input for generation: a text to continue, or a prompt or chat in the format of fine-tuning."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bigtx.config.schema import FinetuneConfig, RunConfig
from bigtx.config.schema.tasks import ANSWERING
from bigtx.finetuning.tasks.chats import ChatFormat
from bigtx.model.write import Prompt, plain_prompts
from bigtx.tokenizer.chat import ASSISTANT
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.utils.errors import DataError


@dataclass(frozen=True)
class Read:
    """A prompt or a chat in the form that a model reads.

    Attributes:
        num_left_out: the number of the oldest messages of a chat that are not read.
        remark: a predicate such as "is too long: ...", if a part is not read; else "".
    """

    prompt: Prompt
    num_left_out: int = 0
    remark: str = ""


def read_prompt(
    config: RunConfig,
    tokenizer: Tokenizer,
    prompt: str | Sequence[Mapping[str, Any]],
    *,
    raw: bool,
    max_new_tokens: int,
) -> Read:
    """Read a prompt or a chat.

    Args:
        prompt: a chat, for a run that was trained on chats; or a text. A model that was fine-tuned to answer treats it
            as a user's message; other models continue it.
        raw: continue the text in any case.
        max_new_tokens: the tokens to reserve for the answer to a chat, at most half of the model's window.

    Raises:
        DataError: the text has half a surrogate pair, or the chat cannot be answered.
    """
    if isinstance(config, FinetuneConfig) and config.task in ANSWERING and not raw:
        return _read_chat(config, tokenizer, prompt, max_new_tokens)
    assert isinstance(prompt, str)
    (read,) = plain_prompts(config.model, tokenizer, [prompt])
    length, window = len(read.ids), config.model.max_sequence_length
    remark = f"has {length:,} tokens; the model reads the last {window:,} (model.max_sequence_length)"
    return Read(read, remark=remark if length > window else "")


def _read_chat(
    config: FinetuneConfig, tokenizer: Tokenizer, prompt: str | Sequence[Mapping[str, Any]], max_new_tokens: int
) -> Read:
    """Return the ids in the format of training, with enough tokens left for an answer."""
    window = config.model.max_sequence_length
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, too_long="truncate"))
    chat_format = ChatFormat(config, tokenizer, window)
    parts = chat_format.parts(prompt, learn=False)
    if not isinstance(prompt, str) and (not parts or parts[-1].role == ASSISTANT):
        raise DataError(
            "the chat has no message to answer: it is empty, or the last message is the assistant's; end it with a "
            "message of the role user"
        )
    reserved = [tokenizer.end_id] * min(max_new_tokens, window // 2)
    chat = chat_format.fit(parts, [reserved])
    lost = []
    if chat.num_left_out:
        messages = "message is" if chat.num_left_out == 1 else f"{chat.num_left_out:,} messages are"
        lost.append(f"its oldest {messages} not read")
    if chat.lost_start:
        lost.append("the beginning of its last message is not read")
    limit = f"the model reads {window:,} tokens, an answer included (model.max_sequence_length)"
    remark = f"is too long: {' and '.join(lost)}; {limit}" if lost else ""
    return Read(Prompt(chat.prompt, goes_on=False), chat.num_left_out, remark)
