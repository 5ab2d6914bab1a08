"""A trained run in Python: `bigtx.load(RUN)` returns its model, with methods that generate, chat, predict and score."""

from __future__ import annotations

import functools
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigtx.config.runs import run_dir_of
from bigtx.config.schema import FinetuneConfig, RunConfig
from bigtx.config.schema.tasks import ANSWERING
from bigtx.engine.trained import Weights, find_with_tokenizer, read_model
from bigtx.utils.errors import ConfigError, DataError, LaunchError
from bigtx.utils.options import check_options, writing_options
from bigtx.utils.shell import command

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from bigtx.finetuning.tasks.chats import Read
    from bigtx.finetuning.tasks.task import RecordTask
    from bigtx.model.transformer import Transformer
    from bigtx.model.write import OnText, Written
    from bigtx.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class LoadedModel:
    """A trained model with its tokenizer, ready to use.

    Attributes:
        model: the model in evaluation mode; fp32 on a CPU, bf16 on a GPU.
        config: the config of the run.
        checkpoint: the folder that the weights came from.
    """

    model: Transformer
    tokenizer: Tokenizer
    config: RunConfig
    checkpoint: Path

    def generate(
        self, prompt: str, *, raw: bool = False, on_text: Callable[[str], None] | None = None, **options: Any
    ) -> str:
        """Continue a text, or answer it if the run was fine-tuned to answer.

        Args:
            raw: continue the text in any case.
            on_text: called with each piece of the new text as soon as it is known.
            options: max_new_tokens, temperature, top_k, top_p, seed (see `bigtx.model.decode.Sampling`), and stop: a
                text, or a list of texts, before which the new text ends.

        Returns:
            The new text, without the prompt.

        Raises:
            ConfigError: the model cannot generate text, or an option is unknown or out of range.
            DataError: the prompt is not a text.
        """
        if not isinstance(prompt, str):
            raise DataError("the prompt is not a text; write generate(TEXT), or generate_batch([TEXT, ...])")
        return self._write_one(self.read(prompt, raw=raw, options=options), on_text, options)

    def generate_batch(
        self, prompts: Sequence[str], *, raw: bool = False, first_index: int = 0, **options: Any
    ) -> list[str]:
        """Continue or answer several texts in one batch; each result is as without the others.

        An encoder-decoder reads each prompt as its source and writes a new text.

        Args:
            first_index: the number of the first prompt among all prompts, if these are only a part of them.
            raw, options: as for `generate`.

        Raises:
            ConfigError, DataError: as `generate`.
        """
        if not _is_list(prompts) or not all(isinstance(prompt, str) for prompt in prompts):
            raise DataError("the prompts are not a list of texts; write generate_batch([TEXT, ...]), or generate(TEXT)")
        read = [self.read(prompt, raw=raw, options=options) for prompt in prompts]
        return [written.text for written in self.write(read, first_index=first_index, **options)]

    def chat(
        self, messages: Sequence[Mapping[str, Any]], *, on_text: Callable[[str], None] | None = None, **options: Any
    ) -> str:
        """Answer the last message of a chat.

        Args:
            messages: `[{"role": "user", "content": "..."}, ...]`, as in the records of fine-tuning; the last one is not
                the assistant's. If the chat is longer than the model's window, the oldest turns are not read.
            on_text, options: as for `generate`.

        Returns:
            The text of the answer.

        Raises:
            ConfigError: the run was not trained on chats, or an option is unknown or out of range.
            DataError: the messages are not a chat that can be answered.
        """
        if not isinstance(messages, list | tuple):
            raise DataError('the messages are not a list; write chat([{"role": "user", "content": TEXT}])')
        return self._write_one(self.read(messages, options=options), on_text, options)

    def _write_one(self, read: Read, on_text: Callable[[str], None] | None, options: Mapping[str, Any]) -> str:
        if on_text is None:
            return self.write([read], **options)[0].text
        if not callable(on_text):
            raise ConfigError(f"on_text={on_text!r:.80}: a function of a text")
        return self.write([read], on_text=lambda index, text: on_text(text), **options)[0].text

    def read(self, prompt: str | Sequence[Mapping[str, Any]], *, raw: bool = False, options: Mapping[str, Any]) -> Read:
        """Return what the model reads of a prompt or a chat before it writes; see `generate` and `chat`.

        Args:
            options: as for `generate`; they determine how many tokens are reserved for the new text.

        Raises:
            ConfigError, DataError: as `generate` and `chat`.
        """
        refuse_wordless(self.config)
        max_new_tokens = writing_options(options)["max_new_tokens"]
        from bigtx.finetuning.tasks.chats import read_prompt

        if not isinstance(prompt, str):
            refuse_chatless(self.config, str(run_dir_of(self.checkpoint)))
            if raw:
                raise ConfigError("raw: a chat cannot be continued as plain text; give a text")
        return read_prompt(self.config, self.tokenizer, prompt, raw=raw, max_new_tokens=max_new_tokens)

    def write(
        self, prompts: Sequence[Read], *, first_index: int = 0, on_text: OnText | None = None, **options: Any
    ) -> list[Written]:
        """Write a text for each of the prompts that `read` returned, in one batch.

        Args:
            first_index: as for `generate_batch`.
            on_text: called with (number of the prompt, piece of its text) as soon as the piece is known.
            options: as for `generate`.
        """
        from bigtx.model.decode import Sampling
        from bigtx.model.write import write

        settings = writing_options(options)
        max_new_tokens, stop = settings.pop("max_new_tokens"), settings.pop("stop")
        return write(
            self.model,
            self.tokenizer,
            [read.prompt for read in prompts],
            max_new_tokens=max_new_tokens,
            sampling=Sampling(**settings),
            stop=stop,
            first_index=first_index,
            on_text=on_text,
        )

    @functools.cached_property
    def task(self) -> RecordTask:
        """Return the task that the model was fine-tuned for.

        Raises:
            ConfigError: the run was pretrained.
        """
        from bigtx.finetuning.predictions import task_config
        from bigtx.finetuning.tasks import task_type

        config = task_config(self.config, str(run_dir_of(self.checkpoint)))
        return task_type(config.task)(config, self.tokenizer)

    def predict(
        self, records: Sequence[Mapping[str, Any] | str], *, batch_size: int | None = None
    ) -> list[dict[str, Any]]:
        """Predict for records with a fine-tuned model.

        Args:
            records: mappings, as in the lines of a .jsonl file: `[{"text": "..."}]`; answers are not needed.
                They may be plain texts if the task needs one text of a record.
            batch_size: the number of records in a batch.

        Returns:
            A prediction for each record, e.g. `{"label": ..., "probabilities": {...}}`.

        Raises:
            ConfigError: the run was pretrained, or the batch size is out of range.
            DataError: a record cannot be used.
        """
        check_options({"batch_size": batch_size})
        if not _is_list(records):
            raise DataError("the records are not a list of records; write predict([RECORD, ...])")
        from bigtx.data.records.record import Record
        from bigtx.finetuning.predictions import BATCH_SIZE, predict_records

        outcomes = predict_records(
            self.task,
            self.model,
            [Record(self.fields_of(given, number), "records", number) for number, given in enumerate(records, start=1)],
            batch_size=batch_size or BATCH_SIZE,
            device=next(self.model.parameters()).device,
        )
        for outcome in outcomes:
            if outcome.prediction is None:
                raise DataError(outcome.error)
        return [outcome.prediction for outcome in outcomes if outcome.prediction is not None]

    def fields_of(self, given: Mapping[str, Any] | str, number: int) -> Mapping[str, Any]:
        """Return the fields of a record, which is given as a mapping of fields or as a text.

        Args:
            number: the number of the record, for messages.

        Raises:
            DataError: the record is neither, or the task needs more than a text.
        """
        if isinstance(given, Mapping):
            return given
        field = self.task.text_field
        if field is None:
            task = self.task.config.task
            raise DataError(f"record {number} is not a mapping, and task={task} needs more fields than one text")
        if not isinstance(given, str):
            raise DataError(f"record {number} is neither a mapping nor a text; write {{{field!r}: TEXT}}, or TEXT")
        return {field: given}

    def logits(self, ids: Sequence[int], target_ids: Sequence[int] | None = None) -> Tensor:
        """Compute the logits of the token after each of T token ids; for an encoder, of the tokens themselves.

        Args:
            ids: the ids that a decoder or an encoder reads; for an encoder-decoder, the source.
            target_ids: the ids that the decoder of an encoder-decoder reads.

        Returns:
            fp32 [T, vocab_size] on the CPU.

        Raises:
            ConfigError: the model does not read only ids, or has no logits of ids.
            DataError: there are ids outside the vocabulary, or more ids than positions.
        """
        import torch

        self._check_ids(ids, target_ids)
        device = next(self.model.parameters()).device
        target_tokens = None if target_ids is None else torch.tensor([list(target_ids)], device=device)
        with torch.no_grad():
            logits: Tensor = self.model(torch.tensor([list(ids)], device=device), target_tokens=target_tokens)
        return logits[0].cpu()

    def _check_ids(self, ids: Sequence[int], target_ids: Sequence[int] | None) -> None:
        model = self.config.model
        if model.audio.num_mel_bins or model.num_classes is not None:
            what = "reads recordings" if model.audio.num_mel_bins else "classifies texts"
            raise ConfigError(f"the model {what} and has no logits of token ids; see predict()")
        if (model.shape == "encoder_decoder") != (target_ids is not None):
            what = "needs target_ids" if target_ids is None else "has no target_ids"
            raise ConfigError(f"model.shape={model.shape} {what}: only the decoder of an encoder-decoder reads them")
        assert model.vocab_size is not None
        for name, given in (("ids", ids), ("target_ids", target_ids)):
            if given is None and name == "target_ids":
                continue
            if given is None or not _are_ids(given, model.vocab_size):
                raise DataError(f"{name} must be one or more whole numbers from 0 to {model.vocab_size - 1}")
            if model.positions == "learned" and len(given) > model.max_sequence_length:
                raise DataError(f"{len(given)} {name}: the model has {model.max_sequence_length} learned positions")


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _are_ids(values: Any, vocab_size: int) -> bool:
    if not hasattr(values, "__iter__") or not hasattr(values, "__len__") or not len(values):
        return False
    return all(isinstance(value, Integral) and 0 <= int(value) < vocab_size for value in values)


