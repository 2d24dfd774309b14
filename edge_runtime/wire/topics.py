"""The topic tree: build and parse. Nobody else writes a slash.

edge/<fleet>/round                         retained   the current Directive
edge/<fleet>/blob/<sha256>/<n>             retained   chunk n of a broadcast blob
edge/<fleet>/c/<client>/status             retained   online | offline (last will)
edge/<fleet>/c/<client>/up                            hello · offer · report
edge/<fleet>/c/<client>/down                          welcome · need · accepted · rejected
edge/<fleet>/c/<client>/blob/<sha256>/<n>             chunk n of an upload
edge/<fleet>/c/<client>/link/<n>           retained   part n of a device's test of its own link; cleared after it
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from edge_runtime.errors import ConfigError

ROOT = "edge"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")
DIGEST = re.compile(r"[0-9a-f]{64}\Z")
# Written in one way only, so that a chunk has one topic. Ten digits are more chunks than any permitted blob has.
CHUNK = re.compile(r"(0|[1-9][0-9]{0,9})\Z")


@dataclass(frozen=True)
class Topic:
    """A parsed topic.

    Attributes:
        kind: "round", "blob", "status", "up", "down" or "upload" (a chunk on its way to the server).
        client: the device it belongs to; empty for a broadcast.
        digest: SHA-256 of the blob, for "blob" and "upload".
        chunk: index of the chunk, for "blob" and "upload".
    """

    kind: str
    client: str = ""
    digest: str = ""
    chunk: int = 0


def valid_name(name: str, what: str) -> str:
    """The name of a fleet or a client, if it can be one level of a topic.

    Raises:
        ConfigError: an empty name, a longer one than 64 characters, or one with other characters than A-Z a-z 0-9 . _ -
    """
    if not NAME.match(name):
        raise ConfigError(f"a {what} is 1 to 64 letters, digits, '.', '_' or '-'; found {name!r}; choose another name")
    return name


def directive(fleet: str) -> str:
    """Where the current Directive is retained."""
    return f"{ROOT}/{fleet}/round"


def broadcast(fleet: str, digest: str, chunk: int | None = None) -> str:
    """Chunk of a broadcast blob, or the pattern of all its chunks."""
    return f"{ROOT}/{fleet}/blob/{digest}/{'+' if chunk is None else chunk}"


def broadcasts(fleet: str) -> str:
    """The pattern of all chunks of all broadcast blobs."""
    return f"{ROOT}/{fleet}/blob/#"


def status(fleet: str, client: str) -> str:
    """Where a device's presence is retained; '+' for all devices."""
    return f"{ROOT}/{fleet}/c/{client}/status"


def up(fleet: str, client: str) -> str:
    """What a device says to the server; '+' for all devices."""
    return f"{ROOT}/{fleet}/c/{client}/up"


def down(fleet: str, client: str) -> str:
    """What the server says to a device."""
    return f"{ROOT}/{fleet}/c/{client}/down"


def upload(fleet: str, client: str, digest: str, chunk: int | None = None) -> str:
    """Chunk of an upload, or the pattern of all its chunks; '+' for all devices or digests."""
    return f"{ROOT}/{fleet}/c/{client}/blob/{digest}/{'+' if chunk is None else chunk}"


def link(fleet: str, client: str, part: int | None = None) -> str:
    """Part of a device's test of its own link, or the pattern of all; nobody else listens, so `parse` knows none."""
    return f"{ROOT}/{fleet}/c/{client}/link/{'+' if part is None else part}"


def everything(fleet: str) -> str:
    """The pattern an onlooker subscribes to."""
    return f"{ROOT}/{fleet}/#"


def _chunk(kind: str, client: str, digest: str, number: str) -> Topic | None:
    if not DIGEST.match(digest) or not CHUNK.match(number):
        return None
    return Topic(kind, client, digest, int(number))


def parse(fleet: str, topic: str) -> Topic | None:
    """What a topic of this fleet means, or None for one that is not of its tree.

    A stranger may publish anything below `edge/`; what does not parse is nobody's message.
    """
    levels = topic.split("/")
    if levels[:2] != [ROOT, fleet]:
        return None
    match levels[2:]:
        case ["round"]:
            return Topic("round")
        case ["blob", digest, number]:
            return _chunk("blob", "", digest, number)
        case ["c", client, "status" | "up" | "down" as kind] if NAME.match(client):
            return Topic(kind, client)
        case ["c", client, "blob", digest, number] if NAME.match(client):
            return _chunk("upload", client, digest, number)
        case _:
            return None
