"""The client and its clock against a stub whose times are known."""

import asyncio
import logging
import os
import socket
import threading
import time

import numpy as np
import pytest

from ksana_lab import WorkloadSpec
from ksana_lab.workload import loadgen
from ksana_lab.workload.client import Client
from ksana_lab.workload.spec import WorkloadRequest
from ksana_lab.workload.stub import StubServer


def spec(**fields) -> WorkloadSpec:
    return WorkloadSpec.from_dict(dict(rate=200, num_requests=20, prompt_tokens=8, output_tokens=5) | fields)


@pytest.mark.parametrize("endpoint", ["generate", "completions", "chat"])
def test_measured_times_are_the_stubs(endpoint):
    stub = StubServer(ttft_s=0.03, gap_s=0.01)
    with stub.serving() as url:
        records = loadgen.play(url, spec(endpoint=endpoint))
    late = [at - wrote for r in records for at, wrote in zip(r.token_times_s, stub.timings[r.request_id].written_s, strict=True)]
    assert min(late) >= 0.0
    assert np.median(late) < 0.002  # loose: this machine may be busy; the tight bound is the bench's


@pytest.mark.parametrize("endpoint", ["generate", "completions", "chat"])
def test_every_endpoint_counts_tokens_and_completes(endpoint):
    with StubServer(ttft_s=0.005, gap_s=0.001).serving() as url:
        records = loadgen.play(url, spec(endpoint=endpoint))
    assert {(r.error, r.finish_reason, r.num_output_tokens, r.num_prompt_tokens) for r in records} == {(None, "length", 5, 8)}
    assert all(sum(r.token_counts) == 5 for r in records)


def test_generate_returns_ids_and_text():
    with StubServer(ttft_s=0.001, gap_s=0.001).serving() as url:
        record = loadgen.play(url, spec(num_requests=1))[0]
    assert (record.output_token_ids, record.text) == ([0, 1, 2, 3, 4], "0 1 2 3 4")


def test_a_prompt_crosses_the_wire_token_for_token():
    stub = StubServer(ttft_s=0.001, gap_s=0.001)
    with stub.serving() as url:
        record = loadgen.play(url, spec(num_requests=1, seed=3))[0]
    assert stub.bodies[record.request_id]["input_tokens"] == spec(seed=3).build(stub.vocab_size).requests[0].prompt_token_ids.tolist()


def test_an_open_loop_sends_on_time_however_slow_the_answers():
    with StubServer(ttft_s=0.3, gap_s=0.001).serving() as url:
        report = loadgen.measure(url, spec(rate=100, burstiness=float("inf")))
    sent = np.diff([r.sent_s for r in report.records])
    assert report.duration_s < 3  # 20 answers of 0.3 s, one after another, would be 6
    assert np.median(sent) == pytest.approx(0.01, abs=0.004)


def test_a_closed_loop_never_has_more_than_its_users_in_flight():
    with StubServer(ttft_s=0.01, gap_s=0.001).serving() as url:
        records = loadgen.play(url, spec(rate=None, users=3))
    edges = sorted([(r.sent_s, 1) for r in records] + [(r.finished_s, -1) for r in records])
    assert max(np.cumsum([step for _, step in edges])) == 3
    assert len(records) == 20


def test_warmup_is_sent_first_and_in_no_result():
    stub = StubServer(ttft_s=0.005, gap_s=0.001)
    with stub.serving() as url:
        report = loadgen.measure(url, spec(num_warmup=5))
    warm = [t for name, t in stub.timings.items() if "warmup" in name]
    assert (len(warm), len(report.records)) == (5, 20)
    assert max(t.written_s[-1] for t in warm) < report.started_s


def test_cancelled_requests_hang_up_and_are_marked():
    stub = StubServer(ttft_s=0.005, gap_s=0.25)  # so that a busy machine's client still hangs up before the stub is done
    with stub.serving() as url:
        report = loadgen.measure(url, spec(cancel_share=1.0))
        deadline, pause = time.monotonic() + 10, threading.Event()
        while stub.num_disconnects < 20 and time.monotonic() < deadline:  # the last hang-up may still be on its way to the stub
            pause.wait(0.005)
    assert {r.finish_reason for r in report.records} == {"cancelled"} and (report.num_cancelled, report.num_failed) == (20, 0)
    assert stub.num_disconnects == 20
    assert all(r.num_output_tokens < 5 for r in report.records)


