"""Small engines for tests: a model, batches made from the seed, and a plain torch loop to compare with."""

from __future__ import annotations

import dataclasses
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bigtx.config.schema import (
    EngineConfig,
    ExpertsConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    PretrainConfig,
    TrainConfig,
)
from bigtx.model.experts import Experts, Routing
from bigtx.model.initial import initial_value
from bigtx.model.loss import Loss
from bigtx.model.transformer import Transformer

SEQUENCE_LENGTH = 32
GLOBAL_BATCH = 8
MODEL = ModelConfig(vocab_size=200, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, max_sequence_length=64)
SHAPES: dict[str, dict[str, Any]] = {
    "decoder": {},
    "encoder": {"shape": "encoder", "norm": "layer", "embedding_norm": True, "head_transform": True, "head_bias": True},
    "encoder_decoder": {
        "shape": "encoder_decoder",
        "positions": "relative",
        "attention_scale": 1.0,
        "bigram_rows": 64,
        "bigram_size": 16,
    },
    "experts": {
        "experts": ExpertsConfig(
            num_experts=4, expert_size=96, shared_size=64, shared_gate=True, balance_loss=0.1, router_z_loss=0.01
        )
    },
}
"""What is changed in MODEL for each shape: ModernBERT's parts, T5's with pairs of tokens, and Qwen2-MoE's."""
LARGE_MODEL = dataclasses.replace(MODEL, hidden_size=512, num_layers=16)
"""47 million parameters: 180 MiB in fp32."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One combination of settings."""

    stage: int
    precision: str = "fp32"
    accumulation: int = 1
    optimizer: str = "adamw"
    clipping: float = 0.5
    ema: float | None = None
    tied: bool = False
    shape: str = "decoder"
    offload: bool = False
    offload_parameters: bool = False
    dropout: float = 0.0
    recompute: str = "none"
    compile: bool = False
    rank: int = 0
    freeze: tuple[str, ...] = ()
    train_also: tuple[str, ...] = ()
    layer_decay: float = 1.0
    deterministic: bool = False
    overlap: bool = True
    seed: int = 0
    deepspeed: dict[str, Any] = dataclasses.field(default_factory=dict)

    def trains(self, name: str) -> bool:
        """Whether a parameter changes."""
        trained = ["*.adapter.?", *self.train_also] if self.rank else ["*"]
        return any(fnmatchcase(name, glob) for glob in trained) and not any(
            fnmatchcase(name, glob) for glob in self.freeze
        )

    def plain(self) -> Case:
        """The case without what the plain loop has no use for: cases that are equal then have the same plain loop."""
        by_autocast = self.precision == "bf16" and self.stage == 0
        left_out = {"offload", "offload_parameters", "recompute", "compile", "ema", "deterministic", "overlap"}
        defaults = {field.name: field.default for field in dataclasses.fields(self) if field.name in left_out}
        return dataclasses.replace(self, **defaults, stage=0 if by_autocast else 1, deepspeed={})

    def rate(self, name: str) -> float:
        """What layer_decay makes of a learning rate; the models here have two layers a stack."""
        if name.startswith(("head.", "decoder.norm", "encoder.norm")) or ".blocks.1." in name:
            return 1.0
        return self.layer_decay if ".blocks.0." in name else self.layer_decay**2

    def config(self, world_size: int) -> PretrainConfig:
        """The case for a number of ranks."""
        return PretrainConfig(
            run_dir="unused",
            seed=self.seed,
            model=dataclasses.replace(
                MODEL,
                tie_embeddings=self.tied,
                dropout=self.dropout,
                lora=LoraConfig(rank=self.rank),
                **SHAPES[self.shape],
            ),
            train=TrainConfig(
                max_steps=20,
                sequence_length=SEQUENCE_LENGTH,
                global_batch_size=GLOBAL_BATCH,
                micro_batch_size=GLOBAL_BATCH // world_size // self.accumulation,
                gradient_clipping=self.clipping,
            ),
            optimizer=OptimizerConfig(
                name=self.optimizer,  # type: ignore[arg-type]
                learning_rate=1e-3,
                ema_decay=self.ema,
                freeze=list(self.freeze),
                train_also=list(self.train_also),
                layer_decay=self.layer_decay,
            ),
            engine=EngineConfig(
                zero_stage=self.stage,
                precision=self.precision,  # type: ignore[arg-type]
                bucket_size=20_000,
                overlap_communication=self.overlap,
                offload_optimizer="cpu" if self.offload else "none",
                offload_parameters="cpu" if self.offload_parameters else "none",
                activation_checkpointing=self.recompute,  # type: ignore[arg-type]
                compile="true" if self.compile else "false",
                deterministic=self.deterministic,
            ),
            deepspeed=self.deepspeed,
        )


