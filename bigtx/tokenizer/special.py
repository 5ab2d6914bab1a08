"""The special ids, which have no text: their names and their purposes.

Text can never produce them: `<mask>` in a document is five characters, not the mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from bigtx.utils.errors import DataError

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

    def to_dict(self) -> dict[str, Any]:
        """Return the template as JSON-ready data."""
        return {"single": [list(part) for part in self.single], "pair": [list(part) for part in self.pair]}

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
