"""Messages about what is damaged or does not fit: it is restored from a copy, made again, or another one is named."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from advice.cases_again import Step, again_in, calls, take
from advice.cases_data import PREPARE
from advice.cases_training import ALONE
from advice.desk import Cases, Desk, Outcome, call, written
from advice.shelf import TEXTS

from bigtx.data.corpus import blocks
from bigtx.data.corpus.blocks import BlockReader
from bigtx.data.corpus.manifest import Manifest
from bigtx.engine import retention
from bigtx.engine.checkpoint import list_checkpoints, load_weights, newest, read_manifest, write_manifest
from bigtx.engine.trained import read_tokenizer
from bigtx.utils.files import sha256_file

CASES = Cases()
again = functools.partial(again_in, CASES)


def copied_in(
    cases: Cases,
    name: str,
    shown: str,
    advice: str,
    what: str,
    damage: Callable[[Desk], object],
    use: Step,
    *,
    right: Step | None = None,
) -> None:
    """Add a case of a folder that is damaged, and then copied again.

    Args:
        cases: the cases of a file.
        advice: what the message says to do.
        what: the folder, from the shelf.
        use: what leads to the message; `right` is done after it, and the same if it is not given.
    """

    def before(desk: Desk) -> None:
        desk.take(what)
        shutil.copytree(what, f"copies/{what}")
        damage(desk)

    def fix(desk: Desk) -> None:
        shutil.rmtree(what)
        shutil.copytree(f"copies/{what}", what)

    again_in(cases, name, shown, "=" + advice, use, right, before=before, fix=fix)


copied = functools.partial(copied_in, CASES)


# Corpora.


def shard(split: str = "train") -> Path:
    return next(Path(f"corpus/{split}").glob("*.tar"))


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def manifest(**changes: Any) -> Callable[[Desk], object]:
    def edit(desk: Desk) -> None:
        path = Path("corpus/train/manifest.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def opened(desk: Desk) -> Outcome:
    return call(lambda: Manifest.load(Path("corpus/train")) and "")


def tokenized(desk: Desk) -> Outcome:
    fingerprint = Manifest.load(Path("corpus/train")).tokenizer_fingerprint
    return call(lambda: blocks.load_tokenizer(Path("corpus"), fingerprint) and "")


def read(desk: Desk) -> Outcome:
    def all_blocks() -> None:
        reader = BlockReader(Manifest.load(Path("corpus/train")))
        for number in range(len(reader.manifest.blocks)):
            reader.block(number)

    return call(all_blocks)


def shortened(desk: Desk) -> Outcome:
    """A shard is shortened after the split was opened."""

    def block() -> None:
        reader = BlockReader(Manifest.load(Path("corpus/train")))
        shard().write_bytes(shard().read_bytes()[:-512])
        reader.block(0)

    return call(block)


def another_tokenizer(desk: Desk) -> None:
    shutil.rmtree("corpus/tokenizer")
    shutil.copytree(desk.shelf.other_tokenizer, "corpus/tokenizer")


def another_split(desk: Desk) -> None:
    shutil.rmtree("corpus/train")
    shutil.copytree("corpus/validation", "corpus/train")


def fetched(desk: Desk) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        return call(lambda: blocks._download(Path("tokenizer"), Path(folder) / "new") and "")  # type: ignore[arg-type]


def remove(*names: str) -> Callable[[Desk], object]:
    def do(desk: Desk) -> None:
        for name in names:
            shutil.rmtree(name) if Path(name).is_dir() else Path(name).unlink()

    return do


copied(
    "a_corpus_without_its_tokenizer",
    " is missing: the tokenizer that the corpus was prepared with",
    "copy it there again from where it came",
    "corpus",
    remove("corpus/tokenizer"),
    tokenized,
)
copied(
    "a_corpus_with_another_tokenizer",
    " is not the tokenizer that its corpus was prepared with",
    "copy it again from where it came",
    "corpus",
    another_tokenizer,
    tokenized,
)
copied(
    "a_flipped_bit_of_a_shard",
    "Copy the shard again",
    "Copy the shard again from where it was prepared",
    "corpus",
    lambda desk: flip(shard(), 1030),
    read,
)
copied(
    "a_shard_that_is_shortened",
    "; was it changed during the run?",
    "Restore it",
    "corpus",
    lambda desk: None,
    shortened,
    right=read,
)
copied("a_split_under_another_name", ": it was copied or renamed", "Restore it", "corpus", another_split, opened)
copied(
    "a_manifest_of_another_format",
    "; use the bigtx that wrote it, or ",
    "remove the corpus's folder and prepare it again",
    "corpus",
    manifest(format_version=99),
    opened,
)
copied(
    "a_manifest_that_was_edited",
    "does not have the hash that it contains",
    "restore it",
    "corpus",
    manifest(num_tokens=1),
    opened,
)
copied(
    "no_table_of_blocks",
    " is missing; restore it or ",
    "restore it",
    "corpus",
    remove("corpus/train/blocks.npy"),
    opened,
)
copied(
    "no_shard",
    " are not those of its manifest",
    "Copy them again from where they were prepared",
    "corpus",
    lambda desk: shard().unlink(),
    opened,
)
copied(
    "a_damaged_description_to_fetch",
    " is damaged; ",
    "copy the tokenizer again from where it came",
    "tokenizer",
    lambda desk: desk.write("tokenizer/bigtx_tokenizer.json", "["),
    fetched,
)
copied(
    "a_tokenizer_without_its_model",
    " is not complete; ",
    "copy the corpus with its tokenizer",
    "tokenizer",
    lambda desk: next(Path("tokenizer").glob("*.model")).unlink(),
    fetched,
)

# Checkpoints.

FIFTH, SIXTH = "decoder/checkpoints/step-00000005", "decoder/checkpoints/step-00000006"


def edit(folder: str, **changes: Any) -> None:
    """Write a manifest again, with another content and the hash of that."""
    content = read_manifest(Path(folder))
    Path(folder, "manifest.json").unlink()
    write_manifest(Path(folder), content | changes)


def two_checkpoints(damage: Callable[[Path], object]) -> Callable[[Desk], object]:
    """A run with two checkpoints, the second of them damaged."""

    def before(desk: Desk) -> None:
        desk.take("decoder")
        shutil.copytree(FIFTH, "copy")
        edit("copy", step=6)
        Path("copy").rename(SIXTH)
        damage(Path(SIXTH))

    return before


def weights(folder: str) -> Step:
    return lambda desk: call(lambda: list(load_weights(folder)) and "")


def cut(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-4])


def flip_end(folder: Path) -> None:
    flip(next(folder.glob("*.safetensors")), -1)


def odd_names(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    file = next(folder.glob("*.safetensors"))
    save_file({"odd": torch.zeros(1)}, file)
    edit(str(folder), files={file.name: {"size": file.stat().st_size, "sha256": sha256_file(file)}})


ANOTHER = "use another checkpoint of the run"
for name, shown, damage in (
    ("a_file_of_a_checkpoint_cut_short", " bytes instead of ", cut),
    ("a_flipped_bit_of_a_checkpoint", "; use another checkpoint of the run", flip_end),
    ("a_file_that_bigtx_did_not_write", "which is not a range of a parameter", odd_names),
    (
        "a_manifest_that_bigtx_does_not_write",
        "; bigtx does not write such a manifest",
        lambda folder: edit(str(folder), parameters=3),
    ),
):
    again(name, shown, ANOTHER, weights(SIXTH), weights(FIFTH), before=two_checkpoints(damage))
again(
    "a_damaged_checkpoint_to_export",
    "; use another checkpoint of the run",
    ANOTHER,
    f"bigtx export {SIXTH} output=new --no-verify",
    f"bigtx export {FIFTH} output=new --no-verify",
    before=two_checkpoints(flip_end),
)
again(
    "a_run_without_a_checkpoint",
    " has no complete checkpoint",
    "name a run that has saved one",
    calls(newest, "empty"),
    calls(newest, "decoder"),
    before=take("decoder"),
)
again(
    "a_renamed_checkpoint",
    ": it is a copy under another name, or was renamed",
    "restore its name",
    calls(read_manifest, Path(SIXTH)),
    calls(read_manifest, Path(FIFTH)),
    before=lambda desk: (desk.take("decoder"), Path(FIFTH).rename(SIXTH)),
    fix=lambda desk: Path(SIXTH).rename(FIFTH),
)


def chosen(folder: str) -> Step:
    def choose(desk: Desk) -> Outcome:
        with written():
            return call(lambda: retention.choose(Path(folder), ALONE, lambda *said: None) and "")

    return choose


def cut_fifth(desk: Desk) -> None:
    cut(Path(FIFTH))


copied(
    "a_damaged_checkpoint_to_resume",
    " is damaged (see above)",
    "restore it from a copy",
    "decoder",
    cut_fifth,
    chosen(FIFTH),
)
copied(
    "only_damaged_checkpoints",
    "every checkpoint in ",
    "restore one from a copy",
    "decoder",
    cut_fifth,
    chosen("decoder"),
)
copied(
    "a_run_without_its_tokenizer",
    " is missing: the tokenizer that the run was trained with",
    "restore that folder from a copy",
    "decoder",
    remove("decoder/tokenizer"),
    calls(read_tokenizer, "decoder"),
)


def swapped_tokenizer(desk: Desk) -> None:
    edit(f"copies/{FIFTH}", tokenizer=read_tokenizer("decoder").fingerprint)
    shutil.rmtree("decoder")
    shutil.copytree("copies/decoder", "decoder")
    shutil.rmtree("decoder/tokenizer")
    shutil.copytree(desk.shelf.other_tokenizer, "decoder/tokenizer")


copied(
    "a_run_with_another_tokenizer",
    " is not the tokenizer that ",
    "restore that folder from a copy",
    "decoder",
    swapped_tokenizer,
    calls(read_tokenizer, "decoder"),
)


def adapted(desk: Desk) -> Outcome:
    return call(lambda: list(load_weights(list_checkpoints("adapters")[0])) and "")


copied(
    "damaged_frozen_weights",
    " holds only what its run trains",
    "from a copy",
    "adapters",
    lambda desk: cut(Path("adapters/frozen")),
    adapted,
)
copied(
    "other_frozen_weights",
    " does not hold the weights that ",
    "restore it from a copy",
    "adapters",
    lambda desk: edit("adapters/frozen", step=9),
    adapted,
)

# Preparation.


def prepared(desk: Desk) -> None:
    desk.take("tokenizer")
    desk.write("texts/a.txt", TEXTS[0])


again(
    "a_corpus_made_otherwise",
    " is a corpus already, made with other settings",
    "Choose another `output`",
    f"{PREPARE} seed=5",
    f"{PREPARE} seed=5 output=other",
    before=lambda desk: (prepared(desk), desk.done(PREPARE)),
)
again(
    "other_content_where_a_corpus_is_prepared",
    " is prepared, but has other content",
    "move that away",
    PREPARE,
    before=lambda desk: (prepared(desk), desk.write("new.partial/mine.txt", "")),
    fix=lambda desk: Path("new.partial").rename("elsewhere"),
)
again(
    "another_number_of_parts",
    " and this command would use 3",
    "Continue with the number of the start",
    f"{PREPARE} part=1/3",
    f"{PREPARE} part=1/2",
    before=lambda desk: (prepared(desk), desk.done(f"{PREPARE} part=1/2")),
)
again(
    "an_input_of_nothing",
    "The input has no documents",
    "check input.paths",
    PREPARE,
    PREPARE.replace("=texts", "=others"),
    before=lambda desk: (prepared(desk), desk.write("texts/a.txt", ""), desk.write("others/a.txt", TEXTS[0])),
)
again(
    "files_of_other_suffixes",
    "Skipped, by their suffix: ",
    "see input.text_suffixes",
    PREPARE,
    f"{PREPARE} input.text_suffixes=[.txt,.log] output=other",
    before=lambda desk: (prepared(desk), desk.write("texts/b.log", TEXTS[0])),
)
again(
    "a_folder_without_texts",
    "No text in ",
    "another folder",
    PREPARE.replace("=texts", "=others"),
    PREPARE,
    before=lambda desk: (prepared(desk), desk.write("others/a.bin", "")),
)
again(
    "a_suffix_that_is_read_otherwise",
    "files that end in .jsonl are read as ",
    "leave it out",
    f"{PREPARE} input.text_suffixes=[.txt,.jsonl]",
    f"{PREPARE} input.text_suffixes=[.txt]",
    before=prepared,
)
again(
    "too_many_paths",
    " expands to more than ",
    "use fewer",
    PREPARE.replace("=texts", "='texts/{0000000..9999999}.txt'"),
    PREPARE.replace("=texts", "='texts/{a,b}.txt'"),
    before=lambda desk: (prepared(desk), desk.write("texts/b.txt", TEXTS[0])),
)
again(
    "texts_in_another_field",
    "; see input.text_field",
    "see input.text_field",
    PREPARE,
    f"{PREPARE} input.text_field=body",
    before=lambda desk: (desk.take("tokenizer"), desk.lines("texts/a.jsonl", *[{"body": TEXTS[0]}] * 3)),
)
again(
    "a_format_without_text",
    "convert it to text or JSON lines first",
    "convert it to text",
    PREPARE.replace("=texts", "=texts/b.pdf"),
    PREPARE.replace("=texts", "=texts/a.txt"),
    before=lambda desk: (prepared(desk), desk.write("texts/b.pdf", "")),
)

# Records.


def records(*given: dict[str, Any]) -> Callable[[Desk], object]:
    return lambda desk: (desk.take("classifier"), desk.lines("in.jsonl", *given))


LOOK = "bigtx predict classifier input=in.jsonl"
for name, shown, record in (
    ("a_number_for_a_text", ", not a text; see ", {"text": 5, "body": "red"}),
    ("null_for_a_text", " is null; see ", {"text": None, "body": "red"}),
    ("a_text_in_another_field", "(its fields: body); see ", {"body": "red"}),
):
    again(name, shown, r"see (data\.fields\.text)$", LOOK, f"{LOOK} {{}}=body", before=records(record))
again(
    "a_table_without_names",
    "the first line of a table has to name its columns",
    r"; see (data\.fields\.text)$",
    LOOK.replace("jsonl", "csv"),
    LOOK.replace("jsonl", "csv") + " {}=red",
    before=lambda desk: (desk.take("classifier"), desk.write("in.csv", "red,b\napple,c\n")),
)
again(
    "a_misspelled_class",
    "is unknown to the model",
    r"did you mean '(joy)'\?",
    "bigtx evaluate classifier wandb=off data=in.jsonl",
    before=records({"text": "red", "label": "joyy"}),
    fix=lambda desk: desk.lines("in.jsonl", {"text": "red", "label": "joy"}),
)
again(
    "a_class_that_is_no_text",
    ", and a class is a text or a whole number",
    "see data.fields.label",
    "bigtx evaluate classifier wandb=off data=in.jsonl",
    "bigtx evaluate classifier wandb=off data=in.jsonl data.fields.label=other",
    before=records({"text": "red", "label": 0.5, "other": "joy"}),
)

# Foreign models.


def foreign(name: str, shown: str, advice: str, damage: Callable[[Desk], object]) -> None:
    """An import of a damaged folder, which is then fetched or copied again."""

    def do(desk: Desk) -> None:
        desk.without("transformers")
        damage(desk)

    copied(name, shown, advice, "foreign", do, "bigtx import foreign output=new")


def config(**changes: Any) -> Callable[[Desk], object]:
    def edit_config(desk: Desk) -> None:
        path = Path("foreign/config.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit_config


def split(desk: Desk, **index: Any) -> None:
    """Name the file of weights as a shard, with an index."""
    Path("foreign/model.safetensors").rename("foreign/model-00001-of-00001.safetensors")
    desk.write("foreign/model.safetensors.index.json", json.dumps(index))


foreign(
    "a_quantized_model",
    " has a quantization_config",
    "import the original instead",
    config(quantization_config={"bits": 4}),
)
foreign(
    "a_folder_that_is_no_model",
    " has no config.json",
    "name the folder of a Hugging Face model",
    remove("foreign/config.json"),
)
foreign(
    "a_config_that_is_no_object",
    " is not a JSON object",
    "copy it again from its source",
    lambda desk: desk.write("foreign/config.json", "[]"),
)
foreign(
    "an_index_that_does_not_fit",
    " does not fit the files",
    "copy the folder again",
    lambda desk: split(desk, weight_map={"odd": "model-00001-of-00001.safetensors"}),
)
foreign("an_index_without_a_map", " has no weight_map", "copy it again from its source", split)
foreign(
    "a_shard_that_is_not_there",
    " which model.safetensors.index.json names",
    "fetch the missing shards",
    lambda desk: split(desk, weight_map={"odd": "model-00002-of-00002.safetensors"}),
)
foreign("weights_cut_short", " is not a complete safetensors file", "fetch it again", lambda desk: cut(Path("foreign")))
foreign(
    "weights_as_a_pickle",
    " has its weights as pickle only",
    "look for a model.safetensors of the same model",
    lambda desk: Path("foreign/model.safetensors").rename("foreign/pytorch_model.bin"),
)
foreign(
    "another_head",
    ", and bigtx has no such head",
    "import the model that predicts tokens",
    config(architectures=["LlamaForTokenClassification"]),
)
foreign(
    "adapters_of_a_prompt",
    "; adapters of this kind cannot be merged into a model",
    "import the base 'BASE'",
    lambda desk: desk.write("foreign/adapter_config.json", '{"peft_type": "PROMPT_TUNING"}'),
)
