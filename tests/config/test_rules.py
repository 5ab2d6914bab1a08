"""`--print-config` refuses what the run refuses: every rule of the schemas has a case here."""

from __future__ import annotations

import ast
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from bigtx.commands.data import prepare_command
from bigtx.commands.tokenizer import train_command
from bigtx.config import deepspeed, nodes
from bigtx.config.load import parse_command_line
from bigtx.config.schema import (
    FinetuneConfig,
    PretrainConfig,
    finetuning,
    model,
    preparation,
    pretraining,
    tasks,
    training,
)
from bigtx.data.raw import files
from bigtx.tokenizer import train
from bigtx.utils.errors import ConfigError

MODULES: tuple[ModuleType, ...] = (
    deepspeed,
    finetuning,
    model,
    preparation,
    pretraining,
    tasks,
    training,
    files,
    train,
)
"""The modules with rules."""


def pretrain_door(arguments: list[str]) -> None:
    parse_command_line(PretrainConfig, arguments, program="bigtx pretrain")


def finetune_door(arguments: list[str]) -> None:
    parse_command_line(FinetuneConfig, arguments, program="bigtx finetune")


DOORS: dict[str, tuple[Callable[[list[str]], Any], list[str]]] = {
    "pretrain": (pretrain_door, ["run_dir=new", "data.sources.a.path=corpus", "train.max_steps=100"]),
    "finetune": (finetune_door, ["run_dir=new", "tokenizer=folder", "data.train=folder", "train.epochs=1"]),
    "prepare": (prepare_command, ["input.paths=folder", "tokenizer=folder", "output=new"]),
    "tokenizer": (train_command, ["input.paths=folder", "output=new"]),
}
"""What reads the command line, and a command that it accepts."""

