"""The command as users run it: every mistake ends in one clear line and the exit code of its family."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from edge_runtime.cli import run
from edge_runtime.cli.app import verbs
from profiles.device import UNITS
from tests.product import QUIET, Launcher, Running, until
from tests.wire.conftest import require

# Each test starts the command as users do, so they are no part of the fast ones.
pytestmark = pytest.mark.story

CONFIG_JSON = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 512, "hidden_size": 64,
    "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}  # fmt: skip

USAGE = [
    # arguments, what the line says
    (["train"], ["'train'", *verbs()]),
    (["server", "--stor", "x"], ["--stor", "--store", "--broker", "--config", "--set"]),
    (["client", "--zzz"], ["--zzz", "--data", "--base", "--state-dir", "--memory-limit"]),
    (["server", "extra"], ["extra"]),
    (["broker", "--port", "0"], ["--port"]),
    (["demo", "--rounds", "many"], ["--rounds"]),
    (["server", "--set"], ["--set"]),
    (["export"], ["--out"]),
    (["server", "--set", "rounds"], ["section.key=value", "'rounds'"]),
    (["server", "--set", "rounds=3"], ["section.key=value", "'rounds=3'"]),
    (
        ["server", "--set", "rounds.num_round=3"],
        ["'num_round'", "did you mean 'num_rounds'", "quorum", "fraction_train"],
    ),
    (["server", "--set", "round.num_rounds=3"], ["'round'", "did you mean 'rounds'", "adapter", "wire"]),
    (["server", "--set", "rounds.num_rounds=0"], ["rounds.num_rounds", "greater than or equal to 1", "0"]),
    (["server", "--set", "aggregator.method=median"], ["'median'", "svd, zero_pad"]),
    (["server", "--config", "missing.toml"], ["missing.toml", "found none"]),
    (["server", "--config", "broken.toml"], ["broken.toml", "TOML", "line 1"]),
    (["server", "--config", "key.toml"], ["key.toml", "[rounds]", "'num_round'", "num_rounds"]),
    (["server", "--config", "section.toml"], ["section.toml", "'round'", "rounds"]),
    (["server", "--config", "value.toml"], ["value.toml", "training.max_steps", "'many'"]),
    (["server", "--broker", "here:there"], ["HOST:PORT", "'here:there'"]),
    (["server", "--store", "taken"], ["taken", "--store"]),
    (["client"], ["--data"]),
    (["client", "--data", "good.jsonl", "--memory-limit", "lots"], ["900M", "'lots'"]),
    (["profile", "--as-device", "toaster"], ["'toaster'", "raspberry-pi-5", "jetson-orin-nano"]),
    (["export", "--format", "zip", "--out", "x", "--state-dir", "y"], ["'zip'", "peft"]),
    (["export", "--format", ",", "--out", "x", "--state-dir", "y"], ["--format", "peft"]),
    (["chat"], ["--adapter", "--onnx", "--gguf"]),
    (["chat", "--adapter", "a", "--gguf", "b"], ["exactly one"]),
    (["broker", "--kind", "kafka"], ["'kafka'", "mosquitto, nats"]),
    (["demo", "--device", "pi"], ["NAME:MEMORY:DATA", "'pi'"]),
    (["demo", "--device", "pi:1G:a.jsonl", "--device", "pi:2G:b.jsonl"], ["different names", "pi, pi"]),
    (["demo", "--broker", "natss"], ["'natss'", "HOST:PORT, mosquitto, nats"]),
    (["demo", "--method", "median"], ["'median'", "svd, zero_pad"]),
]

DATA = [
    ("", "stdlib-docs:NAME"),
    ("missing.jsonl", "'missing.jsonl', which is no file"),
    (".", "which is a folder"),
    ("empty.jsonl", "empty.jsonl: expected one JSON object per line, found no rows"),
    ("broken.jsonl", "broken.jsonl:3: expected one JSON object per line"),
    ("odd-row.jsonl", "odd-row.jsonl:4: expected the keys of one format"),
    ("no-answer.jsonl", "no-answer.jsonl:1: expected 'completion' to be a text that is not empty"),
    ("alike.jsonl", "at least 2 examples that differ"),
    (
        "stdlib-docs:cooking",
        "'cooking'; expected one of: concurrency, data, files, language, networking, numbers, text",
    ),
]


def only_line(stderr: str) -> str:
    """The one line of standard error; there is nothing else."""
    (line,) = stderr.splitlines()
    assert line.startswith("edge-runtime: ")
    return line


def without(folder: Path, libraries: Sequence[str], *arguments: str) -> tuple[int, str, str]:
    """A verb where these libraries are not installed: exit code, standard output, standard error."""
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({list(libraries)!r}))\n"
        f"from edge_runtime.cli import main; main({list(arguments)!r})"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, **QUIET},
        capture_output=True,
        text=True,
        check=False,
    )
    return ended.returncode, ended.stdout, ended.stderr


# ── usage and configuration ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("arguments", "words"), USAGE, ids=[" ".join(arguments) for arguments, _ in USAGE])
def test_a_mistake_in_usage_or_configuration_is_one_line_and_code_2(
    product: Launcher, arguments: list[str], words: list[str]
) -> None:
    code, out, err = product.run(*arguments)
    line = only_line(err)

    assert code == 2
    assert out == ""
    assert [word for word in words if word not in line] == []


def test_the_same_mistake_ends_alike_without_a_process(capsys: pytest.CaptureFixture[str]) -> None:
    """`run` is what the process does."""
    assert run(["server", "--set", "rounds"]) == 2
    assert "section.key=value" in only_line(capsys.readouterr().err)


def test_export_wants_one_place_to_export_from(product: Launcher) -> None:
    for arguments in ([], ["--store", "a", "--state-dir", "b"]):
        code, _, err = product.run("export", "--out", "x", *arguments)
        assert code == 15
        assert "--store" in only_line(err)
        assert "--state-dir" in only_line(err)


@pytest.mark.parametrize(
    ("flag", "what"),
    [("--store", "a server's store"), ("--state-dir", "personal adapter"), ("--peft", "no PEFT folder")],
)
def test_export_from_a_folder_that_is_not_there_says_what_was_expected(product: Launcher, flag: str, what: str) -> None:
    code, _, err = product.run("export", "--out", "x", flag, "nowhere")

    assert code == 15
    assert what in only_line(err)
    assert "nowhere" in only_line(err)


@pytest.mark.parametrize(
    "arguments",
    [["demo", "--out", "taken"], pytest.param(["broker", "--store", "taken"], marks=pytest.mark.broker)],
    ids=["demo", "broker"],
)
def test_a_folder_that_is_a_file_is_one_line(product: Launcher, arguments: list[str]) -> None:
    code, _, err = product.run(*arguments)

    assert code == 1
    assert "taken" in only_line(err)


# ── data and base ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("data", "words"), DATA[1:], ids=[data for data, _ in DATA[1:]])
def test_data_that_cannot_be_used_is_one_line_with_file_and_line_number_and_code_12(
    product: Launcher, data: str, words: str
) -> None:
    code, _, err = product.run("client", "--data", data)

    assert code == 12
    assert words in only_line(err)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("base", "words"),
    [
        ("nonsense", ["smollm2", "a folder with config.json", ".gguf", "hub id owner/name", "'nonsense'"]),
        ("nobody/nothing", ["'nobody/nothing'", "the hub's cache", "the hub may not be asked"]),
        (".", ["config.json"]),
        ("taken", ["a file that is not a .gguf"]),
    ],
)
def test_an_unknown_base_is_one_line_that_lists_what_was_tried_and_code_11(
    product: Launcher, base: str, words: list[str]
) -> None:
    """At once, although there is no broker either."""
    code, _, err = product.run("client", "--data", "good.jsonl", "--base", base)
    line = only_line(err)

    assert code == 11
    assert [word for word in words if word not in line] == []


@pytest.mark.torch
def test_prepare_refuses_an_unknown_base_and_an_unknown_precision(product: Launcher) -> None:
    for arguments, word in (
        (["--base", "nonsense"], "'nonsense'"),
        (["--precision", "int3"], "bf16, fp16, fp32, int8, nf4"),
    ):
        code, _, err = product.run("prepare", *arguments)
        assert code == 11
        assert word in only_line(err)


def test_a_client_without_the_extra_for_training_says_what_to_install(product: Launcher) -> None:
    missing = ["torch", "transformers", "huggingface_hub"]
    code, _, err = without(product.folder, missing, "client", "--data", "good.jsonl")

    assert code == 16
    assert "pip install 'edge-runtime[client]'" in only_line(err)


# ── the broker ────────────────────────────────────────────────────────────────────────────────────────────────────


def unreachable(running: Running, port: int) -> None:
    """A process that found no broker retried with growing pauses, and said so."""
    pauses = [float(pause) for pause in re.findall(r"trying again in ([\d.]+) s", running.said)]

    assert running.ended() == 13
    assert len(pauses) >= 2
    assert pauses[1] > pauses[0] * 0.99
    (line,) = running.failure
    assert f"no broker at 127.0.0.1:{port} within 1.5 s" in line
    assert "Connection refused" in line


def test_a_server_without_a_broker_retries_with_back_off_and_ends_with_13_when_its_patience_does(
    product: Launcher, closed_port: int
) -> None:
    server = product.start("server", "--broker", f"127.0.0.1:{closed_port}", "--set", "broker.patience=1.5")
    server.ended()

    unreachable(server, closed_port)


@pytest.mark.torch
def test_a_client_without_a_broker_does_the_same(product: Launcher, closed_port: int, tiny_base: Path) -> None:
    client = product.start(
        "client", "--data", "good.jsonl", "--base", str(tiny_base), "--broker", f"127.0.0.1:{closed_port}",
        "--set", "broker.patience=1.5",
    )  # fmt: skip
    client.ended()

    unreachable(client, closed_port)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_wait_for_a_broker_that_never_comes_can_be_interrupted(
    product: Launcher, closed_port: int, number: signal.Signals
) -> None:
    server = product.start("server", "--broker", f"127.0.0.1:{closed_port}")
    until(lambda: "trying again" in server.said, "the first failure to connect")
    server.send(number)

    assert server.ended() == 130
    assert "the same command goes on from there" in "".join(server.failure)


def test_a_store_in_use_by_another_server_is_refused_with_2(product: Launcher, closed_port: int) -> None:
    arguments = ["server", "--broker", f"127.0.0.1:{closed_port}", "--store", "store"]
    first = product.start(*arguments)
    until(lambda: "trying again" in first.said, "a server that holds its store")
    code, _, err = product.run(*arguments)

    assert code == 2
    assert "stop the other server" in only_line(err)
    assert first.process.poll() is None


@pytest.mark.broker
@pytest.mark.parametrize("kind", ["nats", "mosquitto"])
def test_the_broker_serves_until_it_is_asked_to_end(product: Launcher, closed_port: int, kind: str) -> None:
    require(kind)
    broker = product.start("broker", "--kind", kind, "--port", str(closed_port), "--store", "broker")
    until(lambda: f"serves MQTT on 127.0.0.1:{closed_port}" in broker.said, "a broker")
    server = product.start("server", "--broker", f"127.0.0.1:{closed_port}")
    until(lambda: "connected to the broker" in server.said, "a server that is connected")
    server.send(signal.SIGTERM)
    assert server.ended() == 130
    broker.send(signal.SIGTERM)

    assert broker.ended() == 0
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", closed_port), timeout=5)


@pytest.mark.broker
def test_a_broker_that_ends_by_itself_is_no_success(product: Launcher, closed_port: int) -> None:
    require("nats")
    broker = product.start("broker", "--port", str(closed_port), "--store", "broker")
    until(lambda: "serves MQTT" in broker.said, "a broker")
    os.kill(int((product.folder / "broker" / "broker.lock").read_text()), signal.SIGKILL)

    assert broker.ended() == 13
    assert "ended by itself" in "".join(broker.failure)


@pytest.mark.broker
def test_a_port_that_is_taken_is_one_line_and_code_13(product: Launcher) -> None:
    require("nats")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, err = product.run("broker", "--port", str(port), "--store", "broker")

    assert code == 13
    assert f"127.0.0.1:{port}" in only_line(err)


# ── help and profile ──────────────────────────────────────────────────────────────────────────────────────────────


def test_help_lists_every_verb(product: Launcher) -> None:
    for arguments in ([], ["--help"], ["-h"]):
        code, out, err = product.run(*arguments)
        assert (code, err) == (0, "")
        assert [verb for verb in verbs() if not re.search(rf"^\W+{verb}\b", out, re.MULTILINE)] == []


@pytest.mark.parametrize("verb", verbs())
def test_the_help_of_a_verb_needs_nothing_but_typer(product: Launcher, verb: str) -> None:
    # typer itself brings pydantic.
    heavy = ["torch", "transformers", "numpy", "paho", "matplotlib", "zstandard", "server", "export"]
    code, out, err = without(product.folder, heavy, verb, "--help")

    assert (code, err) == (0, "")
    assert f"edge-runtime {verb}" in out


def assert_explained(profile: dict[str, object]) -> None:
    """Every field with a unit has a value, and a reason or a cause why it could not be read."""
    reasons, unreadable = profile["reasons"], profile["unreadable"]
    assert isinstance(reasons, dict)
    assert isinstance(unreadable, dict)
    assert set(UNITS) <= set(profile)
    assert [name for name in UNITS if bool(reasons.get(name)) == bool(unreadable.get(name))] == []


@pytest.mark.torch
def test_the_profile_of_this_machine_is_json_with_a_reason_for_every_field(product: Launcher) -> None:
    code, out, err = product.run("profile", "--json", "--memory-limit", "1G")
    found = json.loads(out)

    assert (code, err) == (0, "")
    assert_explained(found["profile"])
    assert found["profile"]["memory_limit_bytes"] == 1 << 30
    assert found["plan"] is None


def test_a_machine_without_torch_has_a_profile_that_says_what_to_install(product: Launcher) -> None:
    code, out, err = without(product.folder, ["torch"], "profile", "--json")
    profile = json.loads(out)["profile"]

    assert (code, err) == (0, "")
    assert_explained(profile)
    assert "edge-runtime[client]" in profile["unreadable"]["four_bit"]


def test_the_plan_of_a_known_device_needs_the_base_models_configuration_alone(product: Launcher) -> None:
    base = product.folder / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(CONFIG_JSON))
    code, out, err = product.run("profile", "--as-device", "raspberry-pi-5", "--base", "base", "--json")
    found = json.loads(out)

    assert (code, err) == (0, "")
    assert_explained(found["profile"])
    assert set(found["plan"]) - {"reasons", "next_better"} == set(found["plan"]["reasons"])
    assert all(found["plan"]["reasons"].values())


def test_the_profile_for_people_shows_every_field(product: Launcher) -> None:
    code, out, err = product.run("profile", "--as-device", "jetson-nano")

    assert (code, err) == (0, "")
    assert "jetson-nano: what this device is" in out
    assert "because" in out
