"""The same events as NVTX annotations, so that Nsight Systems shows them beside kernels: domain ``ksana_lab``, one category per component.

A message is an event's name and arguments, ``send request=12.0 bytes=65536``; the payload is its most telling number. What is only known
when it is over (``span``) becomes a mark; what is open while it lasts (``open``/``shut``, ``push``/``pop``) a range. A request's phases
are start/end ranges, which may begin in one coroutine or thread and end in another; push/pop ranges nest within a thread.

Nothing is annotated while no tool listens. A mark ``clock`` with the monotonic time, at every step, at every phase of a request and with
any other event after 50 ms, ties a report to the event log: whatever a report holds of ours, a mark is near it."""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import os
import time
from collections.abc import Mapping
from typing import Any

from ksana_lab.tracing.recorder import NullRecorder

log = logging.getLogger(__name__)

DOMAIN = "ksana_lab"
INJECTION_VARIABLE = "NVTX_INJECTION64_PATH"  # set by whichever tool collects NVTX in this process
_CLOCK_INTERVAL_NS = 50_000_000  # for the events that are too frequent for a mark each
_MAX_OPEN = 4096  # phases of requests that never ended
_PAYLOAD = ("bytes", "num_tokens", "layer", "step", "seq_id")
_COLOURS = {"request": "green", "step": "blue", "layer": "purple", "transfer": "orange", "clock": "gray"}
_ABOUT = ("request_id", "request", "seq_id", "layer", "layers", "chunk", "bytes", "peer", "step", "num_tokens", "num_decodes", "rank")

# Event of a request -> the phase that begins with it; None = none does. A range begins where it is made: before "engine queue" a request
# waits for the step that is under way, which ``queueing_s`` counts as well.
_ENGINE_PHASES = {
    "QUEUED": "engine queue",
    "PREFILL_START": "prefill",
    "PREFILL_END": "decode",
    "TRANSFER_START": "waiting for KV",
    "DECODE_QUEUED": "decode",
    "PREEMPTED": "engine queue",
    "SWAPPED_IN": "decode",
    "FINISHED": None,
    "FAILED": None,
    "ABORTED": None,
}


def annotate(recorder: NullRecorder, role: str, env: Mapping[str, str] = os.environ) -> NullRecorder:
    """``recorder`` with annotations, if a tool collects them; else ``recorder`` itself."""
    if not env.get(INJECTION_VARIABLE):
        log.info("KSANA_LAB_NVTX is set, and no tool collects NVTX in this process (start it under nsys)")
        return recorder
    try:
        return NvtxRecorder(recorder, role, domain_for(importlib.import_module("nvtx")))
    except ImportError as error:
        log.warning("KSANA_LAB_NVTX is set and nvtx is missing: %s; run: pip install nvtx", error)
        return recorder


def domain_for(nvtx: Any) -> Any:
    """What to annotate with where a tool collects: the module itself, or the domain behind its back.

    nvtx 0.2.12 and later ask the tool whether it wants the domain (nvtxDomainIsEnabled), which nsys of 2022 and 2023 answers with 0 because
    it does not know the question: the module then gives out a dummy, and the report is empty. The tool takes the events all the same."""
    if not hasattr(nvtx, "get_domain") or type(nvtx.get_domain(DOMAIN)).__name__ != "DummyDomain":
        return nvtx
    version = importlib.metadata.version("nvtx")
    try:
        domain = _UnaskedDomain(importlib.import_module("nvtx._lib.lib"))
    except (ImportError, AttributeError, TypeError) as error:
        log.warning(
            "nvtx %s takes this tool for one that wants no %s ranges (%s): its report will have none; "
            "run: pip install 'nvtx==0.2.11', or use a newer nsys",
            version, DOMAIN, error,
        )  # fmt: skip
        return nvtx
    log.info("nvtx %s asks what this tool cannot answer; annotating without asking", version)
    return domain


