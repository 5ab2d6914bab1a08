"""What happens to a document's text between reading and tokenizing, and which documents are too long for `memory`.

Most of the work on a text takes it in parts. The filters, and a tokenizer that has to see it whole, take a multiple of
its size. One text may have half of `memory` for this, and only one process at a time works on such a text. So which
documents are too long follows from `memory` alone, not from the number of processes.
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
"""Characters that every process may hold beside its buffers."""


@dataclass
class Needs:
    """Bytes of memory that documents need: they say with which `memory` the same documents are kept.

    Attributes:
        kept: the most that a document needed which was not too long.
        rejected: the least that a document would have needed which was; None if there is none.
    """

    kept: int = 0
    rejected: int | None = None

    def add(self, other: Needs) -> None:
        """Count others' documents too."""
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
    """Applies the rules, and finds texts that are too long for memory.

    Args:
        rules: of the config.
        num_processes: that share the memory.
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
        """Return the text as it is tokenized, or why there is none.

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
            f"too long for memory={format_size(2 * self._most)}: {who} would take up to {format_size(needed)} for its "
            f"{len(document.text):,} characters; memory={-(-2 * needed >> 20)}MiB is enough"
        )
        return Reject(document.file, document.line, reason)
