"""What a server writes down for people: the events of its store, each exactly once, and how much it refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from edge_runtime.errors import DiskFullError
from server.store import Store

LOUD = 100
"""Messages dropped before only every hundredth is said: whoever sends nonsense must not fill the log as well."""


class Journal:
    """Records of one server.

    Args:
        store: where events wait until they are recorded.
        record: given one JSON-able mapping for each event. One that carries an "n" comes from the store: it is given
            again if the process dies before the store has forgotten it, and whoever keeps records skips a number that
            it has. It may raise OSError, and is then asked again later.
        say: told a sentence for people.
    """

    def __init__(self, store: Store, record: Callable[[Mapping[str, Any]], None], say: Callable[[str], None]) -> None:
        self._store, self._record, self._say = store, record, say
        self._refused = Counter(store.refusals())
        self._saved = dict(self._refused)
        self._dropped = 0
        self._trouble = ""

    def note(self, event: Mapping[str, Any]) -> None:
        """Record something that nobody misses if it is lost, such as a device's report."""
        self._written(event)

    def refused(self, code: str, times: int = 1) -> None:
        """Count a refusal, or so many."""
        if times:
            self._refused[code] += times

    def dropped(self, what: str, code: str = "malformed") -> None:
        """Count a message that meant nothing, and say it unless there are too many."""
        self.refused(code)
        self._dropped += 1
        if self._dropped <= LOUD or self._dropped % LOUD == 0:
            self._say(what + (f" (the {self._dropped}th such message)" if self._dropped > LOUD else ""))

    def write(self) -> None:
        """Record the events of the store.

        Raises:
            DiskFullError: no room to note that they are recorded; they are given again then.
        """
        done = 0
        for number, event in self._store.unrecorded():
            if not self._written({**event, "n": number}):
                break
            done = number
        if done:
            self._store.recorded(done)

    def save(self) -> None:
        """Save the counts, if there is room; the next time will do as well."""
        if self._saved == self._refused:
            return
        with suppress(DiskFullError):
            self._store.save_refusals(self._refused)
            self._saved = dict(self._refused)

    @property
    def refusals(self) -> dict[str, int]:
        """Code → how often something was refused with it, since the store was new."""
        return dict(sorted(self._refused.items()))

    @property
    def summary(self) -> str:
        """The refusals in a few words."""
        counts = ", ".join(f"{count} {code}" for code, count in self.refusals.items())
        return f"refused in all: {counts}" if counts else "nothing was refused"

    def _written(self, event: Mapping[str, Any]) -> bool:
        try:
            self._record(event)
        except OSError as error:
            # Once for each reason: on a full disk this would be said with every report.
            if str(error) != self._trouble:
                self._say(f"what happens cannot be recorded ({error}); events of the store are recorded later")
            self._trouble = str(error)
            return False
        self._trouble = ""
        return True
