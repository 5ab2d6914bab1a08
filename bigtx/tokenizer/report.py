"""The report of a tokenizer: figures and examples."""

from __future__ import annotations

import itertools
import re
import time
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigtx.tokenizer.special import SPACE_MARK
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.tokenizer.words import cut, utf8_length
from bigtx.utils.units import format_count

HARD_TEXTS = {
    "prose": "The naïve café owner's well-known co-operation wasn't re-evaluated.",
    "code": "def area(self):\n    if self.width > 0:\n        return self.width**2\n",
    "tabs and line ends": "a\tb\t\tc\r\nd\r\r\n\n",
    "numbers": "1234567 3.14159 2026-11-30 0x7f",
    "other scripts": "Привет, мир! 你好，世界。 नमस्ते שלום",
    "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽",
    "combining marks": "é ≠ e\u0301",
    "spaces": "  two before, two after  ",
    "special names": "<mask></s><|user|>",
    "the space mark": f"a{SPACE_MARK}b",
    "NUL and byte order mark": "\x00\ufeff",
}

_UNSHOWN = {"\n": "⏎", "\r": "␍", "\t": "⇥", "\x00": "␀", "\ufeff": "[U+FEFF]", " ": "·"}
_PART_CHARACTERS, _BATCH_TEXTS = 1 << 16, 64
_MAX_EXAMPLE_PIECES = 40
_TOKENS_PER_ID = 100
_SMALLEST_SUITED = 2


@dataclass
class Measures:
    """Figures over some texts.

    Attributes:
        num_bytes, num_tokens: the counts of all texts (UTF-8).
        num_lossless: texts that are unchanged after encoding and decoding.
        tokens: how often each id was used.
        seconds: the time of encoding, on one core.
    """

    num_texts: int
    num_bytes: int
    num_tokens: int
    num_lossless: int
    tokens: Counter[int]
    seconds: float

    @property
    def bytes_per_token(self) -> float:
        """Return the UTF-8 bytes of text per token."""
        return self.num_bytes / max(1, self.num_tokens)

    def facts(self) -> dict[str, Any]:
        """Return the figures as plain data."""
        return {
            "texts": self.num_texts,
            "bytes": self.num_bytes,
            "tokens": self.num_tokens,
            "bytes_per_token": self.bytes_per_token,
            "texts_unchanged": self.num_lossless,
            "ids_used": len(self.tokens),
        }


def facts(tokenizer: Tokenizer, folder: Path | str) -> dict[str, Any]:
    """Return the facts of a tokenizer, as plain data."""
    return {
        "tokenizer": str(folder),
        "kind": tokenizer.kind,
        "vocab_size": tokenizer.vocab_size,
        "fingerprint": tokenizer.fingerprint,
        "special_ids": tokenizer.special.to_dict(),
        "around_texts": template_line(tokenizer),
    }


def text_facts(tokenizer: Tokenizer, text: str) -> dict[str, Any]:
    """Return the tokens of a text, as plain data."""
    ids = tokenizer.encode(text)
    pieces = [tokenizer.id_to_piece(i) for i in ids]
    return {"text": text, "ids": ids, "pieces": pieces, "unchanged": tokenizer.decode(ids) == text}


def measure(tokenizer: Tokenizer, texts: Sequence[str]) -> Measures:
    """Encode and decode the texts, long ones in parts of lines, so that memory stays bounded."""
    measures = Measures(len(texts), 0, 0, 0, Counter(), 0.0)
    parts = ((number, part) for number, text in enumerate(texts) for part in cut(text, _PART_CHARACTERS))
    changed = set()
    while batch := list(itertools.islice(parts, _BATCH_TEXTS)):
        begin = time.perf_counter()
        encoded = tokenizer.encode_batch([part for _, part in batch])
        measures.seconds += time.perf_counter() - begin
        for (number, part), ids in zip(batch, encoded, strict=True):
            measures.num_bytes += utf8_length(part)
            measures.num_tokens += len(ids)
            measures.tokens.update(ids)
            if tokenizer.decode(ids) != part:
                changed.add(number)
    measures.num_lossless = len(texts) - len(changed)
    return measures


def kind_of(tokenizer: Tokenizer, i: int) -> str:
    """Return the kind of an id: a special id, a single byte, or the kind of characters in its piece."""
    if i in tokenizer.special.all():
        return "special"
    if tokenizer.is_byte(i):
        return "single bytes"
    text = tokenizer.decode([i]) or tokenizer.id_to_piece(i)
    if not text.strip() or text == SPACE_MARK:
        return "white space"
    kinds = {_KINDS.get(unicodedata.category(character)[0], "punctuation and signs") for character in text.strip()}
    return kinds.pop() if len(kinds) == 1 else "mixed"


_KINDS = {"L": "letters", "M": "letters", "N": "digits"}


