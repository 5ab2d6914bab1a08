"""The check that transformers computes the same from an export as bigtx from the run: ids of texts, and logits."""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from bigtx.config.schema import FinetuneConfig, ModelConfig, RunConfig
from bigtx.engine.checkpoint import Checkpoint, MergedCheckpoint
from bigtx.interop.classes import auto_class, pooling_of
from bigtx.interop.exporter import DTYPES, ExportSettings, without_adapters
from bigtx.interop.family import Family
from bigtx.interop.tokenizer import HARD_TEXTS, compare_tokenizers, load_tokenizer
from bigtx.model.layers import pooling_weights
from bigtx.model.transformer import Transformer
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.utils import errors
from bigtx.utils.errors import CheckpointError

TOLERANCE = 1e-4
"""The limit of the largest difference, relative to the largest logit. fp32's rounding gives about 1e-6; a wrong mask,
scale or order gives 1e-2 and more."""

_ROWS = 2
_TOKENS = 96
_LONGEST_TEXT = 512
"""The number of tokens of a pair of texts."""
_SEED = 1


@dataclass(frozen=True)
class Verdict:
    """The result of the comparison.

    Attributes:
        problems: one sentence for each difference; none if there is no difference.
        difference: the largest of any logit, relative to the largest logit; None if the model could not be loaded.
        num_logits: the number of logits that were compared.
        inputs: the inputs of these logits, in words.
    """

    problems: list[str]
    difference: float | None
    num_logits: int
    inputs: str = "random tokens"


class Inputs(NamedTuple):
    """A batch, in the form of bigtx's model and in that of transformers."""

    own: dict[str, Tensor]
    theirs: dict[str, Tensor]


def require(package: str, extra: str) -> None:
    """Check that the package that an export is compared with is installed.

    Args:
        extra: the extra of bigtx that installs it.

    Raises:
        LaunchError: it is not installed.
    """
    errors.require(
        package,
        f"an export is compared with {package}, which is not installed: pip install 'bigtx[{extra}]', or export "
        "without the comparison (--no-verify)",
    )


def verify(
    folder: Path,
    family: Family,
    checkpoint: Path,
    run: RunConfig,
    tokenizer: Tokenizer,
    settings: ExportSettings,
    base: Path | None = None,
) -> Verdict:
    """Load an export as its users do, and compare it with bigtx on random tokens; a classifier also on padded batches
    of texts and of pairs, as its own tokenizer makes them.

    Both models compute in fp32 on the CPU, one after the other, so that memory holds one of them. bigtx's weights are
    rounded as the export's are, so that only the arithmetic is compared; adapters stay separate from their matrices
    unless the sums were rounded.

    Args:
        base: if the export has adapters only: the model in transformers' format that PEFT adds them to. Its tokenizer
            is not compared.

    Raises:
        CheckpointError: the checkpoint cannot be read.
    """
    problems, inputs = list[str](), [_random_inputs(run, tokenizer)]
    if base is None:
        with _quiet():
            problems += [f"tokenizer: {line}" for line in compare_tokenizers(tokenizer, folder)]
            if isinstance(run, FinetuneConfig) and run.model.num_classes is not None:
                inputs += _text_inputs(run, tokenizer, folder)
    own, loader = _own_logits(checkpoint, run.model, settings, inputs), auto_class(family, run.model)
    compute = functools.partial(_their_logits, base or folder, loader, inputs, adapters=folder if base else None)
    verdict = _compared(own, compute, problems)
    return replace(verdict, inputs="texts, pairs and random tokens") if len(inputs) > 1 else verdict


def _compared(own: list[Tensor], compute: Callable[[], list[Tensor]], problems: list[str]) -> Verdict:
    """Compare logits with those of the other side, and add the problems that were found already."""
    try:
        theirs = compute()
    except Exception as error:
        # An error of transformers is a defect of the export, not of this comparison.
        return Verdict([*problems, f"transformers cannot load or run it: {type(error).__name__}: {error}"], None, 0)
    apart = []
    for mine, other in zip(own, theirs, strict=True):
        if mine.shape != other.shape:
            problems.append(f"logits have shape {list(other.shape)} in transformers and {list(mine.shape)} in bigtx")
            return Verdict(problems, None, 0)
        apart.append(float((mine - other).abs().max() / mine.abs().max().clamp(min=1e-6)))
    difference = max(apart, key=lambda one: (not math.isfinite(one), one))
    if not math.isfinite(difference) or difference > TOLERANCE:
        problems.append(
            f"logits differ by {difference:.1e} of the largest logit, but rounding explains at most {TOLERANCE:.0e}"
        )
    return Verdict(problems, difference, sum(logits.numel() for logits in own))


