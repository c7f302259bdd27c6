"""Why a run took as long as it did, in sentences with numbers, and what to change. "Why is disaggregation slower than one node here?"

Each rule looks at one cause and is silent where it does not apply. A rule is a function of a Timeline; ``explain`` sorts what they find by
the seconds that a request loses. The rules and their thresholds: docs/tracing.md."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pandas as pd

from ksana_lab.tracing.timeline import Timeline

_NOTABLE = 0.10  # share of TTFT or of the output time from which a cause is worth a sentence
_FRAGMENT_BYTES = 64 << 10  # copies smaller than this do not reach a wire's speed
_BUSY = 0.85  # of the time: a side that is this busy is the bottleneck
_OVERHEAD = (
    "client → router",
    "routing",
    "router → node",
    "tokenising",
    "detokenising",
    "node → router",
    "router → client",
)


@dataclass(frozen=True)
class Finding:
    """``lost_s``: seconds that it costs a request on average; what the numbers of the sentence are is in ``numbers``."""

    rule: str
    text: str
    advice: str = ""
    lost_s: float = 0.0
    numbers: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.text} {self.advice}".rstrip()


@dataclass(frozen=True)
class Explanation:
    """What was found, most expensive first. Prints as a list."""

    headline: str
    findings: list[Finding]

    def of(self, rule: str) -> Finding | None:
        return next((finding for finding in self.findings if finding.rule == rule), None)

    def __str__(self) -> str:
        return "\n".join([self.headline, *(f"- {finding}" for finding in self.findings)])

    def _repr_markdown_(self) -> str:
        return f"{self.headline}\n\n" + "\n".join(f"- **{f.rule}**: {f}" for f in self.findings)


def explain(run: Timeline) -> Explanation:
    """Reads ``run``; never fails for want of data, it says what is missing instead."""
    requests = run.measured if len(run.requests) else run.requests
    if not len(requests):
        return Explanation("No request completed in this recording.", [f for rule in (failures, lost_events) if (f := rule(run))])
    ttft, e2e = requests["ttft_s"].mean(), requests["e2e_s"].mean()
    route = " and ".join(sorted(set(requests["route"])))
    headline = f"{len(requests)} requests over {route}: time to first token {_ms(ttft)} on average, whole answer {_ms(e2e)}."
    found = [finding for rule in RULES if (finding := rule(run)) is not None]
    findings = sorted(found, key=lambda f: -f.lost_s)
    if not any(f.lost_s for f in findings):
        findings.insert(0, Finding("nothing", "Computing dominates: no waiting, no transfer and no overhead is worth a sentence."))
    return Explanation(headline, findings)


# ---- rules -----------------------------------------------------------------------------------------------------------


def queueing(run: Timeline) -> Finding | None:
    """Requests wait for the engine that prefills."""
    mean, share = _phase(run, "queueing")
    if share < _NOTABLE:
        return None
    side = "mixed" if _is_mixed(run) else "prefill"
    busy = utilisation(run).get(side, 0.0)
    unseen = float((run.measured["queued_s"] - run.measured["handed_s"]).mean())
    is_step = unseen > mean / 2  # under way when the request came
    text = f"{share:.0%} of TTFT is queueing for {_words(side)} ({_ms(mean)} of {_ms(_ttft(run))}"
    text += f", {_ms(unseen)} of it until the engine looked: a step was under way)" if is_step else ")"
    text += f"; it is busy {busy:.0%} of the time."
    if busy >= 0.6:
        what = "prefill nodes" if side == "prefill" else "nodes"
        steps = "make steps shorter: chunk prompts smaller" if is_step else "raise max_step_tokens so that a step takes several prompts"
        advice = f"Add {what}, send less, or {steps}."
    else:
        advice = "It is not busy on average: arrivals come in bursts, or each prompt waits for a long one before it; chunk prompts smaller."
    return Finding("queueing", text, advice, mean, {"share": share, "busy": busy, "unseen_s": unseen})


def interleaving(run: Timeline) -> Finding | None:
    """Between a prompt's chunks the engine runs those of others: nobody is idle, but everybody's first token is later."""
    prefills = run.chunks[(run.chunks["kind"] == "prefill") & (run.chunks["role"] != "decode")]
    own = (prefills["end_s"] - prefills["start_s"]).groupby(prefills["request_id"]).sum()
    lost = (run.measured.set_index("request_id")["prefill_s"] - own).dropna().clip(lower=0.0)
    if not len(lost) or lost.mean() < _NOTABLE * _ttft(run):
        return None
    count = prefills.groupby("request_id").size().reindex(lost.index).mean()
    text = f"A prompt runs in {count:.1f} chunks, and {_ms(lost.mean())} pass between them while the engine runs other prompts."
    advice = "Larger chunks (split_fuse_token_num) let the prompt that came first finish first; more prefill nodes shorten all."
    return Finding("interleaving", text, advice, float(lost.mean()), {"chunks": float(count)})


def decode_admission(run: Timeline) -> Finding | None:
    """The decode node takes its time to give a request blocks."""
    waits = (run.measured["announced_s"] - run.measured["decode_queued_s"]).dropna()
    if not len(waits) or waits.mean() < _NOTABLE * _ttft(run):
        return None
    free = _least_free(run, "decode")
    needed = run.counters.loc[run.counters["key"] == "free", "value"].max() / 20 if free is not None else 0.0
    text = f"Requests wait {_ms(waits.mean())} on the decode side before they get blocks for their KV"
    if free is not None and free < needed:
        text += f"; it went down to {free:.0f} free blocks."
        advice = "Give the decode node more blocks (block_device_memory_ratio), or add decode nodes."
    else:
        text += ", though it has free blocks: they wait for a step to end, or for a place in the batch."
        advice = "Raise max_batch_size or max_pretransfer_batch_size if it is full; else its steps are long."
    return Finding("decode admission", text, advice, float(waits.mean()), {"wait_s": float(waits.mean())})


def exposed_transfer(run: Timeline) -> Finding | None:
    """KV that arrived after prefill had ended, and the most frequent reason."""
    requests = run.measured
    if "exposed_transfer_s" not in requests or requests["exposed_transfer_s"].isna().all():
        return None
    exposed = requests["exposed_transfer_s"].fillna(0.0)
    if exposed.mean() < 0.05 * _ttft(run):
        return None
    reasons = why_exposed(run)
    counts = reasons["reason"].value_counts()
    lost = reasons.groupby("reason")["exposed_s"].sum().sort_values(ascending=False)
    reason = str(lost.index[0])
    wire, hidden = requests["wire_s"].sum(), requests["hidden_s"].sum()
    text = (
        f"{_ms(exposed.mean())} of KV transfer per request is exposed (it would add {exposed.mean() / _ttft(run):.0%} to TTFT; "
        f"{hidden / wire if wire else 0:.0%} of the wire time is hidden behind prefill). "
        f"{counts[reason]} of {len(reasons)} exposed requests: {_REASONS[reason][0]}{_evidence(run, reason)}."
    )
    numbers = {"exposed_s": float(exposed.mean()), "hidden_share": float(hidden / wire) if wire else 0.0, "count": float(counts[reason])}
    return Finding(f"exposed: {reason}", text, _REASONS[reason][1], float(exposed.mean()), numbers)


_REASONS = {
    "late announcement": (
        "the decode side had announced no room when the first layer was ready",
        "Dispatch to both nodes at once (this router does), keep decode's queue short, and watch its free blocks.",
    ),
    "one piece": (
        "everything went in one piece after the last layer, so that nothing could overlap",
        "Set transfer_mode: layer, and transfer_layer_chunk_size well below the number of layers.",
    ),
    "fragments": (
        "copies were small",
        "Use larger blocks (block_token_num) or the same head split on both sides, so that a layer of a block is one copy.",
    ),
    "link": (
        "the link takes longer for a layer than computing it does",
        "Use a faster link or backend; more layers in flight do not help here, but fewer bytes do.",
    ),
    "tail": (
        "only the last layers' way is left, which no overlap can hide",
        "Send smaller groups of layers at the end, or accept it.",
    ),
}


def why_exposed(run: Timeline) -> pd.DataFrame:
    """request_id, exposed_s, reason: one row per request that waited for its KV."""
    by_request = dict(list(run.transfers.groupby("request_id"))) if len(run.transfers) else {}
    rows = []
    for request in run.measured.itertuples(index=False):
        pieces = by_request.get(request.request_id)
        if pieces is None or not request.exposed_transfer_s > 0:
            continue
        rows.append((request.request_id, request.exposed_transfer_s, _why(run, request, pieces)))
    return pd.DataFrame(rows, columns=["request_id", "exposed_s", "reason"])


def _why(run: Timeline, request: object, pieces: pd.DataFrame) -> str:
    announced, exposed = getattr(request, "announced_s", None), getattr(request, "exposed_transfer_s", 0.0)
    own = run.layers[run.layers["request_id"] == getattr(request, "request_id", "")]
    first_ready = own["compute_end_s"].min() if own["compute_end_s"].notna().any() else pieces["ready_s"].min()
    late = max(0.0, pieces["wire_start_s"].min() - first_ready)
    is_late = announced is not None and announced > first_ready and late > 0.3 * exposed
    if is_late:
        return "late announcement"
    per_link = pieces.groupby(["index", "src_rank", "dst_rank"]).size().max()
    num_layers = int((run.transfers["layer"] + run.transfers["num_layers"]).max())
    if per_link == 1 and num_layers > 1:
        return "one piece"
    wire, compute, seconds = own["wire_s"].mean(), own["compute_s"].mean(), getattr(request, "wire_s", 0.0)
    is_slow = bool(compute == compute and seconds / len(own) > compute)
    copy_bytes = pieces["bytes"].sum() / max(1, pieces["copies"].sum())
    posts = pieces["post_s"].sum() / max(1e-12, seconds)
    if copy_bytes < _FRAGMENT_BYTES and (posts > 0.5 or _is_far_below_link(run, pieces, seconds)):
        return "fragments"
    if is_slow or (compute != compute and wire == wire):
        return "link"
    return "tail"


def _occupied(pieces: pd.DataFrame) -> float:
    """Seconds during which at least one piece was on the wire."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(zip(pieces["wire_start_s"], pieces["end_s"], strict=True)):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def _is_far_below_link(run: Timeline, pieces: pd.DataFrame, seconds: float) -> bool:
    """Less than a third of what the link was measured to carry in one large copy when it was connected. ``seconds``: on the wire."""
    links = [args.get("bandwidth") for args in run.events.loc[run.events["name"] == "link", "args"]]
    return bool(links and seconds and pieces["bytes"].sum() / seconds < min(links) / 3)


