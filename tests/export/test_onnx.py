"""Graphs compute in ONNX Runtime what the live model computes, with the adapter in the weights or beside them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")
pytest.importorskip("optimum.exporters.onnx")

import importlib.metadata  # noqa: E402 - after the checks above

from edge_runtime.errors import ConfigError, ExportError, MissingExtraError  # noqa: E402 - as above
from edge_runtime.lora.adapter import Adapter, Pair  # noqa: E402 - as above
from edge_runtime.train.base import PreparedBase, prepare  # noqa: E402 - as above
from export import onnx, onnx_adapter, onnx_engine, onnx_graph  # noqa: E402 - as above
from export.onnx_engine import OnnxEngine  # noqa: E402 - as above
from export.subject import Subject  # noqa: E402 - as above
from tests.export.subjects import LINEAR, PROMPT, SCALING, TRACES, Live, family_adapter, live  # noqa: E402 - as above

pytestmark = [pytest.mark.torch, pytest.mark.skipif(not TRACES, reason="optimum-onnx needs transformers below 4.58")]

QUERY = "model.layers.1.self_attn.q_proj"


def of_rank(found: Adapter, rank: int, factor: float) -> Adapter:
    """The first directions of each layer, larger or smaller."""
    return Adapter({name: Pair(pair.a[:rank], factor * pair.b[:, :rank]) for name, pair in found.items()})


@pytest.fixture(scope="module")
def prepared(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> PreparedBase:
    return prepare(str(tiny_base), precision="fp32", cache=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def lora(prepared: PreparedBase, tiny_base: Path) -> Live:
    return live(prepared, family_adapter(tiny_base, "lora", LINEAR))


@pytest.fixture(scope="module")
def graph(lora: Live, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graph that takes adapters, and one of five directions in each linear layer."""
    folder = tmp_path_factory.mktemp("graph")
    onnx_adapter.write(lora.subject, folder)
    return folder


@pytest.fixture
def engine(lora: Live, graph: Path) -> Iterator[OnnxEngine]:
    engine = onnx_adapter.open_engine(lora.subject, graph)
    yield engine
    engine.close()


