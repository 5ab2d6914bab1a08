"""Recordings for tests: tones that stand for words, written as wav or flac."""

from __future__ import annotations

import io
import json
import wave
from collections.abc import Sequence
from pathlib import Path

import numpy as np

RATE = 8000
WORDS = {"low": 400.0, "mid": 900.0, "high": 1700.0, "top": 3000.0}
"""What is said, by a tone of so many Hz."""
SETTINGS = [
    "task=transcribe",
    "model.hidden_size=32",
    "model.num_layers=1",
    "model.num_heads=2",
    "model.max_sequence_length=64",
    "model.audio.num_mel_bins=16",
    f"model.audio.sample_rate={RATE}",
]
"""Of a tiny model that hears."""
METHODS = {
    "seq2seq": ["model.shape=encoder_decoder"],
    "ctc": ["transcribe.method=ctc", "model.shape=encoder", "model.audio.strides=[2]"],
}


def tone(hertz: float, seconds: float = 0.12, rate: int = RATE, loudness: float = 0.3) -> np.ndarray:
    """fp32 [samples]."""
    return (loudness * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def spoken(words: Sequence[str], generator: np.random.Generator) -> np.ndarray:
    """Tones one after the other, in a little noise."""
    sound = np.concatenate([tone(WORDS[word], generator.uniform(0.08, 0.16)) for word in words])
    return sound + 0.01 * generator.standard_normal(len(sound), dtype=np.float32)


def wav(sound: np.ndarray, rate: int = RATE) -> bytes:
    """The bytes of a recording of 16 bits; [samples] or [samples, channels]."""
    content = io.BytesIO()
    with wave.open(content, "wb") as file:
        file.setnchannels(1 if sound.ndim == 1 else sound.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((np.clip(sound, -1, 1) * 32767).astype("<i2").tobytes())
    return content.getvalue()


def sayings(count: int, seed: int = 1) -> list[tuple[bytes, str]]:
    """Recordings of one to three different words (two equal tones would be one), and what is said."""
    generator = np.random.default_rng(seed)
    texts = [list(generator.permutation(list(WORDS)))[: generator.integers(1, 4)] for _ in range(count)]
    return [(wav(spoken(words, generator)), " ".join(words)) for words in texts]


def write_manifest(folder: Path, count: int, seed: int = 1) -> Path:
    """A manifest of recordings that lie beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    manifest = folder / "manifest.jsonl"
    with open(manifest, "w", encoding="utf-8") as lines:
        for number, (content, text) in enumerate(sayings(count, seed)):
            (folder / f"{number}.wav").write_bytes(content)
            print(json.dumps({"audio": f"{number}.wav", "text": text}), file=lines)
    return manifest


def write_tokenizer(folder: Path) -> Path:
    """A tokenizer that knows the words."""
    from bigtx.config.schema import TokenizerTrainConfig
    from bigtx.tokenizer.train import train

    texts = [" ".join(WORDS), " ".join(reversed(WORDS))] * 4
    train(TokenizerTrainConfig(vocab_size=390), texts).save(folder)
    return folder
