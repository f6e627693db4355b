"""Canonical packing: every code survives, the bytes are those of the bit stream, and bad codes are refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmq.errors import ShapeError, UsageError
from llmq.numerics.packing import pack_codes, unpack_codes


def codes_of(n: int, k: int, bits: int, *, signed: bool, seed: int = 0) -> torch.Tensor:
    low = -(1 << (bits - 1)) if signed else 0
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(low, low + (1 << bits), (n, k), generator=generator)
    return codes.to(torch.int8 if signed else torch.uint8)


@settings(max_examples=150, deadline=None)
@given(n=st.integers(0, 4), k=st.integers(0, 70), bits=st.integers(2, 8), signed=st.booleans(), seed=st.integers(0, 1000))
def test_round_trip(n, k, bits, signed, seed):
    codes = codes_of(n, k, bits, signed=signed, seed=seed)
    packed = pack_codes(codes, bits, signed=signed)
    assert packed.shape == (n, -(-k * bits // 8))
    assert packed.dtype == (torch.int8 if signed and bits == 8 else torch.uint8)
    back = unpack_codes(packed, bits, k, signed=signed)
    assert back.dtype == codes.dtype
    assert torch.equal(back, codes)


@pytest.mark.parametrize("bits", range(2, 8))
def test_bytes_are_the_bit_stream_least_significant_bit_first(bits):
    codes = codes_of(3, 13, bits, signed=True)
    for row, packed in zip(codes.tolist(), pack_codes(codes, bits, signed=True).tolist(), strict=True):
        stream = sum((code + (1 << (bits - 1))) << (index * bits) for index, code in enumerate(row))
        assert bytes(packed) == stream.to_bytes(-(-13 * bits // 8), "little")


def test_two_nibbles_a_byte_low_first():
    assert pack_codes(torch.tensor([[1, 2, 15]], dtype=torch.uint8), 4, signed=False).tolist() == [[0x21, 0x0F]]
    assert pack_codes(torch.tensor([[-8, 7]], dtype=torch.int8), 4, signed=True).tolist() == [[0xF0]]


def test_strided_codes_pack_the_same():
    codes = codes_of(20, 24, 3, signed=False)
    assert torch.equal(pack_codes(codes.T, 3, signed=False), pack_codes(codes.T.contiguous(), 3, signed=False))


def test_refusals_say_what_was_wrong():
    with pytest.raises(UsageError, match=r"4-bit codes lie in \[0, 15\], got values from 0 to 16"):
        pack_codes(torch.tensor([[0, 16]], dtype=torch.uint8), 4, signed=False)
    with pytest.raises(UsageError, match=r"3-bit codes lie in \[-4, 3\]"):
        pack_codes(torch.tensor([[-5, 0]], dtype=torch.int8), 3, signed=True)
    with pytest.raises(UsageError, match=r"must be torch\.int8, got torch\.uint8"):
        pack_codes(torch.zeros(1, 2, dtype=torch.uint8), 4, signed=True)
    with pytest.raises(UsageError, match="2 to 8 bits, got 9"):
        pack_codes(torch.zeros(1, 2, dtype=torch.uint8), 9, signed=False)
    with pytest.raises(ShapeError, match="must be a matrix"):
        pack_codes(torch.zeros(4, dtype=torch.uint8), 4, signed=False)
    with pytest.raises(ShapeError, match="a row of 9 codes of 4 bits takes 5 bytes, got 4"):
        unpack_codes(torch.zeros(1, 4, dtype=torch.uint8), 4, 9, signed=False)
