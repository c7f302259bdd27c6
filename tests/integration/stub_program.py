"""Stands in for ``python -m ksana_lab.launch`` where a test is about processes: a router and nodes that know each other, in a few lines of
the standard library. A node starts an "engine" of its own. KSANA_STUB_FAULT says what goes wrong."""

import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml

from ksana_lab.process import die_with_parent, parent_variables

nodes = {}


class Router(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        fresh = {addr: node for addr, node in nodes.items() if time.monotonic() - node["seen"] < 0.5}
        known = [{**node, "inference_addr": addr, "is_online": addr in fresh} for addr, node in nodes.items()]
        by_role = {role: [a for a, node in fresh.items() if node["role"] == role] for role in ("prefill", "decode")}
        pairs = [{"comm_key": f"{p}__{d}", "is_routable": True} for p in by_role["prefill"] for d in by_role["decode"]]
        self.answer({"nodes": known, "pairs": pairs})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path == "/beat":
            nodes[body["addr"]] = {"role": body["role"], "incarnation": body["incarnation"], "seen": time.monotonic()}
            self.answer({})
        elif body.get("prompt") == "fail":
            self.answer({"detail": "no"}, 503)
        else:
            self.answer({"texts": [json.dumps(body)], "output_token_ids": [[1, 2]], "input_token_ids": body.get("input_tokens", [7])})

    def answer(self, body, status=200):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


def router(config):
    print("router is up", flush=True)
    ThreadingHTTPServer((config["host"], config["port"]), Router).serve_forever(0.01)


def node(role, config):
    connector = config["setting"]["connector"]
    code = "from ksana_lab.process import die_with_parent; die_with_parent(); import time; print('up', flush=True); time.sleep(600)"
    env = {**os.environ, **parent_variables()}
    engine = subprocess.Popen([sys.executable, "-c", code], env=env, start_new_session=True, stdout=subprocess.PIPE)
    engine.stdout.readline()
    print(f"{role} has engine {engine.pid}", flush=True)
    if os.environ.get("KSANA_STUB_FAULT") == f"{role} dies":
        sys.exit(f"{role} cannot find its weights")
    host, port = connector["inference_addr"].rsplit(":", 1)
    server = ThreadingHTTPServer((host, int(port)), Router)  # holds the port, as a node would
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    body = {"addr": connector["inference_addr"], "role": role, "incarnation": str(os.getpid())}
    while True:
        if os.environ.get("KSANA_STUB_FAULT") != f"{role} is silent":
            beat(f"http://{connector['router_addr']}/beat", body)
        time.sleep(0.05)


def beat(url, body):
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    try:
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=5).close()
    except OSError:
        pass


if __name__ == "__main__":
    die_with_parent()
    command = sys.argv[1]
    path = sys.argv[sys.argv.index("--config" if command == "router" else "--config_file") + 1]
    with open(path) as file:
        settings = yaml.safe_load(file)
    router(settings) if command == "router" else node(command, settings)
