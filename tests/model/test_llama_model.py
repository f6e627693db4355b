"""What the model promises besides its numbers: how it is filled, called, refused, and what a decode step costs."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from llmq.errors import UsageError
from llmq.model.config import LlamaConfig
from llmq.model.kv_cache import KVCache
from llmq.model.llama import Llama
from llmq.model.rope import inverse_frequencies, rotate, rotation_table

Make = Callable[[LlamaConfig], Llama]


def test_parameters_have_hugging_face_names(make: Make, tiny_config: LlamaConfig) -> None:
    config = dataclasses.replace(tiny_config, num_layers=1, attention_bias=True, attention_output_bias=True, mlp_bias=True)
    attention = {f"model.layers.0.self_attn.{p}_proj.{kind}" for p in "qkvo" for kind in ("weight", "bias")}
    mlp = {f"model.layers.0.mlp.{p}_proj.{kind}" for p in ("gate", "up", "down") for kind in ("weight", "bias")}
    norms = {f"model.layers.0.{p}_layernorm.weight" for p in ("input", "post_attention")}
    rest = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert set(make(config).state_dict()) == attention | mlp | norms | rest


def test_meta_model_is_complete_once_filled(make: Make, tiny_config: LlamaConfig, tokens: Tensor) -> None:
    source = make(tiny_config)
    state = source.state_dict()
    with torch.device("meta"):
        model = Llama(tiny_config)
    model.load_state_dict(state, assign=True)
    assert model.model.norm.weight.data_ptr() == state["model.norm.weight"].data_ptr()  # nothing was copied
    assert torch.equal(model(tokens), source(tokens))


def test_tied_head_is_the_embedding_itself(make: Make, tiny_config: LlamaConfig, tokens: Tensor) -> None:
    tied = dataclasses.replace(tiny_config, tie_word_embeddings=True)
    source = make(tied)
    state = {key: value for key, value in source.state_dict().items() if key != "lm_head.weight"}
    with torch.device("meta"):
        model = Llama(tied)
    model.load_state_dict(state, assign=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model(tokens), source(tokens))


def test_a_head_that_comes_with_a_tied_checkpoint_is_kept(make: Make, tiny_config: LlamaConfig) -> None:
    tied = dataclasses.replace(tiny_config, tie_word_embeddings=True)
    state = make(tied).state_dict()
    state["lm_head.weight"] = state["lm_head.weight"].clone()  # as after quantizing the head alone
    model = Llama(tied)
    model.load_state_dict(state, assign=True)
    assert model.lm_head.weight.data_ptr() == state["lm_head.weight"].data_ptr()


def test_an_untied_head_may_not_be_missing(make: Make, tiny_config: LlamaConfig) -> None:
    state = {key: value for key, value in make(tiny_config).state_dict().items() if key != "lm_head.weight"}
    with pytest.raises(RuntimeError, match=r"lm_head\.weight"):
        Llama(tiny_config).load_state_dict(state, assign=True)


class _OnlyLinear(torch.Tensor):
    """A weight that nothing but F.linear may touch."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.nn.functional.linear:
            raise AssertionError(f"{func} touched the weight of a linear")
        x, weight, *bias = args
        return torch.nn.functional.linear(x, weight.as_subclass(torch.Tensor), *bias)


def test_weights_of_linears_are_only_given_to_linear(make: Make, tiny_config: LlamaConfig, tokens: Tensor) -> None:
    model = make(tiny_config)
    expected = model(tokens)
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert len(linears) == 7 * tiny_config.num_layers + 1
    for linear in linears:
        weight = linear.weight.detach().as_subclass(_OnlyLinear)
        del linear.weight
        object.__setattr__(linear, "weight", weight)
    cache = KVCache(tiny_config, 2, 24, torch.float32, "cpu")
    assert torch.equal(model(tokens), expected)
    assert torch.equal(model(tokens, cache), expected)
    assert torch.allclose(model(tokens[:, 23:], cache, 23), expected[:, 23:], atol=1e-5)


def test_every_linear_is_called_once(make: Make, tiny_config: LlamaConfig, tokens: Tensor) -> None:
    model = make(tiny_config)
    calls: Counter[str] = Counter()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    model(tokens)
    assert len(calls) == 7 * tiny_config.num_layers + 1
    assert set(calls.values()) == {1}


def test_sequences_of_a_batch_do_not_see_each_other(make: Make, tiny_config: LlamaConfig, tokens: Tensor) -> None:
    model = make(tiny_config)
    together = model(tokens)
    for row in range(len(tokens)):
        assert torch.allclose(model(tokens[row : row + 1]), together[row : row + 1], atol=1e-5)


def test_no_token_sees_a_later_one(make: Make, tiny_config: LlamaConfig, tokens: Tensor) -> None:
    model = make(tiny_config)
    changed = tokens.clone()
    changed[:, 12:] = 3
    assert torch.equal(model(changed)[:, :12], model(tokens)[:, :12])
    assert not torch.allclose(model(changed)[:, 12:], model(tokens)[:, 12:], atol=1e-2)


