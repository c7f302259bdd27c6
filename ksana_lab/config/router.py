"""What the router is told. Reads the reference router's config.ini too (``from_file``)."""

from __future__ import annotations

import configparser
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote, urlsplit

from pydantic import BeforeValidator, Field

from ksana_lab.config import yaml_file
from ksana_lab.config.engine import Frozen
from ksana_lab.config.validate import build, nearest
from ksana_lab.errors import ConfigError

# 0 and "auto" are one thing: a free port, chosen before the process starts.
Port = Annotated[int, BeforeValidator(lambda port: 0 if port == "auto" else port), Field(ge=0, le=65535)]


class RouterConfig(Frozen):
    host: str = "127.0.0.1"  # the address the HTTP server binds
    port: Port = 9080
    workers: int = Field(1, ge=1, le=1)  # one asyncio process: loads and pairs are kept in memory, so a second would choose blindly
    cluster_name: str = Field("default_cluster", max_length=64)  # a node that names another cluster is refused
    heartbeat_timeout_s: float = Field(60.0, gt=0)  # silent for longer: offline
    database_url: str | None = Field(None, repr=False)  # SQLAlchemy URL; None: a SQLite file of this port's, see ``resolved_database_url``
    policy: Literal["random", "round_robin", "least_loaded"] = "least_loaded"
    connect_timeout_s: float = Field(5.0, gt=0)  # to open a connection to a node
    read_timeout_s: float = Field(600.0, gt=0)  # longest silence of a node inside a stream, from its head on
    reply_timeout_s: float = Field(3600.0, gt=0)  # longest wait for a reply in one piece, and for a stream's head, of a node that lives
    max_connections: int = Field(0, ge=0)  # to all nodes together; 0 = no limit
    max_body_bytes: int = Field(64 << 20, ge=1024)
    shutdown_grace_s: float = Field(5.0, ge=0)  # for replies in flight when the router is stopped
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    log_dir: str | None = None  # None: stderr only
    trace_dir: str | None = None  # event log (JSONL); None = off

    @property
    def resolved_database_url(self) -> str:
        """``database_url``, or a SQLite file in the user's state directory (XDG_STATE_HOME), named after cluster and port."""
        if self.database_url is not None:
            return self.database_url
        state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
        return f"sqlite:///{state / 'ksana_lab' / f'router-{self.cluster_name}-{self.port}.db'}"

    @classmethod
    def from_file(cls, path: str | Path, options: Mapping[str, Any] | None = None) -> tuple[RouterConfig, list[str]]:
        """Read ``config.ini`` (the reference's) or YAML (our field names); ``options`` win over the file. Returns the warnings too.

        Raises ConfigError for a file that cannot be read, an unknown key or a bad value."""
        path = Path(path)
        warnings: list[str] = []
        if path.suffix in (".yaml", ".yml"):
            data = yaml_file.read(path)
        else:
            data, warnings = _parse_ini(yaml_file.read_text(path), path)
        return build(cls, {**data, **(options or {})}, str(path)), warnings

    def describe(self) -> dict[str, Any]:
        """All fields, the database's password hidden: for --dry-run and logs."""
        return {**self.model_dump(), "database_url": without_password(self.resolved_database_url)}


def without_password(url: str) -> str:
    parts = urlsplit(url)
    return url.replace(f":{parts.password}@", ":***@", 1) if parts.password else url


# config.ini of the reference: section -> key -> our field. None: part of the database's URL, or in _WITHOUT_EFFECT.
_INI: dict[str, dict[str, str | None]] = {
    "general": {
        "log_level": "log_level",
        "log_dir": "log_dir",
        "cluster_name": "cluster_name",
        "heartbeat_timeout_seconds": "heartbeat_timeout_s",
    },
    "name_service": {"name_service_provider": None, "namespace": None, "prefill_service": None, "decode_service": None},
    "database": dict.fromkeys(
        ("storage_mode", "sqlite_path", "host", "port", "user", "password", "database", "charset", "autocommit"), None
    ),
}

