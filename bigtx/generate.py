"""`bigtx generate`: continue texts with a trained run. `load` gives the same, and predictions, to Python.

Nothing heavy is imported before the arguments, the prompts and the run folder have been found good.
"""

from __future__ import annotations

import functools
import json
import sys
import time
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigtx.config.runs import run_dir_of
from bigtx.config.schema import RunConfig
from bigtx.engine.trained import Weights, find, find_with_tokenizer, read_model
from bigtx.train.prediction_lines import as_line
from bigtx.utils.arguments import Arguments
from bigtx.utils.errors import ConfigError, DataError, LaunchError
from bigtx.utils.files import open_file
from bigtx.utils.options import SAMPLING, check_options

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from bigtx.model.decode import OnToken
    from bigtx.model.transformer import Transformer
    from bigtx.tokenizer.tokenizer import Tokenizer
    from bigtx.train.tasks.task import RecordTask

BATCH_SIZE = 16
"""Prompts of a file that are continued side by side."""


@dataclass(frozen=True)
class LoadedModel:
    """A trained model with its tokenizer, ready to use.

    Attributes:
        model: in evaluation mode; fp32 on a CPU, bf16 on a GPU.
        config: of the run.
        checkpoint: the folder that the weights came from.
    """

    model: Transformer
    tokenizer: Tokenizer
    config: RunConfig
    checkpoint: Path

    def generate(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 1,
        on_token: OnToken | None = None,
    ) -> str:
        """Continue a text; returns the continuation alone. See `bigtx.model.decode.generate`."""
        return self.generate_batch(
            [prompt],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            on_token=on_token,
        )[0]

    def generate_batch(self, prompts: Sequence[str], **options: Any) -> list[str]:
        """Continue several texts side by side, each as it would be alone; options as for `generate`.

        An encoder-decoder reads each as its source and writes a text of its own.

        Raises:
            ConfigError: the model is an encoder, or gives classes, and writes nothing; or an option is out of range.
            DataError: the prompts are no list of texts.
        """
        from bigtx.model.decode import generate

        refuse_wordless(self.config)
        if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
            raise DataError("the prompts are no list of texts; write generate_batch([TEXT, ...]), or generate(TEXT)")
        options = {"max_new_tokens": 128} | options
        check_options(options)
        return generate(self.model, self.tokenizer, prompts, **options)

    @functools.cached_property
    def task(self) -> RecordTask:
        """What a fine-tuned model was made to do.

        Raises:
            ConfigError: the run was pretrained.
        """
        from bigtx.train.predictions import task_config
        from bigtx.train.tasks import task_type

        config = task_config(self.config, str(run_dir_of(self.checkpoint)))
        return task_type(config.task)(config, self.tokenizer)

    def predict(
        self, records: Sequence[Mapping[str, Any] | str], *, batch_size: int | None = None
    ) -> list[dict[str, Any]]:
        """What a fine-tuned model makes of records.

        Args:
            records: named values, as in the lines of a .jsonl file: `[{"text": "..."}]`; answers need not be there.
                Plain texts, where the task needs one text of a record.
            batch_size: records side by side.

        Returns:
            A prediction for each, e.g. `{"label": ..., "probabilities": {...}}`.

        Raises:
            ConfigError: the run was pretrained, or the batch size is out of range.
            DataError: a record that cannot be used.
        """
        check_options({"batch_size": batch_size})
        if isinstance(records, str | Mapping):
            raise DataError("the records are no list of records; write predict([RECORD, ...])")
        from bigtx.data.records.record import Record
        from bigtx.train.predictions import BATCH_SIZE, predict_records

        outcomes = predict_records(
            self.task,
            self.model,
            [Record(self._fields(given, number), "records", number) for number, given in enumerate(records, start=1)],
            batch_size=batch_size or BATCH_SIZE,
            device=next(self.model.parameters()).device,
        )
        predictions = []
        for outcome in outcomes:
            if outcome.prediction is None:
                raise DataError(outcome.error)
            predictions.append(outcome.prediction)
        return predictions

    def _fields(self, given: Mapping[str, Any] | str, number: int) -> Mapping[str, Any]:
        """The fields of a record that came from Python."""
        if isinstance(given, Mapping):
            return given
        field = self.task.text_field
        if field is None:
            task = self.task.config.task
            raise DataError(f"record {number} is no mapping, and task={task} needs more of it than one text")
        if not isinstance(given, str):
            raise DataError(f"record {number} is neither a mapping nor a text; write {{{field!r}: TEXT}}, or TEXT")
        return {field: given}

    def logits(self, ids: Sequence[int], target_ids: Sequence[int] | None = None) -> Tensor:
        """Logits of what follows each of T token ids, or of an encoder for the tokens themselves.

        Args:
            ids: what a decoder or an encoder reads; of an encoder-decoder the source.
            target_ids: what the decoder of an encoder-decoder reads.

        Returns:
            fp32 [T, vocab_size] on the CPU.

        Raises:
            ConfigError: the model does not read ids alone, or gives none.
            DataError: ids that are not in its vocabulary, or more than it has positions for.
        """
        import torch

        self._check_ids(ids, target_ids)
        device = next(self.model.parameters()).device
        target_tokens = None if target_ids is None else torch.tensor([list(target_ids)], device=device)
        with torch.no_grad():
            return self.model(torch.tensor([list(ids)], device=device), target_tokens=target_tokens)[0].cpu()

    def _check_ids(self, ids: Sequence[int], target_ids: Sequence[int] | None) -> None:
        model = self.config.model
        if model.audio.num_mel_bins or model.num_classes is not None:
            what = "hears recordings" if model.audio.num_mel_bins else "sorts texts into classes"
            raise ConfigError(f"the model {what} and has no logits of token ids; see predict()")
        if (model.shape == "encoder_decoder") != (target_ids is not None):
            what = "needs target_ids" if target_ids is None else "has no target_ids"
            raise ConfigError(f"model.shape={model.shape} {what}: only the decoder of an encoder-decoder reads them")
        assert model.vocab_size is not None
        for name, given in (("ids", ids), ("target_ids", target_ids)):
            if given is None:
                continue
            if len(given) == 0 or not all(_is_id(value, model.vocab_size) for value in given):
                raise DataError(f"{name} are not at least one whole number from 0 to {model.vocab_size - 1}")
            if model.positions == "learned" and len(given) > model.max_sequence_length:
                raise DataError(f"{len(given)} {name}: the model has {model.max_sequence_length} learned positions")


