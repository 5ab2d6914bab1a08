"""The better of two answers, by direct preference optimization (DPO, arXiv:2305.18290) on a decoder; see chats.py for
the formats.

    margin = beta ((log p(chosen) - log q(chosen)) - (log p(rejected) - log q(rejected)))
    loss   = -(1 - e) log sigmoid(margin) - e log sigmoid(-margin)

p is the model, q the model as it was before the first step: its log-probabilities are made once (reference.py). e is
preference.label_smoothing, the probability that a pair is the wrong way round.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bigtx.config.schema import FinetuneConfig
from bigtx.data.records.record import BadRecordError, Record
from bigtx.engine.task import TaskLoss
from bigtx.finetuning.tasks.chats import (
    ChatFormat,
    Message,
    resolve_chat_format,
    review_chats,
    without_empty_answer,
    write_answers,
)
from bigtx.finetuning.tasks.sft import shown_prompt
from bigtx.finetuning.tasks.task import (
    LENGTH_MULTIPLE,
    Examples,
    Lengths,
    Model,
    Prediction,
    RecordTask,
    ids_of,
    on_device,
    padded,
    pinned,
)
from bigtx.model.loss import IGNORED
from bigtx.tokenizer.chat import ASSISTANT
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.track.tracker import Better
from bigtx.utils.errors import DataError


@dataclass(frozen=True, slots=True)
class PreferenceExample:
    """A prompt and two answers as ids.

    Attributes:
        prompt: int32, up to where an answer begins.
        chosen, rejected: int32, with the end id; both empty where there are none.
        num_cut: ids that were too many.
        reference: log-probabilities of both answers before the first step, in nats.
        lost_start: see `Chat`.
    """

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    num_cut: int
    reference: tuple[float, float] | None = None
    lost_start: bool = False

    @property
    def length(self) -> int:
        """Tokens of the longer side."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected)) - 1

    @property
    def has_answers(self) -> bool:
        """Whether there is something to compare."""
        return len(self.chosen) > 0

    @property
    def is_equal(self) -> bool:
        """Whether nothing tells both answers apart, because where they differ was cut."""
        return self.has_answers and np.array_equal(self.chosen, self.rejected)


@dataclass(frozen=True)
class PreferenceBatch:
    """B pairs, in 2 B rows of T columns: first the chosen answers, then the rejected ones.

    Attributes:
        tokens, labels: int64 [2 B, T]; labels are the next tokens of answers, or IGNORED; padding is on the right.
        reference: fp32 [B, 2], log-probabilities of chosen and rejected before the first step.
        num_tokens: padding left out.
        sequence_ids: int64 [2 B], numbers of the rows in the run, two of each record; None where nothing is drawn.
        text_lengths: int64 [2 B], columns of each row that are no padding.
    """

    tokens: Tensor
    labels: Tensor
    reference: Tensor
    num_tokens: int
    sequence_ids: Tensor | None
    text_lengths: Tensor

    @property
    def num_labels(self) -> int:
        """Pairs."""
        return len(self.reference)

    def to(self, device: torch.device) -> PreferenceBatch:
        """The batch on a device."""
        return on_device(self, device)

    def inputs(self) -> dict[str, Tensor | None]:
        """What the model is called with."""
        return {name: part for name, part in vars(self).items() if name not in ("reference", "num_tokens")}


