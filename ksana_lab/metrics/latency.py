"""What one request felt like: one small pure function per metric. Reads a RequestRecord, knows nothing of who wrote it.

The definitions are those of ``vllm bench serve``; docs/metrics.md gives each as a formula and says what AIPerf calls it.
A function returns None (or an empty list) where the record does not hold what it needs: never 0, which would be a measurement.
All results are seconds."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from ksana_lab.metrics.record import RequestRecord


def ttft_s(record: RequestRecord) -> float | None:
    """Time to first token: first message that carried a token, minus just before the POST."""
    if record.sent_s is None or not record.token_times_s:
        return None
    return record.token_times_s[0] - record.sent_s


def e2e_s(record: RequestRecord) -> float | None:
    """End to end: last message that carried a token, minus just before the POST. What follows (usage, ``[DONE]``) does not count."""
    if record.sent_s is None or not record.token_times_s:
        return None
    return record.token_times_s[-1] - record.sent_s


def tpot_s(record: RequestRecord) -> float | None:
    """Time per output token after the first: (e2e - ttft) / (tokens - 1). Undefined below two tokens. AIPerf calls it ITL."""
    if len(record.token_times_s) < 1 or record.num_output_tokens < 2:
        return None
    return (record.token_times_s[-1] - record.token_times_s[0]) / (record.num_output_tokens - 1)


def itl_s(record: RequestRecord) -> list[float]:
    """Inter-token latencies: the gaps between successive messages, whatever number of tokens each carried. Pooled over requests."""
    return [later - earlier for earlier, later in pairwise(record.token_times_s)]


def itl_per_token_s(record: RequestRecord) -> list[float]:
    """Each gap divided by the tokens of the message that ended it: GenAI-Perf's ITL. Equal to ``itl_s`` when every message holds one."""
    return [gap / max(1, count) for gap, count in zip(itl_s(record), record.token_counts[1:], strict=False)]


def first_gap_s(record: RequestRecord) -> float | None:
    """First token to second: in a disaggregated pair the hand-over from the prefill node to the decode node shows here."""
    gaps = itl_s(record)
    return gaps[0] if gaps else None


def send_lag_s(record: RequestRecord) -> float | None:
    """How late the client was: actual minus scheduled sending. Large values mean that the client, not the server, was the bottleneck."""
    if record.sent_s is None or record.scheduled_s is None:
        return None
    return record.sent_s - record.scheduled_s


def router_path_s(record: RequestRecord) -> float | None:
    """Just before the POST to the hand-over to the prefilling engine: client, router, HTTP, tokenising. With ``queueing_s``, ``prefill_s``
    and ``first_token_path_s`` it adds up to ``ttft_s``. Needs phases on the client's clock, as the event log of one run has them."""
    if record.sent_s is None or "arrival" not in record.phases:
        return None
    return record.phases["arrival"] - record.sent_s


def first_token_path_s(record: RequestRecord) -> float | None:
    """End of prefill to the client's first message with a token. Covers the transfer, too, where the decode node answers."""
    if not record.token_times_s or "prefill_end" not in record.phases:
        return None
    return record.token_times_s[0] - record.phases["prefill_end"]


def queueing_s(record: RequestRecord) -> float | None:
    """Hand-over to the prefilling engine to the first step that ran any of it; the step that is under way meanwhile counts here."""
    return _between(record, "arrival", "prefill_start")


def prefill_s(record: RequestRecord) -> float | None:
    """First step that ran any of the prompt to the end of the step that ran its last token."""
    return _between(record, "prefill_start", "prefill_end")


def exposed_transfer_s(record: RequestRecord) -> float | None:
    """The part of the KV transfer that prefill did not hide: end of prefill to the arrival of the last piece; 0 if it came earlier."""
    gap = _between(record, "prefill_end", "transfer_end")
    return None if gap is None else max(0.0, gap)


def transfer_s(record: RequestRecord) -> float | None:
    """First piece sent to last piece arrived, hidden or not."""
    return _between(record, "transfer_start", "transfer_end")


def hidden_fraction(record: RequestRecord) -> float | None:
    """Of the time that pieces of its KV were on the wire, the share before its last layer was computed. A share, not seconds."""
    wire_s = record.transfer.get("wire_s")
    return record.transfer["hidden_s"] / wire_s if wire_s else None


def decode_s(record: RequestRecord) -> float | None:
    """First token to last, as the serving side saw it."""
    return _between(record, "first_token", "finished")


def _between(record: RequestRecord, start: str, end: str) -> float | None:
    if start not in record.phases or end not in record.phases:
        return None
    return record.phases[end] - record.phases[start]


TTFT_PARTS = ("router_path_s", "queueing_s", "prefill_s", "first_token_path_s")  # they add up to ``ttft_s``
# Name in tables and in an SLO -> function of one record.
PER_REQUEST: dict[str, Callable[[RequestRecord], float | None]] = {
    "ttft_s": ttft_s,
    "tpot_s": tpot_s,
    "e2e_s": e2e_s,
    "first_gap_s": first_gap_s,
    "router_path_s": router_path_s,
    "queueing_s": queueing_s,
    "prefill_s": prefill_s,
    "first_token_path_s": first_token_path_s,
    "transfer_s": transfer_s,
    "exposed_transfer_s": exposed_transfer_s,
    "decode_s": decode_s,
    "send_lag_s": send_lag_s,
}
