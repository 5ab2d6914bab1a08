"""Messages of training: run folders, data, models, tasks, the start; and of the commands for recipes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from advice.desk import Attempt, Cases, Desk, Outcome, call, written
from advice.shelf import SHAPE, TEXTS

from bigtx.config.load import load
from bigtx.config.schema import FinetuneConfig, PretrainConfig
from bigtx.data.recordings import AudioPlace, require_speech
from bigtx.data.records.record import BadRecordError, Record
from bigtx.data.stream.order import open_sources
from bigtx.engine.optimizers import resolve_steps
from bigtx.finetuning.checks import open_tokenizer
from bigtx.finetuning.inputs import describe_length, total_steps
from bigtx.finetuning.records import read_table
from bigtx.finetuning.run import untrained_roles
from bigtx.finetuning.tasks.sft import Sft
from bigtx.finetuning.tasks.speech import SpeechFeatures
from bigtx.finetuning.tasks.translate import require_sacrebleu
from bigtx.pretraining import make_objective
from bigtx.pretraining.run import open_inputs
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.train import start
from bigtx.train.context import RunContext
from bigtx.train.guards import roll_back
from bigtx.train.run_folder import check_run_dir, check_settings
from bigtx.train.state import RunState
from bigtx.utils.processes import launcher_problem
from bigtx.utils.units import parse_count, parse_duration, parse_range

CASES = Cases()
ALONE: Any = SimpleNamespace(
    rank=0,
    world_size=1,
    once=lambda get: get(),
    on_first=lambda get: get(),
    from_first=lambda value: value,
    gather=lambda value: [value],
)
PRETRAIN = ["data.sources.a.path=corpus", "run_dir=runs/new", "train.max_steps=2", "train.sequence_length=16"]
MODEL = ["model.hidden_size=16", "model.num_layers=2", "model.num_heads=2", "model.max_sequence_length=64"]
FINETUNE = ["run_dir=runs/new", "data.train=records.jsonl", "train.max_steps=2"]


def pretrain(*given: str) -> Attempt:
    """What a pretraining refuses before its engine is built."""

    def attempt(words: Sequence[str]) -> Outcome:
        def open_data() -> None:
            open_inputs(load(PretrainConfig, [*PRETRAIN, *MODEL, *given, *words]), ALONE)

        with written():
            return call(open_data)

    return attempt


def finetune(*given: str) -> Attempt:
    """What a fine-tuning refuses of its base's tokenizer."""

    def attempt(words: Sequence[str]) -> Outcome:
        def look() -> None:
            config = load(FinetuneConfig, [*FINETUNE, *given, *words])
            open_tokenizer(config, Path(config.run_dir))

        return call(look)

    return attempt


def sft(tokenizer: Tokenizer, *given: str, record: dict[str, Any] | None = None) -> Attempt:
    """What a task refuses of its settings, or of a record."""
    shape = [f"model.{name}={value}" for name, value in SHAPE.items()]

    def attempt(words: Sequence[str]) -> Outcome:
        def encode() -> None:
            config = load(FinetuneConfig, ["task=sft", *shape, *given, *words], check=False)
            task = Sft(Sft.resolve(config, tokenizer, []), tokenizer)
            if record:
                task.encode(Record(record, "a"))

        try:
            return call(encode)
        except BadRecordError as error:
            return Outcome(True, str(error))

    return attempt


# The run folder.


@CASES.case(" holds no checkpoint of them; ", r"add ('allow_changes=.*?'):")
def checkpoints_that_are_gone(desk: Desk) -> Attempt:
    desk.take("corpus")
    desk.lines("runs/new/metrics.jsonl", {"step": 1})
    desk.write("runs/new/environment.json", json.dumps({"packages": {"bigtx": "0"}}))
    desk.write("runs/new/config.yaml", "seed: 1\n")
    return lambda words: call(lambda: check_run_dir(load(PretrainConfig, [*PRETRAIN, *words])))


# Data and model.


@CASES.case(" is smaller than the tokenizer's ", r"write (model\.vocab_size=null)")
def too_few_ids_of_a_model(desk: Desk) -> Attempt:
    desk.take("corpus")
    return pretrain("model.vocab_size=300")


@CASES.case("data.sources names no source with a weight above 0", r"as (\S+),", fill={"NAME": "b", "FOLDER": "corpus"})
def no_source(desk: Desk) -> Attempt:
    desk.take("corpus")
    return lambda words: call(
        lambda: open_sources(load(PretrainConfig, ["data.sources.a.weight=0", *words], check=False).data)
    )


