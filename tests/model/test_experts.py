"""The mixture of experts against one token after another, and under what training does to a block."""

from __future__ import annotations

import itertools
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bigtx.config.schema import ExpertsConfig, ModelConfig
from bigtx.model import experts
from bigtx.model.experts import Experts, Routing, imbalance, routing_loss
from bigtx.model.transformer import Transformer

CHOICES: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "not normalized": {"normalize_weights": False},
    "shared": {"shared_size": 10},
    "gated shared": {"shared_size": 10, "shared_gate": True, "normalize_weights": False},
    "one": {"num_active": 1, "normalize_weights": False},
    "all": {"num_active": 5},
}


def config_of(**changes: Any) -> ModelConfig:
    """A config of a tiny model with five experts, three of them active."""
    settings = ExpertsConfig(**{"num_experts": 5, "num_active": 3, "expert_size": 12} | changes)
    return ModelConfig(vocab_size=70, hidden_size=16, num_layers=2, num_heads=2, experts=settings)


def filled(module: torch.nn.Module, seed: int = 1) -> Any:
    """The module with weights of about one over the root of their inputs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    return module


def token_by_token(layer: Experts, x: Tensor, kind: str) -> Tensor:
    """The same without batching: for each token its experts, one after another."""
    settings, rows = layer.settings, []

    def feed_forward(token: Tensor, gate: Tensor | None, up: Tensor, down: Tensor) -> Tensor:
        hidden = F.silu(gate @ token) * (up @ token) if gate is not None else F.relu(up @ token).square()
        return down @ hidden

    for token in x.flatten(0, 1):
        shares = torch.softmax(layer.router.weight @ token, dim=0)
        best = sorted(range(settings.num_experts), key=lambda expert: -shares[expert].item())[: settings.num_active]
        total = sum(shares[expert] for expert in best) if settings.normalize_weights else 1.0
        row = torch.zeros_like(token)
        for expert in best:
            gate = None if layer.gate is None else layer.gate[expert]
            row = row + shares[expert] / total * feed_forward(token, gate, layer.up[expert], layer.down[expert])
        if layer.shared is not None:
            gate = None if layer.shared.gate is None else layer.shared.gate.weight
            shared = feed_forward(token, gate, layer.shared.up.weight, layer.shared.down.weight)
            if layer.shared_gate is not None:
                shared = torch.sigmoid(layer.shared_gate.weight @ token) * shared
            row = row + shared
        rows.append(row)
    return torch.stack(rows).view_as(x)


@pytest.mark.parametrize(("choice", "kind"), [*itertools.product(CHOICES, ["swiglu"]), ("shared", "relu2")])
def test_equals_one_token_after_another(choice: str, kind: str) -> None:
    config = config_of(**CHOICES[choice])
    config.mlp = kind  # type: ignore[assignment]
    layer = filled(Experts(config))
    x = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(2), requires_grad=True)
    weight = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(3))
    results = []
    for made in (layer(x)[0], token_by_token(layer, x, kind)):
        inputs = [x, *layer.parameters()]
        results.append([made, *torch.autograd.grad((made * weight).sum(), inputs)])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_for_all_experts_gives_what_the_loop_gives(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """torch has a slow form of it for CPUs. Expert 1 has no rows."""
    generator = torch.Generator().manual_seed(1)
    x, weights = (torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in ((9, 8), (4, 16, 8)))
    ends, results = torch.tensor([3, 3, 7, 9]), []
    for has_kernel in (False, True):
        monkeypatch.setattr(experts, "_has_kernel", Mock(return_value=has_kernel))
        made = experts.expert_products(x, weights, ends)
        assert ("GroupedMm" in type(made.grad_fn).__name__) == has_kernel
        results.append([made, *torch.autograd.grad((made * made).sum(), [x, weights])])
    torch.testing.assert_close(*results, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def test_routing_by_its_formulas() -> None:
    layer = filled(Experts(config_of())).requires_grad_(False)
    x = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(2))
    routing = layer(x)[1]
    shares = torch.softmax(x.flatten(0, 1).double() @ layer.router.weight.double().T, dim=-1)
    chosen = shares.argsort(dim=-1, descending=True)[:, :3]
    counts = torch.tensor([float((chosen == expert).sum()) for expert in range(5)])
    assert torch.equal(routing.counts, counts)
    balance = 5 * sum(counts[expert] / (18 * 3) * shares[:, expert].mean() for expert in range(5))
    assert routing.balance.item() == pytest.approx(float(balance), rel=1e-5)
    z = (x.flatten(0, 1).double() @ layer.router.weight.double().T).exp().sum(dim=-1).log().square().mean()
    assert routing.z.item() == pytest.approx(float(z), rel=1e-5)


@pytest.mark.parametrize(("shares", "expected"), [(None, 8.0), ([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]], 3.75)])
def test_the_balance_of_two_layers_by_hand(shares: list[list[float]] | None, expected: float) -> None:
    probabilities = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 1.0]])
    assert imbalance(probabilities, None if shares is None else torch.tensor(shares)).item() == expected


def test_balance_is_one_where_the_load_is_even_and_pulls_towards_it() -> None:
    layer = filled(Experts(config_of(num_experts=4, num_active=1)))
    with torch.no_grad():
        layer.router.weight.zero_()[:, :4] = torch.eye(4)
    even = torch.eye(16)[:4][None]
    crowded = even[:, [0, 0, 0, 1]]
    assert layer(even)[1].balance.item() == pytest.approx(1.0)
    routing = layer(crowded)[1]
    assert routing.counts.tolist() == [3.0, 1.0, 0.0, 0.0] and routing.balance > 1.1
    (slope,) = torch.autograd.grad(routing.balance, [layer.router.weight])
    assert slope[0, 0] > 0  # Downhill, expert 0 loses the tokens that it has too many of.


def test_routing_of_parts_adds_up_and_padding_is_not_counted() -> None:
    layer, settings = filled(Experts(config_of())), config_of().experts
    x = torch.randn(4, 9, 16, generator=torch.Generator().manual_seed(2))
    is_text = torch.arange(9) < torch.tensor([9, 3, 7, 1])[:, None]
    whole = layer(x, is_text)[1]
    tokens = layer(x[is_text][None])[1]  # Those that are no padding, in one row.
    assert whole.counts.sum() == 3 * 20 and torch.equal(whole.counts, tokens.counts)
    parts = layer(x[:1], is_text[:1])[1] + layer(x[1:, :7], is_text[1:, :7])[1]
    shares = torch.tensor([0.5, 0.2, 0.1, 0.1, 0.1])
    for other in (tokens, parts):
        torch.testing.assert_close(tuple(other), tuple(whole))
        torch.testing.assert_close((other.balance, other.z), (whole.balance, whole.z))
        torch.testing.assert_close(routing_loss(other, shares, settings), routing_loss(whole, shares, settings))
    by_hand = 5 * (shares * whole.probabilities).sum() * settings.balance_loss
    torch.testing.assert_close(
        routing_loss(whole, shares, settings) - routing_loss(whole, 0 * shares, settings), by_hand
    )
    # An even load pulls no expert's probability anywhere.
    slopes = torch.autograd.grad(imbalance(whole.probabilities, None), [layer.router.weight])
    assert slopes[0].abs().max() < 1e-5


@pytest.mark.parametrize(("size", "has_gate"), [(0, False), (10, True)])
def test_without_a_shared_expert_there_is_no_gate(size: int, has_gate: bool) -> None:
    layer = Experts(config_of(shared_size=size, shared_gate=True))
    assert ("shared_gate.weight" in dict(layer.named_parameters())) is has_gate


def test_an_expert_without_tokens() -> None:
    layer = filled(Experts(config_of(num_active=1)))
    with torch.no_grad():
        layer.router.weight.zero_()[2, 0] = 1.0
    x = torch.rand(2, 3, 16) + 0.1
    made, routing = layer(x)
    made.sum().backward()
    assert routing.counts.tolist() == [0, 0, 6, 0, 0]
    for weight in (layer.gate, layer.up, layer.down):
        assert [bool(part.abs().sum()) for part in weight.grad] == [False, False, True, False, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_sixteen_bits_route_in_fp32(dtype: torch.dtype, autocast: bool) -> None:
    """Scores too close for 16 bits still find the better expert; products stay near."""
    layer = filled(Experts(config_of(num_experts=2, num_active=1)))
    x = torch.randn(4, 8, 16, generator=torch.Generator().manual_seed(2)).to(dtype).float()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(parameter.to(dtype))
        layer.router.weight[1] = layer.router.weight[0]
        layer.router.weight[1, 0] += 0.01  # Its sign decides, where scores of about one would round to the same.
        layer.router.weight.copy_(layer.router.weight.to(dtype))
    exact, routing = layer(x)
    if autocast:
        with torch.autocast("cpu", dtype):
            made, rounded = layer(x)
    else:
        made, rounded = layer.to(dtype)(x.to(dtype))
    assert torch.equal(routing.counts, rounded.counts) and 0 < routing.counts[0] < 32
    assert rounded.counts.dtype == rounded.balance.dtype == rounded.z.dtype == torch.float32
    torch.testing.assert_close(rounded.z, routing.z, rtol=1e-5, atol=0)
    assert (made.float() - exact).norm() < 0.02 * exact.norm()
    made.float().sum().backward()
    assert all(parameter.grad.dtype == parameter.dtype for parameter in layer.parameters())


@pytest.mark.parametrize(
    ("mode", "compiled"),
    [
        ("none", False),
        ("full", False),
        ("selective", False),
        ("selective", True),
        pytest.param("none", True, marks=pytest.mark.slow),
        pytest.param("full", True, marks=pytest.mark.slow),
    ],
)
def test_recomputed_and_compiled_blocks_give_the_same(mode: str, compiled: bool) -> None:
    """Counts too: recomputing them for the backward pass counts no token twice."""
    config = config_of(shared_size=10, shared_gate=True)
    tokens = torch.randint(70, (2, 16), generator=torch.Generator().manual_seed(0))

    def answer(mode: Any, compiled: bool) -> list[Any]:
        model = filled(Transformer(config))
        model.activation_checkpointing = mode
        if compiled:
            for block in model.blocks:
                block.compile(backend="aot_eager", dynamic=False)
        loss = model(tokens, labels=tokens)
        routing: Routing = loss.routing
        assert routing.counts.shape == (2, 5)
        (loss.loss_sum + 10.0 * routing.balance + routing.z).backward()
        assert routing.counts.sum(dim=1).tolist() == [2 * 16 * 3] * 2
        return [loss.loss_sum, *routing, *(parameter.grad for parameter in model.parameters())]

    torch.testing.assert_close(answer(mode, compiled), answer("none", False), rtol=1e-4, atol=1e-4)
