"""python -m ksana_lab.launch: router, prefill, decode, mixed, cluster, doctor.

    router --port 9080                                              the router
    prefill --config_file configs/prefill.yaml --port 8067          a node in this terminal; decode and mixed alike
    cluster configs/pd_1p1d_cpu.yaml --model-dir .cache/tiny        all processes of a file
    doctor --config_file configs/prefill.yaml                       what is wrong on this machine

A node is two processes: this one becomes the API server and starts the engine (hidden command ``engine``). Exit codes: 0 ended in order,
1 a process failed, 2 nothing was started because configuration, environment or machine do not allow it, 130 Ctrl-C, 143 SIGTERM."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, NoReturn

from ksana_lab import log as log_format
from ksana_lab.cluster import checks
from ksana_lab.cluster.local import RUN_DIR_VARIABLE, Cluster
from ksana_lab.cluster.ports import PortPool
from ksana_lab.cluster.process import ChildProcess, wait_for_end
from ksana_lab.config import ksana_yaml, yaml_file
from ksana_lab.config.engine import EngineConfig
from ksana_lab.config.environment import drop_proxies, engine_environment, has_cuda_graphs, require_variables, visible_gpus
from ksana_lab.config.ksana_yaml import LoadedConfig
from ksana_lab.config.overrides import leaves, put
from ksana_lab.config.router import RouterConfig
from ksana_lab.config.validate import build
from ksana_lab.errors import CheckpointError, ConfigError, KsanaLabError
from ksana_lab.process import die_with_parent
from ksana_lab.types import NodeAddr, Role

log = logging.getLogger("ksana_lab.launch")

_ENGINE_GRACE_S = 10.0
_DEATH_NOTICE_S = 3.0  # how long to look whether the engine's end explains the server's
_SERVER_GRACE_S = 10.0  # for the API server to answer what is in flight after its engine died

# Flags of the reference's serving_server that mean nothing here: refused with a reason rather than ignored.
_REFUSED_FLAGS = {
    "--ssl_keyfile": "TLS is not served; put a TLS proxy before the router",
    "--ssl_certfile": "TLS is not served; put a TLS proxy before the router",
    "--root_path": "routes are served at the root",
    "--tool-call-parser": "tool calls are not parsed",
    "--reasoning-parser": "reasoning is not parsed",
    "--enable-auto-tool-choice": "tool calls are not parsed",
    "--tool-parser-plugin": "tool calls are not parsed",
    "--chat-template": "the chat template is the tokenizer's own",
    "--chat-template-content-format": "message content may be a string or a list of parts, whatever the template",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    die_with_parent()
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = _parser().parse_args(arguments)
    try:
        return args.run(args)
    except (ConfigError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KsanaLabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


# ---- commands --------------------------------------------------------------------------------------------------------


def _run_router(args: argparse.Namespace) -> int:
    log_format.setup("router")
    config = _router_config(args)
    if args.dry_run:
        _print_section("router", yaml_file.dump(config.describe()))
        return 0
    if config.port == 0:
        config = config.model_copy(update={"port": _free_port(config.host)})
    checks.refuse(checks.router_preflight(config))
    _start_as("router")
    from ksana_lab.router.app import serve

    return serve(config)


def _router_config(args: argparse.Namespace) -> RouterConfig:
    if args.workers not in (None, 1):
        raise ConfigError(f"--workers {args.workers}: the router is one asyncio process, it knows the load of every pair; leave it at 1")
    names = ("host", "port", "policy", "cluster_name", "database_url", "heartbeat_timeout_s")
    options: dict[str, Any] = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.host is not None:
        options["host"] = args.host.strip("[]")
    if args.trace is not None:
        options["trace_dir"] = os.path.abspath(os.path.expanduser(args.trace))
    if args.config is None:
        return build(RouterConfig, options, "command line")
    config, warnings = RouterConfig.from_file(args.config, options)
    for warning in warnings:
        log.warning("%s", warning)
    return config


def _run_node(args: argparse.Namespace) -> int:
    role = Role(args.command)
    log_format.setup(role.value)
    loaded = _load_node(args)
    _check_role(role, loaded.config, args.config_file)
    config = loaded.config
    host, port = _listen_address(args, config)
    if args.dry_run:
        return _print_node_plan(loaded, host, port)
    require_variables(os.environ)
    findings = checks.node_preflight(config, host, port, visible_gpus())
    checks.refuse(findings)
    _start_as(role.value)
    for warning in [*loaded.warnings, *(f"{found.text}; {found.advice}" for found in findings if found.level == "warn")]:
        log.warning("%s", warning)
    if args.access_log:
        log.warning("--access_log: requests are not logged one by one; --trace DIR records every phase of each, /metrics counts them")
    with tempfile.TemporaryDirectory(prefix="node-", dir=os.environ.get(RUN_DIR_VARIABLE)) as private:
        return _serve_node(config, host, port, Path(private))


def _serve_node(config: EngineConfig, host: str, port: int, private: Path) -> int:
    """The engine as a child, the API server here; whichever ends first ends the other."""
    from ksana_lab.server.app import serve

    api_address = f"ipc://{private / 'api.sock'}"
    config_path = private / "engine.json"
    config_path.write_text(config.model_dump_json(), encoding="utf-8")
    command = [sys.executable, "-m", "ksana_lab.launch", "engine", "--config-json", str(config_path), "--api", api_address]
    replays = has_cuda_graphs(config.runtime)
    if replays:
        log.info("enable_cuda_graph: the engine uses torch's own allocator instead of cudaMallocAsync, which Triton cannot capture")
    engine = ChildProcess("engine", command, env=engine_environment(os.environ, has_cuda_graphs=replays))
    engine.start()
    threading.Thread(target=_follow_engine, args=(engine,), name="engine-watch", daemon=True).start()
    try:
        code = serve(config, host, port, api_address, lambda: None if engine.is_alive else engine.tail() or engine.describe_end())
        if code != 0 and wait_for_end([engine], _DEATH_NOTICE_S):
            raise engine.died()
        return code
    finally:
        engine.stop(_ENGINE_GRACE_S)


def _follow_engine(engine: ChildProcess) -> None:
    """A node without its engine must not linger: when the server does not end by itself, it is told to."""
    wait_for_end([engine])
    timer = threading.Timer(_SERVER_GRACE_S, os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    timer.start()


def _run_engine(args: argparse.Namespace) -> int:
    config = EngineConfig.model_validate_json(Path(args.config_json).read_text(encoding="utf-8"))
    log_format.setup(f"{config.connector.role.value}.engine")
    _start_as("engine")
    from ksana_lab.engine.engine_core import run

    return run(config, args.api)


def _run_cluster(args: argparse.Namespace) -> int:
    log_format.setup("cluster")
    cluster = Cluster.from_yaml(
        args.file, overrides=args.set, model_dir=args.model_dir, trace_dir=args.trace, log_dir=args.log_dir, only=args.only, nsys=args.nsys
    )
    if args.dry_run:
        return _print_cluster_plan(cluster)
    _start_as("cluster")
    print(cluster.plan.table(), file=sys.stderr, flush=True)
    with cluster:
        print(f"ready: {cluster.url}", file=sys.stderr, flush=True)
        ended = cluster.wait()
        raise cluster.died(ended[0])


def _run_doctor(args: argparse.Namespace) -> int:
    log_format.setup("doctor", level="ERROR")
    config = None
    findings: list[checks.Finding] = []
    if args.config_file is not None:
        try:
            loaded = _load_node(args)
            config = loaded.config
            findings += [checks.warn(warning) for warning in loaded.warnings]
        except ConfigError as error:
            findings.append(checks.error(str(error)))
    env = dict(os.environ)
    drop_proxies(os.environ)
    findings = [*checks.doctor(config, env, args.host, args.nsys), *findings]
    for finding in findings:
        print(finding)
    return 1 if checks.errors_of(findings) else 0


def _start_as(name: str) -> None:
    """What every process of ours does once nothing stands in its way: internal traffic passes no proxy, SIGTERM unwinds the stack."""
    dropped = drop_proxies(os.environ)
    if dropped:
        log.info("%s: proxy variables are not used: %s", name, ", ".join(sorted(dropped)))
    signal.signal(signal.SIGTERM, _exit_on_sigterm)


def _exit_on_sigterm(*_: object) -> NoReturn:
    sys.exit(143)


# ---- from options to configuration -----------------------------------------------------------------------------------


def _load_node(args: argparse.Namespace) -> LoadedConfig:
    """The file, then ``--set``, then the options, whose directories are no YAML: ``a #b`` and ``123`` are names."""
    source, file = str(args.config_file), yaml_file.read(args.config_file)
    tree = ksana_yaml.apply_overrides(file, args.set)
    said = {key: value for key, name in _DIRECTORIES.items() if (value := getattr(args, name)) is not None}
    for key in said:
        put(tree, key, None)  # what it replaces may hold a placeholder that nobody fills
    options = {"ROUTER_IP": args.router_ip, "PREFILL_IP": args.prefill_ip, "DECODE_IP": args.decode_ip, "MODEL_DIR": args.model_dir}
    given = {name: value for name, value in options.items() if value is not None}
    tree = ksana_yaml.substitute(tree, given, source)
    _move(tree, dict(leaves(file)), given)
    for key, directory in {**dict(leaves(tree)), **said}.items():
        if key in _DIRECTORIES and isinstance(directory, str):
            put(tree, key, os.path.expanduser(directory))
    return ksana_yaml.translate(tree, source)


