"""Fills a model's memory from safetensors files. A rank reads only its own share; every expected tensor must come exactly once.

Knows names, shapes and slices (``Piece``), nothing of layers."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ksana_lab.errors import CheckpointError
from ksana_lab.layers.piece import Piece
from ksana_lab.models.config import weight_files

_MAX_READERS = 8  # one file each; reading is bound by page faults and copies, which release the GIL


def load_weights(pieces: Iterable[Piece], model_dir: str | os.PathLike[str], *, ignored: frozenset[str] = frozenset()) -> None:
    """Fill every piece, converting to its dtype. ``ignored``: names that may be in the files and are not wanted.

    Raises CheckpointError that names tensors which are missing, unexpected, doubled or of another shape, and files that cannot be read."""
    wanted = {piece.name: piece for piece in pieces}
    files = weight_files(model_dir)
    with ThreadPoolExecutor(max_workers=min(_MAX_READERS, max(1, len(files)))) as pool:
        names = [name for found in pool.map(lambda file: _read_file(file, wanted), files) for name in found]
    found = set(names)
    missing = wanted.keys() - found
    unexpected = {name for name in found - wanted.keys() - ignored if not name.endswith("rotary_emb.inv_freq")}
    doubled = {name for name in found if names.count(name) > 1} if len(names) != len(found) else set()
    for what, culprits in (("lacks", missing), ("has unexpected", unexpected), ("holds twice", doubled)):
        if culprits:
            raise CheckpointError(f"{model_dir} {what} {len(culprits)} tensors: {_listing(culprits)}")


def _read_file(path: Path, wanted: dict[str, Piece]) -> list[str]:
    """Fill the pieces that this file holds; returns all names in it."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = list(file.keys())
            for name in names:
                if name in wanted:
                    _fill(wanted[name], file, path)
            return names
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size if path.exists() else 0
        hint = "; it looks like a git-lfs pointer, fetch the real file (git lfs pull)" if size < 1024 else "; is the download complete?"
        raise CheckpointError(f"{path} ({size} bytes) cannot be read as safetensors: {error}{hint}") from None


def _fill(piece: Piece, file: Any, path: Path) -> None:
    view = file.get_slice(piece.name)
    shape = tuple(view.get_shape())
    if shape != piece.full_shape:
        raise CheckpointError(f"{path}: {piece.name} has shape {list(shape)}, config.json implies {list(piece.full_shape)}")
    # A slice of everything would be a copy of what can be mapped.
    piece.fill(lambda index: file.get_tensor(piece.name) if _is_all(index, shape) else view[index])


def _is_all(index: tuple[slice, ...], shape: tuple[int, ...]) -> bool:
    return all(part.indices(size) == (0, size, 1) for part, size in zip(index, shape, strict=True))


def _listing(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:5]) + (f" and {len(ordered) - 5} more" if len(ordered) > 5 else "")
