"""The pieces that begin a word, by the marks of tokenizers and by their texts."""

from __future__ import annotations

import functools

import numpy as np

from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.tokenizer.words import is_unspaced

_BEGIN_MARKS = ("\u2581", "\u0120", " ")
"""The marks of spaces in sentencepiece, byte-level BPE and the exports of bigtx."""
_CONTINUATION_MARK = "##"
"""The mark of WordPiece."""


@functools.lru_cache(maxsize=1)  # Training and validation need the same.
def begins_word(tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Return which pieces are at borders of words.

    In a script without spaces, each piece is a word: otherwise a sentence would be one.

    Returns:
        bool [vocab_size] twice: pieces that begin a word, and pieces of only white space, after which one begins.
    """
    pieces = [tokenizer.id_to_piece(i) for i in range(tokenizer.vocab_size)]
    # Bytes, too, have a text only when they are decoded.
    texts = [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]
    spaces = np.array([text.isspace() or piece in _BEGIN_MARKS for text, piece in zip(texts, pieces, strict=True)])
    alone = np.array([any(map(is_unspaced, text)) for text in texts])
    has_begin_marks = any(piece.startswith(_BEGIN_MARKS) for piece in pieces)
    if not has_begin_marks and any(piece.startswith(_CONTINUATION_MARK) for piece in pieces):
        begins = np.array([not piece.startswith(_CONTINUATION_MARK) for piece in pieces])
    else:
        begins = np.array([piece.startswith(_BEGIN_MARKS) for piece in pieces])
    return begins | spaces | alone, spaces
