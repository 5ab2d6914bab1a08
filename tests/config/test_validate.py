from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from bigtx.config.load import load
from bigtx.config.schema import (
    ChatConfig,
    ClassifyConfig,
    FinetuneConfig,
    ModelConfig,
    PreferenceConfig,
    PrepareConfig,
    PretrainConfig,
    RhythmConfig,
    ScheduleConfig,
    SftConfig,
    TokenizerTrainConfig,
    TranscribeConfig,
    TranslateConfig,
)
from bigtx.config.shape import micro_batch_size_of
from bigtx.utils.errors import ConfigError


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks like a prepared corpus, and the working directory above it."""
    for split in ("train", "validation"):
        (tmp_path / "corpus" / split).mkdir(parents=True)
        (tmp_path / "corpus" / split / "manifest.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return tmp_path / "corpus"


GOOD = ["run_dir=run", "data.sources.mine.path=corpus", "train.max_steps=100"]


def refusal(schema: type, *args: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(schema, args)
    return str(caught.value)


def test_a_good_config_has_no_problem(corpus: Path) -> None:
    assert load(PretrainConfig, GOOD).run_dir == "run"


def test_an_empty_config_lists_what_is_missing(corpus: Path) -> None:
    text = refusal(PretrainConfig)
    for words in ("run_dir: is not given", "data.sources: is empty", "train.max_steps: is not given"):
        assert words in text


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["data.sources.mine.path=nowhere"], r"data\.sources\.mine\.path=nowhere \(command line\): no such folder"),
        (["data.sources.mine.path=."], r"has no train/manifest\.json"),
        (["data.sources.mine.weight=0"], "every weight is 0"),
        (["data.sources.other.weight=1"], r"data\.sources\.other\.path: is not given"),
        (["validation.sources.v.path=nowhere"], r"validation\.sources\.v\.path=nowhere"),
        (
            ["train.max_tokens=1B"],
            "train.max_tokens is given too; write only one of them, or unset one by train.max_steps=null",
        ),
        (["init_from=nowhere"], "init_from=nowhere .*no such folder"),
        (["allow_changes=[train.max_stepz]"], "no such setting; did you mean train.max_steps"),
        (["allow_changes=[train]"], "is a section"),
        (["allow_changes=[seed]"], "can never change"),
        (["model.hidden_size=100", "model.num_heads=8"], "does not divide model.hidden_size=100; 5 and 10 do"),
        (["model.hidden_size=24", "model.num_heads=8"], "3 wide.*even"),
        (
            ["model.experts.num_experts=4", "model.shape=encoder", "objective.name=masked"],
            "only a decoder has experts, but model.shape=encoder",
        ),
        (["model.experts.num_experts=4", "model.experts.num_active=5"], "num_experts=4; write at most 4"),
        (["model.experts.num_experts=1"], "num_active=2.*write at most 1"),
        (["model.experts.num_experts=4", "model.mlp_bias=true"], "experts have no biases"),
        (["model.experts.num_experts=4", "model.experts.shared_gate=true"], r"without model\.experts\.shared_size=N"),
        (["model.experts.balance_loss=0"], r"balance_loss=0.* without model\.experts\.num_experts=N"),
        (["model.experts.normalize_weights=false"], r"without model\.experts\.num_experts=N; leave it out"),
        (["model.head_width=3"], "model.head_width=3 .*even"),
        (["model.num_kv_heads=3"], "does not divide model.num_heads=8; 2 and 4 do"),
        (["model.norm_bias=true"], "RMSNorm has no bias"),
        (["model.positions=relative", "model.relative_max_distance=16"], "exact distances"),
        (["model.positions=learned", "model.rope_scaling.method=linear"], "stretches rotary"),
        (["model.positions=learned", "train.sequence_length=4k"], "longer than the learned positions"),
        (["objective.name=masked"], "is not possible for model.shape=decoder; write causal or fill_in_middle"),
        (["model.shape=encoder"], "objective.name=causal: is not possible for model.shape=encoder; write masked"),
        (["model.shape=encoder_decoder"], "write span_corruption or prefix"),
        (["model.prefix_attention=true"], "is not possible for a decoder with model.prefix_attention; write prefix"),
        (
            ["validation.sources.a.path=corpus", "validation.sources.a.weight=2"],
            r"a\.weight=2.* has no effect",
        ),
        (["validation.sources.a.path=corpus", "validation.sources.a.max_epochs=2"], r"a\.max_epochs=2.* has no effect"),
        (["objective.mask_rate=0.3"], r"mask_rate=0\.3 .*has no effect without objective\.name=masked"),
        (
            ["model.shape=encoder", "objective.name=masked", "validation.sample_prompts=[a]"],
            "an encoder .* generates no text",
        ),
        (["engine.offload_optimizer=cpu", "engine.zero_stage=0"], "needs engine.zero_stage 1, 2 or 3"),
        (["engine.offload_parameters=cpu"], "needs engine.zero_stage=3; it is 1"),
        (["engine.timeout=30 steps"], "is not a time"),
        (["train.log_every=0 steps"], "is not an interval"),
        (["schedule.warmup=30 min"], "is a time; write steps"),
        (["schedule.warmup=101 steps"], "longer than the whole run"),
        (
            ["schedule.name=warmup_stable_decay", "schedule.warmup=30 %", "schedule.decay=71 steps"],
            "longer than the whole run",
        ),
        (
            ["train.max_steps=null", "train.max_tokens=1M", "schedule.warmup=2M tokens"],
            "longer than the whole run",
        ),
    ],
)
def test_refused(corpus: Path, args: list[str], words: str) -> None:
    text = refusal(PretrainConfig, *GOOD, *args)
    assert re.search(words, text), text
    assert "\n" not in text


def test_a_schedule_that_fills_the_run_is_good(corpus: Path) -> None:
    load(
        PretrainConfig, [*GOOD, "schedule.name=warmup_stable_decay", "schedule.warmup=30 %", "schedule.decay=70 steps"]
    )
    # cosine has no decay of its own: the setting's default does not count.
    load(PretrainConfig, [*GOOD, "schedule.warmup=90 %", "schedule.decay=20 %"])


def test_the_ranks_count(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "cannot be divided over 3 ranks; 30 or 33 can," in refusal(PretrainConfig, *GOOD)
    load(PretrainConfig, [*GOOD, "train.global_batch_size=36"])
    monkeypatch.setenv("WORLD_SIZE", "64")
    assert "64 can," in refusal(PretrainConfig, *GOOD)


@pytest.mark.parametrize(
    ("total", "most", "ranks", "size"), [(32, 4, 2, 4), (16, 8, 8, 2), (12, 8, 1, 6), (14, 4, 2, 1), (8, 32, 1, 8)]
)
def test_micro_batches_divide_a_ranks_share(total: int, most: int, ranks: int, size: int) -> None:
    assert micro_batch_size_of(RhythmConfig(global_batch_size=total, micro_batch_size=most), ranks) == size


def test_a_wrong_value_has_no_followers(corpus: Path) -> None:
    text = refusal(PretrainConfig, *GOOD[:2], "train.max_stepz=100")
    assert "did you mean train.max_steps" in text and "\n" not in text


def test_prepare(corpus: Path) -> None:
    text = refusal(PrepareConfig, "input.paths=[nowhere, '*.none', corpus]", "tokenizer=absent")
    for words in (
        "input.paths=nowhere (command line): no such file",
        "*.none (command line): matches no file",
        "output: is not given",
        "tokenizer=absent (command line): no such folder",
    ):
        assert words in text
    assert "input.paths=corpus" not in text
    assert load(PrepareConfig, ["input.paths=[corpus, 'corp*']", "output=o", "tokenizer=corpus"]).output == "o"


def test_filters_and_evaluation_sets(corpus: Path) -> None:
    good = ["input.paths=[corpus]", "output=o", "tokenizer=corpus"]
    text = refusal(
        PrepareConfig,
        *good,
        "filters.min_words=1k",
        "filters.max_words=10",
        "decontaminate.paths=[nowhere, corpus]",
    )
    assert "filters.min_words=1000 (command line): is above filters.max_words=10" in text
    assert "decontaminate.paths=nowhere (command line): no such file" in text and text.count("decontaminate") == 1
    text = refusal(PrepareConfig, *good, "filters.max_top_ngrams=[x, 0.2, 18]", "filters.max_duplicate_ngrams=0.1")
    for words in ("max_top_ngrams[0]=x (command line): is not a number", "[2]=18", "too large", "is a list of numbers"):
        assert words in text
    shares = load(PrepareConfig, [*good, "filters.max_top_ngrams=[0.2, 0.1]"]).filters.max_top_ngrams
    assert shares == [0.2, 0.1]


def test_tokenizer(corpus: Path) -> None:
    text = refusal(TokenizerTrainConfig)
    assert "input.paths: is empty" in text and "output: is not given" in text
    assert load(TokenizerTrainConfig, ["input.paths=[corpus]", "output=o"]).vocab_size == 16_384


def test_a_run_is_not_made_in_the_folder_of_its_records(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a text")
    arguments = ["tokenizer=.", f"data.train={tmp_path}", "train.max_steps=1"]
    told = refusal(FinetuneConfig, *arguments, f"run_dir={tmp_path}/../{tmp_path.name}")
    assert "run_dir" in told and "is the folder that data.train reads" in told
    assert "is the folder" not in refusal(
        FinetuneConfig, *arguments, f"run_dir={tmp_path}/run", "train.global_batch_size=0"
    )


def of_task(task: Any, shape: Any = "decoder", bins: int = 0, **sections: Any) -> list[str]:
    """What is said of a fine-tuning's settings for its task."""
    config = FinetuneConfig(task=task, run_dir="run", model=ModelConfig(shape=shape), **sections)
    config.model.audio.num_mel_bins = bins
    return list(map(str, config.task_problems()))


