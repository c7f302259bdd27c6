"""The startup guide quotes what the program prints: both languages, word for word."""

import logging
import re
from pathlib import Path

import pytest

from ksana_lab import launch
from ksana_lab.config.environment import REQUIRED_VARIABLES
from ksana_lab.config.ksana_yaml import translate
from ksana_lab.config.yaml_file import parse_scalar

ROOT = Path(__file__).parents[2]
GUIDES = [ROOT / "docs" / name for name in ("pd_startup.md", "pd_startup.zh.md")]
PREFILL = ["prefill", "--config_file", "configs/prefill_cpu.yaml", "--port", "8067"]

# What is run -> how the guide's line begins.
CASES = {
    "another port": (["prefill", "--config_file", "configs/prefill_cpu.yaml", "--port", "8068"], "error: --port 8068 differs"),
    "unfilled": (["prefill", "--config_file", "configs/prefill.yaml", "--port", "8067"], "error: connector.router_addr: {ROUTER_IP}"),
    "no model": ([*PREFILL, "--model-dir", "/models/none"], "error: model_spec.base_model.model_dir /models/none"),
    "unknown key": ([*PREFILL, "--set", "batch_scheduler.max_stepp_tokens=7"], "error: --set batch_scheduler.max_stepp_tokens"),
    "wrong role": (["decode", "--config_file", "configs/prefill_cpu.yaml"], "error: the command is decode"),
    "no file": (["prefill", "--config_file", "configs/nowhere.yaml"], "error: cannot read configs/nowhere.yaml"),
}


def quoted(guide: Path, beginning: str) -> str:
    lines = [line for line in guide.read_text(encoding="utf-8").splitlines() if line.startswith(beginning)]
    assert len(lines) == 1, f"{guide.name} quotes {beginning!r} {len(lines)} times"
    return lines[0]


@pytest.fixture(autouse=True)
def _by_hand(monkeypatch):
    monkeypatch.chdir(ROOT)
    for name, value in REQUIRED_VARIABLES.items():
        monkeypatch.setenv(name, value)
    handlers = logging.getLogger().handlers[:]
    yield
    logging.getLogger().handlers[:] = handlers  # launch.main sets the process's log up


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.name)
@pytest.mark.parametrize("argv, beginning", CASES.values(), ids=CASES)
def test_the_guide_quotes_the_error(guide, argv, beginning, capsys):
    assert launch.main(argv) == 2
    printed = re.sub(r"^error: ", "", capsys.readouterr().err, flags=re.M).splitlines()  # several faults share one "error:"
    assert quoted(guide, beginning).removeprefix("error: ") in printed


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.name)
def test_the_guide_quotes_the_missing_variable(guide, capsys, monkeypatch):
    for name in REQUIRED_VARIABLES:
        monkeypatch.delenv(name)
    assert launch.main(PREFILL) == 2
    assert capsys.readouterr().err.strip() == quoted(guide, "error: environment variable")


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.name)
def test_the_guide_lists_the_defaults_that_differ(guide):
    rows = re.findall(r"^\| `([a-z_]+\.[a-z_]+)` \| ([\d.]+) \| ([\d.]+) \|$", guide.read_text(encoding="utf-8"), re.M)
    assert [key.partition(".")[2] for key, _, _ in rows[:3]] == [
        "launch_block_threshold", "swapin_block_threshold", "reserved_device_memory_ratio",
    ]  # fmt: skip
    bare = {"model_spec": {"base_model": {"model_dir": "/m"}}, "ksana_lab": {"device": "auto"}}
    for key, theirs, ours in rows:
        sections = {key.partition(".")[0]: {key.partition(".")[2]: parse_scalar(ours)}}
        assert theirs != ours and translate({**bare, "setting": sections}, "f", num_gpus=1) == translate(bare, "f", num_gpus=1), key


def test_both_guides_show_the_same_commands_and_messages():
    blocks = [re.findall(r"```(?:bash|text)\n(.*?)```", guide.read_text(encoding="utf-8"), re.S) for guide in GUIDES]
    bare = [[re.sub(r"\s+#.*", "", block) for block in of_guide] for of_guide in blocks]  # comments are translated
    assert bare[0] == bare[1]