ENCODER = "model.shape=encoder objective.name=masked"
BOTH = "model.shape=encoder_decoder objective.name=prefix"
SPEECH = "task=transcribe model.shape=encoder_decoder model.audio.num_mel_bins=16"
EXPERTS = "model.experts.num_experts=4"
TEACHER = "distill.teacher=run"
CASES: dict[str, list[str]] = {
    "pretrain": [
        "run_dir=",
        "allow_changes=seeed",
        "allow_changes=train",
        "allow_changes=seed",
        # The model.
        "model.num_heads=7",
        "model.hidden_size=24",
        "model.head_width=3",
        "model.num_kv_heads=3",
        "model.norm_bias=true",
        "model.positions=relative model.relative_max_distance=16",
        "model.positions=learned model.rope_scaling.method=linear",
        "model.rope_scaling.method=yarn model.rope_scaling.beta_slow=64",
        "model.rope_scaling.method=llama3 model.rope_scaling.low_frequency_factor=4",
        "model.experts.num_active=1",
        f"{EXPERTS} {ENCODER}",
        f"{EXPERTS} model.experts.num_active=5",
        f"{EXPERTS} model.mlp_bias=true",
        f"{EXPERTS} model.experts.shared_gate=true",
        "model.lora.alpha=3",
        "model.lora.rank=2 model.lora.targets=nothing init_from=run",
        "model.lora.rank=2",
        "optimizer.train_also=head.*",
        "model.audio.hop_ms=5",
        "model.audio.num_mel_bins=16",
        f"model.audio.num_mel_bins=16 model.audio.strides=[] {ENCODER}",
        f"model.audio.num_mel_bins=16 model.tie_embeddings=true {ENCODER}",
        f"model.audio.num_mel_bins=16 model.bigram_rows=8 {ENCODER}",
        "model.num_decoder_layers=2",
        "model.global_attention_every=2",
        "model.bigram_size=8",
        "model.position_offset=2",
        # The run.
        "train.global_batch_size=32",
        "train.max_tokens=1M",
        "train.max_steps=null",
        "train.max_steps=0",
        "train.log_every='0 steps'",
        "train.checkpoint_every='5 %'",
        "train.keep_every='5 min'",
        "fork_from=nowhere",
        "train.copy_checkpoints_to=https://example.com/a",
        "validation.every='5 %'",
        "schedule.warmup='5 min'",
        "schedule.decay='5 min'",
        "schedule.warmup='101 steps'",
        "engine.precision=fp16 engine.zero_stage=0",
        "engine.offload_optimizer=cpu engine.zero_stage=0",
        "engine.bucket_size=1000 engine.zero_stage=0",
        "engine.offload_parameters=cpu",
        "engine.activation_checkpointing=auto engine.precision=fp32",
        "engine.timeout='5 steps'",
        "engine.timeout='0 s'",
        "guards.patience=65",
        "guards.verify_replicas_every='5 %'",
        "deepspeed.zero_optimization.stage=2",
        "deepspeed.amp.enabled=true",
        "deepspeed.data_types.grad_accum_dtype=bf16",
        "deepspeed.bf16=true",
        "deepspeed.zero_optimisation.stage=1",
        "distill.weight=0.3",
        "distill.teacher=nowhere",
        f"{TEACHER} distill.copy_layers=true init_from=run",
        "init_from=nowhere",
        # Data and objective.
        "data.sources.a=null",
        "data.sources.a.path=",
        "data.sources.a.path=s3://",
        "data.sources.a.path=nowhere",
        "data.sources.a.path=corpus/train",
        "data.sources.a.weight=0",
        "data.foreign.paths=a.tar data.foreign.tokenizer=folder",
        "data.foreign.paths=https:// data.foreign.tokenizer=folder",
        "data.foreign.paths=[nowhere.tar]",
        "data.phases.b.weights.a=1",
        "data.phases.b.start=5 data.phases.c.start=6",
        "data.phases.b.start=5 data.phases.b.weights.c=1",
        "data.phases.b.start=5 data.phases.b.weights.a=0",
        "data.skip=5-3",
        "data.skip=[3-7,5-9]",
        "objective.name=masked",
        "objective.mask_rate=0.3",
        f"validation.sample_prompts=a {ENCODER}",
        "validation.sources.b.path=corpus validation.sources.b.weight=2",
        "model.positions=learned train.sequence_length=4096",
        f"model.positions=learned train.sequence_length=4096 {BOTH}",
    ],
    "finetune": [
        "tokenizer=null",
        "tokenizer=nowhere",
        "data.train=[]",
        "data.train=nowhere",
        "data.train=*.nothing",
        "run_dir=folder",
        "train.max_steps=5",
        "engine.activation_checkpointing=auto",
        "classify.classes=['']",
        "classify.classes=[' a',b]",
        "classify.classes=[a,b,b]",
        "classify.classes=[a]",
        "classify.pooling=first",
        "task=classify model.shape=encoder_decoder",
        "task=sft model.shape=encoder",
        "task=translate model.shape=encoder",
        f"task=distill {TEACHER} model.shape=encoder_decoder",
        "task=preference model.prefix_attention=true",
        "task=sft chat.format=plain chat.separator=",
        "task=sft sft.row_length=64",
        "chat.temperature=1",
        "validation.every='0 %'",
        "validation.metric=bleu",
        "task=sft validation.metric=exact_match",
        "task=preference validation.metric=chosen_reward",
        f"{SPEECH} transcribe.method=ctc",
        f"{SPEECH} model.shape=encoder transcribe.method=ctc transcribe.num_beams=2",
        f"{SPEECH} model.positions=learned model.max_sequence_length=32",
        "task=transcribe model.shape=encoder_decoder",
        "model.shape=encoder model.audio.num_mel_bins=16",
        "model.positions=learned data.max_length=4096",
        "task=translate data.max_length=1025",
        "task=distill",
        f"task=preference {TEACHER}",
    ],
    "prepare": [
        "input.paths=[]",
        "output=",
        "tokenizer=",
        "filters.min_words=5 filters.max_words=4",
        "decontaminate.paths=nowhere",
        "input.text_suffixes=.csv",
    ],
    "tokenizer": [
        "output=",
        "input.text_suffixes=.gz",
        "chat_roles=A",
        "chat_roles=[a,a]",
        f"vocab_size=384 user_defined_symbols=[{','.join(f's{number}' for number in range(30))}]",
        "user_defined_symbols=['']",
        "user_defined_symbols=<mask>",
        "user_defined_symbols=[\u2581]",
        "user_defined_symbols=[a,b,a]",
    ],
}
"""By command: settings that one rule refuses."""


