"""How exact the load generator is: ``python -m ksana_lab.bench loadgen --streams 256``.

A stub server of known timing runs in a process of its own and notes, on the host's monotonic clock, when it really wrote each token. The
error of a measured time is the client's stamp minus the stub's. It includes the loopback socket and both event loops, so it is an upper
bound of what the client adds. Knows nothing of engines."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ksana_lab.metrics.latency import tpot_s, ttft_s
from ksana_lab.metrics.record import RequestRecord
from ksana_lab.workload import loadgen
from ksana_lab.workload.spec import WorkloadSpec
from ksana_lab.workload.stub import StubTiming

_START_TIMEOUT_S = 30


@dataclass(frozen=True)
class Accuracy:
    """Milliseconds, over the requests of one run."""

    num_requests: int
    num_failed: int
    messages_per_s: float
    ttft_error_p50_ms: float
    ttft_error_p99_ms: float
    tpot_error_p50_ms: float
    tpot_error_p99_ms: float
    stamp_error_p99_ms: float  # of every single message
    send_lag_p99_ms: float
    loop_lag_p99_ms: float
    is_trustworthy: bool
    machine_jitter_p99_ms: float  # of an idle sleeping thread just before: what this machine adds without any of this


def machine_jitter_p99_ms(count: int = 200, period_s: float = 0.005) -> float:
    """How late plain sleeps end when nothing of ours runs. Where it is large (a busy or a virtual machine), so is every error above it."""
    lags = []
    for _ in range(count):
        due = time.monotonic() + period_s
        time.sleep(period_s)
        lags.append(time.monotonic() - due)
    return float(1e3 * np.percentile(lags, 99))


def compare(records: Sequence[RequestRecord], timings: dict[str, StubTiming], report: loadgen.LoadReport, jitter_ms: float) -> Accuracy:
    """TTFT and TPOT of each request against the same formulas over what the stub wrote."""
    good = [r for r in records if r.is_ok]
    ttft, tpot, stamps = [], [], []
    for record in good:
        wrote = timings[record.request_id].written_s
        true = RequestRecord(record.request_id, 0, len(wrote), sent_s=record.sent_s, token_times_s=wrote, token_counts=[1] * len(wrote))
        ttft.append(abs((ttft_s(record) or 0.0) - (ttft_s(true) or 0.0)))
        tpot.append(abs((tpot_s(record) or 0.0) - (tpot_s(true) or 0.0)))
        stamps += [abs(at - by) for at, by in zip(record.token_times_s, wrote, strict=False)]
    (ttft50, ttft99), (tpot50, tpot99) = (1e3 * np.percentile(errors or [np.nan], (50, 99)) for errors in (ttft, tpot))
    return Accuracy(
        num_requests=len(records),
        num_failed=len(records) - len(good),
        messages_per_s=len(stamps) / report.duration_s,
        ttft_error_p50_ms=float(ttft50),
        ttft_error_p99_ms=float(ttft99),
        tpot_error_p50_ms=float(tpot50),
        tpot_error_p99_ms=float(tpot99),
        stamp_error_p99_ms=float(1e3 * np.percentile(stamps or [np.nan], 99)),
        send_lag_p99_ms=1e3 * report.send_lag_p99_s,
        loop_lag_p99_ms=1e3 * report.loop_lag_p99_s,
        is_trustworthy=report.is_trustworthy,
        machine_jitter_p99_ms=jitter_ms,
    )


@contextmanager
def stub_process(ttft_ms: float, gap_ms: float, timings_file: Path | None = None) -> Iterator[str]:
    """The stub on a free port in a process of its own; yields its URL. The process ends with the block, and writes its timings then."""
    command = [sys.executable, "-m", "ksana_lab.workload.stub", "--port", "0", f"--ttft-ms={ttft_ms}", f"--gap-ms={gap_ms}"]
    command += ["--timings", str(timings_file)] if timings_file else []
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin and process.stdout
    try:
        yield process.stdout.readline().split()[0].rstrip(":")
    finally:
        process.stdin.close()  # the stub ends when its standard input does
        try:
            process.wait(timeout=_START_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def read_timings(path: Path) -> dict[str, StubTiming]:
    return {name: StubTiming(**timing) for name, timing in json.loads(path.read_text()).items()}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ksana_lab.bench loadgen", description="Error of measured TTFT and TPOT against a known server."
    )
    parser.add_argument("--streams", type=int, default=256, help="answers in flight at once")
    parser.add_argument("--requests", type=int, default=1024)
    parser.add_argument("--ttft-ms", type=float, default=200.0)
    parser.add_argument("--gap-ms", type=float, default=25.0)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--endpoint", choices=("generate", "completions", "chat"), default="completions")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE")
    options = parser.parse_args(arguments)
    seconds = (options.ttft_ms + options.gap_ms * (options.output_tokens - 1)) / 1e3
    spec = WorkloadSpec.from_dict(
        {
            "rate": options.streams / seconds,  # Little: so many are in flight on average
            "num_requests": options.requests,
            "prompt_tokens": options.prompt_tokens,
            "output_tokens": options.output_tokens,
            "endpoint": options.endpoint,
            "num_warmup": 8,
        }
    )
    result = run(spec, options.ttft_ms, options.gap_ms)
    for name, value in asdict(result).items():
        print(f"{name:22} {value if isinstance(value, (bool, int)) else round(value, 3)}")
    if options.json:
        options.json.write_text(json.dumps(asdict(result), indent=1) + "\n")
    return 0


def run(spec: WorkloadSpec, ttft_ms: float, gap_ms: float) -> Accuracy:
    """Plays ``spec`` against a stub in its own process."""
    jitter_ms = machine_jitter_p99_ms()
    with tempfile.TemporaryDirectory() as folder:
        timings_file = Path(folder) / "timings.json"
        with stub_process(ttft_ms, gap_ms, timings_file) as url:
            report = loadgen.measure(url, spec)
        return compare(report.records, read_timings(timings_file), report, jitter_ms)


if __name__ == "__main__":
    sys.exit(main())
