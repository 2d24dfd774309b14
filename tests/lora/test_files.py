"""The PEFT folder: what is written comes back, and what cannot be read is refused with a reason."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from edge_runtime.errors import ExportError
from edge_runtime.lora.adapter import Adapter, Pair
from edge_runtime.lora.files import (
    CONFIG,
    WEIGHTS,
    lora_settings,
    read_peft_folder,
    scale_of,
    write_peft_folder,
)

LAYER = "model.layers.1.self_attn.q_proj"


def random_adapter(ranks: dict[str, int], seed: int = 0) -> Adapter:
    draw = np.random.default_rng(seed)
    return Adapter(
        {
            name: Pair(
                draw.standard_normal((rank, 6), dtype=np.float32), draw.standard_normal((5, rank), dtype=np.float32)
            )
            for name, rank in ranks.items()
        }
    )


def write_raw(folder: Path, tensors: dict[str, NDArray[np.float32]], **config: object) -> None:
    """A PEFT folder as another program would write it."""
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config}))


def factors(rank: int = 2, layer: str = LAYER) -> dict[str, NDArray[np.float32]]:
    return {
        f"base_model.model.{layer}.lora_A.weight": np.ones((rank, 6), np.float32),
        f"base_model.model.{layer}.lora_B.weight": np.ones((5, rank), np.float32),
    }


names = st.lists(
    st.sampled_from([f"model.layers.{i}.{m}" for i in (0, 1, 10, 11) for m in ("attn.q_proj", "mlp.up_proj")]),
    min_size=1,
    unique=True,
)


@settings(max_examples=40, deadline=None)
@given(st.data(), names)
def test_reading_gives_back_bit_for_bit_what_was_written_when_the_scale_is_a_power_of_two(
    data: st.DataObject, layers: list[str]
) -> None:
    adapter = random_adapter({name: data.draw(st.integers(1, 9)) for name in layers})
    scaling = 2.0 ** data.draw(st.integers(-3, 4))
    with tempfile.TemporaryDirectory() as folder:
        write_peft_folder(adapter, Path(folder), base_name="base", scaling=scaling)

        assert read_peft_folder(Path(folder)).digest() == adapter.digest()


@settings(max_examples=40, deadline=None)
@given(st.floats(0.01, 100), st.integers(1, 9))
def test_any_other_scale_costs_no_more_than_rounding(scaling: float, rank: int) -> None:
    adapter = random_adapter({LAYER: rank})
    with tempfile.TemporaryDirectory() as folder:
        write_peft_folder(adapter, Path(folder), base_name="base", scaling=scaling)
        back = read_peft_folder(Path(folder))

    np.testing.assert_array_equal(back[LAYER].a, adapter[LAYER].a)
    np.testing.assert_allclose(back[LAYER].b, adapter[LAYER].b, rtol=3e-7)


def test_the_scale_is_divided_out_of_b_and_told_in_the_configuration(tmp_path: Path) -> None:
    adapter = random_adapter({LAYER: 3})
    write_peft_folder(adapter, tmp_path, base_name="some/base", scaling=2.0)
    config = json.loads((tmp_path / CONFIG).read_text())
    stored = load_file(tmp_path / WEIGHTS)

    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (3, 6, False)
    assert (config["peft_type"], config["task_type"], config["inference_mode"]) == ("LORA", "CAUSAL_LM", True)
    assert config["base_model_name_or_path"] == "some/base"
    np.testing.assert_array_equal(stored[f"base_model.model.{LAYER}.lora_B.weight"] * 2, adapter[LAYER].b)


@given(st.dictionaries(st.sampled_from(["q", "x.q", "y.x.q", "k", "x.k"]), st.integers(1, 4), min_size=1))
def test_the_patterns_give_each_layer_its_rank_and_all_the_same_scale(ranks: dict[str, int]) -> None:
    """Also where one path is the end of another, which a pattern matches as well."""
    found = lora_settings(ranks, 0.5)
    config = {
        "r": found.r,
        "lora_alpha": found.lora_alpha,
        "rank_pattern": found.rank_pattern,
        "alpha_pattern": found.alpha_pattern,
    }

    for name, rank in ranks.items():
        # scale_of refuses a rank that the patterns do not give.
        assert scale_of(config, name, rank) == 0.5


def test_equal_ranks_need_no_pattern() -> None:
    found = lora_settings({"a.q": 4, "b.q": 4}, 2.0)

    assert (found.rank_pattern, found.alpha_pattern) == ({}, {})


def test_rslora_is_read_with_the_square_root_of_the_rank(tmp_path: Path) -> None:
    write_raw(tmp_path, factors(2), use_rslora=True)

    np.testing.assert_allclose(read_peft_folder(tmp_path)[LAYER].b, 4 / math.sqrt(2), rtol=1e-6)


def test_patterns_of_other_programs_are_read_as_regular_expressions(tmp_path: Path) -> None:
    write_raw(tmp_path, factors(3), rank_pattern={r"layers\.1\..*q_proj": 3}, alpha_pattern={"q_proj": 9})

    np.testing.assert_array_equal(read_peft_folder(tmp_path)[LAYER].b, np.full((5, 3), 3, np.float32))


@pytest.mark.parametrize(("dtype", "raw"), [("F16", np.float16), ("BF16", np.uint16)])
def test_half_precision_is_read_as_float32(tmp_path: Path, dtype: str, raw: type) -> None:
    """1.5 is exact in both; its bfloat16 bits are the upper half of its float32 bits."""
    one: NDArray[np.generic] = np.full((2, 6), 0x3FC0 if raw is np.uint16 else 1.5, raw)
    blob = one.tobytes()
    header = json.dumps(
        {
            f"base_model.model.{LAYER}.lora_A.weight": {"dtype": dtype, "shape": [2, 6], "data_offsets": [0, 24]},
            f"base_model.model.{LAYER}.lora_B.weight": {"dtype": dtype, "shape": [6, 2], "data_offsets": [24, 48]},
        }
    ).encode()
    write_raw(tmp_path, factors())
    (tmp_path / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + blob + blob)
    pair = read_peft_folder(tmp_path)[LAYER]

    np.testing.assert_array_equal(pair.a, np.full((2, 6), 1.5, np.float32))
    np.testing.assert_array_equal(pair.b, np.full((6, 2), 3.0, np.float32))


def test_layers_of_rank_zero_are_left_out(tmp_path: Path) -> None:
    write_peft_folder(random_adapter({"m.q": 2, "m.k": 0}), tmp_path, base_name="base", scaling=1.0)

    assert list(read_peft_folder(tmp_path)) == ["m.q"]


def test_an_adapter_without_any_direction_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="at least one direction"):
        write_peft_folder(random_adapter({"m.q": 0}), tmp_path / "new", base_name="base", scaling=1.0)

    assert not (tmp_path / "new").exists()


def test_writing_over_an_older_adapter_leaves_nothing_of_it_and_other_files_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    write_peft_folder(random_adapter({"m.q": 2, "m.k": 3}), tmp_path, base_name="base", scaling=1.0)
    newer = random_adapter({"m.v": 1}, seed=1)
    write_peft_folder(newer, tmp_path, base_name="base", scaling=1.0)

    assert read_peft_folder(tmp_path).digest() == newer.digest()
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, WEIGHTS, "notes.txt"]


def test_a_write_that_fails_midway_leaves_no_adapter_that_mixes_two(tmp_path: Path) -> None:
    """A folder where the weights should go stops the write after the old configuration is gone."""
    write_peft_folder(random_adapter({"m.q": 2}), tmp_path, base_name="base", scaling=1.0)
    (tmp_path / WEIGHTS).unlink()
    (tmp_path / WEIGHTS).mkdir()
    with pytest.raises(ExportError, match="cannot write"):
        write_peft_folder(random_adapter({"m.q": 4}), tmp_path, base_name="base", scaling=1.0)

    with pytest.raises(ExportError, match=CONFIG):
        read_peft_folder(tmp_path)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"peft_type": "IA3"}, "'IA3'"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"r": 4}, "rank 4"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"rank_pattern": {"(": 2}}, "regular expression"),
        ({"rank_pattern": [1]}, "table"),
    ],
)
def test_configurations_that_mean_more_or_other_than_the_tensors_are_refused(
    tmp_path: Path, config: dict[str, object], reason: str
) -> None:
    write_raw(tmp_path, factors(), **config)

    with pytest.raises(ExportError, match=reason):
        read_peft_folder(tmp_path)


def test_half_a_pair_and_foreign_tensors_are_refused(tmp_path: Path) -> None:
    whole = factors()
    write_raw(tmp_path, {key: value for key, value in whole.items() if "lora_A" in key})
    with pytest.raises(ExportError, match="only lora_A"):
        read_peft_folder(tmp_path)

    write_raw(tmp_path, {**whole, "base_model.model.lm_head.weight": np.ones((2, 2), np.float32)})
    with pytest.raises(ExportError, match="lm_head"):
        read_peft_folder(tmp_path)


def test_a_broken_or_missing_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=CONFIG):
        read_peft_folder(tmp_path)

    write_raw(tmp_path, factors())
    (tmp_path / WEIGHTS).write_bytes(b"\xff" * 40)
    with pytest.raises(ExportError, match=WEIGHTS):
        read_peft_folder(tmp_path)

    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(ExportError, match=WEIGHTS):
        read_peft_folder(tmp_path)
