"""Mistakes at the front door: each is one paragraph that says what is wrong, where, and what to write.

All of the table are given in one process, which shows that neither torch nor a rank is needed to answer them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from doors import ROOT, TINY, Mount, bigtx, environment, last_step, start_pretrain, wait_for
from finetunes import RHYTHM, labelled, write_jsonl

from bigtx.engine.checkpoint import Checkpoint
from bigtx.utils.locks import FolderLock

PROGRAM = Path(__file__).with_name("mistaken.py")
CORPUS = "data.sources.a.path=corpus"
LAUNCHED = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}


@dataclass(frozen=True)
class Mistake:
    """A command, and what it answers.

    Attributes:
        words: of the command line.
        expected: words of the answer.
        folder: where the command is given.
        environment: variables that are set for it.
    """

    words: tuple[str, ...]
    expected: tuple[str, ...]
    status: int = 2
    folder: str = "."
    environment: dict[str, str] = field(default_factory=dict)


def pretraining(*words: str, says: str | tuple[str, ...], corpus: str = CORPUS, **others: Any) -> Mistake:
    """A mistake of `bigtx pretrain` among settings that are right."""
    settings = [*TINY, "train.max_steps=2", "run_dir=new", *([corpus] if corpus else [])]
    return Mistake(("pretrain", *settings, *words), (says,) if isinstance(says, str) else says, **others)


def finetuning(*words: str, says: str | tuple[str, ...], base: str = "base", **others: Any) -> Mistake:
    """A mistake of `bigtx finetune` among settings that are right."""
    settings = [*RHYTHM, "train.max_steps=2", "run_dir=new", "task=classify", f"base={base}"]
    if not any(word.startswith("data.train=") for word in words):
        settings.append("data.train=records.jsonl")
    return Mistake(("finetune", *settings, *words), (says,) if isinstance(says, str) else says, **others)


def preparing(*words: str, says: str) -> Mistake:
    """A mistake of `bigtx data prepare` among settings that are right."""
    settings = ("input.paths=texts", "tokenizer=base/tokenizer", "output=new")
    return Mistake(("data", "prepare", *settings, *words), (says,))


def both(name: str, *words: str, says: str | tuple[str, ...], **others: Any) -> dict[str, Mistake]:
    """The same mistake through both commands."""
    return {
        f"{name}, pretrain": pretraining(*words, says=says, **others),
        f"{name}, finetune": finetuning(*words, says=says, **others),
    }


def corpus(path: str, *says: str) -> Mistake:
    """A mistake in the path of a corpus."""
    return pretraining(corpus=f"data.sources.a.path={path}", says=says)


def resumed(*words: str, says: str | tuple[str, ...]) -> Mistake:
    """A mistake in resuming `base`."""
    return Mistake(("pretrain", "base", *words), (says,) if isinstance(says, str) else says)


MISTAKES: dict[str, Mistake] = {
    # Words.
    **both("a typo in a section", "optimiser.learning_rate=1", says="did you mean optimizer?"),
    **both("a typo in a key", "optimizer.lerning_rate=1", says="did you mean optimizer.learning_rate"),
    **both("a typo in a value", "optimizer.name=adamww", says=("optimizer.name=adamww", "did you mean adamw?")),
    "a typo in a pretraining recipe": pretraining("pretrain/smal.yaml", says="did you mean pretrain/small.yaml?"),
    "a typo in a fine-tuning recipe": finetuning("finetune/imbd.yaml", says="did you mean finetune/imdb.yaml?"),
    **both("a file that is missing", "mine.yaml", says=("no file 'mine.yaml'", "`bigtx configs list`")),
    **both("a folder in place of a file", "texts", says=("'texts' is a folder, not a YAML file", "=texts?")),
    **both("an option", "--learning-rate", "3", says="written KEY=VALUE: optimizer.learning_rate=3"),
    **both("an option with =", "--train.max_steps=3", says="written KEY=VALUE: train.max_steps=3"),
    **both("spaces around =", "train.max_steps", "=", "3", says="train.max_steps=VALUE, without spaces"),
    **both(
        "a list that the shell divided", "allow_changes=[seed,", "seed]", says="quote it: 'allow_changes=[seed, seed]'"
    ),
    **both("the ranks in other words", "--gpus", "2", says="did you mean --ranks N?"),
    **both("to resume in other words", "--resume", "base", says="name its folder alone"),
    **both("a file with an option", "--config", "mine.yaml", says="name the file alone"),
    **both("a decimal comma", "optimizer.learning_rate=0,001", says="in digits, e.g. 0.001"),
    **both(
        "a length below 0", "train.max_steps=-1", says="train.max_steps=-1 (command line): is too small: it is below 0"
    ),
    **both("no unit", "train.checkpoint_every=500", says="has no unit; write a duration such as 500 steps"),
    **both("a switch as a mode", "track.wandb=true", says="is not one of auto, online, offline, off"),
    "a share in percent": preparing("validation_fraction=5%", says="in digits, e.g. 0.05"),
    "a share that is too large": preparing("validation_fraction=5", says="the most is 0.5"),
    "settings as options": Mistake(
        ("data", "prepare", "--input", "texts", "--tokenizer", "base/tokenizer", "--output", "new"),
        ("KEY=VALUE: input.paths=texts", "KEY=VALUE: tokenizer=base/tokenizer", "KEY=VALUE: output=new"),
    ),
    "a corpus as an option": pretraining("--data", "corpus", says="KEY=VALUE: data.sources.mine.path=corpus"),
    "a recipe of fine-tuning": Mistake(
        ("pretrain", "finetune/chat.yaml", "base=base", "data.train=records.jsonl", "run_dir=new"),
        ("did you mean bigtx finetune finetune/chat.yaml?",),
    ),
    "a recipe of pretraining": Mistake(
        ("finetune", "pretrain/small.yaml", CORPUS, "run_dir=new"),
        ("did you mean bigtx pretrain pretrain/small.yaml?",),
    ),
    "a recipe that is misspelt": Mistake(("configs", "show", "pretrian/small.yaml"), ("did you mean pretrain/small",)),
    "a command that is misspelt": Mistake(("data", "inspct", "corpus"), ("did you mean bigtx data inspect?",)),
    "a prompt without its name": Mistake(("generate", "base", "Once upon"), ("one word too many", "e.g. prompt=TEXT")),
    "a GPU as a device": Mistake(
        ("generate", "base", "prompt=x", "device=gpu"), ("device=gpu: is not a device", "auto, cpu, cuda")
    ),
    **both("a secret", "track.project=hf_" + "a1B2" * 9, says="secret"),
    "train": Mistake(("train", CORPUS), ("no command 'train'", "`bigtx pretrain` trains a model", "`bigtx finetune`")),
    "fine-tune": Mistake(("fine-tune",), ("did you mean bigtx finetune?",)),
    "plot": Mistake(("plot", "base"), ("there are no plots here", "RUN/metrics.jsonl")),
    # Data.
    "texts as a corpus": corpus("texts", "is not a prepared corpus", "bigtx data prepare input.paths=texts"),
    "a split as a corpus": corpus("corpus/train", "one split", "write data.sources.a.path=corpus"),
    "a run as a corpus": corpus("base", "is a run, not a prepared corpus", "`bigtx data prepare`"),
    "a tokenizer as a corpus": corpus("base/tokenizer", "is a tokenizer, not a prepared corpus"),
    "an empty folder as a corpus": corpus("empty", "is empty, not a prepared corpus"),
    "a corpus that is missing": corpus("nowhere", "no such folder", "`bigtx data prepare`"),
    "a corpus without tokenizer": corpus("untold", "untold/tokenizer is missing", "copy it there again"),
    "no corpus": pretraining(corpus="", says="name a prepared corpus, e.g. data.sources.mine.path="),
    "texts as held-out text": pretraining("validation.sources.b.path=texts", says="validation.sources.b.path=texts"),
    "too small a vocabulary": pretraining("model.vocab_size=300", says="write model.vocab_size=null"),
    "a corpus to begin with": pretraining("init_from=corpus", says=("init_from=corpus", "it is a prepared corpus")),
    "an empty run to begin with": pretraining("init_from=unsaved", says="unsaved has no complete checkpoint"),
    **both("a corpus as a teacher", "distill.teacher=corpus", says=("distill.teacher=corpus", "prepared corpus")),
    "a corpus as a base": finetuning(base="corpus", says=("base=corpus", "is not a run: it is a prepared corpus")),
    "an empty folder as a base": finetuning(base="empty", says=("base=empty", "is not a run")),
    "a base that is missing": finetuning(base="nowhere", says=("base=nowhere", "name a run")),
    "a base without a checkpoint": finetuning(base="unsaved", says="unsaved has no complete checkpoint"),
    "a base without tokenizer": finetuning(base="untrained", says="untrained/tokenizer is missing"),
    "records without labels": finetuning(
        "data.train=unlabelled.jsonl", says=("unlabelled.jsonl, line 1: no field 'label'", "see data.fields.label")
    ),
    "texts without labels": finetuning("data.train=texts", says=("texts/0.txt: no field 'label'",)),
    "a home folder": corpus("~/corpus", f"data.sources.a.path={Path.home() / 'corpus'}"),
    "the checkpoints of a run as a base": finetuning(base="base/checkpoints", says="did you mean base?"),
    "a folder of runs as a base": finetuning(base="shelf", says="did you mean shelf/base?"),
    "a folder of runs": Mistake(("pretrain", "shelf"), ("'shelf' is not a run; did you mean shelf/base?",)),
    "RUN@STEP as a run": Mistake(("generate", "stepped@7", "prompt=x"), ("mean stepped/checkpoints/step-00000007?",)),
    "a folder that is no run, to W&B": Mistake(("wandb", "sync", "texts"), ("texts is not a run", "name the run_dir")),
    "a model that is missing": Mistake(("import", "nowhere", "output=new"), ("nowhere is not a folder",)),
    "an export into a folder in use": Mistake(("export", "base", "output=texts"), ("texts exists already",)),
    "columns with other names": finetuning("data.train=named.csv", says=("no field 'text'", "review, sentiment")),
    "columns between semicolons": finetuning("data.train=divided.csv", says="it seems to have ';' between its columns"),
    "records of another task": finetuning("task=sft", says=("no field 'prompt'", "see data.fields.prompt")),
    "records that are missing": finetuning("data.train=nowhere", says="data.train=nowhere"),
    "an empty folder of records": finetuning("data.train=empty", says="empty has no records"),
    "an empty file of records": finetuning("data.train=empty.jsonl", says="empty.jsonl: empty"),
    "a corpus as records": finetuning("data.train=corpus", says="corpus is a prepared corpus"),
    "records of an unknown kind": finetuning("data.train=notes", says="the format of notes is not known"),
    **{
        f"a name that no file can have, {command}": Mistake((*command.split(), "a" * 300, *words), ("is too long",))
        for command, words in (
            ("predict", ["input=" + "b" * 300]),
            ("import", ["output=new"]),
            ("data inspect", []),
            ("data verify", []),
            ("data stats", []),
            ("tokenizer inspect", ["text=a"]),
            ("wandb sync", []),
        )
    },
    # The run folder.
    **both("no run_dir", "run_dir=", says="e.g. run_dir=runs/first"),
    **both("a file as run_dir", "run_dir=notes", says=("run_dir=notes", "name another folder")),
    **both("a run_dir under a file", "run_dir=notes/run", says=("run_dir=notes/run", "name another folder")),
    **both("the base as run_dir", "run_dir=corpus", says=("run_dir=corpus", "name another")),
    **both("a run_dir in use", "run_dir=held", says=("held is in use by process", "wait for it, stop it, or use")),
    "a run of another kind": finetuning(
        "run_dir=shelf/base", says=("holds another run, a pretraining", "another fold")
    ),
    "another batch size": resumed("train.global_batch_size=16", says=("train.global_batch_size: 8 -> 16", "run_dir")),
    "another model": resumed("model.num_layers=3", says=("model.num_layers: 2 -> 3", "init_from=THIS_RUN")),
    "another seed": resumed("seed=7", says=("seed: ", "cannot change within one run")),
    "a corpus that was moved away": resumed("data.sources.a.path=nowhere", says="no such folder"),
    "another folder": pretraining(says="data.sources.a.path=corpus", folder="empty"),
    "another kind of run": Mistake(("finetune", "base"), ("is a pretrained run", "bigtx pretrain base")),
    # The start.
    **both("ranks that do not divide the batch", "--ranks", "3", says=("train.global_batch_size=8", "3 ranks")),
    **both("no ranks", "--ranks", "0", says="e.g. --ranks 2"),
    **both("RANK alone", says=("RANK=0", "not WORLD_SIZE", "unset RANK"), environment={"RANK": "0"}),
    **both(
        "ranks of two launchers", "--ranks", "2", says="leave --ranks out", environment=LAUNCHED | {"MASTER_PORT": "9"}
    ),
}


@pytest.fixture(scope="module")
def desk(corpus: Path, decoder_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the commands name."""
    folder = tmp_path_factory.mktemp("desk")
    shutil.copytree(corpus, folder / "corpus")
    shutil.copytree(corpus, folder / "untold", ignore=shutil.ignore_patterns("tokenizer"))
    shutil.copytree(decoder_base, folder / "base")
    shutil.copytree(decoder_base, folder / "untrained", ignore=shutil.ignore_patterns("tokenizer"))
    shutil.copytree(decoder_base, folder / "unsaved", ignore=shutil.ignore_patterns("step-*"))
    write_jsonl(folder / "records.jsonl", labelled(32))
    write_jsonl(folder / "unlabelled.jsonl", [{"text": record["text"]} for record in labelled(32)])
    for name in ("empty", "texts", "held"):
        (folder / name).mkdir()
    for number in range(3):
        (folder / "texts" / f"{number}.txt").write_text("no label here")
    shutil.copytree(decoder_base, folder / "shelf" / "base")
    (folder / "stepped" / "checkpoints" / "step-00000007").mkdir(parents=True)
    (folder / "named.csv").write_text("review,sentiment\ngood,pos\nbad,neg\n")
    (folder / "divided.csv").write_text("text;label\ngood;pos\nbad;neg\n")
    (folder / "notes").write_text("no folder")
    (folder / "empty.jsonl").touch()
    return folder


