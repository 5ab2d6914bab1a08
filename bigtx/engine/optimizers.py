"""AdamW, and Muon with AdamW, as the base optimizer under every ZeRO stage.

DeepSpeed gives the optimizer flat fp32 tensors with this rank's share of the master weights, and the reduced, unscaled
and clipped gradient in `.grad`. It calls `step` once for each tensor. The gradient is already clipped, and
`MatrixExchange` assembles Muon's matrices, so the update is the same at every stage and number of ranks.

The states are fp32. Their kinds are `exp_avg` and `exp_avg_sq` (AdamW), `momentum` (Muon), and `ema` where the config
asks for it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.adamw import adamw

from bigtx.config.schema import OptimizerConfig
from bigtx.engine.fragments import Fragment
from bigtx.engine.trainable import is_adapter

if TYPE_CHECKING:
    from bigtx.engine.muon import MatrixExchange

_BLOCK = re.compile(r"(?P<stack>\w+)\.blocks\.(?P<layer>\d+)\.")
_ABOVE_BLOCKS = ("head.", "encoder.norm.", "decoder.norm.")


def parameter_groups(config: OptimizerConfig, parameters: Iterable[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
    """Group parameters by how they are updated. Norms, biases and other vectors have no weight decay.

    Args:
        config: the config of the optimizer.
        parameters: names and parameters; a parameter that ZeRO-3 has partitioned has its shape in `ds_shape`.

    Returns:
        Groups with `name`, `method`, `peak_learning_rate` and `weight_decay`. With a layer_decay several groups have
        the same name, the one with the highest rate first.
    """
    parameters = list(parameters)
    kinds = _kinds(config)
    factors = layer_factors([name for name, _ in parameters], config.layer_decay)
    groups: dict[tuple[str, float], dict[str, Any]] = {
        (kind, factor): {**settings, "name": kind, "params": []}
        for kind, settings in kinds.items()
        for factor in sorted(set(factors.values()), reverse=True)
    }
    for name, parameter in parameters:
        if parameter.requires_grad:
            groups[_group_of(name, parameter), factors[name]]["params"].append(parameter)
    for (_, factor), group in groups.items():
        group["peak_learning_rate"] *= factor
        group["lr"] = group["peak_learning_rate"]
    return [group for group in groups.values() if group["params"]]


def layer_factors(names: list[str], decay: float) -> dict[str, float]:
    """Return factors on the learning rates of parameters (discriminative fine-tuning, arXiv:1801.06146).

    The factor is 1 for the head, a stack's last norm and its last block. It is multiplied by `decay` for each block
    below, and again for the embeddings and everything else before the first block.
    """
    blocks = {name: match for name in names if (match := _BLOCK.match(name))}
    num_layers: dict[str, int] = {}
    for match in blocks.values():
        num_layers[match["stack"]] = max(num_layers.get(match["stack"], 0), int(match["layer"]) + 1)
    depth = max(num_layers.values(), default=0)
    factors = {}
    for name in names:
        if name in blocks:
            match = blocks[name]
            factors[name] = decay ** (num_layers[match["stack"]] - 1 - int(match["layer"]))
        else:
            factors[name] = 1.0 if name.startswith(_ABOVE_BLOCKS) else decay**depth
    return factors


def _kinds(config: OptimizerConfig) -> dict[str, dict[str, Any]]:
    """Return the settings by which each kind of parameter is updated."""
    embedding_decay = config.weight_decay if config.decay_embeddings else 0.0
    assert config.learning_rate is not None, "the loader fills it in"
    embedding_rate = config.learning_rate * config.embedding_learning_rate_scale
    matrices: dict[str, Any] = {
        "method": "adamw",
        "peak_learning_rate": config.learning_rate,
        "weight_decay": config.weight_decay,
    }
    if config.name == "muon":
        matrices = {
            "method": "muon",
            "peak_learning_rate": config.muon_learning_rate,
            "weight_decay": config.muon_weight_decay,
        }
    return {
        "matrices": matrices,
        "routers": {
            "method": "adamw",
            "peak_learning_rate": config.learning_rate,
            "weight_decay": config.weight_decay,
        },
        # Also with Muon: the product of an adapter's two matrices acts on the activations, and orthogonal steps of both
        # matrices do not make an orthogonal step of the product. One of them begins as zeros.
        "adapters": {
            "method": "adamw",
            "peak_learning_rate": config.learning_rate,
            "weight_decay": config.weight_decay,
        },
        "embeddings": {"method": "adamw", "peak_learning_rate": embedding_rate, "weight_decay": embedding_decay},
        "vectors": {"method": "adamw", "peak_learning_rate": config.learning_rate, "weight_decay": 0.0},
    }


def _group_of(name: str, parameter: nn.Parameter) -> str:
    if len(getattr(parameter, "ds_shape", parameter.shape)) < 2:
        return "vectors"
    if is_adapter(name):
        return "adapters"
    # Each of their rows makes one score, as the rows of a head do, which AdamW updates too. Muon would move all rows
    # equally, including those of experts that receive almost no tokens.
    if name.endswith((".router.weight", ".shared_gate.weight")):
        return "routers"
    return "matrices" if ".blocks." in name else "embeddings"


class Optimizer(torch.optim.Optimizer):
    """AdamW and Muon over flat shares of the parameters.

    `bind` must be called once DeepSpeed has made its flat tensors, before the first step.
    """

    # torch excludes these methods from compiled programs. For that it imports its compiler at the first call, which
    # takes more than a second at the start of every run. bigtx does not compile an optimizer.
    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)

    def __init__(
        self, groups: list[dict[str, Any]], config: OptimizerConfig, arithmetic_dtype: torch.dtype, device: torch.device
    ) -> None:
        """Make the optimizer without states; see `bind`.

        Args:
            groups: from `parameter_groups`.
            config: the config of the optimizer.
            arithmetic_dtype: the dtype of Muon's Newton-Schulz iteration: bf16, or fp32 in an fp32 run.
            device: where Muon's matrices are assembled and orthogonalised, also when the states are offloaded.
        """
        super().__init__(groups, {"lr": config.learning_rate})
        self.config = config
        self.arithmetic_dtype = arithmetic_dtype
        self.device = device
        self.exchanges: dict[Tensor, MatrixExchange] = {}

    def state_kinds(self, group: int) -> list[str]:
        """Return the names of the states that each element of a group has."""
        kinds = {"muon": ["momentum"], "adamw": ["exp_avg", "exp_avg_sq"]}[self.param_groups[group]["method"]]
        return kinds + (["ema"] if self.config.ema_decay is not None else [])

    def bind(self, fragments: list[Fragment], flats: list[tuple[int, Tensor]], *, replicated: bool) -> None:
        """Create the states, and plan Muon's exchange.

        Args:
            fragments: the fragments of this rank.
            flats: (group, flat tensor) in the same order on every rank.
            replicated: whether every rank holds everything (ZeRO 0), so that no exchange is needed.
        """
        for group, flat in flats:
            state = self.state[flat]
            for kind in self.state_kinds(group):
                state[kind] = torch.zeros_like(flat, requires_grad=False)
            state["updates"] = torch.zeros((), dtype=torch.float32, device=flat.device)
            if self.param_groups[group]["method"] == "muon":
                from bigtx.engine.muon import MatrixExchange

                mine = [fragment for fragment in fragments if fragment.flat is flat]
                process_group = None if replicated else dist.group.WORLD
                self.exchanges[flat] = MatrixExchange(mine, process_group)

    def learning_rates(self) -> dict[str, float]:
        """Return the learning rate of each kind of parameter; with a layer_decay, that of the uppermost layer."""
        rates: dict[str, float] = {}
        for group in self.param_groups:
            rates[group["name"]] = max(group["lr"], rates.get(group["name"], 0.0))
        return rates

    def set_learning_rate_factor(self, factor: float) -> None:
        """Scale every group's peak rate."""
        for group in self.param_groups:
            group["lr"] = factor * group["peak_learning_rate"]

    @property
    def num_updates(self) -> int:
        """Return the number of updates applied so far."""
        return int(next(iter(self.state.values()))["updates"])

    @num_updates.setter
    def num_updates(self, value: int) -> None:
        for state in self.state.values():
            state["updates"].fill_(value)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every tensor that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            flats = [flat for flat in group["params"] if flat.grad is not None]
            if group["method"] == "muon":
                for flat in flats:
                    self._muon(flat, group)
            elif flats:
                self._adamw(flats, group)
            if self.config.ema_decay is not None:
                for flat in flats:
                    self.state[flat]["ema"].lerp_(flat, 1 - self.config.ema_decay)

    def _adamw(self, flats: list[Tensor], group: dict[str, Any]) -> None:
        states = [self.state[flat] for flat in flats]
        adamw(
            flats,
            [flat.grad for flat in flats if flat.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["updates"] for state in states],
            fused=True,
            amsgrad=False,
            maximize=False,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            beta1=self.config.beta1,
            beta2=self.config.beta2,
            eps=self.config.eps,
        )

    def _muon(self, flat: Tensor, group: dict[str, Any]) -> None:
        state, momentum = self.state[flat], self.config.muon_momentum
        assert flat.grad is not None
        state["momentum"].lerp_(flat.grad, 1 - momentum)
        update = flat.grad.lerp(state["momentum"], momentum).view(-1).to(self.device)
        self.exchanges[flat].orthogonalize_(update, self.config.muon_num_iterations, self.arithmetic_dtype)
        flat.mul_(1 - group["lr"] * group["weight_decay"])
        flat.add_(update.to(flat.device).view_as(flat), alpha=-group["lr"])
        state["updates"] += 1
