"""Messages of the commands for data and tokenizers."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

from advice.desk import Attempt, Cases, Desk, Outcome, call
from advice.shelf import TEXTS

from bigtx.config.load import load
from bigtx.config.schema import PrepareConfig, TokenizerTrainConfig
from bigtx.data.corpus.manifest import Manifest
from bigtx.data.storage.buckets import file_system
from bigtx.data.text.rules import check_rules
from bigtx.data.workers import Workers
from bigtx.tokenizer.report import remark_on_size
from bigtx.tokenizer.train import train

CASES = Cases()
PREPARE = "bigtx data prepare input.paths=texts tokenizer=tokenizer output=new num_processes=1"
TRAIN = "bigtx tokenizer train input.paths=texts output=new vocab_size=400"


def prepare(desk: Desk, line: str = PREPARE, **files: str | bytes) -> Attempt:
    """A preparation of a text or more."""
    desk.take("tokenizer")
    for name, content in {"a_txt": TEXTS[0], **files}.items():
        desk.write(f"texts/{name.replace('_', '.')}", content)
    return desk.command(line)


# Raw text.


@CASES.case("could not be read", r"(input\.max_rejects=[\d.]+)\. ")
def too_many_rejects(desk: Desk) -> Attempt:
    return prepare(desk, b_jsonl='{"text": "the tree"}\n' * 7 + "no json\n" * 3)


@CASES.case("if it is plain text, add its suffix: ", r"add its suffix: (\S+)\.$")
def an_unknown_suffix(desk: Desk) -> Attempt:
    return prepare(desk, PREPARE.replace("=texts", "=[texts/a.txt,texts/b.log]"), b_log=TEXTS[0])


@CASES.case(" needs pyarrow, which is not installed", r"(pip install \S+)\.", r"globs: (.*)\.$")
def parquet_without_pyarrow(desk: Desk) -> Attempt:
    import pyarrow
    from pyarrow.parquet import write_table

    attempt = prepare(desk, PREPARE + " 'input.exclude=[broken*]'", **{"broken_txt": b"\xff\xff"})
    write_table(pyarrow.Table.from_pylist([{"text": TEXTS[0]}]), desk.folder / "texts" / "b.parquet")
    desk.without("pyarrow")
    return attempt


def prepare_encoded(desk: Desk, encoding: str) -> Attempt:
    """A preparation that meets a text in another encoding, which also lies outside of the input."""
    desk.write("old.txt", TEXTS[0].encode(encoding))
    return prepare(desk, b_txt=TEXTS[0].encode(encoding))


@CASES.case(
    " text; convert it to UTF-8: iconv",
    r"(iconv .*)$",
    fill={"FILE": "old.txt", "NEW": "texts/b.txt"},
)
def another_encoding(desk: Desk) -> Attempt:
    return prepare_encoded(desk, "utf-16")


@CASES.case(
    " text without a byte order mark; convert it",
    r"(iconv .*)$",
    fill={"FILE": "old.txt", "NEW": "texts/b.txt"},
)
def another_encoding_without_a_mark(desk: Desk) -> Attempt:
    return prepare_encoded(desk, "utf-16-le")


@CASES.case("No input: input.paths is empty", r"e\.g\. (\S+)\.$", fill={"my/texts": "texts"})
def no_input(desk: Desk) -> Attempt:
    from bigtx.data.raw.files import list_files

    prepare(desk)
    return lambda words: call(lambda: list_files(load(PrepareConfig, list(words), check=False).input))


@CASES.case("a JSON array; write one object", r"(jq .*)$", fill={"FILE.jsonl": "texts/b.json", "FILE": "b"})
def an_array(desk: Desk) -> Attempt:
    desk.write("b", json.dumps([{"text": "red"}, {"text": "apple"}]))
    check = 'assert sys.argv[1:3] == ["-c", ".[]"]'
    desk.program("jq", check, "for each in json.load(open(sys.argv[3])): print(json.dumps(each))")
    return prepare(desk, b_json=(desk.folder / "b").read_bytes())


# Prepared corpora.


@CASES.case(" characters; memory=", r"(memory=\w+) is enough")
def a_long_document(desk: Desk) -> Attempt:
    train(TokenizerTrainConfig(vocab_size=390, method="unigram"), TEXTS).save(desk.folder / "unigram")
    line = PREPARE.replace("=tokenizer", "=unigram") + " memory=64MiB input.max_rejects=0"
    return prepare(desk, line, b_txt="word " * 120_000)


@CASES.case(
    " has no parts to merge; `bigtx data prepare",
    r"`(bigtx data prepare .*?)`",
    fill={"...": "input.paths=texts tokenizer=tokenizer num_processes=1", "1/N": "1/2"},
)
def no_parts(desk: Desk) -> Attempt:
    attempt = prepare(desk)

    def merge(words: Sequence[str]) -> Outcome:
        if Path("new.partial").exists():
            attempt(["part=2/2"])
        return desk.run("bigtx data merge new")

    return merge


@CASES.case(": write it as I/N with ", r"e\.g\. (part=\S+)$")
def a_part_that_is_none(desk: Desk) -> Attempt:
    attempt = prepare(desk)
    return lambda words: attempt(words or ["part=5/2"])


@CASES.case("  the same command with part=", r"with (part=\S+?),")
def the_next_part(desk: Desk) -> Attempt:
    return prepare(desk, f"{PREPARE} part=1/2")


@CASES.case(
    "Not all parts of ",
    r"with (part=\S+) first",
)
def a_missing_part(desk: Desk) -> Attempt:
    attempt = prepare(desk, f"{PREPARE} part=1/2")
    assert not attempt([]).refused
    return merged(desk, attempt)


def merged(desk: Desk, attempt: Attempt) -> Attempt:
    """Merge parts, after the work on one that words name."""

    def merge(words: Sequence[str]) -> Outcome:
        assert not words or not attempt(words).refused
        return desk.run("bigtx data merge new")

    return merge


def two_parts(desk: Desk) -> Attempt:
    attempt = prepare(desk, PREPARE, b_txt=TEXTS[0] + "b", c_txt=TEXTS[0] + "c")
    for number in (1, 2):
        assert not attempt([f"part={number}/2"]).refused
    return merged(desk, attempt)


@CASES.case(" is damaged. Run part=", r"Run (part=\S+) again")
def a_damaged_part(desk: Desk) -> Attempt:
    merge = two_parts(desk)
    desk.write("new.partial/part-2-of-2/recipe.json", "{")
    return merge


@CASES.case(" was made with other settings than part 1: ", r"Run (part=\S+) again")
def a_part_made_otherwise(desk: Desk) -> Attempt:
    merge = two_parts(desk)
    path = desk.folder / "new.partial/part-2-of-2/recipe.json"
    recipe = json.loads(path.read_text())
    desk.write("new.partial/part-2-of-2/recipe.json", json.dumps(recipe | {"seed": 5}))
    return merge


@CASES.case("run `bigtx data prepare` again with ", r"again with (part=\S+)$")
def a_lost_unit(desk: Desk) -> Attempt:
    merge = two_parts(desk)
    for path in (desk.folder / "new.partial/work").iterdir():
        if path.is_file() and path.stat().st_size:
            path.unlink()
            break
    return merge


@CASES.case(
    "Next:",
    r"^  (bigtx data inspect .*)$",
    r"^  (\S+ .*pretrain .*)$",
)
def a_prepared_corpus(desk: Desk) -> Attempt:
    return prepare(desk, PREPARE.replace("=new", "='my corpus'"))


@CASES.case("Next:", r"^  (bigtx data merge .*)$")
def the_last_part(desk: Desk) -> Attempt:
    attempt = prepare(desk, PREPARE)
    assert not attempt(["part=1/2"]).refused
    return lambda words: attempt(["part=2/2"])


@CASES.case("That is too little for a stable loss; ", r"(validation_fraction=\S+) would")
def little_held_out_text(desk: Desk) -> Attempt:
    prepare(desk)
    desk.lines("texts/b.jsonl", *({"text": f"{number} the tree"} for number in range(400)))

    def work(words: Sequence[str]) -> Outcome:
        return desk.run(" ".join([PREPARE.replace("=new", f"=new{len(words)}"), "validation_fraction=0.01", *words]))

    return work


@CASES.case(", which leaves it unchanged", r"Set (memory=\w+),")
def another_memory(desk: Desk) -> Attempt:
    attempt = prepare(desk)
    assert not attempt([]).refused
    report = desk.folder / "new/report.json"
    content = json.loads(report.read_text())
    content["memory"]["kept"] = 100 << 20
    report.write_text(json.dumps(content))
    return lambda words: attempt(["memory=64MiB", *words])


MADE = {"bigtx data prepare": PREPARE}


@CASES.case(" is not a prepared corpus: it ", r"`(bigtx data prepare)`", fill=MADE)
def no_corpus(desk: Desk) -> Attempt:
    prepare(desk)
    return desk.command("bigtx data inspect new")


@CASES.case("There is no prepared split at ", r"`(bigtx data prepare)`", fill=MADE)
def no_split(desk: Desk) -> Attempt:
    prepare(desk)
    return lambda words: call(Manifest.load, Path("new/train"))


@CASES.case(
    "or lost that file. Name a folder",
    r"(bigtx data prepare)`",
    fill=MADE,
)
def no_manifest(desk: Desk) -> Attempt:
    prepare(desk)
    Path("others").mkdir()
    return lambda words: call(Manifest.load, Path("new/train" if Path("new").exists() else "others"))


def damaged(name: str, content: bytes) -> Callable[[Desk], Attempt]:
    """A prepared corpus with another content in one of its files."""

    def make(desk: Desk) -> Attempt:
        attempt = prepare(desk)
        assert not attempt([]).refused
        (file,) = (desk.folder / "new/train").glob(name)
        file.write_bytes(content + file.read_bytes()[len(content) :])
        return desk.command("bigtx data verify new")

    make.__name__ = f"damaged_{name.strip('*.')}"
    return make


for name, content in (("manifest.json", b"["), ("blocks.npy", b"x"), ("*.tar", bytes(2048))):
    remove = {"remove the corpus's folder and prepare it again": f"rm -r new && {PREPARE}"}
    CASES.case(" and prepare it again", f"({next(iter(remove))})", fill=remove)(damaged(name, content))


@CASES.case("fewer processes, e.g. num_processes=", r"e\.g\. (\S+)\.$")
def a_killed_process(desk: Desk) -> Attempt:
    prepare(desk)

    def work(words: Sequence[str]) -> Outcome:
        if words:
            return desk.run(" ".join([PREPARE, *words]))
        with Workers(2, os.getpid) as workers:
            return call(lambda: list(workers.map(os._exit, [9])))

    return work


@CASES.case("needs ftfy, which is not installed", r"(pip install \S+)$")
def no_ftfy(desk: Desk) -> Attempt:
    config = load(PrepareConfig, ["clean.repair_unicode=true"], check=False)
    desk.without("ftfy")
    return lambda words: call(check_rules, config)


@CASES.case("needs py3langid, which is not installed", r"(pip install \S+)$")
def no_py3langid(desk: Desk) -> Attempt:
    config = load(PrepareConfig, ["filters.languages=[en]"], check=False)
    desk.without("py3langid")
    return lambda words: call(check_rules, config)


@CASES.case(", which is missing (", r"(pip install \S+)\.$")
def no_s3fs(desk: Desk) -> Attempt:
    desk.without("s3fs")
    file_system.cache_clear()
    return lambda words: call(lambda: file_system("s3") and "")


# Tokenizers.


def texts(desk: Desk) -> None:
    desk.write("texts/a.txt", TEXTS[0] * 20)


@CASES.case(" allow: they have at most ", r"set (vocab_size=\d+) or less")
def too_many_pieces(desk: Desk) -> Attempt:
    texts(desk)
    return desk.command(TRAIN.replace("=400", "=9000"))


@CASES.case(
    " and the 256 bytes alone are ",
    r"Set (\S+) or more",
    r"or (character_coverage=[\d.]+):",
)
def too_small_a_vocabulary(desk: Desk) -> Attempt:
    characters = [chr(0x4E00 + number) for number in range(600)]
    frequent = random.Random(1).choices(characters[:60], k=30_000)
    desk.write("texts/a.txt", "".join([*frequent, *characters]))
    return desk.command(TRAIN.replace("=400", "=700"))


@CASES.case(" would fit.", r"(vocab_size=\S+) would")
def too_large_a_vocabulary(desk: Desk) -> Attempt:
    def remark(words: Sequence[str]) -> Outcome:
        size = load(TokenizerTrainConfig, ["vocab_size=128k", *words], check=False).vocab_size
        return call(remark_on_size, SimpleNamespace(vocab_size=size), SimpleNamespace(bytes_per_token=4), 10**6)

    return remark


@CASES.case("This tokenizer has no chat roles; train one", r"e\.g\. (.*)\.$")
def no_chat_roles(desk: Desk) -> Attempt:
    def chat(words: Sequence[str]) -> Outcome:
        roles = [] if words else ["chat_roles=[]"]
        tokenizer = train(load(TokenizerTrainConfig, ["vocab_size=420", *roles, *words], check=False), TEXTS)
        return call(lambda: tokenizer.encode_messages([{"role": "user", "content": "the tree"}]) and "")

    return chat


@CASES.case(
    "No tokenizer in ",
    r"`(bigtx tokenizer train)`",
    r"`(bigtx tokenizer import .*?)`",
    fill={"train": f"train {TRAIN.partition('train ')[2].replace('new', 'made')}", "PATH": "m.model", "FOLDER": "made"},
)
def no_tokenizer(desk: Desk) -> Attempt:
    texts(desk)
    desk.take("tokenizer")
    (model,) = (desk.folder / "tokenizer").glob("*.model")
    model.rename(desk.folder / "m.model")
    return desk.command("bigtx tokenizer inspect made")


@CASES.case("Next: ", r"Next: (.*)$", fill={"FOLDER": "made num_processes=1"})
def a_trained_tokenizer(desk: Desk) -> Attempt:
    texts(desk)
    return desk.command(TRAIN)


@CASES.case("Next: ", r"Next: (.*)$")
def an_imported_tokenizer(desk: Desk) -> Attempt:
    desk.take("tokenizer")
    (model,) = (desk.folder / "tokenizer").glob("*.model")
    return desk.command(f"bigtx tokenizer import {model} output='my tokenizer'")


@CASES.case("read by the package tokenizers, which is not installed", r"(pip install \S+)\.$")
def no_tokenizers(desk: Desk) -> Attempt:
    desk.take("foreign")
    desk.without("tokenizers", "transformers")
    return desk.command("bigtx tokenizer import foreign output=made")
