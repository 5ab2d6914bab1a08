"""Runs of bigtx as folders for transformers: files, types, shards, averages, and memory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from doors import environment
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import bigtx
from bigtx.cli import main
from bigtx.config.load import to_yaml
from bigtx.config.schema import ModelConfig, PretrainConfig, TokenizerTrainConfig
from bigtx.engine.checkpoint import Checkpoint, list_checkpoints, load_weights, newest, write_manifest
from bigtx.engine.write_weights import save_weights
from bigtx.interop.families import choose
from bigtx.model.size import parameter_shapes
from bigtx.model.transformer import Transformer
from bigtx.tokenizer.train import train
from bigtx.utils.files import sha256_file

transformers = pytest.importorskip("transformers")

MODEL = ModelConfig(hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, init_std=0.1, max_sequence_length=128)


def make_run(folder: Path, model: ModelConfig, seed: int = 1) -> Path:
    """A run of a model that is not trained, with a tokenizer that bigtx trained."""
    text = (Path(sysconfig.get_path("stdlib")) / "argparse.py").read_text(encoding="utf-8")
    tokenizer = train(TokenizerTrainConfig(vocab_size=600), [text])
    tokenizer.save(folder / "tokenizer")
    model.vocab_size = tokenizer.vocab_size
    (folder / "config.yaml").write_text(to_yaml(PretrainConfig(run_dir=str(folder), model=model)), encoding="utf-8")
    built = Transformer(model)
    built.init_weights(seed)
    weights = dict(built.named_parameters())
    save_weights(
        folder, {"step": 7}, parameter_shapes(model), ((name, weights[name]) for name in parameter_shapes(model))
    )
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "small-talk", MODEL)


def export(run: Path, out: Path, *options: str) -> None:
    assert main(["export", str(run), "--to", "hf", "-o", str(out), *options]) == 0


def test_a_run_with_a_tokenizer_of_its_own(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export(run, tmp_path / "out", "--license", "mit")
    said = capsys.readouterr()
    assert "as LlamaForCausalLM: " in said.out and "The same token ids, and " in said.out and said.err == ""
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"} <= names
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["license"] == "mit" and "# out" in card

    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ours = bigtx.load(run, device="cpu")
    assert model.generation_config.eos_token_id == ours.tokenizer.end_id and model.dtype == torch.float32
    ids = tokenizer("import argparse", return_tensors="pt", add_special_tokens=False)
    settings = transformers.GenerationConfig(do_sample=False, max_new_tokens=20)
    new_ids = model.generate(**ids, generation_config=settings)[0, ids["input_ids"].shape[1] :]
    text = tokenizer.decode(new_ids, skip_special_tokens=True)
    assert text == ours.generate("import argparse", max_new_tokens=20, temperature=0.0) and text


@pytest.mark.parametrize(("dtype", "expected"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_narrow_types_in_shards(run: Path, tmp_path: Path, dtype: str, expected: torch.dtype) -> None:
    export(run, tmp_path / "out", "--dtype", dtype, "--max-shard-size", "60 kB")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [path.name for path in shards] == sorted(set(index["weight_map"].values()))
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors" and len(shards) > 2
    held: dict[str, torch.Tensor] = {}
    for path in shards:
        tensors = load_file(path)
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert size <= 60_000 or len(tensors) == 1
        assert all(index["weight_map"][key] == path.name for key in tensors)
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
        held |= tensors
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in held.values())
    masters = dict(load_weights(newest(run)))
    assert torch.equal(held["lm_head.weight"], masters["head.weight"][:600].to(expected))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(expected).removeprefix("torch.")
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == expected


def test_fragments_of_two_ranks_and_their_average(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    folder = newest(copy)
    pieces: list[dict[str, torch.Tensor]] = [{}, {}]
    for name, weight in load_weights(newest(run)):
        middle = weight.numel() // 3
        for kind, flat in (("master", weight.flatten()), ("ema", weight.flatten() / 2)):
            pieces[0][f"{name}|0|{kind}"] = flat[:middle].clone()
            pieces[1][f"{name}|{middle}|{kind}"] = flat[middle:].clone()
    manifest = Checkpoint(folder).manifest | {"files": {}}
    del manifest["ranges"]  # The headers have them too.
    for number, tensors in enumerate(pieces):
        path = folder / f"rank-{number:05d}.safetensors"
        save_file(tensors, path)
        manifest["files"][path.name] = {"size": path.stat().st_size, "sha256": sha256_file(path)}
    write_manifest(folder, manifest)
    export(run, tmp_path / "one")
    export(copy, tmp_path / "two")
    export(folder, tmp_path / "average", "--weights", "ema")
    one, two, average = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two", "average"))
    assert all(torch.equal(one[key], two[key]) and torch.equal(one[key] / 2, average[key]) for key in one)


def test_every_decoder_of_bigtx_that_has_a_family(tmp_path: Path) -> None:
    """Configs as people write them for bigtx, not as they come from transformers."""
    wanted: dict[str, dict[str, Any]] = {
        "llama": {},
        "mistral": {"attention_window": 5},
        "qwen2": {"attention_bias": True, "attention_window": 5, "global_attention_every": 2},
        "qwen3": {"qk_norm": True},
        "gpt2": {"norm": "layer", "norm_bias": True, "positions": "learned", "mlp": "gelu", "attention_bias": True}
        | {"attention_output_bias": True, "mlp_bias": True, "num_kv_heads": None},
        "nanochat": {"norm_scale": False, "qk_norm": True, "embedding_norm": True, "mlp": "relu2"}
        | {"logit_soft_cap": 15.0, "init_std": 0.02},
    }
    for number, (model_type, fields) in enumerate(wanted.items()):
        config = ModelConfig(**({"hidden_size": 64, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2} | fields))
        run = make_run(tmp_path / f"run-{number}", config)
        assert choose(config).model_type == model_type
        export(run, tmp_path / f"out-{number}")


def test_a_checkpoint_of_weights_alone_in_parts(tmp_path: Path) -> None:
    weights = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(5), "c": torch.zeros(7, 1)}
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    facts = {"step": 0, "tokenizer": "x"}
    made = save_weights(tmp_path, facts, shapes, iter(weights.items()), part_bytes=44)
    assert made == newest(tmp_path) and Checkpoint(made).verify() == []
    assert [path.name for path in sorted(made.glob("*.safetensors"))] == [
        "rank-00000.safetensors",
        "rank-00001.safetensors",
    ]
    manifest = Checkpoint(made).manifest
    assert manifest["tokenizer"] == "x" and manifest["files"]["rank-00001.safetensors"]["sha256"] == sha256_file(
        made / "rank-00001.safetensors"
    )
    for name, weight in load_weights(made):
        assert torch.equal(weight, weights[name])


def test_a_checkpoint_whose_weights_break_off_is_not_there(tmp_path: Path) -> None:
    def weights() -> Any:
        yield "a", torch.ones(3)
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        save_weights(tmp_path, {"step": 0}, {"a": (3,), "b": (3,)}, weights())
    assert list_checkpoints(tmp_path) == [] and list((tmp_path / "checkpoints").iterdir()) == []


PEAK = """
import sys
from pathlib import Path
import bigtx.commands.interop, bigtx.interop.exporter, bigtx.interop.importer, transformers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from bigtx.cli import main
def kib(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field)))
Path("/proc/self/clear_refs").write_text("5")  # The peak begins anew here.
before = kib("VmRSS")
status = main(sys.argv[1:])
print("PEAK", kib("VmHWM") - before)
sys.exit(status)
"""


def peak_bytes(*arguments: object) -> int:
    """How much more memory a command has at its peak than its imports alone."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    return 1024 * int(done.stdout.rpartition("PEAK ")[2])


@pytest.mark.slow
def test_memory_holds_a_shard_and_not_the_model(tmp_path: Path) -> None:
    """300M parameters: 1.2 GB of masters, exported in shards of 200 MB and imported from them."""
    model = ModelConfig(hidden_size=1024, num_layers=23, num_heads=16, tie_embeddings=True)
    run = make_run(tmp_path / "run", model)
    total = sum(4 * shape.numel() for shape in map(torch.Size, parameter_shapes(model).values()))
    assert total > 1.1e9
    out = tmp_path / "out"
    exporting = peak_bytes("export", run, "-o", out, "--no-verify", "--dtype", "bf16", "--max-shard-size", "200 MB")
    shard = max(path.stat().st_size for path in out.glob("*.safetensors"))
    importing = peak_bytes("import", out, "-o", tmp_path / "again")
    print(f"shard {shard / 1e6:.0f} MB, export {exporting / 1e6:.0f} MB, import {importing / 1e6:.0f} MB")
    # malloc keeps some of the fp32 tensors that an import has freed: 10 to 100 MB.
    assert 1e7 < importing < 2 * shard and 1e7 < exporting < 1.2 * shard
