"""The server's signatures: seals what it says, and opens what devices say by the keys of the roster."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from edge_runtime.errors import AuthenticityError, ConfigError, WireError
from edge_runtime.wire import enrolment, signing, topics
from edge_runtime.wire.keys import SigningKey
from edge_runtime.wire.ledger import Ledger
from edge_runtime.wire.messages import Enrol, Enrolled, Message, Rejected, is_absence, load
from edge_runtime.wire.signing import Sealed
from server.roster import Entry, Roster, RosterFile


class ServerGuard:
    """Signs for the server, and listens to devices of the roster alone; see `edge_runtime.wire.guard.Guard`.

    A counter is remembered once its message has been dealt with, and not before: after a crash in between the broker
    repeats the message, and nothing is lost.

    An absence is never old: a last will is sealed before anything else and published after everything. When it is
    published is the broker's word in any case; whose it is, `rounds` looks at.

    Args:
        fleet: the server's fleet.
        key: the server's.
        roster: the fleet's.
        ledger: opened, the server's own.

    Raises:
        ConfigError: the roster is another fleet's.
    """

    def __init__(self, fleet: str, key: SigningKey, roster: RosterFile, ledger: Ledger) -> None:
        self._fleet, self._key, self._file, self._ledger = fleet, key, roster, ledger
        found = roster.read().fleet
        if found != fleet:
            raise ConfigError(f"the roster is of fleet '{found}'; this server runs '{fleet}'; name the right one")
        self._opened: tuple[str, str, int] | None = None
        self._answers: list[tuple[str, Message]] = []
        self.dropped: Counter[str] = Counter()

    def seal(self, topic: str, message: bytes) -> bytes:
        """The message, signed for this topic."""
        return signing.seal(topic, message, self._key, self._ledger.draw())

    def open(self, topic: str, payload: bytes) -> bytes | None:
        """A device's message, or None for one that is older than what was taken, and for an enrolment."""
        self._opened = None
        parsed = topics.parse(self._fleet, topic)
        client, kind = (parsed.client, parsed.kind) if parsed else ("", "")
        try:
            sealed = self._recognised(topic, payload, client, kind)
        except AuthenticityError:
            self.dropped["refused" if self._answers else "forged"] += 1
            raise
        if sealed is None:
            return None
        if sealed.counter < self._ledger.highest(sealed.by, kind) and not _absence(kind, sealed.message):
            self.dropped["old"] += 1
            return None
        self._opened = sealed.by, kind, sealed.counter
        return sealed.message

    def settle(self) -> Sequence[tuple[str, Message]]:
        """Remember the counter of what was opened last; returns what to tell to which device."""
        if self._opened is not None:
            self._ledger.take(*self._opened)
            self._opened = None
        answers, self._answers = self._answers, []
        return answers

    def _recognised(self, topic: str, payload: bytes, client: str, kind: str) -> Sealed | None:
        """A message that this device's key sealed; None for an enrolment, which is dealt with here.

        What is signed by nobody, or by another key, is never answered: an answer would reach a device that said
        nothing, and could send it away.
        """
        sealed = signing.take_apart(topic, payload)
        entry = self._roster().devices.get(client)
        if entry is None:
            self._answers = [(client, _stranger(client, self._fleet))]
            raise AuthenticityError(f"'{client}' is not in the roster of fleet '{self._fleet}'; provision it first")
        asked = _enrolment(kind, sealed.message) if entry.token is not None else None
        if asked is not None:
            signing.verify(topic, sealed, bytes.fromhex(asked.key))
            self._enrol(client, entry, asked)
            return None
        if entry.key is None:
            raise AuthenticityError(f"'{client}' has a token and no key yet; it must enrol first")
        signing.verify(topic, sealed, bytes.fromhex(entry.key))
        if entry.revoked is not None:
            self._answers = [(client, _revoked(client, entry))]
            raise AuthenticityError(f"the key {sealed.by} of '{client}' is revoked: {entry.revoked}")
        return sealed

    def _roster(self) -> Roster:
        try:
            return self._file.read()
        except ConfigError as error:
            # A file that somebody is editing is no reason to end a fleet, and none to let anybody in.
            raise AuthenticityError(f"nobody can be recognised: {error}") from error

    def _enrol(self, client: str, entry: Entry, message: Enrol) -> None:
        """Take a device's key, if its token says so and has not been used for another one."""
        if entry.revoked is not None:
            self._answers = [(client, _revoked(client, entry))]
            raise AuthenticityError(f"'{client}' is revoked and asks to enrol a key")
        proven = enrolment.proves(self._fleet, message, bytes.fromhex(entry.token or ""))
        if message.client != client or not proven:
            self._refuse(
                client, message, "the token is not the one that was issued for this name; have another one issued"
            )
        elif entry.used and entry.key != message.key:
            self._refuse(client, message, "the token was used already, for another key; have another one issued")
        elif not entry.used:
            self._file.change(lambda roster: _taken(roster, client, entry, message.key))
        self._answers = [(client, Enrolled(client=client, key=message.key))]

    def _refuse(self, client: str, message: Enrol, reason: str) -> None:
        # It names the key that asked: nobody must be able to have a device sent away by asking in its name.
        self._answers = [(client, Rejected(code="not-enrolled", reason=reason, key=message.key))]
        raise AuthenticityError(f"refused to enrol '{client}': {reason}")


def _absence(kind: str, message: bytes) -> bool:
    """Whether a message says that its device is away."""
    try:
        return kind == "status" and is_absence(message)
    except WireError:
        return False


def _enrolment(kind: str, message: bytes) -> Enrol | None:
    """The enrolment that a message is, if it is one."""
    try:
        found = load(message) if kind == "up" and b'"type":"enrol"' in message else None
    except WireError as error:
        raise AuthenticityError(f"an enrolment does not parse: {error}") from error
    return found if isinstance(found, Enrol) else None


def _taken(roster: Roster, client: str, entry: Entry, key: str) -> Roster:
    """The roster with this key for a device, unless somebody changed its entry in the meantime."""
    if roster.devices.get(client) != entry:
        raise AuthenticityError(f"the entry of '{client}' in the roster has just changed; it will ask again")
    return roster.having(client, entry.model_copy(update={"key": key, "used": True}))


def _stranger(client: str, fleet: str) -> Rejected:
    return Rejected(
        code="not-enrolled",
        reason=f"'{client}' is not in the roster of fleet '{fleet}'; run on the server: edge-runtime provision",
    )


def _revoked(client: str, entry: Entry) -> Rejected:
    return Rejected(
        code="revoked",
        reason=f"the key of '{client}' is revoked ({entry.revoked}); have a new one made: edge-runtime provision",
    )
