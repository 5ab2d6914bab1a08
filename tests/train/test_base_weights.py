from __future__ import annotations

import pytest
import torch

from bigtx.config.schema import FinetuneConfig, LoraConfig, ModelConfig, OptimizerConfig
from bigtx.engine.trainable import refuse_untrained
from bigtx.finetuning.base import plan_transfer
from bigtx.model.transformer import Transformer
from bigtx.utils.errors import ConfigError

BASE = {"embedding.weight": (4, 2), "block.weight": (3, 3), "head.weight": (4, 2)}
MODEL = {"embedding.weight": (6, 2), "block.weight": (3, 3), "head.classes.weight": (2, 2)}


class Source:
    """A base whose elements are their places in the parameter."""

    def read(self, name: str, kind: str, start: int, stop: int) -> torch.Tensor:
        assert stop <= torch.Size(BASE[name]).numel()
        return torch.arange(start, stop, dtype=torch.float32)


def begun(name: str, kind: str, start: int, stop: int) -> torch.Tensor:
    return -torch.arange(start, stop, dtype=torch.float32) - 100


def test_what_becomes_of_each_parameter_is_told() -> None:
    transfer = plan_transfer(MODEL, BASE, name="runs/base")
    assert transfer.loaded == ["block.weight"]
    assert transfer.resized == {"embedding.weight": (4, 6)}
    assert transfer.new == ["head.classes.weight"] and transfer.dropped == ["head.weight"]
    assert transfer.describe() == (
        "1 parameters loaded; resized: embedding.weight (4 of 6 rows); new: head.classes.weight; dropped: head.weight"
    )
    assert transfer.to_dict()["resized"] == {"embedding.weight": {"rows_loaded": 4, "rows": 6}}


def test_ranges_come_from_where_they_belong() -> None:
    read = plan_transfer(MODEL, BASE, name="runs/base").read(Source(), begun)  # type: ignore[arg-type]
    assert read("block.weight", "master", 2, 5).tolist() == [2, 3, 4]
    assert read("head.classes.weight", "master", 1, 3).tolist() == [-101, -102]
    # A rank may hold any part of a table that grew: before the border, across it, behind it.
    assert read("embedding.weight", "master", 0, 3).tolist() == [0, 1, 2]
    assert read("embedding.weight", "master", 6, 10).tolist() == [6, 7, -108, -109]
    assert read("embedding.weight", "master", 9, 12).tolist() == [-109, -110, -111]


def test_a_table_that_shrank() -> None:
    shapes = {**MODEL, "embedding.weight": (3, 2)}
    transfer = plan_transfer(shapes, BASE, name="runs/base")
    assert transfer.resized == {"embedding.weight": (3, 3)}
    read = transfer.read(Source(), begun)  # type: ignore[arg-type]
    assert read("embedding.weight", "master", 0, 6).tolist() == [0, 1, 2, 3, 4, 5]


def test_another_shape_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"block\.weight \[3, 3\] there, \[3, 4\] here"):
        plan_transfer({**MODEL, "block.weight": (3, 4)}, BASE, name="runs/base")
    with pytest.raises(ConfigError, match=r"embedding\.weight"):
        plan_transfer({**MODEL, "embedding.weight": (4, 3)}, BASE, name="runs/base")


def test_an_encoder_made_of_a_decoder_reads_both_ways() -> None:
    """It answers as the decoder does where all of its tokens are a prefix."""
    sizes = {"vocab_size": 100, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "init_std": 0.3}
    decoder, encoder = Transformer(ModelConfig(**sizes)), Transformer(ModelConfig(**sizes, shape="encoder"))
    decoder.init_weights(1)
    encoder.init_weights(2)
    weights = dict(decoder.named_parameters())
    base = {name: tuple(weight.shape) for name, weight in weights.items()}
    shapes = {name: tuple(weight.shape) for name, weight in encoder.named_parameters()}
    transfer = plan_transfer(shapes, base, name="runs/base")
    assert transfer.loaded == list(shapes) and not transfer.new and not transfer.dropped
    assert "the encoder is made of the decoder's blocks" in transfer.describe()
    assert transfer.to_dict()["stack"] == {"from": "decoder", "to": "encoder"}

    class Held:
        def read(self, name: str, kind: str, start: int, stop: int) -> torch.Tensor:
            return weights[name].detach().flatten()[start:stop]

    read = transfer.read(Held(), begun)  # type: ignore[arg-type]
    with torch.no_grad():
        for name, weight in encoder.named_parameters():
            weight.copy_(read(name, "master", 0, weight.numel()).view_as(weight))
    tokens = torch.randint(100, (2, 9), generator=torch.Generator().manual_seed(1))
    read_both_ways = decoder(tokens, prefix_mask=torch.ones(2, 9, dtype=torch.bool))
    torch.testing.assert_close(encoder(tokens), read_both_ways)
    assert (encoder(tokens) - decoder(tokens)).abs().max() > 0.1


def test_distances_are_learned_anew_by_a_stack_that_reads_the_other_way() -> None:
    base = {f"decoder.{name}": (2, 2) for name in ("blocks.0.a.weight", "relative_bias.table.weight")}
    shapes = {name.replace("decoder", "encoder"): shape for name, shape in base.items()}
    transfer = plan_transfer(shapes, base, name="runs/base")
    assert transfer.loaded == ["encoder.blocks.0.a.weight"]
    assert transfer.new == ["encoder.relative_bias.table.weight"]
    assert transfer.dropped == ["decoder.relative_bias.table.weight"]


def test_a_stack_of_two_keeps_its_name() -> None:
    base = {"decoder.blocks.0.a.weight": (2, 2)}
    transfer = plan_transfer({"encoder.blocks.0.a.weight": (2, 2)} | base, base, name="runs/base")
    assert transfer.stack is None and transfer.loaded == list(base) and transfer.new == ["encoder.blocks.0.a.weight"]


@pytest.mark.parametrize(
    ("rank", "freeze", "name", "advice"),
    [
        (0, ["head.*"], "head.classes.weight", "leave them out of optimizer.freeze"),
        (2, [], "embedding.weight", "name them in optimizer.train_also"),
        (2, ["decoder.*"], "embedding.weight", "name them in optimizer.train_also"),
        (2, ["head.*"], "head.classes.weight", "leave them out of optimizer.freeze"),
        (2, ["emb*"], "embedding.weight", "leave them out of optimizer.freeze and name them in optimizer.train_also"),
    ],
)
def test_new_parameters_that_would_not_be_trained_are_refused(
    rank: int, freeze: list[str], name: str, advice: str
) -> None:
    config = FinetuneConfig(
        model=ModelConfig(lora=LoraConfig(rank=rank)),
        optimizer=OptimizerConfig(freeze=freeze),
    )
    refuse_untrained([name], ["decoder.norm.weight"], config)
    with pytest.raises(ConfigError, match=f"^{name}: new in this run, .*; {advice}$"):
        refuse_untrained([name], ["decoder.norm.weight", name], config)