def _evidence(run: Timeline, reason: str) -> str:
    transfers = run.transfers[run.transfers["request_id"].isin(run.measured["request_id"])]
    seconds = run.measured["wire_s"].sum()
    rate = transfers["bytes"].sum() / seconds if seconds else 0.0
    if reason == "fragments":
        return f" ({transfers['bytes'].sum() / max(1, transfers['copies'].sum()) / 1024:.0f} KiB each, {_rate(rate)})"
    if reason == "link":
        layers = run.layers[run.layers["request_id"].isin(run.measured["request_id"])]
        compute = layers["compute_s"].mean()
        took = (
            f"{_ms(seconds / max(1, len(layers)))} to send, {_ms(compute)} to compute" if compute == compute else "computing was not timed"
        )
        return f" ({_rate(rate)}; a layer takes {took})"
    if reason == "late announcement":
        late = (run.measured["transfer_start_s"] - run.measured["prefill_start_s"]).mean()
        return f" (transfer began {_ms(late)} after prefill did)"
    return f" ({_rate(rate)})"


def handover(run: Timeline) -> Finding | None:
    """From the last byte's arrival to the first decode step."""
    requests = run.measured
    if "transfer_end_s" not in requests:
        return None
    waits = (requests["decode_start_s"] - requests[["transfer_end_s", "prefill_end_s"]].max(axis=1)).dropna().clip(lower=0.0)
    if not len(waits) or waits.mean() < max(_NOTABLE * _ttft(run), 0.002):
        return None
    busy = utilisation(run).get("decode", 0.0)
    text = (
        f"{_ms(waits.mean())} pass between the arrival of a request's KV and its first decode step; decode is busy {busy:.0%} of the time."
    )
    advice = (
        "Its batch is full or its steps are long: raise max_batch_size or add decode nodes."
        if busy > 0.6
        else "The first token or the notice came late; see the hand-over in the timeline."
    )
    return Finding("hand-over", text, advice, float(waits.mean()), {"wait_s": float(waits.mean()), "busy": busy})


