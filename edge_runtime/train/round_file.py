"""A round's state as one safetensors file, whole or not there: whoever is killed while writing leaves the former file.

The file is written beside its place, brought to the disk, and renamed. A SHA-256 over labels, index and tensors guards
what no rename can: a disk that lies, another program, a half-copied folder. Tensors are written from where they lie and
read one after the other, so neither takes a second copy of the state.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from edge_runtime.train.optimizer import Array
from edge_runtime.train.resume import RoundState, StepReport

FORMAT = "edge-runtime round 1"
DTYPES = {"float32": "F32", "uint8": "U8", "int64": "I64"}
_DAMAGE = (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError)
"""What reading bytes of any content may raise; each means that they are no state of ours."""


class Found(NamedTuple):
    """What a file says, or why it says nothing.

    Attributes:
        labels: as they were written; empty where there is no file, or none of ours.
        problem: why the file is of no use, in words; empty where it is, or is not there.
    """

    labels: Mapping[str, str]
    problem: str


def write(path: Path, state: RoundState, labels: Mapping[str, str]) -> None:
    """Put a state in the place of whatever the file held; the folder is made where there is none.

    Args:
        path: the file.
        state: its arrays are only looked at; views of a live model will do.
        labels: what a reader must know before it takes the state.

    Raises:
        OSError: the folder or the file cannot be written; the former file is as it was.
    """
    index, tensors = _indexed(state)
    said = {"format": FORMAT, "labels": json.dumps(dict(labels)), "index": json.dumps(index)}
    said["labels_sha256"] = _sha256(said["labels"])
    said["sha256"] = _digest(said, tensors)
    path.parent.mkdir(parents=True, exist_ok=True)
    # One name for all attempts: what a killed one left is overwritten by the next.
    beside = path.with_name(f".{path.name}.new")
    with beside.open("wb") as file:
        file.write(_header(said, tensors))
        for _, values in sorted(tensors.items()):
            file.write(_bytes_of(values))
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # or the rename itself may be lost when the power goes
    finally:
        os.close(folder)


def look(path: Path) -> Found:
    """The labels alone: cheap, because only they are checked against a digest, and no tensor is read."""
    try:
        with safe_open(path, framework="numpy") as file:
            said = file.metadata() or {}
        return _labels(path, said)
    except FileNotFoundError:
        return Found({}, "")
    except _DAMAGE as error:
        return Found({}, _damaged(path, str(error)))


def read(path: Path) -> tuple[RoundState | None, str]:
    """The state in a file and an empty problem; or no state, and the problem with the file. Never an exception."""
    try:
        with safe_open(path, framework="numpy") as file:
            said = file.metadata() or {}
            problem = _labels(path, said).problem
            if problem:
                return None, problem
            tensors: dict[str, Array] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
        if said.get("sha256") != _digest(said, tensors):
            return None, _damaged(path, "its SHA-256 is another than the one it names")
        return _assembled(json.loads(said["index"]), tensors), ""
    except _DAMAGE as error:
        return None, _damaged(path, str(error))


def _labels(path: Path, said: Mapping[str, str]) -> Found:
    if said.get("format") != FORMAT:
        return Found({}, f"{path} is no state of a round in this version's format ({FORMAT}); it is ignored")
    if said.get("labels_sha256") != _sha256(said["labels"]):
        return Found({}, _damaged(path, "its labels have another SHA-256 than the one it names"))
    return Found(dict(json.loads(said["labels"])), "")


def _damaged(path: Path, why: str) -> str:
    return f"{path} is damaged and is ignored ({(why.splitlines() or ['unreadable'])[0][:200]})"


def _indexed(state: RoundState) -> tuple[dict[str, Any], dict[str, Array]]:
    """What is where, and the tensors by name; an array that several parameters share is there once."""
    names: dict[int, str] = {}
    tensors: dict[str, Array] = {}

    def named(name: str, values: Array) -> str:
        if id(values) not in names:
            names[id(values)] = name
            tensors[name] = values
        return names[id(values)]

    index = {
        "reports": [asdict(report) for report in state.reports],
        "position": state.position,
        "parameters": {name: named(f"parameters/{name}", values) for name, values in state.parameters.items()},
        "moments": {
            name: {entry: named(f"moments/{name}/{entry}", values) for entry, values in held.items()}
            for name, held in state.moments.items()
        },
        "rng": named("rng", np.frombuffer(state.rng, np.uint8)),
        "beside": {name: named(f"beside/{name}", values) for name, values in state.beside.items()},
    }
    return index, tensors


def _assembled(index: Mapping[str, Any], tensors: Mapping[str, Array]) -> RoundState:
    return RoundState(
        reports=tuple(StepReport(**report) for report in index["reports"]),
        parameters={name: tensors[at] for name, at in index["parameters"].items()},
        moments={name: {entry: tensors[at] for entry, at in held.items()} for name, held in index["moments"].items()},
        position=int(index["position"]),
        rng=tensors[index["rng"]].tobytes(),
        beside={name: tensors[at] for name, at in index.get("beside", {}).items()},
    )


def _header(said: Mapping[str, str], tensors: Mapping[str, Array]) -> bytes:
    """The head of a safetensors file: its length in 8 bytes, then JSON, padded to a multiple of 8."""
    entries: dict[str, Any] = {"__metadata__": dict(said)}
    at = 0
    for name, values in sorted(tensors.items()):
        end = at + values.nbytes
        entries[name] = {"dtype": DTYPES[str(values.dtype)], "shape": values.shape, "data_offsets": (at, end)}
        at = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _digest(said: Mapping[str, str], tensors: Mapping[str, Array]) -> str:
    total = hashlib.sha256(json.dumps([said["format"], said["labels"], said["index"]]).encode())
    for name, values in sorted(tensors.items()):
        total.update(f"{name}:{values.dtype}:{values.shape};".encode())
        total.update(_bytes_of(values))
    return total.hexdigest()


def _bytes_of(values: Array) -> memoryview:
    """The array's bytes where they lie."""
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
