"""What bigtx pretrained, on two ranks, leaves for transformers through the commands of a user."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from doors import BF16, TINY, bigtx, pretrain

import bigtx as library

SHAPES = {
    "decoder": [],
    "encoder": [
        "model.shape=encoder",
        "objective.name=masked",
        "model.norm=layer",
        "model.mlp=geglu",
        "model.embedding_norm=true",
        "model.head_transform=true",
        "model.head_bias=true",
        "model.tie_embeddings=true",
    ],
    "encoder_decoder": [
        "model.shape=encoder_decoder",
        "objective.name=span_corruption",
        "model.positions=relative",
        "model.attention_scale=1",
        "model.mlp=geglu_tanh",
    ],
}
AUTO_CLASSES = {
    "decoder": "AutoModelForCausalLM",
    "encoder": "AutoModelForMaskedLM",
    "encoder_decoder": "AutoModelForSeq2SeqLM",
}
CASES = [
    pytest.param(shape, stage, marks=[] if (shape, stage) == ("encoder_decoder", 3) else pytest.mark.slow)
    for shape in SHAPES
    for stage in (1, 3)
]


@pytest.mark.dist
@pytest.mark.parametrize(("shape", "stage"), CASES)
def test_two_ranks_to_transformers(corpus: Path, tmp_path: Path, shape: str, stage: int) -> None:
    transformers = pytest.importorskip("transformers")
    run_dir, folder = tmp_path / "run", tmp_path / "exported"
    settings = [f"data.sources.a.path={corpus}", f"run_dir={run_dir}", "train.max_steps=4", "track.wandb=off"]
    done = pretrain(*TINY, *BF16, *SHAPES[shape], *settings, f"engine.zero_stage={stage}", ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    done = bigtx("export", str(run_dir), "--to", "hf", "-o", str(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "The same token ids, and" in done.stdout

    # Once more by hand, so that not all rests on the command's own comparison.
    loaded = library.load(run_dir)
    model = getattr(transformers, AUTO_CLASSES[shape]).from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = "def main(arguments):\n    return  0  # \u00e9\U0001f916\n"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert ids == loaded.tokenizer.encode(text)
    inputs = {"input_ids": torch.tensor([ids])}
    target_ids = ids[:7] if shape == "encoder_decoder" else None
    if target_ids is not None:
        inputs["decoder_input_ids"] = torch.tensor([target_ids])
    with torch.no_grad():
        logits = model(**inputs).logits[0]
    torch.testing.assert_close(logits, loaded.logits(ids, target_ids), rtol=1e-4, atol=1e-4)
