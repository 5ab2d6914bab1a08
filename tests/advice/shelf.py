"""What the cases copy: a tokenizer, a corpus, runs of every kind without training, a foreign model."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

from bigtx.cli import main
from bigtx.config.load import to_yaml
from bigtx.config.schema import (
    ChatConfig,
    ClassifyConfig,
    DataConfig,
    FinetuneConfig,
    LoraConfig,
    ModelConfig,
    PretrainConfig,
    SourceConfig,
    TokenizerTrainConfig,
)
from bigtx.engine.checkpoint import read_manifest, write_manifest
from bigtx.engine.trainable import is_adapter
from bigtx.model.transformer import Transformer
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.tokenizer.train import train
from bigtx.utils.files import json_hash, sha256_file

TEXTS = ["red apple tree and green apple tree, the house of stone, who are you, I am the river. " * 3] * 20
SHAPE: dict[str, Any] = {
    "vocab_size": 420,
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 2,
    "max_sequence_length": 64,
    "init": "normal",
}


class Shelf:
    """Made when they are first taken."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @functools.cached_property
    def tokenizer(self) -> Path:
        return self._tokenizer("tokenizer")

    @functools.cached_property
    def plain_tokenizer(self) -> Path:
        """One without chat roles."""
        return self._tokenizer("plain", chat_roles=[])

    @functools.cached_property
    def other_tokenizer(self) -> Path:
        return self._tokenizer("other", vocab_size=440)

    @functools.cached_property
    def corpus(self) -> Path:
        """A prepared corpus with a validation split."""
        for number in range(40):
            path = self.folder / "texts" / f"{number}.txt"
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"{number} " + TEXTS[0] * 3)
        settings = ["num_processes=1", "block_tokens=4096", "validation_fraction=0.2"]
        paths = [f"input.paths={self.folder / 'texts'}", f"tokenizer={self.tokenizer}", f"output={self.folder / 'c'}"]
        assert main(["data", "prepare", *paths, *settings]) == 0
        return self.folder / "c"

    @functools.cached_property
    def decoder(self) -> Path:
        data = DataConfig(sources={"a": SourceConfig(path=str(self.corpus))})
        return self._run("decoder", PretrainConfig(model=ModelConfig(**SHAPE), data=data))

    @functools.cached_property
    def encoder(self) -> Path:
        return self._run("encoder", PretrainConfig(model=ModelConfig(**SHAPE, shape="encoder")))

    @functools.cached_property
    def classifier(self) -> Path:
        classes = ["joy", "woe"]
        model = ModelConfig(**SHAPE, num_classes=len(classes))
        config = FinetuneConfig(task="classify", model=model, classify=ClassifyConfig(classes=classes, pooling="last"))
        return self._run("classifier", config)

    @functools.cached_property
    def foreign_classifier(self) -> Path:
        """A classifier in Hugging Face's layout."""
        model = ModelConfig(**SHAPE, num_classes=2, class_head="score")
        classify = ClassifyConfig(classes=["joy", "woe"], pooling="last")
        run = self._run("scored", FinetuneConfig(task="classify", model=model, classify=classify))
        assert main(["export", str(run), "-o", str(self.folder / "foreign_classifier"), "--no-verify"]) == 0
        return self.folder / "foreign_classifier"

    @functools.cached_property
    def chats(self) -> Path:
        """A run that was trained on chats."""
        return self._answering("chats", "chat")

    @functools.cached_property
    def answers(self) -> Path:
        """A run that was trained on single prompts and answers."""
        return self._answering("answers", "plain")

    def _answering(self, name: str, form: Literal["chat", "plain"]) -> Path:
        config = FinetuneConfig(task="sft", model=ModelConfig(**SHAPE), chat=ChatConfig(format=form))
        return self._run(name, config)

    @functools.cached_property
    def adapters(self) -> Path:
        """A run of adapters on the decoder."""
        return self._run("adapters", PretrainConfig(model=ModelConfig(**SHAPE, lora=LoraConfig(rank=2))), is_adapter)

    @functools.cached_property
    def mixed(self) -> Path:
        """A run whose adapters are beside whole weights that were trained too."""
        return self._run("mixed", PretrainConfig(model=ModelConfig(**SHAPE, lora=LoraConfig(rank=2))))

    @functools.cached_property
    def other_foreign(self) -> Path:
        """A model with more tokens."""
        model = ModelConfig(**SHAPE | {"vocab_size": 440})
        run = self._run("larger", PretrainConfig(model=model), tokenizer=self.other_tokenizer)
        assert main(["export", str(run), "-o", str(self.folder / "other_foreign"), "--no-verify"]) == 0
        return self.folder / "other_foreign"

    @functools.cached_property
    def loud(self) -> Path:
        """A decoder with weights that fp16 does not hold."""
        return self._run("loud", PretrainConfig(model=ModelConfig(**SHAPE)), scale=1e8)

    @functools.cached_property
    def foreign(self) -> Path:
        """A model in Hugging Face's layout."""
        assert main(["export", str(self.decoder), "-o", str(self.folder / "foreign"), "--no-verify"]) == 0
        return self.folder / "foreign"

    def _tokenizer(self, name: str, vocab_size: int = 420, **changes: Any) -> Path:
        train(TokenizerTrainConfig(vocab_size=vocab_size, **changes), TEXTS).save(self.folder / name)
        return self.folder / name

    def _run(
        self,
        name: str,
        config: PretrainConfig | FinetuneConfig,
        is_trained: Callable[[str], bool] = lambda name: True,
        tokenizer: Path | None = None,
        scale: float = 1.0,
    ) -> Path:
        folder = self.folder / name
        config = dataclasses.replace(config, run_dir=str(folder))
        Tokenizer.load(tokenizer or self.tokenizer).save(folder / "tokenizer")
        (folder / "config.yaml").write_text(to_yaml(config))
        model = Transformer(config.model)
        model.init_weights(1)
        weights = {key: weight.detach() * scale for key, weight in model.named_parameters()}
        frozen = {key: weight for key, weight in weights.items() if not is_trained(key)}
        facts: dict[str, Any] = {"step": 5, "state": {"tokens": 0}, "data": {}}
        if config.model.lora.rank:
            facts["adapter_scale"] = config.model.lora.alpha / config.model.lora.rank
        if frozen:
            write_weights(folder / "frozen", frozen, {})
            facts["frozen_sha256"] = json_hash(read_manifest(folder / "frozen"))
        trained = {key: weight for key, weight in weights.items() if key not in frozen}
        write_weights(folder / "checkpoints" / "step-00000005", trained, facts)
        return folder


def write_weights(folder: Path, weights: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
    """What one rank writes of a checkpoint."""
    folder.mkdir(parents=True)
    file = folder / "rank-00000.safetensors"
    save_file({f"{name}|0|master": weight.float().flatten().clone() for name, weight in weights.items()}, file)
    manifest = {
        "format": 1,
        "parameters": {name: list(weight.shape) for name, weight in weights.items()},
        "files": {file.name: {"size": file.stat().st_size, "sha256": sha256_file(file)}},
    }
    write_manifest(folder, manifest | facts)
