"""The decode side of the data plane alone, in a process of its own: a cache, a backend that serves it, and nothing that counts what comes.

Prints the endpoint as one JSON line, and ends when its standard input does."""

from __future__ import annotations

import json
import sys

import torch

from ksana_lab.transfer.registry import make_backend

WINDOW = 1


class _Sink:
    def on_notice(self, session: int, window: int, notice: bytes, first_ns: int) -> str | None:
        return None

    def on_writer_gone(self, session: int, reason: str) -> None: ...


def main() -> int:
    name, nbytes, device = sys.argv[1], int(sys.argv[2]), torch.device(sys.argv[3])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = make_backend(name, "127.0.0.1", on_gpu=device.type == "cuda")
    cache = backend.allocate(nbytes, device)
    endpoint = backend.serve(cache, _Sink())
    backend.open_window(WINDOW)
    print(json.dumps(endpoint), flush=True)
    for line in sys.stdin:  # "offset bytes": the sum of these bytes of the cache
        offset, count = map(int, line.split())
        print(int(cache[offset : offset + count].to(torch.int64).sum()), flush=True)
    backend.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
