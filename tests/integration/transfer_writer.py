"""A prefill rank in a process of its own that writes without end, to be killed: ``python transfer_writer.py BACKEND NBYTES < ENDPOINT``.

Prints a line when its first write is under way."""

from __future__ import annotations

import json
import os
import sys
import threading

import numpy as np
import torch

from ksana_lab.transfer.registry import make_backend


class Nobody:
    def on_ack(self, token: int, error: str | None) -> None: ...

    def on_lost(self, reason: str) -> None: ...


def main(name: str, nbytes: int) -> None:
    endpoint = json.loads(sys.stdin.readline())
    backend = make_backend(name, "127.0.0.1")
    cache = torch.randint(0, 256, (nbytes,), dtype=torch.uint8)
    link = backend.connect(endpoint, cache, 1, Nobody(), 10)
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    whole = np.array([[0, 0, nbytes]], np.int64)
    while True:
        cache.add_(1)
        ticket = link.write(whole, 1)
        print("writing", flush=True)
        ticket.wait(30)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
