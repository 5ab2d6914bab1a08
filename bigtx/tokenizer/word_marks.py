"""Which pieces begin a word, by the marks that tokenizers leave on them."""

from __future__ import annotations

import numpy as np

from bigtx.tokenizer.tokenizer import Tokenizer

_BEGIN_MARKS = ("\u2581", "\u0120", " ")
"""Spaces as sentencepiece, byte-level BPE and the exports of bigtx write them."""
_CONTINUATION_MARK = "##"
"""Of WordPiece."""
_SPACES = frozenset(" \t\n\r\u2581\u0120\u010a\u0109\u010d")
"""White space, and how byte-level BPE writes it."""


def begins_word(tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """What pieces say of the words around them.

    Returns:
        bool [vocab_size] twice: pieces that begin a word, and pieces of white space alone, after which one begins.
    """
    pieces = [tokenizer.id_to_piece(i) for i in range(tokenizer.vocab_size)]
    spaces = np.array([bool(piece) and set(piece) <= _SPACES for piece in pieces])
    if any(
        piece.startswith(_CONTINUATION_MARK) and len(piece) > len(_CONTINUATION_MARK) for piece in pieces
    ) and not any(piece.startswith(_BEGIN_MARKS) for piece in pieces):
        return np.array([not piece.startswith(_CONTINUATION_MARK) for piece in pieces]), spaces
    return np.array([piece.startswith(_BEGIN_MARKS) for piece in pieces]) | spaces, spaces
