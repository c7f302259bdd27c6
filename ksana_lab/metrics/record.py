"""What is known of one request when it is over. Written by the load generator, completed from the nodes' event logs; metrics, plots and
sweeps read nothing else. Times are seconds on one monotonic clock; None = not known to the producer."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field


@dataclass
class RequestRecord:
    request_id: str
    num_prompt_tokens: int
    num_output_tokens: int = 0
    scheduled_s: float | None = None  # when the load generator meant to send it
    sent_s: float | None = None  # just before the POST; "arrival" of every client-side metric
    token_times_s: list[float] = field(default_factory=list)  # arrival of each streamed message that carried >= 1 token
    token_counts: list[int] = field(default_factory=list)  # tokens in each of those messages
    finished_s: float | None = None
    finish_reason: str | None = None
    error: str | None = None  # None = completed
    output_token_ids: list[int] | None = None
    text: str | None = None
    # When what happened on the serving side: arrival prefill_start prefill_end transfer_start transfer_end first_token finished. From an
    # event log (tracing/phases.py) they are on the client's clock, from elsewhere only their differences mean something.
    phases: dict[str, float] = field(default_factory=dict)
    # What was sent of its KV from P to D, over all ranks, from an event log: kv_bytes on the wire, num_pieces, num_copies (contiguous
    # runs), and by the sender's clock, links added up: wire_s = hidden_s + exposed_wire_s, before and after the prompt's last layer was
    # computed; after_last_layer_s: from then to the last arrival.
    transfer: dict[str, float] = field(default_factory=dict)
    labels: dict[str, str | float | int] = field(default_factory=dict)  # sweep point, node pair, …

    @property
    def is_ok(self) -> bool:
        return self.error is None

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict) -> RequestRecord:
        """Raises TypeError for a field of another version."""
        return cls(**data)