def test_a_call_without_a_cache_can_be_trained(make: Make, tiny_config: LlamaConfig, tokens: Tensor) -> None:
    model = make(tiny_config).requires_grad_(True)
    model(tokens).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_a_call_with_a_cache_records_no_gradients(make: Make, tiny_config: LlamaConfig, tokens: Tensor) -> None:
    model = make(tiny_config).requires_grad_(True)
    cache = KVCache(tiny_config, 2, 24, torch.float32, "cpu")
    assert not model.hidden(tokens, cache).requires_grad
    assert not cache.keys[0].requires_grad


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float32, torch.int8])
def test_bfloat16(make: Make, tiny_config: LlamaConfig, tokens: Tensor, cache_dtype: torch.dtype) -> None:
    exact = make(tiny_config)
    reference = exact(tokens).log_softmax(-1)
    model = make(tiny_config).to(torch.bfloat16)
    cache = KVCache(tiny_config, 2, 24, cache_dtype, "cpu")
    steps = torch.cat([model(tokens[:, :20], cache), *(model(tokens[:, p : p + 1], cache, p) for p in range(20, 24))], 1)
    for logits in (model(tokens), steps):
        assert logits.dtype == torch.bfloat16
        difference = logits.float().log_softmax(-1)
        kl = (reference.exp() * (reference - difference)).sum(-1)
        assert 0 < kl.mean() < 2e-3


@pytest.mark.parametrize(
    ("length", "start", "message"),
    [
        (41, None, "41 tokens are beyond the model's context of 40 tokens"),
        (25, 0, "25 tokens at position 0 do not fit into a KV cache of 24 tokens; make it at least 25 long"),
        (1, 24, "1 tokens at position 24 do not fit"),
        (1, -1, "1 tokens at position -1 do not fit"),
    ],
)
def test_lengths_that_do_not_fit(make: Make, tiny_config: LlamaConfig, length: int, start: int | None, message: str) -> None:
    model = make(tiny_config)
    tokens = torch.ones(1, length, dtype=torch.int64)
    where = () if start is None else (KVCache(tiny_config, 1, 24, torch.float32, "cpu"), start)
    with pytest.raises(UsageError, match=message):
        model(tokens, *where)


def test_batch_must_be_the_caches(make: Make, tiny_config: LlamaConfig, tokens: Tensor) -> None:
    with pytest.raises(UsageError, match="for 3 sequences, got 2"):
        make(tiny_config)(tokens, KVCache(tiny_config, 3, 24, torch.float32, "cpu"))


def test_start_is_one_position(make: Make, tiny_config: LlamaConfig, tokens: Tensor) -> None:
    cache = KVCache(tiny_config, 2, 24, torch.float32, "cpu")
    with pytest.raises(UsageError, match=r"one position for the whole batch, got a tensor of shape \(2,\)"):
        make(tiny_config)(tokens[:, :1], cache, torch.tensor([3, 4]))


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_decode_step_is_lean(make: Make, tiny_config: LlamaConfig) -> None:
    def ops(layers: int) -> Counter[str]:
        config = dataclasses.replace(tiny_config, num_layers=layers)
        model, cache = make(config), KVCache(config, 1, 24, torch.float32, "cpu")
        with _Count() as count:
            model(torch.tensor([[3]]), cache, 20)
        return count.ops

    block = ops(4) - ops(3)  # what one more block costs
    assert block["mm"] == 7
    assert block["roll"] == 2  # RoPE's swapped halves
    assert block["copy_"] == 2  # key and value into the cache, and nowhere else
    assert block["cat"] + block["clone"] + block["repeat_interleave"] == 0
    assert block["_to_copy"] == 0
    assert block.total() <= 70, block


def test_llama3_scaling_leaves_short_waves_and_stretches_long_ones(tiny_config: LlamaConfig) -> None:
    from llmq.model.config import RopeScaling

    config = dataclasses.replace(tiny_config, head_dim=64, rope_theta=500000.0)
    plain = inverse_frequencies(config)
    scaled = inverse_frequencies(dataclasses.replace(config, rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)))
    wavelengths = 2 * torch.pi / plain
    short, long = wavelengths < 8192 / 4, wavelengths > 8192
    between = ~(short | long)
    assert all(kind.any() for kind in (short, long, between))
    assert torch.equal(scaled[short], plain[short])
    assert torch.equal(scaled[long], plain[long] / 8)
    assert ((scaled < plain) & (scaled > plain / 8))[between].all()


def test_rotation_turns_pairs_and_depends_on_distance_only(tiny_config: LlamaConfig) -> None:
    cosines, sines = rotation_table(inverse_frequencies(tiny_config), torch.arange(30))
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8, generator=generator).expand(2, 1, 30, 1, 8)
    turned_q, turned_k = rotate(q, cosines, sines), rotate(k, cosines, sines)
    assert torch.allclose(turned_q.norm(dim=-1), q.norm(dim=-1))
    assert torch.equal(turned_q[:, 0], q[:, 0])
    scores = torch.einsum("bthd,bshd->ts", turned_q, turned_k)
    for distance in range(30):
        diagonal = scores.diagonal(-distance)
        assert torch.allclose(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5)
    assert scores.diagonal(0).std() < 1e-5 < scores[:, 0].std()


def test_a_model_on_the_meta_device_does_not_bring_the_compiler() -> None:
    """torch's own embedding would: a second, and 150 MB, at the start of every command."""
    code = (
        "import sys, torch\n"
        "from llmq.model.config import LlamaConfig\n"
        "from llmq.model.llama import Llama\n"
        "config = LlamaConfig(16, 8, 8, 1, 2, 1, 4, 16, 1e-5, 1e4)\n"
        "with torch.device('meta'):\n"
        "    assert Llama(config).model.embed_tokens.weight.is_meta\n"
        "assert 'torch._dynamo' not in sys.modules\n"
        "torch.manual_seed(3)\n"
        "expected = torch.nn.Embedding(16, 8).weight\n"
        "torch.manual_seed(3)\n"
        "assert torch.equal(Llama(config).model.embed_tokens.weight, expected)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
