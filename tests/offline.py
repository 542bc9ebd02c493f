"""No process of the tests reaches another machine: every such attempt is refused, and noted."""

from __future__ import annotations

import ipaddress
import socket
from typing import Any

ATTEMPTS: list[str] = []


def is_here(host: object) -> bool:
    """Tell whether a host is this machine: a loopback address, ``localhost``, or none at all.

    Args:
        host: as given to the functions of :mod:`socket`.
    """
    name = host.decode("ascii", "replace") if isinstance(host, bytes) else host
    if name in (None, "", "localhost", socket.gethostname()):
        return True
    try:
        return ipaddress.ip_address(str(name)).is_loopback
    except ValueError:
        return False


def refuse(host: object) -> None:
    """Note an attempt to reach another machine and refuse it.

    Args:
        host: the other machine.

    Raises:
        OSError: always, as without a network.
    """
    ATTEMPTS.append(str(host))
    raise OSError(f"the network is blocked in tests: {host}")


class Socket(socket.socket):
    """A socket that connects to this machine only."""

    def connect(self, address: Any) -> None:
        self._check(address)
        super().connect(address)

    def connect_ex(self, address: Any) -> int:
        self._check(address)
        return super().connect_ex(address)

    def sendto(self, data: Any, *rest: Any) -> int:
        self._check(rest[-1])
        return super().sendto(data, *rest)

    def _check(self, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and not is_here(address[0]):
            refuse(address[0])


def block_network() -> None:
    """Block every connection of this process to another machine, and the look-up of its name; once is enough."""
    if socket.socket is Socket:
        return
    look_up = socket.getaddrinfo

    def getaddrinfo(host: Any, *rest: Any, **named: Any) -> Any:
        return look_up(host, *rest, **named) if is_here(host) else refuse(host)

    socket.getaddrinfo = getaddrinfo
    socket.socket = Socket  # type: ignore[misc]
