"""The configuration: what is dumped loads again, the last word wins, and a mistake is answered with what is known."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from edge_runtime.config import ANCHORED, Aggregator, Config, cache_dir, dump, load
from edge_runtime.errors import ConfigError
from edge_runtime.wire import topics
from tests.strategies import laws, models

SECTIONS: dict[str, type[BaseModel]] = {
    name: field.annotation
    for name, field in Config.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
}

STRICT = sorted(name for name, model in SECTIONS.items() if model.model_config["extra"] == "forbid")
"""All but [aggregator], whose keys belong to its method."""


Written = Callable[[str | bytes], Path]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Writes a configuration file; each text replaces the one before."""
    path = tmp_path_factory.mktemp("config") / "fleet.toml"

    def write(text: str | bytes) -> Path:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_every_section_is_a_model() -> None:
    assert SECTIONS.keys() == Config.model_fields.keys()


@laws
@given(models(Config))
def test_what_is_dumped_loads_again(written: Written, config: Config) -> None:
    """From any folder: the paths of secrets, which begin at the file's, are written in full."""
    anchored = load(written(dump(config)))
    here = Path.cwd()

    assert load(written(dump(anchored))) == anchored
    for section, keys in ANCHORED.items():
        for key in keys:
            before, after = getattr(getattr(config, section), key), getattr(getattr(anchored, section), key)
            assert after == (None if before is None else here / before)
    assert anchored.model_copy(update={section: getattr(config, section) for section in ANCHORED}) == config


@pytest.mark.parametrize("said", ["jsonl, tensorboard", "jsonl,tensorboard,", '["jsonl", "tensorboard"]'])
def test_names_are_a_list_or_a_text_with_commas(written: Written, said: str) -> None:
    text = said if said.startswith("[") else f'"{said}"'

    assert load(None, [f"device.report_to={said}"]).device.report_to == ("jsonl", "tensorboard")
    assert load(written(f"[device]\nreport_to = {text}")).device.report_to == ("jsonl", "tensorboard")


toml_values = st.recursive(
    st.booleans() | st.integers(-(1 << 60), 1 << 60) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@laws
@given(st.dictionaries(st.text(max_size=8).filter(lambda key: key not in {"method", "rank"}), toml_values, max_size=3))
def test_the_keys_of_a_method_come_through_with_their_types(written: Written, keys: dict[str, Any]) -> None:
    config = Config(aggregator=Aggregator.model_validate({"method": "m", **keys}))
    back = load(written(dump(config)))

    assert back.aggregator.model_extra == keys
    assert back == config


def test_nothing_configured_is_all_defaults(written: Written) -> None:
    assert load() == load(written("")) == load(written(dump(Config()))) == Config()


def test_the_file_beats_the_default_and_the_last_override_beats_both(written: Written) -> None:
    path = written("[training]\nmax_steps = 5\nseed = 6\n")
    config = load(path, ["training.max_steps=7", "rounds.num_rounds=8", "training.max_steps=9"])

    assert config.training.max_steps == 9
    assert config.training.seed == 6
    assert config.rounds.num_rounds == 8
    assert config.training.batch_size == Config().training.batch_size


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.seed=3", 3),
        ("training.seed = -3", -3),
        ("training.learning_rate=1e-4", 1e-4),
        ("training.learning_rate=1", 1.0),
        ("broker.host=broker.local", "broker.local"),
        ("broker.host='broker.local'", "broker.local"),
        ('broker.host="10.0.0.1"', "10.0.0.1"),
        ("device.data=stdlib-docs:asyncio", "stdlib-docs:asyncio"),
        ("device.data=a = b", "a = b"),
        ("device.data=", ""),
        ('device.name="42"', "42"),
        ("device.state_dir=/var/lib/edge", Path("/var/lib/edge")),
        ('adapter.target_modules=["q_proj", "up_proj"]', ("q_proj", "up_proj")),
        ("wire.band_edges=[2, 4]", (2, 4)),
    ],
)
def test_an_override_is_toml_or_else_text(override: str, expected: object) -> None:
    section, _, key = override.partition("=")[0].strip().partition(".")
    found = getattr(getattr(load(None, [override]), section), key)

    assert found == expected
    assert type(found) is type(expected) or isinstance(found, Path)


@pytest.mark.parametrize(
    "override", ["", "x", "training", "training.seed", "training=3", "=3", "seed=3", "training.=3"]
)
def test_an_override_of_another_form_is_refused_with_the_form(override: str) -> None:
    with pytest.raises(ConfigError, match=r"section\.key=value"):
        load(None, [override])


@pytest.mark.parametrize("section", STRICT)
def test_an_unknown_key_is_answered_with_the_known_ones(written: Written, section: str) -> None:
    path = written(f"[{section}]\nzzz = 1\n")
    for file, overrides in (None, [f"{section}.zzz=1"]), (path, []):
        with pytest.raises(ConfigError, match="'zzz'") as refusal:
            load(file, overrides)

        assert f"[{section}]" in str(refusal.value)
        assert all(key in str(refusal.value) for key in SECTIONS[section].model_fields)