@pytest.mark.parametrize("endpoint", ["generate", "completions"])
def test_a_stream_that_just_ends_is_a_failure(endpoint):
    with StubServer(ttft_s=0.001, gap_s=0.001, fail_after_tokens=2).serving() as url:
        record = loadgen.play(url, spec(num_requests=1, endpoint=endpoint))[0]
    assert record.error is not None
    assert len(record.token_times_s) == 2


def test_an_error_answer_is_told_with_status_and_message():
    with StubServer(status=503).serving() as url:
        record = loadgen.play(url, spec(num_requests=1))[0]
    assert record.error == "503: stub: asked to fail"


def test_no_server_and_a_silent_one_end_in_bounded_time():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert "timeout" in loadgen.play(url, spec(num_requests=1, vocab_size=10), timeout_s=0.2)[0].error
    assert "connection" in loadgen.play(url, spec(num_requests=1, vocab_size=10))[0].error


async def test_a_connection_that_takes_too_long_is_not_an_answer_without_an_end(monkeypatch):
    async def never(*args, **kwargs):
        await asyncio.Event().wait()

    monkeypatch.setattr(asyncio.get_running_loop(), "create_connection", never)
    async with Client("http://127.0.0.1:9", connect_timeout_s=0.01, timeout_s=600) as client:
        record = await client.send(WorkloadRequest(0, None, np.array([1]), 1, 0), request_id="r")
    assert record.error == "connection: ConnectionLost: none was made within 0.01 s"


def test_proxies_of_the_environment_are_not_used(monkeypatch):
    monkeypatch.setitem(os.environ, "http_proxy", "http://127.0.0.1:9")
    with StubServer(ttft_s=0.001, gap_s=0.001).serving() as url:
        assert loadgen.play(url, spec(num_requests=1))[0].is_ok


async def test_play_works_inside_a_running_loop():
    with StubServer(ttft_s=0.001, gap_s=0.001).serving() as url:
        assert len(loadgen.play(url, spec())) == 20


def test_the_nodes_vocabulary_bounds_the_prompts():
    stub = StubServer(ttft_s=0.001, gap_s=0.001, vocab_size=3)
    with stub.serving() as url:
        loadgen.play(url, spec(num_requests=2))
    assert {i for body in stub.bodies.values() for i in body["input_tokens"]} == {0, 1, 2}


async def test_a_client_that_lags_is_not_trusted(monkeypatch, caplog):
    send = Client.send

    async def slow_send(self, *args, **kwargs):
        loop = asyncio.get_running_loop()
        until = loop.time() + 0.03
        while loop.time() < until:  # a client that computes instead of reading
            pass
        return await send(self, *args, **kwargs)

    monkeypatch.setattr(Client, "send", slow_send)
    with StubServer(ttft_s=0.001, gap_s=0.001).serving() as url, caplog.at_level(logging.WARNING):
        report = await loadgen.run(url, spec())
    assert not report.is_trustworthy
    assert "NOT TRUSTWORTHY" in caplog.text
    assert all(r.labels["client_lagged"] for r in report.records)


def test_a_loop_that_stands_still_is_late_for_all_that_time():
    lags = [0.0] * 120 + [0.100]  # once in 1.3 s, for 100 ms
    assert np.percentile(lags, 99) < loadgen.MAX_LAG_S < np.percentile(loadgen._stamp_lags(lags), 99)
    assert loadgen._stamp_lags([0.004, 0.025]) == pytest.approx([0.004, 0.025, 0.015, 0.005])


def test_the_same_play_twice_repeats_no_request_id():
    with StubServer(ttft_s=0.001, gap_s=0.001).serving() as url:
        ids = [r.request_id for _ in range(2) for r in loadgen.play(url, spec(num_requests=3))]
    assert len(set(ids)) == 6


def test_a_huge_answer_is_parsed_in_passing():
    request = WorkloadRequest(0, None, np.zeros(20_000, dtype=np.int32), max_tokens=20, seed=0)

    async def send():
        async with Client(url) as client:
            return await client.send(request, request_id="big")

    with StubServer(ttft_s=0.001, gap_s=0.001).serving() as url:
        record = asyncio.run(send())
    assert (record.error, record.num_output_tokens) == (None, 20)
