"""What objectives make of rows: nothing lost, nothing seen that must not be, the same whatever the batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from bigtx.config.schema import DataConfig, ModelConfig, ObjectiveConfig, PretrainConfig, TrainConfig
from bigtx.config.shape import noise_counts
from bigtx.data.stream.rows import IGNORED_LABEL, Batch
from bigtx.pretraining import make_objective
from bigtx.pretraining.objectives import Objective
from bigtx.pretraining.source_and_target import PADDING_SEGMENT
from bigtx.tokenizer.special import SpecialIds
from bigtx.utils.errors import ConfigError

LENGTH, VOCABULARY, END = 96, 300, 3
SHAPES = {
    "causal": "decoder",
    "fill_in_middle": "decoder",
    "masked": "encoder",
    "span_corruption": "encoder_decoder",
    "prefix": "encoder_decoder",
}


class Words:
    """Stands in for a tokenizer: ids from 130 on; an even one begins a word."""

    vocab_size, pad_id, end_id, mask_id = VOCABULARY, 0, END, 4
    begin_ids: tuple[int, ...] = ()
    sentinel_ids = tuple(range(5, 105))
    special = SpecialIds(pad=0, unknown=1, begin=2, end=END, mask=4, sentinels=list(sentinel_ids), roles={})

    def id_to_piece(self, i: int) -> str:
        return f"▁{i}" if i % 2 == 0 else str(i)

    def decode(self, ids: list[int]) -> str:
        return "".join(map(self.id_to_piece, ids)).replace("▁", " ")


def make(name: str, *, document_mask: bool = False, shape: str | None = None, **settings: Any) -> Objective:
    config = PretrainConfig(
        model=ModelConfig(shape=shape or SHAPES[name]),  # type: ignore[arg-type]
        data=DataConfig(document_mask=document_mask),
        train=TrainConfig(sequence_length=LENGTH),
        objective=ObjectiveConfig(name=name, **settings),  # type: ignore[arg-type]
    )
    return make_objective(config, Words(), purpose="train")  # type: ignore[arg-type]


def rows(count: int = 4, *, document_mask: bool = False, short: bool = False, first: int = 0) -> Batch:
    """Rows of documents of 5 to 40 tokens that end with the end id; the last row may be short."""
    tokens, labels = np.zeros((count, LENGTH), np.int64), np.full((count, LENGTH), IGNORED_LABEL)
    segments, positions = np.zeros_like(tokens), np.zeros_like(tokens)
    lengths = np.full(count, LENGTH)
    if short:
        lengths[-1] = 17
    for row in range(count):
        generator = np.random.default_rng(first + row)
        text: list[int] = []
        while len(text) <= LENGTH:
            text += [*generator.integers(130, VOCABULARY, generator.integers(5, 40)).tolist(), END]
        length = int(lengths[row])
        tokens[row, :length] = text[:length]
        labels[row, :length] = text[1 : length + 1]
        if length < LENGTH:
            labels[row, length - 1] = IGNORED_LABEL
        begins = np.concatenate(([False], np.array(text[: LENGTH - 1]) == END))
        begins[length:] = np.arange(length, LENGTH) == length
        segments[row] = np.cumsum(begins)
        positions[row] = np.arange(LENGTH) - np.maximum.accumulate(np.where(begins, np.arange(LENGTH), 0))
        if document_mask:
            labels[row, :length][np.array(text[:length]) == END] = IGNORED_LABEL
    parts = [tokens, labels, positions, segments]
    made = [torch.from_numpy(part) for part in parts]
    return Batch(
        made[0],
        made[1],
        made[2] if document_mask else None,
        made[3] if document_mask else None,
        torch.arange(first, first + count),
        torch.from_numpy(lengths),
    )


@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_a_row_is_made_the_same_in_any_batch(name: str, document_mask: bool) -> None:
    objective = make(name, document_mask=document_mask)
    together = objective.prepare(rows(6, document_mask=document_mask)).inputs()
    for first in (0, 3):
        apart = objective.prepare(rows(3, document_mask=document_mask, first=first)).inputs()
        assert apart.keys() == together.keys()
        for key, part in apart.items():
            assert torch.equal(part, together[key][first : first + 3]), key


def test_only_the_causal_loss_measures_compression() -> None:
    assert [name for name in SHAPES if make(name).bits_per_byte] == ["causal"]


@pytest.mark.parametrize("name", ["fill_in_middle", "masked", "span_corruption"])
def test_other_seeds_draw_otherwise(name: str) -> None:
    config = PretrainConfig(
        model=ModelConfig(shape=SHAPES[name]),  # type: ignore[arg-type]
        train=TrainConfig(sequence_length=LENGTH),
        objective=ObjectiveConfig(name=name),  # type: ignore[arg-type]
    )
    words: Any = Words()
    made = [
        make_objective(config, words, purpose=purpose).prepare(rows()).tokens for purpose in ("train", "validation")
    ]
    config.seed = 2
    again = [
        make_objective(config, words, purpose=purpose).prepare(rows()).tokens for purpose in ("train", "validation")
    ]
    assert not torch.equal(made[0], made[1]) and not torch.equal(made[0], again[0])
    assert torch.equal(made[1], again[1]), "validation asks the same of every run"


@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_shapes_are_those_that_were_told(name: str, document_mask: bool) -> None:
    objective = make(name, document_mask=document_mask)
    source, target, predicted = objective.lengths
    for short in (False, True):
        batch = objective.prepare(rows(document_mask=document_mask, short=short))
        read = batch.tokens if batch.target_tokens is None else batch.target_tokens
        assert batch.labels.shape[1] == predicted
        assert read.shape[1] == (target or source)
        if source and target:
            assert batch.tokens.shape[1] == source
        assert batch.num_labels > 0
        if short and name not in ("causal", "fill_in_middle"):
            assert batch.segment_ids is not None, "padding is kept apart where a model reads both ways"


@pytest.mark.parametrize("document_mask", [False, True])
def test_spans_and_what_is_left_make_the_row(document_mask: bool) -> None:
    objective = make("span_corruption", document_mask=document_mask)
    raw = rows(8, document_mask=document_mask)
    batch = objective.prepare(raw)
    noise = 0
    for row in range(8):
        *source, source_end = batch.tokens[row].tolist()
        *labels, labels_end = unmasked_labels(batch, row)
        assert source_end == labels_end == END
        spans: dict[int, list[int]] = {}
        for token in labels:
            if token in Words.sentinel_ids:
                spans[token] = []
            else:
                spans[list(spans)[-1]].append(token)
        assert list(spans) == list(Words.sentinel_ids[: len(spans)]) and all(spans.values())
        rebuilt = [token for piece in source for token in spans.get(piece, [piece])]
        assert rebuilt == raw.tokens[row].tolist()
        noise += sum(map(len, spans.values()))
    assert noise == 8 * round(0.15 * LENGTH)


def test_spans_of_the_shortest_rows() -> None:
    """Of two tokens the second is removed; a single token is not asked for."""
    raw = replace(rows(3), text_lengths=torch.tensor([LENGTH, 2, 1]))
    batch, mark = make("span_corruption").prepare(raw), Words.sentinel_ids[0]
    first, second = raw.tokens[1, :2].tolist()
    assert batch.tokens[1, :4].tolist() == [first, mark, END, Words.pad_id]
    assert batch.labels[1, :4].tolist() == [mark, second, END, IGNORED_LABEL]
    assert batch.tokens[2].tolist() == [Words.pad_id] * batch.tokens.shape[1]
    assert batch.labels[2].tolist() == [IGNORED_LABEL] * batch.labels.shape[1]


@pytest.mark.parametrize("document_mask", [False, True])
def test_of_a_span_only_its_own_document_is_asked_for(document_mask: bool) -> None:
    """What follows a border within a span cannot be known from its sentinel. Found by walking through the row."""
    objective = make("span_corruption", document_mask=document_mask, noise_density=0.4, mean_span_length=6.0)
    raw = rows(60, document_mask=document_mask)
    batch, num_ignored = objective.prepare(raw), 0
    for row in range(60):
        text = raw.tokens[row].tolist()
        owners = raw.segment_ids[row].tolist() if raw.segment_ids is not None else [0] * LENGTH
        lengths: list[int] = []
        for token in unmasked_labels(batch, row)[:-1]:
            if token in Words.sentinel_ids:
                lengths.append(0)
            else:
                lengths[-1] += 1
        expected, place = list[int](), 0
        for piece in batch.tokens[row].tolist()[:-1]:
            if piece not in Words.sentinel_ids:
                place += 1
                continue
            own = range(place, place + lengths[piece - Words.sentinel_ids[0]])
            expected += [piece, *(text[at] if owners[at] == owners[place] else IGNORED_LABEL for at in own)]
            place = own.stop
        assert place == LENGTH and batch.labels[row].tolist() == [*expected, END]
        num_ignored += expected.count(IGNORED_LABEL)
    assert (num_ignored > 100) if document_mask else (num_ignored == 0)


@pytest.mark.parametrize(
    ("length", "density", "mean", "expected"),
    [
        (100, 0.15, 3.0, (15, 5)),
        (10, 0.15, 3.0, (2, 1)),
        (2, 0.15, 3.0, (1, 1)),
        (10, 0.01, 3.0, (1, 1)),
        (10, 0.99, 3.0, (9, 1)),  # One token is left, and before each span there is one.
        (10, 0.7, 1.0, (7, 3)),
        (10, 0.4, 1.0, (4, 4)),
    ],
)
def test_noise_by_hand(length: int, density: float, mean: float, expected: tuple[int, int]) -> None:
    objective = ObjectiveConfig(noise_density=density, mean_span_length=mean)
    assert noise_counts(objective, length) == expected


def unmasked_labels(batch: Batch, row: int) -> list[int]:
    """The whole target, from what the decoder reads one step late where a label is ignored."""
    assert batch.target_tokens is not None
    labels, read = batch.labels[row].tolist(), batch.target_tokens[row].tolist()
    return [
        label if label != IGNORED_LABEL else (read[index + 1] if index + 1 < len(read) else END)
        for index, label in enumerate(labels)
    ]


@pytest.mark.parametrize(
    ("name", "source_end", "target_end"), [("span_corruption", (8, 2), (2, 2)), ("prefix", (4, 1), (3, 2))]
)
def test_the_last_ids_of_both_sides_belong_to_the_document_before_them(
    name: str, source_end: tuple[int, int], target_end: tuple[int, int]
) -> None:
    """Each is a column and the number of its document."""
    raw = rows(1, document_mask=True)
    assert raw.segment_ids is not None
    raw.segment_ids[0, :8] = torch.tensor([0, 0, 1, 1, 1, 1, 1, 2])
    batch = make(name, document_mask=True).prepare(replace(raw, text_lengths=torch.tensor([8])))
    assert batch.segment_ids is not None and batch.target_segment_ids is not None
    for segments, (column, document) in ((batch.segment_ids, source_end), (batch.target_segment_ids, target_end)):
        assert segments[0, column] == document and segments[0, column + 1] == PADDING_SEGMENT


@pytest.mark.parametrize("name", ["span_corruption", "prefix"])
def test_padding_of_both_sides_is_at_position_0(name: str) -> None:
    raw = rows(2, document_mask=True)
    batch = make(name, document_mask=True).prepare(replace(raw, text_lengths=torch.tensor([LENGTH, 17])))
    assert batch.positions is not None and batch.target_positions is not None
    for positions in (batch.positions, batch.target_positions):
        assert positions[0, -5:].any() and not positions[1, -5:].any()


def test_the_decoder_reads_its_labels_one_step_late() -> None:
    for name in ("span_corruption", "prefix"):
        batch = make(name).prepare(rows())
        assert batch.target_tokens is not None
        assert (batch.target_tokens[:, 0] == Words.pad_id).all()
        assert torch.equal(batch.target_tokens[:, 1:], batch.labels[:, :-1])


@pytest.mark.parametrize("name", ["span_corruption", "prefix"])
def test_documents_do_not_meet_across_the_two_sides(name: str) -> None:
    """Tokens have the segments of their documents, positions restart, and no input comes from another document."""
    raw = rows(8, document_mask=True)
    batch = make(name, document_mask=True).prepare(raw)
    assert batch.segment_ids is not None and batch.target_segment_ids is not None and raw.segment_ids is not None
    assert batch.target_tokens is not None and batch.target_positions is not None
    for row in range(8):
        owners: dict[int, set[int]] = {}
        for token, segment in zip(raw.tokens[row].tolist(), raw.segment_ids[row].tolist(), strict=True):
            owners.setdefault(token, set()).add(segment)
        sides = [
            (batch.tokens, batch.segment_ids),
            (batch.labels, batch.target_segment_ids),
        ]
        for tokens, segments in sides:
            for token, segment in zip(tokens[row].tolist(), segments[row].tolist(), strict=True):
                if token >= 130:
                    assert segment in owners[token]
        starts = batch.target_positions[row] == 0
        assert (batch.target_tokens[row][starts] == Words.pad_id).all(), "no token of another document is read"
        assert torch.equal(starts[1:], batch.target_segment_ids[row][1:] != batch.target_segment_ids[row][:-1])


@pytest.mark.parametrize("rate", [0.1, 0.4])
def test_the_share_of_masked_tokens(rate: float) -> None:
    batch = make("masked", mask_rate=rate).prepare(rows(8))
    assert batch.columns is not None and batch.columns.shape == (8, round(rate * LENGTH))


def test_a_short_row_has_the_same_share_of_masked_tokens() -> None:
    batch = make("masked", mask_rate=0.3).prepare(rows(2, short=True))
    # 29 of 96 tokens and 5 of 17; the rest of the short row's columns has no label.
    assert (batch.labels != IGNORED_LABEL).sum(dim=1).tolist() == [29, 5]


@pytest.mark.parametrize("whole_words", [False, True])
def test_masked_tokens(whole_words: bool) -> None:
    objective = make("masked", whole_words=whole_words, mask_rate=0.15)
    count = round(0.15 * LENGTH)
    masked = random = kept = cut_words = 0
    for first in range(0, 400, 8):
        raw = rows(8, first=first)
        batch = objective.prepare(raw)
        assert batch.columns is not None
        assert (batch.columns.diff(dim=1) > 0).all() and batch.columns.shape == (8, count)
        original = raw.tokens.gather(1, batch.columns)
        assert torch.equal(batch.labels, original) and (original >= 130).all(), "special tokens are never chosen"
        hidden = batch.tokens.gather(1, batch.columns)
        masked += int((hidden == Words.mask_id).sum())
        kept += int((hidden == original).sum())
        random += int(((hidden != Words.mask_id) & (hidden != original)).sum())
        assert (hidden[hidden != Words.mask_id] >= 105).all()
        untouched = torch.ones_like(raw.tokens, dtype=torch.bool).scatter_(1, batch.columns, False)
        assert torch.equal(batch.tokens[untouched], raw.tokens[untouched])
        for row in range(8):
            cut_words += count_cut_words(raw.tokens[row].numpy(), set(batch.columns[row].tolist()))
    total = masked + random + kept
    assert abs(masked / total - 0.8) < 0.02 and abs(random / total - 0.1) < 0.02 and abs(kept / total - 0.1) < 0.02
    assert cut_words <= 400 if whole_words else cut_words > 1000, "at most the last word of a row is cut"


def count_cut_words(tokens: np.ndarray, columns: set[int]) -> int:
    begins = (tokens % 2 == 0) & (tokens >= 130)
    begins[1:] |= tokens[:-1] < 130
    words: dict[int, list[bool]] = {}
    for column, word in enumerate(np.cumsum(begins).tolist()):
        if tokens[column] >= 130:
            words.setdefault(word, []).append(column in columns)
    return sum(any(chosen) and not all(chosen) for chosen in words.values())


@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("suffix_first", [0.0, 1.0])
def test_rearranged_documents_can_be_put_back(suffix_first: float, document_mask: bool) -> None:
    objective = make(
        "fill_in_middle", fill_in_middle_rate=1.0, suffix_first_rate=suffix_first, document_mask=document_mask
    )
    raw = rows(8, document_mask=document_mask)
    batch = objective.prepare(raw)
    of_prefix, of_suffix, of_middle = Words.sentinel_ids[-3:]
    for row in range(8):
        text, made = raw.tokens[row].tolist(), batch.tokens[row].tolist()
        rebuilt: list[int] = []
        for piece in pieces_of(made):
            if of_middle not in piece or piece[-1] != END:
                break  # The row's last document is cut off.
            body = piece[:-1]
            suffix_at, middle_at = body.index(of_suffix), body.index(of_middle)
            assert body[0] == of_prefix and (suffix_at == 1 or not suffix_first)
            prefix, suffix = body[1:suffix_at], body[suffix_at + 1 : middle_at]
            rebuilt += [*prefix, *body[middle_at + 1 :], *suffix, END]
        assert rebuilt == text[: len(rebuilt)] and len(rebuilt) > 30
        following = batch.labels[row].tolist()
        for column in range(LENGTH - 1):
            at_border = document_mask and made[column] == END
            assert following[column] == (IGNORED_LABEL if at_border else made[column + 1])


def pieces_of(tokens: list[int]) -> list[list[int]]:
    pieces: list[list[int]] = [[]]
    for token in tokens:
        pieces[-1].append(token)
        if token == END:
            pieces.append([])
    return pieces


class Draws:
    """Stands in for a generator: its draws are those of the test."""

    def __init__(self, *draws: float) -> None:
        self.draws = draws

    def random(self, count: int) -> np.ndarray:
        return np.resize(self.draws, count)


@pytest.mark.parametrize("draw", [0.0, 0.999])
def test_the_shortest_and_the_longest_prefix(draw: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """From one token to all but one; a single token has no prefix."""
    objective = make("prefix", shape="decoder")
    monkeypatch.setattr(objective, "generator", lambda sequence_id: Draws(draw))
    lengths = [LENGTH, 5, 2, 1]
    batch = objective.prepare(replace(rows(4), text_lengths=torch.tensor(lengths)))
    assert batch.prefix_mask is not None
    expected = [1, 1, 1, 0] if draw == 0.0 else [LENGTH - 1, 4, 1, 0]
    assert batch.prefix_mask.sum(dim=1).tolist() == expected


@pytest.mark.parametrize(
    ("cuts", "expected"), [((0.0, 0.0), "suffix"), ((0.0, 0.999), "middle"), ((0.999,) * 2, "prefix")]
)
def test_a_document_is_cut_anywhere_from_its_begin_to_its_end(
    cuts: tuple[float, float], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = make("fill_in_middle", fill_in_middle_rate=1.0, suffix_first_rate=0.0)
    monkeypatch.setattr(objective, "generator", lambda sequence_id: Draws(0.0, 0.5, *cuts))
    raw = rows(1)
    raw.tokens[0, :8] = torch.tensor([200, 202, 204, 206, 208, 210, 212, END])
    made = objective.prepare(replace(raw, text_lengths=torch.tensor([8]))).tokens[0].tolist()
    body, marks = [200, 202, 204, 206, 208, 210, 212], [token for token in made if token in Words.sentinel_ids]
    place = made.index(200) - 1
    assert made[place + 1 : place + 8] == body and len(marks) == 3
    assert made[place] == marks[["prefix", "suffix", "middle"].index(expected)]


def test_no_document_rearranged_is_causal() -> None:
    for document_mask in (False, True):
        raw = rows(document_mask=document_mask, short=True)
        batch = make("fill_in_middle", fill_in_middle_rate=0.0, document_mask=document_mask).prepare(raw)
        assert torch.equal(batch.tokens, raw.tokens) and torch.equal(batch.labels, raw.labels)
        if document_mask:
            assert batch.positions is not None and raw.positions is not None
            text = raw.text_lengths[:, None] > torch.arange(LENGTH)
            assert torch.equal(batch.positions[text], raw.positions[text])


@pytest.mark.parametrize("document_mask", [False, True])
def test_a_prefix_of_a_decoder(document_mask: bool) -> None:
    raw = rows(16, document_mask=document_mask, short=True)
    batch = make("prefix", shape="decoder", document_mask=document_mask).prepare(raw)
    assert batch.prefix_mask is not None
    lengths = set()
    for row in range(16):
        segments = raw.segment_ids[row] if raw.segment_ids is not None else torch.zeros(LENGTH, dtype=torch.long)
        for segment in segments[: raw.text_lengths[row]].unique():
            columns = ((segments == segment) & (torch.arange(LENGTH) < raw.text_lengths[row])).nonzero().flatten()
            prefix = batch.prefix_mask[row, columns]
            length = int(prefix.sum())
            lengths.add(length)
            assert prefix[:length].all() and (0 < length < len(columns) or len(columns) == 1)
            labels, plain = batch.labels[row, columns], raw.labels[row, columns]
            if len(columns) > 1:
                assert (labels[: length - 1] == IGNORED_LABEL).all()
                assert torch.equal(labels[length - 1 :], plain[length - 1 :])
    assert len(lengths) > 10
    assert not batch.prefix_mask[-1, 17:].any()


def test_what_a_tokenizer_lacks() -> None:
    bare: Any = Words()
    bare.mask_id, bare.sentinel_ids = None, ()
    for name, word in (("masked", "mask"), ("span_corruption", "sentinels"), ("fill_in_middle", "sentinels")):
        config = PretrainConfig(
            model=ModelConfig(shape=SHAPES[name]),  # type: ignore[arg-type]
            train=TrainConfig(sequence_length=LENGTH),
            objective=ObjectiveConfig(name=name),  # type: ignore[arg-type]
        )
        with pytest.raises(ConfigError, match=word):
            make_objective(config, bare, purpose="train")


def test_learned_positions_reach_as_far_as_both_sides() -> None:
    """A row may be longer than the positions where the encoder reads less than all of it, and the other way round."""
    words: Any = Words()
    for settings, longest in (
        ({"name": "prefix"}, LENGTH // 2 + 1),
        ({"name": "span_corruption", "mean_span_length": 1.0}, LENGTH + 1),
    ):
        config = PretrainConfig(
            model=ModelConfig(shape="encoder_decoder", positions="learned", max_sequence_length=longest),
            train=TrainConfig(sequence_length=LENGTH),
            objective=ObjectiveConfig(**settings),
        )
        made = make_objective(config, words, purpose="train").prepare(rows())
        assert made.target_tokens is not None
        assert max(made.tokens.shape[1], made.target_tokens.shape[1]) == longest
        config.model.max_sequence_length -= 1
        assert "lower train.sequence_length" in "".join(map(str, config.problems()))


@pytest.mark.parametrize(("setting", "value"), [("noise_density", 0.5), ("mean_span_length", 1.0)])
def test_what_is_cut_out_of_a_row(setting: str, value: float) -> None:
    lengths = []
    for settings in ({}, {setting: value}):
        config = PretrainConfig(
            model=ModelConfig(shape="encoder_decoder", max_sequence_length=2 * LENGTH),
            train=TrainConfig(sequence_length=LENGTH),
            objective=ObjectiveConfig(name="span_corruption", **settings),  # type: ignore[arg-type]
        )
        made = make_objective(config, Words(), purpose="train")  # type: ignore[arg-type]
        lengths.append((made.lengths.source, made.lengths.target))
    # More is cut out, or it is cut into more spans, each of which has a sentinel on both sides.
    assert lengths[1][1] > lengths[0][1]
