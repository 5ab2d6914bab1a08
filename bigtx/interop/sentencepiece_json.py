"""A sentencepiece model as the content of a Hugging Face `tokenizer.json`, with the same ids.

Pieces are written with a plain space where sentencepiece writes U+2581. So text need not be rewritten before it is
split, and a U+2581 in the text is the same as in bigtx: a character without a piece, encoded as its three bytes.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterable
from itertools import groupby
from typing import Any

from bigtx.tokenizer.sentencepiece_model import SentencePieceModel
from bigtx.tokenizer.special import SPACE_MARK, Part, Template
from bigtx.tokenizer.words import WORDS, exact_borders
from bigtx.utils.errors import DataError

_NEVER = -1e9
"""The score of pieces that text cannot produce: any other way to spell it is better."""


def to_tokenizer_json(model: SentencePieceModel, template: Template) -> dict[str, Any]:
    """Return the content for the library tokenizers: the model's pieces, merges and treatment of spaces.

    Args:
        template: the special ids that are added to texts by default.

    Raises:
        DataError: the model splits text in a way that has no counterpart (words or characters as pieces, a space mark
            after the word).
    """
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(model.data)
    trained, normalizer = proto.trainer_spec, proto.normalizer_spec
    kinds = {trained.BPE: _bpe, trained.UNIGRAM: _unigram}
    if trained.model_type not in kinds or trained.treat_whitespace_as_suffix:
        raise DataError(
            "This sentencepiece model cannot be written as a tokenizer.json: only BPE and unigram models whose space "
            "marks precede the words can. Distribute the sentencepiece model itself with the export."
        )
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(proto),
        "normalizer": _normalizer(normalizer, writes_mark=model.writes_mark),
        "pre_tokenizer": _pre_tokenizer(proto, model.data),
        "post_processor": _post_processor(template, model.piece),
        "decoder": _decoder(strips_space=normalizer.add_dummy_prefix),
        "model": kinds[trained.model_type](proto),
    }


def _spelled(piece: Any) -> str:
    """Return a piece's name in tokenizer.json."""
    is_text = piece.type in (piece.NORMAL, piece.USER_DEFINED)
    return str(piece.piece).replace(SPACE_MARK, " ") if is_text else str(piece.piece)


def _added_tokens(proto: Any) -> list[dict[str, Any]]:
    """Return the pieces that are found in the text before anything else: special ones, and those that the user
    defined.
    """
    settings = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": i, "content": _spelled(piece), **settings, "special": piece.type != piece.USER_DEFINED}
        for i, piece in enumerate(proto.pieces)
        if piece.type in (piece.UNKNOWN, piece.CONTROL, piece.USER_DEFINED)
    ]


def _bpe(proto: Any) -> dict[str, Any]:
    ids = {_spelled(piece): i for i, piece in enumerate(proto.pieces)}
    normal = {_spelled(piece): piece.score for piece in proto.pieces if piece.type == piece.NORMAL}
    # Sentencepiece joins the pair whose joint piece has the best score, and the leftmost of equal ones.
    merges = [
        (-score, ids[piece], at, piece)
        for piece, score in normal.items()
        for at in range(1, len(piece))
        if piece[:at] in normal and piece[at:] in normal
    ]
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": proto.pieces[proto.trainer_spec.unk_id].piece,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": proto.trainer_spec.byte_fallback,
        "ignore_merges": False,
        "vocab": ids,
        "merges": [[piece[:at], piece[at:]] for _, _, at, piece in sorted(merges)],
    }


def _unigram(proto: Any) -> dict[str, Any]:
    return {
        "type": "Unigram",
        "unk_id": proto.trainer_spec.unk_id,
        "vocab": [[_spelled(piece), piece.score if piece.type == piece.NORMAL else _NEVER] for piece in proto.pieces],
        "byte_fallback": proto.trainer_spec.byte_fallback,
    }


def _normalizer(settings: Any, *, writes_mark: bool) -> dict[str, Any] | None:
    steps: list[dict[str, Any]] = []
    if settings.precompiled_charsmap:
        charsmap = base64.b64encode(settings.precompiled_charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if not writes_mark:
        steps.append({"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "})
    if settings.remove_extra_whitespaces:
        steps.append({"type": "Replace", "pattern": {"Regex": "^ +| +$"}, "content": ""})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    if settings.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": " "})
    return {"type": "Sequence", "normalizers": steps} if steps else None


def _pre_tokenizer(proto: Any, data: bytes) -> dict[str, Any] | None:
    """Return where text may be cut without changing its ids."""
    if exact_borders(data):
        # Only for speed: the library caches words too.
        pattern = WORDS.pattern
    elif proto.trainer_spec.model_type == proto.trainer_spec.UNIGRAM:
        # The library would read the text "<0x41>" as the byte 0x41 if no other spelling is better. Without
        # the characters that have no piece, all others together always spell it better. Without bytes,
        # a run of them is one unknown piece.
        known = {_spelled(piece) for piece in proto.pieces if piece.type == piece.NORMAL}
        pattern = f"[^{_character_class(character for character in known if len(character) == 1)}]"
        if not proto.trainer_spec.byte_fallback:
            pattern += "+"
    else:
        return None
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _character_class(characters: Iterable[str]) -> str:
    """Write characters as ranges inside the brackets of a regular expression."""
    codes = sorted(map(ord, characters))
    ranges = [[code for _, code in group] for _, group in groupby(enumerate(codes), lambda pair: pair[1] - pair[0])]
    ends = [
        (re.sub(r"([\\\[\]^-])", r"\\\1", chr(run[0])), re.sub(r"([\\\[\]^-])", r"\\\1", chr(run[-1])))
        for run in ranges
    ]
    return "".join(first if first == last else f"{first}-{last}" for first, last in ends)


def _post_processor(template: Template, piece: Callable[[int], str]) -> dict[str, Any]:
    """Return the entry, even where nothing is added, so that no reader uses its own default."""

    def written(parts: Iterable[Part]) -> list[dict[str, Any]]:
        names = iter("AB")
        return [
            {"Sequence": {"id": next(names), "type_id": part.type}}
            if part.id is None
            else {"SpecialToken": {"id": piece(part.id), "type_id": part.type}}
            for part in parts
        ]

    special = {piece(i): i for i, _ in (*template.single, *template.pair) if i is not None}
    return {
        "type": "TemplateProcessing",
        "single": written(template.single),
        "pair": written(template.pair),
        "special_tokens": {name: {"id": name, "ids": [i], "tokens": [name]} for name, i in special.items()},
    }


def _decoder(*, strips_space: bool) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if strips_space:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}
