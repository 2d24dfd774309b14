"""Every error this project raises on purpose, and the exit code of its family.

A message says what was expected, what was found and what to do, in one line where it can.

    EdgeRuntimeError                 1
    ├── ConfigError                  2   a key, a flag or a verb that does not exist, or a value that cannot be
    ├── PlanError                   10   the device cannot bear the smallest plan
    │   └── DeviceMemoryError            memory ran out under a plan; the client steps down and goes on
    ├── BaseModelError              11
    │   ├── UnknownBaseError             no such hub id, folder or file
    │   └── FingerprintMismatchError     the device's base is not the fleet's
    ├── DataError                   12   missing, empty or malformed examples
    ├── WireError                   13
    │   ├── CorruptPayloadError          bytes that do not decode, or whose digest is wrong
    │   ├── UnknownCodecError            a tag this version does not know
    │   ├── VersionMismatchError         a message of another protocol version
    │   ├── TooLargeError                a payload beyond the permitted size
    │   ├── AuthenticityError            a message whose signature, signer or counter is wrong
    │   └── BrokerError                  no broker, or it refuses us
    ├── RoundError                  14
    │   ├── AggregationError             updates that do not fit together
    │   ├── EngineError                  a worker that merges layers failed, or there is none
    │   ├── QuorumError                  too few updates before progress stopped
    │   └── RejectedError                the server refused this device
    ├── ExportError                 15   an artefact that could not be written or does not agree with the live model
    ├── MissingExtraError           16   a library of an optional extra is not installed
    └── DiskFullError               17   no room on the disk; what was stored is kept

Ctrl-C and SIGTERM end a process with 130, as shells expect.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

INTERRUPTED = 130


class EdgeRuntimeError(Exception):
    """The root of the tree; `exit_code` is what the process ends with."""

    exit_code: ClassVar[int] = 1


class ConfigError(EdgeRuntimeError):
    """A key, flag or verb that does not exist, or a value out of its range."""

    exit_code = 2


class PlanError(EdgeRuntimeError):
    """The device cannot bear even the smallest plan; says how many MiB are missing."""

    exit_code = 10


class DeviceMemoryError(PlanError):
    """Memory ran out, or was about to, while a plan was carried out; a smaller plan may do."""


class BaseModelError(EdgeRuntimeError):
    """The base model could not be found, read or trusted."""

    exit_code = 11


class UnknownBaseError(BaseModelError):
    """Nothing of that name: no alias, folder, GGUF file or hub model."""


class FingerprintMismatchError(BaseModelError):
    """The device's base model is not the one this fleet trains."""


class DataError(EdgeRuntimeError):
    """Examples that are missing, empty or malformed; names file and line."""

    exit_code = 12


class WireError(EdgeRuntimeError):
    """Something on its way between device and server is wrong."""

    exit_code = 13


class CorruptPayloadError(WireError):
    """Bytes that do not decode, or whose SHA-256 is not their name."""


class UnknownCodecError(WireError):
    """A codec tag that this version cannot decode."""


class VersionMismatchError(WireError):
    """A control message of another protocol version."""


class TooLargeError(WireError):
    """A payload larger than this end permits; raised before anything is allocated."""


class AuthenticityError(WireError):
    """A message that its alleged sender did not sign for this topic, or no longer may."""


class BrokerError(WireError):
    """The broker cannot be reached, could not be started, or refused the connection."""


class RoundError(EdgeRuntimeError):
    """A round that cannot be finished."""

    exit_code = 14


class AggregationError(RoundError):
    """Updates that do not fit together; names the layer, both shapes and the devices."""


class EngineError(RoundError):
    """A worker that merges layers failed, or the workers cannot be reached."""


class QuorumError(RoundError):
    """Fewer updates than the quorum when progress stopped."""


class RejectedError(RoundError):
    """The server refused this device, and said why."""


class ExportError(EdgeRuntimeError):
    """An artefact that could not be written, or does not agree with the live model."""

    exit_code = 15


class MissingExtraError(EdgeRuntimeError):
    """A library of an optional extra is missing; says which extra to install."""

    exit_code = 16


class DiskFullError(EdgeRuntimeError):
    """There is no room for a write; nothing of it happened, what was stored is kept, and it may be tried again."""

    exit_code = 17


def missing_extra(library: str, extra: str) -> MissingExtraError:
    """The error for a library that belongs to an extra which is not installed."""
    return MissingExtraError(
        f"this needs the library '{library}', which is not installed; run: pip install 'edge-runtime[{extra}]'"
    )


def unknown_name(kind: str, found: str, known: Iterable[str]) -> str:
    """The sentence for a name that a table does not hold; lists what it does hold."""
    return f"unknown {kind} '{found}'; expected one of: {', '.join(sorted(known))}"


def first_line(error: BaseException) -> str:
    """What another library's error says, as one line; the error's type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
