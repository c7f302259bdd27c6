"""Runs processes under Nsight Systems: finds ``nsys``, prefixes commands, starts and stops the collection, exports SQLite.

Each process gets a session of its own: ``nsys launch`` runs it, ``nsys start`` begins collecting when the run begins (so loading a model is
not in the report), ``nsys stop`` ends that and writes the report while the process still serves. ``try_recording`` does all that with a
small process, for the doctor. Reading a report is tracing/nsys.py's job; here it is only asked whether it is empty."""

from __future__ import annotations

import glob
import logging
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from ksana_lab.errors import ConfigError
from ksana_lab.tracing.recorder import NVTX_VARIABLE

log = logging.getLogger(__name__)

NSYS_VARIABLE = "KSANA_LAB_NSYS"  # where nsys is, if it is not found
LIBRARIES_VARIABLE = "KSANA_LAB_NSYS_LIBS"  # folder of libraries that its importer lacks on this system
_PLACES = (
    "/opt/nvidia/nsight-systems*/**/target-linux-*/nsys",
    "/opt/nvidia/nsight-compute/*/host/target-linux-*/nsys",
    "/usr/local/cuda*/bin/nsys",
    "/usr/lib/*/nsight-systems/target-linux-*/nsys",
)
_IMPORTERS = ("../host-linux-*/QdstrmImporter", "../linux-desktop-*/QdstrmImporter", "host-linux-*/QdstrmImporter")
_INSTALL = (
    "install Nsight Systems (NVIDIA's package nsight-systems-cli; on Debian: apt-get install nsight-systems from non-free), "
    f"or name it with {NSYS_VARIABLE}=/path/to/nsys"
)
_COMMAND_TIMEOUT_S = 300.0
_ATTEMPTS = 3
_MARK = 34  # NVTX_EVENTS.eventType


@dataclass(frozen=True)
class Nsys:
    path: str
    importer: str | None  # what makes a report of what was collected; without it nothing can be read

    @property
    def version(self) -> str:
        return _run([self.path, "--version"]).stdout.strip()


def find_nsys(env: Mapping[str, str] = os.environ) -> Nsys:
    """Raises ConfigError that says what to install."""
    named = env.get(NSYS_VARIABLE)
    path = named or shutil.which("nsys", path=env.get("PATH")) or next((p for place in _PLACES for p in _newest(place)), None)
    if path is None or not os.access(path, os.X_OK):
        where = f"{NSYS_VARIABLE}={named} is not executable" if named else "nsys is not on the PATH nor where NVIDIA's packages put it"
        raise ConfigError(f"--nsys: {where}; {_INSTALL}")
    folder = Path(os.path.realpath(path)).parent
    importer = next((p for place in _IMPORTERS for p in _newest(str(folder / place))), None)
    if importer is None:
        importer = next((p for root in (folder, *_installed_beside(folder)) for p in _newest(f"{root}/host-linux-*/QdstrmImporter")), None)
    if importer is None:
        raise ConfigError(
            f"--nsys: {path} has no importer (QdstrmImporter) beside it, so it could collect and not report; install the host part, "
            "or link it: ln -s /usr/lib/nsight-systems/host-linux-x64 next to the folder of nsys"
        )
    return Nsys(path, importer)


def _installed_beside(folder: Path) -> list[Path]:
    """Debian's nsys is a wrapper: its target folder lies in the multiarch folder."""
    return [folder.parent, *(Path(p) for p in glob.glob("/usr/lib/*/nsight-systems"))]


def _newest(pattern: str) -> list[str]:
    return sorted(glob.glob(pattern, recursive=True), reverse=True)


