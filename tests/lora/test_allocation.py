"""Ranks by the spectrum: never more than planned, the best that fits, and steady."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.lora.adapter import LayerSlot, Slot
from edge_runtime.lora.algebra import decompose, to_pair
from edge_runtime.lora.allocation import WORTH_IT, ranks, singular_values
from tests.strategies import gaussian, laws


def numbers(found: dict[str, int], slot: Slot) -> int:
    return sum(rank * sum(slot.shapes[name]) for name, rank in found.items())


def energy(found: dict[str, int], spectra: dict[str, np.ndarray]) -> float:
    return float(sum(np.sum(spectra[name][:rank] ** 2) for name, rank in found.items()))


@st.composite
def cases(draw: st.DrawFn) -> tuple[Slot, dict[str, np.ndarray]]:
    """Layers of several sizes, each with a spectrum that falls."""
    layers, spectra = {}, {}
    seed = np.random.default_rng(draw(st.integers(0, 1 << 20)))
    for at in range(draw(st.integers(1, 4))):
        held = draw(st.integers(1, 10))
        layers[f"l{at}"] = LayerSlot(
            draw(st.sampled_from([8, 16, 48])), draw(st.sampled_from([8, 24])), held, draw(st.integers(0, held))
        )
        spectra[f"l{at}"] = np.sort(np.exp(3 * seed.standard_normal(held)))[::-1]
    return Slot(layers), spectra


@laws
@given(cases(), st.integers(1, 200))
def test_no_more_numbers_than_planned_and_no_more_directions_than_held(
    case: tuple[Slot, dict[str, np.ndarray]], least: int
) -> None:
    slot, spectra = case
    found = ranks(slot, spectra, least=least)

    assert found.keys() == slot.trained.keys()
    assert numbers(found, slot) <= numbers(slot.trained, slot)
    for name, rank in found.items():
        assert 1 <= rank <= slot.held[name]
        smaller = min(slot.shapes[name])
        assert rank * smaller >= min(least, slot.trained[name] * smaller), "moments that were 8-bit stay 8-bit"
    assert energy(found, spectra) >= energy(slot.trained, spectra) * (1 - 1e-12), "never worse than the uniform ranks"


def favoured(found: dict[str, int], before: dict[str, int], spectra: dict[str, np.ndarray]) -> float:
    """Energy, that of the directions which were trained before counting WORTH_IT more."""
    both = {name: min(rank, before[name]) for name, rank in found.items()}
    return energy(found, spectra) + WORTH_IT * energy(both, spectra)


@laws
@given(st.integers(0, 1 << 20), st.sampled_from([None, *itertools.permutations((1, 2, 3))]))
def test_among_layers_of_one_size_it_is_the_best_that_is_worth_the_change(
    seed: int, shared: tuple[int, ...] | None
) -> None:
    """Against all other ways to share six directions, each layer having its least."""
    draw = np.random.default_rng(seed)
    slot = Slot({name: LayerSlot(8, 8, 5, 2) for name in "abc"})
    spectra = {name: np.sort(np.exp(2 * draw.standard_normal(5)))[::-1] for name in "abc"}
    before = dict(zip("abc", shared or (2, 2, 2), strict=True))
    ways = [dict(zip("abc", way, strict=True)) for way in itertools.product(range(1, 6), repeat=3) if sum(way) == 6]
    found = ranks(slot, spectra, before if shared else None)

    assert found in ways
    assert favoured(found, before, spectra) >= max(favoured(way, before, spectra) for way in ways) * (1 - 1e-12)
    assert ranks(slot, spectra, found) == found, "who looks again at the same spectrum stays"


def test_what_every_allocation_trains_does_not_hide_what_an_exchange_is_worth() -> None:
    """The first directions hold nearly all energy, as they do in adapters that have learnt for some rounds."""
    slot = Slot({name: LayerSlot(8, 8, 4, 2) for name in "ab"})
    spectra = {"a": np.array([100.0, 4.0, 3.0, 1.0]), "b": np.array([100.0, 2.0, 0.1, 0.1])}

    assert energy({"a": 3, "b": 1}, spectra) < 1.001 * energy({"a": 2, "b": 2}, spectra)
    assert ranks(slot, spectra) == {"a": 3, "b": 1}


def test_without_a_spectrum_or_without_more_than_is_trained_the_plan_stays() -> None:
    slot = Slot({name: LayerSlot(8, 8, 4, 2) for name in "ab"})
    whole = Slot({name: LayerSlot(8, 8, 2, 2) for name in "ab"})

    assert ranks(slot, {"a": np.zeros(4), "b": np.zeros(4)}) == {"a": 2, "b": 2}
    assert ranks(whole, {"a": np.array([9.0, 8.0]), "b": np.array([0.1, 0.0])}) == {"a": 2, "b": 2}


def test_energy_draws_directions_to_where_it_is() -> None:
    slot = Slot({name: LayerSlot(8, 8, 8, 4) for name in "ab"})
    found = ranks(slot, {"a": np.full(8, 3.0), "b": np.linspace(0.2, 0.1, 8)})

    assert found == {"a": 7, "b": 1}


def test_ranks_stay_until_others_are_worth_it() -> None:
    slot = Slot({name: LayerSlot(8, 8, 4, 2) for name in "ab"})
    first = {"a": np.array([4.0, 3.0, 2.0, 1.0]), "b": np.array([1.0, 0.2, 0.1, 0.1])}
    before = ranks(slot, first)
    turned = {"a": np.array([4.0, 3.0, 1.0, 0.1]), "b": np.array([4.0, 1.1, 0.1, 0.1])}

    assert before == {"a": 3, "b": 1}
    assert ranks(slot, turned) == {"a": 2, "b": 2}
    assert ranks(slot, turned, before) == before, "1.1² is less than a quarter above 1²"
    assert ranks(slot, {**turned, "b": np.array([4.0, 1.2, 0.1, 0.1])}, before) == {"a": 2, "b": 2}
    assert ranks(slot, {"a": turned["a"], "b": np.full(4, 4.0)}, before) == {"a": 1, "b": 3}


def test_a_large_direction_is_not_given_up_for_one_that_leaves_its_room_empty() -> None:
    """`a` takes 16 numbers a direction, `b` 96, and `b` keeps one in any case."""
    slot = Slot({"a": LayerSlot(8, 8, 4, 1), "b": LayerSlot(48, 48, 4, 2)})
    spectra = {"a": np.array([9.0, 3.0, 0.0, 0.0]), "b": np.array([9.0, 6.0, 0.0, 0.0])}

    assert ranks(slot, spectra) == {"a": 1, "b": 2}, "3² / 16 is more than 6² / 96, but 3² is less than 6²"


@pytest.mark.parametrize("before", [{"a": 4, "b": 4}, {"a": 5, "b": 1}, {"a": 1}, {"a": 0, "b": 1}])
def test_ranks_of_another_plan_are_forgotten(before: dict[str, int]) -> None:
    slot = Slot({name: LayerSlot(8, 8, 4, 2) for name in "ab"})

    assert ranks(slot, {"a": np.ones(4), "b": np.ones(4)}, before) == {"a": 2, "b": 2}


@laws
@given(st.integers(0, 1 << 20))
def test_a_device_reads_the_spectrum_off_what_the_server_hands_out(seed: int) -> None:
    spectrum = decompose([(1.0, gaussian((20, 30), 6, seed))])

    np.testing.assert_allclose(singular_values(to_pair(spectrum, 0, 5)), spectrum.s[:5], rtol=1e-5)
