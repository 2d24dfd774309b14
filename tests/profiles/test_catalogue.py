"""The devices that ship with the package, and files of one's own in the same form."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_runtime.errors import ConfigError
from profiles import catalogue
from profiles.catalogue import device, known_devices
from profiles.device import UNITS, DeviceProfile

FOLDER = Path(catalogue.__file__).parent / "devices"
EXPECTED = {
    "jetson-nano",
    "jetson-xavier-nx",
    "jetson-orin-nano",
    "jetson-orin-nx",
    "jetson-agx-orin",
    "jetson-agx-thor",
    "raspberry-pi-4",
    "raspberry-pi-5",
    "n100-mini-pc",
    "laptop-x86-8gb",
    "laptop-x86-16gb",
    "laptop-gpu",
    "apple-laptop",
    "desktop-gpu",
}


def test_the_catalogue_holds_the_devices_that_people_have() -> None:
    assert set(known_devices()) >= EXPECTED


@pytest.mark.parametrize("name", known_devices())
def test_every_device_loads_and_survives_json(name: str) -> None:
    profile = device(name)

    assert profile.name == name
    assert set(profile.reasons) | set(profile.unreadable) == set(UNITS)
    assert all({**profile.reasons, **profile.unreadable}.values())
    assert DeviceProfile.from_json(json.loads(json.dumps(profile.to_json()))) == profile


@pytest.mark.parametrize("name", known_devices())
def test_figures_are_consistent(name: str) -> None:
    profile = device(name)

    assert 0 < profile.memory_bearable_bytes <= profile.memory_available_bytes <= profile.memory_total_bytes
    assert ("gemm_bf16_gflops" in profile.unreadable) == (profile.gemm_bf16_gflops == 0)
    assert profile.bf16_rate_ratio == pytest.approx(profile.gemm_bf16_gflops / profile.gemm_fp32_gflops, rel=0.01)
    assert all(gpu.free_bytes <= gpu.total_bytes for gpu in profile.gpus)
    assert (profile.kind == "cuda") == bool(profile.gpus)
    assert ("jetson" in name) == bool(profile.l4t)


@pytest.mark.parametrize("name", known_devices())
def test_what_plans_and_simulations_ask_for_is_known(name: str) -> None:
    profile = device(name)
    asked = (
        "gemm_fp32_gflops",
        "memory_bandwidth_gb_s",
        "nf4_gweights_s",
        "int8_gweights_s",
        "op_overhead_us",
        "link_up_mbit_s",
        "link_down_mbit_s",
        "link_latency_ms",
        "power_watts",
    )

    assert all(getattr(profile, field) > 0 and field in profile.reasons for field in asked)


@pytest.mark.parametrize("name", ["jetson-xavier-nx", "jetson-orin-nano", "jetson-agx-thor"])
def test_a_jetsons_memory_is_counted_once(name: str) -> None:
    profile = device(name)

    assert profile.pool == "shared"
    assert profile.gpus[0].total_bytes == profile.memory_total_bytes
    assert profile.memory_bearable_bytes <= profile.memory_available_bytes


def test_a_card_with_memory_of_its_own_bears_what_is_free_on_it() -> None:
    profile = device("desktop-gpu")

    assert profile.memory_bearable_bytes < profile.gpus[0].free_bytes < profile.memory_available_bytes


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("raspberypi-5", "raspberry-pi-5"), ("orin-nano", "jetson-orin-nano"), ("Laptop-GPU", "laptop-gpu")],
)
def test_an_unknown_device_lists_the_known_ones_the_nearest_first(name: str, nearest: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        device(name)

    message = str(refusal.value)
    assert message.startswith(f"unknown device '{name}'")
    assert "\n" not in message
    listed = message.partition("(nearest first): ")[2].split(", ")
    assert listed[0] == nearest
    assert sorted(listed) == list(known_devices())


def test_a_file_of_ones_own_serves_as_well(tmp_path: Path) -> None:
    path = tmp_path / "my-board.toml"
    path.write_bytes((FOLDER / "jetson-orin-nx.toml").read_bytes())

    found, known = device(str(path)), device("jetson-orin-nx")

    assert found.name == "my-board"
    assert found.memory_bearable_bytes == known.memory_bearable_bytes
    assert found.gpus == known.gpus


def test_a_device_that_was_measured_serves_as_it_was_measured(tmp_path: Path) -> None:
    known = device("jetson-orin-nx")
    path = tmp_path / "this.json"

    for told in (known.to_json(), {"profile": known.to_json(), "plan": None}):
        path.write_text(json.dumps(told), encoding="utf-8")
        assert device(str(path)) == known


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", r"this\.json needs to be what 'edge-runtime profile --json' printed; found: Expecting"),
        ("[]", r"this\.json needs to be the object"),
        ('{"profile": 3}', r"this\.json needs to be the object"),
        ("{}", r"this\.json needs exactly its .* lacks"),
        (json.dumps({**device("jetson-orin-nx").to_json(), "usable_cores": 0}), "'usable_cores' of 1 or more"),
    ],
)
def test_what_no_profile_said_is_refused_with_its_file(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "this.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=said):
        device(str(path))
    with pytest.raises(ConfigError, match=r"found: .*No such file"):
        device(str(tmp_path / "none.json"))


def without(field: str) -> Callable[[str], str]:
    """Takes a field out, with its reason."""
    return lambda text: re.sub(rf"^{field} = .*\n", "", text, flags=re.MULTILINE)


def with_value(field: str, value: str) -> Callable[[str], str]:
    """Writes another value."""
    return lambda text: re.sub(rf"^{field} = .*", f"{field} = {value}", text, count=1, flags=re.MULTILINE)


WRONG: list[tuple[str, Callable[[str], str], str]] = [
    ("missing", without("power_watts"), "lacks power_watts"),
    ("missing table", lambda text: text.partition("[reasons]")[0], "lacks reasons"),
    ("negative", with_value("power_watts", "-5.0"), "'power_watts'.*0 or more; found -5.0"),
    ("negative size", with_value("memory_total_bytes", "-1"), "'memory_total_bytes'.*found -1"),
    ("a text", with_value("gemm_fp32_gflops", '"fast"'), "'gemm_fp32_gflops'.*number.*found 'fast'"),
    ("infinite", with_value("memory_bandwidth_gb_s", "inf"), "'memory_bandwidth_gb_s'.*finite.*found inf"),
    ("no number", with_value("link_up_mbit_s", "nan"), "'link_up_mbit_s'.*finite.*found nan"),
    ("a fraction of a core", with_value("physical_cores", "1.5"), "'physical_cores'.*whole.*found 1.5"),
    ("true", with_value("usable_cores", "true"), "'usable_cores'.*found True"),
    ("no core", with_value("physical_cores", "0"), "'physical_cores' of 1 or more"),
    ("more than all", with_value("memory_available_bytes", "900_000_000_000"), "at most 'memory_total_bytes'"),
    ("unknown", lambda text: "power_wats = 5.0\n" + text, r"unknown 'power_wats' \(did you mean 'power_watts'\?\)"),
    ("unknown kind", with_value("kind", '"tpu"'), "'tpu'.*apple, cpu, cuda"),
    ("a card that is none", with_value("kind", '"cpu"'), ""),
    ("a card without memory", without("total_bytes"), "GPU.*lacks total_bytes"),
    ("sets that are no list", with_value("instruction_sets", '"neon"'), "'instruction_sets'.*list of texts"),
    (
        "no reason",
        lambda text: text.replace('board = "NVIDIA, Jetson', 'bored = "NVIDIA, Jetson'),
        r"\[reasons\].*board",
    ),
    ("a number for a reason", lambda text: text.replace("[unreadable]", "[unreadable]\nx = 3"), "'unreadable'"),
    ("two sentences", lambda text: text + 'power_watts = "who knows"\n', "only one sentence.*power_watts"),
    ("a sentence for nothing", lambda text: text + 'weight = "light"\n', "no field of it: weight"),
    ("no TOML", lambda text: text.replace("=", ":", 1), "readable TOML.*line 1"),
    ("nothing", lambda text: text[:0], "lacks"),
]


@pytest.mark.parametrize(("change", "expected"), [row[1:] for row in WRONG], ids=[row[0] for row in WRONG])
def test_a_malformed_file_is_one_line_that_names_file_and_field(
    change: Callable[[str], str], expected: str, tmp_path: Path
) -> None:
    text = (FOLDER / "jetson-orin-nano.toml").read_text(encoding="utf-8")
    path = tmp_path / "wrong.toml"
    path.write_text(change(text), encoding="utf-8")
    assert path.read_text(encoding="utf-8") != text

    if not expected:
        # A GPU that nothing trains on may be described.
        assert device(str(path)).pool == "host"
        return
    with pytest.raises(ConfigError, match=expected) as refusal:
        device(str(path))
    assert "\n" not in str(refusal.value)
    assert str(path) in str(refusal.value)


def test_a_path_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.toml").write_bytes(b'kind = "\xe9"')
    (tmp_path / "folder.toml").mkdir()

    for name in ("latin.toml", "folder.toml", "none.toml"):
        with pytest.raises(ConfigError, match=rf"{name} needs to be readable TOML"):
            device(str(tmp_path / name))
