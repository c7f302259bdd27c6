"""A queue between threads whose reader sleeps in ``poll()`` on sockets: putting something in makes ``fileno()`` readable."""

from __future__ import annotations

import socket
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Mailbox(Generic[T]):
    """Any thread puts, one takes. Unbounded: what goes in is bounded by what is in flight."""

    def __init__(self) -> None:
        self._items: deque[T] = deque()
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)

    def fileno(self) -> int:
        return self._reader.fileno()

    def put(self, item: T, *, is_urgent: bool = True) -> None:
        """Not urgent: whoever reads sees it when something else wakes it, or ``ring`` does."""
        self._items.append(item)
        if is_urgent:
            self.ring()

    def ring(self) -> None:
        try:
            self._writer.send(b"\0")
        except BlockingIOError:
            pass  # full of wake-ups already
        except OSError:
            pass  # closed: nobody reads any more

    def take_all(self) -> list[T]:
        """What is in it, oldest first. Never blocks."""
        try:
            while self._reader.recv(4096):
                pass
        except BlockingIOError:
            pass  # empty, as it should be
        items = []
        while self._items:
            items.append(self._items.popleft())
        return items

    def close(self) -> None:
        self._reader.close()
        self._writer.close()
