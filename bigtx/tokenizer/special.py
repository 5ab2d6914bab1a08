"""The parts of a tokenizer besides its model: special ids, the places of them around texts and in chats, and the file
that describes a tokenizer's folder.

Special ids have no text. Text can never produce them: `<mask>` in a document is five characters, not the mask.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from bigtx.utils.errors import DataError
from bigtx.utils.files import json_value, kind_of_folder, open_file

PAD = "<pad>"
UNKNOWN = "<unk>"
BEGIN = "<s>"
END = "</s>"
MASK = "<mask>"
NUM_SENTINELS = 100
CHAT_ROLES = ("system", "user", "assistant", "tool")
SPACE_MARK = "\u2581"
"""Sentencepiece's mark for a space inside its pieces."""


def sentinel(number: int) -> str:
    """Return the piece for masked span `number`, as in T5 (arXiv:1910.10683)."""
    return f"<extra_id_{number}>"


def role(name: str) -> str:
    """Return the piece at the start of a chat message of this role."""
    return f"<|{name}|>"


def control_pieces(roles: Sequence[str]) -> list[str]:
    """Return the special pieces after padding, unknown, begin and end, in the order of their ids."""
    return [MASK, *(sentinel(number) for number in range(NUM_SENTINELS)), *(role(name) for name in roles)]


@dataclass(frozen=True)
class SpecialIds:
    """Special ids of a tokenizer.

    An imported tokenizer may lack some: then `unknown` and `mask` are None, `sentinels` and `roles` empty, and
    `pad` and `begin` are the end id, as in GPT-2.

    Attributes:
        end: the id that bigtx adds after a text.
        ends: every id that ends a text in generation, by the files of an imported model; empty: `end` only.
    """

    pad: int
    unknown: int | None
    begin: int
    end: int
    mask: int | None
    sentinels: list[int]
    roles: dict[str, int]
    ends: list[int] = field(default_factory=list)

    def all(self) -> set[int]:
        """Return every special id."""
        single = {self.pad, self.unknown, self.begin, self.end, self.mask} - {None}
        return {i for i in single if i is not None} | set(self.sentinels) | set(self.roles.values()) | set(self.ends)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready data, with `ends` only if there are some."""
        values = asdict(self)
        return values if self.ends else {name: value for name, value in values.items() if name != "ends"}


_PROBES = ("a", "0", ".", "\u4e00", "the")
"""Short texts; a tokenizer has ids for at least one of them."""


class Part(NamedTuple):
    """A place in a template."""

    id: int | None
    """A special id; None: all ids of the next text."""
    type: int
    """The token type there: 0 or 1."""


@dataclass(frozen=True)
class Template:
    """The special ids around one text and around two.

    BERT         [CLS] text [SEP]      [CLS] text [SEP] pair [SEP]
    RoBERTa      <s> text </s>         <s> text </s> </s> pair </s>
    Llama        <s> text              <s> text <s> pair
    GPT-2        text                  text pair
    """

    single: tuple[Part, ...]
    pair: tuple[Part, ...]

    @property
    def before(self) -> list[int]:
        """Return the special ids before a single text."""
        return [part.id for part in self.single[: self._place] if part.id is not None]

    @property
    def after(self) -> list[int]:
        """Return the special ids after a single text."""
        return [part.id for part in self.single[self._place :] if part.id is not None]

    @property
    def ids(self) -> set[int]:
        """Return every special id."""
        return {part.id for part in (*self.single, *self.pair) if part.id is not None}

    @property
    def _place(self) -> int:
        return [part.id for part in self.single].index(None)

    def fill(self, texts: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
        """Return the ids of one text, or of two, with the special ids; and the token type of each.

        Args:
            texts: the ids of each text.
        """
        ids: list[int] = []
        types: list[int] = []
        left = iter(texts)
        for part in self._parts(len(texts)):
            new = list(next(left)) if part.id is None else [part.id]
            ids += new
            types += [part.type] * len(new)
        return ids, types

    def num_special(self, num_texts: int) -> int:
        """Return how many special ids are added to one text, or to two."""
        return len(self._parts(num_texts)) - num_texts

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Template:
        """Return the inverse of `to_dict`.

        Raises:
            ValueError: they are not a template.
        """
        single, pair = (tuple(Part(*part) for part in values[name]) for name in ("single", "pair"))
        if [sum(part.id is None for part in parts) for parts in (single, pair)] != [1, 2]:
            raise ValueError("a template has each text once")
        return cls(single, pair)

    def _parts(self, num_texts: int) -> tuple[Part, ...]:
        assert num_texts in (1, 2), "a template is for one text or for two"
        return self.single if num_texts == 1 else self.pair


def around(begin: int | None, end: int | None) -> Template:
    """Return each text between a begin id and an end id, either of which may be missing; the second text is of type
    1.
    """

    def parts(type_id: int) -> tuple[Part, ...]:
        first = () if begin is None else (Part(begin, type_id),)
        last = () if end is None else (Part(end, type_id),)
        return (*first, Part(None, type_id), *last)

    return Template(parts(0), parts(0) + parts(1))


def observed(encode: Callable[..., Any]) -> Template:
    """Return the template of a tokenizer of the library `tokenizers`, found by encoding short texts.

    Args:
        encode: a function that returns the library's `Encoding` of one text or of two, special ids included.

    Raises:
        DataError: it returns no ids for short texts, or changes their order.
    """
    for probe in _PROBES:
        single, pair = (_parts(encode(*texts)) for texts in ((probe,), (probe, probe)))
        if [sum(part.id is None for part in parts) for parts in (single, pair)] == [1, 2]:
            return Template(single, pair)
    raise DataError("it is not clear which special ids the tokenizer adds to a text")


def _parts(encoding: Any) -> tuple[Part, ...]:
    """Return the special ids of an encoding, and its texts as one part each."""
    parts: list[Part] = []
    last: int | None = None
    for i, type_id, text in zip(encoding.ids, encoding.type_ids, encoding.sequence_ids, strict=True):
        if text is None:
            parts.append(Part(i, type_id))
        elif text != last:
            parts.append(Part(None, type_id))
        last = text
    return tuple(parts)


MODEL_FILES = {"sentencepiece": "tokenizer.model", "huggingface": "tokenizer.json"}
"""The file of the model of each kind of tokenizer."""

DESCRIPTION = "bigtx_tokenizer.json"
"""The file that makes a folder a tokenizer of bigtx; it is written last."""

FORMAT = 2
PLAIN_FORMAT = 1
"""The format of tokenizers without a template and with one end id; earlier releases read it."""


def read_bytes(path: Path) -> bytes:
    """Return the content of a tokenizer's file.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with open_file(path) as file:
            return file.read()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None


