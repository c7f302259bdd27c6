"""Free ports, taken ports, and who holds them."""

import os
import socket

from ksana_lab.cluster.ports import PortPool, holder, is_free, is_this_host


def listening():
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    sock.listen()
    return sock


def test_a_pooled_port_is_ours_alone_but_a_child_may_listen_on_it():
    pool = PortPool()
    ports = [pool("127.0.0.1") for _ in range(20)]
    assert len(set(ports)) == 20 and all(is_free("127.0.0.1", port) for port in ports)
    with socket.socket() as stranger:  # anyone who does not ask for this very port gets another
        stranger.bind(("127.0.0.1", 0))
        assert stranger.getsockname()[1] not in ports
    pool.close()
    pool.close()


def test_a_taken_port_is_named_with_its_process():
    with listening() as sock:
        port = sock.getsockname()[1]
        assert not is_free("127.0.0.1", port) and not is_free("0.0.0.0", port)
        assert f"pid {os.getpid()}" in holder(port)


def test_a_port_is_free_again_after_its_server():
    sock = listening()
    port = sock.getsockname()[1]
    sock.close()
    assert is_free("127.0.0.1", port)


def test_addresses_of_other_hosts_are_not_ours():
    assert is_this_host("127.0.0.1") and is_this_host("0.0.0.0")
    assert not is_this_host("192.0.2.1")  # TEST-NET-1: nobody's