@pytest.mark.parametrize(
    "settings", [{"label_smoothing": 0.1}, {"num_beams": 4}, {"length_penalty": 1.0}], ids=lambda each: next(iter(each))
)
def test_settings_that_say_nothing_with_ctc(settings: dict[str, Any]) -> None:
    ((key, value),) = settings.items()
    assert of_task("transcribe", "encoder_decoder", 16, transcribe=TranscribeConfig(**settings)) == []
    assert of_task("transcribe", "encoder", 16, transcribe=TranscribeConfig(method="ctc")) == []
    (said,) = of_task("transcribe", "encoder", 16, transcribe=TranscribeConfig(method="ctc", **settings))
    assert said.startswith(f"transcribe.{key}={value}") and "has no effect with transcribe.method=ctc" in said


def test_what_hears_and_what_writes() -> None:
    ctc = TranscribeConfig(method="ctc")
    (said,) = of_task("transcribe", "encoder_decoder", 16, transcribe=ctc)
    assert "transcribe.method=ctc: is for model.shape=encoder, and it is encoder_decoder" in said
    (said,) = of_task("transcribe", "encoder", 16)
    assert "transcribe.method=seq2seq: is for model.shape=encoder_decoder, and it is encoder" in said
    (said,) = of_task("transcribe", "encoder", 0, transcribe=ctc)
    assert "needs an audio encoder" in said
    (said,) = of_task("classify", "encoder", 16)
    assert "which task=classify cannot use; write task=transcribe, or 0" in said