def _move(tree: dict[str, Any], file: Mapping[tuple[str, ...], Any], given: Mapping[str, str]) -> None:
    """A file with addresses instead of placeholders: the options give them other hosts. What ``--set`` said stays."""
    found = dict(leaves(tree))
    role = str(found.get((*_CONNECTOR, "group_role"))).upper()
    for name, keys in (("ROUTER_IP", ("router_addr",)), (f"{role}_IP", ("inference_addr", "coordinator_addr"))):
        for path in ((*_CONNECTOR, key) for key in keys):
            if name in given and isinstance(address := found.get(path), str) and address == file.get(path):
                with suppress(ValueError):  # no address: the translation says so
                    put(tree, path, str(NodeAddr(given[name].strip("[]"), NodeAddr.parse(address).port)))


_CONNECTOR = ("setting", "connector")
_DIRECTORIES = {  # key -> the option that says it
    tuple(ksana_yaml.MODEL_DIR.split(".")): "model_dir",
    ("ksana_lab", "tokenizer_dir"): "tokenizer_path",
    ("ksana_lab", "trace_dir"): "trace",
}


def _check_role(role: Role, config: EngineConfig, path: str) -> None:
    said = config.connector.role
    if said is not role:
        word = "none" if role is Role.MIXED else role.value
        raise ConfigError(
            f"the command is {role.value} but {path} has connector.group_role {'none' if said is Role.MIXED else said.value}; "
            f"run `{said.value}` instead, or --set connector.group_role={word}"
        )