def load(run: Path | str, *, weights: Weights = "master", device: str = "auto") -> LoadedModel:
    """Load the newest checkpoint of a run, or the checkpoint whose folder is named.

    Args:
        run: the folder of a run, or of one of its checkpoints.
        weights: master, or ema for the averaged copy of runs with optimizer.ema_decay.
        device: auto (a GPU if there is one), cpu, cuda, cuda:1, ...

    Raises:
        CheckpointError: there is no such run, or its checkpoint is missing or damaged.
        ConfigError: see `find`; or there are no such weights.
        LaunchError: there is no such device.
    """
    if not isinstance(run, str | Path):
        raise ConfigError(f"the run {run!r:.80} is not a path; write load(FOLDER)")
    if weights not in typing.get_args(Weights):
        raise ConfigError(f"weights={weights!r} is not one of {', '.join(typing.get_args(Weights))}")
    checkpoint, config, tokenizer = find_with_tokenizer(run)
    place = _device(device)
    import torch

    dtype = torch.float32 if place.type == "cpu" else torch.bfloat16
    model = read_model(checkpoint, config.model, device=place, dtype=dtype, weights=weights)
    return LoadedModel(model, tokenizer, config, checkpoint)


def refuse_wordless(config: RunConfig) -> None:
    """Refuse to generate text with a model that cannot.

    Raises:
        ConfigError: the model is an encoder, a classifier or a speech model.
    """
    if config.model.audio.num_mel_bins:
        raise ConfigError("the run transcribes recordings and reads no prompts; bigtx predict writes the transcripts")
    if config.model.num_classes is not None:
        raise ConfigError(
            f"the run classifies texts into {config.model.num_classes} classes and cannot write texts; bigtx predict "
            "prints the class of each text"
        )
    if config.model.shape == "encoder":
        raise ConfigError(
            "model.shape=encoder: an encoder cannot write texts; name a run of a decoder or an encoder-decoder"
        )


