"""Which folder may be a run's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bigtx.config.schema import DistillConfig, FinetuneConfig, PretrainConfig, SourceConfig
from bigtx.engine.checkpoint import write_manifest
from bigtx.train.run_folder import HISTORY, MARK, WRITTEN, _refuse_other_files, check_run_dir, open_run_folder
from bigtx.utils.errors import BigtxError, CheckpointError, ConfigError, LaunchError
from bigtx.utils.files import write_json

ENVIRONMENT: dict[str, Any] = {"packages": {"bigtx": "0.1.0"}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "run"
    made.mkdir()
    return made


def make_run(folder: Path) -> None:
    """What a life that saved nothing leaves behind."""
    write_json(folder / "environment.json", ENVIRONMENT)
    (folder / "config.yaml").write_text("run_dir: x\n")
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')


def test_a_folder_that_is_new_empty_or_has_other_files(folder: Path) -> None:
    check_run_dir(PretrainConfig(run_dir=str(folder / "new")))
    check_run_dir(PretrainConfig(run_dir=str(folder)))
    for name in ("notes.md", "slurm-17.out", "logs/slurm-17.out", "data/a.txt", "checkpoints/.keep"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine")
    check_run_dir(PretrainConfig(run_dir=str(folder)))


@pytest.mark.parametrize("below", ["", "run", "a/b"])
def test_a_folder_below_a_file_cannot_be_made(tmp_path: Path, below: str) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(LaunchError, match=f"{tmp_path}/notes.txt is not a folder; name another"):
        check_run_dir(PretrainConfig(run_dir=str(tmp_path / "notes.txt" / below)))


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("bigtx_tokenizer.json", "{}", "a tokenizer"),
        ("train/manifest.json", '{"format": "bigtx-blocks"}', "a prepared corpus"),
        ("validation/manifest.json", '{"format": "bigtx-blocks"}', "a prepared corpus"),
        ("config.json", '{"model_type": "gpt2"}', "a model in Hugging Face's format"),
        ("adapter_config.json", '{"peft_type": "LORA"}', "adapters in PEFT's format"),
    ],
)
def test_something_else_of_bigtx_is_named(folder: Path, name: str, content: str, kind: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(content)
    with pytest.raises(ConfigError, match=kind):
        check_run_dir(PretrainConfig(run_dir=str(folder)))


def test_a_corpus_that_is_being_made_and_a_part_of_one_are_no_run_dir(folder: Path, tmp_path: Path) -> None:
    for name, content in (("manifest.json", '{"format": "bigtx-blocks"}'), ("blocks.npy", "")):
        (folder / name).write_text(content)
    with pytest.raises(ConfigError, match="a part of a corpus"):
        check_run_dir(PretrainConfig(run_dir=str(folder)))
    partial = tmp_path / "corpus.partial"
    (partial / "work").mkdir(parents=True)
    with pytest.raises(ConfigError, match="a corpus in preparation"):
        check_run_dir(PretrainConfig(run_dir=str(partial)))
    (partial / "work").rmdir()
    check_run_dir(PretrainConfig(run_dir=str(partial)))


def test_a_checkpoint_is_no_run_dir(folder: Path) -> None:
    write_manifest(folder, {"format": 1, "parameters": {}, "files": {}})
    with pytest.raises(ConfigError, match="a checkpoint"):
        check_run_dir(PretrainConfig(run_dir=str(folder)))


@pytest.mark.parametrize("name", WRITTEN)
def test_a_file_that_a_run_would_write_over_is_named(folder: Path, name: str) -> None:
    (folder / name).write_text("mine")
    with pytest.raises(ConfigError, match=f"holds {name}, which no run wrote"):
        check_run_dir(PretrainConfig(run_dir=str(folder)))
    write_json(folder / "environment.json", ENVIRONMENT)
    if name != "metrics.jsonl":
        check_run_dir(PretrainConfig(run_dir=str(folder)))


def test_the_own_config_that_the_command_names_is_kept(folder: Path) -> None:
    own, config = folder / "config.yaml", PretrainConfig(run_dir=str(folder))
    own.write_text("train:\n  max_steps: 1\n")
    (other := folder.with_name("other.yaml")).write_text("")
    with pytest.raises(ConfigError, match="name it in the command"):
        check_run_dir(config, [other])
    files = [folder / ".." / "run" / "config.yaml"]
    (folder / "config.given.yaml").write_text("another")
    with pytest.raises(ConfigError, match=r"config\.given\.yaml"):
        check_run_dir(config, files)
    (folder / "config.given.yaml").unlink()
    check_run_dir(config, files)
    open_run_folder(config, files=files, environment=ENVIRONMENT).lock.release()
    assert (folder / "config.given.yaml").read_bytes() == own.read_bytes()
    # The life ended before it wrote its own; the next one, by whatever config, may.
    check_run_dir(config)


def inputs(folder: Path) -> dict[str, Any]:
    name, checkpoint = str(folder), str(folder / "checkpoints" / "step-00000001")
    distill, records = DistillConfig(teacher=checkpoint), FinetuneConfig(run_dir=name, base="elsewhere")
    records.data.train = ["elsewhere.jsonl", name]
    return {
        "init_from": PretrainConfig(run_dir=name, init_from=name),
        "distill.teacher": PretrainConfig(run_dir=name, distill=distill),
        "base": FinetuneConfig(run_dir=name, base=checkpoint),
        "tokenizer": FinetuneConfig(run_dir=name, tokenizer=f"{name}/."),
        "data.train": records,
    }


@pytest.mark.parametrize("key", ["init_from", "distill.teacher", "base", "tokenizer", "data.train"])
def test_an_input_is_no_run_dir(folder: Path, key: str) -> None:
    make_run(folder)
    (folder / "checkpoints" / "step-00000001").mkdir(parents=True)
    with pytest.raises(ConfigError, match=f"named by {key}"):
        check_run_dir(inputs(folder)[key])


def test_a_corpus_is_no_run_dir(folder: Path) -> None:
    config = PretrainConfig(run_dir=str(folder))
    config.validation.sources = {"a": SourceConfig(path=str(folder / ".." / "run"))}
    with pytest.raises(ConfigError, match=r"named by validation\.sources\.a\.path"):
        check_run_dir(config)


@pytest.mark.parametrize("state", ["missing", "empty", "a dangling link", "a file"])
@pytest.mark.parametrize("is_meant", [False, True])
def test_a_run_without_its_checkpoints(folder: Path, state: str, is_meant: bool) -> None:
    make_run(folder)
    checkpoints = folder / "checkpoints"
    if state == "empty":
        checkpoints.mkdir()
    elif state == "a dangling link":
        checkpoints.symlink_to(folder / "unmounted")
    elif state == "a file":
        checkpoints.write_text("")
    config = PretrainConfig(run_dir=str(folder), allow_changes=["checkpoints"] if is_meant else [])
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    if is_meant and state in ("missing", "empty"):
        check_run_dir(config)
    else:
        expected = {"a dangling link": "unmounted, which is missing", "a file": "is not a folder"}
        with pytest.raises(CheckpointError, match=expected.get(state, r"allow_changes=\[checkpoints\]")):
            check_run_dir(config)
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_a_run_that_had_saved_nothing_goes_on_by_itself(folder: Path) -> None:
    make_run(folder)
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / MARK).write_text("")
    config = PretrainConfig(run_dir=str(folder))
    check_run_dir(config)
    opened = open_run_folder(config, files=[], environment=ENVIRONMENT)
    opened.lock.release()
    assert opened.aside is None and (folder / "metrics.jsonl").read_text()


def test_a_history_is_kept_where_a_run_begins_again(folder: Path) -> None:
    config = PretrainConfig(run_dir=str(folder), allow_changes=["checkpoints"])
    for number in (1, 2):
        make_run(folder)
        for name in HISTORY:
            (folder / name).write_text(f"{name} {number}")
        opened = open_run_folder(config, files=[], environment=ENVIRONMENT)
        opened.lock.release()
        assert opened.aside == folder / f"history-{number}"
        assert {name: (opened.aside / name).read_text() for name in HISTORY} == {
            name: f"{name} {number}" for name in HISTORY
        }
        assert (opened.aside / "config.yaml").is_file() and not (folder / "metrics.jsonl").exists()


DAMAGED = [
    "",
    "\0" * 100,
    "[1, 2]",
    "text",
    "model: 5",
    "a: !!python/object/apply:os.system [id]",
    "model: {num_la",
    "[" * 9999,
    "train: 5",
    "train: {log_every: [1]}",
    "data: {sources: [1]}",
    "data: {sources: {a: 1}}",
]


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_config_is_one_paragraph(folder: Path, content: str) -> None:
    make_run(folder)
    (folder / "checkpoints" / "step-00000001").mkdir(parents=True)
    (folder / "config.yaml").write_text(content)
    config = PretrainConfig(run_dir=str(folder))
    with pytest.raises(BigtxError, match=r"config.yaml|other settings") as raised:
        open_run_folder(config, files=[], environment=ENVIRONMENT)
    assert "Traceback" not in str(raised.value) and not (folder / "run.lock").exists()


def test_json_that_is_no_environment_makes_no_run(folder: Path) -> None:
    for content in ("", "[]", "\0", json.dumps({"packages": 3})):
        (folder / "environment.json").write_text(content)
        with pytest.raises(ConfigError, match=r"environment.json, which no run wrote"):
            check_run_dir(PretrainConfig(run_dir=str(folder)))


def test_a_link_to_nowhere_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "deepspeed.json").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"deepspeed\.json"):
        _refuse_other_files(tmp_path, is_given=False)
