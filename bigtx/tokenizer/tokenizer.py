"""`Tokenizer`, the common interface of all tokenizers, and its folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bigtx.tokenizer.sentencepiece_model import SentencePieceModel, Utf8Stream
from bigtx.tokenizer.special import (
    ASSISTANT,
    CHAT_ROLES,
    DESCRIPTION,
    FORMAT,
    MODEL_FILES,
    PLAIN_FORMAT,
    Part,
    SpecialIds,
    Template,
    around,
    chat_template,
    check_messages,
    fingerprint,
    read_bytes,
    read_description,
)
from bigtx.tokenizer.words import refuse_surrogates, utf8_length
from bigtx.utils.errors import DataError
from bigtx.utils.files import write_atomic, write_json

if TYPE_CHECKING:
    from bigtx.tokenizer.huggingface_model import HuggingFaceModel, WindowStream


class Tokenizer:
    """A tokenizer, which converts text to ids and back.

    Attributes:
        model: the model that encodes.
        vocab_size: the number of ids, 0 .. vocab_size - 1.
        fingerprint: SHA-256 over the kind, the model's bytes, the special ids and the template; equal ones give the
            x
        special: the special ids, also as `pad_id`, `unk_id` and so on.
        end_ids: every id that ends a text in generation; `end_id` is the one that bigtx adds.
        template: the special ids that the tokenizer of an imported model adds to texts; None: bigtx's own rules,
            see `encode_prompts`, `encode_documents` and `join`.
        begin_ids: the ids of the template before a text.
        origin: how the tokenizer was made; not part of the fingerprint.
        settings_files: the unchanged files next to a Hugging Face tokenizer.json, by name; bigtx only keeps them.
    """

    def __init__(
        self,
        model: SentencePieceModel | HuggingFaceModel,
        special: SpecialIds,
        origin: dict[str, Any] | None = None,
        settings_files: Mapping[str, bytes] | None = None,
        template: Template | None = None,
    ) -> None:
        """Build a tokenizer from its parts; use `train`, `load` or one of the `from_` functions instead."""
        self.model = model
        self.special = special
        self.origin = origin or {}
        self.settings_files = dict(settings_files or {})
        self.vocab_size = model.vocab_size
        self.pad_id, self.unk_id, self.begin_id = special.pad, special.unknown, special.begin
        self.end_id, self.mask_id = special.end, special.mask
        self.sentinel_ids, self.role_ids = special.sentinels, special.roles
        self.end_ids = special.ends or [special.end]
        self.template = template
        self.begin_ids = template.before if template else []
        self.fingerprint = fingerprint(model.kind, model.data, special, template)

    @classmethod
    def load(cls, folder: Path | str) -> Tokenizer:
        """Read a tokenizer's folder.

        Raises:
            DataError: it is not a tokenizer of bigtx, or its files do not belong together.
        """
        folder = Path(folder)
        description = read_description(folder)
        path, files = folder / MODEL_FILES[description["kind"]], {}
        model: SentencePieceModel | HuggingFaceModel
        if description["kind"] == SentencePieceModel.kind:
            model = SentencePieceModel(read_bytes(path))
        else:
            from bigtx.tokenizer.huggingface_model import HuggingFaceModel, read_settings_files

            model, files = HuggingFaceModel(read_bytes(path)), read_settings_files(folder)
        template = Template.from_dict(description["template"]) if description.get("template") else None
        tokenizer = cls(model, SpecialIds(**description["special"]), description.get("origin"), files, template)
        ids = tokenizer.special.all() | (template.ids if template else set())
        if max(ids) >= tokenizer.vocab_size:
            raise DataError(
                f"The tokenizer in {folder} is damaged or was edited: {DESCRIPTION} has the id {max(ids)}, but "
                f"{path.name} has {tokenizer.vocab_size} ids. Copy it again from its source."
            )
        if tokenizer.fingerprint != description["fingerprint"]:
            raise DataError(
                f"The tokenizer in {folder} is damaged or was edited: {path.name} and {DESCRIPTION} do not belong "
                f"together (fingerprint {tokenizer.fingerprint[:12]}, expected {description['fingerprint'][:12]}). "
                f"Copy it again from its source."
            )
        return tokenizer

    @classmethod
    def from_sentencepiece(cls, path: Path | str, roles: Sequence[str] = CHAT_ROLES) -> Tokenizer:
        """Import a sentencepiece `.model` file, with its ids unchanged.

        Args:
            roles: the names of chat roles whose control pieces (`<|user|>`) to search for.

        Raises:
            DataError: it cannot be read, is not such a model, or has no end-of-text piece.
        """
        try:
            return cls.from_sentencepiece_bytes(read_bytes(Path(path)), roles, {"imported": Path(path).name})
        except DataError as error:
            raise DataError(f"Cannot use {path}: {error}.") from None

    @classmethod
    def from_sentencepiece_bytes(
        cls, data: bytes, roles: Sequence[str] = CHAT_ROLES, origin: dict[str, Any] | None = None
    ) -> Tokenizer:
        """Build a tokenizer as `from_sentencepiece` does, from a serialized model."""
        model = SentencePieceModel(data)
        model.check_decoding()
        return cls(model, model.special_ids(roles), origin)

    @classmethod
    def from_huggingface(cls, path: Path | str) -> Tokenizer:
        """Import a Hugging Face tokenizer: a folder with tokenizer.json, or that file.

        The special ids are those in tokenizer_config.json and special_tokens_map.json next to it, and are
        around texts where transformers adds them by default.

        Raises:
            DataError: it cannot be read, names no end-of-text token, or the extra `huggingface` is not installed.
        """
        from bigtx.tokenizer.huggingface_model import HuggingFaceModel, read_settings_files, settings_of

        path = Path(path)
        path = path / HuggingFaceModel.file_name if path.is_dir() else path
        try:
            model = HuggingFaceModel(read_bytes(path))
            files = read_settings_files(path.parent)
            origin = {"imported": path.parent.resolve().name}
            return cls(model, model.special_ids(settings_of(files)), origin, files, model.template())
        except DataError as error:
            raise DataError(f"Cannot use {path}: {error}.") from None

    def changed(self, *, ends: Sequence[int] | None = None, template: Template | None = None) -> Tokenizer:
        """Return the tokenizer with other end ids or another template; None keeps them."""
        special = self.special if ends is None else dataclasses.replace(self.special, ends=list(ends))
        return Tokenizer(self.model, special, self.origin, self.settings_files, template or self.template)

    def save(self, folder: Path | str) -> None:
        """Write the tokenizer's files; create the folder if needed."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / self.model.file_name, self.model.data)
        for name, content in self.settings_files.items():
            write_atomic(folder / name, content)
        is_plain = self.template is None and not self.special.ends
        description = {
            "format": PLAIN_FORMAT if is_plain else FORMAT,
            "kind": self.model.kind,
            "vocab_size": self.vocab_size,
            "fingerprint": self.fingerprint,
            "special": self.special.to_dict(),
            "origin": self.origin,
        }
        if self.template is not None:
            description["template"] = dataclasses.asdict(self.template)
        write_json(folder / DESCRIPTION, description)

    @property
    def kind(self) -> str:
        """Return `sentencepiece` or `huggingface`."""
        return self.model.kind

    @property
    def chat_template(self) -> str | None:
        """Return the format of `encode_chat` for Hugging Face tokenizers; None without chat roles."""
        if not self.role_ids:
            return None
        begin = "".join(map(self.id_to_piece, self.begin_ids))
        return chat_template(self.role_ids, self.id_to_piece(self.end_id), begin)

    @property
    def has_own_chat_template(self) -> bool:
        """Return whether it was imported with a chat template, a program that bigtx does not run."""
        if not self.settings_files:
            return False
        from bigtx.tokenizer.huggingface_model import CHAT_TEMPLATE, settings_of

        if content := self.settings_files.get(CHAT_TEMPLATE):
            return content.decode(errors="replace") != self.chat_template
        return "chat_template" in settings_of(self.settings_files)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text; no special ids are added, and the text cannot produce any."""
        return self.encode_batch([text])[0]

    def encode_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of texts that a decoder continues: begin ids as in the template, and no end.

        Documents follow the end of another in training, so an empty text becomes the end id if there is no begin id.

        Raises:
            DataError: as in `encode_batch`.
        """
        return [[*self.begin_ids, *ids] or [self.end_id] for ids in self.encode_batch(texts)]

    def join(self, *texts: Sequence[int]) -> tuple[list[int], list[int]]:
        """Return the ids of one complete text, or of two, and the token type of each.

        The special ids are those of `whole_text`.

        Args:
            texts: the ids of each text.
        """
        return self.whole_text.fill(texts)

    @property
    def whole_text(self) -> Template:
        """Return the special ids around one complete text, or around two: those of the template.
        Without one, the end id is before the first text and after each.
        """
        if self.template:
            return self.template
        plain, first = around(None, self.end_id), Part(self.end_id, 0)
        return Template((first, *plain.single), (first, *plain.pair))

    def num_special(self, num_texts: int) -> int:
        """Return how many special ids `join` adds to one text, or to two."""
        return self.whole_text.num_special(num_texts)

    @property
    def source_ids(self) -> tuple[list[int], list[int]]:
        """Return the special ids before and after a text that the encoder of an encoder-decoder reads: the template's,
        and the end id, which ends sources in training.
        """
        after = self.template.after if self.template else []
        return self.begin_ids, after if self.end_id in after else [*after, self.end_id]

    def encode_sources(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of texts that the encoder of an encoder-decoder reads, an end id after each.

        Raises:
            DataError: as in `encode_batch`.
        """
        before, after = self.source_ids
        return [[*before, *ids, *after] for ids in self.encode_batch(texts)]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text; as `encode`, faster.

        They are those of the whole text, of any length: see `memory_for`.

        Raises:
            DataError: a text has half a surrogate pair, which is not a character.
        """
        try:
            if self.model.words is None:
                return self.model.encode_batch(texts)
            ids, lengths = self.model.words.encode(texts)
        except (TypeError, RuntimeError):
            refuse_surrogates(texts)
            raise
        return [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])] if len(texts) else []

    def memory_for(self, text: str) -> int:
        """Return the most bytes of memory that encoding a text needs, besides the ids.

        The BPE models that bigtx trains encode a long text in parts, cut between characters that are adjacent in
        no piece, which changes no id; the longest part counts. All other models read the whole text.
        """
        words = self.model.words
        parts = words.borders.cut(text) if words else [text]
        return self.model.memory_per_byte * max(map(utf8_length, parts))

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False) -> list[int]:
        """Return the ids of a chat: for each message the id of its role, those of its content, and the end id.

            <|user|>What is a token?</s><|assistant|>A piece of text.</s>

        A chat starts with the begin ids of the template, like every text; tokenizers that bigtx trains have none. A
        content cannot produce special ids: `</s>` in it is four characters. Transformers' `apply_chat_template`, with
        the template of an export, returns the same ids, except that a special token's name in a content becomes
        that token there.

        Args:
            messages: each with a `role`, one of `role_ids`, and a `content`, a text; other keys are not read.
            add_generation_prompt: end with the assistant's id, so that a model continues with its answer.

        Raises:
            DataError: as in `encode_messages`, or there is no role for the answer.
        """
        ids = [*self.begin_ids, *chain.from_iterable(self.encode_messages(messages))]
        if not add_generation_prompt:
            return ids
        if ASSISTANT not in self.role_ids:
            what = f"There is no role {ASSISTANT} for the answer; this tokenizer knows {', '.join(self.role_ids)}."
            raise DataError(what)
        return [*ids, self.role_ids[ASSISTANT]]

    def encode_messages(self, messages: Sequence[Mapping[str, Any]]) -> list[list[int]]:
        """Return the ids of each message of a chat, which `encode_chat` joins after the begin ids.

        Raises:
            DataError: the tokenizer has no chat roles or an imported chat template, or a message is not valid.
        """
        if self.has_own_chat_template:
            raise DataError(
                "This tokenizer was imported with its own chat template, a program that bigtx does not run; let "
                "transformers' apply_chat_template encode its chats."
            )
        if not self.role_ids:
            what = "This tokenizer has no chat roles; train one with e.g. 'chat_roles=[system,user,assistant,tool]'."
            raise DataError(what)
        check_messages(messages, self.role_ids)
        contents = self.encode_batch([message["content"] for message in messages])
        return [
            [self.role_ids[message["role"]], *content, self.end_id]
            for message, content in zip(messages, contents, strict=True)
        ]

    def encode_documents(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of texts as arrays, each text as in the template and followed by the end id.

        The end id is nowhere else, since it separates documents: a begin id that is the end id is left out
        after the end of the previous document.

        Returns:
            ids: [sum of lengths] unsigned, of all texts one after the other.
            lengths: int64 [texts] ids of each, special ones included.

        Raises:
            DataError: as in `encode_batch`.
        """
        before, after = self._around_document()
        if self.model.words is None or before:
            encoded = [[*before, *ids, *after] for ids in self.encode_batch(texts)]
            lengths = np.array([len(ids) for ids in encoded], np.int64)
            return np.fromiter(chain.from_iterable(encoded), np.uint32, int(lengths.sum())), lengths
        try:
            return self.model.words.encode(texts, after)
        except (TypeError, RuntimeError):
            refuse_surrogates(texts)
            raise

    def _around_document(self) -> tuple[list[int], list[int]]:
        """Return the special ids before and after each document of a corpus."""
        after = self.template.after if self.template else []
        before, after = ([i for i in ids if i != self.end_id] for ids in (self.begin_ids, after))
        return before, [*after, self.end_id]

    def decode(self, ids: Sequence[int], keep_special: bool = False, *, after: Sequence[int] = ()) -> str:
        """Return the text of ids.

        Args:
            keep_special: write special ids as their pieces; otherwise they have no text.
            after: the ids before them, such as those of the prompt, whose text is left out. Some tokenizers add
                a space before every text; after other text a space at the start is part of it.

        Raises:
            ValueError: an id below 0, such as the -100 of ignored labels.
            IndexError: an id beyond the vocabulary.
        """
        if len(ids) and min(ids) < 0:
            raise ValueError(f"{min(ids)} is not a token id")
        return self.model.decode(ids, keep_special, after)

    def stream(self, after: Sequence[int] = ()) -> Utf8Stream | WindowStream:
        """Return a decoder for ids that come one by one, as in generation; together they return the text of `decode`,
        except for bytes that are not UTF-8: a character before them has been returned already.
        """
        return self.model.stream(after)

    def id_to_piece(self, i: int) -> str:
        """Return the piece of an id as in its model."""
        return self.model.piece(i)

    def is_byte(self, i: int) -> bool:
        """Return whether an id is a byte of a character that has no piece of its own."""
        return self.model.is_byte(i)
