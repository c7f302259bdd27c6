"""Which answers may become a figure: all of a run, or none."""

from __future__ import annotations

from collections.abc import Sequence

from ksana_lab.errors import KsanaLabError
from ksana_lab.metrics.record import RequestRecord


def all_answered(records: Sequence[RequestRecord]) -> Sequence[RequestRecord]:
    """The records, each with its tokens. Raises KsanaLabError: a run with failed requests, whose answers may be parts of answers, is no
    figure."""
    failed = [record.error or "no token came" for record in records if not record.is_ok or not record.token_times_s]
    if failed or not records:
        raise KsanaLabError(f"{len(failed)} of {len(records)} requests failed: {failed[0] if failed else 'none was sent'}")
    return records


def note_of(records: Sequence[RequestRecord]) -> str:
    """What is to be said beside a figure made of these records; empty where the client kept up."""
    lagged = sum("client_lagged" in record.labels for record in records)
    return f"client lagged in {lagged} of {len(records)} requests: not trustworthy" if lagged else ""
