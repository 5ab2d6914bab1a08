"""Messages about the texts and rules of a preparation, and about shards that a run reads."""

from __future__ import annotations

import functools
import io
import json
import shutil
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from advice.cases_again import Step, again_in
from advice.cases_copies import prepared
from advice.cases_data import PREPARE
from advice.desk import Cases, Desk, Outcome, call
from advice.shelf import TEXTS
from corpora import write_split

from bigtx.config.load import load
from bigtx.config.schema import DataConfig, FinetuneConfig, ForeignConfig, PrepareConfig, SourceConfig
from bigtx.data.prepare import job
from bigtx.data.stream.foreign import check_shards
from bigtx.data.stream.order import check_sources
from bigtx.data.text.near import SignaturePart
from bigtx.data.text.rules import check_rules
from bigtx.finetuning.records import open_task_data
from bigtx.tokenizer.tokenizer import Tokenizer

CASES = Cases()
again = functools.partial(again_in, CASES)

# Texts.


def with_more(desk: Desk) -> None:
    """A text of few words, and a folder with more of them."""
    prepared(desk)
    desk.write("texts/a.txt", "red apple tree")
    desk.write("more/a.txt", TEXTS[0])


FEW = f"{PREPARE} filters.min_words=50"
for name, right in (
    ("a_rule_that_removes_everything", f"{PREPARE} filters.min_words=3"),
    ("a_rule_that_needs_more_text", f"{FEW} input.paths=[texts,more]"),
):
    advice = "Relax those rules" if "=3" in right else "add more text"
    again(name, "No document is left: ", "=" + advice, FEW, right, before=with_more)
for name, advice, right in (
    ("a_sample_without_text", "check input.paths", f"{FEW} --dry-run input.paths=more"),
    ("a_sample_that_rules_remove", "the rules", f"{PREPARE} --dry-run"),
):
    again(name, "No text in 1 sampled file", "=" + advice, f"{FEW} --dry-run", right, before=with_more)
again(
    "a_text_without_a_suffix",
    "if it is plain text, give it a name",
    r"give it a name that ends in (\.txt)",
    PREPARE.replace("=texts", "=[texts/README]"),
    PREPARE.replace("=texts", "=[texts/README{}]"),
    before=lambda desk: (prepared(desk), desk.write("texts/README", TEXTS[0])),
    fix=lambda desk: Path("texts/README").rename("texts/README.txt"),
)


def shard(path: str, *members: tuple[str, str]) -> None:
    """Write a tar of members in this order."""
    Path(path).parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, text in members:
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            archive.addfile(info, io.BytesIO(text.encode()))


RECORD, TEXT, OTHER = ("a.json", '{"source": "x"}'), ("a.txt", TEXTS[0]), ("b.txt", TEXTS[0])
again(
    "a_sample_whose_members_are_apart",
    "it is separate from the other members",
    "write the members of a sample one after the other",
    f"{PREPARE} input.max_rejects=0",
    before=lambda desk: (desk.take("tokenizer"), shard("texts/a.tar", RECORD, OTHER, TEXT)),
    fix=lambda desk: shard("texts/a.tar", RECORD, TEXT, OTHER),
)

# Rules.


def questions(*texts: str) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def evaluation_sets(content: str) -> Callable[[Desk], object]:
    """A text to prepare, an evaluation set with a content, and one of long texts."""
    return lambda desk: (
        prepared(desk),
        desk.write("set.jsonl", content),
        desk.write("other.jsonl", questions("one two three four five six seven eight nine ten")),
    )


COMPARED = f"{PREPARE} decontaminate.paths=set.jsonl"
NAMED = COMPARED.replace("set.jsonl", "other.jsonl")
SHORT = evaluation_sets(questions("who are you", "I am the river of stone"))
TOO_SHORT = ", so no n-gram can be compared; "
again(
    "evaluation_texts_that_are_short",
    TOO_SHORT,
    r"or write (decontaminate\.min_words=6)\.",
    COMPARED,
    f"{COMPARED} {{}}",
    before=SHORT,
)
again(
    "evaluation_texts_to_be_longer", TOO_SHORT, "name evaluation sets with longer texts", COMPARED, NAMED, before=SHORT
)
again(
    "evaluation_texts_below_an_ngram",
    "has 7 words, so no n-gram can be compared; ",
    r"or write (decontaminate\.min_words=6)\.",
    f"{COMPARED} decontaminate.ngram=7 decontaminate.min_words=9",
    f"{COMPARED} decontaminate.ngram=7 {{}}",
    before=SHORT,
)
BROKEN = evaluation_sets("no json\n")
again(
    "an_evaluation_set_that_cannot_be_read",
    ", so their n-grams could not be ",
    "Repair them",
    COMPARED,
    before=BROKEN,
    fix=lambda desk: Path("other.jsonl").rename("set.jsonl"),
)
again("an_evaluation_set_to_replace", ", so their n-grams could not be ", "name others", COMPARED, NAMED, before=BROKEN)


