"""The model of a `Tokenizer` from a Hugging Face `tokenizer.json`, by the `tokenizers` library (an extra)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bigtx.tokenizer import special
from bigtx.tokenizer.special import SpecialIds, Template, observed
from bigtx.utils.errors import DataError, require
from bigtx.utils.files import json_value

TOKENIZER_CONFIG = "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
SENTENCEPIECE_NAMES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "spm.model")
"""Names of a sentencepiece model in a Hugging Face folder; settings next to it define the special ids around texts."""
SETTINGS_FILES = (TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", CHAT_TEMPLATE)
"""Files next to tokenizer.json with settings of other programs; bigtx reads the special ids from them and keeps them.
"""


class HuggingFaceModel:
    """A `tokenizer.json` that encodes and decodes without adding special ids or reading them from the text."""

    kind = "huggingface"
    file_name = special.MODEL_FILES[kind]
    memory_per_byte = 256
    """The most memory that encoding needs for each byte of UTF-8: 57 to 222 were measured (docs/log.md)."""
    words = None
    """Such a tokenizer may change white space in any way, so it cannot encode word by word."""

    def __init__(self, data: bytes) -> None:
        """Args: data: the content of tokenizer.json.

        Raises:
            DataError: the library is missing, or the content is not a tokenizer.
        """
        what = (
            "Hugging Face tokenizers are read by the package tokenizers, which is not installed: "
            "pip install 'bigtx[huggingface]'"
        )
        require("tokenizers", what, DataError)
        import tokenizers

        self.data = data
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(data)
        except Exception as error:  # The library raises bare Exception.
            raise DataError(f"not a Hugging Face tokenizer.json: {error!s:.300}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        # Ids may have gaps.
        self.vocab_size: int = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int], keep_special: bool, after: Sequence[int] = ()) -> str:
        """Return the text of ids; bytes that are not UTF-8 become U+FFFD.

        Args:
            after: the ids before them, whose text is left out.
        """
        before = self._decode(after, keep_special) if len(after) else ""
        return self._decode([*after, *ids], keep_special)[len(before) :]

    def _decode(self, ids: Sequence[int], keep_special: bool) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=not keep_special))

    def stream(self, after: Sequence[int] = ()) -> WindowStream:
        """Return a decoder for ids that come one by one, after others."""
        return WindowStream(self, after)

    def piece(self, i: int) -> str:
        """Return the piece as in the model; empty in a gap between the ids."""
        return self._tokenizer.id_to_token(i) or ""

    def is_byte(self, i: int) -> bool:
        """Return whether the piece is a byte that is not a character by itself."""
        return self.decode([i], keep_special=False) == "\ufffd"

    def template(self) -> Template:
        """Return the special ids that tokenizer.json adds to texts.

        As in transformers 5, `add_bos_token` and `add_eos_token` in tokenizer_config.json have no effect then.

        Raises:
            DataError: see `observed`.
        """
        return observed(self._tokenizer.encode)

    def special_ids(self, settings: dict[str, Any]) -> SpecialIds:
        """Return the special ids, by the files next to tokenizer.json.

        Args:
            settings: `bos_token` and similar entries, as in special_tokens_map.json.

        Raises:
            DataError: there is no id that ends a text.
        """
        added = {token.content: i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}

        def named(*roles: str) -> int | None:
            """Return the id of the first of some roles that has one."""
            values = (settings.get(role) for role in roles)
            texts = (value.get("content") if isinstance(value, dict) else value for value in values)
            ids = (self._tokenizer.token_to_id(text) for text in texts if isinstance(text, str))
            return next((i for i in ids if i is not None), None)

        end = named("eos_token", "sep_token")
        if end is None:
            raise DataError(
                "no end-of-text token: the folder needs a tokenizer_config.json or special_tokens_map.json that names "
                "eos_token (or sep_token), since it ends every document"
            )
        begin, pad = named("bos_token", "cls_token"), named("pad_token")
        sentinels = (added.get(special.sentinel(number)) for number in range(special.NUM_SENTINELS))
        return SpecialIds(
            pad=end if pad is None else pad,
            unknown=named("unk_token"),
            begin=end if begin is None else begin,
            end=end,
            mask=named("mask_token"),
            sentinels=[i for i in sentinels if i is not None],
            roles={name: added[special.role(name)] for name in special.CHAT_ROLES if special.role(name) in added},
        )


class WindowStream:
    """Text from ids one by one, through a decoder that only knows whole sequences.

    A few earlier ids are decoded together with the new ones, since the text of an id may depend on its neighbours;
    their own text is removed again. Text that ends in U+FFFD may be half a character, and is held back.
    """

    def __init__(self, model: HuggingFaceModel, after: Sequence[int] = ()) -> None:
        self._model = model
        self._shown: list[int] = list(after)
        self._waiting: list[int] = []

    def push(self, i: int) -> str:
        """Return the text that id `i` completes, often empty."""
        self._waiting.append(i)
        text = self._new_text()
        if not text or text.endswith("\ufffd"):
            return ""
        self._shown, self._waiting = self._waiting, []
        return text

    def flush(self) -> str:
        """Return the rest at the end: U+FFFD for an incomplete character."""
        text = self._new_text()
        self._shown, self._waiting = [], []
        return text

    def _new_text(self) -> str:
        return self._model.decode(self._waiting, keep_special=False, after=self._shown)


def read_settings_files(folder: Path) -> dict[str, bytes]:
    """Return the contents of the `SETTINGS_FILES` in a folder, by name.

    Raises:
        DataError: a file cannot be read, or is not a JSON object.
    """
    files = {}
    for path in (folder / name for name in SETTINGS_FILES):
        if not path.is_file():
            continue
        try:
            files[path.name] = path.read_bytes()
            content = json_value(files[path.name]) if path.suffix == ".json" else {}
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from None
        except ValueError as error:
            raise DataError(f"{path} is not JSON: {error}") from None
        if not isinstance(content, dict):
            raise DataError(f"{path} is not a JSON object")
    return files


def settings_of(files: Mapping[str, bytes]) -> dict[str, Any]:
    """Return the entries of tokenizer_config.json and special_tokens_map.json; the second has precedence.

    Args:
        files: the result of `read_settings_files`; any may be missing.
    """
    settings: dict[str, Any] = {}
    for name in (TOKENIZER_CONFIG, "special_tokens_map.json"):
        content = json_value(files.get(name, b"{}"))
        settings |= {key: value for key, value in content.items() if value is not None}
    return settings
