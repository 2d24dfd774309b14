"""Codecs: what comes back, how far off it may be, and that nothing from outside does harm."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
import zstandard
from hypothesis import example, given
from hypothesis import strategies as st

from edge_runtime.errors import CorruptPayloadError, TooLargeError, UnknownCodecError, WireError
from edge_runtime.lora.adapter import Adapter, Matrix, Pair
from edge_runtime.wire import codec
from edge_runtime.wire.codec import AXES, CODECS, decode, encode, estimate
from tests.strategies import adapters, gaussian, laws, pairs
from tests.wire.blobcraft import one, same, tags, tensors

every_codec = pytest.mark.parametrize("name", sorted(CODECS))

LIMIT = 1 << 20
"""Enough for every blob in this file."""


# Error of each codec, per entry: documented precision of a factor, given the factor and the axis that counts its ranks.


def _exact(x: Matrix, _axis: int) -> Matrix:
    return np.zeros_like(x)


def _half_precision(x: Matrix, _axis: int) -> Matrix:
    """Eleven significant bits; below 2^-14 a fixed step of 2^-24."""
    return np.maximum(np.abs(x) * 2.0**-11, 2.0**-25).astype(np.float32)


def _eight_bits(x: Matrix, _axis: int) -> Matrix:
    """Eight significant bits."""
    return (np.abs(x) * 2.0**-8).astype(np.float32)


def _half_a_step(top: int) -> Callable[[Matrix, int], Matrix]:
    """Half of a step, of which the largest entry of the same rank has `top`; the step is rounded up to eight bits."""

    def error(x: Matrix, axis: int) -> Matrix:
        step = np.abs(x).max(axis=1 - axis, initial=0.0, keepdims=True) / top * (1 + 2.0**-7)
        return np.broadcast_to(step * 0.5001, x.shape).astype(np.float32)

    return error


def _clipped(x: Matrix, axis: int) -> Matrix:
    """Half of a step of 3/4 of the root mean square, and what lies beyond three and a half of them."""
    step = 0.75 * (1 + 2.0**-7) * np.sqrt(np.mean(np.square(x, dtype=np.float64), axis=1 - axis, keepdims=True))
    return np.asarray(np.maximum(step * 0.5001, np.abs(x) - 3 * step / (1 + 2.0**-6)), np.float32)


def _signs(x: Matrix, axis: int) -> Matrix:
    """All of it, or the scale: 1.7 times the mean size of the same rank at most."""
    mean = np.abs(x).mean(axis=1 - axis, keepdims=True, dtype=np.float64)
    return np.asarray(np.maximum(np.abs(x), 1.7 * (1 + 2.0**-7) * mean), np.float32)


def _ternary(x: Matrix, axis: int) -> Matrix:
    """Below the threshold a number is lost; above it, the scale is 1.7 times the largest at most."""
    root = np.sqrt(np.mean(np.square(x, dtype=np.float64), axis=1 - axis, keepdims=True))
    peak = np.abs(x).max(axis=1 - axis, initial=0.0, keepdims=True)
    return np.asarray(np.maximum(0.6001 * root, 1.7 * peak * (1 + 2.0**-7) - 0.5999 * root), np.float32)


def _of_a_block(x: Matrix, axis: int) -> Matrix:
    """Half of NF4's widest gap (0.30) times the largest number of the block, which the direction's largest bounds."""
    peak = np.abs(x).max(axis=1 - axis, initial=0.0, keepdims=True)
    return np.broadcast_to(0.5 * 0.304 * (1 + 2.0**-7) * peak, x.shape).astype(np.float32)


def _whole(x: Matrix, axis: int) -> Matrix:
    """What is not sent is lost; what is sent is as with int8."""
    return np.maximum(np.abs(x), _half_a_step(127)(x, axis))


ERRORS: dict[str, Callable[[Matrix, int], Matrix]] = {
    "fp32": _exact,
    "fp16": _half_precision,
    "bf16": _eight_bits,
    "int8": _half_a_step(127),
    "int4": _half_a_step(7),
    "nf4": _of_a_block,
    "int3": _clipped,
    "int2": _ternary,
    "int1": _signs,
    "topk": _whole,
    "none": _whole,
}

LOSSY_AGAIN = {"int3"}
"""Codecs whose step depends on the root mean square, which packing changes a little."""
COARSE = {"topk", "none"}
"""Codecs that leave numbers out."""
settled_codec = pytest.mark.parametrize("name", sorted(CODECS.keys() - LOSSY_AGAIN))
sending_codec = pytest.mark.parametrize("name", sorted(CODECS.keys() - {"none"}))


def test_every_codec_has_a_documented_error_here() -> None:
    assert ERRORS.keys() == CODECS.keys()


@every_codec
@laws
@given(adapters(decades=(-6, 2)))
def test_what_comes_back_is_within_the_documented_error(name: str, adapter: Adapter) -> None:
    back = decode(encode(adapter, name), LIMIT)

    assert back.ranks == adapter.ranks
    assert back.shapes == adapter.shapes
    for layer, pair in adapter.items():
        for factor, axis in AXES.items():
            sent, got = getattr(pair, factor), getattr(back[layer], factor)
            assert got.dtype == np.float32
            assert np.all(np.abs(got - sent) <= ERRORS[name](sent, axis))


@laws
@given(pairs(decades=(-40, 38)))
@example(gaussian((3, 4), 2, 0))
def test_fp32_returns_every_bit_over_its_whole_range(pair: Pair) -> None:
    huge = np.float32(1e38)
    kept = one(Pair(np.clip(pair.a, -huge, huge), np.clip(pair.b, -huge, huge)))

    assert decode(encode(kept, "fp32"), LIMIT).digest() == kept.digest()


@settled_codec
@laws
@given(adapters(decades=(-6, 2)))
def test_packing_what_was_unpacked_loses_nothing_more(name: str, adapter: Adapter) -> None:
    once = decode(encode(adapter, name), LIMIT)

    assert same(decode(encode(once, name), LIMIT), once)


@pytest.mark.parametrize("name", ["int1", "int2"])
@laws
@given(st.integers(0, 1 << 32))
def test_the_coarsest_grids_make_nothing_shorter_along_itself(name: str, seed: int) -> None:
    """What arrives reaches as far along what was sent as that itself: the error is noise across it."""
    pair = gaussian((2000, 3000), 2, seed)
    back = decode(encode(one(pair), name), LIMIT)["model.layers.0.q_proj"]

    for sent, got in (pair.a, back.a), (pair.b.T, back.b.T):
        np.testing.assert_allclose((got * sent).sum(axis=1), (sent * sent).sum(axis=1), rtol=5e-3)


@pytest.mark.parametrize("name", ["int1", "int2"])
def test_a_few_large_numbers_do_not_make_the_error_larger_than_the_numbers(name: str) -> None:
    """Or error feedback would amplify itself."""
    pair = gaussian((300, 300), 2, 0)
    spiky = Pair(pair.a**9, pair.b**9)
    back = decode(encode(one(spiky), name), LIMIT)["model.layers.0.q_proj"]

    for sent, got in (spiky.a, back.a), (spiky.b.T, back.b.T):
        assert np.all(((got - sent) ** 2).sum(axis=1) < (sent**2).sum(axis=1))


@laws
@given(st.integers(0, 1 << 32))
def test_int8_keeps_small_directions_beside_large_ones(seed: int) -> None:
    """Two ranks, twelve orders of magnitude apart: each has its own step."""
    pair = gaussian((5, 6), 2, seed)
    pair.a[1] *= np.float32(1e-12)
    pair.b[:, 1] *= np.float32(1e-12)
    back = decode(encode(one(pair), "int8"), LIMIT)["model.layers.0.q_proj"]

    for got, sent in (back.a[1], pair.a[1]), (back.b[:, 1], pair.b[:, 1]):
        assert np.abs(got - sent).max() <= np.abs(sent).max() / 250


@every_codec
@pytest.mark.parametrize("shape", [(3, 4), (1, 1)])
@pytest.mark.parametrize("rank", [0, 1, 5])
def test_zeros_come_back_as_zeros_at_every_rank(name: str, shape: tuple[int, int], rank: int) -> None:
    zeros = one(Pair(np.zeros((rank, shape[1]), np.float32), np.zeros((shape[0], rank), np.float32)))
    back = decode(encode(zeros, name), LIMIT)

    assert back.ranks == zeros.ranks
    assert back.shapes == zeros.shapes
    assert same(back, zeros)


@sending_codec
@pytest.mark.parametrize("value", [0.0, 1.0, -3.5, 1024.0])
def test_a_single_number_comes_back(name: str, value: float) -> None:
    x = np.full((1, 1), value, np.float32)
    back = decode(encode(one(Pair(x, x)), name), LIMIT)["model.layers.0.q_proj"]

    # Alone in its direction, a number is its own step, which has eight bits; int3 knows multiples of 3/4 of it.
    off = 0.3 if name == "int3" else 1e-2
    assert float(back.a[0, 0]) == pytest.approx(value, rel=off)
    assert float(back.b[0, 0]) == pytest.approx(value, rel=off)


@every_codec
def test_an_adapter_without_layers_comes_back(name: str) -> None:
    assert decode(encode(Adapter({}), name), LIMIT).ranks == {}


@every_codec
@laws
@given(adapters(decades=(-6, 2)))
def test_equal_adapters_give_equal_bytes(name: str, adapter: Adapter) -> None:
    """Whatever the order of the layers and the layout of the factors, and however often it is done."""
    again = Adapter(
        {n: Pair(np.asfortranarray(p.a), np.asfortranarray(p.b)) for n, p in reversed(list(adapter.items()))}
    )

    assert len({encode(x, name) for x in [adapter, again] * 4}) == 1


@every_codec
@laws
@given(adapters())
def test_the_estimate_is_the_size_of_the_packed_tensors(name: str, adapter: Adapter) -> None:
    safe = Adapter({n: Pair(np.clip(p.a, -1, 1), np.clip(p.b, -1, 1)) for n, p in adapter.items()})
    expected = sum(tensor.nbytes for tensor in tensors(safe, name).values())

    assert estimate(adapter.shapes, adapter.ranks, name) == expected


@every_codec
def test_the_estimate_leaves_out_layers_without_a_rank(name: str) -> None:
    shapes = {"x": (3, 4), "y": (5, 6)}

    assert estimate(shapes, {"x": 2}, name) == estimate({"x": (3, 4)}, {"x": 2, "y": 9}, name)


@every_codec
def test_the_layout_in_the_blob_decides_how_it_is_unpacked(name: str) -> None:
    assert f'"{name}",2' in tags(one(gaussian((3, 4), 2, 0)), name)["edge"]


@pytest.mark.parametrize("use", [lambda n: encode(Adapter({}), n), lambda n: estimate({}, {}, n), codec.codec])
def test_an_unknown_codec_is_refused_with_the_known_ones(use: Callable[[str], object]) -> None:
    with pytest.raises(UnknownCodecError) as refusal:
        use("int9")

    assert "int9" in str(refusal.value)
    assert all(name in str(refusal.value) for name in CODECS)


@every_codec
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("factor", sorted(AXES))
def test_nan_and_infinity_never_arrive(name: str, value: float, factor: str) -> None:
    pair = gaussian((3, 4), 2, 0)
    getattr(pair, factor)[1, 1] = value

    with pytest.raises(WireError):
        decode(encode(one(pair), name), LIMIT)


def test_fp16_refuses_what_it_cannot_hold_and_says_what_can() -> None:
    pair = gaussian((3, 4), 2, 0)
    pair.b[0, 0] = 65505

    with pytest.raises(WireError, match="int8 or fp32"):
        encode(one(pair), "fp16")


def test_the_limit_is_the_largest_size_that_is_accepted() -> None:
    blob = encode(one(gaussian((30, 40), 4, 0)), "fp32")
    size = zstandard.frame_content_size(blob)

    decode(blob, size)
    with pytest.raises(TooLargeError, match=str(size)):
        decode(blob, size - 1)


def frame_of(declared: int) -> bytes:
    """The start of a zstd frame that declares a size it does not have: a zip bomb in fourteen bytes."""
    magic, single_segment_and_eight_bytes_of_size = b"\x28\xb5\x2f\xfd", b"\xe0"
    return magic + single_segment_and_eight_bytes_of_size + declared.to_bytes(8, "little") + b"\x00"


@pytest.mark.parametrize(
    "bomb",
    [
        pytest.param(frame_of(1 << 62), id="declares four exbibytes"),
        pytest.param(frame_of(1 << 31), id="declares two gibibytes"),
        pytest.param(zstandard.compress(bytes(64 << 20)), id="is 64 MiB of zeros"),
    ],
)
def test_a_bomb_is_refused_before_anything_is_allocated(bomb: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(TooLargeError):
            decode(bomb, LIMIT)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak < LIMIT


def test_a_blob_that_hides_its_size_is_refused() -> None:
    content = zstandard.decompress(encode(one(gaussian((3, 4), 2, 0)), "fp32"))

    with pytest.raises(CorruptPayloadError, match="declares"):
        decode(zstandard.ZstdCompressor(write_content_size=False).compress(content), LIMIT)


def test_a_blob_that_lies_about_its_size_is_refused() -> None:
    # Fourteen bytes declare a thousand; the frame then holds one block of none.
    with pytest.raises(CorruptPayloadError):
        decode(frame_of(1000) + b"\x01\x00\x00", LIMIT)


@pytest.mark.parametrize("tail", [b"\x00", b"more", encode(Adapter({}), "fp32")])
def test_bytes_after_the_blob_are_refused(tail: bytes) -> None:
    with pytest.raises(CorruptPayloadError):
        decode(encode(one(gaussian((3, 4), 2, 0)), "fp32") + tail, LIMIT)