@dataclasses.dataclass(frozen=True)
class Rows:
    """A batch: tokens and labels, int64 [B, T], and the numbers of the rows in the run, int64 [B]."""

    tokens: Tensor
    labels: Tensor
    sequence_ids: Tensor

    @property
    def num_labels(self) -> int:
        """Labels that count."""
        return int((self.labels != -100).sum())

    def to(self, device: torch.device) -> Rows:
        """The rows on a device."""
        return Rows(self.tokens.to(device), self.labels.to(device), self.sequence_ids.to(device))

    def split(self, size: int) -> list[Rows]:
        """Batches of so many rows."""
        parts = (self.tokens.split(size), self.labels.split(size), self.sequence_ids.split(size))
        return [Rows(*part) for part in zip(*parts, strict=True)]


@dataclasses.dataclass(frozen=True)
class RowsTask:
    """Predict the labels of `Rows`; an encoder-decoder reads the row on both sides."""

    shape: str = "decoder"

    def target_tokens(self, batch: Rows) -> Tensor | None:
        """What the decoder of an encoder-decoder reads."""
        return batch.tokens if self.shape == "encoder_decoder" else None

    def loss(self, model: Any, batch: Rows) -> Loss:
        """As bigtx.finetuning.tasks.LikelihoodTask."""
        target_tokens = self.target_tokens(batch)
        loss: Loss = model(
            batch.tokens, labels=batch.labels, target_tokens=target_tokens, sequence_ids=batch.sequence_ids
        )
        return loss


def global_batch(step: int) -> Rows:
    """The global batch of a step; some rows have fewer labels than others, so that weighting by tokens matters."""
    generator = torch.Generator().manual_seed(1000 + step)
    # A pattern that can be learned: each token is mostly the successor of the one before it.
    start = torch.randint(0, 200, (GLOBAL_BATCH, 1), generator=generator)
    tokens = (start + torch.arange(SEQUENCE_LENGTH + 1)) % 200
    noise = torch.rand(tokens.shape, generator=generator) < 0.1
    tokens = torch.where(noise, torch.randint(0, 200, tokens.shape, generator=generator), tokens)
    labels = tokens[:, 1:].clone()
    for row in range(GLOBAL_BATCH):
        labels[row, : 2 * row] = -100
    return Rows(tokens[:, :-1].contiguous(), labels, step * GLOBAL_BATCH + torch.arange(GLOBAL_BATCH))


