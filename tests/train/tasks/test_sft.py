"""The loss and the metrics of answers, and what is kept of chats that are too long, with values by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bigtx.config.schema import ChatConfig, FinetuneConfig, ModelConfig, RecordsConfig, SftConfig, TokenizerTrainConfig
from bigtx.data.records.record import BadRecordError, Record
from bigtx.finetuning.tasks import chats as chats_module
from bigtx.finetuning.tasks import sft as sft_module
from bigtx.finetuning.tasks.sft import Distill, PackedRow, Sft, best_fit
from bigtx.model.loss import IGNORED
from bigtx.model.transformer import Transformer
from bigtx.tokenizer.huggingface_model import CHAT_TEMPLATE
from bigtx.tokenizer.special import around
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.tokenizer.train import train
from bigtx.utils.errors import ConfigError

TEXTS = ["red apple tree and green apple tree, the house of stone, who are you, I am the river. " * 3] * 20
CPU = torch.device("cpu")
RECORDS = [
    Record({"prompt": "the tree", "response": "red"}, "a", 1),
    Record({"prompt": "who are you", "response": "I am the river and the house of stone"}, "a", 2),
    Record({"prompt": "the house of stone, who are you", "response": "green apple"}, "a", 3),
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train(TokenizerTrainConfig(vocab_size=420), TEXTS)


@pytest.fixture(scope="module")
def without_roles() -> Tokenizer:
    return train(TokenizerTrainConfig(vocab_size=420, chat_roles=[]), TEXTS)


def config_of(task: Any = "sft", **changes: Any) -> FinetuneConfig:
    model = ModelConfig(
        vocab_size=420, hidden_size=16, num_layers=1, num_heads=2, max_sequence_length=128, init_std=0.2
    )
    return FinetuneConfig(task=task, model=model, **changes)


def make(tokenizer: Tokenizer, **changes: Any) -> Sft:
    return Sft(Sft.resolve(config_of(**changes), tokenizer, []), tokenizer)


def model_of(task: Sft) -> Transformer:
    model = Transformer(task.config.model).eval()
    model.init_weights(1)
    return model


@torch.no_grad()
def test_the_loss_is_of_tokens_whatever_the_lengths_of_the_records(tokenizer: Tokenizer) -> None:
    """Against torch's cross-entropy of each answer alone: a long one counts as often as it has tokens."""
    task = make(tokenizer)
    model, examples = model_of(task), [task.encode(record) for record in RECORDS]
    losses, right, counts = [], [], []
    for record in RECORDS:
        prompt = [
            tokenizer.role_ids["user"],
            *tokenizer.encode(record.fields["prompt"]),
            tokenizer.end_id,
            tokenizer.role_ids["assistant"],
        ]
        answer = [*tokenizer.encode(record.fields["response"]), tokenizer.end_id]
        logits = model(torch.tensor([prompt + answer[:-1]]))[0, len(prompt) - 1 :]
        losses.append(F.cross_entropy(logits, torch.tensor(answer), reduction="sum").item())
        right.append(int((logits.argmax(dim=-1) == torch.tensor(answer)).sum()))
        counts.append(len(answer))
    assert max(counts) > 3 * min(counts)
    loss, batch = task.loss(model, task.collate(examples)), task.collate(examples)
    assert loss.loss_sum.item() == loss.reported_sum.item() == pytest.approx(sum(losses), rel=1e-5)
    assert batch.num_labels == sum(counts)
    metrics = task.metrics(task.predict_in_run(model, examples, CPU))
    mean = sum(losses) / sum(counts)
    assert metrics == pytest.approx(
        {"loss": mean, "perplexity": math.exp(mean), "token_accuracy": sum(right) / sum(counts)}, rel=1e-5
    )


