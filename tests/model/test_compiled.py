"""The model under torch.compile: the reference's tokens, and no compilation for what is only longer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from llmq.errors import KernelError
from llmq.model import compiled
from llmq.model.compiled import CompiledLlama
from llmq.model.config import LlamaConfig
from llmq.model.generate import generate
from llmq.model.kv_cache import KVCache
from llmq.model.llama import Llama
from llmq.numerics.grid import FloatGrid, LinearFormat
from llmq.numerics.weight import QuantizedWeight
from llmq.ops.tensor import QuantizedTensor
from llmq.ops.usage import record_usage
from llmq.progress import Silent

pytestmark = [pytest.mark.filterwarnings("ignore")]  # the compiler's own

TOLERANCE = 2e-5
"""Absolute, of fp32 logits between -3 and 3: fused loops and masked sums add in another order."""


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


@pytest.fixture
def config(tiny_config: LlamaConfig) -> LlamaConfig:
    return dataclasses.replace(tiny_config, num_layers=2, max_position_embeddings=400)


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def text(length: int, batch: int = 1) -> Tensor:
    return torch.randint(3, 61, (batch, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.slow
def test_it_generates_what_torch_does(make: Callable[[LlamaConfig], Llama], config: LlamaConfig) -> None:
    model = make(dataclasses.replace(config, num_layers=1))
    runner = CompiledLlama(model)
    for length in (9, 30, 120):
        prompt = text(length)
        cache, its = (KVCache(model.config, 1, 300, torch.float32, "cpu") for _ in range(2))
        assert torch.allclose(runner.last_logits(prompt, cache, 0), model.last_logits(prompt, its, 0), atol=TOLERANCE)
        got, expected = (list(generate(each, prompt[0].tolist(), max_new_tokens=16, stop=())) for each in (runner, model))
        assert got == expected
    assert graphs() <= 3  # prompts, steps in the whole of a short cache, and in the first part of a long one


@pytest.mark.slow
@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.int8], ids=str)
def test_lengths_do_not_compile_anew(make: Callable[[LlamaConfig], Llama], config: LlamaConfig, kv_dtype: torch.dtype) -> None:
    model = make(dataclasses.replace(config, sliding_window=6, sliding_layers=(1,)))
    runner = CompiledLlama(model, backend="eager")
    seen: list[int] = []
    for length, room in ((9, 300), (10, 310), (33, 150), (120, 200), (250, 300)):
        tokens = text(length + 12, batch=2)
        mine, its = (KVCache(config, 2, room, kv_dtype, "cpu") for _ in range(2))
        got, expected = (each.last_logits(tokens[:, :length], cache) for each, cache in ((runner, mine), (model, its)))
        assert torch.allclose(got, expected, atol=TOLERANCE)
        for position in range(length, length + 12):
            got, expected = (
                each(tokens[:, position : position + 1], cache, position) for each, cache in ((runner, mine), (model, its))
            )
            assert torch.allclose(got, expected, atol=TOLERANCE), (length, position)
        seen.append(graphs())
    assert seen[:3] == [2, 2, 2]
    assert seen[4] <= 3  # the last two read a whole cache and not a part of one, which may be other code


def test_scoring_is_one_graph(make: Callable[[LlamaConfig], Llama], config: LlamaConfig) -> None:
    model = make(config)
    runner = CompiledLlama(model, backend="eager")
    for length in (24, 31, 200):
        assert torch.allclose(runner(text(length, 2)), model(text(length, 2)), atol=TOLERANCE)
        assert not runner.hidden(text(length, 2)).requires_grad
    assert graphs() == 1


@pytest.mark.slow
def test_models_do_not_use_up_each_others_graphs(make: Callable[[LlamaConfig], Llama], config: LlamaConfig) -> None:
    """torch allows eight graphs of one function, and a model is a reason for another."""
    sizes = range(16, 26)
    models = [make(dataclasses.replace(config, num_layers=1, intermediate_size=size)) for size in sizes]
    for runner in [CompiledLlama(model, backend="eager") for model in models]:
        assert torch.allclose(runner(text(5)), runner.model(text(5)), atol=TOLERANCE)


def test_what_a_graph_runs_is_counted(make: Callable[[LlamaConfig], Llama], config: LlamaConfig) -> None:
    model = make(config)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            weight = QuantizedWeight.from_float(module.weight.detach())
            tensor = QuantizedTensor.from_weight(weight, LinearFormat(FloatGrid("float32")), torch.float32)
            module.weight = nn.Parameter(tensor, requires_grad=False)
    runner, cache = CompiledLlama(model, backend="eager"), KVCache(config, 1, 40, torch.float32, "cpu")
    with record_usage() as usage:
        runner.last_logits(text(8), cache, 0)
        runner(text(1), cache, 8)
    assert usage.linears() == {"reference": 15}
    assert usage.calls == {"reference": 30}


def test_a_tensor_position_and_progress(make: Callable[[LlamaConfig], Llama], config: LlamaConfig) -> None:
    class Listener(Silent):
        heard: tuple[str, ...] = ()

        def task(self, description: str, total: int):  # type: ignore[no-untyped-def]
            self.heard += (description,)
            return super().task(description, total)

    listener, model = Listener(), make(config)
    runner, cache = CompiledLlama(model, listener, backend="eager"), KVCache(config, 2, 40, torch.float32, "cpu")
    tokens = text(12, 2)
    runner.last_logits(tokens[:, :10], cache, 0)
    for start in (torch.tensor(10), torch.tensor([11])):
        got = runner(tokens[:, int(start) : int(start) + 1], cache, start)
        assert torch.allclose(got[:, 0], model(tokens)[:, int(start)], atol=TOLERANCE)
    assert listener.heard == ("compiling the prompt", "compiling the decode step")


def test_a_compiler_that_fails_is_a_sentence(
    make: Callable[[LlamaConfig], Llama], config: LlamaConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_compiler(*args: object) -> Tensor:
        raise RuntimeError("InvalidCxxCompiler: no C++ compiler\nlong story")

    monkeypatch.setattr(compiled.torch, "compile", lambda function, **options: no_compiler)
    runner = CompiledLlama(make(config))
    with pytest.raises(KernelError, match=r"cannot compile the prompt: InvalidCxxCompiler: no C\+\+ compiler; use another"):
        runner(text(8))
    with pytest.raises(KernelError, match="cannot compile the decode step"):
        runner(text(1), KVCache(config, 1, 40, torch.float32, "cpu"), 0)
