"""RouterConfig: our fields, the reference's config.ini, and what is refused."""

import re

import pytest

from ksana_lab.config.router import RouterConfig
from ksana_lab.config.validate import build
from ksana_lab.errors import ConfigError

INI = """[general]
log_level = info
cluster_name = lab
heartbeat_timeout_seconds = 7
[name_service]
name_service_provider = name_service.auto_provider
namespace = Production
"""


def test_the_router_listens_on_the_loopback_unless_told():
    config = RouterConfig()
    assert (config.host, config.port, config.workers, config.heartbeat_timeout_s) == ("127.0.0.1", 9080, 1, 60.0)


def test_port_auto_is_a_free_one():
    assert RouterConfig(port="auto").port == 0


def test_the_default_database_differs_by_cluster_and_port(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    urls = {RouterConfig(port=p, cluster_name=c).resolved_database_url for p in (1, 2) for c in "ab"}
    assert len(urls) == 4 and all(url.startswith(f"sqlite:///{tmp_path}") for url in urls)


def test_the_references_ini_is_read_and_options_win(tmp_path):
    path = tmp_path / "config.ini"
    path.write_text(INI + "[database]\nstorage_mode = sqlite\nsqlite_path = ./db/x.db\n")
    config, warnings = RouterConfig.from_file(path, {"port": 9999})
    assert (config.log_level, config.cluster_name, config.heartbeat_timeout_s, config.port) == ("INFO", "lab", 7.0, 9999)
    assert config.database_url == f"sqlite:///{tmp_path}/db/x.db" and warnings == []


def test_mysql_of_the_ini_becomes_a_url_whose_password_is_never_shown(tmp_path):
    path = tmp_path / "config.ini"
    path.write_text("[database]\nstorage_mode = mysql\nuser = me\npassword = p@ss/1\nhost = db\n")
    config, _ = RouterConfig.from_file(path)
    assert config.database_url == "mysql+pymysql://me:p%40ss%2F1@db:3306/ksana_llm_router?charset=utf8mb4"
    assert "p%40ss" not in str(config) and config.describe()["database_url"].startswith("mysql+pymysql://me:***@db")


def test_a_name_service_that_is_not_ours_is_answered_with_a_warning(tmp_path):
    path = tmp_path / "config.ini"
    path.write_text(INI.replace("auto_provider", "polaris_provider"))
    _, warnings = RouterConfig.from_file(path)
    assert len(warnings) == 1 and "name_service_provider" in warnings[0] and "not implemented" in warnings[0]


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("[name_service]\nnamespace = Test\nprefill_service = p\ndecode_service = d\n", ["namespace", "prefill_service", "decode_service"]),
        ("[database]\nautocommit = false\n", ["autocommit"]),
        ("[database]\nstorage_mode = sqlite\nhost = db\npassword = secret\n", ["host", "password"]),
        ("[database]\nstorage_mode = mysql\nhost = db\npassword = secret\nsqlite_path = ./x.db\n", ["sqlite_path"]),
        ("[database]\nhost = localhost\nport = 3306\nuser = root\npassword =\nautocommit = True\nsqlite_path = x.db\n", []),
    ],
)
def test_each_key_without_effect_is_answered_with_a_warning(tmp_path, text, keys):
    (tmp_path / "config.ini").write_text(text)
    _, warnings = RouterConfig.from_file(tmp_path / "config.ini")
    assert [re.search(r"\.(\w+)(=\S+)? has no effect: ", warning)[1] for warning in warnings] == keys
    assert "secret" not in "".join(warnings)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[generl]\na = 1\n", "generl.*did you mean general"),
        ("[general]\nheartbeat_timeout = 3\n", "general.heartbeat_timeout .*did you mean heartbeat_timeout_seconds"),
        ("[general]\nheartbeat_timeout_seconds = soon\n", "heartbeat_timeout_s: .*'soon'"),
        ("[database]\nstorage_mode = redis\n", "sqlite or mysql, got 'redis'"),
        ("no section\n", "not a valid ini"),
    ],
)
def test_a_bad_ini_names_the_key(tmp_path, text, message):
    (tmp_path / "config.ini").write_text(text)
    with pytest.raises(ConfigError, match=message):
        RouterConfig.from_file(tmp_path / "config.ini")


def test_yaml_with_our_own_fields(tmp_path):
    (tmp_path / "r.yaml").write_text("policy: random\nport: auto\n")
    config, _ = RouterConfig.from_file(tmp_path / "r.yaml")
    assert (config.policy, config.port) == ("random", 0)


def test_all_faults_are_named_at_once_with_the_nearest_key():
    with pytest.raises(ConfigError) as caught:
        build(RouterConfig, {"polcy": "random", "port": 70000}, "r.yaml")
    assert "polcy is not a known key; did you mean policy?" in str(caught.value)
    assert "port: " in str(caught.value) and "got 70000" in str(caught.value) and str(caught.value).startswith("r.yaml: ")
