"""Prompts, chats and answers as ids; which of them carry loss; and the generation of answers.

chat format     <|system|> ... </s> <|user|> ... </s> <|assistant|> [ ... </s> ]      tokenizers with chat roles
plain format    prompt separator [ response </s> ]                                      other tokenizers

Both formats start with the begin ids that the tokenizer of an imported model puts before a text; other tokenizers have
none. The loss is on the part in brackets: the answers with their ends. If a chat is too long, its earliest turns are
left out completely, but a system prompt before them is kept. If the last turn alone is too long, its prompt loses its
beginning, down to half of the allowed length, and then its answer loses its end.
"""

from __future__ import annotations

import dataclasses
import hashlib
from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from bigtx.config.nodes import raise_problems
from bigtx.config.schema import FinetuneConfig, RunConfig
from bigtx.config.schema.tasks import ANSWERING
from bigtx.data.records.record import BadRecordError, Record
from bigtx.finetuning.tasks.task import Examples, Model, RecordTask, some_ids
from bigtx.model.decode import Sampling, decode_tokens
from bigtx.model.write import Prompt, plain_prompts
from bigtx.tokenizer.special import ASSISTANT
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.utils.errors import ConfigError, DataError

Message = Mapping[str, Any]
FIELDS_OF_CHATS = ("tools", "functions", "system")
"""Fields of a record that other programs read together with its chat."""
EMPTY: tuple[Any, ...] = (None, "", [], {})
"""Values without content."""


class Part(NamedTuple):
    """A part of the text before an answer: a message, or a prompt."""

    ids: list[int]
    role: str
    is_learned: bool
    """Whether the part is an earlier answer that carries loss."""


@dataclass(frozen=True, slots=True)
class Chat:
    """A prompt or a chat as ids, and answers to it.

    Attributes:
        prompt: the ids before the answer.
        is_learned: for each id of the prompt, whether it is part of an earlier answer that carries loss.
        answers: the ids of each answer, its end included.
        num_cut: the number of ids that were left out.
        num_left_out: the number of parts that were left out completely: the earliest turns.
        lost_start: whether the beginning of a too long last turn was cut, with its role and everything before it.
    """

    prompt: list[int]
    is_learned: list[bool]
    answers: list[list[int]]
    num_cut: int
    num_left_out: int
    lost_start: bool


def resolve_chat_format(config: FinetuneConfig, tokenizer: Tokenizer) -> FinetuneConfig:
    """Return the config with the format of chats that the tokenizer supports.

    Raises:
        ConfigError: the tokenizer does not support the format.
    """
    is_able = ASSISTANT in tokenizer.role_ids and not tokenizer.has_own_chat_template
    name = config.chat.format if config.chat.format != "auto" else "chat" if is_able else "plain"
    if name == "chat" and not is_able:
        why = (
            "has its own chat template, a program that bigtx does not run"
            if tokenizer.has_own_chat_template
            else f"has no chat role {ASSISTANT} (`bigtx tokenizer train` makes them, see chat_roles)"
        )
        raise ConfigError(f"chat.format=chat: the tokenizer {why}; write chat.format=plain")
    chat = dataclasses.replace(config.chat, format=name)
    raise_problems(chat.problems())
    return dataclasses.replace(config, chat=chat)


