"""An evaluation whose windows are shared by several processes, and whose figures are those of one, bit for bit.

Each process takes consecutive batches, cut as one process cuts them, so every forward pass is the same one. What comes out is
gathered token by token, and only then summed, by every process and in the text's order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmq.evaluation.protocols import Window
from llmq.ranks import Ranks


class SharedBatches:
    """Which batches this process runs, and how results of all come together.

    Attributes:
        indices: of the batches of this process.
        windows: how many they hold.
    """

    def __init__(self, batches: Sequence[Sequence[Window]], ranks: Ranks) -> None:
        self._ranks = ranks
        self._rows = [sum(window.targets.numel() for window in batch) for batch in batches]
        self.indices = ranks.share(len(batches))
        self.windows = sum(len(batches[index]) for index in self.indices)

    def joined(self, mine: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Return the values of all scored tokens [n], in the text's order, from those of this process's batches.

        They travel as their bytes: nothing is rounded.
        """
        full = torch.empty(sum(self._rows), dtype=dtype)
        own = self._slice(self._ranks.rank)
        full[own] = torch.cat(list(mine)) if mine else torch.empty(0, dtype=dtype)
        for rank in range(self._ranks.size):
            part = self._slice(rank)
            if part.stop > part.start:
                self._ranks.tensor_from(full[part].view(torch.uint8), rank)
        return full

    def word(self, mine: str) -> str:
        """Return what every process that had a batch says alike, such as a dtype's name."""
        words: list[str] = self._ranks.gather_json(mine)
        return next(word for word in words if word)

    def all(self, *, mine: bool) -> bool:
        """Return whether it is so in every process."""
        return all(self._ranks.gather_json(mine))

    def _slice(self, rank: int) -> slice:
        batches = self._ranks.share_of(rank, len(self._rows))
        return slice(sum(self._rows[: batches.start]), sum(self._rows[: batches.stop]))
