"""The int8 KV cache: its codes against a loop, its error against fp64 and a derived bound, in every way a cache is used."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from llmq.errors import UsageError
from llmq.model.config import LlamaConfig
from llmq.model.generate import decode_step, generate, prefill
from llmq.model.kv_cache import (
    AUTO,
    KVCache,
    dequantize_int8,
    kv_bytes_per_token,
    kv_dtype,
    kv_name,
    quantize_int8,
)
from llmq.model.llama import Llama
from llmq.model.rope import rotate

Make = Callable[[LlamaConfig], Llama]


def grid_by_hand(numbers: Tensor) -> tuple[list[int], Tensor]:
    """Codes and scale of one token and head [D], one number after the other, in float32 as the definition says."""
    one, x = torch.tensor(1.0), numbers.float()
    scale = max(max(abs(number) for number in x) / 127, torch.tensor(1e-8))
    codes = []
    for number in x:
        exact = float(number * (one / scale))  # rounded to fp32; Python's round takes ties to even
        codes.append(max(-127, min(127, round(exact))))
    return codes, scale


def hard_numbers(*shape: int) -> Tensor:
    """Numbers of every size and sign; some heads are all zero, tiny, huge, or hold one outlier."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(shape, generator=generator) * torch.randint(-3, 3, (*shape[:-1], 1), generator=generator).float().exp2()
    flat = x.view(-1, shape[-1])
    flat[0] = 0
    flat[1] *= 1e-12
    flat[2] *= 1e6
    flat[3, 0] = -300.0
    flat[4] = torch.arange(shape[-1]) + 0.5  # ties
    flat[4, -1] = 127.0
    return x


