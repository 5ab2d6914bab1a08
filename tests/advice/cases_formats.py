"""Messages about models and tokenizers in the formats of other programs; what they advise is done."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from advice.cases_again import again_in, take
from advice.cases_copies import copied_in
from advice.desk import Attempt, Cases, Desk, Outcome, call
from safetensors.torch import load_file, save_file

from bigtx.config.load import load, load_run_config
from bigtx.config.schema import FinetuneConfig
from bigtx.interop import adapters
from bigtx.interop.families import describe
from bigtx.tokenizer.tokenizer import Tokenizer

CASES = Cases()
again = functools.partial(again_in, CASES)
copied = functools.partial(copied_in, CASES)
IMPORT = "bigtx import foreign output=new"
DECODER = take("foreign")


def foreign(
    name: str,
    shown: str,
    advice: str,
    damage: Callable[[Desk], object],
    fix: Callable[[Desk], object] | None = None,
    make: Callable[[Desk], object] = DECODER,
) -> None:
    """An import of a changed folder, which is then mended, or replaced by what it was."""

    def change(desk: Desk) -> None:
        desk.without("transformers")
        damage(desk)

    if fix:
        again(name, shown, "=" + advice, IMPORT, before=lambda desk: (make(desk), change(desk)), fix=fix)
    else:
        copied(name, shown, advice, "foreign", change, IMPORT)


def config(**changes: Any) -> Callable[[Desk], object]:
    def edit(desk: Desk) -> None:
        path = Path("foreign/config.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def tensors(**changes: torch.Tensor | None) -> Callable[[Desk], object]:
    """Replace tensors, or take them away."""

    def edit(desk: Desk) -> None:
        path = Path("foreign/model.safetensors")
        kept = {key: tensor for key, tensor in (load_file(path) | changes).items() if tensor is not None}
        save_file(kept, path, metadata={"format": "pt"})

    return edit


def both(*edits: Callable[[Desk], object]) -> Callable[[Desk], object]:
    return lambda desk: [edit(desk) for edit in edits]


# Classifiers.


def a_classifier(desk: Desk) -> None:
    desk.take("foreign_classifier")
    Path("foreign_classifier").rename("foreign")


LLAMA = "LlamaForSequenceClassification"
foreign(
    "a_classifier_of_another_family",
    ", but bigtx cannot read classifiers of model_type 'llama'",
    "import the model that predicts tokens",
    config(architectures=["RobertaForSequenceClassification"]),
)
foreign(
    "a_classifier_of_many_labels",
    ", but a classifier of bigtx assigns each text one of two or more classes",
    "import the model that it was trained from",
    config(architectures=[LLAMA], problem_type="multi_label_classification"),
)
foreign(
    "two_classes_of_one_name",
    "id2label has two classes with the same name",
    "name each once",
    config(id2label={"0": "joy", "1": "joy"}),
    config(id2label={"0": "joy", "1": "woe"}),
    a_classifier,
)


@CASES.case(", but bigtx cannot read classifiers of model_type 'llama'", r"fine-tune it with (task=classify)$")
def an_imported_model_to_classify(desk: Desk) -> Attempt:
    """What is imported instead is the base of a classifier."""
    desk.without("transformers")
    desk.take("foreign")
    desk.lines("in.jsonl", {"text": "red", "label": "joy"})
    desk.done(IMPORT)
    config(architectures=["RobertaForSequenceClassification"])(desk)

    def attempt(words: Any) -> Outcome:
        if not words:
            return desk.run("bigtx import foreign output=other")
        settings = ["base=new", "data.train=in.jsonl", "run_dir=tuned", "train.epochs=1"]
        return call(lambda: load(FinetuneConfig, [*settings, *words]) and "")

    return attempt


def exported(desk: Desk, *, is_apart: bool) -> Outcome:
    """What is said of a classifier whose texts end with a token, which is the padding too or not."""
    tokenizer = Tokenizer.load(desk.shelf.tokenizer)
    if not is_apart:
        special = dataclasses.replace(tokenizer.special, pad=tokenizer.end_id)
        tokenizer = Tokenizer(tokenizer.model, special, tokenizer.origin)
    return call(lambda: describe(load_run_config(desk.shelf.foreign_classifier.with_name("scored")), tokenizer) and "")


again(
    "padding_that_ends_a_text",
    " ends each text and is the padding too",
    "train with a tokenizer that has a separate padding token",
    lambda desk: exported(desk, is_apart=False),
    lambda desk: exported(desk, is_apart=True),
)

# Weights.

foreign(
    "a_decoder_without_its_head",
    " without its head, which predicts tokens",
    "import the whole model, as LlamaForCausalLM saves it",
    tensors(**{"lm_head.weight": None}),
)
foreign(
    "a_head_beside_a_tied_one",
    " ties the head to the embedding (tie_word_embeddings)",
    "if the model has a separate head, write false there",
    config(tie_word_embeddings=True),
    config(tie_word_embeddings=False),
)
foreign(
    "weights_of_whole_numbers",
    " has tensors that are not fp64, fp32, bf16 or fp16",
    "import the original weights",
    tensors(**{"lm_head.weight": torch.zeros(420, 16, dtype=torch.int8)}),
)


@CASES.case(
    " has a form that PEFT's adapters cannot have", r"`(bigtx export .*?)`", fill={"FOLDER": "made --no-verify"}
)
def adapters_of_another_form(desk: Desk) -> Attempt:
    """No family of bigtx has such a form, so the comparison of the products is replaced by one that fails."""
    desk.take("adapters")
    with desk.patch.context() as patch:
        patch.setattr(adapters.torch, "allclose", lambda *given, **options: False)
        return desk.once("bigtx export adapters to=peft output=new base=x --no-verify")


# Tokenizers.


def tokenizer(name: str, shown: str, change: Callable[[dict[str, Any]], object]) -> None:
    """A tokenizer whose description was edited; then its folder is copied again."""

    def damage(desk: Desk) -> None:
        path = Path("tokenizer/bigtx_tokenizer.json")
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    copied(name, shown, "Copy it again from its source.", "tokenizer", damage, "bigtx tokenizer inspect tokenizer")


tokenizer("an_id_that_no_piece_has", " has the id 1000000, but ", lambda found: found["special"].update(mask=10**6))
tokenizer("a_fingerprint_of_another_one", " do not belong together ", lambda found: found.update(fingerprint="0" * 64))
