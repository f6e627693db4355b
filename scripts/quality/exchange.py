"""What a maker hands over: the weights that its quantized model computes with, as plain floats, and what they cost.

A maker gets one JSON file, its order, and fills one folder:

    weights.safetensors   float32, by the names of the Hugging Face checkpoint: every matrix of the blocks, and the norms
    made.json             bits per weight as stored, seconds, versions, settings, notes

Standard library and numpy alone: this file runs in every tool's own environment.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

WEIGHTS, MADE = "weights.safetensors", "made.json"
ARTEFACT = "artefact"
"""Folder that llmq's maker leaves besides: what `llmq quantize` wrote."""


@dataclass(frozen=True)
class Order:
    """What is to be made.

    Attributes:
        checkpoint: folder in Hugging Face layout; the original.
        windows: calibration windows, safetensors with `tokens` int32 [windows, length]; None for what needs none.
        out: folder to fill; it is there and empty.
        threads: of the tool.
        settings: the tool's own, from the catalogue.
    """

    checkpoint: str
    windows: str | None
    out: str
    threads: int
    settings: dict[str, Any]

    @classmethod
    def read(cls) -> Order:
        """Read the order that the command line names."""
        return cls(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))

    def write(self, path: Path) -> None:
        """Write it for a maker."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")


@dataclass
class Cost:
    """Time of one quantization, without imports and loading."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    """Of all threads: on a machine that does other things too, this says more than the time on the wall."""


@dataclass
class Made:
    """What a maker says of its weights.

    Attributes:
        bits_per_weight: all that the tool stores for the quantized matrices (codes, scales, zeros) over their elements.
        cost: time of the quantization.
        versions: of the packages that did it.
        settings: what was resolved beyond the order.
        notes: what a reader has to know.
    """

    bits_per_weight: float
    cost: Cost
    versions: dict[str, str]
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> Made:
        """Read what a maker left in its folder."""
        data = json.loads((folder / MADE).read_text(encoding="utf-8"))
        return cls(**{**data, "cost": Cost(**data["cost"])})


@contextmanager
def timed() -> Iterator[Cost]:
    """Measure the block."""
    cost = Cost()
    begin, cpu = time.perf_counter(), time.process_time()
    yield cost
    cost.seconds, cost.cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu


def versions_of(*packages: str) -> dict[str, str]:
    """Return the installed versions."""
    return {name: version(name) for name in packages}


def group_bits(bits: int, group_size: int, *, scale: int = 16, zero: int = 0) -> float:
    """Return the bits per weight of codes in groups that each have a scale and, where asymmetric, a zero point."""
    return bits + (scale + zero) / group_size


def hand_over(folder: Path, weights: Mapping[str, np.ndarray], made: Made) -> None:
    """Fill a maker's folder; made.json comes last, so that a folder that has it is whole."""
    save_float32(folder / WEIGHTS, weights)
    (folder / MADE).write_text(json.dumps(asdict(made)), encoding="utf-8")


def save_float32(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write a safetensors file of float32 tensors."""
    arrays = {name: np.ascontiguousarray(array, dtype="<f4") for name, array in tensors.items()}
    header: dict[str, Any] = {}
    offset = 0
    for name, array in arrays.items():
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for array in arrays.values():
            file.write(array.tobytes())
        file.flush()
        os.fsync(file.fileno())


def is_handed_over(name: str) -> bool:
    """Whether a parameter of a Llama is in the blocks or a norm: embeddings and head stay untouched, and are not handed over."""
    return name.startswith("model.layers.") or name == "model.norm.weight"
