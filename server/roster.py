"""Who belongs to a fleet, and by which key the server knows each: one JSON file, written whole or not at all.

`edge-runtime provision` writes it, a running server too when a device enrols; each reads it again when it has changed.
It holds public keys only. Whoever may write it decides who belongs to the fleet, so it must be its owner's alone to
write.
"""

from __future__ import annotations

import fcntl
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from edge_runtime.errors import ConfigError
from edge_runtime.wire.messages import Model, Name

Public = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Entry(Model):
    """One device.

    Attributes:
        key: its public key, hexadecimal; None until it has enrolled.
        token: the public half of its enrolment token; None if it was given a key.
        used: whether the token has been used.
        revoked: why it no longer belongs to the fleet; None while it does.
    """

    key: Public | None = None
    token: Public | None = None
    used: bool = False
    revoked: str | None = None

    @property
    def standing(self) -> Literal["active", "expected", "revoked"]:
        """Where it stands, in one word."""
        if self.revoked is not None:
            return "revoked"
        return "active" if self.key else "expected"


class Roster(Model):
    """All devices of a fleet, by name."""

    fleet: Name
    devices: dict[Name, Entry] = Field(default_factory=dict)

    def having(self, name: str, entry: Entry) -> Roster:
        """The roster with this entry for a device."""
        return self.model_copy(update={"devices": {**self.devices, name: entry}})


class RosterFile:
    """A roster on disk, kept as fresh as it is asked for.

    Args:
        path: the file.

    Raises:
        ConfigError: there is none, it does not parse, or others may write it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int, int] | None = None
        self._roster = Roster(fleet="none")
        self.read()

    def read(self) -> Roster:
        """The roster as it is now; a file that has not changed costs one look at its date.

        Raises:
            ConfigError: as the class.
        """
        try:
            state = self._path.stat()
            mark = state.st_mtime_ns, state.st_size, state.st_ino
            if mark == self._seen:
                return self._roster
            if state.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise ConfigError(
                    f"the roster {self._path} must be its owner's alone to write; its mode is "
                    f"{stat.S_IMODE(state.st_mode):04o}; run: chmod 644 {self._path}"
                )
            self._roster = Roster.model_validate_json(self._path.read_bytes())
        except (OSError, ValidationError) as error:
            raise ConfigError(
                f"a roster was expected at {self._path}, as `edge-runtime provision` writes it ({error})"
            ) from error
        self._seen = mark
        return self._roster

    def change(self, how: Callable[[Roster], Roster]) -> Roster:
        """Read, change and write it, while nobody else does; durable once this returns."""
        with _locked(self._path):
            self._seen = None
            roster = how(self.read())
            write(self._path, roster)
            return self.read()


def write(path: Path, roster: Roster) -> None:
    """Write a roster, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        os.fchmod(file.fileno(), 0o644)
        file.write(roster.model_dump_json(indent=1, exclude_none=True) + "\n")
        file.flush()
        os.fsync(file.fileno())
    Path(name).replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.with_name(path.name + ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
