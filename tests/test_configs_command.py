from __future__ import annotations

import re
from pathlib import Path

import pytest
from doors import as_json

from bigtx.cli import main
from bigtx.commands.configs import copy_command, explain_command, list_command, plan_command, show_command
from bigtx.config.load import load
from bigtx.config.runs import shipped_configs
from bigtx.config.schema import ModelConfig, PretrainConfig
from bigtx.model.size import count_parameters
from bigtx.utils.errors import ConfigError, LaunchError
from bigtx.utils.units import format_count


@pytest.fixture
def recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "shipped"
    for name, text in {
        "model/large.yaml": "# parameters: 1 with a vocabulary of 4,096: not small.\nmodel: {num_layers: 20}\n",
        "model/small.yaml": "# parameters: 1 with a vocabulary of 4,096: small; and cheap.\nmodel: {num_layers: 2}\n",
        "pretrain/first.yaml": "# The first run.\nbase: ../model/small.yaml\nseed: 3\n",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    for module in ("bigtx.commands.configs", "bigtx.config.runs"):
        monkeypatch.setattr(f"{module}.shipped_folder", lambda: folder)
    monkeypatch.chdir(tmp_path)
    return folder


def test_list(recipes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    list_command([])
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["model/small.yaml", "model/large.yaml", "pretrain/first.yaml"]
    small, _, first = as_json(capsys, list_command, [])
    assert small["parameters"] == count_parameters(ModelConfig(num_layers=2, vocab_size=4096)).total
    assert lines[0] == f"model/small.yaml     {format_count(small['parameters'])}  small"
    assert (first["about"], first["vocabulary"], first["parameters"]) == ("The first run", 4096, small["parameters"])


def test_every_recipe_says_in_a_few_words_what_it_is_for(capsys: pytest.CaptureFixture[str]) -> None:
    list_command([])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80 and len(lines) == len(shipped_configs()) + 4
    assert all(recipe["about"] for recipe in as_json(capsys, list_command, []))


def test_show(recipes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show_command(["pretrain/first.yaml"])
    assert capsys.readouterr().out == (recipes / "pretrain/first.yaml").read_text()
    show_command(["name=pretrain/first.yaml", "--resolved"])
    assert capsys.readouterr().out == "model:\n  num_layers: 2\nseed: 3\n"
    (tmp_path / "own.yaml").write_text("base: shipped/pretrain/first.yaml\ntrack: {tags: ['12:30', x]}\nseed: 10\n")
    show_command(["own.yaml", "--resolved"])
    shown = capsys.readouterr().out
    assert shown == ("model:\n  num_layers: 2\nseed: 10\ntrack:\n  tags:\n  - '12:30'\n  - x\n")
    (tmp_path / "resolved.yaml").write_text(shown)
    configs = [load(PretrainConfig, [name], check=False) for name in ("own.yaml", "resolved.yaml")]
    assert configs[0] == configs[1]
    with pytest.raises(ConfigError, match=r"no recipe 'frist'; did you mean pretrain/first\.yaml\?"):
        show_command(["frist"])


def test_a_copy_works_as_the_recipe_does(recipes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy_command(["pretrain/first.yaml", "output=mine"])
    shown = capsys.readouterr().out
    assert "wrote mine/pretrain/first.yaml" in shown and "wrote mine/model/small.yaml" in shown
    (tmp_path / "mine/model/small.yaml").write_text("model: {num_layers: 3}\n")
    assert load(PretrainConfig, ["mine/pretrain/first.yaml"], check=False).model.num_layers == 3
    with pytest.raises(ConfigError, match=r"small\.yaml exists already"):
        copy_command(["pretrain/first.yaml", "mine"])
    assert (tmp_path / "mine/model/small.yaml").read_text() == "model: {num_layers: 3}\n"


def test_what_copy_says_to_run_names_the_data(recipes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy_command(["pretrain/first.yaml", "mine"])
    line = "bigtx pretrain mine/pretrain/first.yaml data.sources.mine.path=CORPUS run_dir=runs/mine"
    assert line in capsys.readouterr().out
    (recipes / "pretrain/first.yaml").write_text("data: {sources: {web: {path: there}}}\n")
    copy_command(["pretrain/first.yaml", "other"])
    assert "other/pretrain/first.yaml run_dir=runs/mine" in capsys.readouterr().out


def test_what_copy_says_of_fine_tuning(recipes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (recipes / "finetune").mkdir()
    (recipes / "finetune/job.yaml").write_text("# A job.\ntask: classify\n")
    copy_command(["finetune/job.yaml", "mine"])
    line = "bigtx finetune mine/finetune/job.yaml base=RUN data.train=FILES run_dir=runs/mine"
    assert line in capsys.readouterr().out


def test_copy_refuses(recipes: Path) -> None:
    with pytest.raises(ConfigError, match=r"no recipe 'absent\.yaml'"):
        copy_command(["absent.yaml"])
    with pytest.raises(ConfigError, match=r"did you mean pretrain/first\.yaml\?"):
        copy_command(["frist.yaml"])
    with pytest.raises(ConfigError, match=r"did you mean model/small\.yaml\?"):
        copy_command(["small"])
    with pytest.raises(ConfigError, match="is the recipe itself"):
        copy_command(["model/small.yaml", str(recipes)])
    (file := recipes.with_name("a-file")).write_text("precious")
    with pytest.raises(LaunchError, match="cannot be written"):
        copy_command(["model/small.yaml", str(file)])
    assert file.read_text() == "precious"


@pytest.mark.parametrize(
    ("key", "words"),
    [
        (
            "train.max_steps",
            ["train.max_steps=null", "a count (500, 64k, 1.5M, 10B), at least 0, or null", "allow_changes"],
        ),
        ("model.mlp", ["one of swiglu, geglu, geglu_tanh, gelu, gelu_tanh, relu, relu2", "cannot change"]),
        ("validation.patience", ["bigtx finetune", "It may change when a run is resumed, if"]),
        ("engine", ["engine.zero_stage=1:", "engine.compile=auto:"]),
        ("data.sources", ["data.sources.NAME.path:"]),
        ("data.sources.wiki.weight", ["data.sources.wiki.weight=1.0"]),
        ("shard_size", ["bigtx data prepare", "a size (512 MiB, 1.5 GB)"]),
        ("input.paths", ["bigtx tokenizer train", "bigtx data prepare", "a text, or a list of them"]),
    ],
)
def test_explain(key: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    explain_command([key])
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    shown = re.sub(r"\s*\n\s+", " ", shown)
    for word in words:
        assert word in shown, shown


def test_explain_all_and_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    explain_command([])
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    (setting,) = as_json(capsys, explain_command, ["shard_size"])["bigtx data prepare"]
    assert setting["key"] == "shard_size" and "a size" in setting["type"]
    assert {"optimizer", "run_dir"} <= {one["key"] for one in as_json(capsys, explain_command, [])["bigtx pretrain"]}
    assert "optimizer: AdamW" in shown and "vocab_size=16384" in shown
    with pytest.raises(ConfigError, match=r"did you mean model\.hidden_size"):
        explain_command(["hiden_size"])


def test_a_plan_compares_only_numbers_of_gpus_that_share_the_batch(capsys: pytest.CaptureFixture[str]) -> None:
    plans = as_json(capsys, plan_command, ["pretrain/small.yaml"])  # Its batch has 16 sequences.
    assert [plan["num_gpus"] for plan in plans] == [1, 8]


def test_explanations_are_whole_sentences(capsys: pytest.CaptureFixture[str]) -> None:
    explain_command(["fork_from"])
    explained = capsys.readouterr().out
    assert "RUN for the newest one," in " ".join(explained.split()) and "  " not in explained.replace("\n  ", "")
    assert main(["help", "pretrain"]) == 0
    assert "RUN for the newest one, with its optimizer states" in " ".join(capsys.readouterr().out.split())


def test_plan(capsys: pytest.CaptureFixture[str]) -> None:
    one, eight = as_json(capsys, plan_command, ["pretrain/gpt-1.3b.yaml", "gpus=1,8"])
    assert (one["micro_batches"], eight["micro_batches"]) == (64, 8)
    assert one["communication"] == 0 < eight["communication"] < eight["arithmetic"] < one["arithmetic"]
    plan_command(["pretrain/gpt-1.3b.yaml", "gpus=8", "gpu=A100"])
    assert "A100 GPUs                            8\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["pretrain/gpt-1.3b.yaml", "gpus=some"], "gpus=some: write numbers of GPUs"),
        (["pretrain/gpt-1.3b.yaml", "gpus=3"], "gpus=3: train.global_batch_size=512 cannot be divided over 3 ranks"),
        (["pretrain/gpt-1.3b.yaml", "gpu=Abacus"], "gpu=Abacus: its peak in bf16 is not known"),
        (["pretrain/gpt"], "no recipe 'pretrain/gpt'"),
        (["own.yaml"], "own.yaml does not say how many ids its tokenizer has"),
    ],
)
def test_what_cannot_be_planned_is_said(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.yaml").write_text("model: {num_layers: 2}\n")
    with pytest.raises(ConfigError, match=re.escape(said)):
        plan_command(words)
