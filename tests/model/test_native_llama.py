"""The native runtime against torch on the reference kernels: the same model, token by token."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from llmq.errors import KernelError, UsageError
from llmq.model import runtime
from llmq.model.config import LlamaConfig
from llmq.model.generate import generate
from llmq.model.kv_cache import KVCache
from llmq.model.llama import Llama
from llmq.model.native import NativeLlama, obstacle
from llmq.model.runtime import choose_runtime, weights_of
from llmq.ops import native
from llmq.ops.select import prepare
from llmq.ops.usage import record_usage
from llmq.schemes.apply import quantize_

BASE = LlamaConfig(
    vocab_size=61,
    hidden_size=96,
    intermediate_size=160,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=16,
    max_position_embeddings=300,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
)
BIASES = {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True}
CONFIGS = {
    "grouped": BASE,
    "bias": replace(BASE, num_heads=4, num_kv_heads=4, head_dim=8, **BIASES),
    "window": replace(BASE, num_heads=3, num_kv_heads=1, head_dim=64, sliding_window=5, sliding_layers=(0, 2)),
    "tied": replace(BASE, num_heads=12, num_kv_heads=4, head_dim=10, hidden_size=88, tie_word_embeddings=True),
}
SCHEMES = {
    "bf16": {},
    "fp32": {},
    "int8-weight-only": {},
    "int8-dynamic": {},
    "int4": {"group_size": 32},
    "int4-asymmetric": {"group_size": 32, "symmetric": False},
    "int8-dynamic-int4": {"group_size": 32},
}
IN_FLOAT32 = ("fp32", "int8-dynamic", "int8-dynamic-int4")
"""Weight-only kernels are native for bfloat16 activations only: they hold them in 16 bits."""
PIECES = (7, 1, 2, 33, 1, 1, 5)
BATCH = 3


@pytest.fixture(autouse=True)
def _needs_native():
    status = native.status()
    if isinstance(status, native.Unavailable):
        pytest.skip(status.reason)
    if status.isa == "generic":
        pytest.skip("the kernels leave this machine to torch")
    with torch.no_grad():
        yield


def pair(make, config: LlamaConfig, name: str, dtype: torch.dtype) -> tuple[Llama, NativeLlama]:
    """One quantized model, on the reference kernels and on the native runtime."""
    model = make(config)
    skip_unfit = config.hidden_size % 32 != 0
    scheme = name.removesuffix("-asymmetric")
    compute = None if scheme in ("bf16", "fp32") else dtype
    quantize_(model, scheme, options=SCHEMES[name], dtype=compute, skip_unfit=skip_unfit)
    laid_out = copy.deepcopy(model)
    prepare(laid_out)
    return model, NativeLlama(laid_out)


def random_tokens(length: int, batch: int = BATCH) -> torch.Tensor:
    return torch.randint(BASE.vocab_size, (batch, length), generator=torch.Generator().manual_seed(1))


def in_pieces(model, tokens: torch.Tensor, kv_dtype: torch.dtype) -> torch.Tensor:
    """Logits [B, T, V] by way of a cache that is filled in pieces of several lengths."""
    cache = KVCache(model.config, tokens.shape[0], sum(PIECES), kv_dtype, "cpu")
    parts, start = [], 0
    for length in PIECES:
        parts.append(model(tokens[:, start : start + length], cache, start))
        start += length
    return torch.cat(parts, 1).float()


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def float32_bound(scheme: str) -> float:
    """How far fp32 results may be apart, relative to their norm.

    Sums of K <= 160 floats in another order: K * 2^-24 in each of some 20 linears in a row, 2e-4 at the worst and near their root
    in practice. Where the activations are quantized, a number on the edge between two codes may fall to the other side: a step of
    1/127 of the row's largest, of one input.
    """
    return 1e-5 if scheme == "fp32" else 5e-2


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("scheme", IN_FLOAT32)
def test_float32_equals_torch(make, config, scheme):
    reference, runner = pair(make, CONFIGS[config], scheme, torch.float32)
    tokens, bound = random_tokens(sum(PIECES)), float32_bound(scheme)
    expected = reference(tokens)
    assert distance(runner(tokens), expected) < bound
    assert distance(runner.last_logits(tokens), expected[:, -1:]) < bound
    assert distance(in_pieces(runner, tokens, torch.float32), expected) < bound


@pytest.mark.parametrize(
    "kv_dtype", [torch.bfloat16, *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in (torch.float32, torch.int8))]
)
@pytest.mark.parametrize("scheme", [name for name in SCHEMES if name != "fp32"])
def test_bfloat16_is_as_near_to_float32_as_torch_is(make, scheme, kv_dtype):
    """Rounding leaves no exact result, so both are measured from the same quantized model in fp32."""
    reference, runner = pair(make, BASE, scheme, torch.bfloat16)
    wide = make(BASE).bfloat16().float() if scheme == "bf16" else make(BASE)
    if scheme != "bf16":
        quantize_(wide, scheme.removesuffix("-asymmetric"), options=SCHEMES[scheme], dtype=torch.float32)
    tokens = random_tokens(sum(PIECES))
    truth = wide(tokens)
    theirs, ours = (in_pieces(model, tokens, kv_dtype) for model in (reference, runner))
    assert distance(ours, truth) < 1.25 * distance(theirs, truth) < 0.25
    assert distance(runner(tokens), truth) < 1.25 * distance(reference(tokens), truth)


@pytest.mark.parametrize("config", CONFIGS)
def test_rounds_where_torch_does(make, config):
    """Integer linears are exact, and torch's attention over an fp32 cache is fp32: nothing but ties can differ."""
    reference, runner = pair(make, CONFIGS[config], "int8-dynamic", torch.bfloat16)
    tokens = random_tokens(sum(PIECES))
    a, b = (in_pieces(model, tokens, torch.float32) for model in (reference, runner))
    rows = (a == b).all(-1).double().mean()
    assert rows > 0.9, f"{1 - rows:.1%} of the tokens have a logit that is not torch's, bit for bit"


