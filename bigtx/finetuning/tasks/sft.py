"""Supervised fine-tuning of a decoder: on answers to prompts and in chats (see chats.py for the formats), or, for
distillation, on plain text.

record ──encode──▶ ChatExample ──collate──▶ one row each, padded to the longest
                        └──pack──▶ PackedRow ──collate──▶ rows of one length, with document masks
"""

from __future__ import annotations

import functools
import math
from bisect import bisect_left, insort
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bigtx.config.schema import FinetuneConfig
from bigtx.config.schema.tasks import METRICS
from bigtx.data.records.record import BadRecordError, Record
from bigtx.finetuning.tasks.batch import Batch, ids_of, padded, pinned
from bigtx.finetuning.tasks.chats import ChatTask, review_chats, without_empty_answer, write_answers
from bigtx.finetuning.tasks.task import Examples, Lengths, Model, Prediction, RecordTask, some_ids
from bigtx.model.loss import IGNORED, Loss
from bigtx.tokenizer.special import ASSISTANT
from bigtx.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ChatExample:
    """A chat as ids.

    Attributes:
        ids: int32 [N], the prompt and, if it is known, the answer.
        is_answer: bool [N], whether an id carries loss.
        prompt_length: the number of ids of the prompt.
        num_cut: the number of ids that were left out.
        lost_start: see `Chat`.
    """

    ids: np.ndarray
    is_answer: np.ndarray
    prompt_length: int
    num_cut: int
    lost_start: bool = False

    @property
    def length(self) -> int:
        """Return the number of tokens that training reads: all but the last."""
        return len(self.ids) - 1

    @property
    def has_answer(self) -> bool:
        """Return whether any id carries loss."""
        return bool(self.is_answer.any())


@dataclass(frozen=True, slots=True)
class PackedRow:
    """Several chats in one row."""

    chats: tuple[ChatExample, ...]

    @property
    def length(self) -> int:
        """Return the number of tokens without padding."""
        return sum(chat.length for chat in self.chats)

    @property
    def num_cut(self) -> int:
        """Return the number of ids that were left out."""
        return sum(chat.num_cut for chat in self.chats)