@CASES.case("allow more with guards.max_roll_backs=", r"with (guards\.max_roll_backs=\d+)$")
def too_many_returns_to_a_checkpoint(desk: Desk) -> Attempt:
    desk.take("corpus")

    def attempt(words: Sequence[str]) -> Outcome:
        config = load(PretrainConfig, [*PRETRAIN, *MODEL, "guards.max_roll_backs=3", *words])
        run: Any = SimpleNamespace(config=config, run_dir=desk.folder, ranks=ALONE, state=RunState(roll_backs=3))
        run.saver = SimpleNamespace(wait=lambda: None)
        return call(lambda: roll_back(run, "5 spikes in a row"))

    return attempt


@CASES.case(" ids; write model.vocab_size=", r"write (model\.vocab_size=\d+)")
def another_vocabulary_than_the_teacher(desk: Desk) -> Attempt:
    desk.take("corpus", "decoder")
    return pretrain("distill.teacher=decoder", "model.vocab_size=512")


def without_ids(desk: Desk, objective: str, *settings: str) -> Attempt:
    """What an objective says of a tokenizer without its ids; words are of a tokenizer made as the message says."""
    desk.write("texts/a.txt", TEXTS[0] * 20)

    def attempt(words: Sequence[str]) -> Outcome:
        config = load(PretrainConfig, [*PRETRAIN, f"objective.name={objective}", *settings], check=False)
        made = desk.folder / "made"
        tokenizer = Tokenizer.load(made) if made.exists() else SimpleNamespace(sentinel_ids=[], mask_id=None)
        return call(lambda: make_objective(config, tokenizer, purpose="train") and "")

    return attempt


TRAIN = {"bigtx tokenizer train": "bigtx tokenizer train input.paths=texts output=made vocab_size=400"}


@CASES.case("marks the parts of a document with", r"`(bigtx tokenizer train)`", fill=TRAIN)
def no_sentinels(desk: Desk) -> Attempt:
    return without_ids(desk, "fill_in_middle")


@CASES.case("needs a tokenizer with a mask id", r"`(bigtx tokenizer train)`", fill=TRAIN)
def no_mask(desk: Desk) -> Attempt:
    return without_ids(desk, "masked", "model.shape=encoder")


@CASES.case("is a time; write steps, tokens or a share of the run", r"e\.g\. (\S+='.*?')$")
def a_time_for_a_schedule(desk: Desk) -> Attempt:
    def attempt(words: Sequence[str]) -> Outcome:
        given = ["schedule.name=cosine", "schedule.warmup=5 min", *words]
        warmup = load(PretrainConfig, given, check=False).schedule.warmup
        return call(lambda: resolve_steps(warmup, key="schedule.warmup", tokens_per_step=1, total_steps=100) and "")

    return attempt


def open_folder(given: Sequence[str]) -> Outcome:
    """What is said about the folder of a run with another tokenizer than the run had."""

    def attempt() -> None:
        config = load(PretrainConfig, given)
        context = RunContext(config)
        context.ranks = ALONE
        with context.resources:
            start.open_folder(context, config, {"tokenizer": "other"})

    with written():
        return call(attempt)


@CASES.case(" than the config names: ", r"with (\S+=THIS_RUN)", fill={"THIS_RUN": "decoder"})
def other_data_than_the_run_had(desk: Desk) -> Attempt:
    desk.take("decoder", "corpus")

    resumed, longer = ["decoder/config.yaml", "run_dir=decoder", "train.max_steps=2"], "allow_changes=[train.max_steps]"
    return lambda words: open_folder([*([*PRETRAIN, *words] if words else resumed), longer])


@CASES.case(" holds only weights, and no optimizer states", r"by (init_from=\S+)$")
def a_fork_of_an_imported_run(desk: Desk) -> Attempt:
    desk.take("decoder", "corpus")

    fork = ["decoder/config.yaml", *PRETRAIN[1:3], "fork_from=decoder"]
    return lambda words: open_folder([*PRETRAIN, *words] if words else fork)


