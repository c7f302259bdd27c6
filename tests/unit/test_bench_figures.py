"""One command for all figures: what it runs, what it leaves out, and that it says so."""

import pytest

from ksana_lab.bench import __main__ as bench
from ksana_lab.bench.figures import FIGURES, Figure, chosen, main, make


def test_every_command_is_a_tool_that_exists():
    for figure in FIGURES:
        module, name, *_ = figure.command.split()
        assert module == "ksana_lab.bench" and name in bench.names()


def test_figures_come_in_the_order_asked_for():
    assert [figure.name for figure in chosen("tp2,engine")] == ["tp2", "engine"]
    with pytest.raises(ValueError, match="--only names engines; there are engine, "):
        chosen("engines")


@pytest.mark.parametrize(
    "figure, seconds, why",
    [
        (Figure("x", 2, 10, "this"), 60, "x: needs 2 GPUs, here are 1"),
        (Figure("x", 1, 100, "this"), 40, "x: 40 s were left of 40, it may take 100"),
        (Figure("x", 1, 20, "this --help"), 60, ""),
        (Figure("x", 1, 20, "no_such_module"), 60, "x: ended with status 1; see "),
        (Figure("x", 1, 1, "http.server 0"), 60, "x: took more than 1 s"),
    ],
)
def test_what_gives_no_figures_is_named(figure, seconds, why, tmp_path):
    missing = make([figure], tmp_path / "out", seconds, num_gpus=1)
    assert len(missing) == bool(why) and "".join(missing).startswith(why)
    assert (tmp_path / "out" / "x.log").exists() == ("GPU" not in why and "left" not in why)


def test_without_a_gpu_it_lists_or_refuses(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["--list", "--only", "engine"]) == 0 and "bench engine" in capsys.readouterr().out
    assert main([]) == 2 and "torch finds none" in capsys.readouterr().err