@pytest.mark.parametrize("where", [slice(2, 7), torch.tensor([6, 1, 3, 8, 0])], ids=["slice", "positions"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [10, 64])
def test_codes_and_scales_are_those_of_a_loop(
    tiny_config: LlamaConfig, head_dim: int, dtype: torch.dtype, where: slice | Tensor
) -> None:
    config = dataclasses.replace(tiny_config, head_dim=head_dim, num_layers=2)
    cache = KVCache(config, 3, 9, torch.int8, "cpu")
    keys = hard_numbers(3, 2, 5, head_dim)  # float32, as `rotate` returns them
    values = hard_numbers(3, 2, 5, head_dim).flip(0).to(dtype)
    cache.write(1, keys, values, where)
    positions = list(range(9))[where] if isinstance(where, slice) else where.tolist()
    assert cache.key_scales is not None
    assert cache.value_scales is not None
    for source, codes, scales in (
        (keys.to(dtype), cache.keys[1], cache.key_scales[1]),
        (values, cache.values[1], cache.value_scales[1]),
    ):
        assert (codes.dtype, scales.dtype) == (torch.int8, torch.float32)
        for b in range(3):
            for h in range(2):
                for t, position in enumerate(positions):
                    expected, scale = grid_by_hand(source[b, h, t])
                    assert codes[b, h, position].tolist() == expected
                    assert scales[b, h, position] == scale
        elsewhere = [position for position in range(9) if position not in positions]
        assert not codes[:, :, elsewhere].any()
        assert not scales[:, :, elsewhere].any()
    assert not any(tensor.any() for tensor in (cache.keys[0], cache.values[0], cache.key_scales[0], cache.value_scales[0]))


def test_reading_is_code_times_scale_in_fp32_rounded_once(tiny_config: LlamaConfig) -> None:
    cache = KVCache(tiny_config, 3, 6, torch.int8, "cpu")
    cache.write(0, hard_numbers(3, 2, 6, 8), hard_numbers(3, 2, 6, 8).bfloat16(), slice(0, 6))
    assert cache.key_scales is not None
    keys, values = cache.read(0, slice(1, 5), torch.bfloat16)
    assert keys.dtype == values.dtype == torch.bfloat16
    exact = cache.keys[0][:, :, 1:5].float() * cache.key_scales[0][:, :, 1:5, None]
    assert torch.equal(keys, exact.bfloat16())
    assert cache.attention_dtype(torch.bfloat16) == torch.bfloat16
    assert KVCache(tiny_config, 1, 6, torch.float32, "cpu").attention_dtype(torch.bfloat16) == torch.float32


def test_no_number_is_off_by_more_than_half_a_step() -> None:
    x = hard_numbers(4, 3, 50, 16)
    codes, scales = quantize_int8(x)
    assert int(codes.min()) == -127  # -128 is not used
    error = (dequantize_int8(codes, scales).double() - x.double()).abs()
    # half a step, and what x * (1 / scale) and code * scale round in fp32
    bound = scales[..., None].double() * (0.5 + 127 * 3 * torch.finfo(torch.float32).eps)
    assert (error <= bound).all()
    assert error.max() > 0.4 * scales.max()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_is_not_hidden(bad: float) -> None:
    x = hard_numbers(1, 1, 6, 8)
    x[0, 0, 3, 2] = bad
    numbers = dequantize_int8(*quantize_int8(x))
    assert numbers[0, 0, 3].isnan().all()
    assert numbers[0, 0, [0, 1, 2, 4, 5]].isfinite().all()


class Spy(nn.Module):
    """Stands for a linear, and keeps what it returned."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(self.linear(x))
        return self.seen[-1]


def attention_by_hand(
    q: Tensor, k: Tensor, v: Tensor, k_steps: Tensor, v_steps: Tensor, window: int | None
) -> tuple[Tensor, Tensor]:
    """Attention of one sequence in fp64, one query and head at a time, and how far quantized keys and values may move it.

    q [T, H, D], k and v [T, H_kv, D] are exact; k_steps and v_steps [T, H_kv] are the most that one number is off.
    With |Δk| <= e in every dimension a score q·k / √D moves by at most δ = e ‖q‖₁ / √D, so every weight by a factor within
    exp(±2δ), and the result by (exp(2δ) - 1) max|v| + max|Δv| at most.
    """
    T, H, D = q.shape
    out, bound = torch.zeros(T, H, D, dtype=torch.float64), torch.zeros(T, H, dtype=torch.float64)
    for t in range(T):
        seen = slice(0 if window is None else max(0, t - window + 1), t + 1)
        for h in range(H):
            g = h // (H // k.shape[1])
            weights = (k[seen, g] @ q[t, h] / math.sqrt(D)).softmax(0)
            out[t, h] = weights @ v[seen, g]
            delta = k_steps[seen, g].max() * q[t, h].abs().sum() / math.sqrt(D)
            bound[t, h] = (torch.exp(2 * delta) - 1) * v[seen, g].abs().max() + v_steps[seen, g].max()
    return out, bound


@pytest.mark.parametrize("pieces", [[24], [7, 1, 1, 9, 6], [1] * 24], ids=["prefill", "pieces", "steps"])
@pytest.mark.parametrize("start", [int, torch.tensor], ids=["int", "tensor"])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("heads", [(4, 4, 8), (4, 2, 8), (3, 1, 10)], ids=["mha", "gqa", "mqa odd"])
def test_attention_is_within_the_bound_of_its_grid(
    make: Make,
    tiny_config: LlamaConfig,
    tokens: Tensor,
    heads: tuple[int, int, int],
    window: int | None,
    start: Callable[[int], int | Tensor],
    pieces: list[int],
) -> None:
    num_heads, num_kv_heads, head_dim = heads
    model = make(
        dataclasses.replace(
            tiny_config,
            num_layers=1,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            sliding_window=window,
            sliding_layers=() if window is None else (0,),
        )
    )
    attention = model.blocks[0].self_attn
    spies = {name: Spy(getattr(attention, name)) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    results: list[Tensor] = []
    spies["o_proj"].register_forward_pre_hook(lambda _, inputs: results.append(inputs[0]))
    for name, spy in spies.items():
        setattr(attention, name, spy)
    cache, position = KVCache(model.config, 2, 40, torch.int8, "cpu"), 0
    for length in pieces:
        model(tokens[:, position : position + length], cache, start(position))
        position += length
    assert cache.key_scales is not None
    assert cache.value_scales is not None
    B, T = tokens.shape
    q, k, v = (torch.cat(spies[name].seen, 1).view(B, T, -1, head_dim) for name in ("q_proj", "k_proj", "v_proj"))
    q, k = (rotate(x, cache.cosines[:T], cache.sines[:T]) for x in (q, k))
    found = torch.cat(results, 1).view(B, T, num_heads, head_dim)
    worst = 0.0
    for b in range(B):
        k_scales, v_scales = (scales[0][b, :, :T].T.double() for scales in (cache.key_scales, cache.value_scales))
        read = cache.read(0, slice(0, T), torch.float32)
        k_read, v_read = (x[b].transpose(0, 1).double() for x in read)  # [T, H_kv, D]
        assert ((k_read - k[b].double()).abs() <= 0.501 * k_scales[..., None]).all()
        assert ((v_read - v[b].double()).abs() <= 0.501 * v_scales[..., None]).all()
        nothing = torch.zeros_like(k_scales)
        same, _ = attention_by_hand(q[b].double(), k_read, v_read, nothing, nothing, window)
        assert torch.allclose(found[b].double(), same, atol=1e-5)  # of the codes themselves it is exact but for fp32's rounding
        exact, bound = attention_by_hand(q[b].double(), k[b].double(), v[b].double(), 0.501 * k_scales, 0.501 * v_scales, window)
        error = (found[b].double() - exact).abs().amax(-1)
        assert (error <= bound + 1e-5).all()
        worst = max(worst, float(error.max()))
    assert worst > 1e-4  # the grid is seen: this is no float cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("start", [int, torch.tensor], ids=["int", "tensor"])
def test_a_prompt_in_pieces_is_the_prompt_at_once(
    make: Make, tiny_config: LlamaConfig, tokens: Tensor, start: Callable[[int], int | Tensor], dtype: torch.dtype
) -> None:
    model = make(dataclasses.replace(tiny_config, sliding_window=6, sliding_layers=(1,))).to(dtype)
    whole, pieces = (KVCache(model.config, 2, 24, torch.int8, "cpu") for _ in range(2))
    expected = model(tokens, whole, start(0))
    steps = [model(tokens[:, :7], pieces, start(0))]
    steps += [model(tokens[:, position : position + 1], pieces, start(position)) for position in range(7, 24)]
    # the two differ by the rounding of sums of other shapes, and where that moves a code by one
    tolerance = 2e-3 if dtype == torch.float32 else 0.1
    assert torch.allclose(torch.cat(steps, 1).float(), expected.float(), atol=tolerance)
    first = (whole.keys[0].int() - pieces.keys[0].int()).abs()
    assert int(first.max()) <= (1 if dtype == torch.float32 else 3)
    assert (first != 0).float().mean() < (0.01 if dtype == torch.float32 else 0.2)
    assert not torch.equal(expected, model(tokens))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_decode_steps_compile_once(make: Make, tiny_config: LlamaConfig, tokens: Tensor, backend: str) -> None:
    torch.compiler.reset()
    model = make(dataclasses.replace(tiny_config, num_layers=2, sliding_window=6, sliding_layers=(1,)))
    step = torch.compile(decode_step, fullgraph=True, backend=backend)
    try:
        for _ in range(2):
            cache, plain = (KVCache(model.config, 2, 32, torch.int8, "cpu") for _ in range(2))
            for each in (cache, plain):
                prefill(model, each, tokens[:, :5])
            for position in range(5, 24):
                token, where = tokens[:, position : position + 1], torch.tensor(position)
                logits = step(model, cache, token, where)
                assert torch.allclose(logits, decode_step(model, plain, token, position), atol=2e-3), position
                torch.compiler.set_stance("fail_on_recompile")
            assert cache.key_scales is not None
            assert plain.key_scales is not None
            assert torch.allclose(cache.key_scales[0], plain.key_scales[0], rtol=1e-5)
            assert int((cache.keys[0].int() - plain.keys[0].int()).abs().max()) <= 1
    finally:
        torch.compiler.set_stance("default")
        torch.compiler.reset()


@pytest.mark.parametrize("name", [AUTO, "fp32", "bf16", "fp16", "int8"])
def test_generation_to_the_last_position_of_the_context(make: Make, tiny_config: LlamaConfig, name: str) -> None:
    config = dataclasses.replace(tiny_config, eos_token_ids=())
    model, dtype = make(config), kv_dtype(name, torch.float32)
    prompt, limit = [3, 14, 15, 9], config.max_position_embeddings
    text = list(generate(model, prompt, max_new_tokens=limit - 4, kv_dtype=dtype))
    assert len(text) == limit - 4
    # the last token but one was read at the last position but one: its logits are those of a cache that is full but for one
    cache = KVCache(config, 1, limit, dtype, "cpu")
    full = model(torch.tensor([prompt + text]), cache)
    assert int(full[0, limit - 2].argmax()) == text[-1]
    assert full.isfinite().all()
    with pytest.raises(
        UsageError, match=r"prompt of 4 tokens and 37 new ones are beyond the model's context of 40 tokens; .* at most 36 new"
    ):
        generate(model, prompt, max_new_tokens=limit - 3, kv_dtype=dtype)
    with pytest.raises(UsageError, match=r"41 tokens are beyond the model's context of 40 tokens .*at most 40"):
        KVCache(config, 1, limit + 1, dtype, "cpu")
    with pytest.raises(UsageError, match=r"1 tokens at position 40 do not fit into a KV cache of 40 tokens"):
        model(torch.tensor([[3]]), cache, limit)


def test_bytes(tiny_config: LlamaConfig) -> None:
    cache = KVCache(tiny_config, 5, 24, torch.int8, "cpu")
    per_token = 3 * 2 * 2 * (8 + 4)  # layers, keys and values, kv heads, codes and a scale
    assert kv_bytes_per_token(tiny_config, torch.int8) == per_token
    assert cache.nbytes == cache.nbytes_read(24) == 5 * 24 * per_token
    assert cache.nbytes == sum(tensor.nbytes for tensor in cache.tensors)
    assert len(cache.tensors) == 4 * 3
    sliding = dataclasses.replace(tiny_config, sliding_window=10, sliding_layers=(0, 2))
    assert KVCache(sliding, 1, 24, torch.int8, "cpu").nbytes_read(20) == (20 + 2 * 10) * per_token // 3


def test_reset_forgets_scales_too(tiny_config: LlamaConfig) -> None:
    cache = KVCache(tiny_config, 2, 24, torch.int8, "cpu")
    for tensor in cache.tensors:
        tensor.fill_(7)
    cache.reset()
    assert not any(tensor.any() for tensor in cache.tensors)


def test_names() -> None:
    assert kv_dtype("int8", torch.bfloat16) == torch.int8
    assert kv_dtype(AUTO, torch.bfloat16) == torch.bfloat16
    assert [kv_name(kv_dtype(name, torch.float32)) for name in ("fp32", "bf16", "fp16", "int8")] == [
        "fp32",
        "bf16",
        "fp16",
        "int8",
    ]
    with pytest.raises(UsageError, match=r"unknown KV cache 'int9'\. Did you mean 'int8'\?"):
        kv_dtype("int9", torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.uint8])
def test_a_dtype_that_is_no_cache(tiny_config: LlamaConfig, dtype: torch.dtype) -> None:
    with pytest.raises(UsageError, match=r"a KV cache holds fp32, bf16, fp16, int8, got torch\..*; choose one of them"):
        KVCache(tiny_config, 1, 8, dtype, "cpu")