@pytest.fixture(scope="module")
def answers(desk: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, dict[str, Any]]]:
    """What the commands did, by the name of the mistake."""
    folder = tmp_path_factory.mktemp("answers")
    given, report = folder / "given.json", folder / "report.json"
    cases = [
        {"words": each.words, "folder": each.folder, "environment": each.environment} for each in MISTAKES.values()
    ]
    given.write_text(json.dumps(cases))
    with FolderLock(desk / "held"):
        # Not a fork, which would have imported torch: the program notes what each command imports.
        done = subprocess.run(
            [sys.executable, str(PROGRAM), str(given), str(report)],
            cwd=desk,
            capture_output=True,
            text=True,
            timeout=300,
            env=environment(PYTHONPATH=str(ROOT)),
        )
    assert done.returncode == 0, done.stdout + done.stderr
    yield dict(zip(MISTAKES, json.loads(report.read_text()), strict=True))


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_answered_by_one_paragraph(name: str, answers: dict[str, dict[str, Any]]) -> None:
    mistake, answer = MISTAKES[name], answers[name]
    said = answer["err"]
    assert (answer["status"], answer["out"]) == (mistake.status, ""), said
    assert answer["written"] == [] and answer["heavy"] == []
    assert re.match(r"(Config|Data|Checkpoint|Launch)Error: ", said) and "\n\n" not in said, said
    assert not re.search("Traceback|Error:.*Error: ", said, re.DOTALL), said
    for words in mistake.expected:
        assert words in said, said