def languages(code: str) -> Step:
    def check(desk: Desk) -> Outcome:
        pytest.importorskip("py3langid")
        return call(lambda: check_rules(load(PrepareConfig, [f"filters.languages=[{code}]"], check=False)))

    return check


again(
    "a_language_in_words",
    ", which cannot be detected; write",
    r"write two-letter codes of ISO 639: .*\b(en)\b",
    languages("english"),
    languages("en"),
)


def shortened_once(desk: Desk) -> None:
    """Signatures lose their end between the tokenization and the first search, as by another program."""
    prepared(desk)
    search, left = job.find_near_duplicates, [1]

    def shorten(parts: list[SignaturePart], *others: Any) -> Path:
        if left:
            left.pop()
            parts[0].path.write_bytes(parts[0].path.read_bytes()[:-2])
        return search(parts, *others)

    desk.patch.setattr(job, "find_near_duplicates", shorten)


again(
    "signatures_that_were_changed",
    ": it was changed after it was written.",
    "Repeat the command",
    f"{PREPARE} near_duplicates.enabled=true",
    before=shortened_once,
)

# Shards and corpora that a run reads.


def train_shards(*names: str) -> None:
    for name in names:
        shard(f"shards/{name}.tar", (f"{name}.txt", TEXTS[0]))


def ranks(number: int, paths: Sequence[str] = ("shards/{a,b}.tar",)) -> Step:
    """What a run of so many ranks says of its shards."""
    return lambda desk: call(lambda: check_shards(ForeignConfig(paths=list(paths)), number) and "")


RANKS = " ranks, but each rank needs its own;"
again(
    "more_ranks_than_shards",
    RANKS,
    "start at most 2 ranks",
    ranks(3),
    ranks(2),
    before=lambda desk: train_shards("a", "b"),
)
again(
    "fewer_shards_than_ranks",
    RANKS,
    "write the text to more shards",
    ranks(3),
    ranks(3, ["shards/{a,b,c}.tar"]),
    before=lambda desk: train_shards("a", "b", "c"),
)
for name, advice, step in (
    ("a_shard_cut_short_to_restore", "Restore these shards", ranks(1)),
    ("a_shard_cut_short_to_leave_out", "leave them out", ranks(1, ["shards/a.tar"])),
):
    again(
        name,
        " is not a complete tar: ",
        "=" + advice,
        ranks(1),
        step,
        before=lambda desk: (train_shards("a", "b"), Path("shards/b.tar").write_bytes(bytes([1]) * 700)),
        fix=(lambda desk: train_shards("b")) if "Restore" in advice else None,
    )


def sources(desk: Desk) -> Outcome:
    data = DataConfig(sources={"a": SourceConfig(path="new")})
    return call(lambda: check_sources(data, sequence_length=64) and "")


def write_corpus(*documents: list[int]) -> None:
    """A prepared corpus of documents; some tokenizers of others leave nothing of a text but its end."""
    made = [np.array(document) for document in documents]
    write_split(
        Path("new/train"),
        [made],
        split="train",
        block_tokens=256,
        shard_size=4096,
        vocab_size=420,
        fingerprint="f" * 64,
    )


again(
    "a_corpus_without_a_row",
    " tokens, too few for one row. ",
    "Prepare more text",
    sources,
    before=lambda desk: write_corpus([3]),
    fix=lambda desk: (shutil.rmtree("new"), write_corpus([3], [9, 9, 9, 3])),
)

# Records.


def trained_on(desk: Desk) -> Outcome:
    """What a fine-tuning says of its records."""
    settings = ["task=classify", "base=encoder", "data.train=in.jsonl", "train.epochs=1", "run_dir=new"]
    config = load(FinetuneConfig, settings, check=False)
    return call(lambda: open_task_data(config, Tokenizer.load("encoder/tokenizer")) and "")


LABELLED = [{"text": f"red apple {number}", "label": ("joy", "woe")[number % 2]} for number in range(40)]
for name, advice, records in (
    ("a_broken_record_to_repair", "repair or remove them", [*LABELLED, {"text": "red", "label": "joy"}]),
    ("a_broken_record_to_remove", "remove them", LABELLED),
):
    again(
        name,
        "1 record cannot be used; repair or remove them:\n  in.jsonl, line 41: ",
        "=" + advice,
        trained_on,
        before=lambda desk: (desk.take("encoder"), desk.lines("in.jsonl", *LABELLED, {"text": 5, "label": "joy"})),
        fix=functools.partial(lambda records, desk: desk.lines("in.jsonl", *records), records),
    )
