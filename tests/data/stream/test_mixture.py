"""Which source a sequence comes from: exact shares at every prefix, through all phases."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from bigtx.data.stream.mixture import MAX_ERROR, MAX_SPAN, Mixture, Phase
from bigtx.utils.errors import DataError


def drawn(mixture: Mixture, start: int, count: int) -> np.ndarray:
    """The sources of a stretch of sequences; each source's own numbers must follow each other."""
    sources = np.empty(count, int)
    for source, slots, index in mixture.assign(np.arange(start, start + count)):
        sources[slots] = source
        assert index.tolist() == list(range(mixture.counts(start)[source], mixture.counts(start + count)[source]))
    return sources


def ideal_counts(phases: list[Phase], prefix: int) -> list[Fraction]:
    ends = [*(phase.start for phase in phases[1:]), prefix]
    counts = [Fraction(0)] * len(phases[0].weights)
    for phase, end in zip(phases, ends, strict=True):
        weights = [Fraction(weight) for weight in phase.weights]
        length = max(0, min(end, prefix) - phase.start)
        counts = [count + length * weight / sum(weights) for count, weight in zip(counts, weights, strict=True)]
    return counts


def largest_error(phases: list[Phase], start: int, count: int) -> Fraction:
    """How far any source is off its share at any prefix from start to start + count."""
    mixture = Mixture(phases)
    counts, worst = mixture.counts(start), Fraction(0)
    for prefix, source in enumerate(drawn(mixture, start, count).tolist(), start + 1):
        counts[source] += 1
        errors = [abs(count - ideal) for count, ideal in zip(counts, ideal_counts(phases, prefix), strict=True)]
        worst = max(worst, *errors)
    assert counts == mixture.counts(start + count) and sum(counts) == start + count
    return worst


weight = st.floats(1e-6, 1e6)


@given(st.lists(weight, min_size=1, max_size=40), st.integers(0, 10**12))
@settings(max_examples=60)
def test_no_prefix_is_off_by_two_sequences(weights: list[float], start: int) -> None:
    assert largest_error([Phase(0, weights)], start, 40) < 2


@st.composite
def phased(draw: st.DrawFn, max_sources: int) -> list[Phase]:
    num_sources = draw(st.integers(1, max_sources))
    lengths = draw(st.lists(st.integers(1, 200), max_size=4))
    phases = []
    for length in [0, *lengths]:
        weights = draw(st.lists(weight | st.just(0.0), min_size=num_sources, max_size=num_sources).filter(any))
        phases.append(Phase(phases[-1].start + length if phases else 0, weights))
    assume(all(any(phase.weights[source] for phase in phases) for source in range(num_sources)))
    return phases


@given(phased(16))
@settings(max_examples=15)
def test_up_to_16_sources_keep_their_shares_in_any_phases(phases: list[Phase]) -> None:
    assert largest_error(phases, 0, phases[-1].start + 100) <= MAX_ERROR


@given(phased(30), st.integers(0, 10**11))
@settings(max_examples=15)
def test_phases_far_into_a_run_are_as_exact(phases: list[Phase], before: int) -> None:
    late = [phases[0], *(Phase(phase.start + before, phase.weights) for phase in phases[1:])]
    try:
        assert largest_error(late, before, 300) <= MAX_ERROR
    except DataError:
        assert len(late[0].weights) > 16 and len(late) > 1


def test_phases_that_cannot_be_kept_exactly_are_refused_with_the_figure() -> None:
    generator = np.random.default_rng(1)
    weights = 10.0 ** generator.uniform(-5, 5, (4, 60))
    with pytest.raises(DataError, match=r"3 phases of 60 sources.*off its share by \d\.\d\d sequences, but 2 are"):
        Mixture([Phase(100 * number, row.tolist()) for number, row in enumerate(weights)])


def test_one_phase_is_the_same_as_the_same_phase_twice_up_to_its_error() -> None:
    weights = [5.0, 3.0, 2.0]
    once, twice = Mixture([Phase(0, weights)]), Mixture([Phase(0, weights), Phase(1001, weights)])
    assert drawn(once, 0, 3000).tolist() == drawn(twice, 0, 3000).tolist()


def test_a_source_is_read_in_its_phases_alone() -> None:
    phases = [Phase(0, [1.0, 0.0, 3.0]), Phase(400, [0.0, 1.0, 1.0]), Phase(1000, [1.0, 0.0, 0.0])]
    sources = drawn(Mixture(phases), 0, 2000)
    for begin, end, absent in ((0, 398, {1}), (402, 998, {0}), (1002, 2000, {1, 2})):
        assert not absent & set(sources[begin:end].tolist())


@pytest.mark.parametrize("start", [0, 990, 10**12 - 50])
def test_a_place_is_the_same_however_it_is_asked_for(start: int) -> None:
    mixture = Mixture([Phase(0, [0.7, 0.2, 0.1]), Phase(1000, [0.0, 1.0, 2.0]), Phase(10**12, [1.0, 1.0, 0.5])])
    together = drawn(mixture, start, 100)
    assert [drawn(mixture, start + number, 1)[0] for number in range(100)] == together.tolist()
    apart = np.array([start, start + 7, start + 99, start + MAX_SPAN - 1])
    found = {int(slot): source for source, slots, _ in mixture.assign(apart) for slot in slots}
    assert [found[slot] for slot in range(3)] == together[[0, 7, 99]].tolist()
    assert found[3] == drawn(mixture, start + MAX_SPAN - 1, 1)[0]
