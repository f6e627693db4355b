"""Peak memory of a quantization, from shapes alone: what the code holds at once in each phase, and the phase that holds most.

    opening     the embedding or the head, and what was written of it, which is read again to compare
    factors     a block runs backwards, for schemes that need Fisher factors
    gathering   windows run through a block in fp32, and the moments of its linears are summed
    rounding    one linear after another, with the moments of those that are still to come
    result      the floats of the finished artefact, which are checked when it is opened

A peak is the process's largest resident set: mapped files count as far as they are in memory. The counts below say what the
code does; whoever changes how many copies of a matrix there are changes them here (docs/scale.md compares them with runs).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import isqrt
from typing import Literal

import psutil
import torch

from llmq.algorithms.refit import chunk_rows
from llmq.algorithms.statistics import Needs
from llmq.calibration.activations import BATCH_TOKENS
from llmq.model.config import LlamaConfig
from llmq.numerics.grid import FloatGrid, IntGrid, LinearFormat
from llmq.numerics.weight import QuantizedWeight
from llmq.schemes.apply import quantized_parameter
from llmq.schemes.cover import Decision

_FLOAT, _DOUBLE = torch.float32.itemsize, torch.float64.itemsize
_BLOCKS = "model.layers."
_STATES = "hidden states of the calibration windows"
_READS = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1, "gate_proj": 2, "up_proj": 2, "down_proj": 3}
"""Which linears of a block read the same input, in the order of their calls."""
_ROUNDING_BYTES = 21
"""Bytes for each weight while its codes are swept: target, codes, numbers and errors in fp32, and two copies on their way."""
_TWO_SIDED_BYTES = 32
"""The same while both sides are coupled: target, scales, zero points, errors, their products and codes in fp32, all padded."""
_NEAREST_BYTES = 3
"""Bytes for each weight when it is only rounded: codes as bytes, while they are packed. The rest goes by panels of rows."""
_HEAP_BYTES = 40_000_000
"""What the heap keeps between its phases, and file pages of libraries that come later; measured, see docs/scale.md."""
_WORKSPACE_BYTES = 50_000_000
"""What the matrix libraries keep for products and factorisations, whatever their size; measured."""
_SYSTEMS = 4
"""Copies of the systems of equations [rows, P, P] in fp64 while they are solved."""


@dataclass(frozen=True, slots=True)
class Windows:
    """What a quantization calibrates with.

    Attributes:
        tokens: of all windows; 0 where none are needed.
        length: of a window.
        itemsize: bytes of an element of the hidden states.
        place: where those are: with the model, in the host's memory, or on disk.
    """

    tokens: int
    length: int
    itemsize: int
    place: Literal["model", "host", "disk"]

    @property
    def batch(self) -> int:
        """Tokens that go through a block at once."""
        return min(self.tokens, max(1, BATCH_TOKENS // max(1, self.length)) * self.length)

    def states(self, hidden_size: int, places: Collection[str]) -> int:
        """Return the bytes of one set of hidden states, where they are in one of these places."""
        return self.tokens * hidden_size * self.itemsize if self.place in places else 0


@dataclass(frozen=True, slots=True)
class _Linear:
    """What counts of a linear that is quantized."""

    n: int
    k: int
    group: int
    needs: Needs
    stored: int
    unknowns: int

    @property
    def kinds(self) -> int:
        """Moments [K, K] that are summed for it."""
        return (1 if self.needs else 0) + (1 if Needs.UPSTREAM in self.needs else 0)


@dataclass(frozen=True, slots=True)
class _Part:
    """A block or the head: all its elements, and its linears that are quantized, in the order in which that happens."""

    elements: int
    linears: tuple[_Linear, ...]
    is_head: bool

    def moments(self, after: int = -1) -> int:
        """Return the bytes of the sums for groups of linears from the one with number `after` on."""
        kinds = {linear.group: linear.kinds * linear.k**2 for linear in self.linears if linear.group >= after}
        return _FLOAT * sum(kinds.values())


def peak_parts(
    config: LlamaConfig, decisions: Sequence[Decision], windows: Windows, *, source_itemsize: int, on_device: bool = False
) -> dict[str, int]:
    """Predict what the peak of the host's memory is made of.

    Args:
        config: the model.
        decisions: what is to become of every parameter.
        windows: what it calibrates with.
        source_itemsize: bytes of an element of the weights as they are read.
        on_device: blocks are quantized elsewhere, see `device_parts`: here they are only read and written.

    Returns:
        Bytes by what they are for; their sum is the peak.
    """
    calibrated = windows.tokens and not on_device
    kept = _HEAP_BYTES + (_WORKSPACE_BYTES if calibrated else 0)
    common = {"the program and its libraries": _resident(), "free heap and workspaces of the matrix libraries": kept}
    phases = [_opening(config, source_itemsize), _result(config, decisions, source_itemsize)]
    if on_device:
        read = {"a block as it is read": max(part.elements for part in _parts(decisions)) * source_itemsize}
        phases += [held | read for held, _ in _walk(config, decisions, windows, source_itemsize, ("host",))]
    else:
        phases += [held | phase for held, phase in _walk(config, decisions, windows, source_itemsize, ("model", "host"))]
    return common | _largest(phases)


def _resident() -> int:
    """Return what this process takes when it has loaded what a quantization loads before and while it reads weights.

    torch brings parts of itself with the first parameter of another kind of tensor, with the first product and factorisation.
    """
    quantized_parameter(QuantizedWeight.from_float(torch.ones(8, 8)), LinearFormat(FloatGrid("float32")), torch.float32)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        matrix = torch.eye(256, dtype=dtype)
        _ = matrix @ matrix
    torch.linalg.cholesky_ex(torch.eye(256, dtype=torch.float64))
    return int(psutil.Process().memory_info().rss)


def device_parts(config: LlamaConfig, decisions: Sequence[Decision], windows: Windows, *, source_itemsize: int) -> dict[str, int]:
    """Predict what the peak of a GPU's memory is made of, beside what its libraries take; see `peak_parts`."""
    table = {"the embedding or the head as it is read": config.vocab_size * config.hidden_size * source_itemsize}
    walk = [held | phase for held, phase in _walk(config, decisions, windows, source_itemsize, ("model",))]
    streams = {what: nbytes for phase in walk for what, nbytes in phase.items() if what == _STATES}
    return _largest([table | streams, *walk])