def _is_id(value: Any, vocab_size: int) -> bool:
    return isinstance(value, Integral) and 0 <= int(value) < vocab_size


def load(run: Path | str, *, weights: Weights = "master", device: str = "auto") -> LoadedModel:
    """Open the newest checkpoint of a run, or the checkpoint whose folder is named.

    Args:
        weights: master, or ema for the averaged copy that runs with optimizer.ema_decay keep.
        device: auto (a GPU if there is one), cpu, cuda, cuda:1, ...

    Raises:
        CheckpointError: no such run, no checkpoint yet, or a damaged one.
        ConfigError: see `find`; or no such weights.
        LaunchError: no such device.
    """
    if weights not in typing.get_args(Weights):
        raise ConfigError(f"weights={weights!r} is none of {', '.join(typing.get_args(Weights))}")
    checkpoint, config, tokenizer = find_with_tokenizer(run)
    place = _device(device)
    import torch

    dtype = torch.float32 if place.type == "cpu" else torch.bfloat16
    model = read_model(checkpoint, config.model, device=place, dtype=dtype, weights=weights)
    return LoadedModel(model, tokenizer, config, checkpoint)


def refuse_wordless(config: RunConfig) -> None:
    """Refuse to write with a model that only reads.

    Raises:
        ConfigError: it is an encoder, or gives classes, or hears recordings.
    """
    if config.model.audio.num_mel_bins:
        raise ConfigError("the run hears recordings and reads no prompts; bigtx predict writes down what is said")
    if config.model.num_classes is not None:
        raise ConfigError(
            f"the run sorts texts into {config.model.num_classes} classes and writes none; bigtx predict says which "
            "class a text belongs to"
        )
    if config.model.shape == "encoder":
        raise ConfigError(
            "model.shape=encoder: an encoder reads texts and writes none; name a run of a decoder or an encoder-decoder"
        )


def _device(name: str) -> torch.device:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise LaunchError(f"device {name!r} cannot be used: {reason}; --device auto takes what is there") from error
    return device


def command(argv: Sequence[str]) -> int:
    """`bigtx generate`.

    Returns:
        The exit status.

    Raises:
        BigtxError: a run, prompts or settings that cannot be used.
    """
    arguments = _parser().parse_args(argv)
    check_options({name: getattr(arguments, name) for name in SAMPLING}, command_line=True)
    records = _read_prompts(Path(arguments.prompts_file)) if arguments.prompts_file else []
    refuse_wordless(find(arguments.run)[1])
    loaded = load(arguments.run, weights=arguments.weights, device=arguments.device)
    options = {
        "max_new_tokens": arguments.max_new_tokens,
        "temperature": arguments.temperature,
        "top_k": arguments.top_k,
        "top_p": arguments.top_p,
        "seed": arguments.seed,
    }
    started, num_tokens = time.monotonic(), 0

    def count(index: int, token: int) -> None:
        nonlocal num_tokens
        num_tokens += 1

    _remark_on_length(loaded, [record["prompt"] for record in records] or [arguments.prompt])
    if arguments.prompts_file:
        _answer_file(loaded, records, options, count)
    else:
        _answer_prompt(loaded, arguments.prompt, options, count)
    seconds = time.monotonic() - started
    print(f"[{loaded.checkpoint}: {num_tokens} tokens in {seconds:.1f} s]", file=sys.stderr)
    return 0


