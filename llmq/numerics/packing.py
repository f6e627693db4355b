"""Canonical packing: how codes of 2 to 8 bits lie in bytes, on every machine.

A row of K codes is one bit stream, least significant bit first: code k occupies bits `k * bits` to `(k + 1) * bits - 1`, and
stream bit i is bit `i % 8` of byte `i // 8`. A row is padded with zero bits to a whole byte, so rows start on bytes. Signed
codes are stored with `2**(bits - 1)` added. Eight-bit signed codes are the exception: they stay int8, which every int8 kernel
reads in place. Only bytes are ever addressed, so neither endianness nor instruction set can change the result.
"""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor
from torch.nn import functional as F

from llmq.errors import ShapeError, UsageError


def pack_codes(codes: Tensor, bits: int, *, signed: bool) -> Tensor:
    """Pack codes densely along K.

    Args:
        codes: [N, K], int8 when `signed`, uint8 otherwise.
        bits: 2 to 8.
        signed: whether codes lie in [-2**(bits-1), 2**(bits-1) - 1] or in [0, 2**bits - 1].

    Returns:
        uint8 [N, ceil(K * bits / 8)]; int8 [N, K] for signed 8-bit codes.

    Raises:
        UsageError: for a wrong dtype, or a code outside the range (it would overwrite its neighbours).
        ShapeError: when `codes` is not a matrix.
    """
    _check_bits(bits)
    _check_matrix(codes, torch.int8 if signed else torch.uint8, "codes")
    if bits == 8:
        return codes.contiguous()
    bias = 1 << (bits - 1) if signed else 0
    low, high = -bias, (1 << bits) - 1 - bias
    if codes.numel():
        smallest, largest = (int(end) for end in codes.aminmax())
        if smallest < low or largest > high:
            raise UsageError(f"{bits}-bit codes lie in [{low}, {high}], got values from {smallest} to {largest}.")
    n, k = codes.shape
    unit_codes, unit_bytes = _unit(bits)
    stored = (codes + bias).to(torch.uint8) if signed else codes
    count = -(-k // unit_codes)
    stored = F.pad(stored, (0, -k % unit_codes)).reshape(n, count, unit_codes)
    packed = torch.zeros(n, count, unit_bytes, dtype=torch.uint8, device=codes.device)
    for j in range(unit_codes):
        byte, offset = divmod(j * bits, 8)
        packed[:, :, byte] |= stored[:, :, j] << offset  # bits above the eighth fall off: they belong to the next byte
        if offset + bits > 8:
            packed[:, :, byte + 1] |= stored[:, :, j] >> (8 - offset)
    return packed.reshape(n, count * unit_bytes)[:, : _row_bytes(k, bits)].contiguous()


def unpack_codes(packed: Tensor, bits: int, k: int, *, signed: bool) -> Tensor:
    """Inverse of `pack_codes`.

    Args:
        packed: uint8 [N, ceil(k * bits / 8)]; int8 [N, k] for signed 8-bit codes.
        bits: 2 to 8.
        k: codes a row.
        signed: see `pack_codes`.

    Returns:
        int8 (signed) or uint8 codes [N, k].

    Raises:
        UsageError: for a wrong dtype.
        ShapeError: when `packed` has not the width of rows of `k` codes.
    """
    _check_bits(bits)
    _check_matrix(packed, torch.int8 if signed and bits == 8 else torch.uint8, "packed codes")
    if packed.shape[1] != _row_bytes(k, bits):
        raise ShapeError(f"a row of {k} codes of {bits} bits takes {_row_bytes(k, bits)} bytes, got {packed.shape[1]}.")
    if bits == 8:
        return packed
    n = packed.shape[0]
    unit_codes, unit_bytes = _unit(bits)
    count = -(-packed.shape[1] // unit_bytes)
    units = F.pad(packed, (0, -packed.shape[1] % unit_bytes)).reshape(n, count, unit_bytes)
    columns = []
    for j in range(unit_codes):
        byte, offset = divmod(j * bits, 8)
        value = units[:, :, byte] >> offset
        if offset + bits > 8:
            value = value | (units[:, :, byte + 1] << (8 - offset))
        columns.append(value & ((1 << bits) - 1))
    codes = torch.stack(columns, dim=-1).reshape(n, count * unit_codes)[:, :k]
    return codes.to(torch.int8) - (1 << (bits - 1)) if signed else codes.contiguous()


def _unit(bits: int) -> tuple[int, int]:
    """Smallest run of codes that fills whole bytes: (codes, bytes)."""
    return 8 // gcd(bits, 8), bits // gcd(bits, 8)


def _row_bytes(k: int, bits: int) -> int:
    return -(-k * bits // 8)


def _check_bits(bits: int) -> None:
    if not 2 <= bits <= 8:
        raise UsageError(f"codes have 2 to 8 bits, got {bits}.")


def _check_matrix(tensor: Tensor, dtype: torch.dtype, name: str) -> None:
    if tensor.dtype != dtype:
        raise UsageError(f"{name} must be {dtype}, got {tensor.dtype}.")
    if tensor.dim() != 2:
        raise ShapeError(f"{name} must be a matrix [N, K], got shape {list(tensor.shape)}.")
