"""Import and export of Hugging Face tokenizers.

An export loads with transformers' AutoTokenizer and returns bigtx's ids, without custom code:

- `tokenizer.json` has the tokenizer itself: one that was imported from Hugging Face is written unchanged, a
  sentencepiece model is converted (`bigtx.interop.sentencepiece_json`).
- `tokenizer_config.json` names the special tokens and makes transformers read tokenizer.json unchanged, instead of
  building the tokenizer of other models of this type.
- `chat_template.jinja` writes chats as `Tokenizer.encode_chat` does.

There is one intended difference: where the text spells a special token, as chat templates do, transformers returns its
id, and bigtx the ids of its characters. With `split_special_tokens=True` transformers behaves as bigtx.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from bigtx.config.schema import FinetuneConfig
from bigtx.interop.classes import is_classifier
from bigtx.interop.read import read_config
from bigtx.interop.sentencepiece_json import to_tokenizer_json
from bigtx.tokenizer.huggingface_model import (
    CHAT_TEMPLATE,
    SENTENCEPIECE_NAMES,
    TOKENIZER_CONFIG,
    HuggingFaceModel,
    settings_of,
)
from bigtx.tokenizer.sentencepiece_model import SentencePieceModel
from bigtx.tokenizer.special import SPACE_MARK, Template, around, observed
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.utils.errors import DataError, require
from bigtx.utils.files import json_value, write_atomic, write_json
from bigtx.utils.shell import command

READ_WITH_END = frozenset({"bert", "modernbert", "roberta", "t5"})
"""Model types that read a text with its end, as in training; the end of a decoder's prompt is not the text's end."""

HARD_TEXTS = (
    "",
    " ",
    "a",
    "The naïve café owner's well-known co-operation wasn't re-evaluated.",
    "def area(self):\n    if self.width > 0:\n\treturn self.width**2  # 0x7f\n",
    " one before, one after ",
    "   three before, three after   ",
    "two  three   four    eight        sixteen                spaces",
    "\ta\t\tb\n\nc\r\nd\r\r\n\n\n",
    "\n",
    "\r\n",
    "1234567 3.14159 2026-11-30 1e-05 0000000000",
    "--- ----- ======= ....... !!!!!!! hahahahaha",
    "Привет, мир! 你好，世界。 नमस्ते दुनिया สวัสดี ㅎㅇ 한국어 日本語",
    "שלום עולם السلام عليكم \u200fabc\u200e \u202bעברית\u202c",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f3f3\ufe0f\u200d\U0001f308 \U0001f44d\U0001f3fd",
    "é e\u0301 ǖ u\u0308\u0304 Z\u0351\u036b\u0343 각 \u1100\u1161\u11a8",
    "\ufb01 \u2460 \u00bd \u2163 \uff21\uff22\uff23 \u210c \u00b5",
    "a\x00b\x01\x02\x07\x08\x0b\x0c\x1b[0m\x7f\x80\x9f",
    "\ufeffbyte order mark\ufeff",
    "no-break\u00a0space, \u3000ideographic\u3000, thin\u2009, zero\u200bwidth, line\u2028paragraph\u2029",
    "soft\u00adhyphen",
    "\ufffd \ufffe \uffff \U0010ffff \U000e0041 \ue000",
    "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft",
    "x" * 300,
    "ab" * 300,
    "https://example.org/a/b?c=d&e=%20f#g user@example.org C:\\temp\\new",
    "<0x41><0x0A> <0xE2><0x96><0x81>",
    "<mask></s><s><unk><pad> <|user|>hello</s><|assistant|> <extra_id_0> <extra_id_5>",
    "[CLS] [SEP] [MASK] [PAD] [UNK] <|endoftext|> <|im_start|>user",
    "a\u2581b \u2581 \u2581\u2581",
)
"""Texts that tokenizers treat differently, U+2581 (sentencepiece's mark of a space) and special names included."""

_CHAT = (("system", "Be brief.\n"), ("user", " What is  2+2?"), ("assistant", "4"), ("tool", '{"a": 1}'))
_PAIR = ("The first text.", "And 2 more words")


def export_tokenizer(
    tokenizer: Tokenizer,
    folder: Path,
    *,
    model_type: str,
    max_length: int,
    template: Template | None = None,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Write the files from which AutoTokenizer makes this tokenizer.

    By default AutoTokenizer then adds the special ids of `template_of_export` to texts.

    Args:
        folder: the folder of the export; it needs its config.json before transformers reads the tokenizer.
        model_type: the value in that config.json.
        max_length: the most tokens of a text of the model.
        template: in place of `template_of_export`, for a tokenizer that bigtx trained.
        settings: settings of tokenizer_config.json, in place of others.

    Raises:
        DataError: the tokenizer cannot be converted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = json_value(tokenizer.settings_files.get(TOKENIZER_CONFIG, b"{}"))
    model = tokenizer.model
    if isinstance(model, SentencePieceModel):
        template = template or template_of_export(tokenizer, model_type)
        write_json(folder / HuggingFaceModel.file_name, to_tokenizer_json(model, template))
    else:
        write_atomic(folder / HuggingFaceModel.file_name, model.data)
        for name, content in tokenizer.settings_files.items():
            write_atomic(folder / name, content)
    if not tokenizer.settings_files:
        config |= _special_tokens(tokenizer)
        config |= {
            "clean_up_tokenization_spaces": False,
            "padding_side": "right" if model_type in READ_WITH_END else "left",
        }
    # An export has no foreign code.
    config.pop("auto_map", None)
    config |= {"tokenizer_class": _tokenizer_class(model_type), "model_max_length": max_length}
    config |= settings or {}
    write_json(folder / TOKENIZER_CONFIG, config)
    if tokenizer.chat_template and not tokenizer.has_own_chat_template:
        write_atomic(folder / CHAT_TEMPLATE, tokenizer.chat_template)


def export_classifier_tokenizer(tokenizer: Tokenizer, folder: Path, run: FinetuneConfig, *, model_type: str) -> None:
    """Export a tokenizer as `export_tokenizer` does, for a classifier: texts and pairs have the special ids and the
    lengths that they have in `bigtx predict`, and padding comes after them.

    Args:
        run: the config of the classifier.

    Raises:
        DataError: the tokenizer cannot be converted.
    """
    names = ["input_ids", "token_type_ids", "attention_mask"]
    if run.model.num_token_types < 2:
        names.remove("token_type_ids")
    settings: dict[str, Any] = {
        "model_input_names": names,
        "padding_side": "right",
        "truncation_side": "left" if run.classify.truncate == "start" else "right",
    }
    if "pad_token" not in settings_of(tokenizer.settings_files):
        settings["pad_token"] = tokenizer.id_to_piece(tokenizer.pad_id)
    export_tokenizer(
        tokenizer,
        folder,
        model_type=model_type,
        max_length=run.data.max_length or run.model.max_sequence_length,
        template=tokenizer.whole_text,
        settings=settings,
    )


def template_of_export(tokenizer: Tokenizer, model_type: str) -> Template:
    """Return the special ids that transformers adds to texts by default, once the tokenizer is exported.

    They are the tokenizer's own if it was imported. Otherwise the end id follows a text for an encoder or a T5,
    which read texts in this form in training, and a decoder gets none.
    """
    return tokenizer.template or around(None, tokenizer.end_id if model_type in READ_WITH_END else None)


def import_tokenizer(folder: Path) -> Tokenizer:
    """Import the tokenizer of a Hugging Face folder, with its ids unchanged.

    A tokenizer.json is imported unchanged, if transformers (where installed) adds the special ids to texts that
    the files define. A sentencepiece model alone is imported if transformers returns the same ids: these depend
    on the model's type and the settings next to it.

    Raises:
        DataError: the tokenizer is missing, or transformers uses it in another way.
    """
    if (folder / HuggingFaceModel.file_name).is_file():
        tokenizer = Tokenizer.from_huggingface(folder)
        try:
            differences = list(_template_differences(tokenizer, load_tokenizer(folder), tokenizer.template))
        except DataError:  # transformers is not installed, or cannot load the tokenizer.
            return tokenizer
        _refuse_differences(folder, HuggingFaceModel.file_name, differences)
        return tokenizer
    names = [name for name in SENTENCEPIECE_NAMES if (folder / name).is_file()]
    if not names:
        what = f"no {HuggingFaceModel.file_name} and no sentencepiece model ({', '.join(SENTENCEPIECE_NAMES)})"
        raise DataError(f"{folder} has no tokenizer: {what}.")
    tokenizer = Tokenizer.from_sentencepiece(folder / names[0])
    theirs = load_tokenizer(folder)
    if theirs.is_fast:
        # The special ids of another backend's library cannot be read; then the comparison decides.
        tokenizer = tokenizer.changed(template=observed(lambda *texts: theirs(*texts).encodings[0]))
    # bigtx keeps U+2581, but sentencepiece and transformers convert it to a space.
    texts = [text for text in HARD_TEXTS if SPACE_MARK not in text]
    _refuse_differences(folder, names[0], _differences(tokenizer, theirs, texts, tokenizer.template))
    return tokenizer


def _refuse_differences(folder: Path, name: str, differences: Sequence[str]) -> None:
    if differences:
        place = json.dumps(str(folder), ensure_ascii=False)  # Its quotation marks are inside those of the shell.
        script = f"from transformers import AutoTokenizer as A; A.from_pretrained({place}).save_pretrained({place})"
        raise DataError(
            f"Transformers does not use {folder / name} unchanged: {differences[0]}"
            f"{f' (and {len(differences) - 1} more differences)' if differences[1:] else ''}. Let transformers write "
            f"its own version as a {HuggingFaceModel.file_name}, and try again: {command('python', '-c', script)}"
        )


def compare_tokenizers(tokenizer: Tokenizer, folder: Path) -> list[str]:
    """Return the differences between a folder's AutoTokenizer and a tokenizer of bigtx.

    Special ids, the vocabulary's size, the ids of `HARD_TEXTS` and of a chat are compared, and the special ids around
    texts and pairs by default; the network is not used, and no code in the folder runs.

    Returns:
        One line for each difference; none if there is no difference.

    Raises:
        DataError: transformers is not installed, or cannot load the folder.
    """
    theirs = load_tokenizer(folder)
    config = read_config(folder)
    if is_classifier(config):
        return _differences(tokenizer, theirs, HARD_TEXTS, tokenizer.whole_text)
    template = template_of_export(tokenizer, config["model_type"])
    # A tokenizer that an earlier release imported is exported unchanged, with any special ids around texts.
    is_unknown = tokenizer.template is None and isinstance(tokenizer.model, HuggingFaceModel)
    return _differences(tokenizer, theirs, HARD_TEXTS, None if is_unknown else template)


def _special_tokens(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return names for the special ids, as in tokenizer_config.json."""
    own = tokenizer.special
    named = {
        "pad_token": own.pad,
        "bos_token": own.begin,
        "eos_token": own.end,
        "unk_token": own.unknown,
        "mask_token": own.mask,
    }
    tokens: dict[str, Any] = {name: tokenizer.id_to_piece(i) for name, i in named.items() if i is not None}
    extra = [*own.sentinels, *own.roles.values()]
    if extra:
        tokens["additional_special_tokens"] = [tokenizer.id_to_piece(i) for i in extra]
    return tokens


def _tokenizer_class(model_type: str) -> str:
    """Return the class with which transformers 5 reads tokenizer.json unchanged.

    For most types it is the general one. Where transformers does not trust the class in such folders, it uses the
    type's own class instead, which builds another tokenizer; it does not replace a class without a name.
    """
    return "" if model_type == "qwen2" else "PreTrainedTokenizerFast"


def load_tokenizer(folder: Path) -> Any:
    """Return transformers' own tokenizer of a folder.

    Raises:
        DataError: transformers is not installed, or cannot load the folder.
    """
    what = "The check of a tokenizer needs transformers, which is not installed: pip install 'bigtx[huggingface]'"
    require("transformers", what, DataError)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # The underlying libraries raise bare Exception too.
        raise DataError(f"Transformers cannot load the tokenizer in {folder}: {error}") from None


def _differences(tokenizer: Tokenizer, theirs: Any, texts: Sequence[str], template: Template | None) -> list[str]:
    return [
        *_special_differences(tokenizer, theirs),
        *_text_differences(tokenizer, theirs, texts),
        *_template_differences(tokenizer, theirs, template),
        *_chat_difference(tokenizer, theirs),
    ]


def _special_differences(tokenizer: Tokenizer, theirs: Any) -> Iterator[str]:
    own = tokenizer.special
    pairs = {
        "the end id": (own.end, theirs.eos_token_id, theirs.sep_token_id),
        "the mask id": (own.mask, theirs.mask_token_id),
        "the size of the vocabulary": (tokenizer.vocab_size, max(theirs.get_vocab().values()) + 1),
    }
    for what, (mine, *others) in pairs.items():
        if mine not in others:
            yield f"{what} is {mine} in bigtx and {others[0]} in transformers"


def _text_differences(tokenizer: Tokenizer, theirs: Any, texts: Sequence[str]) -> Iterator[str]:
    names = [str(token) for token in theirs.get_added_vocab()]
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        plain = theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if plain != ids:
            yield f"{text!a:.60}: {_first_difference(ids, plain)}"
        elif not any(name in text for name in names):
            usual = theirs(text, add_special_tokens=False)["input_ids"]
            if usual != ids:
                yield f"{text!a:.60}, with special tokens parsed: {_first_difference(ids, usual)}"


def _template_differences(tokenizer: Tokenizer, theirs: Any, template: Template | None) -> Iterator[str]:
    """Yield differences in transformers' special ids around one text and around two; nothing is compared without a
    template.
    """
    if template is None:
        return
    for what, texts in (("one text", _PAIR[:1]), ("two texts", _PAIR)):
        # Special ids are around the ids that transformers returns for the texts themselves.
        plain = [theirs(text, add_special_tokens=False)["input_ids"] for text in texts]
        ids, types = template.fill(plain)
        found = theirs(*texts)
        if found["input_ids"] != ids:
            yield f"{what} with special ids: {_first_difference(ids, found['input_ids'])}"
        elif found.get("token_type_ids", types) != types:
            yield f"the token types of {what}: {_first_difference(types, found['token_type_ids'])}"


def _chat_difference(tokenizer: Tokenizer, theirs: Any) -> Iterator[str]:
    chat = [{"role": role, "content": content} for role, content in _CHAT if role in tokenizer.role_ids]
    if not chat or tokenizer.has_own_chat_template:
        return
    if not theirs.chat_template:
        yield "transformers has no chat template"
        return
    ids = tokenizer.encode_chat(chat)
    rendered = theirs.apply_chat_template(chat, return_dict=False)
    if rendered != ids:
        yield f"a chat: {_first_difference(ids, rendered)}"


def _first_difference(mine: list[int], theirs: list[int]) -> str:
    pairs = zip_longest(mine, theirs)
    at = next(number for number, (one, other) in enumerate(pairs) if one != other)
    return f"from token {at} on, bigtx has {mine[at : at + 5]} and transformers {theirs[at : at + 5]}"
