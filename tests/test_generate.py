"""`bigtx generate` and `bigtx.load` on a run folder."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from doors import ROOT, environment
from safetensors.torch import save_file

import bigtx
from bigtx.cli import main
from bigtx.config.load import to_yaml
from bigtx.config.schema import ModelConfig, PretrainConfig, TokenizerTrainConfig
from bigtx.engine.checkpoint import write_manifest
from bigtx.model.transformer import Transformer
from bigtx.tokenizer.train import train
from bigtx.utils.errors import BigtxError, CheckpointError
from bigtx.utils.files import sha256_file


def write_checkpoint(run: Path, step: int, model: dict[str, torch.Tensor], ema: dict[str, torch.Tensor]) -> Path:
    """A checkpoint as two ranks would have written it: each parameter in two pieces."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    files: dict[str, dict[str, torch.Tensor]] = {"rank-00000.safetensors": {}, "rank-00001.safetensors": {}}
    for kind, weights in (("master", model), ("ema", ema)):
        for name, weight in weights.items():
            flat = weight.detach().float().flatten()
            middle = flat.numel() // 3
            files["rank-00000.safetensors"][f"{name}|0|{kind}"] = flat[:middle].clone()
            files["rank-00001.safetensors"][f"{name}|{middle}|{kind}"] = flat[middle:].clone()
    for name, tensors in files.items():
        save_file(tensors, folder / name)
    manifest = {
        "format": 1,
        "step": step,
        "parameters": {name: list(weight.shape) for name, weight in model.items()},
        "files": {
            name: {"size": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)} for name in files
        },
    }
    write_manifest(folder, manifest)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two checkpoints; the model is not trained, but its weights are large enough to have opinions."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    source = (Path(sysconfig.get_path("stdlib")) / "argparse.py").read_text(encoding="utf-8")
    tokenizer = train(TokenizerTrainConfig(vocab_size=600), [source])
    tokenizer.save(folder / "tokenizer")
    config = PretrainConfig(
        run_dir=str(folder),
        model=ModelConfig(
            vocab_size=600,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            init_std=0.2,
            tie_embeddings=True,
            max_sequence_length=64,
        ),
    )
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    for step in (5, 10):
        model, ema = Transformer(config.model), Transformer(config.model)
        model.init_weights(step)
        ema.init_weights(step + 1)
        write_checkpoint(folder, step, dict(model.named_parameters()), dict(ema.named_parameters()))
    return folder


