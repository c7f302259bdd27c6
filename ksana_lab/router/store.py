"""What a restarted router must know: nodes, comm ids, and which request ids were given out. SQLAlchemy: a SQLite file, MySQL or PostgreSQL.

Nobody waits for the database: changes are handed to a thread that writes the newest state of each row; request ids are leased in ranges,
the next range while the present one lasts. While the database cannot be written the router serves on, and ``error`` says so. Neither keeps
the other from its turn: ids are leased whatever becomes of the rows, and a row that the database will never take is left out."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from ksana_lab.errors import ConfigError, ServiceUnavailable
from ksana_lab.router.comm_groups import CommId
from ksana_lab.router.registry import Node
from ksana_lab.types import Role

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
MAX_REQUEST_ID = 2**31 - 1  # the reference's nodes narrow it to int32
LEASE = 1 << 14  # request ids per lease; a crash loses at most so many of 2**31
LAZY_S = 1.0  # heartbeats are written this much later, together
RETRY_S = 1.0
CLOSE_S = 5.0  # longest wait for the last write

_metadata = sa.MetaData()
_node = sa.Table(
    "ksana_lab_node",
    _metadata,
    sa.Column("cluster_name", sa.String(64), primary_key=True),
    sa.Column("inference_addr", sa.String(128), primary_key=True),
    sa.Column("role", sa.String(16), primary_key=True),
    sa.Column("node_rank", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("node_id", sa.String(64), nullable=False),
    sa.Column("incarnation", sa.String(256), nullable=False),
    sa.Column("coordinator_addr", sa.String(128)),
    sa.Column("world_size", sa.Integer, nullable=False),
    sa.Column("num_devices", sa.Integer, nullable=False),
    sa.Column("hostname", sa.String(256)),
    sa.Column("registered_s", sa.Double, nullable=False),  # Unix seconds
    sa.Column("last_heartbeat_s", sa.Double, nullable=False),
    sa.Column("connected", sa.Text),  # JSON list of comm keys, or NULL
)
_pair = sa.Table(
    "ksana_lab_pair",
    _metadata,
    sa.Column("cluster_name", sa.String(64), primary_key=True),
    sa.Column("comm_key", sa.String(256), primary_key=True),
    sa.Column("comm_id", sa.Text, nullable=False),
    sa.Column("registered_s", sa.Double, nullable=False),
    sa.Column("node_ids", sa.Text, nullable=False),  # JSON list
)
_counter = sa.Table(
    "ksana_lab_counter",
    _metadata,
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("value", sa.BigInteger, nullable=False),
)

_Row = dict[str, Any]
_Key = tuple[Any, ...]
_Dirty = dict[tuple[str, _Key], _Row | None]  # (table, key) -> row to write, or None: delete


@dataclass
class Snapshot:
    nodes: list[Node]
    comm_ids: list[CommId]


class Store:
    """The journal of registry and comm groups. ``open`` before use, ``close`` after; both block, nothing between them does."""

    def __init__(self, url: str, cluster_name: str) -> None:
        self.cluster_name = cluster_name
        self.error: str | None = None  # why the last write failed; None = all is written or about to be
        self.request_ids = RequestIds(self._ask_for_lease)
        self._url = url
        self._cond = threading.Condition()
        self._dirty: _Dirty = {}
        self._rejected: set[tuple[str, _Key]] = set()  # rows that the log has named as left out
        self._is_lease_wanted = False
        self._due_s: float | None = None  # monotonic; when the thread is to write
        self._closing = False
        self._thread: threading.Thread | None = None
        self._engine: sa.Engine | None = None

    # ---- opening and closing ---------------------------------------------------------------------------------------

    def open(self) -> Snapshot:
        """Connect, create the tables if they are not there, lease the first request ids, read what is known. Raises ConfigError."""
        try:
            self._engine = _engine(self._url)
            _create_tables(self._engine)
            self._check_version()
            self.request_ids.add(self._lease())
            snapshot = self._read()
        except (sa.exc.SQLAlchemyError, OSError, ImportError) as error:
            self._dispose()
            raise ConfigError(f"the router's database {_shown(self._url)} cannot be used: {_reason(error)}") from None
        self._thread = threading.Thread(target=self._write_behind, name="store-writer", daemon=True)
        self._thread.start()
        return snapshot

    def close(self) -> None:
        """Write what waits, for at most ``CLOSE_S``. May be called twice."""
        with self._cond:
            self._closing = True
            self._cond.notify()
        if self._thread is not None:
            self._thread.join(CLOSE_S)
            if self._thread.is_alive():
                logger.error("the database %s takes too long; its last changes are lost", _shown(self._url))
            self._thread = None
        self._dispose()

    def _dispose(self) -> None:
        if self._engine is not None:
            self._engine.dispose()
            self._engine = None

    # ---- the journal: called on the event loop, never blocks ----------------------------------------------------------

    def put_node(self, node: Node, *, urgent: bool) -> None:
        self._put("node", self._node_key(node), _node_row(self.cluster_name, node), 0.0 if urgent else LAZY_S)

    def drop_node(self, node: Node) -> None:
        self._put("node", self._node_key(node), None)

    def put_comm_id(self, comm_id: CommId) -> None:
        self._put("pair", (self.cluster_name, comm_id.comm_key), _pair_row(self.cluster_name, comm_id))

    def drop_comm_id(self, comm_key: str) -> None:
        self._put("pair", (self.cluster_name, comm_key), None)

    def _node_key(self, node: Node) -> _Key:
        return self.cluster_name, *node.identity

    def _put(self, table: str, key: _Key, row: _Row | None, delay_s: float = 0.0) -> None:
        with self._cond:
            self._dirty[table, key] = row
            self._wake_in(delay_s)

    def _ask_for_lease(self) -> None:
        with self._cond:
            self._is_lease_wanted = True
            self._wake_in(0.0)

    def _wake_in(self, delay_s: float) -> None:
        due_s = time.monotonic() + delay_s
        if self._due_s is None or due_s < self._due_s:
            self._due_s = due_s
            self._cond.notify()

    # ---- the thread --------------------------------------------------------------------------------------------------

    def _write_behind(self) -> None:
        while True:
            with self._cond:
                while not self._closing and (wait_s := self._wait_s()) != 0.0:
                    self._cond.wait(wait_s)
                dirty, self._dirty = self._dirty, {}
                is_lease_wanted, self._is_lease_wanted = self._is_lease_wanted, False
                self._due_s = None
                is_last = self._closing
            lease_error = self._try(self._add_lease) if is_lease_wanted and not is_last else None
            write_error = self._try(partial(self._write, dirty)) if dirty else None
            if (error := write_error or lease_error) is None:
                self._succeeded()
            else:
                self._failed(error, dirty if write_error else {}, is_lease_wanted=lease_error is not None)
            if is_last:
                return

    def _wait_s(self) -> float | None:
        """0: now; None: until told."""
        return None if self._due_s is None else max(0.0, self._due_s - time.monotonic())

    @staticmethod
    def _try(act: Callable[[], None]) -> Exception | None:
        """What went wrong, whatever it is: were the thread to end, nothing would be written and no id leased any more."""
        try:
            act()
        except Exception as error:
            return error
        return None

    def _add_lease(self) -> None:
        self.request_ids.add(self._lease())

    def _succeeded(self) -> None:
        if self.error is not None:
            logger.info("the database %s can be written again", _shown(self._url))
            self.error = None

    def _failed(self, error: Exception, dirty: _Dirty, *, is_lease_wanted: bool) -> None:
        if self.error is None:
            logger.error("the database %s cannot be written: %s; serving on, will retry", _shown(self._url), _reason(error))
        self.error = _reason(error)
        with self._cond:
            self._dirty = {**dirty, **self._dirty}  # what came meanwhile is newer
            self._is_lease_wanted |= is_lease_wanted
            self._due_s = time.monotonic() + RETRY_S

    def _write(self, dirty: _Dirty) -> None:
        """All in one transaction; or, when the database rejects one, each in its own, without those that fail alone."""
        try:
            self._replace(dirty)
        except Exception as error:
            if not _is_rejection(error):
                raise
            for name, row in dirty.items():
                self._write_alone(name, row)

    def _write_alone(self, name: tuple[str, _Key], row: _Row | None) -> None:
        try:
            self._replace({name: row})
            self._rejected.discard(name)
        except Exception as error:
            if not _is_rejection(error):
                raise
            if name not in self._rejected:  # a node's row comes again with each of its heartbeats
                logger.error("the database %s rejects a row, which is left out: %s %r: %s", _shown(self._url), *name, _reason(error))
            self._rejected.add(name)

    def _replace(self, dirty: _Dirty) -> None:
        """The newest row of each key replaces what is there, in one transaction."""
        assert self._engine is not None
        with self._engine.begin() as connection:
            for name, table in (("node", _node), ("pair", _pair)):
                keys = [key for table_name, key in dirty if table_name == name]
                rows = [row for (table_name, _), row in dirty.items() if table_name == name and row is not None]
                columns = list(table.primary_key.columns)
                if keys:
                    where = sa.and_(*(column == sa.bindparam(f"key_{column.name}") for column in columns))
                    names = [f"key_{column.name}" for column in columns]
                    connection.execute(table.delete().where(where), [dict(zip(names, key, strict=True)) for key in keys])
                if rows:
                    connection.execute(table.insert(), rows)

    # ---- blocking helpers ----------------------------------------------------------------------------------------------

    def _lease(self) -> range:
        """The next ``LEASE`` ids, taken from the counter by compare-and-set: two routers never hold the same."""
        assert self._engine is not None
        for _ in range(1000):
            start = _ensured(self._engine, "request_id", 1)
            after = start + LEASE if start + LEASE <= MAX_REQUEST_ID else 1  # 2**31 requests later the first are long gone
            update = _counter.update().where(_counter.c.name == "request_id", _counter.c.value == start).values(value=after)
            with self._engine.begin() as connection:
                if connection.execute(update).rowcount == 1:
                    return range(start, min(start + LEASE, MAX_REQUEST_ID + 1))
        raise sa.exc.OperationalError("lease of request ids", None, Exception("too many routers want one at once"))

    def _check_version(self) -> None:
        assert self._engine is not None
        version = _ensured(self._engine, "schema_version", SCHEMA_VERSION)
        if version != SCHEMA_VERSION:
            raise ConfigError(
                f"the router's database {_shown(self._url)} has schema version {version}, this program writes {SCHEMA_VERSION}: "
                "give another database_url, or remove its ksana_lab_* tables (nodes register again by themselves)"
            )

    def _read(self) -> Snapshot:
        assert self._engine is not None
        with self._engine.connect() as connection:
            nodes = connection.execute(sa.select(_node).where(_node.c.cluster_name == self.cluster_name)).mappings().all()
            pairs = connection.execute(sa.select(_pair).where(_pair.c.cluster_name == self.cluster_name)).mappings().all()
        return Snapshot([_node_of(dict(row)) for row in nodes], [_comm_id_of(dict(row)) for row in pairs])


class RequestIds:
    """Request ids 1 .. 2**31 - 1 that no other router and no earlier process gives out. ``next`` never blocks."""

    def __init__(self, ask_for_more: Callable[[], None]) -> None:
        self._ask_for_more = ask_for_more
        self._ranges: list[range] = []
        self._lock = threading.Lock()  # ``add`` is called by the store's thread
        self._has_asked = False

    def add(self, ids: range) -> None:
        with self._lock:
            self._ranges.append(ids)
            self._has_asked = False

    def next(self) -> int:
        """Raises ServiceUnavailable if the database gives no more."""
        with self._lock:
            while self._ranges and not self._ranges[0]:
                self._ranges.pop(0)
            left = sum(map(len, self._ranges))
            is_asking = left <= LEASE // 2 and not self._has_asked
            if is_asking:
                self._has_asked = True
            request_id = self._ranges[0][0] if left else None
            if left:
                self._ranges[0] = self._ranges[0][1:]
        if is_asking:
            self._ask_for_more()
        if request_id is None:
            raise ServiceUnavailable("no request ids are left: the router's database cannot be written")
        return request_id


_DRIVERS = {"mysql": "mysql+pymysql", "postgresql": "postgresql+psycopg"}  # those our extras install


def _engine(url: str) -> sa.Engine:
    parsed = sa.make_url(url)
    if parsed.drivername in _DRIVERS:
        parsed = parsed.set(drivername=_DRIVERS[parsed.drivername])
    if parsed.get_backend_name() != "sqlite":
        return sa.create_engine(parsed, pool_pre_ping=True)
    if parsed.database and parsed.database != ":memory:":
        Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
        engine = sa.create_engine(parsed, connect_args={"timeout": 10})
    else:  # one connection for all threads, or each would see a database of its own
        engine = sa.create_engine(parsed, poolclass=sa.StaticPool, connect_args={"check_same_thread": False})

    @sa.event.listens_for(engine, "connect")
    def set_pragmas(connection: Any, _: Any) -> None:
        # Readers do not block the writer; a power cut may lose the last second, which heartbeats bring back.
        for pragma in ("journal_mode=WAL", "synchronous=NORMAL"):
            connection.execute(f"PRAGMA {pragma}").close()

    return engine


def _create_tables(engine: sa.Engine) -> None:
    try:
        _metadata.create_all(engine)
    except sa.exc.DBAPIError:  # two routers that start at once both find no table; the second look sees the other's
        _metadata.create_all(engine)


def _ensured(engine: sa.Engine, name: str, initial: int) -> int:
    """The counter's value; created when it is not there, by whoever comes first."""
    select = sa.select(_counter.c.value).where(_counter.c.name == name)
    with engine.connect() as connection:
        value = connection.execute(select).scalar()
    if value is not None:
        return int(value)
    try:
        with engine.begin() as connection:
            connection.execute(_counter.insert().values(name=name, value=initial))
    except sa.exc.IntegrityError:
        pass  # another router was first: its row is the one to read
    with engine.connect() as connection:
        return int(connection.execute(select).scalar_one())