class OneText(RecordTask):
    """The base of tasks with a loss on some tokens of one text."""

    metric = "loss"
    better = METRICS["sft"]
    shows_by_predict = True

    def __init__(self, config: FinetuneConfig, tokenizer: Tokenizer) -> None:
        super().__init__(config, tokenizer)
        self.settings = config.sft
        self.row_length = config.sft.row_length or self.max_length
        if self.settings.packing:
            self.max_length = min(self.max_length, self.row_length)

    @property
    def length_setting(self) -> str:
        """Return the setting that `max_length` comes from."""
        is_of_row = self.settings.packing and self.settings.row_length == self.max_length
        return "sft.row_length" if is_of_row else super().length_setting

    def pack(self, examples: Sequence[ChatExample]) -> list[Any]:
        """Pack chats into rows if `sft.packing` is set."""
        if not self.settings.packing:
            return list(examples)
        # Neighbours in a file are often similar, so the chats of a row are drawn at random.
        order = np.random.Generator(np.random.Philox(key=[self.config.seed, 0])).permutation(len(examples))
        lengths = np.array([examples[place].length for place in order])
        return [
            PackedRow(tuple(examples[order[place]] for place in places))
            for places in best_fit(lengths, self.row_length)
        ]

    def collate(self, examples: Sequence[Any], numbers: Sequence[int] | None = None) -> Batch:
        """Return a batch of chats, or of packed rows of one length."""
        is_packed = isinstance(examples[0], PackedRow)
        rows = [example.chats if is_packed else (example,) for example in examples]
        pad: Callable[..., torch.Tensor]
        pad = functools.partial(padded, length=self.row_length) if is_packed else self.padded
        # A label is the next token if that is part of an answer.
        tokens = [np.concatenate([chat.ids[:-1] for chat in row]) for row in rows]
        labels = [np.concatenate([np.where(chat.is_answer[1:], chat.ids[1:], IGNORED) for chat in row]) for row in rows]
        positions = segment_ids = None
        if is_packed:
            places = [np.concatenate([np.arange(chat.length) for chat in row]) for row in rows]
            positions = pad(places, 0)
            numbers_of_chats = [np.repeat(np.arange(len(row)), [chat.length for chat in row]) for row in rows]
            segment_ids = pad(numbers_of_chats, max(map(len, rows)))
        return Batch(
            tokens=pad(tokens, self.tokenizer.pad_id),
            labels=pad(labels, IGNORED),
            positions=positions,
            segment_ids=segment_ids,
            num_tokens=sum(map(len, tokens)),
            sequence_ids=ids_of(numbers),
            text_lengths=pinned(np.array([len(row) for row in tokens])),
        )

    def loss(self, model: Model, batch: Batch) -> Loss:
        """Return the cross-entropy of the answers in nats."""
        loss: Loss = model(**batch.inputs())
        return loss

    @property
    def generates_in_run(self) -> bool:
        """Return False."""
        return False

    @torch.no_grad()
    def predict_in_run(self, model: Model, examples: Sequence[ChatExample], device: torch.device) -> list[Prediction]:
        """Return the likelihoods of the known answers, with one forward pass."""
        batch = self.collate(examples).to(device)
        scores = model(**batch.inputs(), score_tokens=True)
        sums = torch.stack([-scores.log_probs.double().sum(dim=1), scores.is_likeliest.double().sum(dim=1)]).cpu()
        counts = (batch.labels != IGNORED).sum(dim=1).tolist()
        return [
            {"_loss_sum": loss_sum, "_num_right": num_right, "_num_tokens": count}
            for loss_sum, num_right, count in zip(*sums.tolist(), counts, strict=True)
        ]

    def metrics(self, predictions: Sequence[Prediction]) -> dict[str, float]:
        """Return, per token of the answers, the cross-entropy in nats, its exponential, and the share of tokens that
        were the most likely ones; if answers were generated, also the share that equals the known ones exactly."""
        total = max(1, sum(prediction["_num_tokens"] for prediction in predictions))
        loss = sum(prediction["_loss_sum"] for prediction in predictions) / total
        found = {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "token_accuracy": sum(prediction["_num_right"] for prediction in predictions) / total,
        }
        exact = [prediction["_is_exact"] for prediction in predictions if "_is_exact" in prediction]
        return found | ({"exact_match": sum(exact) / len(exact)} if exact else {})

    def lengths(self, examples: Sequence[Any]) -> Lengths:
        """Return the mean columns of the rows of training."""
        mean = self.mean_tokens(examples)
        return Lengths(0, mean, mean)


class Sft(ChatTask, OneText):
    """The task of answering prompts and chats."""

    generates = True

    text_from = "prompt"

    def encode(self, record: Record, *, for_training: bool = True) -> ChatExample:
        """Encode a chat, or a prompt and its response."""
        prompt, answer = self.divide(record, for_training)
        is_chat = record.value(self.fields.messages) is not None
        field = self.fields.messages if is_chat else self.fields.response
        answers = [] if answer is None else [self.format.answer(field, answer)]
        chat = self.format.fit(self.format.parts(prompt, learn=self.settings.answers == "all"), answers)
        answer_ids = chat.answers[0] if chat.answers else []
        return ChatExample(
            np.array(chat.prompt + answer_ids, np.int32),
            np.array(chat.is_learned + [True] * len(answer_ids)) if answer_ids else np.zeros(len(chat.prompt), bool),
            len(chat.prompt),
            chat.num_cut,
            chat.lost_start,
        )

    def divide(self, record: Record, for_training: bool) -> tuple[Any, str | None]:
        """Return the prompt or the messages before the last answer, and that answer."""
        fields = self.fields
        messages = record.value(fields.messages)
        if messages is None:
            prompt = self.format.prompt(record, fields.prompt)
            given = for_training or record.has_text(fields.response)
            return prompt, record.text(fields.response, setting="data.fields.response") if given else None
        if not for_training:
            messages = without_empty_answer(messages)
        messages = self.format.check(messages, fields.messages)
        answered = [place for place, message in enumerate(messages) if message["role"] == ASSISTANT]
        if not answered and for_training:
            raise BadRecordError(
                f"{fields.messages}: there is no message of the role {ASSISTANT}, so there is nothing to learn"
            )
        if not for_training and messages[-1]["role"] != ASSISTANT:
            return messages, None
        return messages[: answered[-1]], messages[answered[-1]]["content"]

    def review(self, splits: Mapping[str, Examples]) -> list[str]:
        """Return warnings about parts of the chats that are not trained on."""
        return review_chats(splits, [self.fields.messages, self.fields.prompt])

    @torch.no_grad()
    def predict(self, model: Model, examples: Sequence[ChatExample], device: torch.device) -> list[Prediction]:
        """Return the answer that the model generates, and the likelihood of a known answer."""
        prompts = [example.ids[: example.prompt_length].tolist() for example in examples]
        written = write_answers(model, self.config, self.tokenizer, prompts, device)
        known: list[Prediction] = [{} for _ in examples]
        places = [place for place, example in enumerate(examples) if example.has_answer]
        if places:
            scores = self.predict_in_run(model, [examples[place] for place in places], device)
            for place, score in zip(places, scores, strict=True):
                answer = self.tokenizer.decode(examples[place].ids[examples[place].prompt_length :].tolist())
                known[place] = score | {"_is_exact": written[place].strip() == answer.strip()}
        return [{"response": text} | score for text, score in zip(written, known, strict=True)]

    def answer(self, record: Record) -> str:
        """Return the known answer."""
        return self.divide(record, for_training=False)[1] or ""