def _parser() -> Arguments:
    parser = Arguments(
        prog="bigtx generate",
        description="Continue prompts with a trained model: one on the terminal as it grows, or a file of them as "
        "JSON lines on standard output.",
    )
    parser.add_argument("run", metavar="RUN", help="folder of a run, or of one of its checkpoints")
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", metavar="TEXT", help="the text to continue; '' starts a new document")
    prompts.add_argument(
        "--prompts-file", metavar="FILE", help='.txt with a prompt on each line, or .jsonl with {"prompt": ...}'
    )
    parser.add_argument("--max-new-tokens", metavar="N", type=int, default=128, help="tokens of a continuation (128)")
    parser.add_argument("--temperature", metavar="X", type=float, default=0.8, help="0: the likeliest token (0.8)")
    parser.add_argument("--top-k", metavar="N", type=int, help="draw from the N likeliest tokens only (all)")
    parser.add_argument("--top-p", metavar="X", type=float, help="draw from the likeliest that reach X together (all)")
    parser.add_argument("--seed", metavar="N", type=int, default=1, help="another seed, another text (1)")
    parser.add_argument(
        "--weights", choices=["master", "ema"], default="master", help="ema: the averaged copy (master)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (auto: a GPU if there is one)")
    return parser


def _read_prompts(path: Path) -> list[dict[str, Any]]:
    """The records of a file of prompts; a text line becomes {"prompt": line}, and blank lines are left out."""
    if path.suffix not in (".txt", ".jsonl"):
        raise DataError(f"{path} is neither .txt (a prompt on each line) nor .jsonl (objects with a prompt)")
    try:
        with open_file(path) as file:
            lines = file.read().decode().split("\n")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error.reason} at byte {error.start + 1}") from error
    read = _json_record if path.suffix == ".jsonl" else _text_record
    records = [read(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1) if line.strip()]
    if not records:
        raise DataError(f"{path} holds no prompt; write one on each line")
    return records


def _text_record(line: str, where: str) -> dict[str, Any]:
    return {"prompt": line.removesuffix("\r")}


def _json_record(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where} is not JSON: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        raise DataError(f'{where} has no prompt; each line is an object like {{"prompt": "Once upon"}}')
    return record


def _remark_on_length(loaded: LoadedModel, prompts: Sequence[str]) -> None:
    """Say of which prompts the model reads the end alone."""
    window = loaded.config.model.max_sequence_length
    for number, prompt in enumerate(prompts, start=1):
        # No token stands for less than a byte, so that most prompts need not be encoded for this.
        if len(prompt.encode("utf-8", "surrogatepass")) <= window:
            continue
        num_tokens = len(_read_before(loaded, prompt))
        if num_tokens > window:
            which = "the prompt" if len(prompts) == 1 else f"prompt {number}"
            print(
                f"[{which} has {num_tokens:,} tokens; the model reads the last {window:,} (model.max_sequence_length)]",
                file=sys.stderr,
            )


def _read_before(loaded: LoadedModel, prompt: str) -> list[int]:
    """The ids of a prompt as the model reads them."""
    is_decoder = loaded.config.model.shape == "decoder"
    encode = loaded.tokenizer.encode_prompts if is_decoder else loaded.tokenizer.encode_sources
    return encode([prompt])[0]


def _answer_prompt(loaded: LoadedModel, prompt: str, options: dict[str, Any], count: OnToken) -> None:
    """Show a continuation as it grows."""
    is_decoder = loaded.config.model.shape == "decoder"
    stream = loaded.tokenizer.stream(after=_read_before(loaded, prompt) if is_decoder else ())

    def show(index: int, token: int) -> None:
        count(index, token)
        print(stream.push(token), end="", flush=True)

    if is_decoder:
        print(prompt, end="", flush=True)
    loaded.generate(prompt, on_token=show, **options)
    print(stream.flush())


def write_line(value: Mapping[str, Any]) -> None:
    """Write an object to standard output as a JSON line in UTF-8, whatever the encoding of the terminal."""
    sys.stdout.flush()
    sys.stdout.buffer.write(as_line(value))
    sys.stdout.buffer.flush()


def _answer_file(loaded: LoadedModel, records: list[dict[str, Any]], options: dict[str, Any], count: OnToken) -> None:
    """Print each record with its completion, in the file's order."""
    for start in range(0, len(records), BATCH_SIZE):
        batch = records[start : start + BATCH_SIZE]
        prompts = [record["prompt"] for record in batch]
        completions = loaded.generate_batch(prompts, first_index=start, on_token=count, **options)
        for record, completion in zip(batch, completions, strict=True):
            write_line(record | {"completion": completion})