def refuse_chatless(config: RunConfig, run: str) -> None:
    """Refuse to chat with a model that was not trained on chats.

    Args:
        run: the run as the user named it.

    Raises:
        ConfigError: the model cannot write texts, or was not trained on chats.
    """
    refuse_wordless(config)
    generates, what = command("bigtx", "generate", run), "was pretrained on plain text"
    if isinstance(config, FinetuneConfig):
        what = f"was fine-tuned with task={config.task}"
    if isinstance(config, FinetuneConfig) and config.task in ANSWERING:
        if config.chat.format == "chat":
            return
        raise ConfigError(
            f"{run} answers single prompts, not chats of several turns (chat.format=plain, because its tokenizer has "
            f"no chat roles); {generates} prompt='...' gives such an answer"
        )
    if config.model.shape != "decoder":
        raise ConfigError(f"{run} {what}, and model.shape={config.model.shape} cannot chat; name a run of a decoder")
    tune = command("bigtx", "finetune", "finetune/chat.yaml", f"base={run}", "data.train=CHATS.jsonl", "run_dir=NEW")
    raise ConfigError(
        f"{run} {what} and was not trained on chats. {tune} trains it on chats (docs/finetuning.md); {generates} "
        "prompt='...' continues a text"
    )


def _device(name: str) -> torch.device:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise LaunchError(
            f"device {name!r} cannot be used: {reason}; device=auto uses a GPU if there is one"
        ) from error
    return device
