"""What torch.compile makes of blocks, of the loss and of FlexAttention: no breaks, few programs, no fp32 logits."""

from __future__ import annotations

import functools
import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.registry import lookup_backend
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition

from bigtx.config.schema import ExpertsConfig
from bigtx.model import attention, compiled, embed, transformer
from bigtx.model.compiled import compile_model, fused_loss_and_gradient, program
from bigtx.model.decode import Sampling, decode_tokens
from bigtx.model.loss import chunk_loss_and_gradient
from tests.model.test_shapes import T5
from tests.model.test_transformer import random_tokens, tiny_model

SLOW = pytest.mark.slow
KINDS: dict[str, dict[str, Any]] = {
    "decoder": {},
    "grouped": {"num_kv_heads": 2, "qk_norm": True},
    "dropout": {"dropout": 0.1},
    "experts": {"experts": ExpertsConfig(num_experts=4, num_active=2, expert_size=16, shared_size=8)},
    "encoder": {"shape": "encoder", "norm": "layer", "norm_placement": "post", "positions": "learned"},
    "window": {
        "shape": "encoder",
        "num_layers": 2,
        "attention_window": 4,
        "global_attention_every": 2,
        "embedding_norm": True,
    },
    "encoder-decoder": {"shape": "encoder_decoder", "num_kv_heads": 2},
    "T5": T5,
}


@pytest.fixture(autouse=True)
def _forget_programs() -> Iterator[None]:
    torch._dynamo.reset()
    compiled._report_limit.cache_clear()
    attention._compiled_flex_attention.cache_clear()
    yield
    torch._dynamo.reset()
    attention._compiled_flex_attention.cache_clear()


@pytest.fixture
def sparse_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes FlexAttention on the CPU as on a GPU, with a backward pass, which torch refuses a user there."""
    for module in (attention, transformer):
        monkeypatch.setattr(module, "has_sparse_kernels", lambda x: True)
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """Lists the programs that torch.compile makes, which run uncompiled."""
    made: list[torch.fx.GraphModule] = []
    eager = lookup_backend("eager")

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        made.append(graph)
        return eager(graph, inputs)

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    return made


def inputs_of(model: transformer.Transformer, length: int, **others: Tensor) -> dict[str, Tensor]:
    tokens = random_tokens(2, length)
    both = {"target_tokens": tokens} if model.config.shape == "encoder_decoder" else {}
    return {"tokens": tokens, "labels": tokens, **both, **others}


def documents(length: int) -> Tensor:
    return (torch.arange(length) // 11).expand(2, length)


def padding(length: int) -> Tensor:
    return torch.arange(length) >= torch.tensor([[length], [length - 3]])


@pytest.mark.parametrize(
    ("kind", "recompute"),
    [
        *((kind, "selective") for kind in KINDS),
        ("decoder", "none"),
        ("decoder", "full"),
        *(pytest.param(kind, recompute, marks=SLOW) for kind in [*KINDS][1:] for recompute in ("none", "full")),
    ],
)
def test_no_block_has_a_graph_break(kind: str, recompute: Any) -> None:
    model = tiny_model(**{"num_layers": 1} | KINDS[kind]).bfloat16().train()
    model.activation_checkpointing = recompute
    for block in model.blocks:
        block.forward = torch.compile(block.forward, backend="eager", dynamic=False, fullgraph=True)
    inputs = inputs_of(model, 16, segment_ids=documents(16))
    if model.config.shape == "encoder_decoder":
        inputs["target_segment_ids"] = documents(16)
    model(**inputs).loss_sum.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.usefixtures("sparse_kernels", "programs")
@pytest.mark.parametrize("recompute", [pytest.param("none", marks=SLOW), "selective", pytest.param("full", marks=SLOW)])
def test_flex_attention_breaks_no_block(recompute: Any) -> None:
    model = tiny_model(num_layers=1, num_kv_heads=2, head_width=16).train()
    model.activation_checkpointing = recompute
    losses = []
    for fullgraph in (False, True):
        if fullgraph:
            for block in model.blocks:
                block.forward = torch.compile(block.forward, backend="aot_eager", dynamic=False, fullgraph=True)
        losses.append(model(**inputs_of(model, 64, segment_ids=documents(64))).loss_sum)
        losses[-1].backward()
    torch.testing.assert_close(*losses)


LENGTHS = range(64, 64 + 8 * 24, 8)


@pytest.mark.usefixtures("sparse_kernels")
@pytest.mark.parametrize("compiles", [False, True])
def test_rows_of_24_lengths_need_a_few_programs(compiles: bool, programs: list[torch.fx.GraphModule]) -> None:
    """With documents, so that attention is FlexAttention: compiled by itself, or within the blocks."""
    model = tiny_model(num_kv_heads=2, head_width=16, max_sequence_length=256).train()
    if compiles:
        compile_model(model, torch.device("cpu"), dynamic=None)
    for length in LENGTHS:
        model(**inputs_of(model, length, segment_ids=documents(length))).loss_sum.backward()
    assert 1 <= len(programs) <= 5, "they do not depend on the number of lengths or of blocks"


@pytest.mark.usefixtures("sparse_kernels")
def test_padding_alone_needs_no_program(programs: list[torch.fx.GraphModule]) -> None:
    model = tiny_model(shape="encoder_decoder", head_width=16).train()
    for length in LENGTHS[:12]:
        model(**inputs_of(model, length, segment_ids=padding(length))).loss_sum.backward()
    assert not programs


@pytest.mark.usefixtures("sparse_kernels")
def test_heads_that_are_too_narrow_for_flex_attention_have_a_dense_mask(programs: list[torch.fx.GraphModule]) -> None:
    """On a GPU torch raises an error for fewer than 16 columns."""
    made = {}
    for width in (8, 16):
        model = tiny_model(num_kv_heads=2, head_width=width).train()
        model(**inputs_of(model, 64, segment_ids=documents(64))).loss_sum.backward()
        made[width] = len(programs)
    assert made == {8: 0, 16: 1}


@pytest.mark.usefixtures("sparse_kernels", "programs")
@pytest.mark.parametrize("kind", [{}, {"attention_window": 2}])
def test_generation_takes_no_flex_attention(kind: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs uncompiled, where FlexAttention would hold all scores: also of an encoder with a long source."""
    made: list[int] = []

    def noted(queries: attention.Side, keys: attention.Side, **named: Any) -> Any:
        made.append(queries.columns.shape[1])
        return block_mask(queries, keys, **named)

    block_mask = attention.block_mask
    monkeypatch.setattr(attention, "block_mask", noted)
    monkeypatch.setattr(attention, "MAX_DENSE", 1)
    model = tiny_model(shape="encoder_decoder", head_width=16, **kind)
    model.train()(**inputs_of(model, 16, segment_ids=padding(16)))
    assert len(made) >= 2
    made.clear()
    settings: dict[str, Any] = {
        "max_new_tokens": 3,
        "sampling": Sampling(temperature=0.0),
        "end_ids": (),
        "start_id": 1,
    }
    decode_tokens(model.eval(), model.config, [[3, 4, 5], [6, 7]], **settings)
    assert not made


