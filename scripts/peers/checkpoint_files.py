"""Read a Hugging Face checkpoint of safetensors files with numpy alone, for environments that have no torch.

bfloat16 has no numpy type, so such tensors are the upper halves of float32 numbers, as uint16.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

NUMPY_TYPES: dict[str, np.dtype[Any]] = {"BF16": np.dtype("<u2"), "F16": np.dtype("<f2"), "F32": np.dtype("<f4")}


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def tensors(folder: Path) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yield (name, safetensors type, array) of every tensor; arrays are mapped, not read."""
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        data = np.memmap(path, dtype=np.uint8, mode="r", offset=8 + length)
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if entry["dtype"] not in NUMPY_TYPES:
                raise ValueError(f"{name} is stored as {entry['dtype']}; allowed are {', '.join(NUMPY_TYPES)}.")
            begin, end = entry["data_offsets"]
            yield name, entry["dtype"], data[begin:end].view(NUMPY_TYPES[entry["dtype"]]).reshape(entry["shape"])


def to_float32(kind: str, array: np.ndarray) -> np.ndarray:
    """Return the numbers of a tensor as float32."""
    if kind == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


def to_bf16(kind: str, array: np.ndarray) -> np.ndarray:
    """Return the numbers of a tensor rounded to bfloat16 (ties to even), as uint16."""
    if kind == "BF16":
        return array
    bits = to_float32(kind, array).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