class ChatFormat:
    """The encoding of prompts, chats and answers in one format."""

    def __init__(self, config: FinetuneConfig, tokenizer: Tokenizer, max_length: int) -> None:
        """Args:
        config: a config whose format is resolved.
        max_length: the maximum number of ids of a chat with its answer.
        """
        self.settings, self.tokenizer, self.max_length = config.chat, tokenizer, max_length
        self.is_plain = config.chat.format == "plain"
        self.may_cut = config.data.too_long == "truncate"
        # Half of it is for the prompt, with the separator, or with an end and the role of the answer.
        self.min_length = 2 * (1 + len(tokenizer.encode(self.settings.separator))) if self.is_plain else 6

    def check(self, messages: Any, field: str) -> Sequence[Message]:
        """Return the messages of a chat.

        Raises:
            BadRecordError: the value is not a chat, or one of its answers is empty.
        """
        if self.is_plain:
            raise BadRecordError(
                f"the field {field!r} is a chat, and the format is plain (chat.format, or a tokenizer without chat "
                "roles): give a prompt and a response as texts"
            )
        try:
            self.tokenizer.encode_messages(messages)
        except DataError as error:
            raise BadRecordError(f"{field}: {error}") from None
        for number, message in enumerate(messages, 1):
            if message["role"] == ASSISTANT and not message["content"].strip():
                raise BadRecordError(f"{field}: message {number} ({ASSISTANT}) is empty")
        found: Sequence[Message] = messages
        return found

    def prompt(self, record: Record, field: str) -> str | Sequence[Message]:
        """Return the prompt of a record: a text or a chat.

        Raises:
            BadRecordError: the field is neither.
        """
        value = record.value(field)
        if isinstance(value, list):
            return self.check(value, field)
        return record.text(field, setting="data.fields.prompt")

    def parts(self, prompt: str | Sequence[Message], *, learn: bool) -> list[Part]:
        """Return the parts before an answer.

        Args:
            learn: whether earlier answers carry loss.
        """
        if isinstance(prompt, str):
            if self.is_plain:
                return [Part(self.tokenizer.encode(prompt + self.settings.separator), "", False)]
            prompt = [{"role": "user", "content": prompt}]
        if not prompt:
            return []
        encoded = self.tokenizer.encode_messages(prompt)
        return [
            Part(ids, message["role"], learn and message["role"] == ASSISTANT)
            for ids, message in zip(encoded, prompt, strict=True)
        ]

    def answer(self, field: str, text: str) -> list[int]:
        """Encode an answer, with its end id.

        Args:
            field: the field of the record that holds the answer.

        Raises:
            BadRecordError: the answer has no tokens.
        """
        return [*some_ids(self.tokenizer, field, text), self.tokenizer.end_id]

    def fit(self, parts: Sequence[Part], answers: Sequence[list[int]]) -> Chat:
        """Return a chat and answers to it, cut to the allowed length.

        Raises:
            BadRecordError: the chat is too long, and data.too_long=refuse.
        """
        begin = self.tokenizer.begin_ids
        role = [] if self.is_plain else [self.tokenizer.role_ids[ASSISTANT]]
        needed, limit = len(begin) + len(role) + max(map(len, answers), default=0), self.max_length
        total = sum(len(part.ids) for part in parts) + needed
        if total > limit and not self.may_cut:
            raise BadRecordError(
                f"{total:,} tokens, and {limit:,} are allowed (data.max_length); data.too_long=truncate cuts them"
            )
        kept_parts = _recent(parts, limit - needed)
        prompt = [token for part in kept_parts for token in part.ids]
        # The first id of a part, its role, is part of the input, so it carries no loss.
        is_learned = [part.is_learned and place > 0 for part in kept_parts for place in range(len(part.ids))]
        allowed = max(limit - needed, limit // 2 - len(role) - len(begin))
        lost_start = len(prompt) > allowed
        if lost_start:
            prompt, is_learned = prompt[len(prompt) - allowed :], is_learned[len(is_learned) - allowed :]
        prompt, is_learned = begin + prompt + role, [False] * len(begin) + is_learned + [False] * len(role)
        kept = [answer[: limit - len(prompt)] for answer in answers]
        num_cut = total - len(prompt) - max(map(len, kept), default=0)
        return Chat(prompt, is_learned, kept, num_cut, len(parts) - len(kept_parts), lost_start)


class ChatTask(RecordTask):
    """The base of tasks on chats."""

    def __init__(self, config: FinetuneConfig, tokenizer: Tokenizer) -> None:
        super().__init__(config, tokenizer)
        self.format = ChatFormat(config, tokenizer, self.max_length)
        self.require_length(self.format.min_length)

    @classmethod
    def resolve(cls, config: FinetuneConfig, tokenizer: Tokenizer, records: Sequence[Record]) -> FinetuneConfig:
        """Return the config with the format of chats and a head of tokens.

        Raises:
            ConfigError: the model is not a decoder, or the tokenizer does not support the format.
        """
        return super().resolve(resolve_chat_format(config, tokenizer), tokenizer, records)

    @abstractmethod
    def divide(self, record: Record, for_training: bool) -> tuple[Any, Any]:
        """Return the prompt or the chat of a record, and what answers it."""

    def shown(self, record: Record) -> str:
        """Return the prompt, or the chat before the answer."""
        prompt, _ = self.divide(record, for_training=False)
        if isinstance(prompt, str):
            return prompt
        return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def without_empty_answer(messages: Any) -> Any:
    """Return a chat for prediction without an empty last answer; other values are returned unchanged."""
    if isinstance(messages, list) and messages and isinstance(messages[-1], Mapping):
        last = messages[-1]
        content = last.get("content")
        if last.get("role") == ASSISTANT and (content is None or (isinstance(content, str) and not content.strip())):
            return messages[:-1]
    return messages


def review_chats(splits: Mapping[str, Examples], fields: Sequence[str]) -> list[str]:
    """Return warnings about parts of chats that are not trained on: other keys of messages, and cut beginnings.

    Args:
        splits: the splits; their examples have `lost_start`.
        fields: the fields that may hold a chat.
    """
    ignored: Counter[str] = Counter()
    for split in splits.values():
        for record in split.records:
            ignored.update(_ignored_keys(record, fields))
    said = [
        f"warning: {count:,} record{'s have' if count > 1 else ' has'} {key}, which {verb} not trained on: only the "
        "role and the content of each message of a chat are read"
        for key, count in sorted(ignored.items())
        for verb in (["are"] if key.endswith("s") else ["is"])
    ]
    total = sum(len(split.records) for split in splits.values())
    lost = sum(example.lost_start for split in splits.values() for example in split.examples)
    if lost:
        said.append(
            f"warning: {lost:,} of {total:,} records ({lost / total:.1%}) have a last turn that alone is too long: its "
            "beginning was cut, with its role and any system prompt; a larger data.max_length keeps them"
        )
    return said


def _ignored_keys(record: Record, fields: Sequence[str]) -> set[str]:
    """Return the keys with content that is not trained on, in a record with chats."""
    chats = [value for name in fields if isinstance(value := record.value(name), list)]
    found = {
        key
        for chat in chats
        for message in chat
        for key, value in message.items()
        if key not in ("role", "content") and value not in EMPTY
    }
    if chats:
        found |= {key for key in FIELDS_OF_CHATS if record.fields.get(key) not in EMPTY}
    return found


def _recent(parts: Sequence[Part], limit: int) -> list[Part]:
    """Leave out as many of the earliest turns as exceed the limit, but keep the last turn and the system prompt."""
    first = next((place for place, part in enumerate(parts) if part.role != "system"), len(parts))
    head, rest = list(parts[:first]), list(parts[first:])
    while sum(len(part.ids) for part in head + rest) > limit:
        begin = next((place for place, part in enumerate(rest) if place and part.role == "user"), None)
        if begin is None:
            break
        rest = rest[begin:]
    return head + rest


@dataclass(frozen=True, kw_only=True)
class _PromptSampling(Sampling):
    """Sampling whose draws depend on the prompt, not on the other prompts of the batch or their order."""

    prompts: tuple[bytes, ...]

    def generator(self, index: int) -> torch.Generator:
        key = int.from_bytes(hashlib.sha256(self.prompts[index]).digest()[:6], "little")
        return super().generator(key)


def write_answers(
    model: Model, config: FinetuneConfig, tokenizer: Tokenizer, prompts: Sequence[list[int]], device: torch.device
) -> list[str]:
    """Generate the model's answers to prompts, and return their texts."""
    sampling = _PromptSampling(
        temperature=config.chat.temperature,
        seed=config.seed,
        prompts=tuple(repr(prompt).encode() for prompt in prompts),
    )
    written = decode_tokens(
        model,
        config.model,
        prompts,
        max_new_tokens=config.chat.max_new_tokens,
        sampling=sampling,
        end_ids=tokenizer.end_ids,
        num_ids=tokenizer.vocab_size,
        device=device,
    )
    return [tokenizer.decode(ids) for ids in written]


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
