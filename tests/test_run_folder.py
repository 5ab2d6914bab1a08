"""What befalls a run's folder: checkpoints that are gone or elsewhere, other files, another tokenizer, damage."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from doors import Mount, losses, pretrain, read_lines
from finetunes import base_arguments, finetune, labelled, write_jsonl

import bigtx
from bigtx.cli import main
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.utils.errors import CheckpointError

pytestmark = pytest.mark.dist


@pytest.fixture
def run(decoder_base: Path, tmp_path: Path) -> Path:
    """A finished run of four steps that a test may harm."""
    shutil.copytree(decoder_base, tmp_path / "run")
    return tmp_path / "run"


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(*arguments: str) -> str:
    """What a pretraining says that is refused."""
    done = pretrain(*arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr and done.stdout == ""
    return done.stderr


def gone(checkpoints: Path) -> None:
    shutil.rmtree(checkpoints)


def emptied(checkpoints: Path) -> None:
    gone(checkpoints)
    checkpoints.mkdir()


def dangling(checkpoints: Path) -> None:
    gone(checkpoints)
    checkpoints.symlink_to("/nowhere/disk")


def a_file(checkpoints: Path) -> None:
    gone(checkpoints)
    checkpoints.touch()


def read_only(checkpoints: Path, mount: Mount) -> None:
    emptied(checkpoints)
    mount(checkpoints, "ro")


TEXTS = {dangling: "link to /nowhere/disk", a_file: "is not a folder"}


@pytest.mark.parametrize("harm", [gone, emptied, dangling, a_file, read_only])
def test_checkpoints_that_are_gone(corpus: Path, run: Path, harm: Callable[..., None], mount: Mount) -> None:
    harm(run / "checkpoints", *[mount] * (harm is read_only))
    before = contents(run)
    text = refused(*base_arguments(corpus, run))
    assert TEXTS.get(harm, "allow_changes=[checkpoints]") in text
    assert contents(run) == before


def test_a_run_that_begins_again_on_purpose_keeps_its_history(corpus: Path, run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    before = contents(run)
    done = pretrain(*base_arguments(corpus, run, "allow_changes=[checkpoints]", "optimizer.learning_rate=2e-3"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "starts again at step 0" in done.stdout and list(losses(run)) == [1, 2, 3, 4]
    for name in ("metrics.jsonl", "events.jsonl", "config.yaml"):
        assert (run / "history-1" / name).read_bytes() == before[name]
    assert [event["kind"] for event in read_lines(run / "events.jsonl")].count("end") == 1


def test_checkpoints_on_another_disk(
    corpus: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.move(run / "checkpoints", tmp_path / "disk")
    (run / "checkpoints").symlink_to("../disk")
    (checkpoint,) = (run / "checkpoints").glob("step-*")
    for named in (run, checkpoint):
        assert main(["generate", str(named), "--prompt", "ba", "--max-new-tokens", "2"]) == 0
    assert main(["export", str(run), "-o", str(tmp_path / "out"), "--no-verify"]) == 0
    assert main(["evaluate", str(run), "--split", "validation", "--wandb", "off"]) == 0, capsys.readouterr().err
    done = pretrain(*base_arguments(corpus, run))
    assert done.returncode == 0 and "the run is finished" in done.stdout, done.stdout + done.stderr


def test_metrics_that_are_damaged_or_missing_are_reported_once(corpus: Path, run: Path) -> None:
    first, _, third, last = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text(first + third[:20] + "\n" + last)
    allowed = "allow_changes=[train.max_steps]"
    done = pretrain(*base_arguments(corpus, run, allowed, steps=6))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("warning: 2 of 4 lines of") == 1 and list(losses(run)) == [1, 4, 5, 6]
    (event,) = (event for event in read_lines(run / "events.jsonl") if event["kind"] == "missing_lines")
    assert (event["file"], event["missing"], event["of"], event["step"]) == ("metrics.jsonl", 2, 4, 4)
    done = pretrain(*base_arguments(corpus, run, allowed, steps=7))
    assert done.returncode == 0 and "lines of" not in done.stdout and list(losses(run)) == [1, 4, 5, 6, 7]


def test_another_tokenizer_in_the_run(
    corpus: Path, run: Path, decoder_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from bigtx.config.schema import TokenizerTrainConfig
    from bigtx.tokenizer.train import train

    texts = [path.read_text() for path in sorted(corpus.parent.glob("*.txt"))[:40]]
    other = train(TokenizerTrainConfig(vocab_size=400), texts)
    shutil.rmtree(run / "tokenizer")
    other.save(run / "tokenizer")
    assert Tokenizer.load(run / "tokenizer").fingerprint == other.fingerprint
    for command in (
        ["generate", str(run), "--prompt", "ba"],
        ["evaluate", str(run), "--split", "validation", "--wandb", "off"],
        ["export", str(run), "-o", str(tmp_path / "out"), "--no-verify"],
    ):
        assert main(command) == 2, command
        shown = capsys.readouterr()
        assert shown.out == "" and "is not the tokenizer that" in shown.err
    with pytest.raises(CheckpointError, match="is not the tokenizer that"):
        bigtx.load(run)
    records = write_jsonl(tmp_path / "records.jsonl", labelled(8))
    for changes in ([f"base={run}"], [f"base={decoder_base}", f"distill.teacher={run}"]):
        settings = ["task=classify", "train.max_steps=1", f"data.train=[{records}]", f"run_dir={tmp_path / 'new'}"]
        done = finetune(*settings, *changes)
        assert done.returncode == 2 and "is not the tokenizer that" in done.stderr, done.stdout + done.stderr


def test_a_folder_of_something_else(corpus: Path, tmp_path: Path) -> None:
    before = contents(corpus)
    assert "run_dir" in refused(*base_arguments(corpus, corpus))
    other = tmp_path / "other"
    shutil.copytree(corpus, other)
    assert "is a prepared corpus" in refused(*base_arguments(corpus, other))
    assert contents(corpus) == contents(other) == before


def test_the_users_own_config_in_the_run_folder(corpus: Path, tmp_path: Path) -> None:
    run, text = tmp_path / "run", "# mine\noptimizer:\n  learning_rate: 2e-3\n"
    run.mkdir()
    (run / "config.yaml").write_text(text)
    (run / "notes.md").write_text("precious")
    before = contents(run)
    assert "config.yaml, which no run wrote" in refused(*base_arguments(corpus, run))
    assert contents(run) == before
    arguments = [argument for argument in base_arguments(corpus, run, steps=1) if "learning_rate" not in argument]
    done = pretrain(str(run / "config.yaml"), *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (run / "config.given.yaml").read_text() == text and (run / "notes.md").read_text() == "precious"
    assert bigtx.load(run).config.optimizer.learning_rate == 2e-3


@pytest.mark.parametrize(
    "content",
    [
        "\0" * 100,
        "[1]",
        "a: !!python/name:os.system ''",
        "model: &a\n  hidden_size: [*a]\n",
        "a: &a [x, x]\n"
        + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in itertools.pairwise("abcdefghi")),
        "model: " + "[" * 3000,
    ],
    ids=["zeros", "a list", "a tag", "a circle", "a billion", "deep"],
)
def test_a_damaged_config(corpus: Path, run: Path, capsys: pytest.CaptureFixture[str], content: str) -> None:
    (run / "config.yaml").write_text(content)
    assert f"{run / 'config.yaml'} " in refused(*base_arguments(corpus, run))
    for words in (
        ["generate", str(run), "prompt=ba"],
        ["evaluate", str(run), "split=validation"],
        ["export", str(run), "output=out"],
        ["predict", str(run), f"input={run / 'events.jsonl'}"],
        ["chat", str(run)],
    ):
        assert main(words) == 2, words
        assert f"{run / 'config.yaml'} " in capsys.readouterr().err


@pytest.mark.parametrize(
    "line", [b"\0\n", b"\xff\n", b'{"step": "x", "kind": "start"}\n', b'{"kind": [5]}\n', b"[1]\n"]
)
def test_damaged_records_of_a_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], line: bytes) -> None:
    """They are left out by every command that reads them."""
    for name in ("metrics.jsonl", "events.jsonl", "samples.jsonl", "wandb_run_id", "run.lock"):
        (run / name).write_bytes(line)
    out = tmp_path / "out"
    for words in (["slurm", "status"], ["wandb", "sync", "--dry-run"], ["export", f"output={out}", "--no-verify"]):
        assert main([*words, str(run)]) == 0, capsys.readouterr().err
    assert "Validation losses: not recorded" in (out / "README.md").read_text()
