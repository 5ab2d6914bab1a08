"""The base, a run that fine-tuning starts from: its tokenizer, its weights, and base.json."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bigtx.config.load import load_run_config
from bigtx.config.runs import has_steps, run_dir_of
from bigtx.config.schema import FinetuneConfig
from bigtx.engine.checkpoint import preferred
from bigtx.engine.trained import TOKENIZER, read_tokenizer
from bigtx.finetuning.first_records import check_records
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.train.run_folder import BASE_FACTS, check_teacher
from bigtx.utils.errors import ConfigError
from bigtx.utils.files import read_object

BASE = "base.json"
"""The file in the run folder that records the base and the origin of each parameter."""


def check_inputs(config: FinetuneConfig, num_ranks: int) -> None:
    """Check the base, its tokenizer and the first records, before any rank is started. This does not import torch.

    Raises:
        BigtxError: the ranks would refuse an input for a reason that is known without the model.
    """
    run_dir = Path(config.run_dir)
    check_teacher(config)
    if config.base and not has_steps(run_dir):
        preferred(config.base)
    open_tokenizer(config, run_dir)
    check_records(config)


def open_tokenizer(config: FinetuneConfig, run_dir: Path) -> Tokenizer | None:
    """Return the tokenizer of the base, or the one that the config names; None if it is the teacher's.

    Raises:
        DataError, CheckpointError: the tokenizer cannot be used.
        ConfigError: the base has another tokenizer than the config names.
    """
    own, base = run_dir / TOKENIZER, config.base
    if base is None:
        return Tokenizer.load(config.tokenizer) if config.tokenizer else None
    if not (run_dir_of(base) / TOKENIZER).is_dir() and own.is_dir():
        return Tokenizer.load(own)  # The base is gone, but the run has copies of what it needs.
    tokenizer = read_tokenizer(base)
    if config.tokenizer and Tokenizer.load(config.tokenizer).fingerprint != tokenizer.fingerprint:
        raise ConfigError(
            f"tokenizer={config.tokenizer}: the base {base} has another tokenizer, so the same ids would mean "
            "different texts; leave tokenizer out, or write tokenizer=null"
        )
    return tokenizer


def read_base_facts(folder: Path) -> dict[str, Any]:
    """Return the content of base.json; empty if it is missing or damaged."""
    facts = read_object(folder / BASE)
    return facts if facts.keys() >= set(BASE_FACTS) else {}


def other_classes(config: FinetuneConfig, base: str, names: Iterable[str]) -> list[str]:
    """Return the parameters of the classification head, unless the base has the same classes.

    Args:
        names: parameters that both the base and the run have.
    """
    head = [name for name in names if name.startswith("head.classes.")]
    if not head:
        return []
    theirs = load_run_config(base)
    if isinstance(theirs, FinetuneConfig) and theirs.classify.classes == config.classify.classes:
        return []
    return head
