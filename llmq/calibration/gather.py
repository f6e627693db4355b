"""What the linears of one block see: second moments of their inputs, summed over windows and over processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn

from llmq.algorithms.statistics import Needs
from llmq.calibration.hessian import PANEL, Hessian, LinearGroups, inputs_of
from llmq.errors import SchemeError
from llmq.files import trim_heap
from llmq.ranks import Ranks

Run = Callable[[Tensor], Tensor]
"""Maps hidden states, as they are kept, to the block's output in fp32, with the weights that the block has now."""


class Upstream:
    """The running sum of (x_f - x_q)^T x_q; x_f and x_q are the inputs of the same tokens in two runs of a block."""

    def __init__(self) -> None:
        self.sum: Tensor | None = None
        self.original: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Take what the linear reads now, [..., K]: first in the original's run, then in the quantized model's."""
        flat = x.reshape(-1, x.shape[-1]).float()
        if self.original is None:
            self.original = flat
            return
        if self.sum is None:
            self.sum = torch.zeros(flat.shape[1], flat.shape[1], device=flat.device)
        difference = self.original - flat
        for start in range(0, flat.shape[1], PANEL):
            stop = min(start + PANEL, flat.shape[1])
            self.sum[start:stop].addmm_(difference[:, start:stop].t(), flat)
        self.original = None

    def value(self, rows: int) -> Tensor:
        """Return 2/n sum (x_f - x_q)^T x_q over n = `rows`, fp32 [K, K], and forget it."""
        assert self.sum is not None
        whole, self.sum = self.sum.mul_(2 / rows), None
        return whole


class Moments:
    """The sums of one group of linears that read the same input."""

    def __init__(self, needs: Needs) -> None:
        self.hessian = Hessian()
        self.upstream = Upstream() if Needs.UPSTREAM in needs else None

    def reduce(self, ranks: Ranks) -> tuple[Tensor, Tensor | None]:
        """Sum over the processes; return the Hessian and the upstream moment, fp32 [K, K], and forget the sums."""
        sums, rows = self.hessian.sum, self.hessian.rows
        if sums is not None and ranks.size > 1:
            ranks.sum_(sums)
            self.hessian.rows = rows = int(ranks.sum_(torch.tensor([rows])).item())
        upstream = None
        if self.upstream is not None and self.upstream.sum is not None:
            ranks.sum_(self.upstream.sum)
            upstream = self.upstream.value(rows)
            self.upstream = None
        return self.hessian.value(), upstream


def find_groups(linears: dict[str, nn.Linear], run: Run, h: Tensor) -> list[list[str]]:
    """Return the names of the linears that read the same input, in the order of their calls; silent ones are left out."""
    seen = LinearGroups()
    with inputs_of(linears, seen.see):
        run(h)
    return [list(dict.fromkeys(group)) for group in seen.groups]


def gather(
    linears: dict[str, nn.Linear],
    moments: dict[str, Moments],
    run: Run,
    batches: Sequence[tuple[Tensor, Tensor | None]],
    advance: Callable[[int], None],
    outputs: Sequence[Tensor] | None = None,
) -> None:
    """Run all windows through a block, and add what its linears see to the sums.

    Args:
        linears: the linears of the block, by name.
        moments: by the name of each group's first linear, in the order of their calls; what is not asked for is not summed.
        run: the block.
        batches: of hidden states [B, T, hidden] that the quantized blocks before produce, and those of the original model for
            the same windows (None where nobody asks for them).
        advance: hears of each window.
        outputs: batches that are overwritten by the block's output for the original model's hidden states.
    """
    watched = {name: linears[name] for name in moments}
    last = next(reversed(moments), None)
    paired = {name: linears[name] for name, sums in moments.items() if sums.upstream is not None}

    def see_original(name: str, x: Tensor) -> None:
        upstream = moments[name].upstream
        assert upstream is not None  # `paired` has no other
        upstream.add(x)

    def see(name: str, x: Tensor) -> None:
        moments[name].hessian.add(x)
        if name in paired:
            see_original(name, x)
        if name == last:
            raise _AllSeen  # what the block makes of it is not asked for

    for number, (h, original) in enumerate(batches):
        if original is not None and (paired or outputs is not None):
            with inputs_of(paired, see_original):
                out = run(original)
            if outputs is not None:
                outputs[number].copy_(out)
        if watched:
            with inputs_of(watched, see), suppress(_AllSeen):
                run(h)
        advance(len(h))
    trim_heap()


class _AllSeen(Exception):  # noqa: N818 - no error: it ends a run that has told all it can
    """The last linear that is watched was called."""


def input_hessians(linears: dict[str, nn.Linear], run: Run, batches: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return H = 2/n sum x^T x of each linear of a block, by its name; those that read the same input share the tensor.

    Args:
        linears: of the block, by name; at least one.
        run: the block.
        batches: hidden states [B, T, hidden] before it.

    Raises:
        SchemeError: a linear does not run, or its inputs are not finite.
    """
    groups = find_groups(linears, run, batches[0][:1])
    silent = linears.keys() - {name for group in groups for name in group}
    if silent:
        raise SchemeError(f"{', '.join(sorted(silent))} did not run when the model did; leave it out with --skip.")
    moments = {group[0]: Moments(Needs.INPUTS) for group in groups}
    gather(linears, moments, run, [(batch, None) for batch in batches], lambda _: None)
    found = {}
    for group in groups:
        hessian, _ = moments[group[0]].reduce(Ranks())
        if not torch.isfinite(hessian.diagonal()).all():
            raise SchemeError(f"the inputs of {', '.join(group)} are not finite; the model is broken already.")
        found.update(dict.fromkeys(group, hessian))
    return found