def _listen_address(args: argparse.Namespace, config: EngineConfig) -> tuple[str, int]:
    """Where the server listens: as told, else at ``inference_addr``, else on the loopback (the reference's port)."""
    if args.endpoint not in (None, "python"):
        raise ConfigError(f"--endpoint {args.endpoint}: the node serves HTTP itself, leave it at python")
    address = config.connector.inference_addr or NodeAddr("127.0.0.1", 8080)
    return (args.host or address.host).strip("[]"), address.port if args.port is None else args.port


def _free_port(host: str) -> int:
    pool = PortPool()
    try:
        return pool(host)
    finally:
        pool.close()


# ---- dry run ---------------------------------------------------------------------------------------------------------


def _print_node_plan(loaded: LoadedConfig, host: str, port: int) -> int:
    """Prints what would run; what stands in its way goes to stderr. Starts nothing."""
    config = loaded.config
    _print_section("configuration", yaml_file.dump(_plain(config)))
    size, runtime, coordinator = config.parallel.tensor_parallel_size, config.runtime, config.connector.coordinator_addr
    visible = visible_gpus()
    on_cpu = runtime.device == "cpu" or (runtime.device == "auto" and not visible)
    devices = runtime.device_ids or tuple(range(size))
    lines = [f"api server    http://{NodeAddr(host, port)}", f"engine        {config.connector.role.value}, {size} rank(s)"]
    lines += [f"  rank {rank}      {'CPU' if on_cpu else f'GPU {devices[rank]}'}" for rank in range(size) if on_cpu or rank < len(devices)]
    lines += [f"coordinator   tcp://{coordinator}"] if coordinator else []
    lines += [f"router        http://{config.connector.router_addr}"] if config.connector.router_addr else []
    _print_section("processes, ports, GPUs", "\n".join(lines))
    _print_warnings(loaded.warnings, [*checks.required_variables(os.environ), *checks.node_preflight(config, host, port, visible)])
    return 0


def _print_cluster_plan(cluster: Cluster) -> int:
    with closing(cluster):
        _print_section("router", yaml_file.dump(cluster.plan.router.config.describe()))
        for node in cluster.plan.nodes:
            _print_section(node.name, yaml_file.dump(_plain(node.config)))
        _print_section("processes, ports, GPUs", cluster.plan.table())
        _print_warnings(cluster.plan.warnings, cluster.preflight())
    return 0


def _plain(config: EngineConfig) -> dict[str, Any]:
    data = config.model_dump(mode="json")
    for name in ("router_addr", "inference_addr", "coordinator_addr"):
        address = getattr(config.connector, name)
        data["connector"][name] = None if address is None else str(address)
    return data


def _print_section(title: str, text: str) -> None:
    print(f"# ---- {title}\n{text.rstrip()}\n")


def _print_warnings(warnings: Sequence[str], findings: Sequence[checks.Finding]) -> None:
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    for finding in findings:
        if finding.level != "ok":
            verdict = "would refuse to start" if finding.level == "error" else "warning"
            print(f"{verdict}: {finding.text}{f'; {finding.advice}' if finding.advice else ''}", file=sys.stderr)


# ---- command line ----------------------------------------------------------------------------------------------------


