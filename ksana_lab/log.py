"""One log format for every process: time, level, ``role[.rank]:pid``, module, message.

``setup`` is called once by a process's entry point; libraries only call ``logging.getLogger(__name__)``."""

from __future__ import annotations

import logging
import os
import sys

_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


def setup(name: str, *, level: str | None = None) -> None:
    """Log to stderr as ``name`` (for example ``prefill`` or ``decode.tp1``). ``level`` or ``KSANA_LAB_LOG`` (default INFO) chooses."""
    chosen = (level or os.environ.get("KSANA_LAB_LOG") or "INFO").upper()
    if chosen not in _LEVELS:
        chosen = "INFO"
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        logging.Formatter(f"%(asctime)s.%(msecs)03d %(levelname).1s {name}:{os.getpid()} %(module)s: %(message)s", datefmt="%H:%M:%S")
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel("WARNING")
    logging.getLogger("ksana_lab").setLevel(chosen)
