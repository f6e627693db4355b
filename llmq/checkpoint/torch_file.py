"""torch's zip container (`torch.save` since torch 1.6), opened without executing the pickle in it."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint

from llmq.checkpoint.source import TensorInfo
from llmq.errors import CheckpointError


class NotTensorsError(CheckpointError):
    """A torch file that is whole, but holds something else than named tensors (an optimizer's state, arguments …)."""


class TorchFile:
    """One torch zip file that holds a flat dictionary of tensors.

    torch reads the pickle with `weights_only=True`, an interpreter that knows tensors and containers and refuses any other
    name, and maps the data (`mmap=True`).

    Raises:
        CheckpointError: the file is truncated or damaged, or holds other Python objects than tensors by name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._state: Mapping[str, Tensor] | None = _load(path)
        self.entries: Mapping[str, TensorInfo] = {
            name: TensorInfo.of(tuple(tensor.shape), tensor.dtype, path) for name, tensor in self._state.items()
        }

    def read(self, name: str) -> Tensor:
        """See `WeightFile.read`."""
        if self._state is None:
            self._state = _load(self.path)
        return self._state[name]

    def same_memory(self, a: str, b: str) -> bool:
        """Return whether two names are one tensor in the file: how torch stores tied weights."""
        first, second = self.read(a), self.read(b)
        return first.data_ptr() == second.data_ptr() and first.shape == second.shape

    def release(self) -> None:
        """See `WeightFile.release`."""
        self._state = None


def _load(path: Path) -> dict[str, Tensor]:
    if not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path} is truncated: it begins as a zip file and has no directory at its end; get it again.")
    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise NotTensorsError(
            f"{path} holds Python objects that are not tensors{_named_globals(path)}, and llmq executes no pickle; save the "
            "state dict alone, or convert it to safetensors."
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path} is damaged: torch cannot read it ({reason}); get the file again.") from error
    if not isinstance(state, dict) or not state:
        raise NotTensorsError(f"{path} holds {_described(state)} instead of tensors by name; save the model's state dict alone.")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor) or value.layout != torch.strided:
            raise NotTensorsError(
                f"{path} holds {_described(value)} under {name!r} instead of a plain tensor; save the model's state dict alone."
            )
    return {name: tensor.detach() for name, tensor in state.items()}


def _named_globals(path: Path) -> str:
    """Return ' (module.name …)' for what the pickle wanted to call."""
    try:
        names = sorted(get_unsafe_globals_in_checkpoint(str(path)))
    except (RuntimeError, ValueError, pickle.UnpicklingError):  # a pickle too odd even to be listed; it is refused anyway
        return ""
    return f" ({', '.join(names[:3])}{' …' if len(names) > 3 else ''})" if names else ""


def _described(value: object) -> str:
    if isinstance(value, dict):
        return f"a dictionary of {len(value)} entries"
    return f"an object of type {type(value).__name__}"