def slice_of_rank(batch: Rows, rank: int, world_size: int, accumulation: int) -> list[Rows]:
    """A rank's micro batches."""
    share = GLOBAL_BATCH // world_size
    return batch.split(share)[rank].split(share // accumulation)


def run_engine(
    case: Case,
    ranks: Any,
    steps: int,
    *,
    poison: dict[int, int] | None = None,
    start: int = 0,
    engine: Any = None,
    refuses: Any = None,
) -> tuple[Any, list[float], list[bool]]:
    """Train a new engine, or go on with one. Returns it, the mean loss of each step, and which were skipped.

    Args:
        poison: step -> rank whose embedding is made NaN for that step's forward.
        refuses: as for `Engine.train_step`.
    """
    from bigtx.engine.engine import Engine

    config = case.config(ranks.world_size)
    if engine is None:
        engine = Engine(config, lambda: Transformer(config.model))
        engine.fill(initial_read(engine, config), states=False)
    losses, skipped = [], []
    for step in range(start, start + steps):
        batch = global_batch(step)
        task: Any = RowsTask(case.shape)
        if poison and poison.get(step) == ranks.rank:
            task = PoisonedTask(case.shape)
        result = engine.train_step(
            [rows.to(engine.device) for rows in slice_of_rank(batch, ranks.rank, ranks.world_size, case.accumulation)],
            task,
            num_labels=batch.num_labels,
            num_tokens=batch.tokens.numel(),
            learning_rate_factor=1.0,
            refuses=refuses,
        )
        losses.append(float(result.loss_sum) / batch.num_labels)
        skipped.append(result.skipped)
    return engine, losses, skipped


def initial_read(engine: Any, config: PretrainConfig) -> Any:
    """The weights of seed 1, as an engine reads them."""
    shapes = engine.shapes()
    return lambda name, kind, first, last: initial_value(name, shapes[name], config.model, 1, first, last)


class PoisonedTask(RowsTask):
    """A task whose loss is NaN."""

    def loss(self, model: Any, batch: Rows) -> Loss:
        """The loss times NaN."""
        loss = super().loss(model, batch)
        return loss._replace(loss_sum=loss.loss_sum * float("nan"), reported_sum=loss.reported_sum * float("nan"))


def whole_parameters(engine: Any, ranks: Any, kind: str = "master") -> dict[str, Tensor]:
    """Every parameter that is trained (or its state) put together from all ranks' fragments."""
    pieces = [
        (
            f.name,
            f.shape,
            f.start,
            f.view(f.flat if kind == "master" else engine.optimizer.state[f.flat][kind]).cpu().clone(),
        )
        for f in engine.owned
        if kind == "master" or kind in engine.optimizer.state_kinds(f.group)
    ]
    result: dict[str, Tensor] = {}
    for rank_pieces in ranks.gather(pieces):
        for name, shape, start, values in rank_pieces:
            result.setdefault(name, torch.full(shape, float("nan"))).view(-1)[start : start + len(values)] = values
    return result


def plain_loop(case: Case, steps: int, device: torch.device) -> tuple[dict[str, Tensor], list[float]]:
    """The same training without DeepSpeed or bigtx's engine, in one process.

    bf16: at stage 0 autocast over fp32 weights; else bf16 weights beside fp32 masters, gradients of every micro batch
    added up in fp32. The balance of experts is a mean over the global batch, with the shares that they had in the one
    before. Returns the fp32 weights, on the CPU, and the losses.
    """
    config = case.config(1)
    model = Transformer(config.model)
    model.init_weights(1)
    model.to(device)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(case.trains(name))
    masters = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if case.trains(name)}
    autocast = case.precision == "bf16" and case.stage == 0
    if case.precision == "bf16" and not autocast:
        model.bfloat16()
    update = PlainUpdate(case, masters)
    routings: list[Routing] = []
    shares = torch.full((config.model.num_layers, 4), 0.25, device=device)
    for module in model.modules():
        if isinstance(module, Experts):
            module.register_forward_hook(lambda module, inputs, outputs: routings.append(outputs[1]))
    losses = []
    for step in range(steps):
        batch = global_batch(step).to(device)
        gradients = {name: torch.zeros_like(master) for name, master in masters.items()}
        total, counts = 0.0, torch.zeros_like(shares)
        for rows in batch.split(GLOBAL_BATCH // case.accumulation):
            tokens, labels = rows.tokens, rows.labels
            model.zero_grad()
            routings.clear()
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                logits = model(tokens, target_tokens=RowsTask(case.shape).target_tokens(rows))
            loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum")
            total += float(loss.detach())
            loss = loss / batch.num_labels
            for layer, routing in enumerate(routings):
                balance = 4 * (shares[layer] * routing.probabilities).sum()
                loss = loss + (0.1 * balance + 0.01 * routing.squares.sum()) / batch.tokens.numel() / len(routings)
                counts[layer] += routing.counts
            loss.backward()
            for name, parameter in model.named_parameters():
                if case.trains(name):
                    assert parameter.grad is not None, name
                    gradients[name] += parameter.grad.float()
        losses.append(total / batch.num_labels)
        shares = counts / counts.sum(dim=1, keepdim=True)
        update(gradients)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if case.trains(name):
                    parameter.copy_(masters[name])
    return {name: master.cpu() for name, master in masters.items()}, losses


class PlainUpdate:
    """Clipping, then AdamW or Muon written out from their formulas."""

    def __init__(self, case: Case, masters: dict[str, Tensor]) -> None:
        self.case, self.masters = case, masters
        self.mean = {name: torch.zeros_like(master) for name, master in masters.items()}
        self.square = {name: torch.zeros_like(master) for name, master in masters.items()}
        self.steps = 0

    @torch.no_grad()
    def __call__(self, gradients: dict[str, Tensor]) -> None:
        """One update in place."""
        self.steps += 1
        norm = torch.sqrt(sum((gradient.double() ** 2).sum() for gradient in gradients.values()))  # type: ignore[arg-type]
        clip = min(1.0, self.case.clipping / (float(norm) + 1e-6)) if self.case.clipping else 1.0
        for name, master in self.masters.items():
            gradient = gradients[name] * clip
            by_adamw = (
                master.ndim < 2
                or ".blocks." not in name
                or name.endswith(("router.weight", "shared_gate.weight", "adapter.a", "adapter.b"))
            )
            if self.case.optimizer == "muon" and not by_adamw:
                self._muon(name, master, gradient)
            else:
                self._adamw(name, master, gradient)

    def _adamw(self, name: str, master: Tensor, gradient: Tensor) -> None:
        rate, beta1, beta2, eps = 1e-3 * self.case.rate(name), 0.9, 0.95, 1e-8
        self.mean[name] = beta1 * self.mean[name] + (1 - beta1) * gradient
        self.square[name] = beta2 * self.square[name] + (1 - beta2) * gradient**2
        if master.ndim >= 2:
            master *= 1 - rate * 0.1
        mean = self.mean[name] / (1 - beta1**self.steps)
        square = self.square[name] / (1 - beta2**self.steps)
        master -= rate * mean / (square.sqrt() + eps)

    def _muon(self, name: str, master: Tensor, gradient: Tensor) -> None:
        self.mean[name] = 0.95 * self.mean[name] + 0.05 * gradient
        update = 0.05 * gradient + 0.95 * self.mean[name]
        for matrix, x in zip(master, update, strict=True) if master.ndim == 3 else [(master, update)]:
            matrix -= 0.02 * self.case.rate(name) * max(1.0, x.shape[0] / x.shape[1]) ** 0.5 * self._orthogonal(x)

    def _orthogonal(self, x: Tensor) -> Tensor:
        x = x.to(torch.float32 if self.case.precision == "fp32" else torch.bfloat16)
        transposed = x.shape[0] > x.shape[1]
        x = x.T if transposed else x
        x = x / (x.float().norm().to(x.dtype) + 1e-7)
        for _ in range(5):
            square = x @ x.T
            x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
        return (x.T if transposed else x).float()
