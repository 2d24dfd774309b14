"""A poor link: a network namespace whose only way out loses, delays and holds up packets.

What `tc netem` does in kernels that have it, here in user space, because many have not: two TUN devices, one in the
namespace and one outside, and a thread that carries each IP packet from one to the other, late, at a limited rate, or
not at all. TCP at both ends is the kernel's own and sees real losses.
"""

from __future__ import annotations

import fcntl
import heapq
import os
import selectors
import shutil
import struct
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from threading import Event, Thread

TUN = Path("/dev/net/tun")
# From linux/if_tun.h: TUNSETIFF, and a device of bare IP packets.
TUNSETIFF, IFF_TUN_NO_PI = 0x400454CA, 0x1001
MTU = 1500


@dataclass(frozen=True)
class Quality:
    """Of one direction.

    Attributes:
        rate: bytes of IP packets in a second.
        delay: seconds that each packet takes beside its turn at that rate.
        loss: share of packets that vanish.
        queue: bytes that may wait for their turn; what comes on top vanishes.
    """

    rate: float = 50_000.0
    delay: float = 0.05
    loss: float = 0.01
    queue: int = 64 * 1024


@dataclass(frozen=True)
class PoorLink:
    """Where the link leads.

    Attributes:
        namespace: the network namespace behind it.
        host: under this address, those behind it find this machine.
    """

    namespace: str
    host: str

    def launch(self, command: Sequence[str]) -> Sequence[str]:
        """The command that runs a command behind the link; its process is the command's own."""
        return ["ip", "netns", "exec", self.namespace, *command]


def why_not() -> str:
    """Why this machine can have no poor link; empty where it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not TUN.exists():
        return f"the kernel has no {TUN}"
    if shutil.which("ip") is None:
        return "the program 'ip' is not installed; run: apt-get install iproute2"
    found = subprocess.run(["ip", "netns", "list"], check=False, capture_output=True)
    return "" if found.returncode == 0 else f"'ip netns' does not work: {found.stderr.decode().strip()}"


@contextmanager
def poor_link(quality: Quality, seed: int = 0) -> Iterator[PoorLink]:
    """A namespace behind a link of that quality in both directions; it is gone afterwards."""
    name = f"edge-{os.getpid() % 100_000}"
    net = f"10.213.{os.getpid() % 250}"
    over = Event()
    here, there = (os.open(TUN, os.O_RDWR | os.O_NONBLOCK) for _ in range(2))
    carrier = Thread(target=_carry, args=(here, there, quality, Random(seed), over), daemon=True)
    try:
        for device, end in ((here, "h"), (there, "t")):
            fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH", f"{name}{end}".encode(), IFF_TUN_NO_PI))
        _ip("netns", "add", name)
        _ip("link", "set", f"{name}t", "netns", name)
        _ip("addr", "add", f"{net}.1", "peer", f"{net}.2", "dev", f"{name}h")
        _ip("link", "set", f"{name}h", "up", "mtu", str(MTU))
        _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", name, "addr", "add", f"{net}.2", "peer", f"{net}.1", "dev", f"{name}t")
        _ip("-n", name, "link", "set", f"{name}t", "up", "mtu", str(MTU))
        carrier.start()
        yield PoorLink(name, f"{net}.1")
    finally:
        over.set()
        if carrier.ident is not None:
            carrier.join()
        for device in (here, there):
            os.close(device)
        subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def _carry(here: int, there: int, quality: Quality, draw: Random, over: Event) -> None:
    """Take packets from each device, and put them into the other when their time has come."""
    ready = selectors.DefaultSelector()
    for device in (here, there):
        ready.register(device, selectors.EVENT_READ)
    free = {here: 0.0, there: 0.0}  # when the line that leads away from there is idle again
    other = {here: there, there: here}
    due: list[tuple[float, int, int, bytes]] = []
    count = 0
    while not over.is_set():
        wait = min(0.1, max(0.0, due[0][0] - time.monotonic())) if due else 0.1
        for key, _ in ready.select(wait):
            source, now = int(key.fd), time.monotonic()
            packet = os.read(source, MTU + 64)
            begins = max(now, free[source])
            if draw.random() < quality.loss or (begins - now) * quality.rate > quality.queue:
                continue
            free[source] = begins + len(packet) / quality.rate
            count += 1
            heapq.heappush(due, (free[source] + quality.delay, count, other[source], packet))
        while due and due[0][0] <= time.monotonic():
            _, _, target, packet = heapq.heappop(due)
            try:
                os.write(target, packet)
            except OSError:
                continue  # the device is going down: for its packets, one more loss
    ready.close()