@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.float32, torch.int8])
@pytest.mark.parametrize("config", CONFIGS)
def test_the_cache_holds_what_torch_writes(make, config, kv_dtype):
    reference, runner = pair(make, CONFIGS[config], "fp32", torch.float32)
    tokens = random_tokens(9)
    caches = []
    for model in (reference, runner):
        caches.append(KVCache(model.config, BATCH, 12, kv_dtype, "cpu"))
        model(tokens, caches[-1], 0)
    step = {torch.bfloat16: 2**-7, torch.float32: 1e-5, torch.int8: 1.01 / 127}[kv_dtype]
    for layer in range(BASE.num_layers):
        for theirs, ours in zip(*(cache.read(layer, slice(0, 12), torch.float32) for cache in caches), strict=True):
            assert (theirs.float() - ours.float()).abs().max() <= step * theirs.float().abs().max()
            assert not ours[:, :, 9:].any(), "positions after the call's are left alone"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_threads_change_nothing(make, scheme):
    _, runner = pair(make, BASE, scheme, torch.bfloat16)
    tokens = random_tokens(sum(PIECES))
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append((runner(tokens), in_pieces(runner, tokens, torch.int8)))
    for logits, pieces in results[1:]:
        assert torch.equal(logits, results[0][0])
        assert torch.equal(pieces, results[0][1])


def test_outputs_are_parts_of_each_other(make):
    _, runner = pair(make, BASE, "int4", torch.bfloat16)
    tokens = random_tokens(40)
    logits, h = runner(tokens), runner.hidden(tokens)
    assert (logits.dtype, h.shape) == (torch.bfloat16, (BATCH, 40, BASE.hidden_size))
    assert torch.equal(runner.head(h), logits)
    assert torch.equal(runner.head(h[:, 7:9, ::1]), logits[:, 7:9])
    assert torch.equal(runner.last_logits(tokens), logits[:, -1:])
    assert runner(tokens[:0]).shape == (0, 40, BASE.vocab_size)
    assert runner.head(h[:, :0]).shape == (BATCH, 0, BASE.vocab_size)


@pytest.mark.slow
def test_long_sequences_are_cut_without_a_trace(make):
    """600 tokens are more than pass through a block together, and more keys than one task of a decode step sees."""
    config = replace(BASE, max_position_embeddings=700)
    reference, runner = pair(make, config, "fp32", torch.float32)
    tokens = random_tokens(620, batch=2)
    expected = reference(tokens)
    assert distance(runner(tokens), expected) < 1e-5
    assert distance(runner.last_logits(tokens), expected[:, -1:]) < 1e-5
    cache = KVCache(config, 2, 620, torch.float32, "cpu")
    runner.hidden(tokens[:, :600], cache, 0)
    for position in range(600, 620):
        assert distance(runner(tokens[:, position : position + 1], cache, position), expected[:, position : position + 1]) < 1e-5


@pytest.mark.parametrize("scheme", IN_FLOAT32)
def test_generates_the_same_tokens_to_the_end_of_the_context(make, scheme):
    config = replace(BASE, max_position_embeddings=64)
    reference, runner = pair(make, config, scheme, torch.float32)
    texts = [list(generate(model, [1, 2, 3], max_new_tokens=61, stop=())) for model in (reference, runner)]
    assert len(texts[0]) == 61
    assert texts[0] == texts[1]


