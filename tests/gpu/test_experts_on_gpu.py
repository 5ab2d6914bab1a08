"""The mixture of experts on a GPU: all experts in one product, without a wait for the device."""

from __future__ import annotations

import pytest
import torch

from bigtx.config.schema import ExpertsConfig, ModelConfig
from bigtx.model import experts
from bigtx.model.experts import Experts

pytestmark = pytest.mark.gpu

NUM_TOKENS, SIZE = 300, 64


def made_layer() -> Experts:
    """Eight experts, of which two are never chosen."""
    settings = ExpertsConfig(num_experts=8, num_active=2, expert_size=48, shared_size=32)
    layer = Experts(ModelConfig(vocab_size=70, hidden_size=SIZE, num_heads=4, experts=settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / SIZE**0.5)
        layer.router.weight[:, 0] = torch.tensor([1.0] * 6 + [-9.0] * 2)
    return layer


def rows() -> torch.Tensor:
    """Tokens [1, N, D] whose first number is large, which is what keeps two experts idle."""
    x = torch.randn(1, NUM_TOKENS, SIZE, generator=torch.Generator().manual_seed(2))
    x[..., 0] = 4.0
    return x.bfloat16().float()


@pytest.mark.parametrize("compiled", [False, True])
def test_bf16_gives_what_fp32_gives_on_the_cpu(compiled: bool) -> None:
    layer = made_layer().bfloat16().float()
    answers = []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        layer.to(device, dtype).zero_grad()
        x = rows().to(device, dtype).requires_grad_()
        forward = torch.compile(layer, dynamic=False) if compiled and device == "cuda" else layer
        made, routing = forward(x)
        (made.float().square().sum() + routing.balance).backward()
        assert routing.counts[6:].tolist() == [0, 0]
        gradients = [parameter.grad for parameter in (x, *layer.parameters())]
        answers.append([part.detach().float().cpu() for part in (made, routing.counts, *gradients) if part is not None])
    for exact, rounded in zip(*answers, strict=True):
        assert (rounded - exact).norm() < 0.03 * exact.norm()


def test_nothing_waits_for_the_device() -> None:
    layer = made_layer().to("cuda", torch.bfloat16)
    x = rows().to("cuda", torch.bfloat16).requires_grad_()
    assert experts._has_kernel(layer.up)
    layer(x)[0].float().sum().backward()  # What is set up at the first call may wait.
    torch.cuda.set_sync_debug_mode("error")
    try:
        made, routing = layer(x)
        (made.float().sum() + routing.balance + routing.z).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
