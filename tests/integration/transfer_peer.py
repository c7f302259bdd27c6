"""A prefill or decode node in a process of its own, to be killed: ``python transfer_peer.py ROLE BACKEND PORT PEER_ADDRESS``.

Prints its control address. A prefill node computes request 1 of 64 tokens in four chunks once it is announced, and sends it
slowly; a decode node announces it. Ends with its parent's standard input."""

from __future__ import annotations

import os
import sys
import threading

from transfer_nodes import Node, random_kv

from ksana_lab.types import Role

SLOW = {"bandwidth_gbps": 0.001}  # 64 tokens of 1 KiB take half a second


def prefill_slowly(node: Node, seq) -> None:
    """So that no two chunks can go together."""
    node.connector.on_allocated(seq)
    node.wait(lambda _: node.connector.stats()["state_sending"] == 1, "announcement", timeout_s=60)
    kv = random_kv(64)
    node.compute(seq, kv, 0, 16)
    node.wait(lambda _: node.workers[0].stats()["transfers"] > 0, "the first piece", timeout_s=60)
    for start in (16, 32, 48):
        node.compute(seq, kv, start, start + 16)
    node.finish(seq)


def main(role: Role, backend: str, port: int, peer: str) -> None:
    is_prefill = role is Role.PREFILL
    node = Node(role, backend=backend, port=port, transfer_mode="layer", **({"link": SLOW} if is_prefill else {}))
    print(node.connector.address, flush=True)
    node.name(node, comm_id="c1", address=None if is_prefill else peer)
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    seq = node.sequence(1, 64)
    if is_prefill:
        prefill_slowly(node, seq)
    else:
        node.connector.on_allocated(seq)
    node.wait(lambda news: bool(news.failed), "the end", timeout_s=60)


if __name__ == "__main__":
    os.environ["ENABLE_LAYER_TRACKER"] = "1"
    main(Role(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4])