class NsysSessions:
    """The sessions of one cluster. ``prefix`` before a process starts, ``start`` when all serve, ``stop`` before they are ended."""

    def __init__(self, out: str | Path, nsys: Nsys | None = None, *, has_gpus: bool = False) -> None:
        self._nsys = nsys or find_nsys()
        self._out = Path(out).absolute()
        self._has_gpus = has_gpus
        self._trace = "nvtx,cuda" if has_gpus else "nvtx"
        self._sessions: dict[str, str] = {}
        self._num_sessions = 0
        self._is_started = False

    @property
    def environment(self) -> dict[str, str]:
        """For the processes: their recorders annotate."""
        return {NVTX_VARIABLE: "1"}

    def prefix(self, name: str) -> list[str]:
        """What to put before the command of process ``name``. Each call names a session of its own: one that failed may linger."""
        self._num_sessions += 1
        session = self._sessions[name] = f"ksana-lab-{os.getpid()}-{id(self) % 10**6}-{self._num_sessions}-{name}".replace(".", "-")
        return [self._nsys.path, "launch", f"--session-new={session}", f"--trace={self._trace}"]

    def start(self) -> None:
        """Begin to collect. Raises ConfigError with nsys' own words."""
        self._out.mkdir(parents=True, exist_ok=True)
        for name, session in self._sessions.items():
            done = _run_until_well(
                [self._nsys.path, "start", f"--session={session}", f"--output={self._out / name}", "--force-overwrite=true",
                 "--sample=none", "--cpuctxsw=none"]
            )  # fmt: skip
            if done.returncode:
                raise ConfigError(f"--nsys: collecting from {name} did not start: {(done.stderr or done.stdout).strip()[-500:]}")
        self._is_started = True

    def stop(self) -> list[Path]:
        """End the collection and export what there is; the SQLite files. May be called twice; says what went wrong, and goes on."""
        if not self._is_started:
            for name in list(self._sessions):
                self.give_up(name)
            return []
        self._is_started = False
        paths = [path for name in self._sessions if (path := self._finish(name)) is not None]
        self._sessions.clear()
        for path in paths:
            self._tell_lack(path)
        return paths

    def _tell_lack(self, path: Path) -> None:
        try:
            lack = lacking(path, has_gpu=self._has_gpus)
        except sqlite3.DatabaseError as error:
            lack = f"cannot be read: {error}"
        if lack:
            log.warning("%s %s", path, lack)

    def give_up(self, name: str) -> None:
        """End a session that collects nothing: its agent would outlive a process that never ran."""
        _run([self._nsys.path, "shutdown", f"--session={self._sessions.pop(name)}"])

    def _finish(self, name: str) -> Path | None:
        report, raw, database = (self._out / f"{name}{suffix}" for suffix in (".nsys-rep", ".qdstrm", ".sqlite"))
        for _attempt in range(_ATTEMPTS):
            stopped = _run([self._nsys.path, "stop", f"--session={self._sessions[name]}"])
            if report.exists() or raw.exists():  # where the importer lacks a library, stop fails and leaves what it could not import
                break
        if not report.exists() and raw.exists() and self._nsys.importer is not None:
            stopped = _run([self._nsys.importer, "-i", str(raw), "-o", str(report)], _importer_environment(self._nsys.importer))
        if not report.exists():
            log.warning("nsys left no report of %s: %s", name, (stopped.stderr or stopped.stdout).strip()[-500:])
            return None
        exported = _run_until_well(
            [self._nsys.path, "export", "--type=sqlite", "--force-overwrite=true", f"--output={database}", str(report)]
        )
        if not database.exists():
            log.warning("the report of %s was not exported: %s", name, (exported.stderr or exported.stdout).strip()[-500:])
            return None
        return database


_TRIAL = """
import pathlib, sys, time
from ksana_lab.tracing.nvtx import annotate
from ksana_lab.tracing.recorder import NullRecorder
has_gpu, flag = sys.argv[1] == "gpu", pathlib.Path(sys.argv[2])
if has_gpu:
    import torch
    some = torch.ones(1 << 20, device="cuda")
recorder = annotate(NullRecorder(), "doctor")
flag.touch()
deadline, step = time.monotonic() + 120, 0
while flag.exists() and time.monotonic() < deadline:
    recorder.push("step", "step", step=step)
    if has_gpu:
        some = some + 1
        torch.cuda.synchronize()
    recorder.pop()
    step += 1
    time.sleep(0.01)
"""
_TRIAL_TIMEOUT_S = 90.0  # torch takes its time
_TRIAL_S = 0.5


