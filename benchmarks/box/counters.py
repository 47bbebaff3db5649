"""Bytes that crossed a host's link, from the kernel's own counters, and what the protocols add.

Every packet is counted with its Ethernet, IP and TCP headers; acknowledgements and retransmissions
count too. Devices of one host talk over the loopback interface and are not counted here.
"""

import dataclasses
import pathlib

FOLDER = pathlib.Path("/sys/class/net")


@dataclasses.dataclass(frozen=True)
class Counters:
    """Bytes that an interface sent and received since it was made, or between two readings."""

    sent: int
    received: int

    def __sub__(self, before: "Counters") -> "Counters":
        return Counters(self.sent - before.sent, self.received - before.received)


def read(interface: str = "eth0") -> Counters:
    """The counters of an interface of the namespace that this process runs in."""
    folder = FOLDER / interface / "statistics"
    sent, received = (int((folder / f"{way}_bytes").read_text()) for way in ("tx", "rx"))
    return Counters(sent, received)
