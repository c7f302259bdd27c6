"""``RequestRecord.phases`` and ``transfer`` out of event logs: when what happened to a request on the serving side, on the client's clock,
and what was sent of its KV.

A part of what timeline.load joins, without layers and counters, so that it can be done after every run of a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ksana_lab.metrics.record import RequestRecord
from ksana_lab.tracing.events import read_logs
from ksana_lab.tracing.timeline import request_frame

# A phase of a record -> the column of ``Timeline.requests`` that says when it was. A request arrives when the API process has handed it to
# the engine, which may look only after the step that it is in: that is queueing, and no way.
_COLUMNS = {
    "arrival": "handed_s",
    "prefill_start": "prefill_start_s",
    "prefill_end": "prefill_end_s",
    "transfer_start": "transfer_start_s",
    "transfer_end": "transfer_end_s",
    "first_token": "prefill_end_s",  # the end of that step is when it was sampled
    "finished": "decode_end_s",
}
_TRANSFER = ("kv_bytes", "num_pieces", "num_copies", "wire_s", "hidden_s", "exposed_wire_s", "after_last_layer_s")


def add_phases(records: Sequence[RequestRecord], folder: str | Path | Sequence[str | Path]) -> int:
    """Fill in the phases of those that the logs in ``folder`` tell of, and their transfer; their number. Raises ConfigError when there is
    no log."""
    requests, origin_s = request_frame(read_logs(folder), records)
    if not len(requests):
        return 0
    found = requests.set_index("request_id")
    count = 0
    for record in records:
        if record.request_id not in found.index:
            continue
        row = found.loc[record.request_id]
        times = {phase: row.get(column) for phase, column in _COLUMNS.items()}
        record.phases = {phase: float(at) + origin_s for phase, at in times.items() if at is not None and at == at}
        has_sent = row.get("num_pieces", 0) > 0
        record.transfer = {name: float(row[name]) for name in _TRANSFER} if has_sent else {}
        count += "prefill_end" in record.phases
    return count