@pytest.mark.parametrize(
    ("task", "sections", "words"),
    [
        ("sft", {"sft": SftConfig(row_length=64)}, "sft.row_length=64.* has no effect without sft.packing=true"),
        ("sft", {"preference": PreferenceConfig(beta=0.2)}, "beta=0.2.* has no effect without task=preference"),
        ("classify", {"chat": ChatConfig(temperature=0.5)}, "has no effect without task=sft or preference"),
        ("preference", {"sft": SftConfig(packing=True)}, "has no effect without task=sft"),
        ("distill", {"sft": SftConfig(answers="last")}, "has no effect without task=sft"),
        ("sft", {"translate": TranslateConfig(prefix="a")}, "has no effect without task=translate"),
        ("sft", {"transcribe": TranscribeConfig(max_seconds=1)}, "has no effect without task=transcribe"),
        ("sft", {"classify": ClassifyConfig(balance=True)}, "has no effect without task=classify"),
        ("classify", {"classify": ClassifyConfig(classes=["a", ""])}, "names an empty class"),
        ("classify", {"classify": ClassifyConfig(classes=["a", " b"])}, "with spaces around it"),
        ("classify", {"classify": ClassifyConfig(classes=["a", "b", "a"])}, "names a class twice"),
        ("classify", {"classify": ClassifyConfig(classes=["a"])}, "names one class"),
    ],
)
def test_settings_that_do_not_fit_the_task(task: str, sections: dict[str, Any], words: str) -> None:
    (said,) = of_task(task, **sections)
    assert re.search(words, said), said


@pytest.mark.parametrize(("max_length", "is_good"), [(None, True), (512, True), (513, False)])
def test_a_decoder_reads_both_sides_of_a_pair(max_length: int | None, is_good: bool) -> None:
    config = FinetuneConfig(task="translate", model=ModelConfig(max_sequence_length=1024))
    config.data.max_length = max_length
    said = [str(problem) for problem in config.problems() if problem.key == "data.max_length"]
    assert said == [] if is_good else "max_length=513: is for each side" in said[0]


def test_a_schedule_made_in_python_with_something_that_is_no_duration() -> None:
    """The loader of a config refuses the text; this rule compares the lengths that are known."""
    schedule = ScheduleConfig(name="warmup_stable_decay", warmup="soon", decay="15 steps")
    (problem,) = schedule.problems(10, 10)
    assert problem.key == "schedule.decay"


def test_settings_of_the_task_are_good() -> None:
    for task in ("sft", "preference"):
        assert of_task(task, chat=ChatConfig(temperature=0.5)) == []
    assert of_task("sft", sft=SftConfig(packing=True, row_length=64)) == []
    assert of_task("classify", classify=ClassifyConfig(classes=["a", "b"], balance=True)) == []
