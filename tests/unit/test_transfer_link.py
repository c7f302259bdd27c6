"""The emulated link, in virtual time."""

from __future__ import annotations

from ksana_lab.config.engine import LinkOptions
from ksana_lab.transfer.link import Pacer, Pacers

MS = 1_000_000


def test_no_link_costs_nothing():
    pacer = Pacer()
    assert pacer.book(1 << 30, 5) == 5 and pacer.wait_ns(5) == 0


def test_a_piece_arrives_after_its_bytes_and_the_latency():
    pacer = Pacer(bandwidth_gbps=8.0, latency_us=100)  # 1 byte per ns
    assert pacer.book(5 * MS, 0) == 5 * MS + 100_000


def test_pieces_queue_behind_each_other_and_latency_does_not_add_up():
    pacer = Pacer(8.0, 100)
    pacer.book(5 * MS, 0)
    assert pacer.wait_ns(2 * MS) == 3 * MS
    assert pacer.book(1 * MS, 5 * MS) == 6 * MS + 100_000


def test_an_idle_link_does_not_save_up():
    pacer = Pacer(8.0)
    pacer.book(1 * MS, 0)
    assert pacer.book(1 * MS, 50 * MS) == 51 * MS


def test_what_waited_for_the_link_leaves_no_gap_when_its_sender_wakes_late():
    pacer = Pacer(8.0)
    pacer.book(5 * MS, 0)
    assert pacer.book(1 * MS, 7 * MS, ready_ns=4 * MS) == 6 * MS
    assert pacer.book(1 * MS, 9 * MS, ready_ns=8 * MS) == 10 * MS  # the link had been idle: it leaves when it is handed over


def test_a_stream_of_pieces_has_the_bandwidth_that_was_asked_for():
    pacer, now = Pacer(100.0), 0
    for _ in range(1000):
        now += pacer.wait_ns(now)
        end = pacer.book(1_250_000, now)
    assert end == 1000 * 100_000  # 1.25 MB at 12.5 GB/s


def test_a_shared_link_is_one_for_all_peers_and_divided_among_ranks():
    shared = Pacers(LinkOptions(bandwidth_gbps=16.0, shared=True), tp_size=2)
    assert shared.make() is shared.make()
    assert shared.make().book(8, 0) == 8
    apart = Pacers(LinkOptions(bandwidth_gbps=16.0), tp_size=2)
    assert apart.make() is not apart.make()