def test_a_graph_with_the_adapter_in_its_weights(lora: Live, tmp_path: Path) -> None:
    assert np.abs(lora.logits - lora.plain).max() > 0.1

    onnx.refuse(lora.subject)
    onnx.write(lora.subject, tmp_path)
    engine = onnx.open_engine(lora.subject, tmp_path)

    np.testing.assert_allclose(engine.logits(PROMPT), lora.logits, rtol=0, atol=1e-4)
    assert engine.greedy(PROMPT, 8) == lora.greedy
    assert engine.greedy(PROMPT, 0) == []
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {"model.onnx", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert not any(name.startswith(".") for name in names)
    engine.close()


@pytest.mark.parametrize(("weights", "largest"), [("int8", 0.05), ("int4", 0.4)])
def test_weights_are_kept_in_fewer_bits(
    lora: Live, tmp_path: Path, weights: str, largest: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The smaller, the less exact; a graph beyond what protobuf holds keeps its tensors beside it."""
    monkeypatch.setattr(onnx_graph, "_LARGEST", 0)
    onnx.write(lora.subject, tmp_path, weights=weights)
    engine = onnx.open_engine(lora.subject, tmp_path)
    difference = np.abs(engine.logits(PROMPT) - lora.logits).mean() / np.abs(lora.logits).mean()
    engine.close()

    quantised = [
        node for node in onnx_graph.read(tmp_path / onnx_graph.GRAPH).graph.node if node.op_type == "MatMulNBits"
    ]
    bits = Counter(next(value.i for value in node.attribute if value.name == "bits") for node in quantised)
    assert bits == ({8: 21} if weights == "int8" else {4: 15, 8: 6})
    assert 1e-3 < difference < largest
    assert (tmp_path / onnx_graph.TENSORS).stat().st_size > 100_000


def test_a_family_of_tensors_is_merged(prepared: PreparedBase, tiny_base: Path, tmp_path: Path) -> None:
    """Biases that the base lacks, on top: the graph has them."""
    found = live(prepared, family_adapter(tiny_base, "bitfit"), "bitfit")
    onnx.write(found.subject, tmp_path)
    np.testing.assert_allclose(
        onnx.open_engine(found.subject, tmp_path).logits(PROMPT), found.logits, rtol=0, atol=1e-4
    )


def test_adapters_of_unequal_rank_are_swapped_in_one_session(
    prepared: PreparedBase, lora: Live, engine: OnnxEngine, graph: Path, tmp_path: Path
) -> None:
    other = live(prepared, of_rank(lora.subject.adapter, 2, -2.0))
    onnx_adapter.write_adapter(other.subject, tmp_path / "other.onnx_adapter")
    assert np.abs(other.logits - lora.logits).max() > 0.1
    session = engine.session

    for path, expected in (
        (graph / onnx_adapter.ADAPTER, lora.logits),
        (tmp_path / "other.onnx_adapter", other.logits),
        (None, lora.plain),
        (graph / onnx_adapter.ADAPTER, lora.logits),
    ):
        onnx_adapter.activate(engine, path)
        np.testing.assert_allclose(engine.logits(PROMPT), expected, rtol=0, atol=1e-4)
    assert engine.session is session


def test_the_cache_serves_an_adapter_too(lora: Live, engine: OnnxEngine) -> None:
    assert engine.greedy(PROMPT, 8) == lora.greedy


def test_an_adapter_of_some_layers_leaves_the_others_alone(
    prepared: PreparedBase, lora: Live, engine: OnnxEngine, tmp_path: Path
) -> None:
    few = Adapter(
        {
            **dict(list(lora.subject.adapter.items())[:2]),
            QUERY: Pair(np.zeros((0, 64), np.float32), np.zeros((64, 0), np.float32)),
        }
    )
    found = live(prepared, few.only(list(few)[:2]))
    onnx_adapter.write_adapter(replace(found.subject, adapter=few), tmp_path / "few.onnx_adapter")
    onnx_adapter.activate(engine, tmp_path / "few.onnx_adapter")
    np.testing.assert_allclose(engine.logits(PROMPT), found.logits, rtol=0, atol=1e-4)


def test_a_quantised_graph_takes_exact_adapters(lora: Live, tmp_path: Path) -> None:
    onnx_adapter.write(lora.subject, tmp_path, weights="int8")
    engine = onnx_adapter.open_engine(lora.subject, tmp_path)
    assert np.abs(engine.logits(PROMPT) - lora.logits).mean() < 0.05 * np.abs(lora.logits).mean()
    initializers = {value.name for value in engine.session.get_overridable_initializers()}
    assert len(initializers) == 2 * 21


def test_adapters_that_do_not_fit_the_graph_are_refused(
    lora: Live, engine: OnnxEngine, tmp_path: Path, prepared: PreparedBase
) -> None:
    path = tmp_path / "one.onnx_adapter"
    onnx_adapter.write_adapter(replace(lora.subject, prepared=replace(prepared, fingerprint="0" * 64)), path)
    with pytest.raises(ExportError, match="belongs to base model 0000000"):
        onnx_adapter.activate(engine, path)
    elsewhere = Adapter({f"model.layers.{index}.other": lora.subject.adapter[QUERY] for index in (3, 4)})
    onnx_adapter.write_adapter(replace(lora.subject, adapter=elsewhere), path)
    with pytest.raises(ExportError, match=r"'model\.layers\.3\.other' and 1 more layers"):
        onnx_adapter.activate(engine, path)
    path.write_bytes(b"nonsense")
    with pytest.raises(ExportError, match="expected an adapter of ONNX Runtime"):
        onnx_adapter.activate(engine, path)
    np.testing.assert_allclose(engine.logits(PROMPT), lora.logits, rtol=0, atol=1e-4)


def test_what_an_adapter_file_cannot_hold_is_refused_by_name(
    prepared: PreparedBase, tiny_base: Path, tmp_path: Path
) -> None:
    for family in ("ia3", "dora", "prompt"):
        adapter = family_adapter(tiny_base, family)
        with pytest.raises(ExportError, match=r"holds low-rank pairs alone; found 'model\..*#"):
            onnx_adapter.refuse(Subject(adapter, SCALING, "base", None, family))
    adapter = Adapter(
        {"model.layers.9.self_attn.q_proj": Pair(np.ones((1, 64), np.float32), np.ones((64, 1), np.float32))}
    )
    with pytest.raises(ExportError, match=r"model\.layers\.9.*no linear layer"):
        onnx_adapter.refuse(Subject(adapter, SCALING, "base", prepared))
    with pytest.raises(ExportError, match="names its base model"):
        onnx_adapter.write_adapter(Subject(adapter, SCALING, "base", None), tmp_path / "x")
    with pytest.raises(ExportError, match="train it first"):
        onnx_adapter.refuse(Subject(Adapter({}), SCALING, "base", None))


@pytest.mark.parametrize("module", [onnx, onnx_adapter])
def test_an_unknown_type_of_weights_lists_the_known_ones(lora: Live, tmp_path: Path, module: object) -> None:
    with pytest.raises(ConfigError, match="fp32, int4, int8"):
        module.write(lora.subject, tmp_path, weights="int3")  # type: ignore[attr-defined]


@pytest.mark.parametrize("module", [onnx, onnx_adapter])
def test_a_transformers_that_cannot_be_traced_is_said_before_anything_is_written(
    lora: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: object
) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "5.23.0" if name == "transformers" else real(name))
    for call in (lambda: module.refuse(lora.subject), lambda: module.write(lora.subject, tmp_path)):  # type: ignore[attr-defined]
        with pytest.raises(MissingExtraError, match=r"below 4\.58; found 5\.23\.0.*pip install"):
            call()
    assert not list(tmp_path.iterdir())


def test_a_missing_exporter_says_how_to_install_it(lora: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(MissingExtraError, match=r"'optimum-onnx'.*edge-runtime\[export\]"):
        onnx.refuse(lora.subject)


@pytest.mark.parametrize(
    ("error", "told"),
    [(NotImplementedError(), "NotImplementedError"), (ValueError("no such operator\nof opset 18"), "no such operator")],
)
def test_a_model_that_cannot_be_traced_says_why_in_one_line(
    lora: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, told: str
) -> None:
    import optimum.exporters.onnx  # noqa: PLC0415 - an extra

    def failing(*_arguments: object, **_options: object) -> None:
        raise error

    monkeypatch.setattr(optimum.exporters.onnx, "main_export", failing)
    with pytest.raises(ExportError, match=f"found: {told}; export it as merged or peft"):
        onnx.write(lora.subject, tmp_path)


def test_a_file_that_is_no_graph_is_an_export_error(lora: Live, tmp_path: Path) -> None:
    (tmp_path / onnx_graph.GRAPH).write_bytes(b"nonsense")
    with pytest.raises(ExportError, match="expected ONNX Runtime to load"):
        onnx.open_engine(lora.subject, tmp_path)


def test_a_graph_without_a_cache_is_refused(lora: Live, tmp_path: Path) -> None:
    from onnx import TensorProto, helper, save  # noqa: PLC0415 - an extra

    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, [1, "tokens"])
    out = helper.make_tensor_value_info("logits", TensorProto.INT64, [1, "tokens"])
    one = helper.make_graph([helper.make_node("Identity", ["input_ids"], ["logits"])], "one", [ids], [out])
    save(helper.make_model(one, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), tmp_path / onnx_graph.GRAPH)
    with pytest.raises(ExportError, match="key/value cache"):
        onnx_engine.open_graph(tmp_path / onnx_graph.GRAPH)


def test_qwen2_has_biases_beside_its_products(prepared: PreparedBase, tmp_path: Path) -> None:
    config = transformers.Qwen2Config(
        vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False, initializer_range=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    (source := tmp_path / "qwen").mkdir()
    model.save_pretrained(source)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).write_bytes((prepared.folder / name).read_bytes())
    assert json.loads((source / "config.json").read_text())["model_type"] == "qwen2"
    qwen = prepare(str(source), precision="fp32", cache=tmp_path / "cache")
    draw = np.random.default_rng(0)
    shapes = {"self_attn.q_proj": (64, 64), "self_attn.v_proj": (32, 64), "mlp.down_proj": (64, 96)}
    layers = {
        f"model.layers.{index}.{name}": Pair(
            *(0.3 * draw.standard_normal(size).astype(np.float32) for size in ((3, d_in), (d_out, 3)))
        )
        for index in range(2)
        for name, (d_out, d_in) in shapes.items()
    }
    found = live(qwen, Adapter(layers))
    for module in (onnx, onnx_adapter):
        (out := tmp_path / module.__name__).mkdir()
        module.write(found.subject, out)
        np.testing.assert_allclose(
            module.open_engine(found.subject, out).logits(PROMPT), found.logits, rtol=0, atol=1e-4
        )