def _largest(phases: Iterable[Mapping[str, int]]) -> dict[str, int]:
    largest = max(phases, key=lambda phase: sum(phase.values()))
    return {what: nbytes for what, nbytes in largest.items() if nbytes}


def _walk(
    config: LlamaConfig, decisions: Sequence[Decision], windows: Windows, itemsize: int, places: Collection[str]
) -> Iterator[tuple[dict[str, int], dict[str, int]]]:
    """Yield, of every phase of Fisher factors and of the walk, what hidden states in these places take, and all else."""
    parts = _parts(decisions)
    needs = Needs.NONE
    for part in parts:
        for linear in part.linears:
            needs |= linear.needs
    states = windows.states(config.hidden_size, places)
    if Needs.FISHER in needs:
        every = 1 if windows.place == "disk" else max(1, isqrt(config.num_layers))
        kept = -(-config.num_layers // every) + every
        held = {"hidden states and gradients of the calibration windows": (kept + 1) * states}
        for phase in _fisher_phases(config, parts, windows, itemsize):
            yield held, phase
    streams = 2 if needs & (Needs.UPSTREAM | Needs.TARGETS) else 1
    held = {_STATES: streams * states} if states else {}
    for part in parts:
        for phase in _part_phases(config, part, windows, itemsize):
            yield held, phase


def _parts(decisions: Sequence[Decision]) -> list[_Part]:
    found = []
    for name, own in groupby(decisions, key=lambda decision: _part_name(decision.fqn)):
        members = list(own)
        linears = [_linear(decision) for decision in members if decision.scheme is not None and decision.linear is not None]
        elements = sum(decision.parameter.numel() for decision in members)
        found.append(_Part(elements, tuple(sorted(linears, key=lambda linear: linear.group)), not name))
    return found


def _part_name(fqn: str) -> str:
    """Return the block that a parameter belongs to; empty for the embedding and the head."""
    return fqn.removeprefix(_BLOCKS).partition(".")[0] if fqn.startswith(_BLOCKS) else ""


def _linear(decision: Decision) -> _Linear:
    assert decision.scheme is not None
    n, k = decision.parameter.shape
    group = _READS.get(decision.fqn.rpartition(".")[2], len(_READS))
    grid = decision.format.weight if decision.format is not None else None
    unknowns = grid.groups(k) * (2 if grid.zero_point == "float" else 1) if isinstance(grid, IntGrid) else 0
    return _Linear(n, k, group, decision.scheme.needs, _stored_bytes(decision), unknowns)


def _stored_bytes(decision: Decision) -> int:
    n, k = decision.parameter.shape
    form = decision.format
    return int(n * k * form.weight.bits_per_weight(k) / 8) if form is not None and form.quantized else 0


def _opening(config: LlamaConfig, itemsize: int) -> dict[str, int]:
    table = config.vocab_size * config.hidden_size * itemsize
    return {"the embedding as it is read, and as it is compared with what was written": 2 * table}


def _result(config: LlamaConfig, decisions: Iterable[Decision], itemsize: int) -> dict[str, int]:
    """Scales, zero points and all that is not quantized: codes are only mapped."""
    floats = 0
    for decision in decisions:
        form = decision.format
        if form is not None and form.quantized:
            n, k = decision.parameter.shape
            bits = form.weight.bits if isinstance(form.weight, IntGrid) else 8
            floats += _stored_bytes(decision) - n * -(-k * bits // 8)
        elif not (config.tie_word_embeddings and decision.fqn == "lm_head"):
            floats += decision.parameter.numel() * itemsize
    return {"the floats of the result, when it is opened": floats}


def _part_phases(config: LlamaConfig, part: _Part, windows: Windows, itemsize: int) -> Iterator[dict[str, int]]:
    read = {"a block as it is read": part.elements * itemsize}
    if part.is_head:
        if not part.linears:
            return
        read = {"the head as it is read": config.vocab_size * config.hidden_size * itemsize}
    copied = {"the block in fp32": part.elements * _FLOAT} if windows.tokens and not part.is_head else {}
    kept = 0
    if windows.tokens:
        yield read | copied | {"second moments": part.moments(), "a batch on its way": _batch(config, part, windows)}
    for linear in part.linears:
        kept += linear.stored
        own = {"codes and scales so far": kept, "the linear on its way": _rounding(linear)}
        own |= {"second moments": part.moments(linear.group)} if linear.needs else {}
        yield read | copied | own


def _batch(config: LlamaConfig, part: _Part, windows: Windows) -> int:
    """The residual stream and its copies, three tensors of the MLP, and inputs in the original's run that wait for the other."""
    upstream = {linear.group: linear.k for linear in part.linears if Needs.UPSTREAM in linear.needs}
    width = 4 * config.hidden_size + 3 * config.intermediate_size + sum(upstream.values())
    return windows.batch * _FLOAT * width


def _rounding(linear: _Linear) -> int:
    """The largest of: H_I in fp64 with its factor; factor, damped H_I and its copies, with what a sweep or a re-fit holds.

    The copies are those for matrix products: in bf16, and once more in the library's own order, or in fp32 in the latter alone.
    """
    n, k = linear.n, linear.k
    if not linear.needs:
        return _NEAREST_BYTES * n * k
    if Needs.INPUTS not in linear.needs:
        return _NEAREST_BYTES * n * k
    square, other = _FLOAT * k * k, 0
    bytes_each = _ROUNDING_BYTES
    if Needs.FISHER in linear.needs:
        # the factors as they are read, and of H_O its own factor and the damped one too
        other = square + 3 * _FLOAT * n * n
        bytes_each = _TWO_SIDED_BYTES
    rows = min(n, chunk_rows(k, linear.unknowns))
    systems = rows * (_SYSTEMS * _DOUBLE * linear.unknowns**2 + 4 * _FLOAT * k)
    refitting = 13 * n * k + systems
    factorising = _DOUBLE * k * k + square
    return other + max(factorising, 3 * square + max(bytes_each * n * k, refitting))


def _fisher_phases(config: LlamaConfig, parts: Sequence[_Part], windows: Windows, itemsize: int) -> Iterator[dict[str, int]]:
    """Of a block with its gradients, and of the head."""
    table = config.vocab_size * config.hidden_size
    yield {"the head as it is read, and in fp32": table * (itemsize + _FLOAT), "logits": 4 * _FLOAT << 22}
    width = 11 * config.hidden_size + 7 * config.intermediate_size
    for part in parts:
        needy = [linear for linear in part.linears if Needs.FISHER in linear.needs]
        if needy and not part.is_head:
            yield {
                "a block as it is read": part.elements * itemsize,
                "the block in fp32": part.elements * _FLOAT,
                "Fisher factors": _FLOAT * sum(linear.k**2 + linear.n**2 for linear in needy),
                "a batch on its way, with its graph": windows.batch * _FLOAT * width,
            }
