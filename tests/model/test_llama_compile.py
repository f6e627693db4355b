"""torch.compile and torch.export: one graph, compiled once for all decode steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from llmq.model.config import LlamaConfig
from llmq.model.generate import decode_step, prefill
from llmq.model.kv_cache import KVCache
from llmq.model.llama import Llama


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.set_stance("default")
    torch.compiler.reset()


@pytest.fixture
def model(make: Callable[[LlamaConfig], Llama], tiny_config: LlamaConfig) -> Llama:
    return make(dataclasses.replace(tiny_config, num_layers=2, sliding_window=6, sliding_layers=(1,)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_decode_steps_compile_once(model: Llama, tokens: Tensor, backend: str) -> None:
    expected = model(tokens)
    step = torch.compile(decode_step, fullgraph=True, backend=backend)
    for attempt in range(2):  # the second with another cache of the same size, as a benchmark's repeats have
        cache = KVCache(model.config, 2, 32, torch.float32, "cpu")
        prefill(model, cache, tokens[:, :5])
        for position in range(5, 24):
            logits = step(model, cache, tokens[:, position : position + 1], torch.tensor(position))
            assert torch.allclose(logits[:, 0], expected[:, position], atol=1e-5), (attempt, position)
            torch.compiler.set_stance("fail_on_recompile")
        torch.compiler.set_stance("fail_on_recompile")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compiled_module_is_a_model_to_decode_step(model: Llama, tokens: Tensor) -> None:
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    cache = KVCache(model.config, 2, 32, torch.float32, "cpu")
    prefill(model, cache, tokens[:, :23])
    logits = decode_step(compiled, cache, tokens[:, 23:], torch.tensor([23]))
    assert torch.allclose(logits[:, 0], model(tokens)[:, 23], atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_full_forward_is_one_graph_and_exports(model: Llama, tokens: Tensor) -> None:
    expected = model(tokens)
    assert torch.allclose(torch.compile(model, fullgraph=True, backend="eager")(tokens), expected, atol=1e-5)
    program = torch.export.export(model, (tokens,))
    assert torch.allclose(program.module()(tokens), expected, atol=1e-5)
