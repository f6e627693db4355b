"""The fused decode attention in Triton's interpreter, or on a GPU, against fp64 within a bound that rounding explains."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from triton_compile import SHARED_MEMORY, compiled

from llmq.errors import KernelError, LlmqError
from llmq.model.kv_cache import dequantize_int8, quantize_int8
from llmq.ops import triton_support
from llmq.ops.decode_attention import fused_attention, most_tokens, self_test

U = 2.0**-24
EXP2 = 2.0**-22
"""What exp2 may be off by on a GPU, two units in the last place."""
LEFT = {torch.float32: 0.0, torch.bfloat16: 2.0**-17, torch.float16: 2.0**-21}
"""What two summands of a dtype leave of a number, relatively."""


def make(heads, kv_heads, tokens, size, length, *, dtype=torch.bfloat16, batch=1, codes=False):
    """Queries, keys and values, and scales or None; some scores are far above the others."""
    generator = torch.Generator().manual_seed(heads * 1000 + length)
    q = (2 * torch.randn(batch, heads, tokens, size, generator=generator)).to(dtype)
    keys, values = (torch.randn(batch, kv_heads, length, size, generator=generator) for _ in "kv")
    keys[:, :, ::7] *= 3
    values[:, 0] += 1
    if not codes:
        return q, (keys.to(dtype), values.to(dtype)), None
    (keys, key_scales), (values, value_scales) = quantize_int8(keys), quantize_int8(values)
    return q, (keys, values), (key_scales, value_scales)


def numbers(cache, scales):
    """Keys and values in fp64."""
    if scales is None:
        return [part.double() for part in cache]
    return [part.double() * scale.double()[..., None] for part, scale in zip(cache, scales, strict=True)]


def exact(q, cache, scales, start, window, steps):
    """The attention in fp64, and how far rounding may take a kernel from it; `steps`: how often it rescales its sums.

    A score is a dot product of D terms and some scalings; in base 2 its error is at most g A, where A is log2 e / sqrt(D) times
    the sum of magnitudes and g = 2 (D + 8) u, since tensor cores cut where IEEE rounds. Differences of scores are rounded, exp2
    is off by 2 ulp; so is each rescaling of the sums: p is off by the share d at most. So is the sum of all p, hence 2 d. Then
    come the sums over n positions, what the two summands of p leave, and the rounding of the result. Of p, fp16 loses 2**-25.
    """
    keys, values = numbers(cache, scales)
    _, heads, tokens, size = q.shape
    share = heads // keys.shape[1]
    keys, values = (part.repeat_interleave(share, dim=1)[:, :, : start + tokens] for part in (keys, values))
    distance = start + torch.arange(tokens)[:, None] - torch.arange(start + tokens)
    seen = (distance >= 0) & (distance < (window or start + tokens))
    keys, values = (torch.where(seen.any(dim=0)[:, None], part, 0) for part in (keys, values))  # NaN where nobody looks
    weights = (q.double() @ keys.transpose(2, 3) / math.sqrt(size)).masked_fill(~seen, -torch.inf).softmax(dim=-1)
    y = weights @ values
    magnitude = (q.double().abs() @ keys.abs().transpose(2, 3) * (math.log2(math.e) / math.sqrt(size))).amax(dim=-1, keepdim=True)
    g = 2 * (size + 8) * U
    d = math.log(2) * (g + 2 * U) * magnitude + (1 + steps) * (EXP2 + 4 * U * magnitude)
    n = start + tokens
    relative = 2 * d.expm1() + LEFT[q.dtype if scales is None or q.dtype == torch.float32 else torch.bfloat16] + 6 * (n + 8) * U
    lost = 2.0**-25 * (seen.double() @ values.abs()) if q.dtype == torch.float16 else 0
    half = torch.finfo(q.dtype).eps / 2
    return y, relative * (weights @ values.abs()) + half * 1.01 * y.abs() + lost + torch.finfo(q.dtype).tiny


def check(device, inputs, start, window=None, how=None):
    q, cache, scales = inputs
    kernels = triton_support.load("attention")
    cache = tuple(part.to(device) for part in cache)
    position = torch.tensor([start], device=device)
    given = None if scales is None else tuple(scale.to(device) for scale in scales)
    if how is None:
        how = kernels.launch(q.shape[0] * cache[0].shape[1], cache[0].shape[2], q.shape[3] * cache[0].itemsize, 132)
        y = torch.ops.llmq.decode_attention(q.to(device), *cache, *(given or (None, None)), position, window).cpu()
    else:
        y = kernels.decode(q.to(device), cache, given, position, window, how).cpu()
    steps = -(-(start + q.shape[2]) // how.block_s) + 1
    expected, bound = exact(q, inputs[1], scales, start, window, steps)
    assert y.shape == q.shape
    assert y.dtype == q.dtype
    outside = ~((y.double() - expected).abs() <= bound)
    assert not outside.any(), (
        f"{outside.double().mean():.1%} outside, by up to {((y.double() - expected).abs() / bound).max():.3g}"
    )
    assert bound.max() < 0.05 * expected.abs().max() + 0.01  # a bound that hides nothing
    return y


@pytest.mark.parametrize("context", [1, 15, 16, 17, 100])
@pytest.mark.parametrize("ratio", [1, 2, 4, 7])
def test_one_token(triton_device, context, ratio):
    dtype = torch.float32 if ratio == 2 else torch.bfloat16
    how = triton_support.load("attention").Launch(4, 16, 4, 2)
    check(triton_device, make(2 * ratio, 2, 1, 64, 112, dtype=dtype, batch=2), context - 1, how=how)


@pytest.mark.parametrize(("tokens", "start"), [(1, 0), (3, 30), (16, 0), (5, 95)])
@pytest.mark.parametrize("window", [None, 1, 7, 50, 1000])
def test_several_tokens_and_windows(triton_device, tokens, start, window):
    how = triton_support.load("attention").Launch(2, 16, 4, 2)
    check(triton_device, make(4, 2, tokens, 16, 100, dtype=torch.float16), start, window, how)


@pytest.mark.parametrize("size", [8, 40, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("codes", [False, True])
def test_heads_of_any_size_in_the_launch_of_the_operator(triton_device, size, dtype, codes):
    check(triton_device, make(4, 2, 1, size, 300, dtype=dtype, codes=codes), 257)


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_codes_are_what_they_mean(triton_device, window, dtype):
    """The cache of codes against the numbers that they mean, in the same kernel; both also against fp64."""
    q, cache, scales = make(6, 2, 2, 32, 90, dtype=dtype, codes=True)
    how = triton_support.load("attention").Launch(2, 16, 4, 2)
    of_codes = check(triton_device, (q, cache, scales), 70, window, how)
    plain = tuple(dequantize_int8(part, scale) for part, scale in zip(cache, scales, strict=True))
    of_numbers = check(triton_device, (q.float(), plain, None), 70, window, how)
    near = (64 if dtype == torch.float32 else 4) * torch.finfo(dtype).eps
    assert torch.allclose(of_codes.float(), of_numbers, rtol=near, atol=near)


@pytest.mark.parametrize("codes", [False, True])
def test_what_nobody_sees_is_not_read(triton_device, codes):
    """Positions before the window and beyond the last token hold NaN; the cache is the first part of a longer one."""
    q, cache, scales = make(4, 2, 1, 32, 200, codes=codes)
    for part in scales or cache:
        part[:, :, 91:] = torch.nan
        part[:, :, : 90 - 40 + 1] = torch.nan
    first = (q, tuple(part[:, :, :120] for part in cache), scales and tuple(part[:, :, :120] for part in scales))
    check(triton_device, first, 90, 40)
    check(triton_device, first, 90, 40, triton_support.load("attention").Launch(8, 16, 4, 2))


def test_large_scores_do_not_overflow(triton_device):
    q, (keys, values), _ = make(2, 1, 1, 64, 80, dtype=torch.float32)
    how = triton_support.load("attention").Launch(4, 16, 4, 2)
    for factor in (40.0, -40.0):
        keys[:, :, 60] = q[:, :1, 0] * factor
        y = (
            triton_support.load("attention")
            .decode(q.to(triton_device), (keys.to(triton_device), values.to(triton_device)), None, torch.tensor([79]), None, how)
            .cpu()
        )
        assert bool(y.isfinite().all())
        if factor > 0:  # that position has all the weight
            assert torch.allclose(y[0, 0, 0], values[0, 0, 60], atol=1e-5)


def test_twice_is_once_and_parts_agree(triton_device):
    kernels = triton_support.load("attention")
    inputs = make(4, 1, 2, 32, 150)
    first = kernels.Launch(1, 16, 4, 2)
    for how in (first, replace(first, parts=2), replace(first, parts=16), replace(first, parts=4, block_s=64)):
        assert torch.equal(check(triton_device, inputs, 140, None, how), check(triton_device, inputs, 140, None, how))


@pytest.mark.parametrize("codes", [False, True])
def test_the_operator_is_one_for_torch(triton_device, codes):
    q, cache, scales = make(4, 2, 2, 32, 60, codes=codes)
    tensors = [tensor.to(triton_device) for tensor in (q, *cache, *(scales or ()))]
    arguments = (*tensors, *(() if codes else (None, None)), torch.tensor([30], device=triton_device), 16)
    torch.library.opcheck(torch.ops.llmq.decode_attention.default, arguments)


def test_bad_calls_are_refused_in_a_sentence(triton_device):
    q, (keys, values), _ = make(4, 2, 1, 32, 60)
    codes = keys.to(torch.int8)
    start, scales = torch.tensor([3]), torch.ones(1, 2, 60)
    for arguments, words in (
        ((q, keys, values, None, None, torch.tensor([3, 4]), None), "one position for the whole batch"),
        ((q, keys, values, None, None, start, 0), "at least 1 position, got 0"),
        ((q, keys, values, scales, scales, start, None), "only a cache of int8 codes has scales"),
        ((q, codes, codes, None, None, start, None), "pass key_scales and value_scales"),
        ((q, codes, codes, scales, scales[:, :1], start, None), "scales are float32"),
        ((q, keys.float(), values.float(), None, None, start, None), "the cache is torch.float32"),
        ((q, keys, values[:, :, :30], None, None, start, None), "need keys and values"),
        ((q, keys.transpose(1, 2).contiguous().transpose(1, 2), values, None, None, start, None), "lie side by side"),
        ((q.expand(1, 4, 17, 32), keys, values, None, None, start, None), "at most 16 tokens"),
        ((q.float().repeat(1, 2, 16, 1), keys.float(), values.float(), None, None, start, None), "and 32 queries of 32"),
        ((q.double(), keys.double(), values.double(), None, None, start, None), "these are torch.float64"),
    ):
        with pytest.raises(LlmqError, match=words):
            torch.ops.llmq.decode_attention(*arguments)


def test_where_it_may_be_used(monkeypatch, triton_device):
    if triton_device == "cpu":
        assert not fused_attention(torch.bfloat16, torch.bfloat16, 4, 128).ok
    assert self_test(torch.bfloat16, torch.int8, 4, 64, triton_device).ok
    assert most_tokens(torch.bfloat16, 4, 128) == 16
    assert most_tokens(torch.bfloat16, 16, 96) == 4
    assert most_tokens(torch.float32, 3, 128) == 2
    monkeypatch.setattr(triton_support, "triton_gpu", lambda: triton_support.Support(ok=True))
    assert "at most 256 numbers" in fused_attention(torch.bfloat16, torch.bfloat16, 4, 512).reason
    assert "the cache is torch.float16" in fused_attention(torch.bfloat16, torch.float16, 4, 64).reason
    monkeypatch.setattr(triton_support, "load", lambda name: (_ for _ in ()).throw(KernelError("no such kernels.")))
    assert (
        "its start-up test raised KernelError: no such kernels." in self_test(torch.bfloat16, torch.bfloat16, 3, 64, "cpu").reason
    )


def test_launches_fill_the_gpu(triton_device):
    launch = triton_support.load("attention").launch
    for heads in (1, 8, 32, 256):
        for length in (1, 128, 4096, 131072):
            for size in (8, 128, 256, 512):
                how = launch(heads, length, size, 132)
                assert how.parts & (how.parts - 1) == 0
                assert how.block_s in (16, 32, 64, 128)
                assert how.parts == 1 or how.parts * how.block_s <= length
                assert how.block_s * size <= 16384 or how.block_s == 16
    assert launch(8, 4096, 256, 132).parts == 32  # two blocks each
    assert launch(32, 4096, 256, 132).parts == 16
    assert launch(32, 128, 256, 132).parts == 1


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_it_compiles_for_gpus(tmp_path, capability):
    """The compiler refuses what the interpreter takes. Keys and values travel asynchronously, 16 bytes a thread."""
    pytest.importorskip("triton")
    cases = [(torch.bfloat16, torch.bfloat16, 8, 1, 128, None), (torch.bfloat16, torch.int8, 32, 1, 128, 100)]
    if capability == 90:
        cases += [
            (torch.bfloat16, torch.bfloat16, 32, 1, 128, None),
            (torch.float16, torch.int8, 8, 16, 64, None),
            (torch.float32, torch.float32, 8, 2, 96, None),
        ]
    program = f"""
import torch
from llmq.ops.triton_support import load
attention = load("attention")
for dtype, cache, kv_heads, tokens, size, window in {cases}:
    q, part = torch.empty(1, 32, tokens, size, dtype=dtype), torch.empty(1, kv_heads, 4096, size, dtype=cache)
    scales = (torch.empty(1, kv_heads, 4096),) * 2 if cache == torch.int8 else None
    how = attention.launch(kv_heads, 4096, size * cache.itemsize, 132)
    attention.decode(q, (part, part), scales, torch.zeros(1, dtype=torch.int64), window, how)
"""
    found = compiled(program, capability, tmp_path)
    attending = [kernel for kernel in found if kernel.kernel == "_attend_part"]
    assert len(attending) == len(cases)
    for kernel in found:
        assert kernel.spilled == 0
        assert kernel.shared <= SHARED_MEMORY[capability]
    for kernel in attending:
        assert kernel.count(r"cp\.async\.cg\.shared\.global \[[^]]*\], \[[^]]*\], 0x10")
    for kernel in attending[:2]:
        assert kernel.count(r"mma\S*\.f32\.bf16\.bf16")
