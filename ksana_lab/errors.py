"""Every exception of ksana_lab, drawn once.

KsanaLabError
├── ConfigError          the user's YAML, option or environment is wrong; nothing was started         exit code 2
├── CheckpointError      a model directory is missing, unreadable or no checkpoint                    exit code 2
├── RequestError         one request cannot be served; carries an HTTP status and a type
│   ├── InvalidRequest       400  a field is bad
│   ├── PromptTooLong        400  longer than the model or the KV cache can ever hold
│   ├── QueueFull            429  try again later (Retry-After)
│   ├── RequestTimeout       504  waited longer than waiting_timeout
│   ├── RequestAborted       499  the client or its peer went away
│   ├── TransferFailed       502  the KV cache did not arrive
│   └── ServiceUnavailable   503  no pair is connected, or the engine is gone
├── TransferError        a link between two nodes broke or was refused (also inside an engine)
│   └── LayoutMismatch       the two sides' KV layouts differ; names both values
├── EngineDead           the engine process ended; carries its last log lines
└── ProcessDied          a process of a cluster ended or did not become ready; carries its last log lines   exit code 1
"""

from __future__ import annotations


class KsanaLabError(Exception):
    """Root of the tree."""


class ConfigError(KsanaLabError):
    """The message says which key or variable, what is wrong and what to do."""


class CheckpointError(KsanaLabError):
    """The message names the directory and what it lacks."""


class RequestError(KsanaLabError):
    """``status`` is the HTTP status; ``type`` goes into the error body. ``ksana_code`` is KsanaLLM's number (utils/ret_code.h)."""

    status = 500
    type = "internal_error"
    ksana_code = 3001
    retry_after_s: int | None = None


class InvalidRequest(RequestError):
    status, type, ksana_code = 400, "invalid_request_error", 2000

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class PromptTooLong(InvalidRequest):
    type, ksana_code = "context_length_exceeded", 2002


class QueueFull(RequestError):
    status, type, ksana_code, retry_after_s = 429, "queue_full", 2003, 1


class RequestTimeout(RequestError):
    status, type, ksana_code = 504, "timeout", 3004


class RequestAborted(RequestError):
    status, type, ksana_code = 499, "aborted", 2004


class TransferFailed(RequestError):
    status, type, ksana_code = 502, "transfer_failed", 3005


class ServiceUnavailable(RequestError):
    status, type, ksana_code, retry_after_s = 503, "unavailable", 3001, 1


class TransferError(KsanaLabError):
    """A link between two nodes broke, timed out or was refused."""


class LayoutMismatch(TransferError):
    """The peers' KV caches cannot be copied into one another."""


class EngineDead(KsanaLabError):
    """The engine process is gone. ``log_tail`` holds its last lines."""

    def __init__(self, message: str, log_tail: str = "") -> None:
        super().__init__(message + (f"\n{log_tail}" if log_tail else ""))
        self.log_tail = log_tail


class ProcessDied(KsanaLabError):
    """A router or node that a cluster started is gone, or never became ready. ``log_tail`` holds its last lines."""

    def __init__(self, message: str, log_tail: str = "") -> None:
        super().__init__(message + (f"\n{log_tail}" if log_tail else ""))
        self.log_tail = log_tail


REQUEST_ERRORS: dict[str, type[RequestError]] = {
    cls.type: cls
    for cls in (
        InvalidRequest,
        PromptTooLong,
        QueueFull,
        RequestTimeout,
        RequestAborted,
        TransferFailed,
        ServiceUnavailable,
    )
}


def request_error(type_: str, message: str) -> RequestError:
    """Rebuild a RequestError that crossed a process boundary as (type, message)."""
    return REQUEST_ERRORS.get(type_, RequestError)(message)
