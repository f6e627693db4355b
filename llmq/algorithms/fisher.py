"""Kronecker factors of a linear's Fisher information (YAQA: Tseng et al., arXiv:2505.22988, section 3, sketch A).

How much the model's output distribution changes when one weight W [N, K] becomes W + E is, to second order,

    KL = vec(E)^T F vec(E) / 2,    F = E[vec(G) vec(G)^T],    G = dl/dW,

with l the cross-entropy of labels that are drawn from the model's own distribution. With a token's input x [1, K] and the
gradient g = dl/dy [1, N] of the linear's output, and tokens taken as independent, F is the mean over tokens of
(g^T g) (x) (x^T x). Its nearest Kronecker product H_O (x) H_I comes from power iteration, which starts with the identity:

    H_I <- mean (g H_O g^T) x^T x / |H_O|_F^2,    H_O <- mean (x H_I x^T) g^T g / |H_I|_F^2.

The products of both updates have the wrong size, so it is set at the end: H_O gets a mean diagonal of 1, and H_I the trace that
gives the product the trace of F, mean |x|^2 |g|^2. Then tr(H_O E H_I E^T) / 2 estimates nats per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PANEL = 1024
"""Rows of a sum that one matrix product brings up to date; of each panel, only what is right of the sum's diagonal."""


def sample_labels(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Draw a label from softmax(logits) for each row, by the inverse of its cumulative distribution in fp64.

    Args:
        logits: [R, V], floating point.
        uniforms: [R] fp64 in [0, 1), on the same device; the same numbers give the same labels, however rows are batched.

    Returns:
        [R] int64.
    """
    cumulative = logits.double().softmax(-1).cumsum_(-1)
    # the last entry is 1 up to rounding; scaled by it, no uniform falls behind the end
    labels = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)
    return labels[:, 0].clamp_max_(logits.shape[-1] - 1)


def window_uniforms(seed: int, window: int, length: int) -> Tensor:
    """Return the uniforms [length] fp64 of a window's labels: those of window 7 do not depend on who has windows 0 to 6."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + window) % (1 << 63))
    return torch.rand(length, dtype=torch.float64, generator=generator)


def add_weighted_(total: Tensor, rows: Tensor, weights: Tensor) -> None:
    """Add sum over r of weights[r] rows[r]^T rows[r] to the upper triangle of `total`; what is below it is left undefined.

    Args:
        total: [K, K], changed.
        rows: [R, K] of the same dtype.
        weights: [R], not negative.
    """
    scaled = rows * weights[:, None]
    for start in range(0, rows.shape[1], PANEL):
        stop = min(start + PANEL, rows.shape[1])
        total[start:stop, start:].addmm_(rows[:, start:stop].t(), scaled[:, start:])


def mirror_(total: Tensor) -> Tensor:
    """Copy the upper triangle of `total` [K, K] to the lower one, and return it."""
    total.triu_()
    return total.add_(total.triu(1).t())


@dataclass(frozen=True, slots=True)
class FisherFactors:
    """H_I [K, K] and H_O [N, N], symmetric and positive semidefinite; see the module for their size."""

    inputs: Tensor
    outputs: Tensor


class FactorSums:
    """The sums of one round of power iteration for one linear."""

    def __init__(self, shape: tuple[int, int], like: Tensor, before: FisherFactors | None = None) -> None:
        """Start a round.

        Args:
            shape: (N, K) of the weight.
            like: a tensor of the dtype and device to sum in.
            before: the factors of the round before; None: the identity.
        """
        n, k = shape
        self.before = before
        self.inputs = torch.zeros(k, k, dtype=like.dtype, device=like.device)
        self.outputs = torch.zeros(n, n, dtype=like.dtype, device=like.device)
        self.scalars = torch.zeros(2, dtype=torch.float64, device=like.device)
        """Tokens so far, and sum |x|^2 |g|^2."""

    def add(self, x: Tensor, g: Tensor) -> None:
        """Add tokens.

        Args:
            x: [R, K] inputs.
            g: [R, N] gradients of the loss by the outputs.
        """
        x_energy, g_energy = _row_dots(x, x), _row_dots(g, g)
        self.scalars[0] += len(x)
        self.scalars[1] += torch.dot(x_energy.double(), g_energy.double())
        if self.before is None:
            x_weight, g_weight = g_energy, x_energy
        else:  # positive semidefinite factors; rounding may still give a negative number near zero
            x_weight = _row_dots(g @ self.before.outputs, g).clamp_min_(0)
            g_weight = _row_dots(x @ self.before.inputs, x).clamp_min_(0)
        add_weighted_(self.inputs, x, x_weight)
        add_weighted_(self.outputs, g, g_weight)

    def tensors(self) -> tuple[Tensor, ...]:
        """What has to be summed over processes before `finish`."""
        return self.inputs, self.outputs, self.scalars

    def finish(self) -> FisherFactors:
        """Return the factors of this round; the sums are used up."""
        tokens, energy = self.scalars.tolist()
        inputs, outputs = mirror_(self.inputs), mirror_(self.outputs)
        inputs_trace, outputs_trace = inputs.trace().item(), outputs.trace().item()
        if inputs_trace > 0 and outputs_trace > 0:
            n = outputs.shape[0]
            outputs *= n / outputs_trace
            inputs *= energy / tokens / n / inputs_trace
        return FisherFactors(inputs, outputs)


def _row_dots(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1)
