"""One export from beginning to end: what is refused, what is kept and under which name, and what lies beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import export  # noqa: E402 - after the check that torch is there
from edge_runtime.errors import BaseModelError, EdgeRuntimeError, ExportError, missing_extra  # noqa: E402 - as above
from export import origin  # noqa: E402 - as above
from export.making import make  # noqa: E402 - as above
from export.origin import Origin  # noqa: E402 - as above
from export.subject import Logits, Subject  # noqa: E402 - as above
from export.verify import Reference  # noqa: E402 - as above
from tests.train import tiny  # noqa: E402 - as above

pytestmark = pytest.mark.torch

ABOUT = Origin(base="org/base", fingerprint="a" * 64, family="lora", kind="personal", fleet="greenhouses")
SUBJECT = Subject(tiny.random_adapter(tiny.MIXED), 2.0, "org/base", None)
LIVE = np.array([[0, 3, 1], [4, 0, 1], [0, 1, 5]], np.float32)
KNOWN = Reference(((1, 0),), ((2,),), (LIVE,), effect=0.5)


@dataclass
class Fake:
    """An engine that gives what a test wants, and remembers that it was closed."""

    found: Logits
    token: int = 2
    closed: int = 0

    def logits(self, tokens: Sequence[int]) -> Logits:
        return self.found[: len(tokens)]

    def greedy(self, _tokens: Sequence[int], count: int) -> list[int]:
        return [self.token] * count

    def close(self) -> None:
        self.closed += 1


Register = Callable[..., None]


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Register:
    """Puts a format into the place of peft's."""

    def put(engine: Fake | EdgeRuntimeError, *, tolerance: float = 1e-4, agreement: float = 1.0) -> None:
        def opened(_subject: Subject, folder: Path) -> Fake:
            assert (folder / "weights").read_text() == "w"
            if isinstance(engine, EdgeRuntimeError):
                raise engine
            return engine

        def write(_subject: Subject, folder: Path) -> None:
            (folder / "weights").write_text("w")

        form = export.Format(
            lambda _: None, write, opened, "a test", needs_base=False, tolerance=tolerance, agreement=agreement,
            extra="client",
        )  # fmt: skip
        monkeypatch.setitem(export.FORMATS, "peft", form)

    return put


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_good_export_lies_there_with_its_parity_its_card_and_where_it_comes_from(
    register: Register, tmp_path: Path
) -> None:
    engine = Fake(LIVE + np.float32(5e-5))
    register(engine)
    made = make("peft", SUBJECT, tmp_path / "peft", ABOUT, KNOWN)
    told = json.loads((tmp_path / "peft" / "parity.json").read_text())

    assert names(tmp_path) == ["peft"]
    assert names(made.folder) == ["README.md", "origin.json", "parity.json", "weights"]
    assert made.size == sum(path.stat().st_size for path in made.folder.iterdir())
    assert told["good"] is True
    assert told["max_logit_diff"] == pytest.approx(5e-5, rel=0.1)
    assert (told["greedy_agreement"], told["greedy_tokens"], told["positions"]) == (1.0, 1, 3)
    assert origin.read(made.folder) == ABOUT
    assert "5.0e-05" in (made.folder / "README.md").read_text()
    assert engine.closed == 1


@pytest.mark.parametrize(
    ("engine", "words"),
    [(Fake(LIVE + np.float32(0.1)), "changes logits by 1.0e-01"), (Fake(LIVE, token=1), "0.0 % of 1 tokens")],
)
def test_what_does_not_agree_is_kept_under_a_name_that_says_so_and_called_bad(
    register: Register, tmp_path: Path, engine: Fake, words: str
) -> None:
    register(engine)
    with pytest.raises(ExportError, match=words) as caught:
        make("peft", SUBJECT, tmp_path / "peft", ABOUT, KNOWN)

    assert names(tmp_path) == ["peft.refused"]
    assert str(tmp_path / "peft.refused") in str(caught.value)
    assert json.loads((tmp_path / "peft.refused" / "parity.json").read_text())["good"] is False
    assert engine.closed == 1


@pytest.mark.parametrize(
    ("error", "kept", "code"),
    [
        (missing_extra("llama", "verify"), "unverified", 16),
        (BaseModelError("no base"), "unverified", 11),
        (ExportError("it does not load"), "refused", 15),
    ],
)
def test_what_cannot_be_opened_is_kept_and_ends_with_the_code_of_its_family(
    register: Register, tmp_path: Path, error: EdgeRuntimeError, kept: str, code: int
) -> None:
    register(error)
    with pytest.raises(type(error), match=str(error)[:8]) as caught:
        make("peft", SUBJECT, tmp_path / "peft", ABOUT, KNOWN)

    assert caught.value.exit_code == code
    assert names(tmp_path) == [f"peft.{kept}"]
    assert ("--no-verify" in str(caught.value)) == (code == 16)


def test_memory_that_runs_out_in_the_engine_does_not_take_what_was_written_with_it(
    register: Register, tmp_path: Path
) -> None:
    class Full(Fake):
        def logits(self, _tokens: Sequence[int]) -> Logits:
            raise MemoryError

    register(Full(LIVE))
    with pytest.raises(MemoryError):
        make("peft", SUBJECT, tmp_path / "peft", ABOUT, KNOWN)

    assert names(tmp_path) == ["peft.unverified"]


def test_without_verification_no_engine_is_opened_and_the_card_says_so(register: Register, tmp_path: Path) -> None:
    register(missing_extra("llama", "verify"))
    made = make("peft", SUBJECT, tmp_path / "peft", ABOUT, None)

    assert made.parity is None
    assert names(made.folder) == ["README.md", "origin.json", "weights"]
    assert "Not verified" in (made.folder / "README.md").read_text()


def test_where_agreement_alone_judges_no_distance_is_too_large(register: Register, tmp_path: Path) -> None:
    register(Fake(LIVE + np.float32(9.0)), tolerance=math.inf, agreement=0.95)
    make("peft", SUBJECT, tmp_path / "peft", ABOUT, KNOWN)
    told = json.loads((tmp_path / "peft" / "parity.json").read_text())

    assert told["good"] is True
    assert told["max_logit_diff"] == pytest.approx(9.0)
    assert told["tolerance"] is None


def test_an_engine_of_probabilities_is_asked_for_those(register: Register, tmp_path: Path) -> None:
    class Probable(Fake):
        def log_probabilities(self, tokens: Sequence[int], vocabulary: int) -> Logits:
            assert vocabulary == LIVE.shape[1]
            assert tokens == KNOWN.prompts[0]
            shifted = np.exp(LIVE[: len(tokens)])
            found = np.log(shifted / shifted.sum(1, keepdims=True)) + np.float32(0.01)
            found[:, 0] = -np.inf  # a token that the engine does not name
            return np.asarray(found, np.float32)

    register(Probable(LIVE), tolerance=math.inf, agreement=0.95)
    make("peft", SUBJECT, tmp_path / "peft", ABOUT, KNOWN)
    told = json.loads((tmp_path / "peft" / "parity.json").read_text())

    assert told["max_log_probability_diff"] == pytest.approx(0.01, abs=1e-4)


def test_more_files_may_go_along(register: Register, tmp_path: Path) -> None:
    register(Fake(LIVE))
    make("peft", SUBJECT, tmp_path / "peft", ABOUT, None, more=lambda part: (part / "beside").mkdir())

    assert (tmp_path / "peft" / "beside").is_dir()
