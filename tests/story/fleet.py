"""A fleet of processes: its file, its devices, and what its server recorded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_runtime.lora.adapter import Adapter
from edge_runtime.wire.address import BrokerAddress
from server.aggregators.method import load_state
from server.store import Store
from tests.product import PATIENCE, Launcher, Running

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
SETTINGS = f"""
[rounds]
num_rounds = 2
progress_timeout = {PATIENCE}
[adapter]
target_modules = {json.dumps(TARGETS)}
max_rank = 8
max_length = 32
[aggregator]
rank = 16
[training]
max_steps = 16
warmup_steps = 0
batch_size = 2
personal_steps = 1
[wire]
chunk_bytes = 1024
[device]
threads = 1
precision = "nf4"
eval_examples = 2
"""


def write_examples(path: Path, seed: int, count: int = 12) -> Path:
    """Short prompts and completions of one kind, unlike those of another seed."""
    word = ("json", "text", "wrap")[seed % 3]
    rows = [{"prompt": f"{word} {number}", "completion": f"{word}{number + seed}"} for number in range(count)]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path


@dataclass(frozen=True)
class Part:
    """One device of a fleet.

    Attributes:
        name: its client id.
        data: its JSONL file.
        base: its base model, a folder.
        choices: settings of its own, as `--set` takes them: what its owner does not leave to the plan.
    """

    name: str
    data: Path
    base: Path
    choices: tuple[str, ...] = ()


class Fleet:
    """A server and its devices, each a process, on a broker that is there already.

    Args:
        processes: starts them.
        address: of the broker.
        fingerprint: of the fleet's base.
        parts: the devices that the first round waits for.
        rounds: more keys of the file's [rounds].
    """

    def __init__(
        self,
        processes: Launcher,
        address: BrokerAddress,
        fingerprint: str,
        parts: tuple[Part, ...],
        rounds: tuple[str, ...] = (),
    ) -> None:
        self.processes, self.parts = processes, {part.name: part for part in parts}
        self.running: dict[str, Running] = {}
        self.folder = processes.folder
        self.store = self.folder / "server"
        self.file = self.folder / "fleet.toml"
        lines = (
            f'[fleet]\nname = "story"\nbase = "{fingerprint}"',
            f'[broker]\nhost = "{address.host}"\nport = {address.port}',
            SETTINGS.replace("[rounds]", "\n".join(("[rounds]", f"min_available_nodes = {len(parts)}", *rounds))),
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file.write_text("\n".join(lines), encoding="utf-8")

    def begin(self) -> Fleet:
        """Start the server and all devices."""
        for name in ("server", *self.parts):
            self.start(name)
        return self

    def start(self, name: str) -> Running:
        """Start the server or a device, for the first time or again: always with the same command."""
        if name == "server":
            arguments, core = ["server", "--store", str(self.store)], None
        else:
            part = self.parts[name]
            choices = [word for choice in part.choices for word in ("--set", choice)]
            arguments = [
                "client", "--name", name, "--data", str(part.data), "--base", str(part.base),
                "--state-dir", str(self.state_dir(name)), *choices,
            ]  # fmt: skip
            core = sorted(self.parts).index(name)
        self.running[name] = self.processes.start(*arguments, "--config", str(self.file), core=core)
        return self.running[name]

    def state_dir(self, name: str) -> Path:
        """What a device remembers."""
        return self.folder / name

    def codes(self) -> dict[str, int]:
        """Wait for the end of all; their exit codes."""
        return {name: running.ended() for name, running in self.running.items()}

    def events(self, kind: str) -> list[dict[str, Any]]:
        """What the server recorded so far."""
        path = self.store / "metrics.jsonl"
        # The last line may be half written, or cut off for good by a kill.
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        found = [json.loads(line) for line in lines if line.endswith("\n")]
        return [event for event in found if event["event"] == kind]

    def reported(self, state: str, *, client: str | None = None, round_number: int | None = None) -> bool:
        """Whether a device, or that device, has reported that state."""
        return any(
            event["state"] == state and client in {None, event["client"]} and round_number in {None, event["round"]}
            for event in self.events("report")
        )

    def updates(self) -> list[tuple[int, str]]:
        """(round, device) of every update that is recorded, sorted."""
        return sorted((event["round"], event["client"]) for event in self.events("update"))

    def merged(self) -> tuple[list[int], Adapter]:
        """The versions in the store, and the last global adapter; once the server has ended."""
        store = Store(self.store)
        try:
            versions = store.versions()
            stored = store.version(versions[-1])
            assert stored is not None
            return versions, load_state(stored.state).adapter
        finally:
            store.close()
