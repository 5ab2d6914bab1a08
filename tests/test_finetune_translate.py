"""Translation through the door of fine-tuning: learned, resumed, predicted, and refused where pairs are broken."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import forks
import pytest
from doors import ROOT, bigtx, environment, losses, read_lines, same_weights
from finetunes import WORDS, finetune, finetune_command, finetuned, kill_at, make_base, results, write_table

DICTIONARY = dict(zip(WORDS[:10], WORDS[20:30], strict=True))
MODEL = [
    "model.shape=encoder_decoder",
    "model.hidden_size=64",
    "model.num_layers=1",
    "model.num_heads=2",
    "model.max_sequence_length=32",
    "model.dropout=0.1",
]


def pairs(count: int, *, seed: int = 1) -> list[dict[str, Any]]:
    """Words and their translations, in the opposite order."""
    generator, records = random.Random(seed), []
    for _ in range(count):
        words = generator.choices(list(DICTIONARY), k=generator.randrange(1, 5))
        records.append({"source": " ".join(words), "target": " ".join(DICTIONARY[word] for word in reversed(words))})
    return records


def write_sides(folder: Path, records: list[dict[str, Any]]) -> str:
    """Two text files side by side."""
    for side, name in (("xx", "source"), ("yy", "target")):
        lines = "".join(record[name] + "\n" for record in records)
        (folder / f"pairs.{side}.gz").write_bytes(gzip.compress(lines.encode()))
    return f"{folder}/pairs.{{xx,yy}}.gz"


def run_of(corpus: Path, sides: str, run_dir: Path, *changes: str) -> list[str]:
    return [
        "task=translate",
        f"tokenizer={corpus.parent / 'tokenizer'}",
        *MODEL,
        f"data.train=['{sides}']",
        "data.test_fraction=0.1",
        "validation.max_records=6",
        "train.max_steps=12",
        "train.checkpoint_every=5 steps",
        f"run_dir={run_dir}",
        *changes,
    ]


@pytest.mark.dist
def test_two_ranks_learn_and_a_killed_run_loses_nothing(corpus: Path, tmp_path: Path) -> None:
    sides, straight, run_dir = write_sides(tmp_path, pairs(100)), tmp_path / "straight", tmp_path / "run"
    stage = "engine.zero_stage=1"
    said = finetuned(*run_of(corpus, sides, straight, stage), ranks=2)
    assert "validation at step 12: bleu " in said
    found = losses(straight)
    assert found[12] < found[1]
    kill_at(run_dir, random.randrange(6, 11), *run_of(corpus, sides, run_dir, stage), ranks=2)
    finetuned(*run_of(corpus, sides, run_dir, stage), ranks=2)
    assert losses(run_dir) == found
    same_weights(run_dir, straight)
    for name in ("validation", "test"):
        assert {"bleu", "chrf", "loss", "records"} <= results(run_dir)[name].keys()
    assert results(run_dir) == results(straight)


@pytest.mark.slow
@pytest.mark.dist
def test_sharded_weights_learn_and_write_the_same(corpus: Path, tmp_path: Path) -> None:
    sides = write_sides(tmp_path, pairs(100))
    for stage in (1, 3):
        finetuned(*run_of(corpus, sides, tmp_path / str(stage), f"engine.zero_stage={stage}"), ranks=2)
    assert losses(tmp_path / "3") == pytest.approx(losses(tmp_path / "1"), rel=1e-3)
    found = [results(tmp_path / stage)["validation"] for stage in ("1", "3")]
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-3)
    assert found[0]["chrf"] == pytest.approx(found[1]["chrf"], abs=1.0)


def test_a_decoder_from_a_base_and_its_predictions(corpus: Path, tmp_path: Path) -> None:
    base, run_dir = make_base(corpus, tmp_path / "base"), tmp_path / "run"
    records = [{"de": record["source"], "en": record["target"]} for record in pairs(60)]
    table = write_table(tmp_path / "pairs.tsv", records)
    said = finetuned(
        "task=translate",
        f"base={base}",
        f"data.train=[{table}]",
        "data.fields.source=de",
        "data.fields.target=en",
        "data.max_length=10",
        "translate.prefix='de en: '",
        "translate.num_beams=2",
        "train.max_steps=6",
        "validation.max_records=4",
        f"run_dir={run_dir}",
    )
    assert "are longer than 10 tokens of a side (data.max_length) and were cut" in said
    shown = read_lines(run_dir / "predictions.jsonl")[-1]
    assert shown["answer"] and "translation" in shown and "score" in shown
    questions = tmp_path / "questions.jsonl"
    lines = [{"de": record["de"]} for record in records[:3]] + [{"de": ""}]
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    done = bigtx("predict", str(run_dir), "--input", str(questions))
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 4 and all(line["prediction"].keys() == {"translation", "score"} for line in found[:3])
    assert "'de' is empty" in done.stdout + done.stderr


def test_broken_pairs_are_refused_with_file_and_line(corpus: Path, tmp_path: Path) -> None:
    records, uneven = pairs(20), tmp_path / "uneven"
    uneven.mkdir()
    write_sides(tmp_path, records)
    sides = f"{tmp_path}/pairs.{{xx,yy}}.gz"
    lines = gzip.decompress((tmp_path / "pairs.yy.gz").read_bytes()).split(b"\n")
    (uneven / "a.xx").write_bytes(b"ba\nbe\nbi\n")
    (uneven / "a.yy").write_bytes(b"ba\nbe\n")
    lines[3] = b"b\xffa"
    (tmp_path / "pairs.yy.gz").write_bytes(gzip.compress(b"\n".join(lines)))
    done = finetune(*run_of(corpus, sides, tmp_path / "run", f"data.train=['{sides}','{uneven}/a.{{xx,yy}}']"))
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert f"{tmp_path}/pairs.yy.gz, line 4: not UTF-8" in done.stderr
    assert f"{uneven}/a.{{xx,yy}}: the two files must have the same number of lines: {uneven}/a.xx has 3" in done.stderr
    lines[0], lines[3] = b"", b"ba"
    (tmp_path / "pairs.yy.gz").write_bytes(gzip.compress(b"\n".join(lines)))
    done = finetune(*run_of(corpus, sides, tmp_path / "run", "data.too_long=refuse", "data.max_length=6"))
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert f"{tmp_path}/pairs.xx.gz, line 1: the field 'target' is empty" in done.stderr
    assert "tokens, and 5 are allowed (data.max_length)" in done.stderr


@pytest.mark.slow
def test_captions_are_translated(test_data: Path, tmp_path: Path) -> None:
    """The recipe of configs/finetune, for its first minutes."""
    folder, tokenizer = test_data / "multi30k", tmp_path / "tokenizer"
    if not folder.is_dir():
        pytest.skip(f"no captions in {test_data}")
    done = bigtx(
        "tokenizer",
        "train",
        f"input.paths=[{folder}/train.de.gz,{folder}/train.en.gz]",
        "input.text_suffixes=[.de,.en]",
        "input.document_per_line=true",
        "whitespace_pieces=false",
        "vocab_size=8000",
        f"output={tokenizer}",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    recipe = ROOT / "configs" / "finetune" / "multi30k.yaml"
    done = forks.run(
        [
            *finetune_command([str(recipe)]),
            f"tokenizer={tokenizer}",
            f"data.train=['{folder}/train.{{de,en}}.gz']",
            f"data.validation=['{folder}/val.{{de,en}}.gz']",
            "data.test=[]",
            "train.epochs=1",
            "track.wandb=off",
            f"run_dir={tmp_path / 'run'}",
        ],
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert results(tmp_path / "run")["validation"]["bleu"] > 15.0
