"""BlockWork: one decoder block while its linears are being quantized."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

EMBEDDING, HEAD = "embedding", "head"
"""Names of the parts of a model that are no blocks; a block's is its fully qualified name."""


@dataclass
class BlockWork:
    """What schemes see of a block (or of the head).

    Attributes:
        name: its fully qualified name, such as `model.layers.3`.
        module: a copy in fp32 with plain weights; it may be run and changed, the model's own parameters stay as they are
            until the block is finished.
        linears: those that the scheme quantizes, by their name inside `module`, in the order of their calls.
        groups: names of `linears` that read the same input, in the order of their calls.
        inputs: batches of hidden states [B, T, hidden] that the quantized blocks before produce, bf16 or fp32; they may be
            elsewhere than the block (in host memory), and `run` brings them.
        targets: batches of the original block's output for the original model's inputs; None unless asked for.
        forward: maps (module, hidden states as they are kept) to hidden states in fp32, where the block is.
        fisher: returns H_I [K, K] and H_O [N, N] of one of `linears` as it is now; None unless they were asked for.
    """

    name: str
    module: nn.Module
    linears: dict[str, nn.Linear]
    groups: list[list[str]]
    inputs: Sequence[Tensor]
    targets: Sequence[Tensor] | None
    forward: Callable[[nn.Module, Tensor], Tensor]
    fisher: Callable[[str], tuple[Tensor, Tensor]] | None = None

    def run(self, h: Tensor) -> Tensor:
        """Return the block's output in fp32 for hidden states [B, T, hidden] of anywhere, with `module` as it is now."""
        return self.forward(self.module, h)

    def fqn(self, name: str) -> str:
        """Return the fully qualified name of a linear of `linears`."""
        return f"{self.name}.{name}" if self.name else name
