"""The special ids, which have no text: their names and their purposes.

Text can never produce them: `<mask>` in a document is five characters, not the mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

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
