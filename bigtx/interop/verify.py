"""Whether transformers makes of an export what bigtx makes of the run: the same ids of texts, the same logits."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from bigtx.config.schema.model import ModelConfig
from bigtx.engine.checkpoint import Checkpoint
from bigtx.engine.merged import MergedCheckpoint
from bigtx.interop.exporter import DTYPES, ExportSettings, language_model
from bigtx.interop.family import Family
from bigtx.interop.tokenizer import compare_tokenizers
from bigtx.model.transformer import Transformer
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.utils.errors import CheckpointError, LaunchError

TOLERANCE = 1e-4
"""Of the largest difference, relative to the largest logit. fp32's rounding gives about 1e-6; a wrong mask, scale or
order gives 1e-2 and more."""

_ROWS = 2
_TOKENS = 96
_SEED = 1


@dataclass(frozen=True)
class Verdict:
    """What the comparison gave.

    Attributes:
        problems: one sentence for each difference; none if all is the same.
        difference: the largest of any logit, relative to the largest logit; None where the model did not load.
        num_logits: that were compared.
    """

    problems: list[str]
    difference: float | None
    num_logits: int


def require_transformers() -> None:
    """Do nothing where transformers is installed.

    Raises:
        LaunchError: it is not.
    """
    _require("transformers", "huggingface")


def require_peft() -> None:
    """Do nothing where PEFT is installed.

    Raises:
        LaunchError: it is not.
    """
    _require("peft", "peft")


def _require(package: str, extra: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise LaunchError(
            f"an export is compared with {package}, which is not installed: pip install 'bigtx[{extra}]', or export "
            "without the comparison (--no-verify)"
        )


def verify(
    folder: Path, family: Family, checkpoint: Path, config: ModelConfig, tokenizer: Tokenizer, settings: ExportSettings
) -> Verdict:
    """Load an export as its users will, and compare it with bigtx on random tokens.

    Both models compute in fp32 on the CPU, one after the other, so that memory holds one of them. bigtx's weights are
    rounded as the export's are, so that only the arithmetic is compared; adapters stay beside their matrices unless
    the sums were rounded.

    Raises:
        CheckpointError: the checkpoint cannot be read.
    """
    with _quiet():
        problems = [f"tokenizer: {line}" for line in compare_tokenizers(tokenizer, folder)]
    inputs = _random_inputs(config, tokenizer)
    own = _own_logits(checkpoint, config, settings, inputs)
    return _compared(own, lambda: _their_logits(folder, family, inputs), problems)


def verify_adapters(
    folder: Path,
    base: Path,
    family: Family,
    checkpoint: Path,
    config: ModelConfig,
    tokenizer: Tokenizer,
    weights: Literal["master", "ema"],
) -> Verdict:
    """The same for adapters that PEFT puts on a base in transformers' format.

    Raises:
        CheckpointError: the checkpoint cannot be read.
    """
    inputs = _random_inputs(config, tokenizer)
    own = _own_logits(checkpoint, config, ExportSettings(weights=weights), inputs)
    return _compared(own, lambda: _their_logits(base, family, inputs, adapters=folder), [])


def _compared(own: Tensor, compute: Callable[[], Tensor], problems: list[str]) -> Verdict:
    """Compare logits with those of the other side, beside problems that were found already."""
    try:
        theirs = compute()
    except Exception as error:
        # Whatever transformers finds wrong is a defect of the export, not of this comparison.
        return Verdict([*problems, f"transformers cannot load or run it: {type(error).__name__}: {error}"], None, 0)
    if theirs.shape != own.shape:
        problems.append(f"logits have shape {list(theirs.shape)} in transformers and {list(own.shape)} in bigtx")
        return Verdict(problems, None, 0)
    difference = float((own - theirs).abs().max() / own.abs().max().clamp(min=1e-6))
    if not math.isfinite(difference) or difference > TOLERANCE:
        problems.append(
            f"logits differ by {difference:.1e} of the largest logit, and rounding explains at most {TOLERANCE:.0e}"
        )
    return Verdict(problems, difference, own.numel())


def _random_inputs(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Tensor]:
    """Tokens of a seeded generator, under the names that transformers has for them.

    Padding is not among them: RoBERTa does not count it as a position.
    """
    assert config.vocab_size is not None
    generator = torch.Generator().manual_seed(_SEED)
    wanted = max(_TOKENS, 2 * config.attention_window if config.attention_window else 0)
    shape = (_ROWS, min(config.max_sequence_length, wanted, 1024))
    ids = torch.tensor([i for i in range(config.vocab_size) if i != tokenizer.pad_id])
    names = ("input_ids", "decoder_input_ids") if config.shape == "encoder_decoder" else ("input_ids",)
    return {name: ids[torch.randint(len(ids), shape, generator=generator)] for name in names}


def _own_logits(checkpoint: Path, config: ModelConfig, settings: ExportSettings, inputs: dict[str, Tensor]) -> Tensor:
    whole = settings.dtype == "fp32"
    model = Transformer(config if whole else language_model(config))
    source = Checkpoint(checkpoint) if whole else MergedCheckpoint(checkpoint)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            weight = source.read(name, settings.weights, 0, parameter.numel())
            parameter.copy_(weight.view(parameter.shape).to(DTYPES[settings.dtype]))
        logits = model.eval()(inputs["input_ids"], target_tokens=inputs.get("decoder_input_ids"))
    assert isinstance(logits, Tensor)
    return logits


def _their_logits(folder: Path, family: Family, inputs: dict[str, Tensor], *, adapters: Path | None = None) -> Tensor:
    import transformers

    loader: Any = getattr(transformers, family.auto_class)
    with _quiet():
        model, report = loader.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False, dtype=torch.float32, output_loading_info=True
        )
    if unmatched := {kind: sorted(keys) for kind, keys in report.items() if keys}:
        raise CheckpointError(f"its tensors are not those that the class has: {unmatched}")
    if adapters is not None:
        model = _with_adapters(model, adapters)
    with torch.no_grad():
        logits: Tensor = model.eval()(**inputs).logits
    return logits


def _with_adapters(model: Any, folder: Path) -> Any:
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # PEFT would go on without them.
        warnings.filterwarnings("error", message=".*missing adapter keys")
        return peft.PeftModel.from_pretrained(model, str(folder), local_files_only=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and warnings of transformers: what it finds wrong is reported in full."""
    from transformers.utils import logging

    shows_progress, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shows_progress:
            logging.enable_progress_bar()
