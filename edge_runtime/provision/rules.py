"""Who may say what at the broker, in the brokers' own languages.

A device writes below `edge/<fleet>/c/<its name>/` alone, and reads the Directive, the broadcast blobs, what the
server says to it and its own presence. The server has the whole of its fleet, and nothing else. A client's name is the
common name of its certificate, which its connection has proved.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from edge_runtime.errors import ConfigError
from edge_runtime.wire import topics
from edge_runtime.wire.broker import BROKERS, Settings

SERVER = "_server"
"""Common name of the server: no device can be called so."""

NATS_USERS = "nats-users.conf"

SUBJECT = {"/": ".", ".": "//", "+": "*", "#": ">"}
"""A sign of an MQTT topic or pattern → what NATS makes of it."""


def acl(fleet: str) -> str:
    """Mosquitto's access rules. Its `%u` is the user's name, so one more device needs no new rule."""
    return "\n".join(
        [
            f"# Fleet '{fleet}': the server has all of it, a device its own topics. Made by `edge-runtime provision`.",
            "# The first two patterns are for everybody; Mosquitto warns of them in vain.",
            f"user {SERVER}",
            f"topic readwrite {topics.everything(fleet)}",
            "",
            f"pattern read {topics.directive(fleet)}",
            f"pattern read {topics.broadcasts(fleet)}",
            f"pattern read {topics.down(fleet, '%u')}",
            f"pattern write {topics.up(fleet, '%u')}",
            # It contradicts a last will that comes late.
            f"pattern readwrite {topics.status(fleet, '%u')}",
            f"pattern write {topics.upload(fleet, '%u', '+')}",
            f"pattern readwrite {topics.link(fleet, '%u')}",
            "",
        ]
    )


def mosquitto_lines(folder: Path) -> Sequence[str]:
    """Lines of the listener in `mosquitto.conf`; the files lie in this folder on the broker's machine."""
    return [
        f"cafile {folder / 'ca.crt'}",
        f"certfile {folder / 'broker.crt'}",
        f"keyfile {folder / 'broker.key'}",
        f"crlfile {folder / 'revoked.crl'}",
        "tls_version tlsv1.2",
        "require_certificate true",
        # The common name of the certificate is the user name, which the rules are about.
        "use_identity_as_username true",
        # And the client id, so that no device can take over the session of another.
        "use_username_as_clientid true",
        "allow_anonymous false",
        f"acl_file {folder / 'acl'}",
    ]


def nats_users(fleet: str, devices: Sequence[str]) -> str:
    """NATS's users, by the subject of their certificates, with their permissions; a topic's '/' is its '.'.

    What MQTT itself needs (`$MQTT.sub.>`) is reached by deliveries alone: a client's own request for it is refused by
    the server. Nobody connects by another protocol.
    """
    server = _user(SERVER, [_subject(topics.everything(fleet))], [_subject(topics.everything(fleet))])
    users = [server, *(_device(fleet, name) for name in devices)]
    return "users: [\n" + "\n".join(users) + "\n]\n"


def _device(fleet: str, name: str) -> str:
    says = [
        topics.up(fleet, name),
        topics.status(fleet, name),
        topics.upload(fleet, name, "+"),
        topics.link(fleet, name),
    ]
    hears = [
        topics.directive(fleet),
        topics.broadcasts(fleet),
        topics.down(fleet, name),
        # It contradicts a last will that comes late.
        topics.status(fleet, name),
        topics.link(fleet, name),
    ]
    return _user(name, [_subject(topic) for topic in says], [_subject(topic) for topic in hears])


def _user(name: str, says: Sequence[str], hears: Sequence[str]) -> str:
    listening = json.dumps([*hears, "$MQTT.sub.>"])
    permissions = f"publish: {{ allow: {json.dumps(list(says))} }}, subscribe: {{ allow: {listening} }}"
    return f'  {{ user: "CN={name}", allowed_connection_types: ["MQTT"], permissions: {{ {permissions} }} }}'


def _subject(topic: str) -> str:
    """An MQTT topic or pattern as a NATS subject."""
    return "".join(SUBJECT.get(sign, sign) for sign in topic)


def nats_lines(folder: Path, users: str) -> tuple[Sequence[str], Sequence[str]]:
    """Lines of the MQTT listener and of the top level of a NATS configuration, with the users in `users`."""
    files = ", ".join(
        f"{key}: {json.dumps(str(folder / name))}"
        for key, name in (("cert_file", "broker.crt"), ("key_file", "broker.key"), ("ca_file", "ca.crt"))
    )
    # NATS could include a file, but only one below the folder of its configuration.
    return [f"tls {{ {files}, verify_and_map: true }}"], ["authorization {", *users.splitlines(), "}"]


def settings(kind: str, folder: Path) -> Settings:
    """What an embedded broker is told so that it keeps the rules in a provisioned folder.

    Raises:
        ConfigError: it is no such folder.
    """
    try:
        users = (folder / NATS_USERS).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"the folder 'broker' of a provisioned fleet was expected at {folder} ({error}); see edge-runtime provision"
        ) from error
    return _settings(kind, folder, users)


def _settings(kind: str, folder: Path, users: str) -> Settings:
    if kind == "mosquitto":
        return Settings(listener_lines=mosquitto_lines(folder))
    listener, other = nats_lines(folder, users)
    return Settings(listener_lines=listener, other_lines=other)


def configuration(kind: str, folder: Path, users: str, store: Path, port: int) -> str:
    """A whole configuration file for a broker that is run by itself, with its data in `store`."""
    lines = BROKERS[kind].configure(
        _settings(kind, folder, users),
        store,
        "0.0.0.0",  # noqa: S104  a fleet's broker is for others
        port,
    )
    # Whoever runs it as a service has a user for it.
    return "\n".join(line for line in lines if line != "user root") + "\n"