def _random_inputs(run: RunConfig, tokenizer: Tokenizer) -> Inputs:
    """Return tokens of a seeded generator.

    Padding is not among them: RoBERTa does not count it as a position.
    """
    config = run.model
    assert config.vocab_size is not None
    generator = torch.Generator().manual_seed(_SEED)
    wanted = max(_TOKENS, 2 * config.attention_window if config.attention_window else 0)
    shape = (_ROWS, min(config.max_sequence_length, wanted, 1024))
    ids = torch.tensor([i for i in range(config.vocab_size) if i != tokenizer.pad_id])
    names = {"tokens": "input_ids"}
    if config.shape == "encoder_decoder":
        names["target_tokens"] = "decoder_input_ids"
    drawn = {name: ids[torch.randint(len(ids), shape, generator=generator)] for name in names}
    theirs = {names[name]: tokens for name, tokens in drawn.items()}
    if (pooling := pooling_of(run)) is not None:
        drawn["pool"] = torch.from_numpy(pooling_weights(pooling, np.full(_ROWS, shape[1]), shape[1]))
    return Inputs(drawn, theirs)


def _text_inputs(run: FinetuneConfig, tokenizer: Tokenizer, folder: Path) -> list[Inputs]:
    """Return a padded batch of texts and one of pairs: as made by bigtx, and as made by the export's own tokenizer."""
    theirs = load_tokenizer(folder)
    room = (min(theirs.model_max_length, _LONGEST_TEXT) - tokenizer.num_special(2)) // 2
    names = [str(token) for token in theirs.get_added_vocab()]
    plain = [text for text in HARD_TEXTS if not any(name in text for name in names)]
    texts = [text for text, ids in zip(plain, tokenizer.encode_batch(plain), strict=True) if 0 < len(ids) <= room]
    found = []
    for rows in ([(text,) for text in texts], list(zip(texts, reversed(texts), strict=True))):
        if not rows:
            continue
        encoded = theirs(*map(list, zip(*rows, strict=True)), padding=True, return_tensors="pt")
        found.append(Inputs(_own_batch(run, tokenizer, rows), dict(encoded)))
    return found


def _own_batch(run: FinetuneConfig, tokenizer: Tokenizer, rows: Sequence[Sequence[str]]) -> dict[str, Tensor]:
    joined = [tokenizer.join(*tokenizer.encode_batch(row)) for row in rows]
    lengths = np.array([len(ids) for ids, _ in joined])
    width = int(lengths.max())
    tokens, types = (np.full((len(rows), width), fill, np.int64) for fill in (tokenizer.pad_id, 0))
    for place, (ids, kinds) in enumerate(joined):
        tokens[place, : len(ids)], types[place, : len(ids)] = ids, kinds
    batch = {
        "tokens": tokens,
        "segment_ids": np.arange(width) >= lengths[:, None],
        "pool": pooling_weights(run.classify.pooling, lengths, width),
    }
    if run.model.num_token_types > 1:
        batch["token_types"] = types
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def _own_logits(
    checkpoint: Path, config: ModelConfig, settings: ExportSettings, inputs: Sequence[Inputs]
) -> list[Tensor]:
    whole = settings.dtype == "fp32"
    model = Transformer(config if whole else without_adapters(config))
    source = Checkpoint(checkpoint) if whole else MergedCheckpoint(checkpoint)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            weight = source.read(name, settings.weights, 0, parameter.numel())
            parameter.copy_(weight.view(parameter.shape).to(DTYPES[settings.dtype]))
        model.eval()
        return [cast(Tensor, model(**batch.own)) for batch in inputs]


def _their_logits(folder: Path, loader: str, inputs: Sequence[Inputs], *, adapters: Path | None = None) -> list[Tensor]:
    import transformers

    with _quiet():
        model, report = getattr(transformers, loader).from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False, dtype=torch.float32, output_loading_info=True
        )
    if unmatched := {kind: sorted(keys) for kind, keys in report.items() if keys}:
        raise CheckpointError(f"its tensors are not those of the class: {unmatched}")
    if adapters is not None:
        model = _with_adapters(model, adapters)
    with torch.no_grad():
        model.eval()
        return [model(**batch.theirs).logits for batch in inputs]


def _with_adapters(model: Any, folder: Path) -> Any:
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # PEFT would continue without them.
        warnings.filterwarnings("error", message=".*missing adapter keys")
        return peft.PeftModel.from_pretrained(model, str(folder), local_files_only=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the progress bars and warnings of transformers: its errors are reported in full."""
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
