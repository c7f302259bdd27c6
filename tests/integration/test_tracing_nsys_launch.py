"""nsys that trips while it launches a node, played by a script."""

import stat
import sys

import pytest
from helpers_checkpoint import checkpoint

from ksana_lab.cluster.local import Cluster
from ksana_lab.errors import ProcessDied
from ksana_lab.notebook.session import config

# Notes what it is asked for; the first launch fails the way 2022.4 does, the next runs the command.
NSYS = """#!/bin/sh
echo "$1 $2" >> "$0.asked"
[ "$1" = launch ] || exit 0
[ "$(grep -c launch "$0.asked")" = 1 ] && { echo "std::exception::what: NotFoundException"; exit 1; }
shift 3
exec "$@"
"""
NODE = (sys.executable, "-c", "import time; time.sleep(60)")  # serves nothing


@pytest.mark.integration
def test_a_launch_that_nsys_gave_up_is_tried_again_and_leaves_no_session(tmp_path, monkeypatch):
    nsys = tmp_path / "nsys"
    nsys.write_text(NSYS)
    nsys.chmod(nsys.stat().st_mode | stat.S_IXUSR)
    (tmp_path / "host-linux-x64").mkdir()
    (tmp_path / "host-linux-x64" / "QdstrmImporter").touch()
    monkeypatch.setenv("KSANA_LAB_NSYS", str(nsys))
    cluster = Cluster.from_yaml(
        config("mixed_cpu.yaml"), model_dir=checkpoint("qwen3"), overrides=["start_timeout_s=0.5"],
        trace_dir=tmp_path / "trace", nsys=True, program=NODE,
    )  # fmt: skip
    with pytest.raises(ProcessDied, match=r"no complete cluster within"):
        cluster.start()
    asked = [line.split(" ") for line in (tmp_path / "nsys.asked").read_text().splitlines()]
    first, second = (session for what, session in asked if what == "launch")
    assert first != second
    assert [session.partition("=")[2] for what, session in asked if what == "shutdown"] == [s.partition("=")[2] for s in (first, second)]
