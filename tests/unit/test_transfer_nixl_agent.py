"""The nixl backend against an agent that copies within this process, when and as far as the test says."""

from __future__ import annotations

import ctypes
import sys
import threading
import time

import numpy as np
import pytest
import torch

from ksana_lab.errors import TransferError
from ksana_lab.transfer.backends import nixl
from ksana_lab.transfer.registry import make_backend, make_backends, registers_source

NBYTES = 4096


class Handle:
    def __init__(self, agent, local, remote) -> None:
        self.agent, self.local, self.remote, self.is_released = agent, local, remote, False

    def release(self) -> None:
        assert not self.is_released
        self.is_released = True

    def copy(self) -> None:
        for (source, nbytes, _), (target, _, _) in zip(self.local.tolist(), self.remote.tolist(), strict=True):
            ctypes.memmove(target, source, nbytes)


class Agent:
    """What the backend uses of ``nixl_agent``. ``script``: the states that a write goes through; the copy is made at DONE."""

    def __init__(self, name: str = "a") -> None:
        self.name, self.calls, self.handles, self.script = name, [], [], ["DONE"]

    def register_memory(self, regions, kind):
        self.calls.append(("register", regions[0][1], kind))
        return regions

    def deregister_memory(self, regions):
        self.calls.append(("deregister",))

    def get_agent_metadata(self):
        return self.name.encode()

    def add_remote_agent(self, metadata):
        self.calls.append(("add", metadata))
        return metadata

    def make_connection(self, name): ...

    def remove_remote_agent(self, name):
        self.calls.append(("remove", name))

    def get_xfer_descs(self, rows, kind):
        assert kind == "DRAM" and rows.dtype == np.uint64
        return rows.copy()

    def initialize_xfer(self, operation, local, remote, peer, notice, backends):
        assert operation == "WRITE" and backends == ["UCX"]
        self.handles.append(Handle(self, local, remote))
        return self.handles[-1]

    def transfer(self, handle):
        handle.states = list(self.script)
        return self.check_xfer_state(handle)

    def check_xfer_state(self, handle):
        assert not handle.is_released
        state = handle.states.pop(0) if len(handle.states) > 1 else handle.states[0]
        if callable(state):
            state = state()
        if isinstance(state, Exception):
            raise state
        if state == "DONE":
            handle.copy()
        return state


class Events:
    def __init__(self) -> None:
        self.notices, self.acks, self.lost, self.gone = [], [], [], []
        self.changed = threading.Condition()

    def _note(self, where, what) -> None:
        with self.changed:
            where.append(what)
            self.changed.notify_all()

    def wait(self, condition) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, 10)

    def on_notice(self, session, window, notice, first_ns):
        self._note(self.notices, (session, window, notice))

    def on_writer_gone(self, session, reason):
        self._note(self.gone, session)

    def on_ack(self, token, error):
        self._note(self.acks, (token, error))

    def on_lost(self, reason):
        self._note(self.lost, reason)


class Ends:
    """A decode end, its endpoint, and a prefill end that connects to it."""

    def __init__(self) -> None:
        self.agents, self.events = (Agent("d"), Agent("p")), Events()
        self.d, self.p = (nixl.NixlBackend("127.0.0.1", agent) for agent in self.agents)
        self.cache = self.d.allocate(NBYTES, torch.device("cpu"))
        self.source = torch.arange(NBYTES, dtype=torch.int64).to(torch.uint8)
        self.endpoint = self.d.serve(self.cache, self.events)
        self.d.open_window(5)

    def link(self, session=1, **changes):
        return self.p.connect({**self.endpoint, **changes}, self.source, session, self.events, 5)

    def close(self) -> None:
        self.p.close()
        self.d.close()


@pytest.fixture
def ends(monkeypatch):
    monkeypatch.setattr(nixl, "_LINGER_S", 0.05)
    ends = Ends()
    yield ends
    ends.close()


def rows(*copies):
    return np.array(copies, np.int64)


def test_runs_of_a_batch_arrive_where_they_belong_and_the_notice_after_them(ends):
    link = ends.link()
    ends.agents[1].script = ["PROC", "PROC", "DONE"]
    ticket = link.write(rows((0, 100, 10), (64, 200, 20)), 5, shift=(32, 1000))
    assert ticket.wait(5)
    assert torch.equal(ends.cache[1100:1110], ends.source[32:42]) and torch.equal(ends.cache[1200:1220], ends.source[96:116])
    assert int((ends.cache != 0).sum()) <= 30
    link.notify(5, 9, b"there")
    ends.events.wait(lambda: ends.events.acks == [(9, None)])
    assert ends.events.notices == [(1, 5, b"there")]
    assert all(handle.is_released for handle in ends.agents[1].handles)


def test_a_notice_for_a_window_that_is_closed_is_refused_and_the_window_is_not_fenced(ends):
    link = ends.link()
    assert ends.d.close_window(5) is False
    link.notify(5, 9, b"late")
    ends.events.wait(lambda: bool(ends.events.acks))
    assert ends.events.acks[0][1] and not ends.events.notices


@pytest.mark.parametrize("copy", [(0, NBYTES - 1, 2), (0, -1, 2), (0, NBYTES + 10, 1)])
def test_a_write_outside_the_cache_is_refused(ends, copy):
    with pytest.raises(TransferError, match="outside the peer's cache of 4096 bytes"):
        ends.link().write(rows(copy), 5)
    assert not ends.agents[1].handles


