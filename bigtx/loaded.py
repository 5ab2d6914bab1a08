"""A trained run in Python: `bigtx.load(RUN)` gives its model with methods that write, answer, predict and score."""

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
from bigtx.config.schema.finetuning import ANSWERING
from bigtx.engine.trained import Weights, find_with_tokenizer, read_model
from bigtx.utils.errors import ConfigError, DataError, LaunchError
from bigtx.utils.options import check_options, writing_options
from bigtx.utils.shell import command

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from bigtx.finetuning.prompts import Read
    from bigtx.finetuning.tasks.task import RecordTask
    from bigtx.model.transformer import Transformer
    from bigtx.model.write import OnText, Written
    from bigtx.tokenizer.tokenizer import Tokenizer


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
        self, prompt: str, *, raw: bool = False, on_text: Callable[[str], None] | None = None, **options: Any
    ) -> str:
        """Continue a text, or answer it if the run was fine-tuned to answer.

        Args:
            raw: continue it in any case.
            on_text: called with each piece of the new text as soon as it is known.
            options: max_new_tokens, temperature, top_k, top_p, seed (see `bigtx.model.decode.Sampling`), and stop: a
                text, or a list of texts, before which the new text ends.

        Returns:
            The new text, the prompt left out.

        Raises:
            ConfigError: the model writes nothing, or an option is unknown or out of range.
            DataError: the prompt is no text.
        """
        if not isinstance(prompt, str):
            raise DataError("the prompt is no text; write generate(TEXT), or generate_batch([TEXT, ...]) for several")
        return self._write_one(self.read(prompt, raw=raw, options=options), on_text, options)

    def generate_batch(
        self, prompts: Sequence[str], *, raw: bool = False, first_index: int = 0, **options: Any
    ) -> list[str]:
        """Continue or answer several texts side by side, each as it would be alone; options as for `generate`.

        An encoder-decoder reads each as its source and writes a text of its own.

        Args:
            first_index: the number of the first one among all prompts, where these are a part of them.

        Raises:
            ConfigError, DataError: as `generate`.
        """
        if not _is_list(prompts) or not all(isinstance(prompt, str) for prompt in prompts):
            raise DataError("the prompts are no list of texts; write generate_batch([TEXT, ...]), or generate(TEXT)")
        read = [self.read(prompt, raw=raw, options=options) for prompt in prompts]
        return [written.text for written in self.write(read, first_index=first_index, **options)]

    def chat(
        self, messages: Sequence[Mapping[str, Any]], *, on_text: Callable[[str], None] | None = None, **options: Any
    ) -> str:
        """Answer the last message of a chat.

        Args:
            messages: `[{"role": "user", "content": "..."}, ...]`, as in the records of fine-tuning; the last one is not
                the assistant's. Of a chat that is longer than the model's window the oldest turns are not read.
            on_text, options: as for `generate`.

        Returns:
            The text of the answer.

        Raises:
            ConfigError: the run was not trained on chats, or an option is unknown or out of range.
            DataError: the messages are no chat to answer.
        """
        if not isinstance(messages, list | tuple):
            raise DataError('the messages are no list; write chat([{"role": "user", "content": TEXT}])')
        return self._write_one(self.read(messages, options=options), on_text, options)

    def _write_one(self, read: Read, on_text: Callable[[str], None] | None, options: Mapping[str, Any]) -> str:
        if on_text is None:
            return self.write([read], **options)[0].text
        if not callable(on_text):
            raise ConfigError(f"on_text={on_text!r:.80}: a function of a text")
        return self.write([read], on_text=lambda index, text: on_text(text), **options)[0].text

    def read(self, prompt: str | Sequence[Mapping[str, Any]], *, raw: bool = False, options: Mapping[str, Any]) -> Read:
        """What the model reads of a prompt or a chat before it writes; see `generate` and `chat`.

        Args:
            options: as for `generate`; they say how much room a new text needs.

        Raises:
            ConfigError, DataError: as `generate` and `chat`.
        """
        refuse_wordless(self.config)
        max_new_tokens = writing_options(options)["max_new_tokens"]
        from bigtx.finetuning.prompts import read_prompt

        if not isinstance(prompt, str):
            refuse_chatless(self.config, str(run_dir_of(self.checkpoint)))
            if raw:
                raise ConfigError("raw: a chat cannot be continued as plain text; give a text")
        return read_prompt(self.config, self.tokenizer, prompt, raw=raw, max_new_tokens=max_new_tokens)

    def write(
        self, prompts: Sequence[Read], *, first_index: int = 0, on_text: OnText | None = None, **options: Any
    ) -> list[Written]:
        """Write a text for each of the prompts that `read` gave, side by side.

        Args:
            first_index: as for `generate_batch`.
            on_text: called with (number of the prompt, piece of its text) as soon as that is known.
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
        """What a fine-tuned model was made to do.

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
        if not _is_list(records):
            raise DataError("the records are no list of records; write predict([RECORD, ...])")
        from bigtx.data.records.record import Record
        from bigtx.finetuning.predictions import BATCH_SIZE, predict_records

        outcomes = predict_records(
            self.task,
            self.model,
            [Record(self.fields_of(given, number), "records", number) for number, given in enumerate(records, start=1)],
            batch_size=batch_size or BATCH_SIZE,
            device=next(self.model.parameters()).device,
        )
        predictions = []
        for outcome in outcomes:
            if outcome.prediction is None:
                raise DataError(outcome.error)
            predictions.append(outcome.prediction)
        return predictions

    def fields_of(self, given: Mapping[str, Any] | str, number: int) -> Mapping[str, Any]:
        """The fields of a record that is given by them, or by its text.

        Args:
            number: of the record, for messages.

        Raises:
            DataError: it is neither, or the task needs more than a text.
        """
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
            if given is None and name == "target_ids":
                continue
            if given is None or not _are_ids(given, model.vocab_size):
                raise DataError(f"{name} are not at least one whole number from 0 to {model.vocab_size - 1}")
            if model.positions == "learned" and len(given) > model.max_sequence_length:
                raise DataError(f"{len(given)} {name}: the model has {model.max_sequence_length} learned positions")


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _are_ids(values: Any, vocab_size: int) -> bool:
    if not hasattr(values, "__iter__") or not hasattr(values, "__len__") or not len(values):
        return False
    return all(isinstance(value, Integral) and 0 <= int(value) < vocab_size for value in values)


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
    if not isinstance(run, str | Path):
        raise ConfigError(f"the run {run!r:.80} is no path; write load(FOLDER)")
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