# What is found while the ranks start or train.


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that somebody else listens on."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


@pytest.mark.dist
def test_a_port_that_is_taken(desk: Path, tmp_path: Path, taken: int) -> None:
    words = pretraining(corpus=f"data.sources.a.path={desk / 'corpus'}", says="").words
    done = bigtx(*words, cwd=tmp_path, **LAUNCHED, MASTER_PORT=str(taken))
    assert done.returncode == 2, done.stdout + done.stderr
    assert re.fullmatch(
        r"LaunchError: the ranks cannot meet at 127.0.0.1:\d+: .*master_port 29501 \.\.\.\n", done.stderr
    )
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["logs"]


@pytest.mark.dist
def test_a_disk_that_is_full(desk: Path, tmp_path: Path, mount: Mount) -> None:
    run_dir = tmp_path / "run"
    mount(run_dir, "size=1m")  # A checkpoint takes 2 MB.
    words = pretraining(corpus=f"data.sources.a.path={desk / 'corpus'}", says="").words
    done = bigtx(*words, f"run_dir={run_dir}", "--ranks", "1")
    assert done.returncode == 2, done.stdout + done.stderr
    assert re.fullmatch(r"CheckpointError: [^\n]*a checkpoint needs [^\n]* free[^\n]*\n", done.stderr), done.stderr
    assert str(run_dir) in done.stderr and not list((run_dir / "checkpoints").glob("step-*[0-9]"))


