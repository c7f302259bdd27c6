"""The recorder: off by default, bounded, counted, never waiting."""

import importlib.metadata
import os
import sys
import threading
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest

from ksana_lab.tracing import recorder as recorder_module
from ksana_lab.tracing.events import read_logs
from ksana_lab.tracing.nvtx import NvtxRecorder, annotate, domain_for
from ksana_lab.tracing.recorder import NullRecorder, Recorder, open_recorder


def test_off_by_default():
    recorder = open_recorder(None, "prefill.tp0")
    assert type(recorder) is NullRecorder and not recorder.enabled and not recorder.annotates


def test_what_is_written_is_what_is_read(tmp_path):
    recorder = Recorder(tmp_path, "decode.tp0")
    threads = [threading.Thread(target=lambda: [recorder.instant("x", "step", i=i) for i in range(500)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    recorder.close()
    recorder.close()
    (log,) = read_logs(tmp_path)
    assert log.written == len(log.events) == 2000 and log.dropped == 0 and log.is_complete


def test_a_full_queue_drops_and_counts(tmp_path):
    recorder = Recorder(tmp_path, "x", capacity=0)
    recorder.instant("lost", "step")
    recorder.close()
    (log,) = read_logs(tmp_path)
    assert (log.written, log.dropped, log.events) == (0, 1, [])


def test_a_full_file_drops_and_counts(tmp_path):
    recorder = Recorder(tmp_path, "x", max_bytes=2000)
    for i in range(200):
        recorder.instant("event", "step", number=i)
    recorder.close()
    (log,) = read_logs(tmp_path)
    assert log.written + log.dropped == 200 and log.dropped > 0 and recorder.path.stat().st_size < 2500


def test_an_argument_that_is_no_json_costs_one_event_only(tmp_path):
    recorder = Recorder(tmp_path, "x")
    recorder.instant("bad", "step", what=object())
    recorder.instant("good", "step")
    recorder.close()
    (log,) = read_logs(tmp_path)
    assert [e["name"] for e in log.events] == ["good"] and log.dropped == 1


def test_numbers_of_numpy_are_numbers_in_the_log(tmp_path):
    recorder = Recorder(tmp_path, "x")
    recorder.instant("copied", "step", bytes=np.int64(7), ends=np.arange(3), share=np.float32(0.5), whole=np.bool_(True))
    recorder.close()
    (log,) = read_logs(tmp_path)
    assert log.events[0]["args"] == {"bytes": 7, "ends": [0, 1, 2], "share": 0.5, "whole": True} and log.dropped == 0


def test_what_a_full_disk_takes_half_of_is_dropped_and_leaves_no_torn_line(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(recorder_module, "_WRITE_EVERY_S", 60.0)
    recorder = Recorder(tmp_path, "x")
    recorder.instant("lost", "step", i=1)
    file, recorder._file = recorder._file, FullDisk(recorder._file)
    recorder._drain()
    recorder._file = file
    recorder.instant("kept", "step", i=2)
    recorder.close()
    (log,) = read_logs(tmp_path)
    assert [e["name"] for e in log.events] == ["kept"] and log.num_malformed == 0
    assert (log.written, log.dropped) == (1, 1) and "No space left" in caplog.text


class FullDisk:
    """A file on a disk that has room for ten more bytes."""

    def __init__(self, file):
        self.write, self.tell, self.truncate = lambda data: file.write(data[:10]), file.tell, file.truncate


def test_a_thread_that_records_is_named_in_what_it_records(tmp_path):
    recorder = Recorder(tmp_path, "x")
    thread = threading.Thread(target=lambda: recorder.span("a", "step", 5, 8, step=1))
    thread.start()
    thread.join()
    recorder.counter("b", "step", free=3)
    recorder.close()
    a, b = read_logs(tmp_path)[0].events
    assert (a["ts"], a["dur"], a["ph"], a["pid"], a["tid"]) == (5, 3, "X", os.getpid(), thread.native_id)
    assert (b["ph"], b["tid"], b["args"]) == ("C", threading.get_native_id(), {"free": 3}) and "dur" not in b


class FakeNvtx:
    """Stands in for the module: notes what a tool would see."""

    def __init__(self):
        self.marks, self.open, self.closed, self.stack = [], {}, [], []

    def mark(self, **event):
        self.marks.append(event["message"])

    def start_range(self, **event):
        self.open[len(self.open)] = event
        return len(self.open) - 1

    def end_range(self, handle):
        self.closed.append(self.open[handle]["message"].partition(" request_id=")[0])

    def push_range(self, **event):
        self.stack.append(event["message"])

    def pop_range(self, domain):
        assert domain == "ksana_lab"
        self.stack.pop()


def test_phases_of_a_request_become_ranges():
    nvtx = FakeNvtx()
    recorder = NvtxRecorder(NullRecorder(), "prefill.tp0", nvtx)
    for name in ("QUEUED", "PREFILL_START", "PREFILL_END", "FINISHED"):
        recorder.instant(name, "request", request_id="a", seq_id=3)
    assert nvtx.closed == ["engine queue", "prefill", "decode"]
    assert {e["domain"] for e in nvtx.open.values()} == {"ksana_lab"} and nvtx.open[1]["payload"] == 3
    assert nvtx.open[1]["message"] == "prefill request_id=a seq_id=3"


def test_a_report_can_be_tied_to_the_log(tmp_path):
    nvtx = FakeNvtx()
    NvtxRecorder(NullRecorder(), "router", nvtx).close()
    assert nvtx.marks == ["clock role=router"]


def test_every_step_and_phase_has_a_clock_mark_beside_it():
    nvtx = FakeNvtx()
    recorder = NvtxRecorder(NullRecorder(), "x", nvtx)
    nvtx.marks.clear()
    recorder.push("step", "step", step=1)
    recorder.pop()
    recorder.instant("QUEUED", "request", request_id="a", seq_id=3)
    assert nvtx.marks == ["clock role=x", "clock role=x", "QUEUED request_id=a seq_id=3"]


class DummyDomain:
    """What nvtx gives out when a tool does not say that it wants the domain."""


class Lib:
    """Stands in for ``nvtx._lib.lib``: what went through to the tool is in ``seen``."""

    seen: ClassVar[list] = []

    class DomainHandle:
        def __init__(self, name):
            self.name = name

    class Domain:
        def __new__(cls, name):
            return DummyDomain()

        def __init__(self, name):
            self.name = self.handle.name

        def get_event_attributes(self, *attributes):
            return attributes

        def mark(self, attributes):
            Lib.seen.append((self.name, *attributes))


def nvtx_that_asks(monkeypatch, lib):
    Lib.seen.clear()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.2.99")
    monkeypatch.setitem(sys.modules, "nvtx._lib.lib", lib)
    return SimpleNamespace(get_domain=lambda name: DummyDomain())


def test_a_tool_that_cannot_answer_gets_the_events_all_the_same(monkeypatch):
    domain = domain_for(nvtx_that_asks(monkeypatch, Lib))
    domain.mark(message="clock role=x", color="gray", domain="ksana_lab", category="clock", payload=7)
    assert Lib.seen == [("ksana_lab", "clock role=x", "gray", "clock", 7)]


def test_an_nvtx_that_cannot_be_made_to_is_said_to_leave_nothing(monkeypatch, caplog):
    module = nvtx_that_asks(monkeypatch, SimpleNamespace())
    with caplog.at_level("WARNING", "ksana_lab"):
        assert domain_for(module) is module
    assert "nvtx==0.2.11" in caplog.text and "0.2.99" in caplog.text


def test_an_nvtx_that_does_not_ask_is_used_as_it_is():
    module = FakeNvtx()
    assert domain_for(module) is module


def test_spans_reach_the_log_too(tmp_path):
    nvtx = FakeNvtx()
    recorder = NvtxRecorder(Recorder(tmp_path, "x"), "x", nvtx)
    recorder.span("send", "transfer", 0, 5000, request="1.0", layer=2, bytes=64, peer="d.0")
    recorder.close()
    assert nvtx.marks[-1] == "send request=1.0 layer=2 bytes=64 peer=d.0 us=5"
    assert [e["name"] for e in read_logs(tmp_path)[0].events] == ["send"]


@pytest.mark.parametrize("env", [{}, {"NVTX_INJECTION64_PATH": ""}])
def test_nothing_is_annotated_while_no_tool_listens(env):
    recorder = NullRecorder()
    assert annotate(recorder, "x", env) is recorder
