"""Messages after which the same is done again in another way: each row says what was wrong and what is right then."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from advice.cases_data import TRAIN
from advice.cases_data import texts as write_texts
from advice.desk import Attempt, Cases, Desk, Outcome, call
from advice.shelf import TEXTS

from bigtx import api
from bigtx.config.load import load, take_ranks
from bigtx.config.runs import read_values
from bigtx.config.schema import FinetuneConfig, ModelConfig, PretrainConfig
from bigtx.train.run_folder import check_run_dir, check_settings
from bigtx.utils.files import refuse_filled, url_problem
from bigtx.utils.options import writing_options

CASES = Cases()
Step = str | Callable[[Desk], Outcome]
"""A command line, in which {} stands for what the message says; or a call."""


def again_in(
    cases: Cases,
    name: str,
    shown: str,
    advice: str,
    wrong: Step,
    right: Step | None = None,
    *,
    before: Callable[[Desk], object] | None = None,
    fix: Callable[[Desk], object] | None = None,
) -> None:
    """Add a case.

    Args:
        cases: the cases of a file.
        advice: what the message says to do; a pattern with one group if the message fills it in.
        wrong: what leads to the message.
        right: what is done after it; the same if it is not given.
        before: what is there from the start.
        fix: what the message says to do before that.
    """
    is_pattern = "(" in advice and ")" in advice and not advice.startswith("=")
    text = advice.removeprefix("=")

    def make(desk: Desk) -> Attempt:
        if before:
            before(desk)

        def attempt(words: Sequence[str]) -> Outcome:
            if words and fix:
                fix(desk)
            step = (right or wrong) if words else wrong
            return desk.run(step.replace("{}", " ".join(words))) if isinstance(step, str) else step(desk)

        return attempt

    make.__name__ = name
    if is_pattern:
        cases.case(shown, text)(make)
    else:
        cases.case(shown, f"({re.escape(text)})", fill={text: "done"})(make)


again = functools.partial(again_in, CASES)


def take(*names: str) -> Callable[[Desk], object]:
    return lambda desk: desk.take(*names)


def calls(function: Callable[..., object], *arguments: Any, **options: Any) -> Step:
    """A call of what needs no folder."""
    return lambda desk: call(lambda: function(*arguments, **options) and "")


# Python.


def model(run: str, use: Callable[[api.LoadedModel], object]) -> Step:
    """A use of a run."""
    return lambda desk: call(lambda: use(api.load(getattr(desk.shelf, run), device="cpu")) and "")


TALK: list[dict[str, Any]] = [{"role": "user", "content": "red"}]
NUMBER: Any = 3

again(
    "a_prompt_that_is_no_text",
    "the prompt is not a text",
    "=write generate(TEXT)",
    model("decoder", lambda run: run.generate(NUMBER)),
    model("decoder", lambda run: run.generate("red", max_new_tokens=1)),
)
again(
    "prompts_that_are_no_texts",
    "the prompts are not a list of texts",
    "=write generate_batch([TEXT, ...])",
    model("decoder", lambda run: run.generate_batch("red")),
    model("decoder", lambda run: run.generate_batch(["red"], max_new_tokens=1)),
)
again(
    "messages_that_are_no_list",
    "the messages are not a list",
    '=write chat([{"role": "user", "content": TEXT}])',
    model("chats", lambda run: run.chat(NUMBER)),
    model("chats", lambda run: run.chat(TALK, max_new_tokens=1)),
)
again(
    "a_chat_as_plain_text",
    "raw: a chat cannot be continued as plain text",
    "give a text",
    model("chats", lambda run: run.read(TALK, raw=True, options={})),
    model("chats", lambda run: run.read("red", raw=True, options={})),
)
again(
    "records_that_are_no_list",
    "the records are not a list of records",
    "=write predict([RECORD, ...])",
    model("classifier", lambda run: run.predict(NUMBER)),
    model("classifier", lambda run: run.predict([{"text": "red"}])),
)
again(
    "logits_of_a_classifier",
    "has no logits of token ids",
    "=see predict()",
    model("classifier", lambda run: run.logits([1])),
    model("classifier", lambda run: run.predict(["red"])),
)
again(
    "a_run_that_is_no_path",
    "is not a path",
    "=write load(FOLDER)",
    calls(api.load, NUMBER),
    model("decoder", lambda run: run),
)
again(
    "a_prompt_for_an_encoder",
    "an encoder cannot write texts",
    "name a run of a decoder",
    "bigtx generate encoder prompt=red",
    "bigtx generate decoder prompt=red max_new_tokens=1",
    before=take("encoder", "decoder"),
)
again(
    "a_chat_with_an_encoder_decoder",
    " cannot chat; ",
    "name a run of a decoder",
    calls(api.refuse_chatless, PretrainConfig(model=ModelConfig(shape="encoder_decoder")), "run"),
    model("chats", lambda run: api.refuse_chatless(run.config, "run")),
)
again(
    "a_misspelled_option_of_writing",
    "is not an option of writing",
    r"did you mean (\w+)\?",
    calls(writing_options, {"temperatur": 1.0}),
    lambda desk: call(lambda: writing_options({"temperature": 1.0}) and ""),
)

# Names that are almost right.


for name, line, pattern in (
    ("a_member_that_is_misspelled", "bigtx data prepar", r"did you mean bigtx (data prepare)\b"),
    ("two_words_that_are_misspelled", "bigtx toknizer train", r"did you mean bigtx (tokenizer train)\?"),
    ("a_command_that_is_misspelled", "bigtx generat", r"did you mean bigtx (generate)\?"),
    ("a_second_word_alone", "bigtx verify", r"did you mean bigtx (data verify)\b"),
):
    again(name, "no command ", pattern, line, "bigtx {} --help")
again(
    "a_recipe_that_is_misspelled",
    "no command ",
    r"did you mean bigtx (pretrain pretrain/\S+\.yaml)",
    "bigtx pretrain/smal.yaml",
    "bigtx {} data.sources.a.path=corpus run_dir=new",
    before=take("corpus"),
)
again(
    "a_misspelled_option",
    "; did you mean ",
    r"did you mean (\w+=)N\?",
    "bigtx generate decoder prompt=red max_new_token=1",
    "bigtx generate decoder prompt=red {}1",
    before=take("decoder"),
)
again(
    "a_misspelled_recipe_to_copy",
    "no recipe ",
    r"did you mean (\S+)\?",
    "bigtx configs show pretrain/smal.yaml",
    "bigtx configs show {}",
)
again(
    "a_misspelled_recipe_to_train",
    "among the recipes; did you mean ",
    r"did you mean (\S+\.yaml)",
    "bigtx pretrain pretrain/smal.yaml",
    "bigtx pretrain {} data.sources.a.path=corpus run_dir=new",
    before=take("corpus"),
)
again(
    "a_recipe_of_another_command",
    "is a recipe of another command",
    r"did you mean bigtx (finetune \S+)\?",
    "bigtx pretrain finetune/chat.yaml run_dir=new",
    "bigtx {} base=decoder data.train=in.jsonl run_dir=new",
    before=lambda desk: (desk.take("decoder"), desk.lines("in.jsonl", {"prompt": "a", "response": "b"})),
)
again(
    "ranks_in_words",
    "write how many ranks to start",
    "=e.g. --ranks 2",
    calls(take_ranks, ["--ranks", "two"]),
    calls(take_ranks, ["--ranks", "2"]),
)
PRETRAIN = "bigtx pretrain data.sources.a.path=corpus run_dir=new train.max_steps=2"
for name, wrong, advice, right in (
    ("a_config_as_an_option", "--config=own.yaml", "name the file alone, without an option", "own.yaml"),
    ("a_run_as_an_option", "--resume=decoder", "to resume a run, name its folder alone, without an option", ""),
    ("ranks_as_of_another_program", "--nproc_per_node=2", "did you mean --ranks N?", "--ranks 2"),
):
    line = "bigtx pretrain decoder train.max_steps=2" if not right else f"{PRETRAIN} {right}"
    if right.startswith("--"):
        after: Step = calls(take_ranks, right.split())
    else:
        after = line
    again(
        name,
        advice,
        "=" + advice,
        f"{PRETRAIN} {wrong}",
        after,
        before=lambda desk: (desk.take("corpus", "decoder"), desk.write("own.yaml", "seed: 2\n")),
    )
again(
    "a_misspelled_switch",
    "no such option; did you mean --",
    r"did you mean (--\S+)\?",
    lambda desk: call(load, PretrainConfig, [*PRETRAIN.split()[2:], "--dry-rn"]),
    f"{PRETRAIN}",
    before=take("corpus"),
)

# Runs.


again(
    "a_checkpoint_as_a_run",
    " is a checkpoint; ",
    r"name its run: (\S+)$",
    "bigtx checkpoints decoder/checkpoints/step-00000005",
    "bigtx checkpoints {}",
    before=take("decoder"),
)
again(
    "a_folder_that_is_not_there",
    " is not a folder; name a run's folder",
    "name a run's folder (its run_dir)".replace("(", "").replace(")", "").split(" its")[0],
    calls(read_values, "nowhere"),
    calls(read_values, "decoder"),
    before=take("decoder"),
)
again(
    "a_run_and_a_step",
    " is not a folder; did you mean ",
    r"did you mean (\S+)\?",
    calls(read_values, "decoder@5"),
    lambda desk: call(lambda: read_values("decoder/checkpoints/step-00000005") and ""),
    before=take("decoder"),
)
again(
    "a_folder_of_runs",
    " is not a run: ",
    r"did you mean (\S+)\?",
    "bigtx checkpoints runs",
    "bigtx checkpoints {}",
    before=lambda desk: (Path("runs").mkdir(), desk.take("decoder"), Path("decoder").rename("runs/decoder")),
)
again(
    "a_folder_of_runs_to_resume",
    " is not a run; did you mean ",
    r"did you mean (\S+)\?",
    "bigtx pretrain runs",
    "bigtx pretrain {} train.max_steps=2",
    before=lambda desk: (Path("runs").mkdir(), desk.take("decoder", "corpus"), Path("decoder").rename("runs/decoder")),
)
again(
    "an_empty_folder_as_a_run",
    " is not a run: ",
    "name the run_dir of a training",
    "bigtx checkpoints empty",
    "bigtx checkpoints decoder",
    before=lambda desk: (Path("empty").mkdir(), desk.take("decoder")),
)


def damage(*files: str, content: bytes | None = b"[") -> Callable[[Desk], object]:
    """Keep copies of files and damage them."""

    def do(desk: Desk) -> None:
        for file in files:
            desk.write(f"copies/{file}", Path(file).read_bytes())
            if content is None:
                Path(file).unlink()
            else:
                Path(file).write_bytes(content)

    return do


def restore(desk: Desk) -> None:
    """Restore all files from their copies."""
    copies = desk.folder / "copies"
    for path in copies.rglob("*"):
        if path.is_file():
            desk.write(str(path.relative_to(copies)), path.read_bytes())


def damaged(
    name: str, shown: str, advice: str, run: str, file: str, content: bytes | None, line: Step, more: Sequence[str] = ()
) -> None:
    """A command that meets a damaged file, which is then restored."""

    def before(desk: Desk) -> None:
        desk.take(run, *more)
        damage(file, content=content)(desk)

    again(name, shown, "=" + advice, line, before=before, fix=restore)


COPY = "restore it from a copy"
damaged(
    "a_config_that_cannot_be_read",
    "cannot be read: ",
    COPY,
    "decoder",
    "decoder/config.yaml",
    b"a: [",
    "bigtx checkpoints decoder",
)
damaged(
    "a_config_of_something_else",
    "is not a run's config",
    COPY,
    "decoder",
    "decoder/config.yaml",
    b"[1]\n",
    "bigtx checkpoints decoder",
)

# Words and places.


again(
    "a_place_with_a_scheme",
    "is a file of this machine",
    "write its plain path",
    lambda desk: problem("file:///data"),
    lambda desk: problem("/data", is_path=True),
)
again(
    "a_place_of_another_scheme",
    "is not a URL that bigtx reads",
    r"begins with (\w+://)",
    lambda desk: problem("ftp://host/a"),
    lambda desk: problem("s3://host/a"),
)
again(
    "a_place_with_a_password",
    "contains a name or password",
    "=put them into ~/.netrc",
    lambda desk: problem("https://me:word@host/a"),
    lambda desk: problem("https://host/a"),
)


def problem(place: str, is_path: bool = False) -> Outcome:
    said = None if is_path else url_problem(place)
    return Outcome(said is not None, said or "")


again(
    "a_folder_that_is_filled",
    "exists already and is not an empty folder",
    "name another one",
    lambda desk: call(refuse_filled, Path("tokenizer")),
    lambda desk: call(refuse_filled, Path("new")),
    before=take("tokenizer"),
)
again(
    "a_corpus_as_input",
    "which was made by bigtx",
    "name the folder to read",
    "bigtx data prepare input.paths=corpus tokenizer=tokenizer output=new num_processes=1",
    "bigtx data prepare input.paths=texts tokenizer=tokenizer output=new num_processes=1",
    before=lambda desk: (desk.take("corpus", "tokenizer"), desk.write("texts/a.txt", TEXTS[0])),
)
again(
    "two_inputs",
    "cannot be given together",
    "leave one out",
    "bigtx generate decoder prompts_file=in.txt prompt=red",
    "bigtx generate decoder prompt=red max_new_tokens=1",
    before=take("decoder"),
)
again(
    "prompts_of_an_empty_file",
    "has no prompt",
    "write one on each line",
    "bigtx generate decoder prompts_file=in.txt max_new_tokens=1",
    before=lambda desk: (desk.take("decoder"), desk.write("in.txt", "\n")),
    fix=lambda desk: desk.write("in.txt", "red\n"),
)

# Tokenizers.


for name, shown, advice, wrong, right in (
    (
        "a_role_in_capitals",
        "cannot name a role",
        "use lower-case letters, digits and _, e.g. assistant",
        "'chat_roles=[My Role]'",
        "chat_roles=[my_role]",
    ),
    ("an_empty_symbol", "an empty text is not a symbol", "leave it out", "'user_defined_symbols=[\"\"]'", ""),
    (
        "a_reserved_symbol",
        "is the name of a reserved id",
        "choose another text",
        "'user_defined_symbols=[\"<pad>\"]'",
        "'user_defined_symbols=[\"<mine>\"]'",
    ),
    ("a_symbol_with_a_block", "which no symbol can have", "leave it out", "'user_defined_symbols=[\"\u2581\"]'", ""),
    (
        "a_symbol_twice",
        "is a duplicate; name it",
        "name it once",
        "user_defined_symbols=[a,a]",
        "user_defined_symbols=[a]",
    ),
):
    again(name, shown, "=" + advice, f"{TRAIN} {wrong}", f"{TRAIN} {right}", before=write_texts)
again(
    "too_few_texts",
    ", but the smallest vocabulary has ",
    "Add more text",
    TRAIN,
    before=lambda desk: desk.write("texts/a.txt", "a"),
    fix=write_texts,
)
again(
    "another_tokenizer_that_is_there",
    " has a tokenizer already",
    "name another output",
    f"{TRAIN} chat_roles=[]",
    f"{TRAIN} chat_roles=[] output=other",
    before=lambda desk: (write_texts(desk), desk.done(TRAIN)),
)
again(
    "a_tokenizer_below_a_file",
    "cannot be made: ",
    "name another folder",
    f"{TRAIN} output=texts/a.txt/new",
    TRAIN,
    before=write_texts,
)


def two_models(desk: Desk) -> None:
    desk.take("tokenizer")
    (found,) = (desk.folder / "tokenizer").glob("*.model")
    for name in ("a", "b"):
        desk.write(f"models/{name}.model", found.read_bytes())


again(
    "two_models_in_a_folder",
    " sentencepiece .model files",
    "name the file",
    "bigtx tokenizer import models output=new",
    "bigtx tokenizer import models/a.model output=new",
    before=two_models,
)
again(
    "a_run_as_a_tokenizer",
    ", whose tokenizer is ",
    r"whose tokenizer is (\S+); name that",
    "bigtx tokenizer inspect corpus",
    "bigtx tokenizer inspect {}",
    before=take("corpus"),
)
damaged(
    "a_damaged_description",
    "is damaged",
    "copy the tokenizer again from its source",
    "tokenizer",
    "tokenizer/bigtx_tokenizer.json",
    b"[",
    "bigtx tokenizer inspect tokenizer",
)

# Run folders.


def run_folder(run_dir: str, *given: str) -> Step:
    """What is said about the folder of a new run."""
    settings = ["data.sources.a.path=corpus", "train.max_steps=2", f"run_dir={run_dir}", *given]
    return lambda desk: call(lambda: check_run_dir(load(PretrainConfig, settings, check=False)))


NEW = run_folder("new")
again(
    "an_input_as_run_folder",
    " is also named by init_from",
    "name another folder",
    run_folder("decoder", "init_from=decoder"),
    run_folder("new", "init_from=decoder"),
    before=take("decoder"),
)
again(
    "a_run_folder_below_a_file",
    " is not a folder; ",
    "name another folder",
    run_folder("file/new"),
    NEW,
    before=lambda desk: desk.write("file", ""),
)
damaged(
    "checkpoints_without_a_config",
    " holds checkpoints but no ",
    "restore that file from a copy",
    "decoder",
    "decoder/config.yaml",
    None,
    run_folder("decoder"),
)
again(
    "a_tokenizer_as_run_folder",
    "; a run would overwrite its files",
    "name another folder",
    run_folder("tokenizer"),
    NEW,
    before=take("tokenizer"),
)
again(
    "files_in_a_run_folder",
    ", which no run wrote and a run would overwrite",
    "move it elsewhere",
    run_folder("new"),
    before=lambda desk: desk.write("new/metrics.jsonl", ""),
    fix=lambda desk: Path("new/metrics.jsonl").rename("metrics.jsonl"),
)
again(
    "a_file_for_checkpoints",
    " is not a folder, but checkpoints need one",
    "move it elsewhere",
    run_folder("new"),
    before=lambda desk: (
        desk.write("new/environment.json", '{"packages": {"bigtx": "0"}}'),
        desk.write("new/checkpoints", ""),
    ),
    fix=lambda desk: Path("new/checkpoints").rename("elsewhere"),
)


def finetuning(run_dir: str) -> Step:
    """What is said of the settings of a fine-tuning in a folder."""
    settings = ["base=decoder", "data.train=in.jsonl", "train.max_steps=2", f"run_dir={run_dir}"]
    return lambda desk: call(lambda: check_settings(load(FinetuneConfig, settings, check=False)))


again(
    "a_run_of_another_kind",
    " holds another run, a pretraining",
    "name another folder",
    finetuning("decoder"),
    finetuning("new"),
    before=take("decoder"),
)
damaged(
    "a_config_without_its_sections",
    " is damaged; ",
    COPY,
    "decoder",
    "decoder/config.yaml",
    b"model: {}\nvalidation: 5\ntrain: [1]\n",
    lambda desk: call(
        lambda: check_settings(
            load(
                PretrainConfig,
                ["copies/decoder/config.yaml", "run_dir=decoder", "allow_changes=[train.max_steps]"],
                check=False,
            )
        )
    ),
)
