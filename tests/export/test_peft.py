"""A trained adapter leaves as a PEFT folder, and PEFT computes from it what the live model computes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

import export  # noqa: E402 - after the check that torch is there
from edge_runtime.errors import ConfigError, ExportError  # noqa: E402 - as above
from edge_runtime.lora.adapter import Adapter  # noqa: E402 - as above
from edge_runtime.lora.files import read_peft_folder  # noqa: E402 - as above
from edge_runtime.train.base import PreparedBase, load, prepare  # noqa: E402 - as above
from edge_runtime.train.live import LiveModel, attach, load_adapter, read_all  # noqa: E402 - as above
from edge_runtime.train.loop import LocalTask, train_round  # noqa: E402 - as above
from export.parity import Parity  # noqa: E402 - as above
from export.subject import Subject  # noqa: E402 - as above
from export.verify import judge, reference_of  # noqa: E402 - as above
from tests.train import tiny  # noqa: E402 - as above

pytestmark = pytest.mark.torch

PROMPTS = ((3, 4, 5, 6), (9, 77, 301))
TASK = LocalTask(steps=4, learning_rate=1e-2, micro_batch=2)
# Some layers trained in part, one whole, one only held; ranks 3, 5, 6 and 8; rows out of order.
DIRECTIONS = {tiny.layer(1, "q_proj"): (5, 0, 3, 1), tiny.layer(2, "o_proj"): (7,)}


@pytest.fixture(scope="module", params=[("fp32", "fp32"), ("nf4", "bf16")], ids=["fp32", "nf4 in bf16"])
def trained(
    request: pytest.FixtureRequest, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[PreparedBase, LiveModel]:
    """A base model at some precision, and a live model on it after a local round."""
    precision, compute = request.param
    prepared = prepare(str(tiny_base), precision=precision, cache=tmp_path_factory.mktemp("cache"))
    live = attach(load(prepared, compute_dtype=compute).model, tiny.MIXED, scaling=0.7)
    load_adapter(live, tiny.random_adapter(tiny.MIXED), DIRECTIONS)
    train_round(live, tiny.examples(6), TASK)
    return prepared, live


def subject_of(trained: tuple[PreparedBase, LiveModel], *, scaling: float | None = None) -> Subject:
    prepared, live = trained
    return Subject(read_all(live), scaling or live.scaling, "tiny", prepared)


def parity_of(trained: tuple[PreparedBase, LiveModel], folder: Path, scratch: Path) -> Parity:
    """What the engine of a folder makes of what the live model says."""
    scratch.mkdir()
    known = reference_of(trained[1], PROMPTS, scratch, count=4)
    return judge(known, export.get("peft").open_engine(subject_of(trained), folder))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    found = tmp_path / "peft"
    found.mkdir()
    return found


def test_peft_computes_from_the_folder_what_the_live_model_computes(
    trained: tuple[PreparedBase, LiveModel], folder: Path, tmp_path: Path
) -> None:
    """Ranks differ from layer to layer, and only a part of each layer was trained."""
    export.get("peft").write(subject_of(trained), folder)
    found = parity_of(trained, folder, tmp_path / "scratch")

    assert found.distance.max_logit_diff <= 1e-5 * max(1.0, found.effect)
    assert found.distance.same_top == found.agreement == 1.0
    assert found.distance.kl == pytest.approx(0.0, abs=1e-9)
    assert found.effect > 0.1
    assert found.greedy_tokens == 4 * len(PROMPTS)
    assert found.distance.positions == sum(map(len, PROMPTS)) + found.greedy_tokens


def test_the_scale_of_the_folder_need_not_be_the_fleets(
    trained: tuple[PreparedBase, LiveModel], folder: Path, tmp_path: Path
) -> None:
    export.get("peft").write(subject_of(trained, scaling=4.0), folder)

    assert parity_of(trained, folder, tmp_path / "scratch").distance.max_logit_diff <= 1e-4


def test_a_folder_that_lost_its_scale_does_not_agree(
    trained: tuple[PreparedBase, LiveModel], folder: Path, tmp_path: Path
) -> None:
    """What the comparison is there to find: it loads, and answers otherwise."""
    export.get("peft").write(subject_of(trained), folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"alpha_pattern": {}, "lora_alpha": 1}))
    found = parity_of(trained, folder, tmp_path / "scratch")

    assert found.distance.max_logit_diff > 1e-2
    assert found.distance.kl > 1e-6


def test_a_folder_that_peft_cannot_load_is_an_export_error(
    trained: tuple[PreparedBase, LiveModel], folder: Path
) -> None:
    export.get("peft").write(subject_of(trained), folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rank_pattern": {}}))

    with pytest.raises(ExportError, match="expected PEFT to load"):
        export.get("peft").open_engine(subject_of(trained), folder)


def test_the_folder_reads_back_as_the_adapter_that_left(folder: Path) -> None:
    adapter = tiny.random_adapter(tiny.MIXED)
    export.get("peft").write(Subject(adapter, 2.0, "org/base", None), folder)

    assert read_peft_folder(folder).digest() == adapter.digest()
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/base"


def test_a_folder_that_cannot_be_written_is_an_export_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ExportError, match="cannot write"):
        export.get("peft").write(Subject(tiny.random_adapter(tiny.MIXED), 1.0, "b", None), tmp_path / "file")
    with pytest.raises(ExportError, match="at least one direction"):
        export.get("peft").refuse(Subject(Adapter({}), 1.0, "b", None))


def test_an_unknown_format_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="peft"):
        export.get("pefft")