def _what_instead(folder: Path) -> str:
    """Return the kind of a folder without a tokenizer, and what to do."""
    inside = folder / "tokenizer"
    kind = kind_of_folder(folder)
    if kind and (inside / DESCRIPTION).exists():
        return f"it is {kind}, whose tokenizer is {inside}; name that."
    return (
        f"it has no {DESCRIPTION}. Train one with `bigtx tokenizer train`, or import a sentencepiece or Hugging "
        "Face tokenizer with `bigtx tokenizer import PATH output=FOLDER`."
    )


def read_description(folder: Path) -> dict[str, Any]:
    """Return the description of the tokenizer in a folder.

    Raises:
        DataError: it is missing or damaged, or a newer bigtx wrote it.
    """
    path = folder / DESCRIPTION
    if not path.exists():
        raise DataError(f"No tokenizer in {folder}: {_what_instead(folder)}")
    try:
        description = json_value(read_bytes(path))
        known = description["format"] in (PLAIN_FORMAT, FORMAT) and description["kind"] in list(MODEL_FILES)
        template = Template.from_dict(description["template"]) if description.get("template") else None
        _check_ids(SpecialIds(**description["special"]), template)
        description["fingerprint"].encode()
    except (ValueError, TypeError, KeyError, AttributeError):
        raise DataError(f"{path} is damaged; copy the tokenizer again from its source.") from None
    if not known:
        what = f"{path} has format {description.get('format')!r:.40} and kind {description.get('kind')!r:.40}"
        raise DataError(f"{what}, which this bigtx does not know; update bigtx.")
    return dict(description)


def _check_ids(special: SpecialIds, template: Template | None) -> None:
    """Check the ids of a description.

    Raises:
        ValueError, TypeError, AttributeError: some are not ids.
    """
    ids = [special.pad, special.begin, special.end, *special.all(), *(template.ids if template else ())]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise ValueError("an id is a number from 0")


def fingerprint(kind: str, model: bytes, special: SpecialIds, template: Template | None) -> str:
    """Return the SHA-256 over a tokenizer's kind, the bytes of its model, the special ids and the template."""
    # The ids that end a text in generation do not change the ids of texts.
    values = replace(special, ends=[]).to_dict() | ({"template": asdict(template)} if template else {})
    digest = hashlib.sha256(f"{kind}\n{json.dumps(values, sort_keys=True)}\n".encode())
    digest.update(model)
    return digest.hexdigest()


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