@pytest.mark.parametrize(
    "change",
    [
        {"metadata": "zz"}, {"metadata": 7}, {"metadata": "00" * (nixl._MAX_METADATA_BYTES + 1)}, {"address": -4096}, {"address": 2**63},
        {"num_bytes": 0}, {"num_bytes": 2**70}, {"kind": "FILE"}, {"device_id": -1}, {"port": "http"},
    ],
)  # fmt: skip
def test_a_malformed_endpoint_is_refused_before_nixl_sees_it(ends, change):
    with pytest.raises(TransferError, match="nixl endpoint is malformed"):
        ends.link(**change)
    assert not any(call[0] == "add" for call in ends.agents[1].calls)


def test_an_endpoint_of_less_than_the_cache_is_refused(ends):
    with pytest.raises(TransferError, match="serves 4096 bytes and describes 100"):
        ends.link(num_bytes=100)


@pytest.mark.parametrize("script", [["PROC", "ERR"], ["PROC", RuntimeError("NIXL_ERR_REMOTE_DISCONNECT")]])
def test_a_write_that_fails_says_so_and_the_link_can_be_closed(ends, script):
    link = ends.link()
    ends.agents[1].script = script
    with pytest.raises(TransferError, match="NIXL"):
        link.write(rows((0, 0, 8)), 5).wait(5)
    link.close()
    assert ends.agents[1].handles[0].is_released and ("remove", b"d") in ends.agents[1].calls
    with pytest.raises(TransferError, match="closed"):
        link.write(rows((0, 0, 8)), 5)


def test_a_batch_that_cannot_begin_waits_for_those_before_it(ends):
    link, over = ends.link(), threading.Event()
    ends.agents[1].script = [lambda: "DONE" if over.is_set() else "PROC"]
    first = link.write(rows((0, 0, 8)), 5)
    ends.agents[1].script = [RuntimeError("no")]
    threading.Timer(0.05, over.set).start()
    with pytest.raises(TransferError, match="cannot start a write: no"):
        link.write(rows((8, 8, 8)), 5)
    assert first.done()


def test_a_write_that_hangs_is_given_up_but_its_connection_is_kept_until_it_is_over(ends, monkeypatch):
    monkeypatch.setattr(nixl, "_STALL_S", 0.05)
    monkeypatch.setattr(nixl, "_CLOSE_S", 0.05)
    link, over = ends.link(), threading.Event()
    ends.agents[1].script = [lambda: "DONE" if over.is_set() else "PROC"]
    with pytest.raises(TransferError, match=r"not finished a write within 0.05 s"):
        link.write(rows((0, 0, 8)), 5).wait(5)
    link.close()
    ends.d.forget(1)
    time.sleep(0.1)  # longer than a writer that has gone counts
    assert ends.d.num_writers(1) == 1 and not ends.events.gone
    over.set()
    ends.events.wait(lambda: len(ends.events.gone) == 2)
    assert ends.d.num_writers(1) == 0


def test_a_writer_that_has_gone_counts_a_little_longer(ends, monkeypatch):
    link, seen = ends.link(), []
    ends.events.on_writer_gone = lambda session, reason: ends.events._note(seen, ends.d.num_writers(session))
    link.close()
    ends.events.wait(lambda: len(seen) == 2)
    assert seen == [1, 0]


def test_links_to_one_agent_share_what_is_known_of_it(ends):
    links = [ends.link(session=n) for n in (1, 2)]
    links[0].close()
    assert ("remove", b"d") not in ends.agents[1].calls
    links[1].close()
    links[1].close()
    assert [call[0] for call in ends.agents[1].calls] == ["register", "add", "remove"]
    ends.link(session=3)
    assert ends.agents[1].calls[-1] == ("add", b"d")


@pytest.mark.parametrize(("change", "expected", "where"), [({}, 1e9, ""), ({"host_id": "elsewhere"}, None, " of another host")])
def test_a_link_is_measured_behind_the_cache(ends, change, expected, where):
    report = ends.link(**change).examine(5)
    assert report.bandwidth > 0 and report.round_trip_s > 0 and report.expected == expected
    assert report.path.endswith(f"DRAM to DRAM{where}") and not ends.cache.any()


def test_closing_ends_what_is_under_way_and_may_be_said_twice(ends):
    link = ends.link()
    ends.agents[1].script = ["PROC"]
    ticket = link.write(rows((0, 0, 8)), 5)
    for end in (ends.p, ends.d):
        end.close()
        end.close()
    with pytest.raises(TransferError):
        ticket.wait(5)
    assert all(agent.calls.count(("deregister",)) == 1 for agent in ends.agents) and ends.agents[1].handles[0].is_released


def test_memory_of_somebody_else_is_not_served(ends):
    with pytest.raises(TransferError, match="only the memory it allocated"):
        nixl.NixlBackend("127.0.0.1", Agent()).serve(torch.zeros(8, dtype=torch.uint8), ends.events)


def test_without_the_package_the_error_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "nixl", None)
    with pytest.raises(TransferError, match=r"transfer backend nixl is not installed .*: pip install 'nixl>=1.5'"):
        make_backend("nixl", "127.0.0.1")


def test_it_is_taken_only_when_asked_for():
    for on_gpu in (False, True):
        assert "nixl" not in [backend.name for backend in make_backends("auto", "127.0.0.1", on_gpu=on_gpu)]
    assert registers_source("nixl") and not registers_source("cuda_ipc")
