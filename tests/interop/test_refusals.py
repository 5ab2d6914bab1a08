"""What import and export refuse: broken folders, other people's code, models that one side does not express."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from interop.foreign import make_config, save_folder, save_tokenizer
from safetensors.torch import load_file, save_file

from bigtx.cli import main
from bigtx.config.load import from_dict, to_dict
from bigtx.config.schema import ModelConfig
from bigtx.engine.checkpoint import newest
from bigtx.engine.trained import find
from bigtx.interop.exporter import ExportSettings
from bigtx.interop.families import by_model_type, choose
from bigtx.interop.read import ForeignWeights
from bigtx.interop.verify import verify
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.utils.errors import CheckpointError, ConfigError

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "nanochat", "mixtral", "qwen2_moe", "qwen3_moe")
SIZES: dict[str, dict[str, Any]] = {
    "qwen2_moe": {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 40},
    "qwen3_moe": {"moe_intermediate_size": 24},
}
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in one file."""
    folder = tmp_path_factory.mktemp("models") / "whole"
    save_folder(folder, make_config("llama"))
    return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in shards."""
    folder = tmp_path_factory.mktemp("models") / "sharded"
    save_folder(folder, make_config("llama"), shard_size="20KB")
    return folder


@pytest.fixture(scope="module")
def run(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of the whole one."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert main(["import", str(whole), "-o", str(folder)]) == 0
    return folder


def copied(source: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(source, tmp_path / "model"))


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one paragraph of a command that fails; where it was to write, nothing may be."""
    output = Path(str(arguments[arguments.index("-o") + 1]))
    there = sorted(output.parent.iterdir())
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and "Traceback" not in shown.err
    assert sorted(output.parent.iterdir()) == there
    return shown.err


def import_refused(capsys: pytest.CaptureFixture[str], folder: Path) -> str:
    return refused(capsys, "import", folder, "-o", folder.parent / "run")


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace tensors, or take them away."""
    path = folder / "model.safetensors"
    held = load_file(path) | changes
    save_file({key: tensor for key, tensor in held.items() if tensor is not None}, path, metadata={"format": "pt"})


def leave_canary(folder: Path, names: list[str]) -> Path:
    """Python files that leave a trace if they run."""
    trace = folder.parent / "it-ran"
    for name in names:
        (folder / name).write_text(f"open({str(trace)!r}, 'w').close()\n")
    return trace


def test_a_missing_shard(sharded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copied(sharded, tmp_path)
    victim = sorted(folder.glob("*.safetensors"))[1]
    victim.unlink()
    assert f"lacks {victim.name}, which {INDEX} names" in import_refused(capsys, folder)


def test_a_shard_cut_short(sharded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copied(sharded, tmp_path)
    victim = sorted(folder.glob("*.safetensors"))[1]
    victim.write_bytes(victim.read_bytes()[:-100])
    message = import_refused(capsys, folder)
    assert victim.name in message and "is not a complete safetensors file" in message


def test_no_safetensors_at_all(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copied(whole, tmp_path)
    (folder / "model.safetensors").write_bytes(b"")
    assert "is not a complete safetensors file" in import_refused(capsys, folder)
    (folder / "model.safetensors").unlink()
    assert f"no model.safetensors and no {INDEX}" in import_refused(capsys, folder)


class Trap:
    """Unpickled, it leaves a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.trace), "w")


def test_a_decoder_without_its_head(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copied(whole, tmp_path)
    change_tensors(folder, **{"lm_head.weight": None})
    said = import_refused(capsys, folder)
    assert "a llama without its head" in said and "lm_head.weight missing" in said and "LlamaForCausalLM" in said


@pytest.mark.parametrize("has_model", [True, False])
def test_adapters_that_cannot_be_merged(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], has_model: bool
) -> None:
    """transformers takes the base that the adapters name, whatever weights are beside them."""
    folder = copied(whole, tmp_path)
    if not has_model:
        (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text(
        '{"peft_type": "PREFIX_TUNING", "base_model_name_or_path": "some/base"}'
    )
    said = import_refused(capsys, folder)
    assert "PEFT's format (PREFIX_TUNING), not a model" in said and "import the base 'some/base'" in said


def test_pickle_is_not_opened(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copied(whole, tmp_path)
    (folder / "model.safetensors").unlink()
    trace = tmp_path / "it-ran"
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(trace)))
    assert "as pickle only (pytorch_model.bin)" in import_refused(capsys, folder)
    assert not trace.exists()


