"""A prefill rank's sender: its end, and how it looks at copies under way."""

import threading
from types import SimpleNamespace

import pytest
import torch

from ksana_lab.config.engine import ConnectorOptions
from ksana_lab.core.kv_layout import KVLayout
from ksana_lab.errors import TransferError
from ksana_lab.protocol import transfer as wire
from ksana_lab.tracing.recorder import NullRecorder
from ksana_lab.transfer.registry import host_id
from ksana_lab.transfer.sender import Sender, _look_again_s


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


@pytest.mark.parametrize(("ready_ns", "start_ns", "pause_us"), [(5_000_000, 1_000_000, 500), (1_000_000, 9_900_000, 20)])
def test_the_end_of_a_copy_is_seen_late_by_a_tenth_of_it_at_most(ready_ns, start_ns, pause_us):
    """It begins when its layers are computed, or when it was posted, whichever is later."""
    flight = SimpleNamespace(piece=SimpleNamespace(ready_ns=ready_ns), start_ns=start_ns)
    assert 1e6 * _look_again_s(flight, 10_000_000) == pytest.approx(pause_us)
