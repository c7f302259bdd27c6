"""The stream of notices when something is lost: who hears of it, and what the other end may conclude."""

from __future__ import annotations

import socket
import threading

import pytest

from ksana_lab.transfer.backends.stream import StreamLink, StreamServer, dial, listen


class Events:
    def __init__(self) -> None:
        self.lost, self.gone = threading.Event(), threading.Event()

    def on_lost(self, reason) -> None:
        self.lost.set()

    def on_writer_gone(self, session, reason) -> None:
        self.gone.set()

    def on_notice(self, session, window, notice, first_ns) -> None: ...

    def on_ack(self, token, error) -> None: ...


@pytest.mark.parametrize("is_kept", [True, False])
def test_a_connection_that_stands_for_writes_ends_only_with_its_link(is_kept):
    events, listener = Events(), listen("127.0.0.1")
    server = StreamServer(listener, events, cache_bytes=8)
    sock = dial(socket.AF_INET, listener.getsockname()[:2], 5)
    link = StreamLink(sock, server.secret, 1, events, 5, is_kept=is_kept)
    link.start()
    try:
        server.forget(1)
        assert events.lost.wait(5)
        assert events.gone.wait(0.2 if is_kept else 5) is not is_kept
        assert server.num_writers(1) == is_kept
        link.close()
        assert events.gone.wait(5) and server.num_writers(1) == 0
    finally:
        link.close()
        server.close()


def test_a_host_that_vanishes_is_noticed_within_half_a_minute():
    events, listener = Events(), listen("127.0.0.1")
    server = StreamServer(listener, events, cache_bytes=8)
    link = StreamLink(dial(socket.AF_INET, listener.getsockname()[:2], 5), server.secret, 1, events, 5)
    link.start()
    try:
        option = link._wire.sock.getsockopt
        idle, between, probes = (option(socket.IPPROTO_TCP, getattr(socket, f"TCP_KEEP{name}")) for name in ("IDLE", "INTVL", "CNT"))
        assert option(socket.SOL_SOCKET, socket.SO_KEEPALIVE) and idle + between * probes <= 30
    finally:
        link.close()
        server.close()