class Preference(RecordTask):
    """Learn which of two answers is better."""

    metric = "loss"
    better: ClassVar[Mapping[str, Better]] = {
        "loss": "lower",
        "margin": "higher",
        "accuracy": "higher",
        "reward_margin": "higher",
        "reward_accuracy": "higher",
        "chosen_reward": "neither",
        "rejected_reward": "neither",
    }
    needs_reference = True

    def __init__(self, config: FinetuneConfig, tokenizer: Tokenizer) -> None:
        super().__init__(config, tokenizer)
        self.settings = config.preference
        self.format = ChatFormat(config, tokenizer, self.max_length)
        self.require_length(self.format.min_length)

    @classmethod
    def resolve(cls, config: FinetuneConfig, tokenizer: Tokenizer, records: Sequence[Record]) -> FinetuneConfig:
        """The format of chats, and the head of tokens.

        Raises:
            ConfigError: no decoder, or a format that the tokenizer does not have.
        """
        return super().resolve(resolve_chat_format(config, tokenizer), tokenizer, records)

    def encode(self, record: Record, *, for_training: bool = True) -> PreferenceExample:
        """The ids of a prompt and both answers; for prediction also of a prompt alone."""
        prompt, answers = self._divide(record, for_training)
        sides = zip((self.fields.chosen, self.fields.rejected), answers, strict=False)  # For prediction there are none.
        ids = [self.format.answer(field, answer) for field, answer in sides]
        if for_training and ids[0] == ids[1]:
            raise BadRecordError(f"the fields {self.fields.chosen!r} and {self.fields.rejected!r} are the same answer")
        chat = self.format.fit(self.format.parts(prompt, learn=False), ids)
        chosen, rejected = (np.array(side, np.int32) for side in chat.answers or ([], []))
        return PreferenceExample(
            np.array(chat.prompt, np.int32), chosen, rejected, chat.num_cut, lost_start=chat.lost_start
        )

    def review(self, splits: Mapping[str, Examples]) -> list[str]:
        """What of the pairs is not learned.

        Raises:
            DataError: too many pairs are the same answer twice once they are cut.
        """
        fields = self.fields
        said = review_chats(splits, [fields.prompt, fields.messages, fields.chosen, fields.rejected])
        for name, split in splits.items():
            equal = [record for record, example in zip(split.records, split.examples, strict=True) if example.is_equal]
            if not equal:
                continue
            share, most = len(equal) / len(split.records), self.settings.max_equal
            what = (
                f"{len(equal):,} of {len(split.records):,} {name} pairs ({share:.1%}) are the same answer twice once "
                f"they are cut to {self.limit}, the first of them {equal[0].where}: such a pair teaches nothing"
            )
            if share > most:
                raise DataError(
                    f"{what}, and at most {most:.1%} of them may be like that (preference.max_equal); write a larger "
                    "data.max_length, leave out or shorten such pairs, or write a larger preference.max_equal"
                )
            said.append(f"warning: {what}")
        return said

    def _divide(self, record: Record, for_training: bool) -> tuple[str | Sequence[Message], list[str]]:
        """The prompt, and both answers or none."""
        fields = self.fields
        sides = [record.value(name) for name in (fields.chosen, fields.rejected)]
        if not for_training and any(_is_empty(side) for side in sides):
            if record.value(fields.prompt) is None and record.value(fields.messages) is not None:
                messages = self.format.check(without_empty_answer(record.value(fields.messages)), fields.messages)
                return messages[:-1] if messages[-1]["role"] == ASSISTANT else messages, []
            return self.format.prompt(record, fields.prompt), []
        if record.value(fields.prompt) is None and all(isinstance(side, list) for side in sides):
            prompt: str | Sequence[Message] = _common(sides)
        else:
            prompt = self.format.prompt(record, fields.prompt)
        return prompt, [self._answer(record, name, prompt) for name in (fields.chosen, fields.rejected)]

    def _answer(self, record: Record, field: str, prompt: str | Sequence[Message]) -> str:
        value = record.value(field)
        if not isinstance(value, list):
            setting = "data.fields.chosen" if field == self.fields.chosen else "data.fields.rejected"
            return record.text(field, setting=setting)
        messages = list(self.format.check(value, field))
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        rest = messages[len(asked) :] if messages[: len(asked)] == asked else messages
        if len(rest) != 1 or rest[0]["role"] != ASSISTANT:
            raise BadRecordError(
                f"the field {field!r} has to be a text, or a chat that ends in one message of the role {ASSISTANT} "
                "after those of the prompt"
            )
        content: str = rest[0]["content"]
        return content

    def collate(self, examples: Sequence[PreferenceExample], numbers: Sequence[int] | None = None) -> PreferenceBatch:
        """Chosen answers, then rejected ones, each after its prompt."""
        rows = [np.concatenate([each.prompt, each.chosen]) for each in examples]
        rows += [np.concatenate([each.prompt, each.rejected]) for each in examples]
        labels = [row[1:].copy() for row in rows]
        for row, example in zip(labels, [*examples, *examples], strict=True):
            row[: len(example.prompt) - 1] = IGNORED
        reference = np.array([example.reference or (0.0, 0.0) for example in examples], np.float32)
        return PreferenceBatch(
            tokens=padded([row[:-1] for row in rows], self.tokenizer.pad_id, multiple=LENGTH_MULTIPLE),
            labels=padded(labels, IGNORED, multiple=LENGTH_MULTIPLE),
            reference=pinned(reference),
            num_tokens=sum(map(len, labels)),
            sequence_ids=ids_of(numbers and [2 * number + side for side in range(2) for number in numbers]),
            text_lengths=pinned(np.array([len(row) for row in labels])),
        )

    def loss(self, model: Model, batch: PreferenceBatch) -> TaskLoss:
        """The loss summed over pairs; what is reported is without smoothing."""
        scores = model(**batch.inputs(), score_tokens=True)
        chosen, rejected = scores.log_probs.sum(dim=1).chunk(2)
        margin = self.settings.beta * ((chosen - rejected) - (batch.reference[:, 0] - batch.reference[:, 1]))
        plain, wrong = -F.logsigmoid(margin), -F.logsigmoid(-margin)
        smoothing = self.settings.label_smoothing
        return TaskLoss(((1 - smoothing) * plain + smoothing * wrong).sum(), plain.detach().sum(), scores.routing)

    @torch.no_grad()
    def refer(
        self, model: Model, examples: Sequence[PreferenceExample], device: torch.device
    ) -> list[tuple[float, ...]]:
        """Log-probabilities of both answers in nats."""
        batch = self.collate(examples).to(device)
        scores = model(**batch.inputs(), score_tokens=True)
        chosen, rejected = scores.log_probs.double().sum(dim=1).cpu().chunk(2)
        return list(zip(chosen.tolist(), rejected.tolist(), strict=True))

    def with_reference(self, example: PreferenceExample, numbers: tuple[float, ...]) -> PreferenceExample:
        """The example with the log-probabilities that `refer` gave."""
        chosen, rejected = numbers
        return dataclasses.replace(example, reference=(chosen, rejected))

    @torch.no_grad()
    def predict(self, model: Model, examples: Sequence[PreferenceExample], device: torch.device) -> list[Prediction]:
        """Of pairs how much likelier the chosen answer is than the rejected one, in nats; to prompts alone, answers."""
        found: list[Prediction] = [{} for _ in examples]
        pairs = [place for place, example in enumerate(examples) if example.has_answers]
        if pairs:
            sides = self.refer(model, [examples[place] for place in pairs], device)
            for place, (chosen, rejected) in zip(pairs, sides, strict=True):
                found[place] = {
                    "chosen_log_prob": chosen,
                    "rejected_log_prob": rejected,
                    "margin": chosen - rejected,
                    "_reference": examples[place].reference,
                }
        alone = [place for place, example in enumerate(examples) if not example.has_answers]
        if alone:
            prompts = [examples[place].prompt.tolist() for place in alone]
            written = write_answers(model, self.config, self.tokenizer, prompts, device)
            for place, text in zip(alone, written, strict=True):
                found[place] = {"response": text}
        return found

    def metrics(self, predictions: Sequence[Prediction]) -> dict[str, float]:
        """Means over pairs: of the log-probability margin in nats, and how often it is above 0; where the base's
        log-probabilities are known also the loss, and of the rewards, which are beta times the log-ratio to the base,
        those of both answers, their margin, and how often that is above 0 (reward_accuracy)."""
        both = np.array([(each["chosen_log_prob"], each["rejected_log_prob"]) for each in predictions])  # N 2
        margins = both[:, 0] - both[:, 1]
        found = {"margin": float(margins.mean()), "accuracy": float((margins > 0).mean())}
        if any(prediction["_reference"] is None for prediction in predictions):
            return found
        rewards = self.settings.beta * (both - np.array([each["_reference"] for each in predictions]))
        rewarded = rewards[:, 0] - rewards[:, 1]
        return {
            "loss": float(np.logaddexp(0.0, -rewarded).mean()),
            "reward_margin": float(rewarded.mean()),
            "reward_accuracy": float((rewarded > 0).mean()),
            "chosen_reward": float(rewards[:, 0].mean()),
            "rejected_reward": float(rewards[:, 1].mean()),
            **found,
        }

    def shown(self, record: Record) -> str:
        """The prompt."""
        return shown_prompt(self._divide(record, for_training=False)[0])

    def answer(self, record: Record) -> str:
        """The better answer."""
        answers = self._divide(record, for_training=False)[1]
        return answers[0] if answers else ""

    def lengths(self, examples: Sequence[PreferenceExample]) -> Lengths:
        """Of one side; both are read."""
        mean = self.mean_tokens(examples) / 2
        return Lengths(0, mean, mean, num_rows=2)

    def mean_tokens(self, examples: Sequence[PreferenceExample]) -> float:
        """Of both sides."""
        return float(np.mean([2 * len(each.prompt) + len(each.chosen) + len(each.rejected) - 2 for each in examples]))


def _is_empty(side: Any) -> bool:
    """Whether a side of a pair has no answer: it is missing, or a text or a chat without anything in it."""
    return side is None or (isinstance(side, str) and not side.strip()) or (isinstance(side, list) and not side)


def _common(sides: Sequence[Any]) -> list[Message]:
    """The messages that two chats begin with."""
    shared = []
    for first, second in zip(*sides, strict=False):
        if first != second:
            break
        shared.append(first)
    return shared
