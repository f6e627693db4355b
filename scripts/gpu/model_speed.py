"""Prefill and decode of a random model of Llama-2-7B's shape, one weight format after the other.

Decode is batch 1 from a context of 128 to one of 256 tokens, greedy, every step as the runtime runs it (a CUDA graph). Its share
is that of the copy bandwidth: the bytes that a step reads (`llmq.benchmark.traffic`) over the time of a token.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from gpu.findings import Finding, say
from gpu.formats import TIMED
from llmq.benchmark.choosing import KernelTimer
from llmq.benchmark.order_statistics import median
from llmq.benchmark.random_weights import random_weight
from llmq.benchmark.timing import TimingPlan, stopwatch_for, time_rounds
from llmq.benchmark.traffic import HEAD, traffic_of_model
from llmq.errors import KernelError
from llmq.model.config import LlamaConfig
from llmq.model.generate import decode_step, prefill
from llmq.model.kv_cache import KVCache
from llmq.model.llama import Llama
from llmq.model.runtime import AUTO, Runner, choose_runtime
from llmq.numerics.weight import QuantizedWeight
from llmq.ops.schema import Case
from llmq.ops.select import prepare
from llmq.ops.tensor import QuantizedTensor

LLAMA_2_7B = LlamaConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    max_position_embeddings=4096,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
)
SMALL = replace(
    LLAMA_2_7B, vocab_size=512, hidden_size=256, intermediate_size=512, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=64
)
VARIANTS: tuple[tuple[str, str, str | None], ...] = (
    ("bf16", "bf16", None),
    ("int8-weight-only", "int8-weight-only", None),
    ("int8-dynamic", "int8-dynamic", None),
    ("int4 g=128, as chosen", "int4 g=128", None),
    ("int4 g=128, tinygemm", "int4 g=128", "tinygemm"),
    ("int4 g=128, own", "int4 g=128", "triton-int4"),
    ("float8-weight-only", "float8-weight-only", None),
    ("float8-dynamic", "float8-dynamic", None),
)
"""Name, format, and the kernel that is asked for (None: the one that measuring chooses)."""
CONTEXT, NEW_TOKENS, PROMPT = 128, 128, 2048


def random_llama(config: LlamaConfig, form_name: str, device: str) -> Llama:
    """Return a model with random weights on `device`: blocks in the format, embedding, norms and head in bf16.

    Linears of one shape have the same numbers, each in memory of its own.
    """
    with torch.device("meta"):
        model = Llama(config)
    generator = torch.Generator().manual_seed(0)
    drawn: dict[tuple[str, int, int], QuantizedWeight] = {}
    for name, module in list(model.named_modules()):
        for key, parameter in list(module.named_parameters(recurse=False)):
            if isinstance(module, nn.Linear):
                which = "bf16" if name == HEAD else form_name
                form, (n, k) = TIMED[which], parameter.shape
                if (which, n, k) not in drawn:
                    drawn[which, n, k] = random_weight(Case(form, n, k, torch.bfloat16, device), generator).to(device)
                filled: Tensor = QuantizedTensor.from_weight(_copy(drawn[which, n, k]), form, torch.bfloat16)
            else:
                norm = parameter.dim() == 1
                numbers = torch.ones(parameter.shape) if norm else torch.randn(parameter.shape, generator=generator) * 0.02
                filled = numbers.bfloat16().to(device)
            setattr(module, key, nn.Parameter(filled, requires_grad=False))
    return model.eval()


def _copy(weight: QuantizedWeight) -> QuantizedWeight:
    scale, zero_point, step = (
        None if part is None else part.clone() for part in (weight.scale, weight.zero_point, weight.input_scale)
    )
    return QuantizedWeight(weight.grid, weight.shape, weight.qdata.clone(), scale, zero_point, step)


def time_models(device: str, walls: Mapping[str, float], *, small: bool, until: float) -> Iterator[Finding]:
    """Yield findings of prefill and decode for each of `VARIANTS`."""
    config = SMALL if small else LLAMA_2_7B
    for name, form_name, wanted in VARIANTS:
        if time.monotonic() > until:
            yield Finding("model", name, "–", note="left out: no time was left")
            continue
        say(f"  {name}")
        model = random_llama(config, form_name, device)
        try:
            choices = prepare(model, prefer=wanted, timer=KernelTimer() if device == "cuda" and wanted is None else None)
        except KernelError as error:
            yield Finding("model", name, wanted or "–", note=f"left out: {error}")
            del model
            continue
        runtime = choose_runtime(model, AUTO)
        kernels = ", ".join(dict.fromkeys(choice.kernels for choice in choices)) or "torch"
        with torch.no_grad():
            yield _decode(model, runtime.runner, name, kernels, walls, runtime.describe())
            yield _prefill(model, runtime.runner, name, kernels, walls, runtime.describe())
        del model, runtime
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


def _decode(model: Llama, runner: Runner, name: str, kernels: str, walls: Mapping[str, float], runtime: str) -> Finding:
    context, steps = (16, 8) if model.config == SMALL else (CONTEXT, NEW_TOKENS)
    cache = KVCache(model.config, 1, context + steps, model.dtype, model.device)
    prompt = torch.randint(3, model.config.vocab_size, (1, context), generator=torch.Generator().manual_seed(1))
    first = prefill(runner, cache, prompt.to(model.device))[:, -1].argmax(-1, keepdim=True)

    def run() -> Tensor:
        tokens = first
        for position in range(context, context + steps):
            tokens = decode_step(runner, cache, tokens, position)[:, -1].argmax(-1, keepdim=True)
        return tokens

    seconds = median(_times(run, model)) / steps
    nbytes = traffic_of_model(model).decode_bytes(1, context + steps // 2).total
    share = nbytes / seconds / walls["copy"] if "copy" in walls else None
    more = {"tokens_per_s": (1 / seconds, "tokens/s"), "bandwidth": (nbytes / seconds / 1e9, "GB/s")}
    return Finding(
        "model", f"{name}: decode, context {context} to {context + steps}", kernels, seconds * 1e3, "ms", "copy", share,
        note=f"runtime {runtime}", more=more,
    )  # fmt: skip


def _prefill(model: Llama, runner: Runner, name: str, kernels: str, walls: Mapping[str, float], runtime: str) -> Finding:
    length = 32 if model.config == SMALL else PROMPT
    cache = KVCache(model.config, 1, length, model.dtype, model.device)
    prompt = torch.randint(3, model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(1)).to(model.device)
    seconds = median(_times(lambda: prefill(runner, cache, prompt), model))
    operations = traffic_of_model(model).prefill_flops(1, length)
    share = operations / seconds / walls["bf16"] if "bf16" in walls else None
    more = {"tokens_per_s": (length / seconds, "tokens/s")}
    return Finding(
        "model", f"{name}: prefill of {length}", kernels, seconds * 1e3, "ms", "bf16", share,
        note=f"runtime {runtime}", more=more,
    )  # fmt: skip


def _times(call: Callable[[], object], model: Llama) -> list[float]:
    plan = TimingPlan(repeats=7, warmup=2, budget_s=4.0)
    return time_rounds({"call": call}, plan, stopwatch=stopwatch_for(model.device))["call"]
