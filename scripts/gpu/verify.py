"""Every kernel that this machine has, on every format it takes, against the exact result in fp64 on the device."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from gpu.findings import Finding
from gpu.formats import VERIFIED
from llmq.benchmark.random_weights import random_weight
from llmq.ops.check import exact_for, worst_element
from llmq.ops.decode_attention import MOST_TOKENS, fused_attention
from llmq.ops.schema import Case, Kernel
from llmq.ops.select import candidates

SHAPES = ((512, 1024), (264, 768), (4096, 4096))
"""(N, K): a plain one, one that is no multiple of a tile, and one of a model."""
SMALL_SHAPES = ((48, 256),)
ROWS = (1, 2, 3, 7, 16, 17, 64, 200)
SMALL_ROWS = (1, 3, 17)


def verify(device: str, *, small: bool, until: float) -> Iterator[Finding]:
    """Yield a finding for each kernel and format: the largest error as a share of its bound, or what is wrong.

    Args:
        device: of the weights.
        small: few shapes and rows.
        until: monotonic time after which no further format is begun; what is left out is said.
    """
    for name, form in VERIFIED.items():
        if time.monotonic() > until:
            yield Finding("verify", name, "–", note="left out: no time was left")
            continue
        done: dict[str, list[float]] = {}
        wrong: dict[str, str] = {}
        refused: dict[str, str] = {}
        for n, k in SMALL_SHAPES if small else SHAPES:
            case = Case(form, n, k, torch.bfloat16, device)
            for kernel, support in candidates(case):
                if not support.ok:
                    refused.setdefault(kernel.name, support.reason)
                    continue
                shares, failure = _errors(kernel, case, SMALL_ROWS if small else ROWS)
                done.setdefault(kernel.name, []).extend(shares)
                if failure:
                    wrong.setdefault(kernel.name, f"[{n}, {k}]: {failure}")
        for who, shares in done.items():
            yield Finding("verify", name, who, max(shares), "of the bound", wrong=wrong.get(who, ""))
        # that a kernel's own start-up test refuses it is a failure, and not a limit
        for who, reason in refused.items():
            if reason.startswith(("its start-up test failed", "its start-up test raised")):
                yield Finding("verify", name, who, wrong=reason)


def _errors(kernel: Kernel, case: Case, rows: tuple[int, ...]) -> tuple[list[float], str]:
    """Return the largest error over its bound for each number of rows, and the first failure."""
    generator = torch.Generator().manual_seed(case.n + case.k)
    weight = random_weight(case, generator).to(case.device)
    bias = torch.randn(case.n, generator=generator).to(case.dtype).to(case.device)
    tensors = kernel.prepack(weight)
    shares, failure = [], ""
    for m in rows:
        # an offset of one element, and rows apart: kernels must not count on alignment
        room = torch.randn(m, case.k + 9, generator=generator).to(case.dtype).to(case.device)
        x = room[:, 1 : case.k + 1]
        got = kernel.linear(x, tensors, bias, case)
        exact = exact_for(kernel, x, weight, bias, case)
        shares.append(float(((got.double() - exact.y).abs() / exact.bound).nan_to_num(torch.inf).max()))
        failure = failure or (worst_element(got, exact) or "")
    return shares, failure


def verify_attention(device: str, *, small: bool) -> list[Finding]:
    """Compare the fused decode attention with fp64, for bf16 and int8 caches and several contexts."""
    from llmq.model.kv_cache import dequantize_int8, quantize_int8

    found = []
    if device != "cuda":
        return [Finding("verify", "decode attention", "triton", note="left out: it is for CUDA GPUs")]
    heads, kv_heads, width, room = (4, 2, 32, 128) if small else (32, 8, 128, 4096)
    for kind in ("bf16", "int8"):
        worst, wrong, why = 0.0, "", ""
        for context, tokens in ((1, 1), (17, 1), (100, 4), (room - MOST_TOKENS, MOST_TOKENS)):
            generator = torch.Generator().manual_seed(context)
            q = torch.randn(1, heads, tokens, width, generator=generator).bfloat16().to(device)
            keys, values = (torch.randn(1, kv_heads, room, width, generator=generator).bfloat16().to(device) for _ in range(2))
            answer = fused_attention(q.dtype, torch.int8 if kind == "int8" else q.dtype, heads // kv_heads, width)
            if not answer.ok:
                why = answer.reason
                break
            scales: tuple[Tensor | None, Tensor | None] = (None, None)
            if kind == "int8":
                (keys, first), (values, second) = quantize_int8(keys), quantize_int8(values)
                scales = (first, second)
            start = torch.tensor([context], device=device)
            got = torch.ops.llmq.decode_attention(q, keys, values, *scales, start, None)
            plain = [keys.double(), values.double()]
            if scales[0] is not None and scales[1] is not None:
                plain = [dequantize_int8(keys, scales[0]).double(), dequantize_int8(values, scales[1]).double()]
            exact = _attention(q.double(), plain[0], plain[1], context)
            # eight bits of the result, and of each probability before it meets a value
            bound = 2.0**-7 * (exact.abs() + plain[1].abs().amax())
            worst = max(worst, float(((got.double() - exact).abs() / bound).max()))
            wrong = wrong or ("" if worst <= 1 else f"context {context}: {worst:.3g} times the bound")
        if why:
            found.append(Finding("verify", f"decode attention, {kind} cache", "triton", note=why))
        else:
            found.append(Finding("verify", f"decode attention, {kind} cache", "triton", worst, "of the bound", wrong=wrong))
    return found


def _attention(q: Tensor, keys: Tensor, values: Tensor, start: int) -> Tensor:
    """Return attention of queries at `start` and after to a whole cache, in the dtype of the arguments."""
    share = q.shape[1] // keys.shape[1]
    keys, values = (each.repeat_interleave(share, dim=1) for each in (keys, values))
    scores = q @ keys.transpose(-1, -2) / q.shape[-1] ** 0.5
    positions = torch.arange(keys.shape[2], device=q.device)
    seen = positions[None] <= start + torch.arange(q.shape[2], device=q.device)[:, None]
    found: Tensor = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ values
    return found