@CASES.case("with another train.global_batch_size the length", r"write (train\.max_steps=N .*)$", fill={"=N ": "=9 "})
def a_fork_with_other_batches_and_a_length_in_tokens(desk: Desk) -> Attempt:
    desk.take("decoder")
    given = ["decoder/config.yaml", *PRETRAIN[1:2], "fork_from=decoder", "train.global_batch_size=6"]
    given += ["train.max_tokens=1M", "train.max_steps=null"]
    return lambda words: call(lambda: check_settings(load(PretrainConfig, [*given, *words], check=False)))


@CASES.case(", and a fork is of the same kind; ", r"write (base=\S+) instead$")
def a_fork_of_another_kind(desk: Desk) -> Attempt:
    desk.take("decoder")

    def attempt(words: Sequence[str]) -> Outcome:
        given = [*FINETUNE, *(words or ["base=decoder", "fork_from=decoder"])]
        return call(lambda: check_settings(load(FinetuneConfig, given, check=False)))

    return attempt


@CASES.case("without it no record can be left out", r"with (base=THIS_RUN)$", fill={"THIS_RUN": "decoder"})
def no_table_of_records(desk: Desk) -> Attempt:
    desk.take("decoder")
    desk.lines("records.jsonl", {"prompt": "a", "response": "b"})
    begin = finetune()
    return lambda words: begin(words) if words else call(read_table, desk.folder)


def written_as(parse: Callable[[str], object], text: str) -> Callable[[Desk], Attempt]:
    """What a function says of a text that is no value."""

    def attempt(words: Sequence[str]) -> Outcome:
        try:
            return Outcome(False, str(parse(" ".join(words) or text)))
        except ValueError as error:
            return Outcome(True, str(error))

    def make(desk: Desk) -> Attempt:
        return attempt

    make.__name__ = f"{parse.__name__}_of_{text[:9]}"
    return make


for shown, parse, text in (
    ("has no unit; write ", parse_duration, "5"),
    ("has no unit that bigtx knows; write ", parse_duration, "5 apples"),
    ("ends before it begins; write ", parse_range, "5-3"),
    (", which is not a unit here; write ", parse_count, "5 apples"),
    ("is too large; write ", parse_count, "9" * 30),
    ("is not a whole number; write ", parse_count, "0.5"),
):
    CASES.case(shown, r"write a .* such as ([^,]+?)(?:,| or |$)")(written_as(parse, text))


# Tasks.


@CASES.case("has another tokenizer, so the same ids", r"write (tokenizer=null)")
def another_tokenizer_than_the_base(desk: Desk) -> Attempt:
    desk.take("decoder", "other_tokenizer")
    desk.lines("records.jsonl", {"prompt": "a", "response": "b"})
    return finetune("base=decoder", "tokenizer=other_tokenizer")


@CASES.case(": the tokenizer ", r"write (chat\.format=plain)$")
@CASES.case(
    "has no chat role ",
    r"\(`(bigtx tokenizer train)`",
    fill={"train": "train input.paths=texts output=made vocab_size=400"},
)
def a_tokenizer_without_roles(desk: Desk) -> Attempt:
    desk.write("texts/a.txt", TEXTS[0] * 20)
    made = desk.folder / "made"

    def attempt(words: Sequence[str]) -> Outcome:
        return sft(Tokenizer.load(made if made.exists() else desk.shelf.plain_tokenizer), "chat.format=chat")(words)

    return attempt


@CASES.case("the smallest value of use is ", r"use is (\S+=\d+)$")
def no_room_for_texts(desk: Desk) -> Attempt:
    return sft(Tokenizer.load(desk.shelf.tokenizer), "data.max_length=2")


@CASES.case("data.too_long=truncate cuts them", r"(data\.too_long=truncate)")
def a_chat_that_is_too_long(desk: Desk) -> Attempt:
    record = {"prompt": "red apple tree", "response": "the house of stone " * 30}
    return sft(Tokenizer.load(desk.shelf.tokenizer), "data.max_length=40", "data.too_long=refuse", record=record)


@CASES.case("are allowed; data.too_long=truncate cuts", r"(data\.too_long=truncate)")
def a_long_recording(desk: Desk) -> Attempt:
    given = ["task=transcribe", "model.audio.num_mel_bins=8", "data.too_long=refuse"]
    place = AudioPlace("a.wav", "a.wav", 0, 1)

    def attempt(words: Sequence[str]) -> Outcome:
        speech = SpeechFeatures(load(FinetuneConfig, [*given, *words], check=False))
        speech.known = {place: (10**8, 16_000)}
        try:
            return Outcome(False, str(speech.num_samples(place)))
        except BadRecordError as error:
            return Outcome(True, str(error))

    return attempt


