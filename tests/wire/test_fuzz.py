"""Whatever arrives, from anybody: nothing breaks, and nothing but an error of the tree is raised.

`python -m benchmarks.fuzz` throws a hundred thousand inputs; here are some thousand, and the corpus: sound inputs,
hostile ones of each kind, and every input that ever did harm. A new one is a file in `corpus/`, named by its kind.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import fuzz, fuzz_inputs, fuzz_targets
from edge_runtime.wire.codec import CODECS
from tests.strategies import laws

CORPUS = sorted((Path(__file__).parent / "corpus").iterdir())
MAKERS = fuzz_inputs.makers()


def kind_of(path: Path) -> str:
    return path.name.partition("-")[0]


@pytest.mark.parametrize("name", sorted(fuzz_targets.PLAIN))
@laws
@given(st.randoms(use_true_random=False))
def test_parsers_and_decoder_refuse_in_order(name: str, draw: Random) -> None:
    kind, target = fuzz_targets.PLAIN[name]
    target(MAKERS[kind](draw))


@pytest.mark.parametrize(("name", "count"), [("server", 1000), ("new server", 60), ("device", 800)])
def test_server_and_device_note_it_and_go_on(name: str, count: int, tmp_path: Path) -> None:
    outcome = fuzz.throw(name, count, 1, tmp_path)
    assert (outcome.inputs, outcome.harm) == (count, 0), outcome.said


@pytest.mark.parametrize("path", CORPUS, ids=[path.name for path in CORPUS])
def test_what_did_harm_once_does_none(path: Path, tmp_path: Path) -> None:
    payload = path.read_bytes()
    for kind, target in fuzz_targets.PLAIN.values():
        if kind == kind_of(path):
            target(payload)
    for kinds, make in fuzz_targets.ENDS.values():
        end = make(tmp_path, Random(0))
        if kind_of(path) in kinds:
            for _ in range(4):  # on several topics
                end(payload)
        end.close()


def test_the_seeds_cover_every_codec_and_the_corpus_stays_small() -> None:
    kinds = {name for name in CODECS if any(rf"\"{name}\"".encode() in raw(blob) for blob in fuzz_inputs.sound_blobs())}
    assert kinds == set(CODECS)
    assert sum(path.stat().st_size for path in CORPUS) < 200_000
    assert {kind_of(path) for path in CORPUS} == set(MAKERS)


def raw(blob: bytes) -> bytes:
    return zstandard.decompress(blob)


@pytest.mark.slow
def test_a_hundred_thousand_inputs_do_no_harm(tmp_path: Path) -> None:
    outcomes = [fuzz.in_a_child(target, count, 2, tmp_path) for target, count in fuzz.COUNTS.items()]
    assert not any(outcome.crashed or outcome.harm for outcome in outcomes), [outcome.said for outcome in outcomes]
    assert sum(outcome.inputs for outcome in outcomes) >= 100_000