class _Refuse(argparse.Action):
    """A flag of the reference that is not served."""

    def __call__(self, parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> NoReturn:
        flag = args[2] if len(args) > 2 else kwargs.get("option_string")
        parser.error(f"{flag} is not supported: {_REFUSED_FLAGS[str(flag)]}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ksana_lab.launch", description="Start ksana_lab's processes.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{router,prefill,decode,mixed,cluster,doctor}")
    _add_router(commands.add_parser("router", help="the router that pairs prefill and decode nodes", allow_abbrev=False))
    for role in Role:
        _add_node(commands.add_parser(role.value, help=f"a {role.value} node", allow_abbrev=False))
    _add_cluster(commands.add_parser("cluster", help="every process of a cluster file", allow_abbrev=False))
    _add_doctor(commands.add_parser("doctor", help="check this machine, and a node's file against it", allow_abbrev=False))
    engine = commands.add_parser("engine", allow_abbrev=False)
    engine.add_argument("--config-json", required=True)
    engine.add_argument("--api", required=True)
    engine.set_defaults(run=_run_engine)
    return parser


def _add_router(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", help="address to listen on (127.0.0.1; 0.0.0.0 for all)")
    parser.add_argument("--port", type=int, help="9080; 0 for a free one")
    parser.add_argument("--config", help="config.ini of the reference's router, or YAML with the fields of RouterConfig")
    parser.add_argument("--policy", choices=("random", "round_robin", "least_loaded"), help="how a pair is chosen (least_loaded)")
    parser.add_argument("--cluster-name", dest="cluster_name", help="default_cluster")
    parser.add_argument("--database-url", dest="database_url", help="SQLAlchemy URL: sqlite, mysql+pymysql, postgresql+psycopg")
    parser.add_argument("--heartbeat-timeout-s", dest="heartbeat_timeout_s", type=float, help="silence after which a node is offline (60)")
    parser.add_argument("--workers", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--trace", metavar="DIR", help="write the event log there")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved configuration and start nothing")
    parser.set_defaults(run=_run_router)


def _add_config_options(parser: argparse.ArgumentParser, *, required: bool) -> None:
    parser.add_argument("--config_file", "--config-file", required=required, metavar="F", help="the node's KsanaLLM YAML")
    parser.add_argument("--host", help="address to listen on (that of connector.inference_addr; 0.0.0.0 for all)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a key, e.g. batch_scheduler.max_batch_size=8"
    )
    parser.add_argument("--router-ip", help="fills {ROUTER_IP}")
    parser.add_argument("--prefill-ip", help="fills {PREFILL_IP}")
    parser.add_argument("--decode-ip", help="fills {DECODE_IP}")
    parser.add_argument("--model-dir", help="the checkpoint, instead of model_spec.base_model.model_dir; fills {MODEL_DIR}")
    parser.add_argument("--tokenizer_path", "--tokenizer-path", help="the tokenizer's directory (that of the model)")
    parser.add_argument("--trace", metavar="DIR", help="write event logs there")


def _add_node(parser: argparse.ArgumentParser) -> None:
    _add_config_options(parser, required=True)
    parser.add_argument("--port", type=int, help="HTTP port (that of connector.inference_addr, with which it must agree)")
    parser.add_argument("--endpoint", help=argparse.SUPPRESS)
    parser.add_argument("--access_log", "--access-log", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--dry-run", action="store_true", help="print configuration, processes, ports and GPUs, and start nothing")
    for flag in _REFUSED_FLAGS:
        parser.add_argument(flag, nargs="?", action=_Refuse, help=argparse.SUPPRESS)
    parser.set_defaults(run=_run_node)


def _add_cluster(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="cluster file, e.g. configs/pd_1p1d_cpu.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. nodes.prefill.count=2 or max_batch_size=8")
    parser.add_argument("--model-dir", help="the checkpoint of every node")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="start only this process of the file (several hosts)")
    parser.add_argument("--log-dir", metavar="DIR", help="keep the processes' logs there")
    parser.add_argument("--trace", metavar="DIR", help="write the event log of every process there")
    parser.add_argument("--nsys", action="store_true", help="also run the nodes under Nsight Systems; reports and SQLite go to --trace")
    parser.add_argument("--dry-run", action="store_true", help="print configuration, processes, ports and GPUs, and start nothing")
    parser.set_defaults(run=_run_cluster)


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    _add_config_options(parser, required=False)
    parser.add_argument("--nsys", action="store_true", help="also record something under Nsight Systems and look into the report")
    parser.set_defaults(run=_run_doctor)


if __name__ == "__main__":
    try:
        sys.exit(main())
    finally:
        # On the way out already: whoever asks again must not cut the clean-up short, nor find a traceback of it in the log.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
