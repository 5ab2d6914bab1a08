"""Mixtures of experts in Llama's architecture: Mixtral (arXiv:2401.04088), Qwen2-MoE and Qwen3-MoE.

transformers keeps the experts of a block in one tensor, and saves them one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from bigtx.config import shape
from bigtx.config.schema.model import ExpertsConfig, ModelConfig
from bigtx.interop.families.llama import BLOCK, OUTER, LlamaKin
from bigtx.interop.family import Family
from bigtx.interop.fields import Fields
from bigtx.interop.maps import Link, same, spelled, stacked
from bigtx.model.size import parameter_shapes
from bigtx.tokenizer.tokenizer import Tokenizer

MATRICES = ("gate", "up", "down")


@dataclass(frozen=True)
class Mixtral(LlamaKin):
    """MixtralForCausalLM: the weights of a token's experts sum to one."""

    mlp_key = "block_sparse_moe"
    expert_keys = ("w1", "w3", "w2")

    def read(self, fields: Fields) -> ModelConfig:
        """Return the config of a Llama with experts."""
        return replace(super().read(fields), experts=self.read_experts(fields))

    def read_experts(self, fields: Fields) -> ExpertsConfig:
        """Return the mixture; its experts have the width of the feed-forward."""
        num_active = fields.size("num_experts_per_tok", 2)
        return ExpertsConfig(
            num_experts=self.num_experts(fields, 8),
            num_active=num_active,
            expert_size=fields.size("intermediate_size"),
            balance_loss=self.balance_loss(fields, num_active),
        )

    def balance_loss(self, fields: Fields, num_active: int) -> float:
        """Return the weight of the same loss: transformers sums over a token's experts, and bigtx takes the mean over
        them.
        """
        return fields.number("router_aux_loss_coef", 0.001) * num_active

    def num_experts(self, fields: Fields, default: int) -> int:
        """Return the number of experts of each block; the field has two names."""
        return fields.size("num_experts" if "num_experts" in fields.values else "num_local_experts", default)

    def allowed(self, config: ModelConfig) -> dict[str, Sequence[Any]]:
        """Return the values of a Llama, except those of the experts."""
        number = config.experts.num_experts
        return super().allowed(config) | {"experts.num_experts": (number or "some",)} | self.allowed_experts(config)

    def allowed_experts(self, config: ModelConfig) -> dict[str, Sequence[Any]]:
        """Return the values of the experts' fields."""
        return {"experts.normalize_weights": (True,), "experts.shared_size": (0,)}

    def write_config(self, config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
        """Return the config.json of a config without problems."""
        values = super().write_config(config, tokenizer) | self.write_experts(config)
        return values | {"router_aux_loss_coef": config.experts.balance_loss / config.experts.num_active}

    def write_experts(self, config: ModelConfig) -> dict[str, Any]:
        """Return the fields of the mixture."""
        return {
            "num_local_experts": config.experts.num_experts,
            "num_experts_per_tok": config.experts.num_active,
            "intermediate_size": shape.expert_size(config),
        }

    def links(self, config: ModelConfig) -> list[Link]:
        """Link every parameter to its foreign name; a block's experts are separated."""
        keys = BLOCK | {
            "mlp.router": f"{self.mlp_key}.gate",
            "mlp.shared_gate": f"{self.mlp_key}.shared_expert_gate",
        }
        keys |= {f"mlp.shared.{part}": f"{self.mlp_key}.shared_expert.{part}_proj" for part in MATRICES}
        links = []
        for name in parameter_shapes(config):
            module, _, part = name.rpartition(".")
            if module.endswith(".mlp") and part in MATRICES:
                place = f"model.layers.{name.split('.')[2]}.{self.mlp_key}.experts"
                own = self.expert_keys[MATRICES.index(part)]
                links.append(
                    stacked(name, [f"{place}.{number}.{own}.weight" for number in range(config.experts.num_experts)])
                )
            else:
                links.append(same(name, spelled(name, OUTER, keys, "model.layers")))
        return links


@dataclass(frozen=True)
class QwenExperts(Mixtral):
    """Qwen's mixtures, with narrower experts than a feed-forward, and a gated expert for all tokens if `shared`."""

    shared: bool = False

    mlp_key = "mlp"
    expert_keys = ("gate_proj", "up_proj", "down_proj")

    def read_experts(self, fields: Fields) -> ExpertsConfig:
        """Return the mixture, which must be in every block."""
        fields.expect("decoder_sparse_step", 1, "leaves blocks without experts")
        fields.expect("mlp_only_layers", [], "leaves blocks without experts")
        num_active = fields.size("num_experts_per_tok", 4 if self.shared else 8)
        return ExpertsConfig(
            num_experts=self.num_experts(fields, 60 if self.shared else 128),
            num_active=num_active,
            expert_size=fields.size("moe_intermediate_size"),
            shared_size=fields.size("shared_expert_intermediate_size") if self.shared else 0,
            shared_gate=self.shared,
            normalize_weights=fields.flag("norm_topk_prob", False),
            balance_loss=self.balance_loss(fields, num_active),
        )

    def layer_types(self, fields: Fields, num_layers: int) -> list[str]:
        """Return which blocks have a window where `layer_types` is missing: every second one before
        `max_window_layers`.
        """
        used, last = fields.flag("use_sliding_window", False), fields.size("max_window_layers", 28, minimum=0)
        return [
            "sliding_attention" if used and layer % 2 == 0 and layer < last else "full_attention"
            for layer in range(num_layers)
        ]

    def allowed_experts(self, config: ModelConfig) -> dict[str, Sequence[Any]]:
        """Return the values of the experts' fields."""
        if not self.shared:
            return {"experts.shared_size": (0,)}
        return {"experts.shared_size": (config.experts.shared_size or "some",), "experts.shared_gate": (True,)}

    def write_experts(self, config: ModelConfig) -> dict[str, Any]:
        """Return the fields of the mixture."""
        experts = config.experts
        return {
            "num_experts": experts.num_experts,
            "num_experts_per_tok": experts.num_active,
            "moe_intermediate_size": shape.expert_size(config),
            "norm_topk_prob": experts.normalize_weights,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        } | ({"shared_expert_intermediate_size": experts.shared_size} if self.shared else {})


FAMILIES: tuple[Family, ...] = (
    Mixtral("mixtral", "MixtralForCausalLM", windows="all", norm_eps=1e-5, rope_theta=1e6, num_kv_heads=8),
    QwenExperts("qwen2_moe", "Qwen2MoeForCausalLM", biases="qkv_bias", windows="layers", shared=True),
    QwenExperts(
        "qwen3_moe", "Qwen3MoeForCausalLM", biases="attention_bias", windows="switch", qk_norm=True, num_kv_heads=4
    ),
)
