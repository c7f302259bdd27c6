"""``python -m ksana_lab.bench NAME [options]``: one measuring tool per module of this package, imported only when it is asked for."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import sys
from collections.abc import Sequence

import ksana_lab.bench
from ksana_lab.errors import ConfigError, KsanaLabError


def names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(ksana_lab.bench.__path__) if not module.name.startswith("_"))


def main(argv: Sequence[str]) -> int:
    """Each tool has ``main(argv) -> int``, the exit code; where it raises KsanaLabError there are no figures, and the
    code is 2 for what its user has to change, 1 for the rest."""
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: python -m ksana_lab.bench {{{','.join(names())}}} [options]\n\nNAME --help shows a tool's options.")
        return 0 if argv else 2
    name, *rest = argv
    if name not in names():
        close = difflib.get_close_matches(name, names(), 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        print(f"error: {name} is not one of {', '.join(names())}{hint}", file=sys.stderr)
        return 2
    try:
        return importlib.import_module(f"ksana_lab.bench.{name}").main(rest)
    except KsanaLabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