def refuse_chatless(config: RunConfig, run: str) -> None:
    """Refuse to chat with a model that has not learned to.

    Args:
        run: as the user named it.

    Raises:
        ConfigError: it writes nothing, or was not trained on chats.
    """
    refuse_wordless(config)
    generates, what = command("bigtx", "generate", run), "was pretrained on plain text"
    if isinstance(config, FinetuneConfig):
        what = f"was fine-tuned by task={config.task}"
    if isinstance(config, FinetuneConfig) and config.task in ANSWERING:
        if config.chat.format == "chat":
            return
        raise ConfigError(
            f"{run} answers single prompts and knows no turns of a chat (chat.format=plain, since its tokenizer has no "
            f"chat roles); {generates} prompt='...' gives such an answer"
        )
    if config.model.shape != "decoder":
        raise ConfigError(f"{run} {what}, and model.shape={config.model.shape} cannot chat; name a run of a decoder")
    tune = command("bigtx", "finetune", "finetune/chat.yaml", f"base={run}", "data.train=CHATS.jsonl", "run_dir=NEW")
    raise ConfigError(
        f"{run} {what} and has not learned to chat. {tune} teaches it by examples (docs/finetuning.md); {generates} "
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
        raise LaunchError(f"device {name!r} cannot be used: {reason}; device=auto takes what is there") from error
    return device
