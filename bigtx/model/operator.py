"""Custom operators, each of which is one operation for torch.compile and selective checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def operator(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Decorate a function that becomes an operator of torch, on every device.

    `torch.library.custom_op` does the same, but imports torch's compiler at the first call: more than a second at the
    start of every run. What this function returns needs it only where something is compiled.

    Args:
        name: the name in `torch.ops`, e.g. bigtx::expert_products.

    Returns:
        A decorator for a function that changes none of its arguments and has annotated types; see
        `torch.library.register_fake` and `register_autograd` for what an operator needs in addition.
    """

    def register(function: Callable[..., Any]) -> Any:
        schema = torch.library.infer_schema(function, mutates_args=())
        torch.library.define(name, schema, tags=torch.Tag.pt2_compliant_tag)
        torch.library.impl(name, "default", function)
        namespace, _, short = name.partition("::")
        return getattr(getattr(torch.ops, namespace), short).default

    return register
