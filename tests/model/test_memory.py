"""The arithmetic of memory beside what torch keeps."""

from __future__ import annotations

import gc
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bigtx.config.schema import ExpertsConfig, ModelConfig
from bigtx.model.plan import (
    activation_bytes,
    buffer_bytes,
    bytes_per_parameter,
    state_bytes,
)
from bigtx.model.size import count_parameters
from bigtx.model.transformer import Transformer

SIZES: dict[str, Any] = {"vocab_size": 256, "hidden_size": 128, "num_heads": 2, "mlp_size": 384}
TOKENS = 2 * 1024
"""Rows so long that attention runs in torch's fused kernel."""


def live_tensors() -> set[int]:
    """Addresses of what Python's tensors hold."""
    with warnings.catch_warnings():  # Some of torch's objects warn when they are asked what they are.
        warnings.simplefilter("ignore")
        return {
            found.untyped_storage().data_ptr()
            for found in gc.get_objects()
            if type(found) in (Tensor, nn.Parameter) and found.device.type == "cpu"
        }


def kept_bytes(config: ModelConfig, recompute: Any, stage: int) -> int:
    """What a model keeps from a forward pass to the backward pass: what autograd saves, and what a policy of
    recomputation saves beside it."""
    model = Transformer(config)
    model.init_weights(seed=1)
    if stage:
        model = model.bfloat16()
    model.activation_checkpointing = recompute
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    tokens = torch.zeros((2, TOKENS // 2), dtype=torch.int64)
    gc.collect()
    before, kept = live_tensors(), {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # Without ZeRO autocast saves copies of the weights too, which count as states.
        if storage.data_ptr() not in weights and tensor.numel() >= TOKENS and not is_copy_of_weight(tensor):
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def is_copy_of_weight(tensor: Tensor) -> bool:
        return any(set(tensor.shape) == set(one.shape) and tensor.numel() == one.numel() for one in model.parameters())

    with (
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=stage == 0),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        loss = model(tokens, labels=tokens)
    if recompute == "selective":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for found in gc.get_objects():
                if type(found) is Tensor and found.untyped_storage().data_ptr() not in before | weights:
                    keep(found)
    del loss
    return sum(kept.values())


CHANGES: list[dict[str, Any]] = [
    {"num_kv_heads": 1},
    {"mlp": "relu2", "qk_norm": True},
    {"mlp": "gelu", "norm": "layer"},
    {"norm_scale": False, "qk_norm": True, "head_width": 96},
]


@pytest.mark.parametrize(
    ("changes", "recompute"),
    [
        *(({}, recompute) for recompute in ("none", "selective", "full")),
        *((changes, "none") for changes in CHANGES),
        *(
            pytest.param(changes, recompute, marks=pytest.mark.slow)
            for changes in CHANGES
            for recompute in ("selective", "full")
        ),
    ],
    ids=str,
)
def test_activations_are_those_that_torch_keeps(changes: dict[str, Any], recompute: Any) -> None:
    """Of two blocks more; nothing is said of embeddings, the last norm and the loss."""
    few, many = (ModelConfig(**SIZES, **changes, num_layers=number) for number in (1, 3))
    counted = activation_bytes(many, num_tokens=TOKENS, recompute=recompute)
    counted -= activation_bytes(few, num_tokens=TOKENS, recompute=recompute)
    assert kept_bytes(many, recompute, stage=1) - kept_bytes(few, recompute, stage=1) == counted


def test_activations_without_zero() -> None:
    """The residual stream is fp32 there, and each product's input is cast by itself."""
    few, many = (ModelConfig(**SIZES, num_layers=number) for number in (1, 3))
    for recompute in ("none", "full"):
        counted = activation_bytes(many, num_tokens=TOKENS, recompute=recompute, stage=0)
        counted -= activation_bytes(few, num_tokens=TOKENS, recompute=recompute, stage=0)
        assert kept_bytes(many, recompute, stage=0) - kept_bytes(few, recompute, stage=0) == counted


def test_recomputation_makes_one_block_again() -> None:
    config = ModelConfig(**SIZES, num_layers=10)
    none, selective, full = (
        activation_bytes(config, num_tokens=1, recompute=recompute) for recompute in ("none", "selective", "full")
    )
    assert full < selective < none
    assert full == none // 10 + 9 * 2 * config.hidden_size


def test_states() -> None:
    assert [bytes_per_parameter(stage, 1) for stage in range(4)] == [18, 18, 18, 18]
    assert [bytes_per_parameter(stage, 8) for stage in range(4)] == [18, 7.5, 4, 2.25]
    config = ModelConfig(**SIZES, num_layers=2, experts=ExpertsConfig(num_experts=4, num_active=2))
    adamw, muon = (state_bytes(config, stage=1, num_ranks=2, optimizer=name) for name in ("adamw", "muon"))
    assert adamw == 12 * count_parameters(config).total
    matrices = 2 * (4 * 128 * 128 + 4 * 3 * 128 * 384)  # Attention and experts of two blocks, no routers.
    assert adamw - muon == matrices * 4 // 2


def test_buffers() -> None:
    config = ModelConfig(**SIZES, num_layers=2)
    assert buffer_bytes(config, stage=1) == 0
    assert buffer_bytes(config, stage=3) - buffer_bytes(config, stage=2) == 2 * count_parameters(config).total