@pytest.mark.dist
def test_ctrl_c_in_a_validation_and_in_a_save_of_two_runs_beside_each_other(corpus: Path, tmp_path: Path) -> None:
    given = [*TINY, f"data.sources.a.path={corpus}", "track.wandb=off", "train.max_steps=100000"]
    validating = [f"run_dir={tmp_path / 'validating'}", "validation.every=1 steps", "validation.max_sequences=400"]
    saving = [f"run_dir={tmp_path / 'saving'}", "train.checkpoint_every=1 steps", "model.hidden_size=192"]
    first = start_pretrain(*given, *validating, ranks=1)
    second = start_pretrain(*given, *saving, ranks=1)
    try:
        wait_for(lambda: last_step(tmp_path / "validating") >= 1, first)  # The validation comes after the line.
        os.killpg(first.pid, signal.SIGINT)
        wait_for(lambda: any((tmp_path / "saving" / "checkpoints").glob("*.partial")), second)
        os.killpg(second.pid, signal.SIGINT)
        for process, run_dir in ((first, tmp_path / "validating"), (second, tmp_path / "saving")):
            out, err = process.communicate(timeout=120)
            assert (process.returncode, err) == (130, ""), out + err
            assert out.count("stopping: ") == out.count("stopped at step ") == 1, out
            saved = max((run_dir / "checkpoints").glob("step-*"))
            assert saved.name == f"step-{last_step(run_dir):08d}" and Checkpoint(saved).verify() == []
    finally:
        for process in (first, second):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
