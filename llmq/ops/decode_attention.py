"""Attention of a few tokens to a KV cache in one fused kernel, for NVIDIA GPUs; `kernels/triton/attention.py` computes it.

    llmq::decode_attention(q [B, H, T, D], keys [B, H_kv, S, D], values [B, H_kv, S, D],
                           key_scales [B, H_kv, S]?, value_scales [B, H_kv, S]?, start [1], window?) -> [B, H, T, D]

The cache already holds the keys and values of the call's own tokens, at `start` to `start + T - 1`; `start` is a tensor of one
integer on the device, so that a recorded CUDA graph and a compiled graph serve every position. What lies beyond is not read.
Query head h belongs to key-value head h // (H / H_kv). A query sees its own position and those before it, with a window the last
`window` of them. `start + T <= S` is the caller's care: the device alone knows `start`.

Keys and values are of q's dtype, or int8 with fp32 scales, which are not rounded on their way to a score as `KVCache.read` rounds
them. The first S positions of a longer cache (`KVCache.first`) are read where they lie. Sums and softmax are fp32, the result has
q's dtype. It may be used where `fused_attention` says yes; it records no gradients.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from llmq.errors import LlmqError, ShapeError, UsageError
from llmq.ops import triton_support
from llmq.ops.schema import SUPPORTED, Support, unsupported

MOST_TOKENS = 16
"""More tokens than these are a prompt, which other kernels attend better."""
MOST_NUMBERS = 8192
"""Queries that share one key-value head, tokens times H / H_kv, times D: their sums are kept in registers. In powers of two."""
MOST_FP32_NUMBERS = 1024
"""The same in fp32, whose products are not made by tensor cores."""
MOST_DIMENSIONS = 256
"""Numbers of a head."""

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
"""Largest difference that the start-up test takes, for values of about 1: some units in the last place."""

_LIBRARY = torch.library.Library("llmq", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "decode_attention(Tensor q, Tensor keys, Tensor values, Tensor? key_scales, Tensor? value_scales, Tensor start, int? window)"
    " -> Tensor"
)


def _decode_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
    start: Tensor,
    window: int | None,
) -> Tensor:
    """See the module.

    Raises:
        UsageError: dtypes that do not belong together, a window that is not positive, or more than the kernel takes.
        ShapeError: shapes or strides that do not.
        KernelError: the tensors are where Triton's kernels cannot read them.
    """
    triton_support.check_device(q)
    batch, heads, tokens, size = q.shape
    limit = _limit(q.dtype, keys.dtype, tokens, heads // max(1, keys.shape[1]), size)
    if not limit.ok:
        raise UsageError(f"the fused attention cannot run: {limit.reason}.")
    if window is not None and window < 1:
        raise UsageError(f"a window is at least 1 position, got {window}.")
    if start.numel() != 1:
        raise ShapeError(f"start is one position for the whole batch, got a tensor of shape {list(start.shape)}.")
    scales = None
    if keys.dtype == torch.int8:
        if key_scales is None or value_scales is None:
            raise UsageError("a cache of int8 codes has scales, got none; pass key_scales and value_scales.")
        scales = (key_scales, value_scales)
    elif key_scales is not None or value_scales is not None:
        raise UsageError(f"only a cache of int8 codes has scales, got some for {keys.dtype}; leave them out.")
    _check_cache(q, (keys, values), scales)
    if q.numel() == 0:
        return torch.empty_like(q, memory_format=torch.contiguous_format)
    kernels = triton_support.load("attention")
    how = kernels.launch(batch * keys.shape[1], keys.shape[2], size * keys.itemsize, triton_support.multiprocessors(q.device))
    y: Tensor = kernels.decode(q, (keys, values), scales, start, window, how)
    return y


def _decode_attention_fake(
    q: Tensor,
    keys: Tensor,  # noqa: ARG001
    values: Tensor,  # noqa: ARG001
    key_scales: Tensor | None,  # noqa: ARG001
    value_scales: Tensor | None,  # noqa: ARG001
    start: Tensor,  # noqa: ARG001
    window: int | None,  # noqa: ARG001
) -> Tensor:
    return q.new_empty(q.shape)


_LIBRARY.impl("decode_attention", _decode_attention, "CUDA")  # type: ignore[no-untyped-call]
_LIBRARY.impl("decode_attention", _decode_attention, "CPU")  # type: ignore[no-untyped-call]  # the interpreter, or a sentence
torch.library.register_fake("llmq::decode_attention", _decode_attention_fake, lib=_LIBRARY)


def fused_attention(dtype: torch.dtype, cache: torch.dtype, heads_shared: int, size: int) -> Support:
    """Whether this machine's GPU can attend for one token and more of a model; asks the kernel itself, once.

    Args:
        dtype: of the queries: the cache's own, or the model's where the cache is int8.
        cache: dtype of the cache.
        heads_shared: H / H_kv.
        size: D.
    """
    answer = triton_support.triton_gpu()
    if not answer.ok:
        return answer
    answer = _limit(dtype, cache, 1, heads_shared, size)
    return self_test(dtype, cache, heads_shared, size, "cuda") if answer.ok else answer


def most_tokens(dtype: torch.dtype, heads_shared: int, size: int) -> int:
    """Return for how many tokens a call may use the fused attention."""
    return min(MOST_TOKENS, _most_rows(dtype, size) // heads_shared)


@functools.cache
def self_test(dtype: torch.dtype, cache: torch.dtype, heads_shared: int, size: int, device: str) -> Support:
    """Attend once to numbers that are known, and compare with the definition in fp64; an error, too, disqualifies."""
    generator = torch.Generator().manual_seed(0)
    length, start, window = 300, 250, 200
    q = torch.randn(1, 2 * heads_shared, 1, size, generator=generator).to(dtype)
    scales: list[Tensor | None] = [None, None]
    if cache == torch.int8:
        keys, values = (torch.randint(-127, 128, (1, 2, length, size), generator=generator, dtype=torch.int8) for _ in scales)
        scales = [torch.rand(1, 2, length, generator=generator) / 64 for _ in scales]
    else:
        keys, values = (torch.randn(1, 2, length, size, generator=generator).to(cache) for _ in scales)
    try:
        given = (None if part is None else part.to(device) for part in (keys, values, *scales))
        y = torch.ops.llmq.decode_attention(q.to(device), *given, torch.tensor([start], device=device), window).cpu()
    except (RuntimeError, LlmqError) as error:
        return unsupported(f"its start-up test raised {type(error).__name__}: {str(error).splitlines()[0]}")
    seen = slice(start - window + 1, start + 1)
    k, v = (
        part.double()[:, :, seen] * (1 if scale is None else scale.double()[:, :, seen, None])
        for part, scale in zip((keys, values), scales, strict=True)
    )
    scores = q.double().reshape(1, 2, heads_shared, size) @ k.transpose(2, 3) / size**0.5
    expected = (scores.softmax(dim=-1) @ v).reshape(q.shape)
    worst = float((y.double() - expected).abs().max())
    if not worst <= _TOLERANCE[dtype]:  # a NaN is worse
        return unsupported(f"its start-up test failed: a result is off by {worst:.3g}, and {_TOLERANCE[dtype]:.3g} is allowed")
    return SUPPORTED


def _limit(dtype: torch.dtype, cache: torch.dtype, tokens: int, heads_shared: int, size: int) -> Support:
    """Whether the kernel takes such a call."""
    if dtype not in _FLOATS:
        return unsupported(f"queries are float32, bfloat16 or float16, and these are {dtype}")
    if cache not in (dtype, torch.int8):
        return unsupported(f"the cache is of the queries' dtype or int8; the queries are {dtype} and the cache is {cache}")
    if size > MOST_DIMENSIONS:
        return unsupported(f"it takes heads of at most {MOST_DIMENSIONS} numbers, and these have {size}")
    most = _most_rows(dtype, size)
    if tokens > MOST_TOKENS or tokens * heads_shared > most:
        return unsupported(
            f"it takes at most {MOST_TOKENS} tokens, and {most} queries of {size} numbers for a key-value head in {dtype}; "
            f"these are {tokens} tokens with {heads_shared} heads each"
        )
    return SUPPORTED


def _most_rows(dtype: torch.dtype, size: int) -> int:
    """Return how many queries of `size` numbers may share a key-value head; a power of two."""
    return (MOST_FP32_NUMBERS if dtype == torch.float32 else MOST_NUMBERS) // max(16, 1 << (size - 1).bit_length())


def _check_cache(q: Tensor, cache: tuple[Tensor, Tensor], scales: tuple[Tensor, Tensor] | None) -> None:
    """Raise unless keys and values, and their scales, belong to q and lie as the kernel reads them."""
    keys, values = cache
    batch, heads, _, size = q.shape
    kv_heads, length = keys.shape[1], keys.shape[2]
    if keys.shape != (batch, kv_heads, length, size) or values.shape != keys.shape or heads % max(1, kv_heads):
        raise ShapeError(
            f"queries [B, H, T, D] need keys and values [B, H_kv, S, D] with H a multiple of H_kv, got {list(q.shape)}, "
            f"{list(keys.shape)} and {list(values.shape)}."
        )
    if values.dtype != keys.dtype:
        raise UsageError(f"keys and values have one dtype, got {keys.dtype} and {values.dtype}.")
    head = keys.stride(1)
    if any(part.stride() != (kv_heads * head, head, size, 1) for part in cache if part.numel()):
        raise ShapeError(
            f"positions of a head lie side by side, heads equally far apart; got strides {keys.stride()} and {values.stride()}."
        )
    if scales is None:
        return
    head = scales[0].stride(1)
    for part in scales:
        if part.shape != keys.shape[:3] or part.dtype != torch.float32 or part.stride() != (kv_heads * head, head, 1):
            raise ShapeError(
                f"scales are float32 {list(keys.shape[:3])} and lie as the keys do, got {part.dtype} {list(part.shape)} "
                f"with strides {part.stride()}."
            )
