"""One checkpoint tensor's way into one rank's memory. Layers name their pieces; a loader, or a maker of random weights, fills them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Piece:
    name: str  # in the checkpoint
    dest: Tensor  # this rank's share: a parameter, or a view into a fused one
    full_shape: tuple[int, ...]  # of the checkpoint's tensor
    dim: int = 0  # along which the tensor is shared out
    start: int = 0  # where this rank's share begins along ``dim``

    @property
    def index(self) -> tuple[slice, ...]:
        """Which part of the checkpoint's tensor belongs in ``dest``."""
        share = slice(self.start, self.start + self.dest.shape[self.dim])
        return tuple(share if d == self.dim else slice(None) for d in range(len(self.full_shape)))

    def fill(self, read: Callable[[tuple[slice, ...]], Tensor]) -> None:
        """``read`` gives any part of the checkpoint's tensor."""
        self.dest.copy_(read(self.index))
