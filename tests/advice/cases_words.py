"""Messages of configurations that say in words what to write: each advice, and what a user writes then."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from advice.cases_config import FINETUNE, PRETRAIN, config
from advice.desk import Attempt, Cases, Desk, Outcome

from bigtx.config.schema import FinetuneConfig, PretrainConfig

CASES = Cases()
BARE = PRETRAIN[1:]
ENCODER = [*PRETRAIN, "model.shape=encoder", "objective.name=masked"]
HEARING = [*FINETUNE, "task=transcribe"]
CTC = [*HEARING, "transcribe.method=ctc", "model.shape=encoder", "model.audio.num_mel_bins=80"]
LEFT_OUT = ""


class Row(NamedTuple):
    """A message of the loader.

    Attributes:
        shown: words of it.
        given: settings that are fine.
        wrong: the setting that it is about.
        advice: what it says, and what a user then writes instead.
        files: files of settings; where there is `own.yaml`, `wrong` is its content.
    """

    name: str
    shown: str
    given: Sequence[str]
    wrong: str
    advice: Mapping[str, str]
    schema: Any = PretrainConfig


ROWS = [
    Row("no_section", "is a section; write its keys", PRETRAIN[:2], "train=3", {"e.g. train.": "train.max_steps=2"}),
    Row(
        "no_entries",
        "has entries by name",
        BARE,
        "data.sources=a",
        {"data.sources.mine.path=": "data.sources.a.path=corpus"},
    ),
    Row(
        "no_keys", "has keys and values", PRETRAIN, "deepspeed=3", {"deepspeed.NAME=VALUE": "deepspeed.dump_state=true"}
    ),
    Row(
        "no_name",
        "cannot be a name",
        BARE,
        "data.sources={'a b': {path: corpus}}",
        {"use letters, digits, - and _": "data.sources={a-b: {path: corpus}}"},
    ),
    Row(
        "no_numbers_by_name",
        "has numbers by name",
        [*PRETRAIN, "data.phases.b.start=8"],
        "data.phases.b.weights=3",
        {"data.phases.b.weights.mine=1": "data.phases.b.weights.a=1"},
    ),
    Row(
        "a_secret",
        "looks like a secret",
        PRETRAIN,
        "deepspeed.hf_token=0123456789abcdef",
        {"pass it as an environment variable": LEFT_OUT},
    ),
    Row("a_list_in_a_list", "is not text", PRETRAIN, "track.tags=[[a]]", {"put it into quotes": "track.tags=['[a]']"}),
    Row("a_reference", "contains ${...}", PRETRAIN, "track.group=${seed}", {"write the value itself": "track.group=1"}),
    Row("a_missing_value", "means a missing value", PRETRAIN, "track.group=???", {"write the value": "track.group=1"}),
    Row("a_list_for_a_number", "is a list; write one value", PRETRAIN, "seed=[5]", {"write one value": "seed=5"}),
    Row("a_number_in_quotes", "is text in quotes", PRETRAIN, "seed='5'", {"write it without them": "seed=5"}),
    Row("no_text", "has no value; write", PRETRAIN, "track.project=null", {"write ''": "track.project=''"}),
    Row(
        "a_stage_in_words",
        "is not a whole number",
        PRETRAIN,
        "engine.zero_stage=two",
        {"e.g. 1": "engine.zero_stage=1"},
    ),
    Row(
        "a_share_in_words",
        "is not a number",
        PRETRAIN,
        "model.dropout=half",
        {"0.5": "model.dropout=0.5", "3e-4": "model.dropout=3e-4"},
    ),
    Row(
        "a_number_to_base_60",
        "base 60",
        PRETRAIN,
        "engine.zero_stage=12:30",
        {"a plain number, e.g. 1": "engine.zero_stage=1"},
    ),
    Row(
        "a_value_to_base_60",
        "base 60",
        PRETRAIN,
        "deepspeed.dump_state=12:30",
        {"write a plain number": "deepspeed.dump_state=750", "put a text into quotes": "deepspeed.dump_state='12:30'"},
    ),
    Row(
        "an_infinite_value",
        "not a finite number",
        PRETRAIN,
        "deepspeed.dump_state=.inf",
        {"write one in digits": "deepspeed.dump_state=1", "put a text into quotes": "deepspeed.dump_state='.inf'"},
    ),
    Row(
        "a_misspelled_setting",
        "no such setting; did you mean",
        PRETRAIN[:2],
        "train.max_stepz=2",
        {"did you mean train.max_steps": "train.max_steps=2"},
    ),
    Row(
        "a_choice_in_capitals",
        "is not one of rms",
        PRETRAIN,
        "model.norm=LAYER",
        {"did you mean layer?": "model.norm=layer"},
    ),
    Row(
        "an_option_that_is_similar",
        "no such option; settings are written",
        PRETRAIN,
        "--learning-rat=1",
        {"optimizer.learning_rate=VALUE": "optimizer.learning_rate=1"},
    ),
    Row(
        "what_deepspeed_must_have",
        "bigtx works only",
        PRETRAIN,
        "deepspeed.prescale_gradients=true",
        {"leave it out": LEFT_OUT, "deepspeed.prescale_gradients=null": "deepspeed.prescale_gradients=null"},
    ),
    Row(
        "what_a_setting_decides",
        "contradicts train.gradient_clipping",
        PRETRAIN,
        "deepspeed.gradient_clipping=3",
        {"set train.gradient_clipping": "deepspeed.gradient_clipping=null train.gradient_clipping=3"},
    ),
    Row(
        "a_run_that_is_none",
        "no such folder; name a run or one",
        PRETRAIN,
        "init_from=nowhere",
        {"name a run": "init_from=decoder", "one of its checkpoints": "init_from=decoder/checkpoints/step-00000005"},
    ),
    Row(
        "a_base_that_is_none",
        "no such folder; name a run or one",
        FINETUNE[1:],
        "base=nowhere",
        {"name a run": "base=decoder"},
        FinetuneConfig,
    ),
    Row(
        "no_weight",
        "every weight is 0",
        PRETRAIN,
        "data.sources.a.weight=0",
        {"give one source a weight above it": "data.sources.a.weight=1"},
    ),
    Row(
        "no_weight_of_a_phase",
        "every weight is 0",
        [*PRETRAIN, "data.phases.b.start=8"],
        "data.phases.b.weights.a=0",
        {"give one source a weight above it": "data.phases.b.weights.a=1"},
    ),
    Row(
        "a_phase_without_a_start",
        "write the tokens before the phase",
        PRETRAIN,
        "data.phases.b.weights.a=1",
        {"e.g. 8B": "data.phases.b.weights.a=1 data.phases.b.start=8B"},
    ),
    Row(
        "a_phase_of_another_source",
        "is not a source in data.sources",
        [*BARE, "data.sources.wiki.path=corpus", "data.phases.b.start=8"],
        "data.phases.b.weights.wikis=1",
        {"did you mean wiki?": "data.phases.b.weights.wiki=1"},
    ),
    Row(
        "windows_that_overlap", "overlaps 1-5", PRETRAIN, "data.skip=[1-5, 3-8]", {"write one range": "data.skip=[1-8]"}
    ),
    Row(
        "one_side_of_rows",
        "gives one side of a row",
        [
            *PRETRAIN,
            "model.shape=encoder_decoder",
            "model.positions=learned",
            "objective.name=span_corruption",
            "model.max_sequence_length=64",
        ],
        "train.sequence_length=100",
        {"lower train.sequence_length": "train.sequence_length=64"},
    ),
    Row(
        "rows_beyond_the_positions",
        "is longer than the learned positions; the most",
        [*PRETRAIN, "model.positions=learned"],
        "train.sequence_length=4k",
        {"the most is model.max_sequence_length": "train.sequence_length=64"},
    ),
    Row(
        "scaling_of_learned_positions",
        "stretches rotary positions",
        [*PRETRAIN, "model.positions=learned", "train.sequence_length=64"],
        "model.rope_scaling.method=linear",
        {"write none": "model.rope_scaling.method=none"},
    ),
    Row(
        "limits_of_scaling",
        "is not below model.rope_scaling.high_frequency_factor",
        [*PRETRAIN, "model.rope_scaling.method=llama3"],
        "model.rope_scaling.low_frequency_factor=9",
        {"write a smaller number": "model.rope_scaling.low_frequency_factor=1"},
    ),
    Row(
        "too_many_active_experts",
        "is more than model.experts.num_experts=4",
        [*PRETRAIN, "model.experts.num_experts=4"],
        "model.experts.num_active=5",
        {"write at most 4": "model.experts.num_active=4"},
    ),
    Row(
        "no_convolution",
        "at least one convolution is needed",
        [*HEARING, "model.shape=encoder_decoder", "model.audio.num_mel_bins=80"],
        "model.audio.strides=[]",
        {"e.g. [2]": "model.audio.strides=[2]"},
        FinetuneConfig,
    ),
    Row(
        "a_tied_table_of_an_audio_encoder",
        "has no table of tokens",
        CTC,
        "model.tie_embeddings=true",
        {"write false": "model.tie_embeddings=false"},
        FinetuneConfig,
    ),
    Row(
        "bigrams_of_an_audio_encoder",
        "reads no tokens",
        [*CTC, "model.tie_embeddings=false"],
        "model.bigram_rows=64",
        {"write 0": "model.bigram_rows=0"},
        FinetuneConfig,
    ),
    Row(
        "distances_of_buckets",
        "are exact distances",
        [*PRETRAIN, "model.positions=relative"],
        "model.relative_max_distance=16",
        {"write a larger one": "model.relative_max_distance=17"},
    ),
    Row(
        "heads_of_a_width",
        "does not divide model.hidden_size=12",
        [*PRETRAIN, "model.hidden_size=12"],
        "model.num_heads=5",
        {
            "3": "model.num_heads=3",
            "6 do": "model.num_heads=6",
            "set model.head_width": "model.num_heads=5 model.head_width=4",
        },
    ),
    Row(
        "heads_of_keys",
        "does not divide model.num_heads=8",
        PRETRAIN,
        "model.num_kv_heads=3",
        {"2 and 4 do": "model.num_kv_heads=4"},
    ),
    Row(
        "an_empty_class",
        "names an empty class",
        FINETUNE,
        "classify.classes=[a,b,'']",
        {"leave it out": "classify.classes=[a,b]"},
        FinetuneConfig,
    ),
    Row(
        "a_class_with_spaces",
        "has a name with spaces around it",
        FINETUNE,
        "classify.classes=[a,' b']",
        {"leave them out": "classify.classes=[a,b]"},
        FinetuneConfig,
    ),
    Row(
        "a_class_twice",
        "names a class twice",
        FINETUNE,
        "classify.classes=[a,b,a]",
        {"keep one": "classify.classes=[a,b]"},
        FinetuneConfig,
    ),
    Row(
        "one_class",
        "names one class",
        FINETUNE,
        "classify.classes=[a]",
        {"name the others too": "classify.classes=[a,b]"},
        FinetuneConfig,
    ),
    Row(
        "the_first_token",
        "attends to no other token",
        FINETUNE,
        "classify.pooling=first",
        {"write last": "classify.pooling=last", "mean": "classify.pooling=mean"},
        FinetuneConfig,
    ),
    Row(
        "no_separator",
        "nothing would mark the end of a prompt",
        [*FINETUNE, "task=sft", "chat.format=plain"],
        "chat.separator=",
        {"write a text": "chat.separator=|"},
        FinetuneConfig,
    ),
    Row(
        "no_mel_bins",
        "needs an audio encoder",
        [*HEARING, "model.shape=encoder_decoder"],
        "model.audio.num_mel_bins=0",
        {"e.g. 80": "model.audio.num_mel_bins=80"},
        FinetuneConfig,
    ),
    Row(
        "a_metric_of_another_task",
        "cannot select the best checkpoint",
        FINETUNE,
        "validation.metric=bleu",
        {"accuracy": "validation.metric=accuracy", "loss": "validation.metric=loss"},
        FinetuneConfig,
    ),
    Row(
        "records_beyond_the_positions",
        "is longer than the learned positions, which end at",
        [*FINETUNE, "model.positions=learned", "model.max_sequence_length=64"],
        "data.max_length=128",
        {
            "lower the first": "data.max_length=64",
            "raise the second": "data.max_length=128 model.max_sequence_length=128",
        },
        FinetuneConfig,
    ),
    Row(
        "audio_beyond_the_positions",
        "columns of the encoder",
        [
            *HEARING,
            "model.shape=encoder_decoder",
            "model.positions=learned",
            "model.audio.num_mel_bins=80",
            "model.max_sequence_length=1024",
            "data.max_length=64",
        ],
        "transcribe.max_seconds=99",
        {
            "lower the first": "transcribe.max_seconds=9",
            "raise the second": "transcribe.max_seconds=99 model.max_sequence_length=8192",
        },
        FinetuneConfig,
    ),
    Row(
        "no_teacher",
        "name the run that the student learns from",
        FINETUNE,
        "task=distill",
        {"name the run": "task=distill distill.teacher=decoder"},
        FinetuneConfig,
    ),
    Row(
        "the_records_as_run_folder",
        "is the folder that data.train reads",
        [*FINETUNE[:2], FINETUNE[3]],
        "run_dir=texts",
        {"name another one": "run_dir=new", "it may be inside": "run_dir=texts/new"},
        FinetuneConfig,
    ),
    Row(
        "a_time_to_keep",
        "is a time; write steps or tokens",
        PRETRAIN,
        "train.keep_every=5 min",
        {"10B tokens": "'train.keep_every=10B tokens'"},
    ),
    Row(
        "a_warm_up_by_time",
        "is a time; write steps, tokens or a share",
        PRETRAIN,
        "schedule.warmup=5 min",
        {"5 %": "'schedule.warmup=5 %'"},
    ),
    Row(
        "a_warm_up_beyond_the_run",
        "longer than the whole run",
        PRETRAIN,
        "schedule.warmup=3 steps",
        {"shorten them": "'schedule.warmup=1 steps'"},
    ),
    Row(
        "a_time_out_in_steps",
        "is not a time",
        PRETRAIN,
        "engine.timeout=30 steps",
        {"30 min": "'engine.timeout=30 min'"},
    ),
    Row(
        "a_time_out_of_no_time",
        "is not between 1 s and 30 days",
        PRETRAIN,
        "engine.timeout=0 s",
        {"30 min": "'engine.timeout=30 min'"},
    ),
    Row(
        "no_interval",
        "is not an interval",
        PRETRAIN,
        "train.log_every=0 steps",
        {"100 steps": "'train.log_every=100 steps'"},
    ),
    Row(
        "an_interval_as_a_share",
        "is a share of the run",
        PRETRAIN,
        "train.log_every=5 %",
        {"100 steps": "'train.log_every=100 steps'"},
    ),
    Row(
        "more_than_the_run", "is more than the run", PRETRAIN, "schedule.warmup=200 %", {"5 %": "'schedule.warmup=5 %'"}
    ),
    Row(
        "a_run_of_nothing",
        "trains nothing",
        PRETRAIN[:2],
        "train.max_steps=0",
        {"write a number above 0": "train.max_steps=1"},
    ),
    Row(
        "a_place_for_copies",
        "cannot be written; write s3://",
        PRETRAIN,
        "train.copy_checkpoints_to=https://example.org/a",
        {
            "write s3://": "train.copy_checkpoints_to=s3://a/b",
            "gs://": "train.copy_checkpoints_to=gs://a/b",
            "a folder": "train.copy_checkpoints_to=copies",
        },
    ),
    Row(
        "a_section_that_may_change",
        "is a section; name its settings",
        PRETRAIN,
        "allow_changes=[train]",
        {"name its settings": "allow_changes=[train.max_steps]"},
    ),
    Row(
        "a_misspelled_change",
        "no such setting; did you mean",
        PRETRAIN,
        "allow_changes=[train.max_stepz]",
        {"did you mean train.max_steps": "allow_changes=[train.max_steps]"},
    ),
]
FILES = [
    Row(
        "no_keys_of_a_file",
        "has no keys at the top",
        PRETRAIN[:2],
        "just text",
        {"write lines such as train.max_steps as": "train: {max_steps: 2}"},
    ),
    Row(
        "an_alias",
        "uses a YAML alias",
        PRETRAIN,
        "seed: &x 1\ntrain: {max_steps: *x}",
        {"write the value out": "seed: 1\ntrain: {max_steps: 1}", "build on a file with base:": "base: first.yaml"},
    ),
    Row("a_tag", "has the YAML tag", PRETRAIN, "seed: !!python/name:os.system 1", {"write the plain value": "seed: 1"}),
    Row("a_key_twice", "is a duplicate", PRETRAIN, "seed: 1\nseed: 2", {"Keep one": "seed: 2"}),
    Row(
        "a_merge",
        "is a YAML merge",
        PRETRAIN,
        "train: {<<: {max_steps: 1}}",
        {"build on a file with base:": "base: first.yaml"},
    ),
]


def _add(row: Row, is_file: bool) -> None:
    def make(desk: Desk) -> Attempt:
        attempt = config(desk, row.schema, *row.given)
        desk.write("first.yaml", "seed: 3\n")

        def attempt_words(words: Sequence[str]) -> Outcome:
            given = list(words or [row.wrong])
            if is_file:
                desk.write("own.yaml", given[0])
                given = ["own.yaml"]
            return attempt([word for word in given if word])

        return attempt_words

    make.__name__ = row.name
    for advice, then in row.advice.items():
        is_one = is_file or not then or (not then.startswith("'") and set(then) & set("{[,'"))
        line = shlex.quote(then) if is_one else then
        CASES.case(row.shown, f"({re.escape(advice)})", fill={advice: line})(make)


for each in ROWS:
    _add(each, False)
for each in FILES:
    _add(each, True)
