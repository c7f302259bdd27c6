"""A prefill rank's sender: its end, and how it looks at copies under way."""

import threading
from types import SimpleNamespace

import pytest
import torch

from ksana_lab.config.engine import ConnectorOptions, LinkOptions
from ksana_lab.core.connector import SendStep
from ksana_lab.core.kv_layout import KVLayout
from ksana_lab.errors import TransferError
from ksana_lab.protocol import transfer as wire
from ksana_lab.protocol.engine import TransferKey
from ksana_lab.tracing.recorder import NullRecorder
from ksana_lab.transfer.backends.stream import DONE
from ksana_lab.transfer.base import LinkReport
from ksana_lab.transfer.layer_tracker import LayerTracker
from ksana_lab.transfer.registry import host_id
from ksana_lab.transfer.sender import Sender, _look_again_s

KEY = TransferKey("p__d", 1)


class FakeLink:
    """Writes at once, in pieces that a test waits for; ``ticket``: what a write gives."""

    is_device_ordered = False

    def __init__(self, ticket=DONE) -> None:
        self.ticket, self.num_copies, self.was_written, self.was_notified = ticket, [], threading.Semaphore(0), threading.Event()
        self.is_closed = False

    def examine(self, timeout_s):
        return LinkReport("fake", 1e9, 1e-5, 2e9)

    def write(self, copies, window, after=None, shift=(0, 0), source=None):
        self.num_copies.append(len(copies))
        self.was_written.release()
        return self.ticket

    def notify(self, window, token, notice):
        self.was_notified.set()

    def close(self) -> None:
        self.is_closed = True


class FakeEvent:
    """Of a device: over when the test says so."""

    made: list

    def __init__(self) -> None:
        self.is_over = threading.Event()
        FakeEvent.made.append(self)

    def record(self): ...

    def synchronize(self):
        assert self.is_over.wait(10)

    def elapsed_time(self, end):
        return 0.0


@pytest.fixture
def make():
    """``make(way, num_layers, **options)``: a sender that has connected to one peer, which ``way`` is the link to."""
    made = []

    def make(way, num_layers=8, **options):
        layout = KVLayout(num_blocks=4, num_layers=num_layers, num_kv_heads=2, block_size=4, head_dim=8, dtype="float32")
        connected = threading.Event()
        sender = Sender(
            rank=0, tp_size=1, layout=layout, cache=torch.zeros(layout.total_bytes, dtype=torch.uint8),
            backends=[SimpleNamespace(name="tcp", connect=lambda *_: way)], options=ConnectorOptions(**options), recorder=NullRecorder(),
            report=lambda message: connected.set() if isinstance(message, wire.PeerConnected) else None, on_fatal=pytest.fail,
        )  # fmt: skip
        made.append(sender)
        shape = wire.Shape("float32", num_layers, 2, 8, 4, 4, layout.order, 1, "auto")
        sender.connect_peer(wire.ConnectPeer(1, "peer", shape, [wire.Endpoint(0, host_id(), {"tcp": {}})], False, 5.0))
        assert connected.wait(5)
        return sender

    yield make
    for sender in made:
        sender.close()


def target(num_tokens: int) -> wire.Target:
    return wire.Target(KEY, 1, 1, [0, 1, 2, 3], num_tokens, 0)


def send_step(num_tokens: int) -> SendStep:
    return SendStep(KEY, (0, 1, 2, 3), 0, num_tokens, is_last=True, serial=1)


def test_layers_go_by_and_by_though_the_announcement_comes_when_all_are_enqueued(make):
    FakeEvent.made, link = [], FakeLink()
    sender = make(link, transfer_mode="layer", layers_per_chunk=2)
    sender._tracker.close()
    sender._tracker = LayerTracker(8, sender._on_layers, FakeEvent, is_awaited=sender._tracker._is_awaited)
    sender.begin_step([send_step(16)])
    for layer in range(8):
        sender.layer_done(layer)
    sender.target(target(16))
    for event in FakeEvent.made[:4]:
        event.is_over.set()
    assert link.was_written.acquire(timeout=10)  # of layers 0 to 3, while 4 to 7 are computed
    for event in FakeEvent.made[4:]:
        event.is_over.set()
    assert link.was_written.acquire(timeout=10)


@pytest.mark.parametrize(("mode", "num_tokens"), [("bulk", 16), ("chunk", 16), ("auto", 4)])
def test_nobody_is_woken_for_layers_of_a_prompt_that_goes_whole(make, mode, num_tokens):
    sender = make(FakeLink(), transfer_mode=mode, bulk_below_tokens=8)
    sender.begin_step([send_step(num_tokens)])
    assert not sender._awaited


def test_the_device_s_time_of_a_copy_counts_once_however_often_it_is_looked_at(make):
    ticket = SimpleNamespace(done=lambda: True, wait=lambda timeout_s: True, wire_s=0.001, since=lambda event: 0.0)
    link = FakeLink(ticket)
    sender = make(link, transfer_mode="bulk", link=LinkOptions(latency_us=50_000))  # in place long before it may be
    sender.target(target(16))
    sender.begin_step([send_step(16)])
    for layer in range(8):
        sender.layer_done(layer)
    assert link.was_written.acquire(timeout=10)
    while not link.was_notified.is_set():
        with sender._lock:
            sender._wake_senders()
        link.was_notified.wait(0.001)
    assert sender.stats()["device_wire_s"] == 0.001


def test_links_of_a_peer_that_left_are_in_no_figure(make):
    link = FakeLink()
    sender = make(link)
    assert sender.stats()["link_share_of_expected"] == 0.5
    sender.close_peer(wire.ClosePeer(1))
    assert "link_share_of_expected" not in sender.stats()


def test_a_closed_sender_has_no_thread_left():
    """One that is inside a native library when the interpreter ends aborts the process (gloo: "terminate called")."""
    connecting, go_on, ended = threading.Event(), threading.Event(), []

    def connect(*_):
        connecting.set()
        go_on.wait(5)
        ended.append(True)
        raise TransferError("too late")

    layout = KVLayout(num_blocks=2, num_layers=1, num_kv_heads=2, block_size=4, head_dim=8, dtype="float32")
    sender = Sender(
        rank=0, tp_size=1, layout=layout, cache=torch.zeros(layout.total_bytes, dtype=torch.uint8),
        backends=[SimpleNamespace(name="tcp", connect=connect)], options=ConnectorOptions(), recorder=NullRecorder(),
        report=lambda message: None, on_fatal=lambda error: None,
    )  # fmt: skip
    shape = wire.Shape("float32", 1, 2, 8, 4, 2, layout.order, 1, "auto")
    sender.connect_peer(wire.ConnectPeer(1, "peer", shape, [wire.Endpoint(0, host_id(), {"tcp": {}})], False, 5.0))
    assert connecting.wait(5)
    threading.Timer(0.05, go_on.set).start()
    sender.close()
    assert ended


@pytest.mark.parametrize(
    ("ready_ns", "start_ns", "pause_us"), [(5_000_000, 1_000_000, 500), (1_000_000, 9_900_000, 20), (-90_000_000, 1_000_000, 900)]
)
def test_the_end_of_a_copy_is_seen_late_by_a_tenth_of_it_or_a_millisecond_at_most(ready_ns, start_ns, pause_us):
    """It begins when its layers are computed, or when it was posted, whichever is later."""
    flight = SimpleNamespace(piece=SimpleNamespace(ready_ns=ready_ns), start_ns=start_ns)
    assert 1e6 * _look_again_s(flight, 10_000_000) == pytest.approx(pause_us)