@CASES.case("so few that the model will hardly learn", r"e\.g\. (\S+?),")
def few_steps(desk: Desk) -> Attempt:
    def attempt(words: Sequence[str]) -> Outcome:
        config = load(FinetuneConfig, ["task=sft", "train.epochs=1", "train.global_batch_size=16", *words], check=False)
        return call(lambda: "\n".join(describe_length(config, total_steps(config, 27), 27)))

    return attempt


def frozen_roles(desk: Desk, *given: str) -> Attempt:
    desk.write("base/config.yaml", "seed: 1\n")

    def attempt(words: Sequence[str]) -> Outcome:
        config = load(FinetuneConfig, ["task=sft", "chat.format=chat", *given, *words], check=False)
        return call(untrained_roles, config, "base")

    return attempt


@CASES.case(
    " was not trained on chats",
    r"; write '?(optimizer\.train_also=[^']*)",
)
def roles_beside_adapters(desk: Desk) -> Attempt:
    return frozen_roles(desk, "model.lora.rank=8", "optimizer.train_also=[final_norm.*]")


@CASES.case(" was not trained on chats", r"; write '?(optimizer\.freeze=[^']*)")
def roles_in_a_frozen_table(desk: Desk) -> Attempt:
    return frozen_roles(desk, "optimizer.freeze=[embedding.*,final_norm.*]")


@CASES.case("task=transcribe needs packages", r"(pip install \S+)$")
def no_soundfile(desk: Desk) -> Attempt:
    desk.without("soundfile", "soxr", "jiwer")
    return lambda words: call(require_speech)


@CASES.case("measures with sacrebleu", r"(pip install \S+)$")
def no_sacrebleu(desk: Desk) -> Attempt:
    desk.without("sacrebleu")
    return lambda words: call(require_sacrebleu)


# The start.


@CASES.case("start the ranks by ", r"or (unset [A-Z_ ]+) and")
def half_of_a_launcher(desk: Desk) -> Attempt:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        desk.patch.delenv(name, raising=False)
    desk.patch.setenv("RANK", "0")
    desk.patch.setenv("WORLD_SIZE", "2")

    def attempt(words: Sequence[str]) -> Outcome:
        problem = launcher_problem()
        return Outcome(problem is not None, problem or "")

    return attempt


# Recipes.


@CASES.case("; name another folder: ", r": (bigtx configs copy .*)$", fill={"FOLDER": "'new recipes'"})
def a_copy_that_is_there(desk: Desk) -> Attempt:
    desk.write("configs/pretrain/small.yaml", "seed: 2\n")
    return desk.once("bigtx configs copy pretrain/small.yaml")


@CASES.case("Edit it, then run: ", r"run: (.*)$", fill={"CORPUS": "corpus"})
def a_copied_recipe(desk: Desk) -> Attempt:
    desk.take("corpus")
    return desk.command("bigtx configs copy pretrain/small.yaml")


@CASES.case(
    "Edit it, then run: ",
    r"run: (.*)$",
    fill={"FILES": "records.jsonl", "runs/mine": "runs/new", "base=RUN": "base=decoder"},
)
def a_copied_recipe_of_a_task(desk: Desk) -> Attempt:
    desk.take("decoder")
    desk.lines("records.jsonl", {"text": "a", "label": "b"})
    return desk.command("bigtx configs copy finetune/imdb.yaml")


@CASES.case("; `bigtx configs list` shows the recipes", r"`(bigtx configs list)`")
def an_unknown_recipe(desk: Desk) -> Attempt:
    return desk.once("bigtx configs copy xyz")


@CASES.case("`bigtx configs explain` shows all", r"`(bigtx configs explain)`")
def an_unknown_setting(desk: Desk) -> Attempt:
    return desk.once("bigtx configs explain qqqqqqqq")


@CASES.case("copy it to change it: ", r": (bigtx configs copy NAME)$", fill={"NAME": "pretrain/small.yaml"})
def the_recipes(desk: Desk) -> Attempt:
    return desk.command("bigtx configs list")


@CASES.case("`bigtx help` shows all commands", r"`(bigtx help)`")
def an_unknown_command(desk: Desk) -> Attempt:
    return desk.once("bigtx qqqqqqqq")