def test_an_unknown_section_is_answered_with_the_known_ones(written: Written) -> None:
    with pytest.raises(ConfigError, match="section 'zzz'") as refusal:
        load(written("[zzz]\nx = 1\n"))

    assert all(section in str(refusal.value) for section in SECTIONS)


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("trainin.max_steps=3", "training"),
        ("training.max_step=3", "max_steps"),
        ("training.lerning_rate=3", "learning_rate"),
        ("rounds.num_round=3", "num_rounds"),
        ("adapter.target_module=[]", "target_modules"),
    ],
)
def test_a_near_miss_is_answered_with_what_was_meant(override: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=f"did you mean '{meant}'"):
        load(None, [override])


@pytest.mark.parametrize(
    "override",
    [
        "training.max_steps=0",
        "training.max_steps=many",
        "training.max_steps=1.5",
        "training.learning_rate=-1",
        "training.learning_rate=0",
        "training.learning_rate=nan",
        "training.learning_rate=inf",
        "training.weight_decay=-0.1",
        "rounds.progress_timeout=inf",
        "rounds.fraction_train=0",
        "rounds.fraction_train=1.01",
        "rounds.quorum=nan",
        "broker.port=0",
        "broker.port=65536",
        "broker.patience=0",
        "wire.chunk_bytes=1023",
        "wire.band_edges=[0]",
        "adapter.max_rank=0",
        "adapter.target_modules=[]",
        "adapter.target_modules=q_proj",
        "adapter.family=doora",
        "aggregator.rank=0",
        "fleet.name=a/b",
        "fleet.name=#",
        "fleet.name=",
        "device.eval_fraction=1",
        "device.memory_limit=1000",
    ],
)
def test_a_value_out_of_its_range_is_refused_by_its_name(override: str) -> None:
    name, _, value = override.partition("=")

    with pytest.raises(ConfigError, match=name.replace(".", r"\.")) as refusal:
        load(None, [override])

    assert value.strip("[]") in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_refusal_shows_a_pattern_as_it_is() -> None:
    with pytest.raises(ConfigError, match=r"\[A-Za-z0-9\]"):
        load(None, ["fleet.name=a b"])


def test_a_refusal_names_the_file_it_is_about(written: Written) -> None:
    path = written("[training]\nmax_steps = -1\n")

    with pytest.raises(ConfigError, match=str(path)):
        load(path)


@pytest.mark.parametrize("text", ["training = 3", "training = []", "[[training]]\nseed = 1"])
def test_a_section_that_is_no_table_is_refused(written: Written, text: str) -> None:
    with pytest.raises(ConfigError, match="training"):
        load(written(text))
    with pytest.raises(ConfigError, match="training"):
        load(written(text), ["training.seed=1"])


@pytest.mark.parametrize("text", ["[training", "x = ", "a = 1\na = 2", b"\xff\xfe", b"x = '\x00'"])
def test_a_file_that_is_not_toml_is_refused_by_its_name(written: Written, text: str | bytes) -> None:
    path = written(text)

    with pytest.raises(ConfigError, match=str(path)):
        load(path)


def test_a_file_that_is_not_there_or_is_a_folder_is_refused_by_its_name(tmp_path: Path) -> None:
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(ConfigError, match=str(path)):
            load(path)


@laws
@given(st.text(max_size=70))
def test_a_fleet_may_be_called_what_can_be_a_level_of_a_topic(name: str) -> None:
    try:
        topics.valid_name(name, "fleet")
    except ConfigError:
        with pytest.raises(ValidationError):
            Config.model_validate({"fleet": {"name": name}})
    else:
        assert Config.model_validate({"fleet": {"name": name}, "device": {"name": name}}).fleet.name == name


def test_a_configuration_cannot_be_changed() -> None:
    config = load()

    with pytest.raises(ValidationError, match="frozen"):
        config.training.seed = 1
    with pytest.raises(ValidationError, match="frozen"):
        config.training = load().training


def test_no_default_is_infinite_or_out_of_its_own_range() -> None:
    """Pydantic does not check defaults."""
    assert Config.model_validate(Config().model_dump()) == Config()
    assert all(
        math.isfinite(value)
        for section in Config().model_dump().values()
        for value in section.values()
        if isinstance(value, float)
    )


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, Path.home() / ".cache" / "edge-runtime"),
        ({"XDG_CACHE_HOME": "/c"}, Path("/c/edge-runtime")),
        ({"XDG_CACHE_HOME": ""}, Path.home() / ".cache" / "edge-runtime"),
        ({"EDGE_RUNTIME_CACHE": "/e"}, Path("/e")),
        ({"EDGE_RUNTIME_CACHE": "/e", "XDG_CACHE_HOME": "/c"}, Path("/e")),
        ({"EDGE_RUNTIME_CACHE": "", "XDG_CACHE_HOME": "/c"}, Path("/c/edge-runtime")),
    ],
)
def test_the_cache_is_where_the_environment_says(environ: Mapping[str, str], expected: Path) -> None:
    assert cache_dir(environ) == expected


def test_the_cache_follows_the_environment_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_RUNTIME_CACHE", "/elsewhere")

    assert cache_dir() == Path("/elsewhere")