def test_refuses_what_torch_refuses(make):
    config = replace(BASE, max_position_embeddings=16)
    _, runner = pair(make, config, "fp32", torch.float32)
    cache = KVCache(config, 1, 8, torch.float32, "cpu")
    with pytest.raises(UsageError, match="17 tokens are beyond the model's context of 16"):
        runner(random_tokens(17))
    with pytest.raises(UsageError, match="the KV cache is for 1 sequences, got 3"):
        runner(random_tokens(4), cache, 0)
    with pytest.raises(UsageError, match="2 tokens at position 7 do not fit into a KV cache of 8"):
        runner(random_tokens(2, batch=1), cache, 7)
    with pytest.raises(KernelError, match="a token is not in the vocabulary"):
        runner(torch.full((1, 2), BASE.vocab_size))
    with pytest.raises(UsageError, match=r"the head takes \[\.\.\., 96\] of torch.float32"):
        runner.head(torch.zeros(1, 96, dtype=torch.bfloat16))
    with pytest.raises(UsageError, match="reads KV caches of fp32, bf16 and int8"):
        runner(random_tokens(2, batch=1), KVCache(config, 1, 8, torch.float16, "cpu"), 0)


def test_nan_spoils_its_own_sequence_only(make):
    _, runner = pair(make, BASE, "fp32", torch.float32)
    tokens = random_tokens(6)
    cache = KVCache(BASE, BATCH, 8, torch.int8, "cpu")
    whole = runner(tokens, cache, 0)
    cache.key_scales[1][1, 0, 3] = torch.nan
    after = runner(tokens[:, :1], cache, 6)
    assert torch.isfinite(whole).all()
    assert [bool(torch.isfinite(row).all()) for row in after] == [True, False, True]


def test_usage_names_the_kernels_of_the_linears(make):
    reference, runner = pair(make, BASE, "int4", torch.bfloat16)
    tokens = random_tokens(4)
    counts = []
    for model in (runner.model, runner):
        with record_usage() as usage:
            model(tokens)
        counts.append(usage.linears())
    assert counts[0] == counts[1]
    assert sum(counts[1].values()) == 7 * BASE.num_layers + 1
    with record_usage() as usage:
        runner.hidden(tokens)
    assert sum(usage.linears().values()) == 7 * BASE.num_layers
    with record_usage() as usage:
        reference(tokens)
    assert set(usage.linears()) == {"reference"}


class TestChoice:
    """Which runtime a model gets, and the reason that is given."""

    def test_native_wherever_it_can(self, make):
        _, runner = pair(make, BASE, "int4", torch.bfloat16)
        chosen = choose_runtime(runner.model)
        assert chosen.describe() == f"native ({native.kernels().name})"
        assert not chosen.fell_back
        assert weights_of(chosen.runner) is runner.model

    def test_torch_when_asked(self, make):
        _, runner = pair(make, BASE, "int4", torch.bfloat16)
        chosen = choose_runtime(runner.model, "torch")
        assert (chosen.runner, chosen.note) == (runner.model, "runtime: torch: it was asked for")
        assert not chosen.fell_back

    def test_a_reason_for_each_obstacle(self, make):
        reference, runner = pair(make, BASE, "int4", torch.bfloat16)
        assert "model.layers.0.self_attn.q_proj is laid out for reference" in obstacle(reference)
        assert "reads KV caches of" in obstacle(runner.model, torch.float16)
        assert "the model is torch.float16" in obstacle(make(BASE).half())
        assert "holds a plain tensor" in obstacle(make(BASE))
        with torch.device("meta"):
            assert "the model is on meta" in obstacle(Llama(BASE))
        prepare(reference, prefer="dequant-gemm")
        chosen = choose_runtime(reference)
        assert chosen.fell_back
        assert chosen.describe() == "torch: model.layers.0.self_attn.q_proj is laid out for dequant-gemm"

    def test_native_or_an_error(self, make):
        with pytest.raises(KernelError, match=r"cannot run this model: .* holds a plain tensor; .*; use --runtime auto or torch"):
            choose_runtime(make(BASE), "native")
        with pytest.raises(UsageError, match=r"unknown runtime 'nativ'\. Did you mean 'native'"):
            choose_runtime(make(BASE), "nativ")
        with pytest.raises(UsageError, match="cannot run this model"):
            NativeLlama(make(BASE))

    def test_without_the_library(self, make, monkeypatch):
        _, runner = pair(make, BASE, "int4", torch.bfloat16)
        monkeypatch.setattr(native, "status", lambda: native.Unavailable("it is gone."))
        assert runtime.choose_runtime(runner.model).describe() == "torch: it is gone"


def test_weights_stay_alive(make):
    """The runtime holds the memory that it reads, whatever becomes of the module."""
    _, runner = pair(make, BASE, "int4", torch.bfloat16)
    tokens = random_tokens(5)
    before = runner(tokens)
    for module in runner.model.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(torch.zeros(1), requires_grad=False)
    filler = [torch.full((1 << 12,), 7, dtype=torch.uint8) for _ in range(200)]
    assert torch.equal(runner(tokens), before)
    assert len(filler) == 200
