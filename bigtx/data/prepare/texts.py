"""The steps between reading and tokenizing of a document's text, and the documents that are too long for `memory`.

Most steps process a text in parts. The filters, and a tokenizer that has to read it as a whole, need a multiple of
its size. One text may use half of `memory` for this, and only one process at a time works on such a text. So which
documents are too long depends on `memory` only, not on the number of processes.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from bigtx.config.schema import PrepareConfig
from bigtx.config.settings import find
from bigtx.data.raw.documents import Document, Reject
from bigtx.data.text.rules import Dropped, TextRules
from bigtx.data.workers import alone
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.utils.units import format_size

_NEVER_LARGE = 1 << 18
"""Characters that every process may hold in addition to its buffers."""


@dataclass
class Needs:
    """The bytes of memory that documents need: they determine with which `memory` the same documents are kept.

    Attributes:
        kept: the most that a document that was kept needed.
        rejected: the least that a rejected document would have needed; None if there is none.
    """

    kept: int = 0
    rejected: int | None = None

    def add(self, other: Needs) -> None:
        """Add the documents of others."""
        self.kept = max(self.kept, other.kept)
        if other.rejected is not None:
            self.rejected = min(other.rejected, self.rejected or other.rejected)

    def allows(self, memory: int) -> bool:
        """Return whether the same documents are kept with another `memory`."""
        most = most_for_a_text(memory)
        return self.kept <= most and (self.rejected is None or self.rejected > most)

    def memory_mib(self) -> int:
        """Return the least `memory`, in MiB, with which the same documents are kept."""
        setting = find(PrepareConfig, "memory")
        assert setting is not None and setting.minimum is not None
        return max(-(-2 * self.kept >> 20), int(setting.minimum) >> 20)

    @property
    def agree(self) -> bool:
        """Return whether there is any `memory` with which these documents are kept and rejected."""
        return self.rejected is None or self.rejected > self.kept


def most_for_a_text(memory: int) -> int:
    """Return the bytes that one text may take of all `memory`."""
    return memory // 2


class TextPreparation:
    """The rules, and the search for texts that are too long for memory.

    Args:
        rules: the rules of the config.
        num_processes: the number of processes that share the memory.
    """

    def __init__(self, config: PrepareConfig, tokenizer: Tokenizer, rules: TextRules, num_processes: int) -> None:
        self._most = most_for_a_text(config.memory)
        self._large = max(_NEVER_LARGE, self._most // num_processes // tokenizer.memory_per_byte)
        self._tokenizer = tokenizer
        self._rules = rules

    def turn(self, texts: Iterable[str]) -> AbstractContextManager[object]:
        """Wait until no other process works on a large text, if one of the texts is large."""
        return alone() if any(len(text) > self._large for text in texts) else nullcontext()

    def apply(self, document: Document, needs: Needs) -> str | Dropped | Reject:
        """Return the text to tokenize, or why there is none.

        Args:
            needs: counts what the document needs.
        """
        text = document.text
        with self.turn([text]):
            if not self._rules.is_empty:
                if reject := self._reject(document, self._rules.memory_for(text), "the filters", needs):
                    return reject
                outcome = self._rules.apply(text, document.language)
                if isinstance(outcome, Dropped):
                    return outcome
                text = outcome
            return self._reject(document, self._tokenizer.memory_for(text), "the tokenizer", needs) or text

    def _reject(self, document: Document, needed: int, who: str, needs: Needs) -> Reject | None:
        if needed <= self._most:
            needs.add(Needs(needed))
            return None
        needs.add(Needs(rejected=needed))
        reason = (
            f"too long for memory={format_size(2 * self._most)}: {who} would need up to {format_size(needed)} for its "
            f"{len(document.text):,} characters; memory={-(-2 * needed >> 20)}MiB is enough"
        )
        return Reject(document.file, document.line, reason)
