"""An engine that trains on random tokens: the engine, model and task of a run, without a corpus and a launcher."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterator
from typing import Any

import torch
from throughput import VOCAB_SIZE
from torch import Tensor

from bigtx.config.load import load
from bigtx.config.schema import PretrainConfig
from bigtx.data.stream.rows import Batch
from bigtx.engine.engine import Engine, StepResult
from bigtx.engine.ranks import Ranks
from bigtx.model.size import flops_per_token
from bigtx.model.transformer import Transformer
from bigtx.pretraining.objectives import LikelihoodTask
from bigtx.utils.hardware import peak_flops
from test_gpu import timing

TIMEOUT_SECONDS = 120.0
ACCUMULATION = 4


def ranks() -> Ranks:
    """Make this process the only rank; call it once."""
    return Ranks(timeout_seconds=TIMEOUT_SECONDS)


class Trainer:
    """An engine with random weights and one global batch of random tokens, which each step trains on.

    Attributes:
        engine, config: the engine and its config.
        num_tokens: the tokens of a step.
    """

    def __init__(
        self,
        model: str,
        *settings: str,
        rows: int,
        length: int = 2048,
        vocab_size: int = VOCAB_SIZE,
        accumulation: int = ACCUMULATION,
    ) -> None:
        """Args:
        model: a name in configs/model.
        settings: KEY=VALUE of the config.
        rows: rows of a micro batch.
        length: tokens of a row.
        vocab_size: the ids of the model.
        accumulation: micro batches of a step.
        """
        words = [
            f"model/{model}.yaml",
            "run_dir=unused",
            f"model.vocab_size={vocab_size}",
            f"train.sequence_length={length}",
            f"train.micro_batch_size={rows}",
            f"train.global_batch_size={rows * accumulation}",
            "train.max_steps=1000",
            f"engine.compile={str(torch.cuda.is_available()).lower()}",
            *settings,
        ]
        self.config = load(PretrainConfig, words, check=False)
        self.engine = Engine(self.config, lambda: Transformer(self.config.model))
        self.device = self.engine.device
        generator = torch.Generator(device=self.device).manual_seed(1)

        def read(name: str, kind: str, start: int, stop: int) -> Tensor:
            if "norm" in name:
                return torch.ones(stop - start)
            return torch.empty(stop - start, device=self.device).normal_(std=0.02, generator=generator)

        self.engine.fill(read, states=False)
        self.num_tokens = rows * length * accumulation
        self._batches = [_random_batch(rows, length, vocab_size, seed) for seed in range(accumulation)]
        self._task = LikelihoodTask(z_loss=0.0)

    def step(self) -> StepResult:
        """Train one step."""
        return self.engine.train_step(
            [batch.to(self.device) for batch in self._batches],
            self._task,
            num_labels=self.num_tokens,
            num_tokens=self.num_tokens,
            learning_rate_factor=0.1,
        )

    def loss(self, result: StepResult) -> float:
        """Return the mean loss of a step; it waits for the device."""
        return float(result.loss_sum) / self.num_tokens

    def measure(self, *, steps: int = 8, warm: int = 3) -> dict[str, Any]:
        """Train and return what it took: the first step, further ones, speed, MFU and memory."""
        began = time.perf_counter()
        first_loss = self.loss(self.step())
        first_seconds = time.perf_counter() - began
        for _ in range(warm):
            self.step()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        timing.wait()
        began = time.perf_counter()
        for _ in range(steps):
            result = self.step()
        timing.wait()
        seconds = (time.perf_counter() - began) / steps
        speed = self.num_tokens / seconds
        return {
            "first_step_seconds": first_seconds,
            "step_ms": seconds * 1e3,
            "tokens_per_second": speed,
            "mfu": self._mfu(speed),
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else 0.0,
            "losses": [first_loss, self.loss(result)],
            "recomputed": str(self.config.engine.activation_checkpointing),
            "micro_batch_tokens": self._batches[0].tokens.numel(),
        }

    def _mfu(self, tokens_per_second: float) -> float | None:
        name = torch.cuda.get_device_name() if self.device.type == "cuda" else ""
        peak = peak_flops(name, self.config.engine.precision)
        flops = flops_per_token(self.config.model, self.config.train.sequence_length)
        return None if peak is None else tokens_per_second * flops / peak

    def close(self) -> None:
        """Free the memory: DeepSpeed's hooks hold the model."""
        self.engine.deepspeed.destroy()
        del self.engine, self._batches


@contextlib.contextmanager
def trainer(model: str, *settings: str, **sizes: int) -> Iterator[Trainer]:
    """Yield a trainer, and free its memory at the end; see `Trainer` for the arguments."""
    made = None
    try:
        made = Trainer(model, *settings, **sizes)
        yield made
    finally:
        if made is not None:
            made.close()
        gc.unfreeze()  # The engine excludes its objects from collection.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _random_batch(rows: int, length: int, vocab_size: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab_size, (rows, length + 1), generator=generator)
    parts = [tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()]
    if torch.cuda.is_available():
        parts = [part.pin_memory() for part in parts]
    return Batch(parts[0], parts[1], None, None, torch.arange(rows), torch.full((rows,), length))
