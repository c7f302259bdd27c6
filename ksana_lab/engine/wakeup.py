"""A bell that any thread may ring and a poller can wait for."""

from __future__ import annotations

import socket


class Wakeup:
    """Poll ``fileno()`` for reading, then ``clear``. Rings before the poll are not lost."""

    def __init__(self) -> None:
        self._ear, self._bell = socket.socketpair()
        self._ear.setblocking(False)
        self._bell.setblocking(False)

    def fileno(self) -> int:
        return self._ear.fileno()

    def ring(self) -> None:
        """Never blocks; callable from any thread and from a signal handler, also after ``close``."""
        try:
            self._bell.send(b"\0")
        except (BlockingIOError, OSError):  # already ringing, or closed
            pass

    def clear(self) -> None:
        try:
            while self._ear.recv(4096):
                pass
        except (BlockingIOError, OSError):
            pass

    def close(self) -> None:
        """May be called twice."""
        self._ear.close()
        self._bell.close()
