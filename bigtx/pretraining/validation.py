"""Validation within a run: loss on held-out text, and samples. All ranks call it together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from bigtx.config.schema import PretrainConfig
from bigtx.config.schema.tasks import Better
from bigtx.data.stream.loader import ValidationBatches
from bigtx.data.stream.rows import RowFormat
from bigtx.model.loss import Task
from bigtx.model.transformer import Transformer
from bigtx.pretraining import make_objective
from bigtx.pretraining.corpora import place_of, refuse_other_tokenizer, validation_sources
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.track.tracker import Tracker
from bigtx.utils.hashing import derive_seed

if TYPE_CHECKING:
    from bigtx.engine.engine import Engine
    from bigtx.engine.ranks import Ranks
    from bigtx.train.state import RunState


class Alone:
    """The engine of a measurement with a single process.

    Attributes:
        rank, world_size: always 0 and 1.
        module: the model, in evaluation mode.
    """

    rank, world_size = 0, 1

    def __init__(self, model: Transformer) -> None:
        self.module = model.eval()

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Any], task: Task) -> tuple[float, int]:
        """Return the reported loss summed over all labels, and their number, as `Engine.evaluate` does."""
        device = next(self.module.parameters()).device
        loss_sum, num_labels = torch.zeros((), dtype=torch.float64, device=device), 0
        for batch in batches:
            num_labels += batch.num_labels
            loss_sum += task.loss(self.module, batch.to(device)).reported_sum
        return float(loss_sum), num_labels

    def from_first(self, value: Any) -> Any:
        """Return the value: this process is rank 0."""
        return value


BETTER: Mapping[str, Better] = {"loss": "lower", "perplexity": "lower", "bits_per_byte": "lower"}
"""Whether lower or higher is better, for every metric of a source."""


class Validation:
    """The held-out sources of a run, opened once."""

    def __init__(
        self, config: PretrainConfig, engine: Engine | Alone, ranks: Ranks | Alone, task: Task, tokenizer: Tokenizer
    ) -> None:
        """Open the sources.

        Raises:
            ConfigError: a source named for validation has no validation split, or another tokenizer's.
        """
        self.config, self.engine, self.ranks, self.task, self.tokenizer = config, engine, ranks, task, tokenizer
        self.objective = make_objective(config, tokenizer, purpose="validation")
        form = RowFormat(
            sequence_length=config.train.sequence_length,
            pad_id=tokenizer.pad_id,
            document_mask=config.data.document_mask,
        )
        self.sources = {
            name: ValidationBatches(
                place_of(config, source),
                form,
                micro_batch_size=config.train.micro_batch_size,
                max_sequences=config.validation.max_sequences,
                rank=ranks.rank,
                world_size=ranks.world_size,
                prepare=self.objective.prepare,
            )
            for name, source in validation_sources(config).items()
        }
        for name, batches in self.sources.items():
            refuse_other_tokenizer(name, batches.manifest, tokenizer.fingerprint)

    def report(self, tracker: Tracker, state: RunState) -> bool:
        """Measure and sample, and log both. Every rank must call it.

        Returns:
            False, because pretraining keeps the newest checkpoints.
        """
        metrics = self.measure()
        if metrics:
            tracker.log(state.step, state.tokens, metrics)
            shown = (
                f"{name} loss {metrics[f'validation/{name}/loss']:.4f}{self._bits(name, metrics)}"
                for name in self.sources
            )
            tracker.message(f"validation at step {state.step}: {', '.join(shown)}")
        prompts = list(self.config.validation.sample_prompts)
        if prompts:
            written = zip(prompts, self._sample(prompts, state.step), strict=True)
            rows = [{"prompt": prompt, "completion": completion} for prompt, completion in written]
            tracker.samples(state.step, state.tokens, rows)
        return False

    def measure(self) -> dict[str, float]:
        """Return loss, perplexity and bits per byte of each source, by name. Every rank must call it."""
        metrics: dict[str, float] = {}
        for name, batches in self.sources.items():
            metrics |= self._measure(name, batches)
        return metrics

    def _measure(self, name: str, batches: ValidationBatches) -> dict[str, float]:
        loss_sum, num_labels = self.engine.evaluate(batches, self.task)
        loss = loss_sum / max(1, num_labels)
        metrics = {
            f"validation/{name}/loss": loss,
            f"validation/{name}/perplexity": math.exp(min(loss, 700.0)),
        }
        if self.objective.bits_per_byte:
            metrics[f"validation/{name}/bits_per_byte"] = loss / math.log(2) / batches.manifest.bytes_per_token
        return metrics

    def _bits(self, name: str, metrics: dict[str, float]) -> str:
        bits = metrics.get(f"validation/{name}/bits_per_byte")
        return "" if bits is None else f" ({bits:.3f} bits per byte)"

    @torch.no_grad()
    def _sample(self, prompts: list[str], step: int) -> list[str]:
        """Continue the prompts. Every rank uses rank 0's draws, so that all ranks gather ZeRO-3's weights together."""
        from bigtx.model.decode import Sampling
        from bigtx.model.write import plain_prompts, write

        settings = self.config.validation
        self.engine.module.eval()
        written = write(
            self.engine.module,
            self.tokenizer,
            plain_prompts(self.config.model, self.tokenizer, prompts),
            max_new_tokens=settings.sample_tokens,
            sampling=Sampling(
                temperature=settings.sample_temperature, seed=derive_seed("sample", self.config.seed, step)
            ),
            agree=self.ranks.from_first,
        )
        return [one.text for one in written]
