"""How much a model stores: counted from the tensors themselves, a shared one once."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmq.benchmark.traffic import stored_bytes
from llmq.ops.tensor import QuantizedTensor


@dataclass(frozen=True, slots=True)
class Size:
    """Stored bytes of all parameters, and bits per weight.

    `matrix_bits_per_weight` is over the quantized linears (over all linears where there is none), scales and
    zero points included; `file_bits_per_weight` over every parameter, embeddings, norms and head included.
    """

    bytes: int
    parameters: int
    matrix_bits_per_weight: float
    file_bits_per_weight: float


def size_of(model: torch.nn.Module) -> Size:
    """Count what `model` stores."""
    seen: set[int] = set()
    total = parameters = 0
    linears: list[tuple[bool, int, int]] = []  # quantized, bytes, elements
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            key = _identity(parameter)
            stored = stored_bytes(parameter)
            if isinstance(module, torch.nn.Linear) and parameter is module.weight:
                linears.append((is_quantized(parameter), stored, parameter.numel()))
            if key not in seen:
                seen.add(key)
                total += stored
                parameters += parameter.numel()
    matrices = [entry for entry in linears if entry[0]] or linears
    elements = sum(entry[2] for entry in matrices)
    return Size(
        bytes=total,
        parameters=parameters,
        matrix_bits_per_weight=8 * sum(entry[1] for entry in matrices) / elements,
        file_bits_per_weight=8 * total / parameters,
    )


def is_quantized(parameter: torch.Tensor) -> bool:
    """Whether a parameter has codes and scales."""
    return isinstance(parameter, QuantizedTensor) and parameter.format.quantized


def _identity(parameter: torch.Tensor) -> int:
    """Equal for parameters that share their storage (a tied head and its embedding)."""
    if isinstance(parameter, QuantizedTensor):
        return int(parameter.stored[0].data_ptr())
    return int(parameter.data_ptr())
