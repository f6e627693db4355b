"""Formats that no data-free scheme makes, on the native runtime: static activations, and codes of two and three bits."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from llmq.algorithms.rtn import quantize_rtn
from llmq.model.config import LlamaConfig
from llmq.model.kv_cache import KVCache
from llmq.model.llama import Llama
from llmq.model.runtime import Runtime, choose_runtime
from llmq.numerics.grid import ActivationGrid, IntGrid, LinearFormat
from llmq.ops import native
from llmq.ops.select import prepare
from llmq.ops.tensor import QuantizedTensor

CONFIG = LlamaConfig(
    vocab_size=61,
    hidden_size=96,
    intermediate_size=160,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=16,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    mlp_bias=True,
)
STATIC = ActivationGrid(static=True)
STATIC_FORMATS = {
    "int8": LinearFormat(IntGrid(8), STATIC),
    "int8 by group": LinearFormat(IntGrid(8, 32, scale_dtype="bfloat16"), STATIC),
    "int3": LinearFormat(IntGrid(3, 32, symmetric=False, zero_point="int", scale_dtype="bfloat16"), STATIC),
}
WEIGHT_ONLY_FORMATS = {
    "int3": LinearFormat(IntGrid(3, 32, scale_dtype="bfloat16")),
    "int2 float zero": LinearFormat(IntGrid(2, 32, symmetric=False, zero_point="float", scale_dtype="bfloat16")),
    "int4 per channel": LinearFormat(IntGrid(4, None, scale_dtype="bfloat16")),
    "int3 per channel": LinearFormat(IntGrid(3, None, symmetric=False, zero_point="int", scale_dtype="bfloat16")),
}
TOKENS = torch.randint(CONFIG.vocab_size, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _needs_native():
    status = native.status()
    if isinstance(status, native.Unavailable):
        pytest.skip(status.reason)
    if status.isa == "generic":
        pytest.skip("the kernels leave this machine to torch")
    with torch.no_grad():
        yield


def quantize(model: Llama, form: LinearFormat) -> Llama:
    """Round every linear to `form`; static scales from the largest input on the test's own tokens, somewhat too small."""
    largest: dict[str, float] = {}

    def watch(name: str):
        def hook(_: nn.Module, inputs: tuple[Tensor]) -> None:
            largest[name] = float(inputs[0].abs().max())

        return hook

    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    hooks = [module.register_forward_pre_hook(watch(name)) for name, module in linears.items()]
    model(TOKENS)
    for hook in hooks:
        hook.remove()
    for name, linear in linears.items():
        weight = quantize_rtn(linear.weight.detach().float(), form.weight)
        if form.has_input_scale:
            share = 0.6 if "v_proj" in name else 0.8  # q and k share their rows, v does not
            weight = replace(weight, input_scale=torch.tensor([share * largest[name] / 127]))
        linear.weight = nn.Parameter(QuantizedTensor.from_weight(weight, form, model.dtype), requires_grad=False)
    return model


def pair(model: Llama, form: LinearFormat) -> tuple[Llama, Runtime]:
    """One model on the reference kernels, and prepared, on the runtime that it gets."""
    reference = quantize(model, form)
    laid_out = copy.deepcopy(reference)
    prepare(laid_out)
    return reference, choose_runtime(laid_out)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("name", STATIC_FORMATS)
def test_static_activations_round_where_torch_does(make, name):
    """Integer linears are exact, so nothing but ties can differ."""
    for dtype in (torch.bfloat16, torch.float32):
        reference, chosen = pair(make(CONFIG).to(dtype), STATIC_FORMATS[name])
        assert chosen.name.startswith("native"), chosen.reason
        caches = [KVCache(CONFIG, 2, 40, torch.float32, "cpu") for _ in range(2)]
        parts = []
        for model, cache in zip((reference, chosen.runner), caches, strict=True):
            parts.append(torch.cat([model(TOKENS[:, :30], cache, 0), model(TOKENS[:, 30:31], cache, 30)], 1))
        if dtype == torch.bfloat16:
            assert (parts[0] == parts[1]).all(-1).double().mean() > 0.9
        assert distance(parts[1], parts[0]) < 0.02
        dynamic, _ = pair(make(CONFIG).to(dtype), replace(STATIC_FORMATS[name], activation=ActivationGrid()))
        assert distance(parts[0][:, :30], dynamic(TOKENS)[:, :30]) > 1e-3  # static scales are not what rows would choose


@pytest.mark.parametrize("name", WEIGHT_ONLY_FORMATS)
def test_every_int4_layout_is_as_near_to_float32_as_torch_is(make, name):
    reference, chosen = pair(make(CONFIG).bfloat16(), WEIGHT_ONLY_FORMATS[name])
    assert chosen.name.startswith("native"), chosen.reason
    wide = copy.deepcopy(reference).float()
    truth = wide(TOKENS)
    assert distance(chosen.runner(TOKENS), truth) < 1.25 * distance(reference(TOKENS), truth) < 0.25