def error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one paragraph of a command that fails."""
    assert main(["generate", *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and "Traceback" not in shown.err
    return shown.err


def test_the_newest_checkpoint_is_loaded(run: Path) -> None:
    loaded = bigtx.load(run)
    assert loaded.checkpoint.name == "step-00000010"
    expected = Transformer(loaded.config.model)
    expected.init_weights(10)
    ids = loaded.tokenizer.encode("import os")
    with torch.no_grad():
        torch.testing.assert_close(loaded.logits(ids), expected.eval()(torch.tensor([ids]))[0])
    assert loaded.model.head.weight is loaded.model.embedding.weight and not loaded.model.training


def test_a_named_checkpoint_and_the_average(run: Path) -> None:
    ids = [5, 6, 7]
    named = bigtx.load(run / "checkpoints" / "step-00000005")
    assert named.checkpoint.name == "step-00000005"
    newest, average = bigtx.load(run, device="cpu"), bigtx.load(str(run), weights="ema")
    assert not torch.equal(named.logits(ids), newest.logits(ids))
    assert not torch.equal(average.logits(ids), newest.logits(ids))


def test_python_and_the_command_agree(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = bigtx.load(run).generate("def f(", max_new_tokens=20, temperature=1.0, top_k=50, top_p=0.9, seed=3)
    options = ["--max-new-tokens", "20", "--temperature", "1.0", "--top-k", "50", "--top-p", "0.9", "--seed", "3"]
    assert main(["generate", str(run), "--prompt", "def f(", *options]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"def f({text}\n" and text
    assert "step-00000010: " in shown.err and " tokens in " in shown.err
    main(["generate", str(run), "--prompt", "def f(", *options[:-1], "4"])
    assert capsys.readouterr().out != shown.out


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_a_file_of_prompts(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str) -> None:
    """More prompts than one batch; the answers are those of each prompt at its place."""
    prompts = [f"x = {number}" for number in range(20)] + ["Füße\u2028 é"]
    path = tmp_path / f"prompts{suffix}"
    if suffix == ".txt":
        path.write_text("\n\n".join(prompts) + "\r\n", encoding="utf-8")
    else:
        path.write_text(
            "".join(json.dumps({"id": i, "prompt": prompt}) + "\n" for i, prompt in enumerate(prompts)),
            encoding="utf-8",
        )
    assert main(["generate", str(run), "--prompts-file", str(path), "--max-new-tokens", "8"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.split("\n")[:-1]]
    assert [record["prompt"] for record in records] == prompts
    if suffix == ".jsonl":
        assert [record["id"] for record in records] == list(range(21))
    alone = bigtx.load(run).generate_batch(prompts[17:18], max_new_tokens=8, first_index=17)
    assert [record["completion"] for record in records][17:18] == alone


def test_a_prompt_longer_than_the_window_is_remarked_on(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("short\n" + "x = 1; " * 100 + "\n" + "ab" * 32 + "\n", encoding="utf-8")
    assert main(["generate", str(run), "--prompts-file", str(path), "--max-new-tokens", "1"]) == 0
    remark, _ = capsys.readouterr().err.splitlines()
    number = len(bigtx.load(run).tokenizer.encode("x = 1; " * 100))
    assert remark == f"[prompt 2 has {number} tokens; the model reads the last 64 (model.max_sequence_length)]"
    assert main(["generate", str(run), "--prompt", "x = 1; " * 100, "--max-new-tokens", "1"]) == 0
    assert "[the prompt has" in capsys.readouterr().err


def test_an_empty_prompt_starts_a_document(run: Path) -> None:
    loaded = bigtx.load(run)
    assert isinstance(loaded.generate("", max_new_tokens=5), str)


def test_a_run_that_is_none(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is not a folder" in error(capsys, str(tmp_path / "nowhere"), "--prompt", "x")
    assert "no config.yaml" in error(capsys, str(tmp_path), "--prompt", "x")
    (tmp_path / "config.yaml").write_text("model: [", encoding="utf-8")
    assert "config.yaml cannot be read" in error(capsys, str(tmp_path), "--prompt", "x")
    (tmp_path / "config.yaml").write_text("- 1\n", encoding="utf-8")
    assert "is not a run's config" in error(capsys, str(tmp_path), "--prompt", "x")
    (tmp_path / "config.yaml").write_text("model:\n  width: 3\n", encoding="utf-8")
    assert "model.width" in error(capsys, str(tmp_path), "--prompt", "x")
    (tmp_path / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    assert "no complete checkpoint" in error(capsys, str(tmp_path), "--prompt", "x")


def test_a_config_that_was_edited(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    text = (run / "config.yaml").read_text(encoding="utf-8").replace("hidden_size: 32", "hidden_size: 64")
    (copy / "config.yaml").write_text(text, encoding="utf-8")
    for name in ("tokenizer", "checkpoints"):
        (copy / name).symlink_to(run / name)
    assert "does not fit the run's config.yaml" in error(capsys, str(copy), "--prompt", "x")


def test_weights_that_are_not_there(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    (copy / "tokenizer").symlink_to(run / "tokenizer")
    model = dict(bigtx.load(run).model.named_parameters())
    folder = write_checkpoint(copy, 1, model, {})
    assert bigtx.load(copy).checkpoint == folder
    with pytest.raises(CheckpointError, match="holds no ema weights"):
        bigtx.load(copy, weights="ema")
    file = folder / "rank-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="sha256"):
        bigtx.load(copy)


BROKEN: list[tuple[str, str | bytes, str]] = [
    ("broken.jsonl", '{"prompt": "a"}\n{"prompt"\n', "line 2 is not JSON"),
    ("broken.jsonl", '{"text": "a"}\n', "line 1 has no prompt"),
    ("broken.jsonl", "[1]\n", "line 1 has no prompt"),
    ("empty.txt", "\n \n", "has no prompt"),
    ("latin.txt", b"\xff\xfe", "is not UTF-8"),
    ("prompts.csv", "a,b\n", "neither .txt"),
]


@pytest.mark.parametrize(("name", "content", "words"), BROKEN)
def test_prompts_that_cannot_be_used(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: str | bytes, words: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    shown = error(capsys, str(run), "--prompts-file", str(path))
    assert words in shown and str(path) in shown


def test_prompts_that_are_missing(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = error(capsys, str(run), "--prompts-file", str(tmp_path / "none.txt"))
    assert shown == f"DataError: {tmp_path / 'none.txt'} cannot be read: No such file or directory\n"


@pytest.mark.parametrize("temperature", ["-1", "nan", "inf"])
def test_settings_out_of_range(run: Path, capsys: pytest.CaptureFixture[str], temperature: str) -> None:
    settings = ["top_p=0", "top_k=0", f"temperature={temperature}", "max_new_tokens=0"]
    shown = error(capsys, str(run), "prompt=x", *settings)
    assert all(setting in shown for setting in settings)


def test_a_device_that_is_not_there(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "'nonsense' cannot be used" in error(capsys, str(run), "--prompt", "x", "--device", "nonsense")
    assert "'cuda:99' cannot be used" in error(capsys, str(run), "--prompt", "x", "--device", "cuda:99")


def test_usage_and_mistakes_need_no_torch(tmp_path: Path) -> None:
    def without_torch(*arguments: Any) -> subprocess.CompletedProcess[str]:
        program = "import sys; sys.modules['torch'] = None; from bigtx.cli import main; sys.exit(main(sys.argv[1:]))"
        command = [sys.executable, "-c", program, "generate", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, cwd=Path(bigtx.__file__).parents[1])

    assert without_torch("--help").returncode == 0
    for arguments in (
        (tmp_path / "nowhere", "--prompt", "x"),
        (tmp_path, "--prompt", "x"),
        (tmp_path, "--prompts-file", tmp_path / "none.txt"),
        (tmp_path,),
    ):
        ended = without_torch(*arguments)
        assert ended.returncode == 2 and "Traceback" not in ended.stderr, ended.stderr


@pytest.mark.parametrize("temperature", [1e-40, 1e-320, 1e-6])
def test_a_tiny_temperature_takes_the_likeliest_token(run: Path, temperature: float) -> None:
    loaded = bigtx.load(run)
    likeliest = loaded.generate("def f(", max_new_tokens=8, temperature=0.0)
    assert loaded.generate("def f(", max_new_tokens=8, temperature=temperature) == likeliest


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda model: model.generate("x", temperature=-1.0), "temperature=-1.0: a number, 0 or more"),
        (lambda model: model.generate("x", temperature="hot"), "temperature=hot: a number, 0 or more"),
        (lambda model: model.generate("x", top_k=0), "top_k=0: a whole number, at least 1"),
        (lambda model: model.generate("x", top_p=2.0, seed=0.5), "top_p=2.0: a number above 0, at most 1; seed=0.5"),
        (lambda model: model.generate("x", max_new_tokens=0), "max_new_tokens=0"),
        (lambda model: model.generate(None), "the prompt is not a text"),
        (lambda model: model.generate_batch("x"), "the prompts are not a list of texts"),
        (lambda model: model.logits([]), "ids must be one or more whole numbers from 0 to 599"),
        (lambda model: model.logits([5, 600]), "from 0 to 599"),
        (lambda model: model.logits([5], target_ids=[5]), "model.shape=decoder has no target_ids"),
        (lambda model: model.predict(["x"]), "was pretrained and has no task"),
        (lambda model: model.predict([], batch_size=0), "batch_size=0: a whole number, at least 1"),
        (lambda model: bigtx.load(model.checkpoint, weights="mean"), "weights='mean' is not one of master, ema"),
    ],
)
def test_wrong_arguments_from_python(run: Path, call: Any, words: str) -> None:
    with pytest.raises(BigtxError, match=re.escape(words)):
        call(bigtx.load(run))


def test_json_lines_are_utf8_whatever_the_terminal_is(run: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("Füße → é\n", encoding="utf-8")
    command = [sys.executable, "-m", "bigtx", "generate", str(run), "--max-new-tokens", "2"]
    command += ["--prompts-file", str(tmp_path / "prompts.txt")]
    done = subprocess.run(command, capture_output=True, env=environment(PYTHONIOENCODING="ascii"), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.decode("utf-8"))["prompt"] == "Füße → é"
