"""Every kernel against the exact result, at the sizes, strides and values where kernels break."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from op_cases import DTYPES, FORMATS, assert_kernel_close, case_of, make_weight, make_x

from llmq.numerics.weight import same_bits
from llmq.ops.aten import AtenIntMm, int8_dynamic
from llmq.ops.cuda import CudaIntMm
from llmq.ops.float8 import ScaledMm
from llmq.ops.schema import Case, Kernel, Support
from llmq.ops.table import KERNELS

ROWS = (0, 1, 2, 3, 7, 8, 16, 17, 64)
OUTPUTS = (1, 48, 50, 256)
INPUTS = (32, 96, 192, 320, 1088)  # odd multiples of 32 and 64, one beyond what one exact fp32 sum can hold


class AnyCpuIntMm(AtenIntMm):
    """`aten-int-mm` where it is exact but slow: what it computes does not depend on VNNI."""

    name = "aten-int-mm without its speed guard"

    def supports(self, case: Case) -> Support:
        return int8_dynamic(case)


class PaddedIntMm(CudaIntMm):
    """`cuda-int-mm` on the CPU: its padding is what there is to test."""

    name = "cuda-int-mm on the CPU"

    def supports(self, case: Case) -> Support:
        return self.fits(Case(case.format, case.n, case.k, case.dtype, "cuda"))


class CpuScaledMm(ScaledMm):
    """`scaled-mm` on the CPU: torch multiplies float8 there too, in fp32, and slower than `dequant-gemm`."""

    name = "scaled-mm on the CPU"

    def supports(self, case: Case) -> Support:
        return self.fits(Case(case.format, case.n, case.k, case.dtype, "cuda"))


UNDER_TEST: dict[str, Kernel] = {k.name: k for k in (*KERNELS, AnyCpuIntMm(), PaddedIntMm(), CpuScaledMm())}
PAIRS = [
    (kernel, format_name, dtype)
    for kernel in UNDER_TEST
    for format_name in FORMATS
    for dtype in DTYPES
    if any(UNDER_TEST[kernel].supports(case_of(FORMATS[format_name], n, 320, dtype)).ok for n in (48, 256))
]
BFLOAT16 = [pair for pair in PAIRS if pair[2] == torch.bfloat16]
DENSE = {"torch-dense", "dense-upcast", "dequant-gemm", "reference"}  # torch splits their sums by threads where it pleases
OWN_SUMS = [pair for pair in BFLOAT16 if pair[0] not in DENSE]


def over(pairs):
    """Run a test for (kernel, format, dtype) triples; dtypes that take no path of their own beside bf16 among the slow ones."""
    parameters = [
        pytest.param(
            (UNDER_TEST[kernel], FORMATS[name], dtype),
            id=f"{kernel}-{name}-{str(dtype).removeprefix('torch.')}",
            marks=pytest.mark.slow if dtype != torch.bfloat16 and (kernel, name, torch.bfloat16) in PAIRS else (),
        )
        for kernel, name, dtype in pairs
    ]
    return pytest.mark.parametrize("pair", parameters)


def shapes(kernel: Kernel, format_, dtype):
    """(n, k, case) of the shapes the kernel says it supports: every other pair, so that each n and each k has its turns."""
    for n, k in itertools.islice(itertools.product(OUTPUTS, INPUTS), 0, None, 2):
        case = case_of(format_, n, k, dtype)
        if format_.weight.misfit(n, k) is None and kernel.supports(case).ok:
            yield n, k, case


@over(PAIRS)
def test_close_to_the_exact_result(pair):
    kernel, format_, dtype = pair
    supported = list(shapes(kernel, format_, dtype))
    assert supported
    for n, k, case in supported:
        weight = make_weight(format_, n, k, seed=n)
        packed = kernel.prepack(weight)
        bias = torch.randn(n, generator=torch.Generator().manual_seed(k)).to(dtype)
        for m in ROWS if (n, k) in {(48, 320), (256, 320)} else (3,):
            x = make_x(m, k, dtype)
            for term in (None, bias) if m < 4 else (None,):
                assert_kernel_close(kernel.linear(x, packed, term, case), x, weight, term, case, kernel.name)


@over(BFLOAT16)
def test_unpacks_bit_for_bit(pair):
    kernel, format_, dtype = pair
    for n, k, case in list(shapes(kernel, format_, dtype))[::3]:
        weight = make_weight(format_, n, k, seed=k)
        back = kernel.unpack(kernel.prepack(weight), case)
        for ours, theirs in zip(weight.tensors, back.tensors, strict=True):
            assert same_bits(ours, theirs)


@over(BFLOAT16)
def test_scales_may_be_any_finite_numbers(pair):
    """What a fit may find: negative, zero, subnormal, and none that is ordinary beside them."""
    kernel, format_, dtype = pair
    k, case, weight, _ = one_shape(kernel, format_, dtype)
    if weight.scale is None:
        return
    generator = torch.Generator().manual_seed(5)
    numbers = torch.randn(weight.scale.shape, generator=generator)
    least = 2.0 ** (-24 if weight.scale.dtype == torch.float16 else -133)
    for scale in (-numbers.abs(), torch.zeros_like(numbers), numbers * 2 * least, numbers.sign() * least, numbers * 2.0**14):
        changed = replace(weight, scale=scale.to(weight.scale.dtype))
        packed = kernel.prepack(changed)
        for ours, theirs in zip(changed.tensors, kernel.unpack(packed, case).tensors, strict=True):
            assert same_bits(ours, theirs)
        for x in (make_x(3, k, dtype), 2.0**40 * make_x(3, k, dtype), 2.0**-100 * make_x(2, k, dtype)):
            assert_kernel_close(kernel.linear(x, packed, None, case), x, changed, None, case, kernel.name)


def one_shape(kernel, format_, dtype):
    """A supported shape, its weight, packed."""
    n, k, case = max(shapes(kernel, format_, dtype), key=lambda shape: (shape[0] == 48, shape[1] == 320))
    weight = make_weight(format_, n, k)
    return k, case, weight, kernel.prepack(weight)


@over(BFLOAT16)
def test_strides_and_addresses_do_not_matter(pair):
    kernel, format_, dtype = pair
    k, case, weight, packed = one_shape(kernel, format_, dtype)
    x = make_x(17, k, dtype)
    offset = torch.empty(17 * k + 3, dtype=dtype)[3:].view(17, k).copy_(x)  # starts 3 elements after an aligned address
    wide = torch.full((17, k + 5), 9.0, dtype=dtype)
    wide[:, 5:] = x
    transposed = x.T.contiguous().T
    every_second = torch.full((34, k), 9.0, dtype=dtype)
    every_second[::2] = x
    for name, view in (("offset", offset), ("columns", wide[:, 5:]), ("transposed", transposed), ("rows", every_second[::2])):
        assert torch.equal(view, x)
        assert_kernel_close(kernel.linear(view, packed, None, case), x, weight, None, case, f"{kernel.name}, {name}")


@over(BFLOAT16)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_in_its_row_and_is_not_hidden(pair, value):
    kernel, format_, dtype = pair
    k, case, weight, packed = one_shape(kernel, format_, dtype)
    x = make_x(5, k, dtype)
    poisoned = x.clone()
    poisoned[3, k // 2] = value
    y = kernel.linear(poisoned, packed, None, case)
    touched = weight.dequantize()[:, k // 2] != 0  # 0 * inf is NaN, but a kernel may also skip a weight of zero
    assert not bool(y[3, touched].isfinite().any())
    kept = [0, 1, 2, 4]
    assert_kernel_close(y[kept], x[kept], weight, None, case, kernel.name)


@over(OWN_SUMS)
def test_threads_do_not_change_a_bit(pair):
    kernel, format_, dtype = pair
    k, case, _, packed = one_shape(kernel, format_, dtype)
    results = []
    for count in (1, 2):  # the room's fixture restores it
        torch.set_num_threads(count)
        results.append([kernel.linear(make_x(m, k, dtype), packed, None, case) for m in (1, 5, 64)])
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_every_kernel_for_cpus_is_under_test():
    covered = {kernel for kernel, _, _ in PAIRS}
    for kernel in KERNELS:
        assert kernel.name in covered or not kernel.available().ok, kernel.name
    assert {"reference", "torch-dense", "dequant-gemm", AnyCpuIntMm.name, PaddedIntMm.name, CpuScaledMm.name} <= covered
