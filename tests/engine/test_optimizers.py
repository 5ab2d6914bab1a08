"""What each parameter's first updates are, by hand: which rate, which decay, which method."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bigtx.config.schema import OptimizerConfig
from bigtx.engine import muon
from bigtx.engine.fragments import Fragment
from bigtx.engine.muon import assign, orthogonalize, update_scale
from bigtx.engine.optimizers import Optimizer
from bigtx.engine.trainable import align_parts, in_buckets, layer_factors, parameter_groups

SHAPES: dict[str, tuple[int, ...]] = {
    "embedding.weight": (4, 2),
    "decoder.blocks.0.attention.query.weight": (2, 2),
    "decoder.blocks.0.attention.query.bias": (2,),
    "decoder.blocks.0.attention_norm.weight": (2,),
    "decoder.blocks.1.mlp.router.weight": (3, 2),
    "decoder.blocks.1.mlp.shared_gate.weight": (1, 2),
    "decoder.blocks.1.mlp.up.adapter.a": (1, 2),
    "decoder.blocks.1.mlp.up.adapter.b": (2, 1),
    "decoder.blocks.1.mlp.down": (2, 2, 2),
    "decoder.norm.weight": (2,),
    "head.weight": (4, 2),
}
KINDS = {
    "embeddings": ["embedding.weight", "head.weight"],
    "matrices": ["decoder.blocks.0.attention.query.weight", "decoder.blocks.1.mlp.down"],
    "routers": ["decoder.blocks.1.mlp.router.weight", "decoder.blocks.1.mlp.shared_gate.weight"],
    "adapters": ["decoder.blocks.1.mlp.up.adapter.a", "decoder.blocks.1.mlp.up.adapter.b"],
    "vectors": [
        "decoder.blocks.0.attention.query.bias",
        "decoder.blocks.0.attention_norm.weight",
        "decoder.norm.weight",
    ],
}
SETTINGS: dict[str, Any] = {
    "learning_rate": 0.01,
    "weight_decay": 0.5,
    "embedding_learning_rate_scale": 3.0,
    "muon_learning_rate": 0.04,
    "muon_weight_decay": 0.25,
}


def parameters() -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.full(shape, 2.0)) for name, shape in SHAPES.items()}


def settings_of_each(**fields: Any) -> dict[str, tuple[str, str, float, float]]:
    """(group's name, method, peak rate, weight decay) of each parameter."""
    config, own = OptimizerConfig(**(SETTINGS | fields)), parameters()
    names = {id(parameter): name for name, parameter in own.items()}
    return {
        names[id(parameter)]: (
            group["name"],
            group["method"],
            pytest.approx(group["peak_learning_rate"]),
            group["weight_decay"],
        )
        for group in parameter_groups(config, own.items())
        for parameter in group["params"]
    }


def each(kinds: dict[str, tuple[str, float, float]]) -> dict[str, tuple[str, str, float, float]]:
    return {name: (kind, *kinds[kind]) for kind, names in KINDS.items() for name in names}


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("decay_embeddings", [True, False])
def test_each_kind_of_parameter_has_its_own_rate_and_decay(name: str, decay_embeddings: bool) -> None:
    expected = {
        "embeddings": ("adamw", 0.03, 0.5 if decay_embeddings else 0.0),
        "matrices": ("muon", 0.04, 0.25) if name == "muon" else ("adamw", 0.01, 0.5),
        "routers": ("adamw", 0.01, 0.5),
        "adapters": ("adamw", 0.01, 0.5),
        "vectors": ("adamw", 0.01, 0.0),
    }
    assert settings_of_each(name=name, decay_embeddings=decay_embeddings) == each(expected)


def test_rates_fall_towards_the_input() -> None:
    found = {name: rate for name, (_, _, rate, _) in settings_of_each(layer_decay=0.5).items()}
    assert found["head.weight"] == 0.03 and found["decoder.norm.weight"] == 0.01
    assert found["decoder.blocks.1.mlp.down"] == found["decoder.blocks.1.mlp.router.weight"] == 0.01
    assert found["decoder.blocks.0.attention.query.weight"] == found["decoder.blocks.0.attention.query.bias"] == 0.005
    assert found["embedding.weight"] == 0.03 / 4


def test_stacks_of_unequal_depth_each_end_at_the_full_rate() -> None:
    names = ["embedding.weight", "encoder.norm.weight", "decoder.norm.weight", "head.weight", "bigrams.table.weight"]
    names += [f"encoder.blocks.{layer}.x" for layer in range(3)] + [f"decoder.blocks.{layer}.x" for layer in range(2)]
    assert layer_factors(names, 0.5) == {
        "encoder.blocks.2.x": 1.0,
        "encoder.blocks.1.x": 0.5,
        "encoder.blocks.0.x": 0.25,
        "decoder.blocks.1.x": 1.0,
        "decoder.blocks.0.x": 0.5,
        "encoder.norm.weight": 1.0,
        "decoder.norm.weight": 1.0,
        "head.weight": 1.0,
        "embedding.weight": 0.125,
        "bigrams.table.weight": 0.125,
    }


def test_what_is_frozen_is_in_no_group() -> None:
    own = parameters()
    own["embedding.weight"].requires_grad_(False)
    own["head.weight"].requires_grad_(False)
    groups = parameter_groups(OptimizerConfig(**SETTINGS), own.items())
    assert "embeddings" not in {group["name"] for group in groups}
    assert sum(len(group["params"]) for group in groups) == len(SHAPES) - 2


def test_a_partitioned_parameter_is_judged_by_its_whole_shape() -> None:
    """ZeRO-3 leaves an empty vector in a matrix's place."""
    cut = nn.Parameter(torch.empty(0))
    cut.ds_shape = torch.Size((4, 2))  # type: ignore[attr-defined]
    (group,) = parameter_groups(OptimizerConfig(**SETTINGS), [("embedding.weight", cut)])
    assert group["name"] == "embeddings"


def bound(own: dict[str, nn.Parameter], **fields: Any) -> Optimizer:
    """An optimizer over whole parameters, as at ZeRO 0."""
    config = OptimizerConfig(**(SETTINGS | fields))
    optimizer = Optimizer(parameter_groups(config, own.items()), config, torch.float32, torch.device("cpu"))
    names = {id(parameter): name for name, parameter in own.items()}
    flats: list[tuple[int, Tensor]] = [
        (index, flat) for index, group in enumerate(optimizer.param_groups) for flat in group["params"]
    ]
    fragments = [Fragment(names[id(flat)], tuple(flat.shape), 0, flat.numel(), index, flat, 0) for index, flat in flats]
    optimizer.bind(fragments, flats, replicated=True)
    return optimizer


def test_the_first_step_of_adamw_is_one_rate_against_the_sign_and_the_decay() -> None:
    """Whatever the gradient's size: its mean and the root of its mean square are the gradient itself."""
    own = parameters()
    optimizer = bound(own, decay_embeddings=False)
    optimizer.set_learning_rate_factor(0.5)
    for number, parameter in enumerate(own.values()):
        parameter.grad = torch.full_like(parameter, (-1.0) ** number * 10.0 ** (number - 4))
    optimizer.step()
    for number, (name, parameter) in enumerate(own.items()):
        rate = 0.015 if name in KINDS["embeddings"] else 0.005
        decay = 0.0 if name in KINDS["embeddings"] + KINDS["vectors"] else 0.5
        expected = 2.0 * (1 - rate * decay) - rate * (-1.0) ** number
        assert parameter.detach().flatten().tolist() == pytest.approx([expected] * parameter.numel(), abs=2e-6), name
    assert optimizer.num_updates == 1


def test_later_steps_of_adamw_go_by_both_betas_and_eps() -> None:
    """A gradient of 1, then of 0: the mean is beta1 (1 - beta1) / (1 - beta1^2), and so is the mean square."""
    own = {"decoder.norm.weight": nn.Parameter(torch.full((2,), 2.0))}
    optimizer = bound(own, beta1=0.8, beta2=0.5, eps=0.25)
    for gradient in (1.0, 0.0):
        own["decoder.norm.weight"].grad = torch.full((2,), gradient)
        optimizer.step()
    mean, square = 0.8 * 0.2 / (1 - 0.8**2), 0.5 * 0.5 / (1 - 0.5**2)
    expected = 2.0 - 0.01 / (1 + 0.25) - 0.01 * mean / (math.sqrt(square) + 0.25)
    assert own["decoder.norm.weight"].tolist() == pytest.approx([expected] * 2, abs=1e-6)
    assert optimizer.num_updates == 2


def test_a_resumed_adamw_corrects_for_the_updates_before() -> None:
    own = {"decoder.norm.weight": nn.Parameter(torch.zeros(2))}
    optimizer = bound(own, beta1=0.9, beta2=0.96)
    optimizer.num_updates = 1
    own["decoder.norm.weight"].grad = torch.ones(2)
    optimizer.step()
    mean, square = 0.1 / (1 - 0.9**2), 0.04 / (1 - 0.96**2)
    assert own["decoder.norm.weight"].tolist() == pytest.approx([-0.01 * mean / math.sqrt(square)] * 2, rel=1e-5)
    assert optimizer.num_updates == 2


def iterated(value: float, times: int) -> float:
    """What the quintic makes of a singular value."""
    for _ in range(times):
        value = 3.4445 * value - 4.7750 * value**3 + 2.0315 * value**5
    return value


def test_a_step_of_muon_is_orthogonal_and_scaled_by_the_shape() -> None:
    """The gradient is a multiple of a matrix with orthonormal columns: its n singular values are 1 / sqrt(n)."""
    name = "decoder.blocks.0.mlp.up.weight"
    columns = torch.tensor(
        [[0.6, 0.0], [0.8, 0.0], [0.0, 0.0], [0.0, -1.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]
    )
    own = {name: nn.Parameter(torch.full((8, 2), 2.0))}
    optimizer = bound(own, name="muon", muon_num_iterations=3)
    optimizer.set_learning_rate_factor(0.5)
    own[name].grad = 7.0 * columns
    optimizer.step()
    rate, size = 0.02, iterated(1 / math.sqrt(2), 3) * 2.0  # sqrt(8 / 2)
    expected = 2.0 * (1 - rate * 0.25) - rate * size * columns
    torch.testing.assert_close(own[name].detach(), expected, atol=1e-6, rtol=0)
    assert optimizer.num_updates == 1


def test_muon_looks_ahead_along_its_momentum() -> None:
    """Nesterov: of two gradients at right angles, the update is that of a mixture with known weights."""
    name = "decoder.blocks.0.mlp.up.weight"
    own = {name: nn.Parameter(torch.zeros(1, 2))}
    optimizer = bound(own, name="muon", muon_num_iterations=1, muon_momentum=0.8, muon_weight_decay=0.0)
    for gradient in ([3.0, 0.0], [0.0, 5.0]):
        before = own[name].detach().clone()
        own[name].grad = torch.tensor([gradient])
        optimizer.step()
    momentum = torch.tensor([[0.8 * 0.2 * 3.0, 0.2 * 5.0]])
    mixed = 0.2 * torch.tensor([[0.0, 5.0]]) + 0.8 * momentum
    expected = -0.04 * iterated(1.0, 1) * mixed / mixed.norm()
    torch.testing.assert_close(own[name].detach() - before, expected, atol=1e-6, rtol=0)


def test_the_iteration_acts_on_singular_values_alone_and_on_each_matrix_by_itself() -> None:
    generator = torch.Generator().manual_seed(3)
    matrices = torch.randn(3, 5, 4, generator=generator, dtype=torch.float64)
    for batch in (matrices, matrices.mT):
        u, s, v = torch.linalg.svd(batch, full_matrices=False)
        sizes = s / s.norm(dim=-1, keepdim=True)
        expected = torch.stack([u[i] @ torch.diag(iterated(sizes[i], 4)) @ v[i] for i in range(3)])  # type: ignore[arg-type]
        torch.testing.assert_close(orthogonalize(batch, 4), expected, atol=1e-5, rtol=0)
    assert [update_scale(shape) for shape in ((8, 2), (2, 8), (3, 3))] == [2.0, 1.0, 1.0]


def test_experts_are_orthogonalised_one_by_one() -> None:
    name = "decoder.blocks.0.mlp.down"
    own = {name: nn.Parameter(torch.zeros(2, 2, 2))}
    optimizer = bound(own, name="muon", muon_num_iterations=1)
    own[name].grad = torch.stack([torch.eye(2), 100.0 * torch.eye(2).flip(0)])
    optimizer.step()
    size = 0.04 * iterated(1 / math.sqrt(2), 1)
    expected = -size * torch.stack([torch.eye(2), torch.eye(2).flip(0)])
    torch.testing.assert_close(own[name].detach(), expected, atol=1e-6, rtol=0)


class Memory(TorchDispatchMode):
    """The most bytes of tensors that operations have made and that were there at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and count."""
        result = operation(*args, **(kwargs or {}))
        inputs = {id(storage) for storage in _storages((args, kwargs))}
        for storage in _storages(result):
            if id(storage) not in inputs:
                reference = StorageWeakRef(storage)
                self._storages.setdefault(reference.cdata, (reference, storage.nbytes()))
        self._storages = {key: held for key, held in self._storages.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._storages.values()))
        return result


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [value.untyped_storage() for value in tree_leaves(values) if isinstance(value, Tensor)]


@pytest.mark.parametrize("num_flats", [1, 40])
def test_muon_needs_memory_for_a_few_matrices_whatever_the_size_of_the_model(
    monkeypatch: pytest.MonkeyPatch, num_flats: int
) -> None:
    """Two matrices are orthogonalised together, although all of them are exchanged together."""
    size, count = 32, 40
    monkeypatch.setattr(muon, "BATCH_ELEMENTS", 2 * size**2)
    flats = [nn.Parameter(torch.ones(count // num_flats * size**2)) for _ in range(num_flats)]
    settings = {"method": "muon", "name": "matrices", "peak_learning_rate": 0.04, "weight_decay": 0.25}
    optimizer = Optimizer(
        [{"params": flats, **settings}], OptimizerConfig(name="muon"), torch.float32, torch.device("cpu")
    )
    offsets = [(flat, offset) for flat in flats for offset in range(0, flat.numel(), size**2)]
    fragments = [
        Fragment(f"matrix {number}", (size, size), 0, size**2, 0, flat, offset)
        for number, (flat, offset) in enumerate(offsets)
    ]
    optimizer.bind(fragments, [(0, flat) for flat in flats], replicated=True, together=True)
    optimizer.set_learning_rate_factor(0.5)
    gradients = torch.arange(count * size**2, dtype=torch.float32).sin().split([flat.numel() for flat in flats])
    for flat, gradient in zip(flats, gradients, strict=True):
        flat.grad = gradient.clone()
    with Memory() as memory:
        optimizer.step()
    of_matrix = 4 * size**2
    assert 2 * of_matrix <= memory.peak <= 17 * of_matrix < count * of_matrix / 2
    matrices = torch.cat([flat.detach() for flat in flats]).view(count, size, size)
    expected = orthogonalize((0.05 * 0.95 + 0.05) * torch.cat(gradients).view(count, size, size), 5)
    torch.testing.assert_close(matrices, (1 - 0.02 * 0.25) - 0.02 * expected)


def test_a_matrix_is_worked_on_where_a_part_of_it_is_if_that_rank_has_no_more_work() -> None:
    shapes = {0: (4, 4), 1: (4, 4), 2: (4, 4), 3: (2, 4)}
    assert assign(shapes, {0: [3, 4], 1: [3, 4], 2: [5], 3: [0]}, 6) == {0: 3, 1: 4, 2: 5, 3: 0}
    assert assign(shapes, {0: [1], 1: [1], 2: [1], 3: [1]}, 2) == {0: 1, 1: 0, 2: 1, 3: 0}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_average_follows_the_weights_after_their_update(name: str) -> None:
    own = {"decoder.norm.weight": nn.Parameter(torch.full((2,), 2.0)), KINDS["matrices"][0]: nn.Parameter(torch.eye(2))}
    optimizer = bound(own, name=name, ema_decay=0.75)
    averages = {key: optimizer.state[parameter]["ema"] for key, parameter in own.items()}
    expected = {key: torch.zeros_like(parameter) for key, parameter in own.items()}
    for _ in range(2):
        for parameter in own.values():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        expected = {key: 0.75 * expected[key] + 0.25 * own[key].detach() for key in own}
    for key in own:
        torch.testing.assert_close(averages[key], expected[key])


def test_kinds_of_states_and_rates_that_are_shown() -> None:
    own = parameters()
    optimizer = bound(own, name="muon", layer_decay=0.5, ema_decay=0.9)
    kinds = {group["name"]: optimizer.state_kinds(index) for index, group in enumerate(optimizer.param_groups)}
    assert kinds["matrices"] == ["momentum", "ema"] and kinds["vectors"] == ["exp_avg", "exp_avg_sq", "ema"]
    optimizer.set_learning_rate_factor(0.1)
    assert optimizer.learning_rates() == pytest.approx(
        {"matrices": 0.004, "routers": 0.001, "adapters": 0.001, "embeddings": 0.003, "vectors": 0.001}
    )
    # Factors are on the peak, not on the rate before.
    optimizer.set_learning_rate_factor(1.0)
    assert optimizer.learning_rates()["vectors"] == pytest.approx(0.01)


def test_what_has_no_gradient_stays() -> None:
    own = parameters()
    bound(own, ema_decay=0.5).step()
    assert all(torch.equal(parameter, torch.full_like(parameter, 2.0)) for parameter in own.values())


def test_buckets_are_filled_from_the_end_and_keep_the_settings() -> None:
    sizes = {"a": 5, "b": 2, "c": 3, "d": 9, "e": 1}
    groups = [{"name": "matrices", "lr": 0.5, "params": [torch.empty(size) for size in sizes.values()]}]
    groups.append({"name": "vectors", "lr": 0.1, "params": [torch.empty(1)]})
    buckets = in_buckets(groups, 6)
    assert [(bucket["name"], bucket["lr"]) for bucket in buckets] == [("matrices", 0.5)] * 4 + [("vectors", 0.1)]
    assert [[len(each) for each in bucket["params"]] for bucket in buckets] == [[1], [9], [2, 3], [5], [1]]


def test_parts_of_any_number_of_ranks_are_aligned() -> None:
    """DeepSpeed asks for 2 elements times the ranks."""
    align_parts()
    wrapper = SimpleNamespace(nccl_start_alignment_factor=2, flatten=lambda tensors: torch.cat(tensors))
    for num_ranks, expected in ((1, 128), (24, 24 * 64), (2, 128)):
        made = BF16_Optimizer._flatten_dense_tensors_aligned(wrapper, [torch.ones(100), torch.ones(7)], 2 * num_ranks)
        assert made.numel() == expected and made.sum() == 107


@pytest.mark.parametrize("fields", [{}, {"ema_decay": 0.5}, {"name": "muon"}])
def test_a_step_that_is_not_finite_changes_nothing(fields: dict[str, Any]) -> None:
    own = parameters()
    optimizer = bound(own, **fields)
    for grad, scale, found in ((1.0, 1.0, 0.0), (math.inf, math.inf, 1.0), (math.nan, math.nan, 1.0)):
        for parameter in own.values():
            parameter.grad = torch.full_like(parameter, grad)
        before = {name: parameter.detach().clone() for name, parameter in own.items()}
        states = {name: {kind: state.clone() for kind, state in optimizer.state[own[name]].items()} for name in own}
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(found)
        optimizer.step()
        equal = [torch.equal(parameter, before[name]) for name, parameter in own.items()]
        assert all(equal) if found else not any(equal)
        if found:
            assert all(
                torch.equal(optimizer.state[own[name]][kind], states[name][kind])
                for name in own
                for kind in states[name]
            )
    assert optimizer.num_updates == 1


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_gradients_are_divided_by_the_scale(name: str) -> None:
    """Also where the scale changes: Muon's momentum is a mixture of gradients of several steps."""
    results = []
    for scales in ((None, None), (4.0, 0.5)):
        own = parameters()
        optimizer = bound(own, name=name, eps=0.25, muon_momentum=0.5)
        for number, scale in enumerate(scales, 1):
            optimizer.grad_scale = None if scale is None else torch.tensor(scale)
            for parameter in own.values():
                gradient = torch.linspace(-1.0, number, parameter.numel()).view_as(parameter)
                parameter.grad = gradient * (scale or 1.0)
            optimizer.step()
        results.append([parameter.detach() for parameter in own.values()])
    for plain, scaled in zip(*results, strict=True):
        assert torch.equal(plain, scaled)
