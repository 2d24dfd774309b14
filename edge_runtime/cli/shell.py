"""What the long-running verbs share: signals, logs, the connection to the broker, sizes."""

from __future__ import annotations

import json
import platform
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from random import Random
from typing import IO, Any

from edge_runtime.config import Broker, Config
from edge_runtime.errors import ConfigError
from edge_runtime.wire.address import BrokerAddress
from edge_runtime.wire.bucket import Rates
from edge_runtime.wire.transport import Transport, Will

UNITS: Mapping[str, int] = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def size(text: str) -> int:
    """Bytes of a size such as 900M, 1.5G or 123456; binary units.

    Raises:
        ConfigError: not a size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    if found is None:
        raise ConfigError(f"a size is a number with K, M, G or T, such as 900M; found {text!r}")
    return int(float(found[1]) * UNITS[found[2].upper()])


def stop_on_signals() -> Callable[[], bool]:
    """Ctrl-C and SIGTERM ask for a clean end; a second one ends at once. Returns whether the end was asked for."""
    asked = threading.Event()

    def ask(number: int, _frame: object) -> None:
        asked.set()
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, ask)
    return asked.is_set


@contextmanager
def _interruptible(stop: Callable[[], bool]) -> Iterator[None]:
    """Within it a signal ends the wait at once, for nothing is under way yet that would have to end in order."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        if stop():
            raise KeyboardInterrupt
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def logger(who: str, *, as_json: bool, stream: IO[str] | None = None) -> Callable[[str], None]:
    """A function that logs a sentence, with its time and who says it; safe from any thread."""
    lock = threading.Lock()

    def say(text: str) -> None:
        at = datetime.now(timezone.utc).astimezone()
        line = (
            json.dumps({"time": at.isoformat(timespec="milliseconds"), "who": who, "message": text})
            if as_json
            else f"{at:%H:%M:%S} {who}: {text}"
        )
        # Looked up now: whoever redirects the standard error of this process means what comes then.
        to = sys.stderr if stream is None else stream
        with lock:
            to.write(line + "\n")
            to.flush()

    return say


def recorder(path: Path) -> Callable[[Mapping[str, Any]], None]:
    """A function that appends events to a JSON-lines file, each with its time.

    An event that has a number ("n") is in the file once, however often it is given: numbers rise, and one that is not
    above the last in the file is there. What a kill or a full disk left of a last line is cut off.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    last = _mend(path)

    def record(event: Mapping[str, Any]) -> None:
        nonlocal last
        if event.get("n", last + 1) <= last:
            return
        stamped = {"time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"), **event}
        with path.open("ab", buffering=0) as file:
            line = (json.dumps(stamped) + "\n").encode()
            at = file.tell()
            # A write that does not fit may write a part, and only the next one says why.
            written = 0
            try:
                while written < len(line):
                    written += file.write(line[written:])
            except OSError:
                file.truncate(at)
                raise
        last = max(last, event.get("n", 0))

    return record


def _mend(path: Path) -> int:
    """Cut off half a last line of a record; the largest number of an event in it."""
    if not path.exists():
        return 0
    last = whole = 0
    with path.open("rb+") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            whole += len(line)
            if b'"n": ' in line:
                last = max(last, json.loads(line).get("n", 0))
        file.truncate(whole)
    return last


def with_broker(config: Config, address: str | None) -> Config:
    """The configuration with HOST[:PORT] in the place of the file's broker.

    Raises:
        ConfigError: not an address.
    """
    if address is None:
        return config
    host, colon, port = address.rpartition(":")
    if not colon:
        host, port = address, str(config.broker.port)
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"--broker takes HOST or HOST:PORT; found {address!r}")
    broker = config.broker.model_copy(update={"host": host, "port": int(port)})
    return config.model_copy(update={"broker": broker})


def with_device(config: Config, flags: Mapping[str, Any], memory_limit: str | None) -> Config:
    """The configuration with what flags say of this device in the place of what its file says; None says nothing.

    Raises:
        ConfigError: the memory limit is not a size.
    """
    given = {key: value for key, value in flags.items() if value is not None}
    if memory_limit is not None:
        given["memory_limit"] = size(memory_limit)
    return config.model_copy(update={"device": config.device.model_copy(update=given)})


def device_name(config: Config) -> str:
    """This device's client id: what the configuration says, or the host name as far as it may be one."""
    return config.device.name or re.sub(r"[^A-Za-z0-9._-]", "-", platform.node())[:64] or "device"


def address_of(broker: Broker) -> BrokerAddress:
    """The broker's address with its credentials.

    Raises:
        ConfigError: the password file cannot be read.
    """
    password = None
    if broker.password_file is not None:
        try:
            password = broker.password_file.read_text(encoding="utf-8").splitlines()[0]
        except (OSError, IndexError) as error:
            raise ConfigError(f"broker.password_file: a password was expected in the first line ({error})") from error
    return BrokerAddress(
        host=broker.host,
        port=broker.port,
        username=broker.username,
        password=password,
        tls_ca=broker.cafile,
        tls_cert=broker.certfile,
        tls_key=broker.keyfile,
    )


def check_names(config: Config) -> None:
    """Look up the method and the codecs before anything is started, prepared or waited for.

    Raises:
        ConfigError: no such method, a parameter that it does not take, or a family that it has no meaning for.
        UnknownCodecError: no such codec.
    """
    from edge_runtime.wire import update
    from server import aggregators, exchange

    aggregators.build(config.aggregator.method, **(config.aggregator.model_extra or {}))
    exchange.check(config)
    update.bits_up(config.wire.codec_up)
    update.bits_down(config.wire.codec_down)


def connect(
    config: Config,
    client_id: str,
    say: Callable[[str], None],
    stop: Callable[[], bool],
    will: Will | None = None,
    rates: Rates | None = None,
) -> Transport:
    """Connect to the fleet's broker; goes on trying, and says so.

    Raises:
        BrokerError: there is none within `broker.patience`, or it refuses us.
        KeyboardInterrupt: asked to stop.
    """
    from edge_runtime.wire import mqtt

    with _interruptible(stop):
        return mqtt.connect(
            address_of(config.broker),
            client_id,
            on_event=say,
            # Jitter only has to differ between devices; it is no secret and no experiment depends on it.
            random=Random(client_id),  # noqa: S311
            will=will,
            patience=config.broker.patience,
            rates=rates,
        )