def _node_row(cluster_name: str, node: Node) -> _Row:
    return {
        "cluster_name": cluster_name,
        "inference_addr": node.inference_addr,
        "role": node.role.value,
        "node_rank": node.node_rank,
        "node_id": node.node_id,
        "incarnation": node.incarnation,
        "coordinator_addr": node.coordinator_addr,
        "world_size": node.world_size,
        "num_devices": node.num_devices,
        "hostname": node.hostname,
        "registered_s": node.registered_s,
        "last_heartbeat_s": node.last_heartbeat_s,
        "connected": None if node.connected is None else json.dumps(sorted(node.connected)),
    }


def _node_of(row: _Row) -> Node:
    del row["cluster_name"]
    connected = row.pop("connected")
    role = Role(row.pop("role"))
    return Node(**row, role=role, connected=None if connected is None else frozenset(json.loads(connected)))


def _pair_row(cluster_name: str, comm_id: CommId) -> _Row:
    return {
        "cluster_name": cluster_name,
        "comm_key": comm_id.comm_key,
        "comm_id": comm_id.comm_id,
        "registered_s": comm_id.registered_s,
        "node_ids": json.dumps(sorted(comm_id.node_ids)),
    }


def _comm_id_of(row: _Row) -> CommId:
    return CommId(row["comm_key"], row["comm_id"], row["registered_s"], frozenset(json.loads(row["node_ids"])))


def _is_rejection(error: Exception) -> bool:
    """The row is at fault (too long, out of range, text that cannot be encoded), not the database: to try again would be in vain."""
    if isinstance(error, sa.exc.DBAPIError):
        return isinstance(error, sa.exc.DataError | sa.exc.IntegrityError)
    return isinstance(error, sa.exc.StatementError | ValueError | TypeError | OverflowError)


def _shown(url: str) -> str:
    try:
        return sa.make_url(url).render_as_string(hide_password=True)
    except sa.exc.ArgumentError:
        return "(its URL cannot be parsed)"


def _reason(error: Exception) -> str:
    """What went wrong without the statement and its parameters, which are nobody's business."""
    if isinstance(error, sa.exc.NoSuchModuleError | ImportError):
        return f"{error}; install the driver, for example with `pip install ksana_lab[mysql]` or `ksana_lab[postgres]`"
    cause = getattr(error, "orig", None) or error
    return str(cause) or type(cause).__name__
