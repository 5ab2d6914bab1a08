"""Messages of configurations that name commands or values alone; those with settings: tests/config/test_advice.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from advice.desk import Attempt, Cases, Desk, Outcome, call

from bigtx.config.changes import compare, refuse
from bigtx.config.load import load, to_dict
from bigtx.config.schema import FinetuneConfig, PrepareConfig, PretrainConfig

CASES = Cases()
PRETRAIN = ["data.sources.a.path=corpus", "run_dir=runs/new", "train.max_steps=2"]
FINETUNE = ["tokenizer=tokenizer", "data.train=texts", "run_dir=runs/new", "train.epochs=1"]
SPEECH = ["task=transcribe", "model.audio.num_mel_bins=80"]
TOKENIZER = {"bigtx tokenizer train": "bigtx tokenizer train input.paths=texts output=made vocab_size=400"}
CORPUS = {"bigtx data prepare": "bigtx data prepare input.paths=texts tokenizer=tokenizer output=made num_processes=1"}


def config(desk: Desk, schema: Any, *given: str, key: str = "", then: Sequence[str] = ()) -> Attempt:
    """A command line of settings.

    Args:
        key: of the value that is advised, where the message shows it alone.
        then: added once the folder `made` is there.
    """
    desk.take("tokenizer", "corpus", "decoder")
    for name in "ab":
        desk.write(f"texts/{name}.txt", f"{name} red apple tree, the house of stone. " * 300)

    def attempt(words: Sequence[str]) -> Outcome:
        added = [f"{key}={word}" for word in words] if key else words
        return call(load, schema, [*given, *added, *(then if Path("made").exists() else ())])

    return attempt


def changed(desk: Desk) -> Attempt:
    begin = config(desk, PretrainConfig, *PRETRAIN)

    def resume(words: Sequence[str]) -> Outcome:
        if words and words[0].startswith("init_from"):
            return begin(words)
        now = load(PretrainConfig, [*PRETRAIN, "train.max_steps=3", *([] if words else ["seed=2"]), *words])
        return call(refuse, compare(to_dict(load(PretrainConfig, PRETRAIN)), now), now)

    return resume


CASES.case("To change them, add: ", r"add: (.*)$")(changed)
CASES.case("Set them back, or start a new run", r"and (\w+=THIS_RUN)$", fill={"THIS_RUN": "decoder"})(changed)


@CASES.case("is a list of numbers; write e.g. ", r"e\.g\. ('.*')")
def no_numbers(desk: Desk) -> Attempt:
    return config(desk, FinetuneConfig, *FINETUNE, *SPEECH, "model.shape=encoder_decoder", "model.audio.strides=x")


@CASES.case("; `bigtx configs explain` shows them all", r"`(bigtx configs explain)`")
def an_unknown_key(desk: Desk) -> Attempt:
    return lambda words: Outcome(False, config(desk, PretrainConfig, *PRETRAIN, "qqqqqqqq=1")([]).text)


@CASES.case("; `bigtx configs list` shows the recipes", r"`(bigtx configs list)`")
def an_unknown_file(desk: Desk) -> Attempt:
    return lambda words: Outcome(False, config(desk, PretrainConfig, *PRETRAIN, "qqqqqqqq.yaml")([]).text)


@CASES.case("is read in different ways by different programs; write ", r"write (\w+) \(")
def another_boolean(desk: Desk) -> Attempt:
    return config(desk, PretrainConfig, *PRETRAIN, "model.tie_embeddings=yes", key="model.tie_embeddings")


@CASES.case("is read in different ways by different programs; write ", r"write (\w+), or quotes$")
def another_boolean_of_deepspeed(desk: Desk) -> Attempt:
    return config(desk, PretrainConfig, *PRETRAIN, "deepspeed.aio=yes", key="deepspeed.aio")


@CASES.case("stays high for so long is not a spike any more; write ", r"write (guards\.patience=\d+) or")
def more_patience_than_a_spike_lasts(desk: Desk) -> Attempt:
    return config(desk, PretrainConfig, *PRETRAIN, "guards.patience=65")


@CASES.case("would be an octal number in YAML; write ", r"write (\d+) \(")
def an_octal_number(desk: Desk) -> Attempt:
    return config(desk, PretrainConfig, *PRETRAIN, "seed=010", key="seed")


@CASES.case(" is a setting; write ", r"write (seed=VALUE),", fill={"VALUE": "5"})
def a_setting_without_a_value(desk: Desk) -> Attempt:
    attempt = config(desk, PretrainConfig, *PRETRAIN)
    return lambda words: attempt(words or ["seed"])


@CASES.case("settings are written KEY=VALUE: ", r"KEY=VALUE: (\S+)$")
def a_setting_with_dashes(desk: Desk) -> Attempt:
    attempt = config(desk, PretrainConfig, *PRETRAIN)
    return lambda words: attempt(words or ["--seed=5"])


@CASES.case("--help shows all", r"(--help) shows")
def an_unknown_option(desk: Desk) -> Attempt:
    return lambda words: desk.run(f"bigtx data prepare {' '.join(words) or '--qqqqqqqq'}")


@CASES.case(
    "it is a Hugging Face model; `bigtx import`",
    r"`(bigtx import)`",
    value="foreign output=made",
)
def a_model_that_is_no_run(desk: Desk) -> Attempt:
    desk.without("transformers")
    desk.take("foreign")
    run = "bigtx generate {} prompt=red max_new_tokens=2"
    return lambda words: desk.run(run.format("made" if Path("made").exists() else "foreign"))


@CASES.case(" run; to resume it: ", r"to resume it: (bigtx pretrain decoder);")
@CASES.case("; to fine-tune it: ", r"to fine-tune it: (base=decoder)")
def a_pretrained_run_to_fine_tune(desk: Desk) -> Attempt:
    attempt = config(desk, FinetuneConfig, *FINETUNE[1:])
    path = desk.folder / "decoder/config.yaml"
    path.write_text(path.read_text().replace("  max_steps: null", "  max_steps: 5"))
    refused = attempt(["decoder"])
    assert refused.refused
    return lambda words: attempt(words) if words else Outcome(False, refused.text)


@CASES.case("with task=transcribe reads audio; write 0", r"write (0)$")
def a_pretraining_that_hears(desk: Desk) -> Attempt:
    key = "model.audio.num_mel_bins"
    attempt = config(desk, PretrainConfig, *PRETRAIN, "model.shape=encoder_decoder", "objective.name=span_corruption")
    return lambda words: attempt([f"{key}={word}" for word in words or ["80"]])


@CASES.case("name the run to start from, e.g. ", r"e\.g\. (base=\S+),", fill={"runs/mine": "decoder"})
def no_base(desk: Desk) -> Attempt:
    return config(desk, FinetuneConfig, *FINETUNE[1:])


@CASES.case("need trained weights; name a run", r"e\.g\. (\S+=\S+)$", fill={"runs/mine": "decoder"})
def adapters_of_nothing(desk: Desk) -> Attempt:
    return config(desk, PretrainConfig, *PRETRAIN, "model.lora.rank=4")


@CASES.case("can never change within a run; ", r"with (init_from=THIS_RUN)", fill={"THIS_RUN": "decoder"})
def a_seed_that_never_changes(desk: Desk) -> Attempt:
    attempt = config(desk, PretrainConfig, *PRETRAIN)
    return lambda words: attempt(words or ["allow_changes=[seed]"])


def of_another_tokenizer(shown: str, schema: Any, *given: str, key: str) -> None:
    """Cases of settings that name no tokenizer."""

    def make(desk: Desk) -> Attempt:
        return config(desk, schema, *given, then=[f"{key}=made"])

    make.__name__ = "a_tokenizer_that_is_not_given" if shown == GIVEN else "a_tokenizer_that_is_not_there"
    CASES.case(shown, r"`(bigtx tokenizer train)`", fill=TOKENIZER)(make)


NAME, GIVEN = (
    "no such folder; name one written by `bigtx tokenizer",
    "is not given; name a folder written by `bigtx tok",
)
FOREIGN = [*PRETRAIN[1:], "data.foreign.paths=texts/a.txt"]
of_another_tokenizer(NAME, FinetuneConfig, *FINETUNE, "tokenizer=none", key="tokenizer")
of_another_tokenizer(GIVEN, PretrainConfig, *FOREIGN, key="data.foreign.tokenizer")
of_another_tokenizer(NAME, PretrainConfig, *FOREIGN, "data.foreign.tokenizer=none", key="data.foreign.tokenizer")
of_another_tokenizer(GIVEN, PrepareConfig, "input.paths=texts", "output=new", key="tokenizer")
of_another_tokenizer(NAME, PrepareConfig, "input.paths=texts", "output=new", "tokenizer=none", key="tokenizer")


@CASES.case("is not given; name the folder of the prepared corpus", r"e\.g\. (output=\S+)$")
def no_output(desk: Desk) -> Attempt:
    return config(desk, PrepareConfig, "input.paths=texts", "tokenizer=tokenizer")


@CASES.case("is not given; name a folder written by `bigtx data prepare`", r"`(bigtx data prepare)`", fill=CORPUS)
def a_source_without_a_path(desk: Desk) -> Attempt:
    given = [*PRETRAIN[1:], "data.sources.a.weight=1"]
    return config(desk, PretrainConfig, *given, then=["data.sources.a.path=made"])


@CASES.case(" written by `bigtx data prepare`", r"`(bigtx data prepare)`", fill=CORPUS)
def a_source_that_is_not_there(desk: Desk) -> Attempt:
    return config(desk, PretrainConfig, *PRETRAIN[1:], "data.sources.a.path=made")


@CASES.case("is not finished yet; run its ", r"`(bigtx data prepare)`", fill=CORPUS)
def a_source_that_is_not_finished(desk: Desk) -> Attempt:
    attempt = config(desk, PretrainConfig, *PRETRAIN[1:], "data.sources.a.path=made")
    Path("made.partial").mkdir()
    return attempt


@CASES.case(
    "so it is not a prepared corpus; `bigtx data prepare ",
    r"`(bigtx data prepare .*?)`",
    fill={"TOKENIZER": "tokenizer", "CORPUS": "made num_processes=1"},
)
def a_source_of_texts(desk: Desk) -> Attempt:
    given = [*PRETRAIN[1:], "data.sources.a.path=texts"]
    return config(desk, PretrainConfig, *given, then=["data.sources.a.path=made"])


@CASES.case("without sft.packing=true", r"without (\S+);")
def rows_without_packing(desk: Desk) -> Attempt:
    return config(desk, FinetuneConfig, *FINETUNE, "task=sft", "sft.row_length=64")


@CASES.case("gives the model an audio encoder, which task=", r"write (task=\w+),")
def another_task_than_hearing(desk: Desk) -> Attempt:
    given = ["task=translate", "model.shape=encoder_decoder", "model.audio.num_mel_bins=80"]
    return config(desk, FinetuneConfig, *FINETUNE, *given)


@CASES.case("audio needs an encoder, but model.shape=decoder; write 0, or ", r"or (model\.shape=\w+)")
def a_decoder_that_hears(desk: Desk) -> Attempt:
    return config(desk, FinetuneConfig, *FINETUNE, *SPEECH)


@CASES.case("only a decoder has experts", r"or (model\.shape=\w+)$")
def experts_of_an_encoder(desk: Desk) -> Attempt:
    given = ["model.shape=encoder_decoder", "model.experts.num_experts=4"]
    return config(desk, PretrainConfig, *PRETRAIN, *given)


@CASES.case("experts have no biases; write false, or ", r"or (\S+=0)$")
def experts_with_biases(desk: Desk) -> Attempt:
    return config(desk, PretrainConfig, *PRETRAIN, "model.experts.num_experts=4", "model.mlp_bias=true")


@CASES.case("without model.experts.shared_size=N", r"without (\S+=N);", fill={"=N": "=16"})
def a_gate_of_nothing(desk: Desk) -> Attempt:
    return config(desk, PretrainConfig, *PRETRAIN, "model.experts.num_experts=4", "model.experts.shared_gate=true")


@CASES.case("is not possible for ", r"write (\w+)")
def an_objective_of_another_shape(desk: Desk) -> Attempt:
    return config(desk, PretrainConfig, *PRETRAIN, "objective.name=masked", key="objective.name")


@CASES.case("does not cover fine-tuning; write ", r"write (engine\.\S+)$")
def memory_of_a_fine_tuning(desk: Desk) -> Attempt:
    return config(desk, FinetuneConfig, *FINETUNE, "engine.activation_checkpointing=auto")


@CASES.case("needs an estimate of the memory, which does not cover ", r"write (engine\.\S+)$")
def memory_without_an_estimate(desk: Desk) -> Attempt:
    return config(desk, PretrainConfig, *PRETRAIN, "engine.precision=fp32", "engine.activation_checkpointing=auto")