class Distill(OneText):
    """Learn the teacher's distribution over plain text; predictions are the likelihoods of texts.

    The teacher works as for every task (see bigtx.train.teacher). A text is an answer without a prompt:

        </s> text </s>      with loss on all but the first token, which marks the beginning of a text

    (The tokenizer of an imported model may have its own begin ids instead.) Corpora that do not fit into memory, and
    encoders and encoder-decoders, are distilled by pretraining with `distill.teacher`.
    """

    def __init__(self, config: FinetuneConfig, tokenizer: Tokenizer) -> None:
        super().__init__(config, tokenizer)
        self.require_length(2)

    text_from = "text"

    def encode(self, record: Record, *, for_training: bool = True) -> ChatExample:
        """Encode a text, with the begin ids of the tokenizer (or an end id) before it, and an end id after it."""
        ids = some_ids(self.tokenizer, self.fields.text, record.text(self.fields.text, setting="data.fields.text"))
        before = self.tokenizer.begin_ids or [self.tokenizer.end_id]
        kept = self.cut(ids, self.max_length - len(before))
        whole = [*before, *kept, self.tokenizer.end_id]
        is_answer = np.arange(len(whole)) >= len(before)
        return ChatExample(np.array(whole, np.int32), is_answer, len(before), len(ids) - len(kept))

    @torch.no_grad()
    def predict(self, model: Model, examples: Sequence[ChatExample], device: torch.device) -> list[Prediction]:
        """Return the mean cross-entropy of a text's tokens in nats, and their number."""
        return [
            {"loss": score["_loss_sum"] / score["_num_tokens"], "tokens": score["_num_tokens"]} | score
            for score in self.predict_in_run(model, examples, device)
        ]


def best_fit(lengths: np.ndarray, size: int) -> list[list[int]]:
    """Pack items into few bins by the best-fit-decreasing rule: the longest first, each into the fullest bin that it
    fits into.

    Args:
        lengths: int [N], each at most `size`.

    Returns:
        The indices of the items in each bin; a pure function of the arguments.
    """
    bins: list[list[int]] = []
    by_space: dict[int, list[int]] = {}  # Free space -> the bins with it, the newest last.
    spaces: list[int] = []  # The keys of `by_space`, sorted.
    for place in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[place])
        assert length <= size
        found = bisect_left(spaces, length)
        if found == len(spaces):
            number, space = len(bins), size
            bins.append([])
        else:
            space = spaces[found]
            number = by_space[space].pop()
            if not by_space[space]:
                del by_space[space], spaces[found]
        bins[number].append(place)
        left = space - length
        if left not in by_space:
            by_space[left] = []
            insort(spaces, left)
        by_space[left].append(number)
    return bins
