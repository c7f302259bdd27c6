"""What survives a restart, and that request ids never repeat. On SQLite; and on every server whose URL KSANA_LAB_TEST_DATABASES names
(separated by spaces; the ksana_lab_* tables there are removed)."""

from __future__ import annotations

import os
import threading

import pytest
import sqlalchemy as sa

from ksana_lab.errors import ConfigError, ServiceUnavailable
from ksana_lab.router import store as store_module
from ksana_lab.router.comm_groups import CommId
from ksana_lab.router.registry import Node
from ksana_lab.router.store import MAX_REQUEST_ID, RequestIds, Store
from ksana_lab.types import Role


@pytest.fixture(params=["sqlite", *os.environ.get("KSANA_LAB_TEST_DATABASES", "").split()], ids=lambda url: url.partition(":")[0])
def url(request, tmp_path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/state/router.db"
    execute(request.param, *(f"DROP TABLE IF EXISTS ksana_lab_{name}" for name in ("node", "pair", "counter")))
    return request.param


def execute(url: str, *statements: str) -> None:
    engine = store_module._engine(url)
    with engine.begin() as connection:
        for statement in statements:
            connection.execute(sa.text(statement))
    engine.dispose()


def node(addr: str = "10.0.0.1:1", **more) -> Node:
    return Node("id-" + addr, addr, Role.PREFILL, 0, "7", "10.0.0.1:2", 2, 2, "host", 1.5, 1e9 + 0.25, **more)


def opened(url: str, cluster_name: str = "c"):
    store = Store(url, cluster_name)
    return store, store.open()


def test_nodes_and_comm_ids_come_back_as_they_were(url):
    store, _ = opened(url)
    first = node(connected=frozenset({"a__b"}))
    store.put_node(first, urgent=True)
    store.put_comm_id(CommId("a__b", "id", 2.5, frozenset({"x", "y"})))
    store.close()
    second, snapshot = opened(url)
    second.close()
    (came,) = snapshot.nodes
    assert all(getattr(came, f) == getattr(first, f) for f in ("node_id", "identity", "incarnation", "last_heartbeat_s", "connected"))
    assert snapshot.comm_ids == [CommId("a__b", "id", 2.5, frozenset({"x", "y"}))]


def test_the_newest_state_wins_and_what_was_dropped_stays_away(url):
    store, _ = opened(url)
    kept, gone = node("10.0.0.1:1"), node("10.0.0.2:1")
    for n in (kept, gone):
        store.put_node(n, urgent=False)
    kept.coordinator_addr = "10.0.0.1:9"
    store.put_node(kept, urgent=False)
    store.drop_node(gone)
    store.close()
    second, snapshot = opened(url)
    second.close()
    assert [(n.node_id, n.coordinator_addr) for n in snapshot.nodes] == [(kept.node_id, "10.0.0.1:9")]


def test_clusters_on_one_database_do_not_see_each_other(url):
    store, _ = opened(url, "a")
    store.put_node(node(), urgent=True)
    store.close()
    other, snapshot = opened(url, "b")
    other.close()
    assert snapshot.nodes == []


def test_request_ids_never_repeat_across_routers_and_restarts(url, monkeypatch):
    monkeypatch.setattr(store_module, "LEASE", 8)
    seen: list[int] = []
    for _ in range(3):
        a, b = opened(url)[0], opened(url)[0]
        seen += [store.request_ids.next() for store in (a, b) for _ in range(5)]
        a.close(), b.close()
    assert len(set(seen)) == len(seen) == 30 and min(seen) >= 1


def test_a_lease_is_renewed_before_it_runs_out(url, monkeypatch):
    monkeypatch.setattr(store_module, "LEASE", 8)
    store, _ = opened(url)
    renewed = threading.Event()
    add = store.request_ids.add
    monkeypatch.setattr(store.request_ids, "add", lambda ids: (add(ids), renewed.set()))
    first = [store.request_ids.next() for _ in range(5)]
    assert renewed.wait(10)
    rest = [store.request_ids.next() for _ in range(5)]
    store.close()
    assert first + rest == list(range(1, 11))


def test_ids_start_again_at_1_after_the_last(url):
    store, _ = opened(url)
    store.close()
    execute(url, f"UPDATE ksana_lab_counter SET value = {MAX_REQUEST_ID - 1} WHERE name = 'request_id'")
    again, _ = opened(url)
    ids = [again.request_ids.next() for _ in range(2)]
    again.close()
    assert ids == [MAX_REQUEST_ID - 1, MAX_REQUEST_ID]
    after, _ = opened(url)
    assert after.request_ids.next() == 1
    after.close()


def test_running_out_of_ids_is_an_error_not_a_wait():
    asked = []
    ids = RequestIds(lambda: asked.append(1))
    ids.add(range(7, 8))
    assert ids.next() == 7
    with pytest.raises(ServiceUnavailable):
        ids.next()
    assert asked == [1]


def test_a_database_that_cannot_be_written_is_reported_and_caught_up_with(url, monkeypatch):
    monkeypatch.setattr(store_module, "RETRY_S", 0.02)
    store, _ = opened(url)
    execute(url, "ALTER TABLE ksana_lab_node RENAME TO elsewhere")
    failed, ok = threading.Event(), threading.Event()
    on_failed, on_ok = store._failed, store._succeeded
    store._failed = lambda *a, **more: (on_failed(*a, **more), failed.set())
    store._succeeded = lambda: (on_ok(), ok.set())
    store.put_node(node(), urgent=True)
    assert failed.wait(10) and "ksana_lab_node" in store.error and "INSERT" not in store.error
    execute(url, "ALTER TABLE elsewhere RENAME TO ksana_lab_node")
    assert ok.wait(10) and store.error is None
    store.close()
    assert [n.node_id for n in opened(url)[1].nodes] == ["id-10.0.0.1:1"]


def test_a_row_that_the_database_rejects_is_left_out_alone(url, caplog):
    store, _ = opened(url)
    good, bad = node("10.0.0.1:1"), node("10.0.0.2:1")
    bad.world_size = 2**63
    for n in (bad, good):
        store.put_node(n, urgent=False)
    store.close()
    again, snapshot = opened(url)
    again.close()
    assert [n.node_id for n in snapshot.nodes] == [good.node_id] and store.error is None
    assert caplog.text.count("rejects a row") == 1


def test_a_rejected_row_is_named_once_however_often_it_comes(url, caplog):
    store, _ = opened(url)
    bad = node()
    bad.hostname = "\ud800"
    for _ in range(3):
        store.put_node(bad, urgent=False)
        store._write(store._dirty)
    store.close()
    assert caplog.text.count("rejects a row") == 1


def test_ids_are_leased_while_rows_cannot_be_written(url, monkeypatch):
    monkeypatch.setattr(store_module, "LEASE", 8)
    monkeypatch.setattr(store_module, "RETRY_S", 0.02)
    store, _ = opened(url)
    renewed, add = threading.Event(), store.request_ids.add
    monkeypatch.setattr(store.request_ids, "add", lambda ids: (add(ids), renewed.set()))
    execute(url, "ALTER TABLE ksana_lab_node RENAME TO elsewhere")
    store.put_node(node(), urgent=True)
    first = [store.request_ids.next() for _ in range(5)]
    assert renewed.wait(10)
    assert first + [store.request_ids.next() for _ in range(5)] == list(range(1, 11))
    store.close()
    execute(url, "ALTER TABLE elsewhere RENAME TO ksana_lab_node")


def test_whatever_goes_wrong_in_a_write_is_told_and_tried_again(url, monkeypatch):
    monkeypatch.setattr(store_module, "RETRY_S", 0.02)
    store, _ = opened(url)
    failed, ok, on_failed, on_ok, replace = threading.Event(), threading.Event(), store._failed, store._succeeded, store._replace
    store._failed = lambda *a, **more: (on_failed(*a, **more), failed.set())
    store._succeeded = lambda: (on_ok(), ok.set())
    store._replace = lambda dirty: replace(dirty) if failed.is_set() else [].pop()
    store.put_node(node(), urgent=True)
    assert failed.wait(10) and ok.wait(10) and store.error is None
    store.close()
    assert [n.node_id for n in opened(url)[1].nodes] == ["id-10.0.0.1:1"]


def test_a_database_that_cannot_be_opened_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="cannot be used"):
        Store(f"sqlite:///{tmp_path}/file/router.db", "c").open()
    with pytest.raises(ConfigError, match="cannot be used") as error:
        Store("nonsense+driver://root:secret@h/db", "c").open()
    assert "secret" not in str(error.value)


def test_another_schema_version_is_refused_with_advice(url):
    opened(url)[0].close()
    execute(url, "UPDATE ksana_lab_counter SET value = 99 WHERE name = 'schema_version'")
    with pytest.raises(ConfigError, match="schema version 99"):
        Store(url, "c").open()


def test_close_may_be_called_twice(url):
    store, _ = opened(url)
    store.close()
    store.close()