class _UnaskedDomain:
    """The functions of ``nvtx`` that are used here, on a domain that is taken to be wanted. ``lib``: nvtx's own ``nvtx._lib.lib``."""

    def __init__(self, lib: Any) -> None:
        class Wanted(lib.Domain):  # type: ignore[misc,name-defined]
            def __new__(cls, name: str) -> Any:
                domain = object.__new__(cls)
                domain.handle = lib.DomainHandle(name)
                return domain

        self._domain = Wanted(DOMAIN)
        self._attributes("clock", "gray", DOMAIN, "clock", 0)  # raises here, if ever

    def _attributes(self, message: str, color: str, domain: str, category: str, payload: int) -> Any:
        return self._domain.get_event_attributes(message, color, category, payload)

    def mark(self, **event: Any) -> None:
        self._domain.mark(self._attributes(**event))

    def push_range(self, **event: Any) -> None:
        self._domain.push_range(self._attributes(**event))

    def pop_range(self, domain: str) -> None:
        self._domain.pop_range()

    def start_range(self, **event: Any) -> Any:
        return self._domain.start_range(self._attributes(**event))

    def end_range(self, handle: Any) -> None:
        self._domain.end_range(handle)


class NvtxRecorder(NullRecorder):
    """Passes everything on to ``recorder`` and annotates it. ``nvtx``: the module, or what ``domain_for`` found."""

    enabled = annotates = True

    def __init__(self, recorder: NullRecorder, role: str, nvtx: Any) -> None:
        self._recorder, self._nvtx, self._role = recorder, nvtx, role
        self._phases: dict[tuple[Any, Any], Any] = {}
        self._next_clock_ns = 0
        self._tell_clock()

    def instant(self, name: str, cat: str, **args: Any) -> None:
        self._recorder.instant(name, cat, **args)
        self._tell_clock(always=cat == "request")
        self._nvtx.mark(**self._event(name, cat, args))
        if cat == "request" and "seq_id" in args and name in _ENGINE_PHASES:
            self._turn((args.get("request_id"), args["seq_id"]), _ENGINE_PHASES[name], args)

    def span(self, name: str, cat: str, start_ns: int, end_ns: int, **args: Any) -> None:
        self._recorder.span(name, cat, start_ns, end_ns, **args)
        self._tell_clock()
        if cat != "step":  # a step has been a range while it ran
            self._nvtx.mark(**self._event(name, cat, {**args, "us": (end_ns - start_ns) // 1000}))

    def counter(self, name: str, cat: str, **values: float) -> None:
        self._recorder.counter(name, cat, **values)

    def open(self, name: str, cat: str, **args: Any) -> Any:
        return self._nvtx.start_range(**self._event(name, cat, args))

    def shut(self, handle: Any) -> None:
        if handle is not None:
            self._nvtx.end_range(handle)

    def push(self, name: str, cat: str, **args: Any) -> None:
        self._tell_clock(always=name == "step")
        self._nvtx.push_range(**self._event(name, cat, args))

    def pop(self) -> None:
        self._nvtx.pop_range(domain=DOMAIN)

    def close(self) -> None:
        for handle in self._phases.values():
            self._nvtx.end_range(handle)
        self._phases.clear()
        self._recorder.close()

    def _turn(self, key: tuple[Any, Any], phase: str | None, args: dict[str, Any]) -> None:
        """The request's phase ends, ``phase`` begins."""
        if (handle := self._phases.pop(key, None)) is not None:
            self._nvtx.end_range(handle)
        if phase is not None and len(self._phases) < _MAX_OPEN:
            self._phases[key] = self._nvtx.start_range(**self._event(phase, "request", args))

    def _event(self, name: str, cat: str, args: dict[str, Any]) -> dict[str, Any]:
        about = " ".join(f"{key}={args[key]}" for key in (*_ABOUT, "us") if args.get(key) is not None)
        payload = next((int(args[key]) for key in _PAYLOAD if isinstance(args.get(key), int)), 0)
        message = f"{name} {about}" if about else name
        return {"message": message, "color": _COLOURS.get(cat, "gray"), "domain": DOMAIN, "category": cat, "payload": payload}

    def _tell_clock(self, always: bool = False) -> None:
        now_ns = time.monotonic_ns()
        if now_ns < self._next_clock_ns and not always:
            return
        self._next_clock_ns = now_ns + _CLOCK_INTERVAL_NS
        event = {"color": "gray", "domain": DOMAIN, "category": "clock", "payload": time.monotonic_ns()}
        self._nvtx.mark(message=f"clock role={self._role}", **event)