def figures(tokenizer: Tokenizer, measures: Measures) -> str:
    """Return a paragraph and a table: bytes per token, losses, and the kinds of pieces."""
    vocabulary = Counter(kind_of(tokenizer, i) for i in range(tokenizer.vocab_size))
    used: Counter[str] = Counter()
    for i, count in measures.tokens.items():
        used[kind_of(tokenizer, i)] += count
    lossy = measures.num_texts - measures.num_lossless
    lines = [
        f"{measures.bytes_per_token:.3f} bytes per token "
        f"({measures.num_bytes:,} bytes, {measures.num_tokens:,} tokens, {measures.num_texts:,} texts); "
        f"{len(measures.tokens) / tokenizer.vocab_size:.0%} of the vocabulary is used",
        f"{used['single bytes'] / max(1, measures.num_tokens):.3%} of the tokens are single bytes; "
        + ("every text is restored exactly" if not lossy else f"{lossy:,} texts are not restored exactly"),
        f"encodes {measures.num_bytes / 1e6 / max(measures.seconds, 1e-9):.1f} MB/s on one core",
        "",
        f"  {'kind':<24}{'pieces':>10}{'of tokens':>12}",
    ]
    for kind, count in sorted(vocabulary.items(), key=lambda item: -item[1]):
        lines.append(f"  {kind:<24}{count:>10,}{used[kind] / max(1, measures.num_tokens):>12.2%}")
    return "\n".join(lines)


def remark_on_size(tokenizer: Tokenizer, measures: Measures, num_bytes: int) -> str:
    """Return a remark on a vocabulary that is too large for its text; empty if it is not.

    A model learns an id from its occurrences: with some hundred occurrences of each id there are enough, with
    some dozen most ids have almost none.

    Args:
        num_bytes: the bytes of the whole text (UTF-8).
    """
    num_tokens = int(num_bytes / measures.bytes_per_token)
    thousands = max(1, num_tokens // _TOKENS_PER_ID // 1000)
    suited = max(_SMALLEST_SUITED, 1 << thousands.bit_length() - 1)
    if tokenizer.vocab_size < 4 * suited * 1000:
        return ""
    return (
        f"{tokenizer.vocab_size:,} ids are many for this text: it has about {format_count(num_tokens)} tokens, "
        f"{num_tokens // tokenizer.vocab_size:,} for each id, so a model would learn most of them badly at the cost of "
        f"all of them. vocab_size={suited}k would fit."
    )


def pieces_line(tokenizer: Tokenizer, measures: Measures) -> str:
    """Return the pieces with the largest shares of the text, the largest first."""
    share = Counter({i: count * len(tokenizer.decode([i])) for i, count in measures.tokens.items()})
    return "  ".join(_shown_piece(tokenizer, i) for i, _ in share.most_common(24))


def example(tokenizer: Tokenizer, text: str) -> str:
    """Return a text's pieces with bars between them, their number, and whether decoding changes the text."""
    ids = tokenizer.encode(text)
    pieces: list[str] = []
    for is_byte, run in itertools.groupby(ids, tokenizer.is_byte):
        same = list(run)
        if is_byte:
            pieces.append(f"[{visible(tokenizer.decode(same))}: {len(same)} bytes]")
        else:
            pieces += [_shown_piece(tokenizer, i) for i in same]
    more = "|..." if len(pieces) > _MAX_EXAMPLE_PIECES else ""
    changed = "" if tokenizer.decode(ids) == text else f"   CHANGED to {visible(tokenizer.decode(ids))!r}"
    return f"{'|'.join(pieces[:_MAX_EXAMPLE_PIECES])}{more}  ({len(ids):,} tokens){changed}"


def examples(tokenizer: Tokenizer) -> str:
    """Return the tokens of texts that are difficult for tokenizers."""
    width = max(map(len, HARD_TEXTS)) + 2
    return "\n".join(f"  {name:<{width}}{example(tokenizer, text)}" for name, text in HARD_TEXTS.items())


def special_line(tokenizer: Tokenizer) -> str:
    """Return the special ids, with runs of them shortened."""
    ids = tokenizer.special
    named = {"padding": ids.pad, "unknown": ids.unknown, "begin": ids.begin, "end": ids.end, "mask": ids.mask}
    parts = [f"{name} {i}" if i is not None else f"no {name}" for name, i in named.items()]
    sentinels = f"{ids.sentinels[0]}..{ids.sentinels[-1]}" if ids.sentinels else ""
    parts.append(f"{len(ids.sentinels)} sentinels {sentinels}" if sentinels else "no sentinels")
    parts += [f"{name} {i}" for name, i in ids.roles.items()] or ["no chat roles"]
    return ", ".join(parts)


def template_line(tokenizer: Tokenizer) -> str:
    """Return the special ids around one text and around two."""
    if tokenizer.template is None:
        return f"bigtx's rule: the end id {tokenizer.end_id} after each document"
    shown = []
    for parts in (tokenizer.template.single, tokenizer.template.pair):
        names = iter(("TEXT", "PAIR"))
        shown.append(" ".join(next(names) if part.id is None else tokenizer.id_to_piece(part.id) for part in parts))
    return "; ".join(shown)


def _shown_piece(tokenizer: Tokenizer, i: int) -> str:
    return visible(tokenizer.id_to_piece(i).replace(SPACE_MARK, " "))


def visible(text: str) -> str:
    """Write a text on one line, with signs for what is not visible."""
    text = re.sub("[\n\r\t\x00\ufeff ]", lambda match: _UNSHOWN[match[0]], text)
    return "".join(
        character if character.isprintable() or character == "\u200d" else f"[U+{ord(character):04X}]"
        for character in text
    )
