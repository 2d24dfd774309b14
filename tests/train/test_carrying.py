"""The moments of one round as the beginning of the next."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("bitsandbytes")

from edge_runtime.lora.adapter import Matrix, Pair  # noqa: E402 - after the check that torch is there
from edge_runtime.lora.algebra import decompose, to_pair  # noqa: E402 - as above
from edge_runtime.lora.rotation import align  # noqa: E402 - as above
from edge_runtime.train.carrying import LEAST_COSINE, carried  # noqa: E402 - as above
from edge_runtime.train.optimizer import OPTIMIZERS, build, get  # noqa: E402 - as above
from edge_runtime.train.resume import RoundState, capture  # noqa: E402 - as above

pytestmark = pytest.mark.torch

TARGET = torch.randn(96, 72, generator=torch.Generator().manual_seed(0)) / 10
INPUTS = torch.randn(64, 72, generator=torch.Generator().manual_seed(1))


def trained(name: str, rank: int = 64, steps: int = 12) -> RoundState:
    """The end of a round on a small regression; large enough for 8-bit moments."""
    draw = torch.Generator().manual_seed(2)
    found = {
        "x.a": torch.nn.Parameter(torch.randn(rank, 72, generator=draw) / 8),
        "x.b": torch.nn.Parameter(torch.randn(96, rank, generator=draw) / 80),
    }
    optimizer = build(name, found, learning_rate=1e-3, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        ((INPUTS @ (found["x.b"] @ found["x.a"] - TARGET).T) ** 2).mean().backward()
        optimizer.step()
    return capture(found, optimizer, ())


def factorised_anew(state: RoundState, rank: int = 64) -> dict[str, Matrix]:
    """The same product in the server's form."""
    pair = to_pair(decompose([(1.0, Pair(state.parameters["x.a"], state.parameters["x.b"]))]), 0, rank)
    return {"x.a": pair.a, "x.b": pair.b}


def rotated(state: RoundState, seed: int = 0) -> dict[str, Matrix]:
    rotation, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((64, 64)))
    return {
        "x.a": (rotation @ state.parameters["x.a"]).astype(np.float32),
        "x.b": (state.parameters["x.b"] @ rotation.T).astype(np.float32),
    }


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_first_moments_keep_their_meaning_under_a_rotation(name: str) -> None:
    """Seen from the product, the step b m_a + m_b a is the same in both factorisations."""
    last = trained(name)
    now = rotated(last)
    found = carried(last, now, name)
    assert (found.kept, found.layers, found.start.reports) == (1, 1, ())

    def direction(factors: dict[str, Matrix], state: RoundState) -> Matrix:
        read = get(name).read
        of_a, of_b = read(state.moments["x.a"]), read(state.moments["x.b"])
        step: Matrix = factors["x.b"] @ of_a.first + of_b.first @ factors["x.a"]
        return step

    before, after = direction(dict(last.parameters), last), direction(now, found.start)
    assert np.linalg.norm(after - before) < (0.05 if name == "adamw_8bit" else 1e-3) * np.linalg.norm(before)
    assert get(name).read(found.start.moments["x.a"]).steps == 12


def test_a_factorisation_that_is_the_same_leaves_the_moments_as_they_are() -> None:
    last = trained("adamw")
    found = carried(last, dict(last.parameters), "adamw")
    for parameter, held in last.moments.items():
        for entry, values in held.items():
            np.testing.assert_allclose(found.start.moments[parameter][entry], values, rtol=1e-3, atol=1e-7)


def test_the_parameters_stay_as_they_were_received() -> None:
    last = trained("adamw")
    now = factorised_anew(last)
    found = carried(last, now, "adamw")

    assert {name: values.tobytes() for name, values in found.start.parameters.items()} == {
        name: values.tobytes() for name, values in now.items()
    }


def test_layers_of_another_rank_or_with_nothing_in_common_begin_without_moments() -> None:
    last = trained("adamw")
    draw = np.random.default_rng(0)
    others = [
        factorised_anew(last, rank=32),
        {name: draw.standard_normal(values.shape).astype(np.float32) for name, values in last.parameters.items()},
        {name.replace("x", "y"): values for name, values in last.parameters.items()},
    ]
    for now in others:
        found = carried(last, now, "adamw")
        assert (found.kept, found.start.moments) == (0, {})


def test_8_bit_tables_are_shared_again() -> None:
    last = trained("adamw_8bit")
    start = carried(last, rotated(last), "adamw_8bit").start

    assert start.moments["x.a"]["qmap1"] is start.moments["x.b"]["qmap1"]


def test_what_a_server_makes_of_a_trained_slice_is_near_enough_to_align() -> None:
    """What the threshold must let through: a slice in the server's form, trained a little, factorised anew."""
    draw = np.random.default_rng(0)

    def noise(*shape: int) -> Matrix:
        return draw.standard_normal(shape).astype(np.float32)

    received = to_pair(decompose([(1.0, Pair(noise(4, 72), 0.01 * noise(96, 4)))]), 0, 4)
    trained_slice = Pair(received.a + 0.02 * noise(4, 72), received.b + 0.02 * noise(96, 4))
    again = to_pair(decompose([(1.0, trained_slice)]), 0, 4)

    assert align(again, trained_slice).cosine > LEAST_COSINE + 0.1
