"""Peak memory of a quantization, from shapes alone.

A run goes through two kinds of peaks: one while windows run through a block and their moments are summed, and one while the
widest linear is quantized. Both lie on top of what a process takes before it reads a weight, and of the hidden states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch

from llmq.algorithms.statistics import Needs
from llmq.calibration.activations import BATCH_TOKENS
from llmq.model.config import LlamaConfig
from llmq.schemes.cover import Decision

_FLOAT, _DOUBLE = torch.float32.itemsize, torch.float64.itemsize
_LIBRARIES = 150_000_000
"""What torch and the BLAS take once they compute (buffers of threads, code that is read), besides what they took when loaded."""
SQUARES = 3
"""fp64 matrices [K, K] that a factorisation holds at once: the damped Hessian, its factor, and the factor in unit form."""
WIDE = 6
"""fp32 copies [N, K] that the search for scales and codes holds at once."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What counts of a linear: rows, columns, and what its scheme gathers."""

    n: int
    k: int
    needs: Needs


def peak_parts(
    config: LlamaConfig, decisions: Sequence[Decision], *, tokens: int, itemsize: int, spilled: bool, source_itemsize: int
) -> dict[str, int]:
    """Predict what the peak is made of.

    Args:
        config: the model.
        decisions: what is to become of every parameter.
        tokens: calibration tokens; 0 where none are needed.
        itemsize: bytes of an element of the hidden states.
        spilled: whether those are on disk.
        source_itemsize: bytes of an element of the weights as they are read.

    Returns:
        Bytes by what they are for; their sum is the peak.
    """
    shapes = [
        Shape(decision.parameter.shape[0], decision.parameter.shape[1], decision.scheme.needs)
        for decision in decisions
        if decision.scheme is not None and decision.linear is not None
    ]
    blocks = max(1, config.num_layers)
    inside = [shape for shape in shapes if shape.n != config.vocab_size]
    block = sum(shape.n * shape.k for shape in inside) // blocks
    table = config.vocab_size * config.hidden_size * source_itemsize
    parts = {"the program and its libraries": psutil.Process().memory_info().rss + _LIBRARIES}
    if not tokens:
        largest = max((shape.n * shape.k for shape in shapes), default=0)
        parts["a block as it is read, and as it is stored"] = max(block * source_itemsize + block, table)
        parts["fp32 copies of the largest weight"] = WIDE * _FLOAT * largest
        return parts
    needs = Needs.NONE
    for shape in shapes:
        needs |= shape.needs
    streams = 2 if needs & (Needs.UPSTREAM | Needs.TARGETS) else 1
    if not spilled:
        parts["hidden states of the calibration windows"] = streams * tokens * config.hidden_size * itemsize
    parts["a block as it is read, and in fp32"] = max(block * (source_itemsize + _FLOAT), table)
    widths = {config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim}
    squares = sorted((k * k for k in (config.hidden_size, *widths)), reverse=True)[:4]
    kinds = 2 if Needs.UPSTREAM in needs else 1
    moments = kinds * _FLOAT * sum(squares)
    batch = BATCH_TOKENS * _FLOAT * (4 * config.hidden_size + 3 * config.intermediate_size)
    widest = max(shape.k for shape in inside) if inside else 0
    rows = max((shape.n for shape in inside if shape.k == widest), default=0)
    factors = SQUARES * _DOUBLE * widest * widest + _FLOAT * widest * widest * kinds + WIDE * _FLOAT * rows * widest
    if Needs.FISHER in needs:
        factors += _FLOAT * widest * widest + 2 * _FLOAT * rows * rows
    running = moments + batch
    choosing = factors + _FLOAT * kinds * widest * widest
    what = "second moments and a batch on its way" if running > choosing else "the widest linear: factors, scales and codes"
    parts[what] = max(running, choosing)
    return parts