def test_code_of_a_model_is_not_run(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copied(whole, tmp_path)
    trace = leave_canary(folder, ["modeling_new.py", "configuration_new.py", "tokenization_new.py"])
    change_config(folder, auto_map={"AutoModelForCausalLM": "modeling_new.New", "AutoConfig": "configuration_new.New"})
    message = import_refused(capsys, folder)
    assert "auto_map: AutoModelForCausalLM, AutoConfig" in message and "never runs" in message
    # Files that nothing names are no reason to refuse, nor to run them.
    shutil.copyfile(whole / "config.json", folder / "config.json")
    assert main(["import", str(folder), "-o", str(tmp_path / "run")]) == 0
    assert not trace.exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "mamba"}, ["'mamba'", "which are", "llama"]),
        ({"model_type": None}, ["names no model_type"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["quantized"]),
        ({"num_key_value_heads": 3}, ["num_kv_heads", "does not divide"]),
        (
            {"hidden_act": "snake", "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}, "mlp_bias": "yes"},
            ["hidden_act='snake'", "rope_parameters.rope_type='dynamic'", "mlp_bias='yes'"],
        ),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, ["partial_rotary_factor=0.5"]),
        ({"hidden_size": None, "vocab_size": "many"}, ["hidden_size is missing", "vocab_size='many'"]),
        ({"intermediate_size": 64}, ["9 of another shape", "mlp.down_proj.weight"]),
        ({"num_hidden_layers": 4}, ["9 missing", "model.layers.3."]),
        ({"num_hidden_layers": 2}, ["9 unknown", "model.layers.2."]),
        ({"attention_bias": True}, ["12 missing"]),
        ({"vocab_size": 90}, ["100 ids, more than the 90 rows"]),
        ({"vocab_size": 120}, ["model.embed_tokens.weight [100, 32] instead of [120, 32]"]),
    ],
)
def test_configs_that_do_not_hold(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], words: list[str]
) -> None:
    folder = copied(whole, tmp_path)
    change_config(folder, **changes)
    message = import_refused(capsys, folder)
    assert all(word in message for word in words), message