def test_metrics_by_hand(tokenizer: Tokenizer) -> None:
    """Of records of unequal length the mean is over tokens, and `exact_match` over records that have an answer."""
    scores = [
        {"_loss_sum": 2.0, "_num_right": 1, "_num_tokens": 1, "_is_exact": True},
        {"_loss_sum": 3.0, "_num_right": 4, "_num_tokens": 6, "_is_exact": False},
        {"_loss_sum": 1.0, "_num_right": 0, "_num_tokens": 1},
    ]
    by_hand = {"loss": 6 / 8, "perplexity": math.exp(6 / 8), "token_accuracy": 5 / 8}
    assert make(tokenizer).metrics(scores) == pytest.approx(by_hand | {"exact_match": 1 / 2})
    in_run = [{key: value for key, value in score.items() if key != "_is_exact"} for score in scores]
    assert make(tokenizer).metrics(in_run) == pytest.approx(by_hand)
    diverged = [{"_loss_sum": 5000.0, "_num_right": 0, "_num_tokens": 1}]
    assert make(tokenizer).metrics(diverged)["perplexity"] == pytest.approx(math.exp(700))


def test_an_answer_is_exact_letter_by_letter(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    task = make(tokenizer)
    examples = [task.encode(record) for record in RECORDS]
    examples.append(task.encode(Record({"prompt": "who"}, "a", 4), for_training=False))
    asked: list[list[int]] = []

    def write(model: Any, config: Any, own: Tokenizer, prompts: list[list[int]], device: Any) -> list[str]:
        asked.extend(prompts)
        return [" red\n", "I am the river and the House of stone", "green apple", "I"]

    monkeypatch.setattr(sft_module, "write_answers", write)
    found = task.predict(model_of(task), examples, CPU)
    assert [each.get("_is_exact") for each in found] == [True, False, True, None]
    assert found[3] == {"response": "I"}, "what is not known is not measured"
    assert [len(prompt) for prompt in asked] == [example.prompt_length for example in examples]
    assert all(prompt[-1] == tokenizer.role_ids["assistant"] for prompt in asked)


def test_how_answers_are_written(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the config says; what is drawn follows from the prompt and the seed, not from its place in a batch."""
    asked: list[dict[str, Any]] = []

    def decode(model: Any, config: Any, prompts: list[list[int]], **settings: Any) -> list[list[int]]:
        asked.append(settings)
        return [tokenizer.encode("red")] * len(prompts)

    monkeypatch.setattr(chats_module, "decode_tokens", decode)
    ends = tokenizer.changed(ends=[tokenizer.end_id, 9])
    for seed, prompts in ((5, [[7, 8], [9]]), (5, [[9], [7, 8]]), (6, [[7, 8], [9]])):
        config = config_of(chat=ChatConfig(temperature=0.7, max_new_tokens=33), seed=seed)
        assert chats_module.write_answers(None, config, ends, prompts, CPU) == ["red", "red"]
    first, swapped, other = asked
    assert (first["max_new_tokens"], first["end_ids"], first["num_ids"]) == (33, [tokenizer.end_id, 9], 420)
    assert first["sampling"].temperature == 0.7

    def draws(settings: dict[str, Any]) -> list[float]:
        return [torch.rand((), generator=settings["sampling"].generator(place)).item() for place in range(2)]

    assert draws(first) == draws(swapped)[::-1] and len({*draws(first), *draws(other)}) == 4


def test_what_fits_exactly_is_not_refused(tokenizer: Tokenizer, without_roles: Tokenizer) -> None:
    whole = len(make(tokenizer).encode(RECORDS[1]).ids)
    for length in (whole, whole - 1):
        task = make(tokenizer, data=RecordsConfig(max_length=length, too_long="refuse"))
        if length == whole:
            assert len(task.encode(RECORDS[1]).ids) == whole
        else:
            with pytest.raises(BadRecordError, match=f"^{whole} tokens, and {whole - 1} are allowed"):
                task.encode(RECORDS[1])
    # Half of the length is read, with the separator: a token of the prompt, and one of the answer with its end.
    separator = ChatConfig(separator=" :: ")
    smallest = 2 * (1 + len(without_roles.encode(" :: ")))
    make(without_roles, chat=separator, data=RecordsConfig(max_length=smallest))
    with pytest.raises(ConfigError, match=rf"the smallest value of use is data\.max_length={smallest}$"):
        make(without_roles, chat=separator, data=RecordsConfig(max_length=smallest - 1))


@pytest.mark.parametrize("limit", [8, 9, 12])
def test_a_prompt_that_is_too_long_loses_its_beginning(tokenizer: Tokenizer, limit: int) -> None:
    """The question stands at its end. The answer may have half of the length, and more where the prompt is short."""
    prompt, end = tokenizer.encode("the house of stone " * 5), tokenizer.end_id
    assistant = tokenizer.role_ids["assistant"]
    task = make(tokenizer, data=RecordsConfig(max_length=limit))

    def encode(response: str) -> tuple[list[int], list[bool], int]:
        example = task.encode(Record({"prompt": "the house of stone " * 5, "response": response}, "a"))
        assert example.lost_start and example.prompt_length == len(example.ids) - example.is_answer.sum()
        return example.ids.tolist(), example.is_answer.tolist(), example.num_cut

    red = [*tokenizer.encode("red"), end]
    room = limit - len(red) - 1
    assert room > limit // 2
    total = 1 + len(prompt) + 1 + 1
    assert encode("red") == (
        [*prompt[-(room - 1) :], end, assistant, *red],
        [False] * (room + 1) + [True] * len(red),
        total + len(red) - limit,
    )
    answer, half = tokenizer.encode("red apple tree " * 5), limit // 2
    assert encode("red apple tree " * 5) == (
        [*prompt[-(half - 2) :], end, assistant, *answer[: limit - half]],
        [False] * half + [True] * (limit - half),
        total + len(answer) + 1 - limit,
    )


def test_only_as_many_turns_go_as_have_to(tokenizer: Tokenizer) -> None:
    texts = {"system": ["be short"], "user": ["the tree", "the house", "who"], "assistant": ["red", "stone", "you"]}
    system = {"role": "system", "content": "be short"}
    turns = [[{"role": role, "content": texts[role][place]} for role in ("user", "assistant")] for place in range(3)]
    whole = [system, *turns[0], *turns[1], *turns[2]]
    # Without the first turn, without the first two.
    left = [tokenizer.encode_chat(chat) for chat in (whole, [system, *turns[1], *turns[2]], [system, *turns[2]])]
    sizes = list(map(len, left))
    for limit, first in ((sizes[0], 0), (sizes[0] - 1, 1), (sizes[1], 1), (sizes[1] - 1, 2), (sizes[2], 2)):
        task = make(tokenizer, data=RecordsConfig(max_length=limit))
        example = task.encode(Record({"messages": whole}, "a"))
        assert example.ids.tolist() == left[first], limit
        assert example.num_cut == sizes[0] - sizes[first] and not example.lost_start
        answers = [tokenizer.encode(text) for text in texts["assistant"][first:]]
        assert example.ids[example.is_answer].tolist() == [i for answer in answers for i in [*answer, tokenizer.end_id]]


def test_begin_ids_stay_and_carry_no_loss(tokenizer: Tokenizer) -> None:
    """Those that the tokenizer of an imported model puts before a text."""
    begin, end = tokenizer.begin_id, tokenizer.end_id
    llama = tokenizer.changed(template=around(begin, None))
    record = Record({"prompt": "the house of stone " * 5, "response": "red"}, "a")
    prompt, red = tokenizer.encode("the house of stone " * 5), [*tokenizer.encode("red"), end]
    user, assistant = (tokenizer.role_ids[role] for role in ("user", "assistant"))
    example = make(llama).encode(record)
    assert example.ids.tolist() == [begin, user, *prompt, end, assistant, *red]
    assert example.is_answer.tolist() == [False] * (len(prompt) + 4) + [True] * len(red)
    cut = make(llama, data=RecordsConfig(max_length=12)).encode(record)
    assert cut.ids.tolist() == [begin, *prompt[-(12 - 3 - len(red)) :], end, assistant, *red] and len(cut.ids) == 12
    long = make(llama, data=RecordsConfig(max_length=12)).encode(
        Record({"prompt": "the house of stone " * 5, "response": "red apple tree " * 5}, "a")
    )
    assert (
        long.ids[:6].tolist() == [begin, *prompt[-3:], end, assistant]
        and long.is_answer.tolist() == [False] * 6 + [True] * 6
    )
    plain = make(llama, chat=ChatConfig(format="plain", separator=" "))
    example = plain.encode(Record({"prompt": "who", "response": "red"}, "a"))
    assert example.ids.tolist() == [begin, *tokenizer.encode("who "), *red]


def test_rows_of_chats(tokenizer: Tokenizer) -> None:
    task = make(tokenizer)
    examples = [task.encode(record) for record in RECORDS[:2]]
    batch = task.collate(examples, [4, 6])
    lengths = [len(example.ids) - 1 for example in examples]
    assert lengths[0] < lengths[1] - 3 and batch.tokens.shape == (2, -(-lengths[1] // 16) * 16)
    for row, (example, length) in enumerate(zip(examples, lengths, strict=True)):
        rest = batch.tokens.shape[1] - length
        assert batch.tokens[row].tolist() == example.ids[:-1].tolist() + [tokenizer.pad_id] * rest
        answer = example.ids[example.prompt_length :].tolist()
        labels = [IGNORED] * (example.prompt_length - 1) + answer + [IGNORED] * rest
        assert batch.labels[row].tolist() == labels
    assert batch.text_lengths.tolist() == lengths and batch.num_tokens == sum(lengths)
    assert batch.sequence_ids is not None and batch.sequence_ids.tolist() == [4, 6]
    assert batch.positions is None and batch.segment_ids is None
    assert task.lengths(examples) == (0, sum(lengths) / 2, sum(lengths) / 2, 1)
    packed = make(tokenizer, sft=SftConfig(packing=True, row_length=48))
    batch = packed.collate([PackedRow(tuple(examples))], [3])
    assert batch.positions is not None and batch.segment_ids is not None and batch.tokens.shape == (1, 48)
    rest = 48 - sum(lengths)
    assert batch.positions[0].tolist() == [*range(lengths[0]), *range(lengths[1]), *[0] * rest]
    assert batch.segment_ids[0].tolist() == [0] * lengths[0] + [1] * lengths[1] + [2] * rest
    # The last token of a chat asks for nothing of the next one.
    first, second = (example.ids for example in examples)
    assert batch.tokens[0].tolist() == [*first[:-1], *second[:-1], *[tokenizer.pad_id] * rest]
    assert batch.labels[0, lengths[0] - 1] == tokenizer.end_id and batch.labels[0, lengths[0]] == IGNORED
    assert batch.text_lengths.tolist() == [sum(lengths)] and batch.num_tokens == sum(lengths)
    assert packed.max_length == 48 and PackedRow(tuple(examples)).length == sum(lengths)


def test_which_chats_share_a_row_is_drawn(tokenizer: Tokenizer) -> None:
    """From the seed alone: neighbours in a file are often alike."""

    def rows(seed: int) -> list[list[int]]:
        task = make(tokenizer, sft=SftConfig(packing=True, row_length=16), seed=seed)
        chats = [task.encode(Record({"prompt": "who", "response": "red"}, "a", number)) for number in range(40)]
        places = {id(chat): place for place, chat in enumerate(chats)}
        return [[places[id(chat)] for chat in row.chats] for row in task.pack(chats)]

    assert sorted(place for row in rows(1) for place in row) == list(range(40)) and len(rows(1)) <= 20
    assert rows(1) == rows(1) != rows(2)
    apart = [abs(row[0] - row[1]) for row in rows(1) if len(row) > 1]
    assert sum(apart) / len(apart) > 5, "that of two drawn at random is 40 / 3"


def test_formats_that_cannot_be(tokenizer: Tokenizer) -> None:
    own = Tokenizer(tokenizer.model, tokenizer.special, settings_files={CHAT_TEMPLATE: b"{{ messages }}"})
    assert make(own).config.chat.format == "plain", "its own template is a program"
    same = Tokenizer(
        tokenizer.model, tokenizer.special, settings_files={CHAT_TEMPLATE: tokenizer.chat_template.encode()}
    )  # type: ignore[union-attr]
    assert make(same).config.chat.format == "chat"
    with pytest.raises(ConfigError, match="has its own chat template"):
        make(own, chat=ChatConfig(format="chat"))
    with pytest.raises(ConfigError, match="is empty, so nothing would mark the end of a prompt"):
        make(own, chat=ChatConfig(separator=""))
    assert make(tokenizer, chat=ChatConfig(separator="")).config.chat.format == "chat"


def test_best_fit_by_hand() -> None:
    """The longest first, each into the fullest bin that has room for it."""
    # 7 | 6 | 4 goes to 6, not to 7; 3 to 7; 2 opens a bin; 1 goes there.
    assert best_fit(np.array([4, 7, 3, 6, 2, 1]), 10) == [[1, 2], [3, 0], [4, 5]]
    # 8, 5, and 2: the bin of 8 is the fuller one.
    assert best_fit(np.array([2, 5, 8]), 10) == [[2, 0], [1]]
    assert best_fit(np.array([10, 10]), 10) == [[0], [1]]


def test_a_text_to_distill(tokenizer: Tokenizer) -> None:
    ids, end = tokenizer.encode("the house of stone"), tokenizer.end_id

    def encode(**data: Any) -> tuple[list[int], list[bool], int]:
        config = config_of("distill", data=RecordsConfig(**data))
        task = Distill(Distill.resolve(config, tokenizer, []), tokenizer)
        example = task.encode(Record({"text": "the house of stone"}, "a"))
        return example.ids.tolist(), example.is_answer.tolist(), example.num_cut

    assert encode() == ([end, *ids, end], [False] + [True] * (len(ids) + 1), 0)
    # One token is read less than there are: all but the last end.
    assert encode(max_length=len(ids) + 1) == encode()
    with pytest.raises(ConfigError, match=r"smallest value of use is data\.max_length=2"):
        encode(max_length=1)
    assert encode(max_length=2) == ([end, ids[0], end], [False, True, True], len(ids) - 1)
    begin = tokenizer.changed(template=around(tokenizer.begin_id, None))
    task = Distill(Distill.resolve(config_of("distill"), begin, []), begin)
    assert task.encode(Record({"text": "the house of stone"}, "a")).ids.tolist() == [begin.begin_id, *ids, end]
    assert encode(max_length=len(ids)) == ([end, *ids[:-1], end], [False] + [True] * len(ids), 1)


@torch.no_grad()
def test_how_likely_a_text_is(tokenizer: Tokenizer) -> None:
    task = Distill(Distill.resolve(config_of("distill"), tokenizer, []), tokenizer)
    model = model_of(task)
    examples = [task.encode(Record({"text": text}, "a")) for text in ("stone", "the house of stone and the river")]
    for example, found in zip(examples, task.predict(model, examples, CPU), strict=True):
        ids = torch.tensor(example.ids.tolist())
        mean = F.cross_entropy(model(ids[None, :-1])[0], ids[1:]).item()
        assert found["loss"] == pytest.approx(mean, rel=1e-5) and found["tokens"] == len(ids) - 1