def overhead(run: Timeline) -> Finding | None:
    """HTTP, routing, tokenising: everything of TTFT that is neither waiting nor computing."""
    ttft = run.breakdown[run.breakdown["is_ttft"] & run.breakdown["request_id"].isin(run.measured["request_id"])]
    means = ttft.groupby("phase")["seconds"].sum() / max(1, len(run.measured))
    parts = means[means.index.isin(_OVERHEAD)]
    total = float(parts.sum())
    if total < 0.3 * _ttft(run):
        return None
    most = parts.idxmax()
    text = f"{total / _ttft(run):.0%} of TTFT is spent outside the engines ({_ms(total)}), most of it in {most} ({_ms(parts.max())})."
    advice = "With prompts this short, or cores this busy, one mixed node answers sooner: every request crosses three processes more."
    return Finding("overhead", text, advice, total, {"share": total / _ttft(run)})


def bottleneck(run: Timeline) -> Finding | None:
    """Which side limits the rate."""
    busy = utilisation(run)
    if not busy or _is_mixed(run) or len(busy) < 2:
        return None
    high, low = max(busy, key=lambda side: busy[side]), min(busy, key=lambda side: busy[side])
    text = "Engines were busy: " + ", ".join(f"{side} {share:.0%}" for side, share in sorted(busy.items(), reverse=True)) + " of the time."
    if busy[high] < _BUSY:
        advice = "Neither side is the limit at this rate." if busy[high] < 0.6 else f"{high} will be the limit first."
    else:
        advice = f"{high.capitalize()} is the bottleneck: move a node from {low} to {high}, or add one."
    return Finding("bottleneck", text, advice, 0.0, busy)


