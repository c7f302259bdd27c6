"""TCP ports and addresses of this host: free ones, taken ones and who holds them. Knows nothing of nodes."""

from __future__ import annotations

import errno
import socket

import psutil

from ksana_lab.types import family_of


class PortPool:
    """Free ports that stay ours: each is bound, not listened on, until ``close``, so that no other process is given it, while a child that
    sets SO_REUSEADDR (uvicorn and zmq do) may listen on it, again and again."""

    def __init__(self) -> None:
        self._sockets: list[socket.socket] = []

    def __call__(self, host: str) -> int:
        """A free port of ``host``, an IP of this host. Raises OSError when the host is not this one."""
        held = _socket_for(host)
        try:
            held.bind((host, 0))
        except OSError:
            held.close()
            raise
        self._sockets.append(held)
        return held.getsockname()[1]

    def close(self) -> None:
        while self._sockets:
            self._sockets.pop().close()


def is_this_host(host: str) -> bool:
    """Whether an address can be bound here: one of this host's, or a wildcard. Raises OSError when the name cannot be resolved."""
    with _socket_for(host) as probe:
        try:
            probe.bind((host, 0))
        except OSError as error:
            if error.errno in (errno.EADDRNOTAVAIL, errno.EINVAL):
                return False
            raise
    return True


def is_free(host: str, port: int) -> bool:
    """Whether a server could listen on ``host:port`` now."""
    with _socket_for(host) as probe:
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return False
            raise
    return True


def holder(port: int) -> str:
    """Who listens on ``port``: ``python (pid 123: python -m http.server)``, or what is known when it belongs to another user."""
    try:
        connections = psutil.net_connections(kind="tcp")
    except psutil.AccessDenied:
        return "a process that this user may not see"
    pids = {c.pid for c in connections if c.status == psutil.CONN_LISTEN and c.laddr and c.laddr.port == port}
    known = sorted(pid for pid in pids if pid)
    if not known:
        return "a process of another user" if pids else "a process that is going away"
    return " and ".join(_describe(pid) for pid in known[:3])


def _describe(pid: int) -> str:
    try:
        process = psutil.Process(pid)
        command = " ".join(process.cmdline())
        return f"{process.name()} (pid {pid}: {command[:100]}{'…' if len(command) > 100 else ''})"
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return f"pid {pid}"


def is_wildcard(host: str) -> bool:
    return host in ("", "0.0.0.0", "::")


def _socket_for(host: str) -> socket.socket:
    family = family_of(host)
    probe = socket.socket(family, socket.SOCK_STREAM)
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return probe
