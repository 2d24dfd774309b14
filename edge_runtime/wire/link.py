"""One MQTT connection that comes back: connect, wait and try again, and run paho's network loop while it holds.

All of it happens in one thread of its own. Other threads only put packets in paho's queue, and only while they hold the
`gate`, which this thread holds while a connection is being made: a packet that slips in before CONNECT makes a broker
hang up.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from threading import Condition, Event, RLock, Thread
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import MQTTErrorCode
from paho.mqtt.reasoncodes import ReasonCode

from edge_runtime.errors import BrokerError
from edge_runtime.wire import certificates
from edge_runtime.wire.address import BrokerAddress
from edge_runtime.wire.bucket import Pace

# From the TCP connection to CONNACK. A broker that recovers a large store answers late.
CONNACK_TIMEOUT_S = 20.0
CLOSE_TIMEOUT_S = 5.0
FIRST_DELAY_S, LONGEST_DELAY_S = 0.5, 30.0
# A shorter session does not reset the back-off: two processes with one client id evict each other for ever.
STABLE_S = 10.0

# How long what is to be sent may wait while reading is paced, and what the kernel may read ahead meanwhile, in bytes.
WITHOUT_READING_S = 0.05
READ_AHEAD = 64 * 1024

# CONNACK's reasons that no waiting mends, by their MQTT 5 codes, into which paho translates those of 3.1.1.
FINAL_REFUSALS = {
    0x84: "it does not speak MQTT 3.1.1; choose a broker that does",
    0x85: "it does not accept this client id; choose another",
    0x86: "user name or password are wrong; check both, here and in the broker's configuration",
    0x87: "this client is not authorised; give it a user name and password, or a certificate, that the broker knows",
}


def backoff(attempt: int, random: Random) -> float:
    """Seconds to wait after failure number `attempt` (from 0): doubling up to 30 s, half of it by chance.

    The chance keeps a fleet from returning as one when its broker does.
    """
    # 2**6 is past the longest delay already; the bound keeps the power small after a week of failures.
    ceiling = min(LONGEST_DELAY_S, FIRST_DELAY_S * 2.0 ** min(attempt, 6))
    return random.uniform(ceiling / 2, ceiling)


@dataclass(frozen=True)
class Hooks:
    """What the owner of a link does, each in the network thread.

    Attributes:
        say: takes a sentence about what happens to the connection; must not block.
        lost: a connection that the broker had accepted has ended; the gate is held.
        opened: the broker has accepted a connection, and what it had not acknowledged was sent again; the gate is held.
        tick: called about once a second, and after every packet, while the connection holds.
    """

    say: Callable[[str], None]
    lost: Callable[[], None]
    opened: Callable[[], None]
    tick: Callable[[], None]


class Link:
    """The connection of one paho client.

    Attributes:
        gate: held by whoever makes paho send something.
        changed: notified when one of the next four, or whatever else the owner guards with it, has changed. Never call
            paho while holding it: paho calls back with its own locks held.
        connected: whether the broker can be reached right now.
        sessions: how many connections there have been.
        failure: why no further connection will be tried, or None.
        closing: set by `close`.
    """

    def __init__(
        self, client: paho.Client, address: BrokerAddress, hooks: Hooks, random: Random, reading: Pace
    ) -> None:
        self.gate = RLock()
        self.changed = Condition()
        self.connected = False
        self.sessions = 0
        self.failure: str | None = None
        self.closing = Event()
        self._client = client
        self._address = address
        self._hooks = hooks
        self._random = random
        self._reading = reading
        self._trouble = "it did not answer"
        self._refusal: ReasonCode | None = None
        client.on_connect = self._answered
        client.on_socket_open = self._opened
        # With a write callback set, paho leaves writing to whoever runs its loop; otherwise the thread that publishes
        # would write to the socket as well, and packets would mix.
        client.on_socket_register_write = _leave_it_to_the_loop
        self._thread = Thread(target=self._run, name=f"mqtt {address}", daemon=True)

    def start(self, patience: float | None) -> None:
        """Begin, and wait up to `patience` seconds for the first connection.

        Raises:
            BrokerError: there was none, or the broker refused us.
        """
        self._thread.start()
        with self.changed:
            self.changed.wait_for(lambda: self.sessions or self.over, patience)
            if not self.sessions:
                raise BrokerError(
                    self.failure
                    or f"no broker at {self._address} within {patience:g} s: {self._trouble}; "
                    "check host, port and network, and that the broker runs"
                )

    def close(self) -> None:
        """Disconnect in order, so that the last will is not published, and end the thread."""
        with self.changed:
            self.closing.set()
            connected = self.connected
            self.changed.notify_all()
        if connected:
            # The network thread would do it too, but only when its loop wakes up.
            with self.gate:
                self._client.disconnect()
        if self._thread.ident is not None:
            self._thread.join(CLOSE_TIMEOUT_S)

    @property
    def over(self) -> bool:
        """Whether there will be no further connection."""
        return self.failure is not None or self.closing.is_set()

    def check_alive(self) -> None:
        """Raise BrokerError if there will be no further connection."""
        if self.failure is not None:
            raise BrokerError(self.failure)
        if self.closing.is_set():
            raise BrokerError(f"the connection to the broker at {self._address} is closed; open a new one")

    def _run(self) -> None:
        attempt = 0
        try:
            while not self.closing.is_set():
                began, sessions = time.monotonic(), self.sessions
                loss = self._session()
                if time.monotonic() - began >= STABLE_S:
                    attempt = 0
                if self.sessions > sessions and attempt > 1:
                    loss += "; does another process use the same client id?"
                if not self.closing.is_set():
                    self._pause(loss, backoff(attempt, self._random))
                attempt += 1
        except BrokerError as error:
            self._fail(str(error))
        except Exception as error:  # noqa: BLE001 - the end of a thread: whatever it was must reach the callers
            self._fail(f"the connection to the broker at {self._address} ended by {error!r}; please report this")

    def _pause(self, loss: str, seconds: float) -> None:
        with self.changed:
            self._trouble = loss
        self._hooks.say(f"broker at {self._address} {loss}; trying again in {seconds:.1f} s")
        self.closing.wait(seconds)

    def _fail(self, reason: str) -> None:
        with self.changed:
            self.failure = reason
            self.connected = False
            self.changed.notify_all()
        self._hooks.say(reason)

    def _session(self) -> str:
        """One connection from beginning to end; says why it ended."""
        try:
            with self.gate:
                self._refusal = None
                self._client.reconnect()
                refusal = self._await_answer()
                if self.connected:
                    self._hooks.opened()
        except OSError as error:
            self._check_certificates()
            return f"unreachable ({error.strerror or error})"
        if refusal is not None and refusal.value in FINAL_REFUSALS:
            raise BrokerError(f"the broker at {self._address} refused us: {FINAL_REFUSALS[refusal.value]}")
        if refusal is not None:
            return f"refused us for now ({refusal})"
        if self.connected:
            self._hooks.say(f"connected to the broker at {self._address}")
        else:
            self._check_certificates()
        return self._stay()

    def _check_certificates(self) -> None:
        """Whether TLS is why there was no answer: that waiting does not mend.

        Raises:
            BrokerError: it is; says whose certificate it is, and its dates.
        """
        if not self._address.encrypted or self.closing.is_set():
            return
        if self._address.tls_cert is not None:
            certificates.check_dates(self._address.tls_cert)
        found = certificates.verdict(self._address, self._address.tls_context())
        if found is not None:
            raise BrokerError(found)

    def _await_answer(self) -> ReasonCode | None:
        """Run paho's loop until the broker has accepted us, which sets `connected`, or refused us: then its reason."""
        deadline = time.monotonic() + CONNACK_TIMEOUT_S
        while self._refusal is None and not self.connected and not self.closing.is_set():
            if self._client.loop(0.2) != MQTTErrorCode.MQTT_ERR_SUCCESS or time.monotonic() > deadline:
                break
        return self._refusal

    def _stay(self) -> str:
        """Run paho's loop until the connection ends, and end it in order when closing."""
        answered = self.connected
        leave_by: float | None = None
        while answered or self.closing.is_set():
            if self.closing.is_set() and leave_by is None:
                leave_by = time.monotonic() + CLOSE_TIMEOUT_S
                self._client.disconnect()
            if self._turn() != MQTTErrorCode.MQTT_ERR_SUCCESS:
                break
            if leave_by is not None and time.monotonic() > leave_by:
                break
            self._hooks.tick()
        with self.changed:
            self.connected = False
            self.changed.notify_all()
        if answered and not self.closing.is_set():
            with self.gate:
                self._hooks.lost()
        return "closed the connection, or the network did" if answered else "took the connection but did not answer"

    def _turn(self) -> MQTTErrorCode:
        """Run paho's loop once. While more was read than may be, only write and keep alive: TCP slows the broker."""
        wait = self._reading.wait
        if wait <= 0:
            return self._client.loop(1.0)
        self.closing.wait(min(wait, WITHOUT_READING_S))
        code = self._client.loop_write() if self._client.want_write() else MQTTErrorCode.MQTT_ERR_SUCCESS
        return code or self._client.loop_misc()

    def _opened(self, _client: Any, _data: Any, line: Any) -> None:
        if self._reading.limited:
            # What the kernel takes in ahead of us is beyond our pace, so it shall be little.
            line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, READ_AHEAD)

    def _answered(self, _client: Any, _data: Any, _flags: Any, reason: ReasonCode, _properties: Any) -> None:
        if reason.is_failure:
            self._refusal = reason
            return
        with self.changed:
            self.sessions += 1
            self.connected = True
            self.changed.notify_all()


def _leave_it_to_the_loop(_client: Any, _data: Any, _socket: Any) -> None:
    """Take note of paho's wish to write, and do nothing: its loop looks for itself."""