def test_rows_of_equal_positions_share_one_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def noted(*arguments: Any, **named: Any) -> Any:
        made.append(embed.rotation(*arguments, **named))
        return made[-1]

    monkeypatch.setattr(transformer, "rotation", noted)
    tiny_model()(**inputs_of(tiny_model(), 16))
    assert [tuple(part.shape[:3]) for part in made[0]] == [(1, 1, 16)] * 2 and len(made) == 1


def test_the_limit_of_programs_is_reported_once(
    programs: list[torch.fx.GraphModule], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "MAX_PROGRAMS", 4)

    def doubled(x: Tensor) -> Tensor:
        return x * 2

    function = program(doubled, dynamic=False)
    with pytest.warns(UserWarning, match="4 programs of `doubled`"):
        for length in range(2, 9):
            function(torch.ones(length))
    assert capsys.readouterr().out.count("warning: torch.compile has made 4 programs of `doubled`") == 1
    assert len(programs) == 4


def chunk(dtype: torch.dtype, rows: int = 7, vocab_size: int = 500, columns: int = 512) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    logits = (3 * torch.randn(rows, columns, generator=generator)).to(dtype)
    labels = torch.randint(vocab_size, (rows,), generator=generator)
    labels[:2] = -100
    return logits, labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("soft_cap", [None, 3.0])
def test_the_loss_to_be_compiled_is_the_loss(
    soft_cap: float | None, label_smoothing: float, z_loss: float, dtype: torch.dtype
) -> None:
    logits, labels = chunk(dtype)
    settings = (labels, 500, soft_cap, z_loss, label_smoothing)
    ours = fused_loss_and_gradient(logits.clone(), *settings)
    expected = chunk_loss_and_gradient(logits.clone(), *settings)
    tolerance = 1e-5 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=1e-6)
    assert ours[2].dtype == dtype


@pytest.mark.skipif(not shutil.which("g++"), reason="Inductor needs a C++ compiler")
@pytest.mark.parametrize(("function", "has_copy"), [(fused_loss_and_gradient, False), (chunk_loss_and_gradient, True)])
def test_the_compiled_loss_has_no_fp32_copy_of_the_logits(function: Any, has_copy: bool) -> None:
    from torch._inductor.utils import run_and_get_code

    logits, labels = chunk(torch.bfloat16)
    expected = chunk_loss_and_gradient(logits.clone(), labels, 500, None, 1e-4)
    with torch.no_grad():
        found, (code, *_) = run_and_get_code(torch.compile(function, dynamic=False), logits, labels, 500, None, 1e-4)
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-5)
    buffers = re.findall(r"empty_strided_cpu\(\((\d+), (\d+)\), .*?torch\.(\w+)\)", code)
    assert ("7", "512", "bfloat16") in buffers
    assert (("7", "512", "float32") in buffers) == has_copy


@pytest.mark.usefixtures("sparse_kernels")
@pytest.mark.parametrize(("recompute", "is_repeated"), [("none", False), ("selective", False), ("full", True)])
def test_selective_recomputation_repeats_no_flex_attention(recompute: Any, is_repeated: bool) -> None:
    backward: list[torch.fx.GraphModule] = []

    def note(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        backward.append(graph)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(
        fw_compiler=lambda graph, inputs: make_boxed_func(graph.forward),
        bw_compiler=note,
        partition_fn=min_cut_rematerialization_partition,
    )
    model = tiny_model(head_width=16, num_layers=1).train()
    model.activation_checkpointing = recompute
    (block,) = model.blocks
    block.forward = torch.compile(block.forward, backend=backend, dynamic=False, fullgraph=True)
    model(**inputs_of(model, 64, segment_ids=documents(64))).loss_sum.backward()
    (graph,) = backward
    targets = [node.target for node in graph.graph.nodes]
    assert torch.ops.higher_order.flex_attention_backward in targets
    assert (torch.ops.higher_order.flex_attention in targets) == is_repeated