def test_fields_that_other_families_refuse() -> None:
    for model_type, changes, word in (
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention=True"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "attention_factor": 3.0}}, "3.0000"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "truncate": False}}, "truncate=False"),
        ("mistral", {"sliding_window": 1}, "sliding_window=1"),
        ("qwen2_moe", {"mlp_only_layers": [1]}, "mlp_only_layers=[1]"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step=2"),
        (
            "qwen3",
            {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention", "full_attention"]},
            "full_attention in blocks [1, 2]",
        ),
    ):
        values = make_config(model_type).to_dict() | {"moe_intermediate_size": 24, **changes}
        with pytest.raises(ConfigError, match=r"config\.json has fields that bigtx cannot express") as caught:
            by_model_type(model_type).read_config(values)
        assert word in str(caught.value)


def test_tensors_that_are_no_numbers(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copied(whole, tmp_path)
    key = "model.layers.1.mlp.up_proj.weight"
    change_tensors(folder, **{key: torch.zeros(48, 32, dtype=torch.int8)})
    assert f"{key} (I8)" in import_refused(capsys, folder)
    # Found only when nearly all has been written: nothing of it stays.
    change_tensors(folder, **{"lm_head.weight": torch.full((100, 32), torch.nan), key: torch.zeros(48, 32)})
    assert "lm_head.weight has values that are not finite" in import_refused(capsys, folder)


def test_a_head_of_its_own_that_is_called_tied(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copied(whole, tmp_path)
    change_config(folder, tie_word_embeddings=True)
    assert "lm_head.weight has other numbers than model.embed_tokens.weight" in import_refused(capsys, folder)
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    change_tensors(folder, **{"lm_head.weight": embedding.clone()})
    assert main(["import", str(folder), "-o", str(tmp_path / "run")]) == 0


def test_an_index_that_does_not_fit(sharded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copied(sharded, tmp_path)
    whole_index = json.loads((folder / INDEX).read_text())
    assert ForeignWeights(folder).shapes.keys() == whole_index["weight_map"].keys()
    key, *_, other = whole_index["weight_map"]
    for name, words in (
        ("../elsewhere.safetensors", "files outside of its folder: ../elsewhere.safetensors"),
        (whole_index["weight_map"][other], f"does not fit the files: {key}"),
    ):
        index = whole_index | {"weight_map": whole_index["weight_map"] | {key: name}}
        (folder / INDEX).write_text(json.dumps(index))
        assert words in import_refused(capsys, folder)
    (folder / INDEX).write_text("[")
    assert f"{INDEX} cannot be read" in import_refused(capsys, folder)


def test_other_folders(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "hf download" in import_refused(capsys, tmp_path / "gpt2")
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in import_refused(capsys, tmp_path / "empty")
    (tmp_path / "filled").mkdir()
    (tmp_path / "filled" / "mine.txt").write_text("precious")
    assert "exists already" in refused(capsys, "import", whole, "-o", tmp_path / "filled")
    assert (tmp_path / "filled" / "mine.txt").read_text() == "precious"


def test_a_tokenizer_elsewhere(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copied(whole, tmp_path)
    for path in folder.glob("*token*"):
        path.unlink()
    assert "tokenizer=FOLDER" in import_refused(capsys, folder)
    save_tokenizer(tmp_path / "words")
    options = ["-o", str(tmp_path / "run"), "--tokenizer", str(tmp_path / "words")]
    assert main(["import", str(folder), *options]) == 0
    assert Tokenizer.load(tmp_path / "run" / "tokenizer").vocab_size == 100


def test_what_a_killed_attempt_left_is_no_hindrance(whole: Path, tmp_path: Path) -> None:
    left = tmp_path / ".run.unfinished" / "checkpoints" / "step-00000000.partial"
    left.mkdir(parents=True)
    with pytest.raises(CheckpointError):
        newest(tmp_path / ".run.unfinished")
    assert main(["import", str(whole), "-o", str(tmp_path / "run")]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_exports_that_are_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    assert "exists already" in refused(capsys, "export", run, "-o", out)
    assert (out / "mine.txt").read_text() == "precious"
    new = tmp_path / "new"
    assert "has no ema weights (it has master)" in refused(capsys, "export", run, "-o", new, "--weights", "ema")
    message = refused(capsys, "export", run, "-o", new, "--family", "gpt2")
    assert "the family gpt2 cannot express this model: model.norm=rms: " in message
    assert "'gtp2'" in refused(capsys, "export", run, "-o", new, "--family", "gtp2")
    assert "max_shard_size=5 apples" in refused(capsys, "export", run, "-o", new, "--max-shard-size", "5 apples")


def test_an_export_without_transformers(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install 'bigtx[huggingface]'" in refused(capsys, "export", run, "-o", tmp_path / "out")
    others = tmp_path / "out.partial"  # As of a corpus that is being prepared.
    others.mkdir()
    assert main(["export", str(run), "-o", str(tmp_path / "out"), "--no-verify"]) == 0
    assert "it was not compared with transformers" in capsys.readouterr().out
    assert others.is_dir()


def test_the_nearest_family_is_named() -> None:
    config = ModelConfig(vocab_size=100, prefix_attention=True)
    with pytest.raises(ConfigError) as caught:
        choose(config)
    assert "nearest is llama: model.prefix_attention=true: the family has false" in str(caught.value)
    assert "gpt2" not in str(caught.value)


CHANGES: list[dict[str, Any]] = [
    {"shape": "encoder"}, {"hidden_size": 64}, {"num_layers": 4}, {"num_heads": 2}, {"num_kv_heads": 1},
    {"head_width": 16}, {"mlp": "geglu"}, {"mlp": "gelu"}, {"mlp": "relu2"}, {"mlp_size": 100}, {"norm": "rms"},
    {"norm": "layer", "norm_bias": True}, {"norm": "layer", "norm_bias": False}, {"norm_placement": "post"},
    {"bigram_rows": 9}, {"bigram_rows": 9, "bigram_size": 4}, {"embedding_norm": True},
    {"embedding_norm": False}, {"norm_eps": 1e-3}, {"norm_scale": True},
    {"norm_scale": False}, {"qk_norm": True}, {"qk_norm": False}, {"attention_scale": 0.3}, {"attention_scale": 1.0},
    {"attention_window": 5}, {"attention_window": 5, "global_attention_every": 2},
    {"attention_window": 5, "local_rope_theta": 9.0}, {"prefix_attention": True}, {"positions": "learned"},
    {"positions": "rope"}, {"positions": "sinusoidal"}, {"positions": "learned", "position_offset": 2},
    {"rope_theta": 77.0}, {"rope_scaling": {"method": "linear", "factor": 2.0}},
    {"rope_scaling": {"method": "llama3", "factor": 2.0, "original_length": 9, "low_frequency_factor": 2.0}},
    {"rope_scaling": {"method": "yarn", "factor": 2.0, "original_length": 9, "beta_fast": 9.0, "beta_slow": 2.0}},
    {"max_sequence_length": 99}, {"num_token_types": 2}, {"attention_bias": True}, {"attention_output_bias": True},
    {"attention_bias": True, "attention_output_bias": True}, {"attention_bias": False}, {"mlp_bias": True},
    {"mlp_bias": False}, {"tie_embeddings": True}, {"tie_embeddings": False}, {"head_bias": True},
    {"head_transform": True}, {"logit_scale": 0.5}, {"logit_soft_cap": 9.0}, {"logit_soft_cap": None},
    {"experts": {"num_experts": 0}}, {"experts": {"num_experts": 4, "num_active": 3}},
    {"experts": {"num_experts": 4, "expert_size": 20}}, {"experts": {"num_experts": 4, "normalize_weights": True}},
    {"experts": {"num_experts": 4, "normalize_weights": False}}, {"experts": {"num_experts": 4, "shared_size": 20}},
    {"experts": {"num_experts": 4, "shared_size": 20, "shared_gate": True}},
]  # fmt: skip
"""Of every field that changes what a decoder computes."""
IDLE = {("gpt2", "rope_theta"), ("gpt2", "rope_scaling"), ("mixtral", "mlp_size")}
"""Fields that say nothing there: GPT-2 turns nothing, Mixtral's experts have a size of their own."""


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_no_field_of_a_model_is_lost(model_type: str) -> None:
    """What a family does not express it says, and all else comes back from config.json."""
    family = by_model_type(model_type)
    plain = to_dict(family.read_config(make_config(model_type, **SIZES.get(model_type, {})).to_dict()))
    kept = 0
    for changes in CHANGES:
        merged = {name: plain[name] | value if isinstance(value, dict) else value for name, value in changes.items()}
        config = from_dict(ModelConfig, plain | merged)
        if family.problems(config) or (model_type, *changes) in IDLE:
            continue
        kept += 1
        back = to_dict(family.read_config(family.write_config(config, _Ids())))  # type: ignore[arg-type]
        assert all(back[name] == to_dict(config)[name] for name in changes), changes
    assert 10 < kept < len(CHANGES) - 20
    said = {name for changes in CHANGES for name in changes}
    assert set(plain) - said == {
        "vocab_size", "num_decoder_layers", "relative_num_buckets", "relative_max_distance", "dropout",
        "attention_dropout", "init", "init_std",
        "audio", "lora",  # Refused, or merged, before a family is asked: see the exporter.
        "num_classes", "class_head",  # See test_classifiers.py.
    }  # fmt: skip


@pytest.mark.parametrize(("model_type", "name"), [("mixtral", "experts.num_experts"), ("bert", "num_token_types")])
def test_a_family_whose_key_is_a_size_refuses_zero(model_type: str, name: str) -> None:
    """The key in config.json has to be at least 1, so 0 could not be read back."""
    family = by_model_type(model_type)
    config = family.read_config(make_config(model_type).to_dict())
    assert family.problems(config) == []
    section, _, field = name.rpartition(".")
    setattr(getattr(config, section) if section else config, field, 0)
    assert family.problems(config) == [f"model.{name}=0: the family has at least 1"]


class _Ids:
    begin_id = end_id = pad_id = 0
    end_ids = (0,)


@pytest.mark.parametrize(
    "damage",
    [
        "tensor",
        "theta",
        "window",
        "missing",
    ],
)
def test_the_comparison_finds_what_is_wrong(run: Path, tmp_path: Path, damage: str) -> None:
    out = tmp_path / "out"
    assert main(["export", str(run), "-o", str(out), "--no-verify"]) == 0
    checkpoint, config = find(run)
    arguments = (out, by_model_type("llama"), checkpoint, config, Tokenizer.load(run / "tokenizer"))
    assert verify(*arguments, ExportSettings()).problems == []
    key = "model.layers.2.self_attn.k_proj.weight"
    if damage == "tensor":
        change_tensors(out, **{key: load_file(out / "model.safetensors")[key].flip(0)})
    elif damage == "missing":
        keys = [f"model.layers.2.self_attn.{part}_proj.weight" for part in "kqvo"]
        change_tensors(out, **dict.fromkeys(keys))
    elif damage == "theta":
        change_config(out, rope_parameters={"rope_type": "default", "rope_theta": 10_500.0})
    else:
        change_config(out, model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=60)
    problems = verify(*arguments, ExportSettings()).problems
    assert len(problems) == 1 and ("logits differ by" in problems[0]) == (damage != "missing")
    assert damage != "missing" or f"'missing_keys': {sorted(keys)}" in problems[0]


def test_a_difference_is_an_error(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from bigtx.interop import verify as module

    monkeypatch.setattr(module, "TOLERANCE", -1.0)
    capsys.readouterr()
    assert main(["export", str(run), "-o", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert "do not use it: logits differ by" in message and (tmp_path / "out" / "model.safetensors").is_file()


def test_fp16_that_does_not_hold_the_weights(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copied(whole, tmp_path)
    change_tensors(folder, **{"model.norm.weight": torch.full((32,), 1e6)})
    assert main(["import", str(folder), "-o", str(tmp_path / "run")]) == 0
    message = refused(capsys, "export", tmp_path / "run", "-o", tmp_path / "out", "--dtype", "fp16")
    assert "model.norm.weight has values above fp16's largest" in message


def test_a_damaged_checkpoint_is_not_exported(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    file = next((copy / "checkpoints").glob("*/*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert "does not have the sha256" in refused(capsys, "export", copy, "-o", tmp_path / "out")
