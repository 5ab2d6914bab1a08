"""Direct preference optimization (DPO, arXiv:2305.18290) of a decoder on pairs of answers; see chats.py for the
formats.

    margin = beta ((log p(chosen) - log q(chosen)) - (log p(rejected) - log q(rejected)))
    loss   = -(1 - e) log sigmoid(margin) - e log sigmoid(-margin)

p is the model, q the model before the first step: its log-probabilities are computed once (measure.py). e is
preference.label_smoothing, the probability that a pair is labeled the wrong way round.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from bigtx.config.schema import FinetuneConfig
from bigtx.config.schema.tasks import METRICS
from bigtx.data.records.record import BadRecordError, Record
from bigtx.finetuning.tasks.batch import Batch, ids_of, pinned
from bigtx.finetuning.tasks.chats import (
    ChatTask,
    Message,
    review_chats,
    without_empty_answer,
    write_answers,
)
from bigtx.finetuning.tasks.task import Examples, Lengths, Model, Prediction
from bigtx.model.loss import IGNORED, Loss
from bigtx.tokenizer.special import ASSISTANT
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.utils.errors import DataError


@dataclass(frozen=True, slots=True)
class PreferenceExample:
    """A prompt and two answers as ids.

    Attributes:
        prompt: int32, the ids before the answer.
        chosen, rejected: int32, with the end id; both empty if there are no answers.
        num_cut: the number of ids that were left out.
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
        """Return the number of tokens of the longer side."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected)) - 1

    @property
    def has_answers(self) -> bool:
        """Return whether there are answers to compare."""
        return len(self.chosen) > 0

    @property
    def is_equal(self) -> bool:
        """Return whether both answers are equal, because the part in which they differ was cut."""
        return self.has_answers and np.array_equal(self.chosen, self.rejected)


class Preference(ChatTask):
    """The task of preferring the better of two answers."""

    metric = "loss"
    better = METRICS["preference"]
    needs_reference = True

    def __init__(self, config: FinetuneConfig, tokenizer: Tokenizer) -> None:
        super().__init__(config, tokenizer)
        self.settings = config.preference

    def encode(self, record: Record, *, for_training: bool = True) -> PreferenceExample:
        """Encode a prompt and both answers; for prediction the answers may be missing."""
        prompt, answers = self.divide(record, for_training)
        sides = zip((self.fields.chosen, self.fields.rejected), answers, strict=False)  # Prompts without answers.
        ids = [self.format.answer(field, answer) for field, answer in sides]
        if for_training and ids[0] == ids[1]:
            raise BadRecordError(f"the fields {self.fields.chosen!r} and {self.fields.rejected!r} are the same answer")
        chat = self.format.fit(self.format.parts(prompt, learn=False), ids)
        chosen, rejected = (np.array(side, np.int32) for side in chat.answers or ([], []))
        return PreferenceExample(
            np.array(chat.prompt, np.int32), chosen, rejected, chat.num_cut, lost_start=chat.lost_start
        )

    def review(self, splits: Mapping[str, Examples]) -> list[str]:
        """Return warnings about parts of the pairs that are not trained on.

        Raises:
            DataError: too many pairs have two equal answers after truncation.
        """
        fields = self.fields
        said = review_chats(splits, [fields.prompt, fields.messages, fields.chosen, fields.rejected])
        for name, split in splits.items():
            equal = [record for record, example in zip(split.records, split.examples, strict=True) if example.is_equal]
            if not equal:
                continue
            share, most = len(equal) / len(split.records), self.settings.max_equal
            what = (
                f"{len(equal):,} of {len(split.records):,} {name} pairs ({share:.1%}) have two equal answers after "
                f"truncation to {self.limit}, first {equal[0].where}: the model learns nothing from such a pair"
            )
            if share > most:
                raise DataError(
                    f"{what}, and at most {most:.1%} are allowed (preference.max_equal); write a larger "
                    "data.max_length, leave out or shorten such pairs, or write a larger preference.max_equal"
                )
            said.append(f"warning: {what}")
        return said

    def divide(self, record: Record, for_training: bool) -> tuple[str | Sequence[Message], list[str]]:
        """Return the prompt, and both answers or none."""
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
                f"the field {field!r} must be a text, or a chat of the prompt's messages and one message of the role "
                f"{ASSISTANT}"
            )
        content: str = rest[0]["content"]
        return content

    def collate(self, examples: Sequence[PreferenceExample], numbers: Sequence[int] | None = None) -> Batch:
        """Return a batch of the chosen answers, then the rejected ones, each after its prompt."""
        rows = [np.concatenate([each.prompt, each.chosen]) for each in examples]
        rows += [np.concatenate([each.prompt, each.rejected]) for each in examples]
        labels = [row[1:].copy() for row in rows]
        for row, example in zip(labels, [*examples, *examples], strict=True):
            row[: len(example.prompt) - 1] = IGNORED
        reference = np.array([example.reference or (0.0, 0.0) for example in examples], np.float32)
        return Batch(
            tokens=self.padded([row[:-1] for row in rows], self.tokenizer.pad_id),
            labels=self.padded(labels, IGNORED),
            reference=pinned(reference),
            num_tokens=sum(map(len, labels)),
            sequence_ids=ids_of(numbers and [2 * number + side for side in range(2) for number in numbers]),
            text_lengths=pinned(np.array([len(row) for row in labels])),
        )

    def loss(self, model: Model, batch: Batch) -> Loss:
        """Return the loss summed over pairs; the reported loss is without smoothing."""
        assert batch.reference is not None
        scores = model(**batch.inputs(), score_tokens=True)
        chosen, rejected = scores.log_probs.sum(dim=1).chunk(2)
        margin = self.settings.beta * ((chosen - rejected) - (batch.reference[:, 0] - batch.reference[:, 1]))
        plain, wrong = -F.logsigmoid(margin), -F.logsigmoid(-margin)
        smoothing = self.settings.label_smoothing
        return Loss(((1 - smoothing) * plain + smoothing * wrong).sum(), plain.detach().sum(), scores.routing)

    @torch.no_grad()
    def refer(
        self, model: Model, examples: Sequence[PreferenceExample], device: torch.device
    ) -> list[tuple[float, ...]]:
        """Return the log-probabilities of both answers in nats."""
        batch = self.collate(examples).to(device)
        scores = model(**batch.inputs(), score_tokens=True)
        chosen, rejected = scores.log_probs.double().sum(dim=1).cpu().chunk(2)
        return list(zip(chosen.tolist(), rejected.tolist(), strict=True))

    def with_reference(self, example: PreferenceExample, numbers: tuple[float, ...]) -> PreferenceExample:
        """Return the example with the log-probabilities that `refer` returned."""
        chosen, rejected = numbers
        return dataclasses.replace(example, reference=(chosen, rejected))

    @torch.no_grad()
    def predict(self, model: Model, examples: Sequence[PreferenceExample], device: torch.device) -> list[Prediction]:
        """Return the log-probabilities of pairs and their difference in nats, and an answer to prompts without any."""
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
        """Return means over pairs: the margin of log-probabilities in nats, and the share of margins above 0. If the
        base's log-probabilities are known, also the loss, the rewards of both answers (beta times the log-ratio to the
        base), their margin, and the share of these margins above 0 (reward_accuracy)."""
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

    def answer(self, record: Record) -> str:
        """Return the better answer."""
        answers = self.divide(record, for_training=False)[1]
        return answers[0] if answers else ""

    def lengths(self, examples: Sequence[PreferenceExample]) -> Lengths:
        """Return the mean columns of one side; an example has two."""
        mean = self.mean_tokens(examples) / 2
        return Lengths(0, mean, mean, num_rows=2)

    def mean_tokens(self, examples: Sequence[PreferenceExample]) -> float:
        """Return the mean tokens of both sides together."""
        return float(np.mean([2 * len(each.prompt) + len(each.chosen) + len(each.rejected) - 2 for each in examples]))


def _is_empty(side: Any) -> bool:
    """Return whether a side of a pair has no answer: it is missing, or an empty text or chat."""
    return side is None or (isinstance(side, str) and not side.strip()) or (isinstance(side, list) and not side)


def _common(sides: Sequence[Any]) -> list[Message]:
    """Return the messages that both chats begin with."""
    shared = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*sides, strict=False))
    return [first for first, _ in shared]