def interference(run: Timeline) -> Finding | None:
    """On a mixed node decode steps carry prefill chunks of others, and everybody who decodes in one waits for them: what disaggregation is
    for."""
    steps = run.steps[(run.steps["num_decodes"] > 0) & (run.steps["role"].isin(("mixed", "llm")))].copy()
    if not len(steps):
        return None
    steps["seconds"] = steps["end_s"] - steps["start_s"]
    is_shared = steps["num_tokens"] > steps["num_decodes"]
    shared, alone = steps.loc[is_shared, "seconds"], steps.loc[~is_shared, "seconds"]
    waiting = steps.loc[is_shared, "num_decodes"]
    if not len(shared) or not len(alone) or shared.mean() < 1.5 * alone.mean():
        return None
    lost = float(((shared - alone.mean()) * waiting).sum() / max(1, len(run.measured)))
    share = len(shared) / len(steps)
    text = f"{share:.0%} of decode steps carry prefill of others and take {_ms(shared.mean())} instead of {_ms(alone.mean())}."
    return Finding("interference", text, "Disaggregation removes this; smaller chunks (split_fuse_token_num) soften it.", lost)


def preemptions(run: Timeline) -> Finding | None:
    count = int(run.measured["num_preemptions"].sum())
    if not count:
        return None
    text = f"{count} times a sequence lost its blocks, to be computed again or swapped in."
    return Finding("preemptions", text, "Give that node more blocks or a smaller max_batch_size.", 0.0, {"count": float(count)})


def failures(run: Timeline) -> Finding | None:
    failed = run.requests[run.requests["error"].notna()] if len(run.requests) else run.requests
    if not len(failed):
        return None
    return Finding(
        "failures", f"{len(failed)} requests failed, the first with: {failed['error'].iloc[0]}.", "", 0.0, {"count": float(len(failed))}
    )


def lost_events(run: Timeline) -> Finding | None:
    checks = run.checks()
    bad = checks[~checks["is_ok"].astype(bool)]
    if not len(bad):
        return None
    said = "; ".join(f"{row.name_}: {row.value:g} ({row.meaning})" for row in bad.rename(columns={"name": "name_"}).itertuples())
    return Finding("recording", f"The recording is not whole: {said}.", "Read the numbers above with that in mind.")


RULES: tuple[Callable[[Timeline], Finding | None], ...] = (
    queueing, interleaving, decode_admission, exposed_transfer, handover, overhead, bottleneck, interference,
    preemptions, failures, lost_events,
)  # fmt: skip


# ---- numbers ---------------------------------------------------------------------------------------------------------


def utilisation(run: Timeline) -> dict[str, float]:
    """Role -> share of the time between the first request and the last answer in which its engines ran a step, mean over its nodes."""
    rows = run.measured
    if not len(rows) or not len(run.steps):
        return {}
    begin, end = rows["sent_s"].min(), rows["last_token_s"].max()
    steps = run.steps[(run.steps["end_s"] > begin) & (run.steps["start_s"] < end)]
    shares: dict[str, list[float]] = {}
    for (role, _node), own in steps.groupby(["role", "node"]):
        spans = own.rename(columns={"start_s": "wire_start_s"})[["wire_start_s", "end_s"]].clip(begin, end)
        shares.setdefault(str(role), []).append(_occupied(spans) / max(end - begin, 1e-9))
    return {role: sum(values) / len(values) for role, values in shares.items()}


def _phase(run: Timeline, name: str) -> tuple[float, float]:
    """(seconds per request, share of TTFT) of a phase of TTFT."""
    rows = run.breakdown[(run.breakdown["phase"] == name) & run.breakdown["request_id"].isin(run.measured["request_id"])]
    mean = float(rows["seconds"].sum() / max(1, len(run.measured)))
    return mean, mean / _ttft(run)


def _ttft(run: Timeline) -> float:
    mean = run.measured["ttft_s"].mean()
    return float(mean) if mean == mean and mean > 0 else 1e-9


def _is_mixed(run: Timeline) -> bool:
    return not run.measured["route"].str.contains("decode").any()


def _least_free(run: Timeline, role: str) -> float | None:
    rows = run.counters[(run.counters["key"] == "free") & run.counters["node"].astype(str).str.startswith(role)]
    return float(rows["value"].min()) if len(rows) else None


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.2f} GB/s" if bytes_per_s >= 1e8 else f"{bytes_per_s / 1e6:.1f} MB/s"


def _words(side: str) -> str:
    return "the prefill engine" if side == "prefill" else "the engine"
