"""Token embedding and output head, both shared out over ranks by rows of the vocabulary.

A vocabulary that the ranks do not divide is rounded up; the rows beyond its end stay zero and are cut from the logits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ksana_lab.layers.few_rows import Chosen
from ksana_lab.layers.linear import linear, new_weight
from ksana_lab.layers.piece import Piece
from ksana_lab.layers.tp import TPGroup


class VocabRows(nn.Module):
    """This rank's rows [start, start + local_rows) of a [vocab, hidden] matrix."""

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        tp: TPGroup,
        dtype: torch.dtype,
        device: torch.device,
        tied_to: nn.Parameter | None = None,
    ) -> None:
        super().__init__()
        self.tp = tp
        self.vocab_size = vocab_size
        local_rows = -(-vocab_size // tp.size)
        self.start = tp.rank * local_rows
        self.weight = tied_to if tied_to is not None else new_weight(local_rows, hidden_size, dtype=dtype, device=device)
        self.num_real_rows = max(0, min(local_rows, vocab_size - self.start))
        self.weight[self.num_real_rows :].zero_()

    def pieces(self, prefix: str) -> Iterator[Piece]:
        full_shape = (self.vocab_size, self.weight.shape[1])
        yield Piece(f"{prefix}.weight", self.weight[: self.num_real_rows], full_shape, 0, self.start)


class VocabEmbedding(VocabRows):
    def forward(self, token_ids: Tensor) -> Tensor:
        """token_ids [T] int64 -> [T, hidden]."""
        if self.tp.size == 1:
            return F.embedding(token_ids, self.weight)
        local = token_ids - self.start
        is_elsewhere = (local < 0) | (local >= self.weight.shape[0])
        rows = F.embedding(local.masked_fill(is_elsewhere, 0), self.weight)
        return self.tp.all_reduce(rows.masked_fill(is_elsewhere.unsqueeze(-1), 0))


class VocabHead(VocabRows):
    own: Chosen | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [S, hidden] -> logits [S, vocab] in the model's dtype, whole on every rank."""
        return self.tp.all_gather(linear(hidden, self.weight, own=self.own))[:, : self.vocab_size]
