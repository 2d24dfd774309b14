"""A card says what is known and nothing else; facts come back as they were written; another base is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.errors import ExportError, FingerprintMismatchError
from edge_runtime.lora.adapter import Adapter, Pair
from edge_runtime.lora.files import write_peft_folder
from edge_runtime.lora.native import write_native_folder
from export import FORMATS, origin, reading
from export.card import card
from export.origin import Origin
from export.parity import Distance, Parity
from export.usage import USAGE

PAIR = Pair(np.ones((2, 3), np.float32), np.ones((4, 2), np.float32))
ADAPTER = Adapter({"model.layers.0.self_attn.q_proj": PAIR, "model.layers.1.self_attn.v_proj": PAIR})
FULL = Origin(
    base="smollm2", fingerprint="0" * 63 + "f", precision="nf4", licence="apache-2.0", kind="personal", family="lora",
    fleet="greenhouses", device="pi", run="ab12", version=3, rounds=3, data="17 examples of its own",
    losses={"base": 2.5, "global": 2.25, "personal": 2.0},
)  # fmt: skip
PARITY = Parity(Distance(3e-6, 1e-12, 1.0, 40), 1.0, 48, 0.7)


def front_matter(text: str) -> dict[str, str]:
    """The plain keys of the block that hubs read."""
    block = text.split("---\n")[1]
    return dict(line.split(": ", 1) for line in block.splitlines() if ": " in line)


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_has_a_card_that_a_hub_reads_and_a_way_to_load_it(form: str) -> None:
    text = card(form, FULL, ADAPTER, PARITY)
    front = front_matter(text)

    assert text.startswith("---\n")
    assert json.loads(front["base_model"]) == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert front["library_name"] == USAGE[form].library
    assert json.loads(front["license"]) == "apache-2.0"
    assert text.count("```") == 2 * len(USAGE[form].engines)
    assert "{base}" not in text
    assert "{rank}" not in text


def test_a_card_says_all_that_is_known() -> None:
    text = card("peft", FULL, ADAPTER, PARITY)
    known = ("greenhouses", "pi", "nf4", FULL.fingerprint, "2 layers, rank 2", "`q_proj`, `v_proj`", "2.2500", "7.39",
             "17 examples of its own", "3.0e-06", "100.0 % of 48")  # fmt: skip

    assert [word for word in known if word not in text] == []


def test_what_is_not_known_is_not_said() -> None:
    text = card("peft", Origin(base="org/base"), ADAPTER, None)

    assert "license:" not in text
    assert "Held-out loss" not in text
    assert "Fleet" not in text
    assert "Not verified" in text
    assert "not stated by its files" in text


def test_facts_come_back_and_damaged_ones_are_an_error(tmp_path: Path) -> None:
    assert origin.read(tmp_path) is None
    origin.write(FULL, tmp_path)
    assert origin.read(tmp_path) == FULL
    (tmp_path / origin.FILE).write_text('{"base": "x", "fingerprint": "short"}')
    with pytest.raises(ExportError, match="export the adapter again"):
        origin.read(tmp_path)


def test_an_adapter_of_another_base_is_refused_and_one_of_an_unknown_base_is_not() -> None:
    with pytest.raises(FingerprintMismatchError, match=r"'smollm2'.*--base"):
        origin.check(FULL, "1" * 64, "another")
    origin.check(FULL, FULL.fingerprint, "the same")
    origin.check(Origin(base="org/base"), "1" * 64, "whatever")
    origin.check(None, "1" * 64, "whatever")


@pytest.mark.parametrize("native", [True, False])
def test_any_folder_is_read_with_what_is_known_of_it(tmp_path: Path, *, native: bool) -> None:
    write = write_native_folder if native else write_peft_folder
    write(ADAPTER, tmp_path, base_name="org/base", scaling=4.0)
    bare = reading.read(tmp_path)
    origin.write(FULL, tmp_path)
    known = reading.read(tmp_path)

    assert bare.adapter.digest() == known.adapter.digest() == ADAPTER.digest()
    assert bare.scaling == 4.0
    assert (bare.origin, known.origin) == (Origin(base="org/base"), FULL)
    assert reading.base_spec(known.origin, known.base) == "smollm2"


def test_the_base_is_a_name_or_what_the_files_say_and_never_a_path_by_chance() -> None:
    assert reading.base_spec(Origin(base="org/base"), "") == "org/base"
    assert reading.base_spec(Origin(base="tests"), "told") == "told"
    assert reading.base_spec(None, "") == ""
    assert reading.base_named(str(Path.cwd())) == Path.cwd().name


def test_layers_of_no_family_are_named() -> None:
    odd = Adapter({"model.layers.0.mlp.up_proj#scale": PAIR, "model.layers.0.mlp.up_proj#bias": PAIR})
    with pytest.raises(ExportError, match="bias"):
        reading.family_of(odd)
