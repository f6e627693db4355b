"""How products of stored weights and 16-bit activations are cut, for `weight_only_int8` and `weight_only_int4`.

What bounds them. Up to 16 rows, memory: N K bytes of codes (half of it with int4) / bandwidth, read once. An H200 reads
4.3 TB/s only while about 3 MB are under way (bandwidth times 0.7 us), 24 KB a multiprocessor, so each of its 132 multiprocessors
needs several programs, each with several 16-byte loads a thread under way. From some hundred rows on, operations: 2 M N K / peak.

**One row** is no task for tensor cores, which would multiply 15 rows of padding: each thread multiplies its codes by its inputs
in fp32. Threads lie along K, so a thread uses the inputs that it has loaded for every output of its program. The outputs of a
program are as many as leave each multiprocessor a few programs: N alone fills the GPU, and there is nothing to add up in a second
launch, which for the smaller linears of a model would take as long as they do.

**2 rows and more** are products of 16-bit numbers on tensor cores, with the weight as the left operand, y^T = W x^T: it is made
in registers, where it stays, and only x is shared. Codes are whole numbers of at most 8 significant bits, exact in bfloat16 and
float16, and so is each of their products with an input in fp32; a dequantized weight would have to be rounded first. The scale
multiplies the sum of a group, and a zero point the sum of the group's inputs. Tiles of outputs are 64 or 128 wide, too few for a
GPU: with few rows K is cut, too, and `split.add_parts` adds the parts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

LANE_BYTES = 16
"""Bytes that a thread loads at once: the widest load there is."""
FEW_ROWS = 16
"""Up to here one tile holds all rows, and the weights are read once."""

_THREADS = 128
_PROGRAMS = 3  # a multiprocessor
_FEWEST_STEPS = 4  # of a program, else filling its pipeline takes longer than emptying it
_MOST_STAGES = 4


@dataclass(frozen=True, slots=True)
class Gpu:
    """What of a GPU decides the cuts.

    Attributes:
        multiprocessors: how many.
        shared_bytes: the most shared memory of one program.
    """

    multiprocessors: int
    shared_bytes: int


@dataclass(frozen=True, slots=True)
class Launch:
    """How a product is cut, and what its kernel is compiled for.

    Attributes:
        block_m: rows of a tile; 1: the kernel of one row.
        block_n: outputs of a tile.
        block_k: inputs of a step.
        cuts: parts of K, each computed by programs of its own.
        span: inputs of a part, a multiple of `block_k`; the last part may have fewer.
        warps: of a program.
        stages: steps whose loads are under way at once.
    """

    block_m: int
    block_n: int
    block_k: int
    cuts: int
    span: int
    warps: int
    stages: int


def one_row(n: int, k: int, bits: int, gpu: Gpu) -> Launch:
    """Cut a product with one row; a step is a load of `LANE_BYTES` by each of 128 threads for each output, or all of a short row.

    Args:
        n: outputs.
        k: inputs.
        bits: of a code, 4 or 8.
        gpu: where it will run.
    """
    longest = _THREADS * LANE_BYTES * 8 // bits
    block_k = min(longest, max(256, 1 << (k - 1).bit_length()))
    enough = _PROGRAMS * gpu.multiprocessors
    block_n = next((size for size in (8, 4, 2) if n >= enough * size), 1)
    cuts, span = _cut(k, block_k, fewest_steps=1, most=max(1, enough // n) if block_n == 1 else 1)
    return Launch(1, block_n, block_k, cuts, span, warps=4, stages=1)


def rows_by_tiles(rows: int, n: int, k: int, step_k: int, bits: int, gpu: Gpu) -> Launch:
    """Cut a product with several rows.

    Args:
        rows: of x.
        n: outputs.
        k: inputs.
        step_k: inputs of a step, 16 to 128.
        bits: of a code, 4 or 8.
        gpu: where it will run.
    """
    block_m = 16 if rows <= FEW_ROWS else 32 if rows <= 32 else 64 if rows <= 64 else 128
    block_n = 64 if block_m <= 32 else 128
    stage_bytes = block_m * step_k * 2 + block_n * step_k * bits // 8
    stages = max(2, min(_MOST_STAGES, gpu.shared_bytes // stage_bytes - 1))
    tiles = math.ceil(rows / block_m) * math.ceil(n / block_n)
    enough = (_PROGRAMS if rows <= FEW_ROWS else 1) * gpu.multiprocessors
    cuts, span = _cut(k, step_k, _FEWEST_STEPS, most=max(1, round(enough / tiles)))
    return Launch(block_m, block_n, step_k, cuts, span, warps=8 if block_m == 128 else 4, stages=stages)


def _cut(k: int, step: int, fewest_steps: int, most: int) -> tuple[int, int]:
    """Return (cuts, span): at most `most` parts of whole steps, none with fewer than `fewest_steps` but perhaps the last."""
    steps = math.ceil(k / step)
    each = max(fewest_steps, math.ceil(steps / most))
    return math.ceil(steps / each), each * step
