"""The safetensors container, read by mapping it and written tensor by tensor; neither way holds a second copy.

u64 little-endian: length of the header; the header, JSON: {name: {"dtype", "shape", "data_offsets": [begin, end]}};
then the data, in which the tensors lie without gaps. https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmq.checkpoint.sniff import MAX_HEADER_BYTES
from llmq.checkpoint.source import TensorInfo, known_dtypes
from llmq.errors import CheckpointError

_PREFIX_BYTES = 8
_METADATA = "__metadata__"


class SafetensorsFile:
    """One safetensors file.

    Raises:
        CheckpointError: the file is truncated, or its header damaged; names the tensor where one is concerned.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mapping: mmap.mmap | None = None
        self._data_start, self._header = _read_header(path)
        self._header.pop(_METADATA, None)
        self.entries: Mapping[str, TensorInfo] = {name: self._entry(name, entry) for name, entry in self._header.items()}
        self._check_size()

    def _entry(self, name: str, entry: Any) -> TensorInfo:
        try:
            begin, end = entry["data_offsets"]
            shape = tuple(int(size) for size in entry["shape"])
            dtype = known_dtypes().get(entry["dtype"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the header of {self.path} is damaged at tensor {name}; get the file again.") from error
        if dtype is None:
            raise CheckpointError(f"tensor {name} in {self.path} has dtype {entry['dtype']}, which llmq does not know.")
        info = TensorInfo.of(shape, dtype, self.path)
        if begin < 0:
            raise CheckpointError(f"tensor {name} in {self.path} begins at byte {begin}; get the file again.")
        if end - begin != info.nbytes:
            raise CheckpointError(
                f"tensor {name} in {self.path} has {end - begin} bytes, its shape {list(shape)} in {entry['dtype']} needs "
                f"{info.nbytes}; get the file again."
            )
        return info

    def _check_size(self) -> None:
        held = self.path.stat().st_size - self._data_start
        in_order = sorted(self._header.items(), key=lambda item: item[1]["data_offsets"])
        position = 0
        for name, entry in in_order:
            begin, end = entry["data_offsets"]
            if begin != position:
                raise CheckpointError(f"tensor {name} in {self.path} begins at byte {begin} instead of {position}; get it again.")
            if end > held:
                raise CheckpointError(
                    f"{self.path} is truncated: tensor {name} ends at byte {self._data_start + end}, the file at "
                    f"{self._data_start + held}; get the file again."
                )
            position = end
        if position != held:
            raise CheckpointError(f"{self.path} has {held - position} bytes after its last tensor; get the file again.")

    def read(self, name: str) -> Tensor:
        """See `WeightFile.read`."""
        info = self.entries[name]
        if not info.nbytes:
            return torch.empty(info.shape, dtype=info.dtype)
        offset = self._data_start + self._header[name]["data_offsets"][0]
        if self._mapping is None:
            with self.path.open("rb") as file:
                # copy-on-write, so that torch sees memory it may write to; nobody does, and the file could not change
                self._mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        if offset % info.dtype.itemsize:  # older writers did not pad the header; such a tensor has to be moved
            raw = torch.frombuffer(self._mapping, dtype=torch.uint8, count=info.nbytes, offset=offset)
            return raw.clone().view(info.dtype).view(info.shape)
        count = info.nbytes // info.dtype.itemsize
        return torch.frombuffer(self._mapping, dtype=info.dtype, count=count, offset=offset).view(info.shape)

    def release(self) -> None:
        """See `WeightFile.release`."""
        self._mapping = None


def _read_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Return where the data start, and the header."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_PREFIX_BYTES), "little")
        if length > MAX_HEADER_BYTES or size < _PREFIX_BYTES + length:
            raise CheckpointError(
                f"{path} is truncated: its header needs {_PREFIX_BYTES + length} bytes, the file has {size}; get the file again."
            )
        text = file.read(length)
    try:
        header = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"the header of {path} is not valid JSON; get the file again.") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"the header of {path} is not a JSON object; get the file again.")
    return _PREFIX_BYTES + length, header


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write contiguous tensors into one file; equal tensors make equal bytes.

    The library's own writer first collects all bytes in memory, which doubles a model. Tensors lie by falling element
    size, then by name, so that each is aligned to its elements.
    """
    names = {dtype: name for name, dtype in known_dtypes().items()}
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {_METADATA: {"format": "pt"}}
    position = 0
    for name in order:
        tensor = tensors[name]
        end = position + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _PREFIX_BYTES)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(_PREFIX_BYTES, "little"))
        file.write(text)
        for name in order:
            # one dimension first: a scalar and an empty tensor have no bytes to view otherwise
            flat = tensors[name].detach().cpu().contiguous().reshape(-1)
            file.write(flat.view(torch.uint8).numpy().data)