def rules_of(module: ModuleType) -> set[tuple[str, int]]:
    """The module and the first line of each problem that its rules make."""
    assert module.__file__
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    makers = ("Problem", "idle", "idle_settings")
    return {(module.__name__, call.lineno) for call in calls if call.func.id in makers}  # type: ignore[attr-defined]


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> set[tuple[str, int]]:
    """The rules that made a problem, in a folder with what the cases name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    for name in ("corpus/train", "corpus/validation", "folder", "run"):
        (tmp_path / name).mkdir(parents=True)
    for split in ("train", "validation"):
        (tmp_path / "corpus" / split / "manifest.json").write_text("{}", encoding="utf-8")
    (tmp_path / "run" / "config.yaml").write_text("model: {}\n", encoding="utf-8")
    (tmp_path / "a.tar").touch()
    seen: set[tuple[str, int]] = set()

    def recording(make: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **named: Any) -> Any:
            frame = sys._getframe(1)
            result = make(*arguments, **named)
            if not isinstance(result, nodes.Problem):
                result = list(result)  # Those of `idle_settings`.
            if result:
                seen.add((frame.f_globals["__name__"], frame.f_lineno))
            return result

        return wrapper

    for module in MODULES:
        for name in ("Problem", "idle", "idle_settings"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, recording(getattr(nodes, name)))
    return seen


def refusal(door: Callable[[list[str]], Any], arguments: list[str]) -> str:
    """The message of a refusal; "" if the command is accepted."""
    try:
        door(arguments)
    except ConfigError as error:
        return str(error)
    except SystemExit:
        pass
    return ""


def words(case: str) -> list[str]:
    """The settings of a case; spaces within quotation marks do not separate them."""
    return [word.replace("='", "=").removesuffix("'") if "='" in word else word for word in _apart(case)]


def _apart(case: str) -> list[str]:
    return re.findall(r"[^\s=]+=(?:'[^']*'|\S*)", case)


def test_print_config_refuses_what_the_run_refuses_by_every_rule(
    made: set[tuple[str, int]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rule without a case fails here, and so does a case that no rule refuses."""
    accepted, different = [], []
    for name, cases in CASES.items():
        door, good = DOORS[name]
        assert refusal(door, [*good, "--print-config"]) == ""
        for case in cases:
            monkeypatch.setenv("WORLD_SIZE", "3" if case == "train.global_batch_size=32" else "1")
            arguments = [*good, *words(case)]
            printed = refusal(door, [*arguments, "--print-config"])
            if not printed:
                accepted.append(case)
            elif printed != refusal(door, arguments):
                different.append(case)
    capsys.readouterr()
    every = {rule for module in MODULES for rule in rules_of(module)}
    assert (accepted, different, sorted(every - made)) == ([], [], [])


def test_raw_keys_that_depend_on_the_ranks_are_compared_by_the_run_alone(made: set[tuple[str, int]]) -> None:
    door, good = DOORS["pretrain"]
    raw = ["deepspeed.train_micro_batch_size_per_gpu=2", "deepspeed.gradient_accumulation_steps=7"]
    with pytest.raises(SystemExit):
        door([*good, *raw, "--print-config"])
    config = PretrainConfig(deepspeed={"gradient_accumulation_steps": 7})
    with pytest.raises(ConfigError, match=r"\.gradient_accumulation_steps=7: contradicts train\.global_batch"):
        deepspeed.deepspeed_config(config, world_size=2)


def test_a_missing_base_has_no_further_problems(made: set[tuple[str, int]]) -> None:
    """The model is the one of the base."""
    shutil.rmtree("run")
    text = refusal(finetune_door, ["run_dir=new", "base=run", "data.train=folder", "train.epochs=1", "task=transcribe"])
    assert text.startswith("base=run (command line): no such folder") and "\n" not in text
