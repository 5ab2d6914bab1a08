"""Speech to text through the doors: tones that stand for words."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
from doors import bigtx, losses, read_lines, same_weights
from finetunes import finetune, finetuned, kill_at, make_base, results, write_samples
from sounds import METHODS, RATE, SETTINGS, WORDS, sayings, spoken, tone, wav, write_manifest, write_tokenizer

from bigtx.utils.shell import setting


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def run_of(method: str, tokenizer: Path, data: Path, run_dir: Path, *changes: str) -> list[str]:
    return [
        *SETTINGS,
        *METHODS[method],
        f"tokenizer={tokenizer}",
        f"data.train={data}",
        "data.validation_fraction=0.2",
        f"run_dir={run_dir}",
        "train.max_steps=12",
        "train.checkpoint_every=4 steps",
        "validation.every=5 steps",
        *changes,
    ]


@pytest.mark.dist
@pytest.mark.parametrize(
    ("method", "stage"),
    [
        ("seq2seq", 3),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("seq2seq", 1), ("ctc", 1), ("ctc", 3))),
    ],
)
def test_two_ranks_lose_nothing_when_killed(tokenizer: Path, tmp_path: Path, method: str, stage: int) -> None:
    data = write_manifest(tmp_path / "data", 24)
    straight, run_dir = tmp_path / "straight", tmp_path / "run"
    changes = [f"engine.zero_stage={stage}", "transcribe.speed_change=0.1", "model.dropout=0.1"]
    finetuned(*run_of(method, tokenizer, data, straight, *changes), ranks=2)
    kill_at(run_dir, 6, *run_of(method, tokenizer, data, run_dir, *changes), ranks=2)
    finetuned(*run_of(method, tokenizer, data, run_dir, *changes), ranks=2)
    assert losses(run_dir) == losses(straight)
    same_weights(run_dir, straight)
    assert {"wer", "cer", "loss"} <= results(run_dir)["validation"].keys()


def test_records_that_cannot_be_used_are_told_by_file_and_line(tokenizer: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    manifest = write_manifest(folder, 8)
    for name, content in {"empty.wav": b"", "words.wav": b"no sound", "none.wav": wav(np.zeros(0, np.float32))}.items():
        (folder / name).write_bytes(content)
    bad = [
        {"audio": "empty.wav", "text": "low"},
        {"audio": "words.wav", "text": "low"},
        {"audio": "none.wav", "text": "low"},
        {"audio": "0.wav"},
        {"audio": "gone.wav", "text": "low"},
    ]
    manifest.write_text(manifest.read_text() + "".join(json.dumps(line) + "\n" for line in bad))
    done = finetune(*run_of("seq2seq", tokenizer, manifest, tmp_path / "run"))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    for line, reason in enumerate(
        [
            "an empty file",
            "not a recording that can be read",
            "without samples",
            "no field 'text'",
            "gone.wav cannot be",
        ],
        9,
    ):
        assert f"{manifest}, line {line}: " in done.stderr and reason in done.stderr, done.stderr


def test_settings_that_do_not_fit_are_told_at_once(tokenizer: Path, tmp_path: Path) -> None:
    data = write_manifest(tmp_path / "data", 2)
    for method, change, reason in (
        ("ctc", "model.shape=encoder_decoder", "is for model.shape=encoder, and it is encoder_decoder"),
        ("seq2seq", "model.audio.num_mel_bins=0", "task=transcribe needs an audio encoder"),
        ("seq2seq", "task=classify", "an audio encoder, which task=classify cannot use"),
        ("ctc", "transcribe.num_beams=4", "has no effect with transcribe.method=ctc"),
        ("ctc", "model.tie_embeddings=true", "has no table of tokens"),
        ("ctc", "model.audio.strides=[]", "at least one convolution"),
    ):
        done = finetune(*run_of(method, tokenizer, data, tmp_path / "run", change))
        assert done.returncode == 2 and reason in done.stderr and "Traceback" not in done.stderr, done.stderr


def archive_of(path: Path, count: int, seed: int) -> Path:
    return write_samples(path, [{"wav": sound, "txt": text} for sound, text in sayings(count, seed)])


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_it_learns_and_predicts_what_it_learned(tokenizer: Path, tmp_path: Path, method: str) -> None:
    """From an archive, through `bigtx evaluate` and `bigtx predict`, where a broken recording is one broken line."""
    run_dir, held_out = tmp_path / "run", archive_of(tmp_path / "test.tar", 30, seed=2)
    out = finetuned(
        *run_of(method, tokenizer, archive_of(tmp_path / "train.tar", 400, seed=1), run_dir, f"data.test={held_out}"),
        "train.max_steps=300",
        "train.global_batch_size=16",
        "train.micro_batch_size=16",
        "train.checkpoint_every=1000 steps",
        "validation.every=100 steps",
        "optimizer.name=muon",
        "transcribe.max_seconds=0.4",
    )
    assert "are longer than 0.4 s (transcribe.max_seconds)" in out and "were cut" in out
    assert results(run_dir)["test"]["wer"] < 0.3, results(run_dir)
    folder = tmp_path / "recordings"
    folder.mkdir()
    (folder / "1.wav").write_bytes(wav(spoken(["low", "top"], np.random.default_rng(5))))
    (folder / "2.wav").write_bytes(b"")
    (folder / "3.wav").write_bytes(wav(tone(WORDS["high"])))
    done = bigtx("predict", str(run_dir), "--input", str(folder))
    assert done.returncode == 1, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines[0]["prediction"]["text"] == "low top" and lines[2]["prediction"]["text"] == "high"
    assert "an empty file" in lines[1]["error"]
    done = bigtx("evaluate", str(run_dir), "--data", str(held_out), "--output", str(tmp_path / "evaluation.json"))
    assert done.returncode == 0, done.stderr
    refused = bigtx("generate", str(run_dir), "--prompt", "low")
    assert refused.returncode == 2 and "transcribes recordings" in refused.stderr


@pytest.mark.slow
def test_it_starts_from_a_decoder_that_knows_texts(corpus: Path, tmp_path: Path) -> None:
    base = make_base(corpus, tmp_path / "base")
    run_dir = tmp_path / "run"
    model = ["model.shape=encoder_decoder", "model.num_decoder_layers=2", "model.num_layers=1"]
    out = finetuned(
        f"base={base}",
        "task=transcribe",
        *model,
        "model.audio.num_mel_bins=16",
        "model.audio.sample_rate=8000",
        f"data.train={write_manifest(tmp_path / 'data', 12)}",
        f"run_dir={run_dir}",
        "train.max_steps=2",
    )
    assert "parameters loaded" in out and "dropped: none" in out
    facts = json.loads((run_dir / "base.json").read_text())
    assert {"embedding.weight", "decoder.blocks.1.mlp.up.weight", "head.weight"} <= set(facts["loaded"])
    assert all(name.startswith(("audio.", "encoder.")) or ".cross_attention" in name for name in facts["new"])
    assert not facts["dropped"]


@pytest.mark.slow
def test_spoken_digits_are_learned(test_data: Path, tmp_path: Path) -> None:
    """A few minutes of the recipe on real recordings: far from its end, and far better than a guess."""
    import subprocess
    import sys

    from doors import ROOT

    archive = test_data / "speech_digits" / "recordings.tar.xz"
    if not archive.is_file():
        pytest.skip(f"no recordings at {archive}")
    with tarfile.open(archive) as file:
        file.extractall(tmp_path / "all", filter="data")
    folder = next((tmp_path / "all").rglob("*.wav")).parent
    digits = tmp_path / "digits"
    tool = [sys.executable, str(ROOT / "tools" / "recipes" / "spoken_digits.py"), str(folder), str(digits)]
    subprocess.run(tool, check=True)
    done = bigtx(
        "tokenizer",
        "train",
        f"input.paths=[{digits}/train_strings.jsonl]",
        "vocab_size=448",
        f"output={digits}/tokenizer",
    )
    assert done.returncode == 0, done.stderr
    run_dir = tmp_path / "run"
    finetuned(
        str(ROOT / "configs" / "finetune" / "spoken-digits.yaml"),
        f"tokenizer={digits}/tokenizer",
        f"data.train={digits}/train.jsonl",
        f"data.validation={digits}/validation.jsonl",
        f"data.test={digits}/test.jsonl",
        f"run_dir={run_dir}",
        "train.global_batch_size=32",
        "train.micro_batch_size=32",
        "engine.precision=bf16",
        "train.epochs=6",
    )
    assert results(run_dir)["test"]["wer"] < 0.2, results(run_dir)


def flac(sound: np.ndarray) -> bytes:
    content = io.BytesIO()
    soundfile.write(content, sound, RATE, format="FLAC")
    return content.getvalue()


def test_what_is_broken_inside_is_met_before_the_first_step(tokenizer: Path, tmp_path: Path) -> None:
    """A recording whose header is good, and whose samples end early; two ranks each decode a half."""
    folder, run_dir = tmp_path / "data", tmp_path / "run"
    manifest = write_manifest(folder, 24)
    noise = np.random.default_rng(1).standard_normal(4000).astype(np.float32) / 8
    (folder / "cut.flac").write_bytes(flac(noise)[:3000])
    manifest.write_text(manifest.read_text() + json.dumps({"audio": "cut.flac", "text": "low"}) + "\n")
    arguments = run_of("ctc", tokenizer, manifest, run_dir, "data.split=tail")
    done = finetune(*arguments, ranks=2)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert f"{manifest}, line 25: cut.flac: not a recording that can be read" in done.stderr
    assert not (run_dir / "checkpoints").exists() and len((run_dir / "recordings.jsonl").read_text().splitlines()) == 24


@pytest.mark.slow
def test_what_is_lost_while_a_run_rests_is_left_out_by_name(tokenizer: Path, tmp_path: Path) -> None:
    folder, run_dir = tmp_path / "data", tmp_path / "run"
    manifest = write_manifest(folder, 24)
    arguments = run_of("ctc", tokenizer, manifest, run_dir, "data.split=tail")
    finetuned(*arguments, "train.max_steps=4")
    (folder / "3.wav").unlink()
    (folder / "5.wav").write_bytes((folder / "5.wav").read_bytes()[:700])
    on = [*arguments, "allow_changes=[train.max_steps,data.leave_out]"]
    done = finetune(*on)
    assert done.returncode == 2 and "line 4: the recording" in done.stderr and "cut short" in done.stderr, done.stderr
    names = [f"{manifest}, line {line}" for line in (4, 6)]
    assert setting("data.leave_out", names) in done.stderr
    out = finetuned(*on, f"data.leave_out={json.dumps(names)}", ranks=2)
    assert f"left out (data.leave_out): {'; '.join(names)}" in out
    manifests = [json.loads(path.read_text()) for path in sorted((run_dir / "checkpoints").glob("*/manifest.json"))]
    assert manifests[-1]["left_out"] == names and manifests[-1]["data"] == manifests[0]["data"]
    [event] = [line for line in read_lines(run_dir / "events.jsonl") if line.get("key") == "data.leave_out"]
    assert event["new"] == names and event["step"] == 4
    assert sorted(losses(run_dir)) == list(range(1, 13))
    done = bigtx("evaluate", str(run_dir), "--split", "validation")
    assert done.returncode == 0, done.stderr
    done = bigtx("evaluate", str(run_dir), "--data", str(manifest))
    assert done.returncode == 1 and "error: 2 records cannot be used" in done.stderr and "22 records" in done.stdout
    done = bigtx("predict", str(run_dir), "--input", str(manifest))
    assert done.returncode == 1 and ["error" in json.loads(line) for line in done.stdout.splitlines()].count(True) == 2
