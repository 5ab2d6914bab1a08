"""Mixtures of experts in Llama's architecture: Mixtral (arXiv:2401.04088), Qwen2-MoE and Qwen3-MoE.

transformers keeps the experts of a block in one tensor, and saves them one by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bigtx.config.schema.model import ModelConfig
from bigtx.interop.families.decoders import BOTH_BIASES, NO_BIASES, llama_kin, llama_table
from bigtx.interop.families.positions import LayerWindows, SwitchedWindow, Window
from bigtx.interop.family import Family, Link, spelled, stacked
from bigtx.interop.table import Constant, Entry, Fields, Fixed, Row, fixed

MATRICES = ("gate", "up", "down")


class NumExperts(Entry):
    """The number of experts of each block, which has two names."""

    def read(self, fields: Fields, config: Any) -> None:
        """Set experts.num_experts."""
        key = "num_experts" if "num_experts" in fields.values else "num_local_experts"
        Entry(key, self.field, self.default).read(fields, config)


class BalanceLoss(Row):
    """The weight of the same loss: transformers sums over a token's experts, and bigtx takes the mean over them."""

    KEY = "router_aux_loss_coef"

    def read(self, fields: Fields, config: ModelConfig) -> None:
        """Set experts.balance_loss."""
        config.experts.balance_loss = fields.number(self.KEY, 0.001) * config.experts.num_active

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Return transformers' weight."""
        return {self.KEY: config.experts.balance_loss / config.experts.num_active}


def qwen_experts(num_experts: int, num_active: int) -> tuple[Row, ...]:
    """Return the rows of Qwen's mixtures, with narrower experts than a feed-forward, in every block.

    Args:
        num_experts, num_active: the defaults.
    """
    return (
        NumExperts("num_experts", "experts.num_experts", num_experts),
        Entry("num_experts_per_tok", "experts.num_active", num_active),
        Entry("moe_intermediate_size", "experts.expert_size"),
        Entry("norm_topk_prob", "experts.normalize_weights", False),
        Constant("decoder_sparse_step", 1, "leaves blocks without experts"),
        Constant("mlp_only_layers", [], "leaves blocks without experts"),
        BalanceLoss(),
        *fixed(mlp_bias=False),
    )


@dataclass(frozen=True, kw_only=True)
class Experts(Family):
    """Experts that are saved one by one.

    Attributes:
        mlp_key: the module of the mixture in a block.
        expert_keys: the matrices of an expert, in the order of `MATRICES`.
    """

    mlp_key: str = "mlp"
    expert_keys: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")

    def key(self, name: str, config: ModelConfig) -> str:
        """Return the foreign key of a parameter."""
        mixture = {"mlp.router": "gate", "mlp.shared_gate": "shared_expert_gate"}
        mixture |= {f"mlp.shared.{part}": f"shared_expert.{part}_proj" for part in MATRICES}
        block = {**self.block, **{module: f"{self.mlp_key}.{key}" for module, key in mixture.items()}}
        return spelled(name, self.outer, block, self.layers)

    def link(self, name: str, config: ModelConfig) -> Link | None:
        """Return the link of a parameter; a block's experts are separated."""
        module, _, part = name.rpartition(".")
        if not module.endswith(".mlp") or part not in MATRICES:
            return super().link(name, config)
        place = f"{self.layers}.{name.split('.')[2]}.{self.mlp_key}.experts"
        own = self.expert_keys[MATRICES.index(part)]
        return stacked(name, [f"{place}.{number}.{own}.weight" for number in range(config.experts.num_experts)])


FAMILIES: tuple[Family, ...] = (
    llama_kin(
        "mixtral",
        "MixtralForCausalLM",
        llama_table(
            NumExperts("num_local_experts", "experts.num_experts", 8),
            Entry("num_experts_per_tok", "experts.num_active", 2),
            # The experts have the width of the feed-forward.
            Entry("intermediate_size", "experts.expert_size"),
            Fixed("experts.normalize_weights", (True,)),
            Fixed("experts.shared_size", (0,)),
            BalanceLoss(),
            *NO_BIASES,
            *fixed(mlp_bias=False),
            Window(None),
            norm_eps=1e-5,
            rope_theta=1e6,
            num_kv_heads=8,
        ),
        Experts,
        mlp_key="block_sparse_moe",
        expert_keys=("w1", "w3", "w2"),
    ),
    llama_kin(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        llama_table(
            *qwen_experts(60, 4),
            # An expert for all tokens, with a gate.
            Entry("shared_expert_intermediate_size", "experts.shared_size"),
            Fixed("experts.shared_gate", (True,)),
            Entry("qkv_bias", "attention_bias", True),
            *fixed(attention_output_bias=False),
            LayerWindows(alternates=True),
        ),
        Experts,
    ),
    llama_kin(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        llama_table(
            *qwen_experts(128, 8),
            Fixed("experts.shared_size", (0,)),
            *BOTH_BIASES,
            SwitchedWindow(),
            qk_norm=True,
            num_kv_heads=4,
        ),
        Experts,
    ),
)