# (section, storage_mode or None for both, why) -> key -> the reference's defaults, its code's and its file's; any other value asks for
# something, and is answered with a warning.
_WITHOUT_EFFECT: dict[tuple[str, str | None, str], dict[str, tuple[str, ...]]] = {
    ("name_service", None, "the router asks no name service for nodes, they register with it"): {
        "namespace": ("Production",),
        "prefill_service": ("prefill-service",),
        "decode_service": ("decode-service",),
    },
    ("database", None, "every change is committed as it is made"): {"autocommit": ("true", "yes", "on", "1")},
    ("database", "sqlite", "storage_mode is sqlite, a file"): {
        "host": ("localhost",),
        "port": ("3306",),
        "user": ("root",),
        "password": ("",),
        "database": ("ksana_llm_router",),
        "charset": ("utf8mb4",),
    },
    ("database", "mysql", "storage_mode is mysql"): {"sqlite_path": ("./sqlite/simple_router.db", "./simple_router.db")},
}


def _parse_ini(text: str, path: Path) -> tuple[dict[str, Any], list[str]]:
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read_string(text)
    except configparser.Error as error:
        raise ConfigError(f"{path} is not a valid ini file: {error}") from None
    data: dict[str, Any] = {}
    for section in parser.sections():
        if section not in _INI:
            raise ConfigError(f"{path}: [{section}] is not a known section{nearest(section, _INI)}")
        for key, value in parser[section].items():
            if key not in _INI[section]:
                raise ConfigError(f"{path}: {section}.{key} is not a known key{nearest(key, _INI[section])}")
            field = _INI[section][key]
            if field is not None:
                data[field] = value
    if "log_level" in data:
        data["log_level"] = data["log_level"].upper()
    if parser.has_section("database"):
        data["database_url"] = _database_url(dict(parser["database"]), path)
    return data, [*_name_service_warnings(parser, path), *_without_effect(parser, path)]


def _database_url(options: dict[str, str], path: Path) -> str:
    mode = options.get("storage_mode", "sqlite").lower()
    if mode == "sqlite":
        # As in the reference, a relative path starts at the ini's own folder.
        return f"sqlite:///{(path.parent / options.get('sqlite_path', './simple_router.db')).resolve()}"
    if mode == "mysql":
        user, password = quote(options.get("user", "root"), safe=""), quote(options.get("password", ""), safe="")
        login = f"{user}:{password}" if password else user
        place = f"{options.get('host', 'localhost')}:{options.get('port', '3306')}/{options.get('database', 'ksana_llm_router')}"
        return f"mysql+pymysql://{login}@{place}?charset={options.get('charset', 'utf8mb4')}"
    raise ConfigError(f"{path}: database.storage_mode must be sqlite or mysql, got {mode!r} (for others give --database-url)")


def _name_service_warnings(parser: configparser.ConfigParser, path: Path) -> list[str]:
    provider = parser.get("name_service", "name_service_provider", fallback="name_service.auto_provider")
    if provider.rpartition(".")[2] == "auto_provider":
        return []
    return [
        f"{path}: name_service.name_service_provider={provider} is not implemented; the router serves the nodes that register with it, and "
        "chooses among them by its policy"
    ]


def _without_effect(parser: configparser.ConfigParser, path: Path) -> list[str]:
    storage_mode = parser.get("database", "storage_mode", fallback="sqlite").lower()
    warnings = []
    for (section, mode, why), defaults in _WITHOUT_EFFECT.items():
        for key, off in defaults.items():
            value = parser.get(section, key, fallback=off[0])
            if mode in (None, storage_mode) and value not in off and value.lower() not in off:
                shown = "" if key == "password" else f"={value}"
                warnings.append(f"{path}: {section}.{key}{shown} has no effect: {why}")
    return warnings