def try_recording(nsys: Nsys, *, has_gpu: bool = False) -> str | None:
    """Record half a second of a process the way nodes are recorded; what its report lacks, None if it is whole. Takes some seconds.
    Raises ConfigError with what nsys said when it leaves none."""
    with tempfile.TemporaryDirectory(prefix="ksana_lab-nsys-") as folder:
        for _attempt in range(_ATTEMPTS):
            sessions, flag = NsysSessions(folder, nsys, has_gpus=has_gpu), Path(folder) / "running"
            command = [*sessions.prefix("trial"), sys.executable, "-c", _TRIAL, "gpu" if has_gpu else "cpu", str(flag)]
            with open(f"{folder}/said", "w+", encoding="utf-8") as said:
                process = subprocess.Popen(
                    command, env={**os.environ, **sessions.environment}, stdin=subprocess.DEVNULL, stdout=said, stderr=said
                )
                try:
                    if not _wait_for(flag, process):
                        continue
                    sessions.start()
                    time.sleep(_TRIAL_S)
                    for path in sessions.stop():
                        return lacking(path, has_gpu=has_gpu)
                finally:
                    flag.unlink(missing_ok=True)
                    sessions.stop()
                    process.terminate()
                    process.wait(30)
        raise ConfigError(f"nsys left no report of a trial: {Path(folder, 'said').read_text(encoding='utf-8').strip()[-400:]}")


def _wait_for(flag: Path, process: subprocess.Popen) -> bool:
    deadline = time.monotonic() + _TRIAL_TIMEOUT_S
    while not flag.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    return flag.exists()


def lacking(path: str | Path, *, has_gpu: bool = False) -> str | None:
    """What the report of a node ought to hold and does not, with the cause to look for; None when it is whole. Quick, whatever its size.
    ``has_gpu``: it ought to hold kernels, too. Raises sqlite3.DatabaseError for a file that is no SQLite database."""
    with closing(sqlite3.connect(f"file:{Path(path)}?mode=ro", uri=True)) as db:
        tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type='table'")}
        if not _has_mark(db, tables):
            return (
                "holds no ranges of ksana_lab: either nothing was asked of the node between start and stop, or this nsys does not see what "
                "this nvtx annotates: `python -m ksana_lab.launch doctor --nsys` tries the two"
            )
        device = tables & {"CUPTI_ACTIVITY_KIND_KERNEL", "CUPTI_ACTIVITY_KIND_GRAPH_TRACE"}  # a decode node may run graphs alone
        if has_gpu and not any(db.execute(f"SELECT 1 FROM {table} LIMIT 1").fetchone() for table in device):
            return (
                "holds ranges and no GPU kernels: nsys must trace `cuda`, and its CUPTI must know this driver; take an nsys as new as the "
                "driver, or torch.profiler (POST /start_profile) instead"
            )
    return None


def _has_mark(db: sqlite3.Connection, tables: set[str]) -> bool:
    """A clock mark is beside whatever we annotate."""
    if "NVTX_EVENTS" not in tables:
        return False
    sql = f"SELECT 1 FROM NVTX_EVENTS WHERE eventType = {_MARK} AND text LIKE 'clock role=%' LIMIT 1"
    if db.execute(sql).fetchone():
        return True
    joined = "NVTX_EVENTS JOIN StringIds ON StringIds.id = NVTX_EVENTS.textId"
    sql = f"SELECT 1 FROM {joined} WHERE eventType = {_MARK} AND StringIds.value LIKE 'clock role=%' LIMIT 1"
    return "StringIds" in tables and db.execute(sql).fetchone() is not None


def _run_until_well(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """nsys trips over its own semaphores now and then, on a busy machine (2022.4); what it refuses for a reason it refuses again."""
    for _attempt in range(_ATTEMPTS):
        done = _run(command)
        if done.returncode == 0:
            break
    return done


def _importer_environment(importer: str, env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The importer finds its own libraries, and those that it lacks in KSANA_LAB_NSYS_LIBS; nodes must see neither."""
    folders = [env.get(LIBRARIES_VARIABLE), str(Path(importer).parent), env.get("LD_LIBRARY_PATH")]
    return {**env, "LD_LIBRARY_PATH": ":".join(folder for folder in folders if folder)}


def _run(command: Sequence[str], env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=_COMMAND_TIMEOUT_S, check=False, stdin=subprocess.DEVNULL, env=env
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(list(command), 124, "", f"no end within {_COMMAND_TIMEOUT_S:.0f} s")
