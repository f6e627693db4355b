"""The decode step that is recorded once: buffers, positions, spans and caches, token by token against eager torch.

Recording is a GPU's. Here `Again` stands for it: its replay runs the recorded call anew on the same buffers, which is what a
CUDA graph does; what is not read from a buffer stays as it was recorded, and would be seen.
"""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from replaying import Again, Refuses
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from llmq.errors import KernelError, UsageError
from llmq.model import cuda_graph
from llmq.model.config import LlamaConfig
from llmq.model.cuda_graph import CudaCapture, GraphLlama
from llmq.model.generate import generate
from llmq.model.kv_cache import KVCache
from llmq.model.llama import Llama
from llmq.model.runtime import choose_runtime, weights_of
from llmq.model.stepped import LEAST_SPAN, span_of
from llmq.numerics.grid import FloatGrid, LinearFormat
from llmq.numerics.weight import QuantizedWeight
from llmq.ops.tensor import QuantizedTensor
from llmq.ops.usage import record_usage

TOLERANCE = 2e-5
"""Absolute, of logits between -3 and 3: attention sums over masked positions too, in another order."""
BF16_TOLERANCE = 0.01
"""The same where attention computes in bfloat16 and rounds its sums."""


@pytest.fixture
def model(make: Callable[[LlamaConfig], Llama], tiny_config: LlamaConfig) -> Llama:
    wide = dataclasses.replace(tiny_config, num_layers=2, max_position_embeddings=600, sliding_window=6, sliding_layers=(1,))
    return make(wide)


def text(length: int, batch: int = 2) -> Tensor:
    return torch.randint(3, 61, (batch, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize(
    ("visible", "length", "span"),
    [
        (1, 4096, 128),
        (128, 4096, 128),
        (129, 4096, 256),
        (256, 4096, 256),
        (2049, 4096, 4096),
        (1, 100, 100),
        (100, 100, 100),
        (130, 200, 200),
        (4000, 4100, 4096),
        (4097, 4100, 4100),
    ],
)
def test_a_step_reads_the_least_power_of_two(visible: int, length: int, span: int) -> None:
    assert span_of(visible, length) == span
    assert visible <= span <= max(2 * visible, LEAST_SPAN)


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("prompt", [1, 100, 250])
def test_every_token_is_the_references(model: Llama, kv_dtype: torch.dtype, prompt: int) -> None:
    tokens, capture = text(prompt + 40), Again()
    runner = GraphLlama(model, capture)
    mine, its = (KVCache(model.config, 2, 600, kv_dtype, "cpu") for _ in range(2))
    got, expected = (each.last_logits(tokens[:, :prompt], cache, 0) for each, cache in ((runner, mine), (model, its)))
    assert torch.allclose(got, expected, atol=TOLERANCE if prompt == 1 else 0)
    for position in range(prompt, prompt + 40):
        got = runner(tokens[:, position : position + 1], mine, position)
        expected = model(tokens[:, position : position + 1], its, position)
        assert torch.allclose(got, expected, atol=BF16_TOLERANCE if kv_dtype == torch.bfloat16 else TOLERANCE), position
    # int8 codes of keys that differ in the last bit may differ by a step; scales and floats may not
    for got, expected in zip(mine.tensors, its.tensors, strict=True):
        assert torch.allclose(got.float(), expected.float(), atol=1 if got.dtype == torch.int8 else 0.01)
    assert capture.recorded == {1: 1, 100: 2, 250: 2}[prompt]  # crossing 128, and 256


def test_a_context_that_only_the_device_knows_reads_all(model: Llama) -> None:
    tokens, capture = text(30), Again()
    runner = GraphLlama(model, capture)
    cache = KVCache(model.config, 2, 300, torch.float32, "cpu")
    runner.last_logits(tokens[:, :10], cache, 0)
    expected = model(tokens)
    for start in (torch.tensor(10), torch.tensor([11])):
        position = int(start)
        got = runner(tokens[:, position : position + 1], cache, start)
        assert torch.allclose(got[:, 0], expected[:, position], atol=TOLERANCE)
    assert runner.span(cache, torch.tensor(10)) == 300
    assert runner.span(cache, 10) == runner.reads(cache, 10) == 128
    model.fused_caches = frozenset({torch.float32})  # whose attention stops at what it sees
    assert runner.reads(cache, 10) == 11
    assert capture.recorded == 1


def test_a_cache_keeps_its_recordings_and_takes_them_with_it(model: Llama) -> None:
    tokens, capture = text(30), Again()
    runner = GraphLlama(model, capture)
    expected = model(tokens)
    caches = [KVCache(model.config, 2, 200, torch.float32, "cpu") for _ in range(2)]
    for cache in caches:
        runner.last_logits(tokens[:, :20], cache, 0)
    for position in range(20, 30):  # in turns: neither may write into the other's memory
        for cache in caches:
            got = runner(tokens[:, position : position + 1], cache, position)
            assert torch.allclose(got[:, 0], expected[:, position], atol=TOLERANCE)
    assert capture.recorded == 2
    keys = weakref.ref(caches[0].keys[0])
    del cache, caches
    gc.collect()
    assert keys() is None
    assert not runner._steps
    assert not runner._spans


def test_logits_are_the_callers(model: Llama) -> None:
    tokens, runner = text(12), GraphLlama(model, Again())
    cache = KVCache(model.config, 2, 200, torch.float32, "cpu")
    kept = [runner(tokens[:, position : position + 1], cache, position) for position in range(12)]
    assert torch.allclose(torch.cat(kept, 1), model(tokens), atol=TOLERANCE)


def test_other_calls_are_torchs(model: Llama) -> None:
    tokens, capture = text(24), Again()
    runner = GraphLlama(model, capture)
    assert torch.equal(runner(tokens), model(tokens))
    assert torch.equal(runner.head(runner.hidden(tokens)), model(tokens))
    mine, its = (KVCache(model.config, 2, 40, torch.float32, "cpu") for _ in range(2))
    for start, stop in ((0, 7), (7, 9), (9, 24)):
        assert torch.equal(runner(tokens[:, start:stop], mine, start), model(tokens[:, start:stop], its, start))
    assert capture.recorded == 0
    assert weights_of(runner) is model
    assert not runner(tokens).requires_grad


def test_generation_is_the_same(model: Llama) -> None:
    prompt = text(120, 1)[0].tolist()
    expected = list(generate(model, prompt, max_new_tokens=24, stop=()))
    assert list(generate(GraphLlama(model, Again()), prompt, max_new_tokens=24, stop=())) == expected


def test_what_a_replay_runs_is_counted(model: Llama) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            weight = QuantizedWeight.from_float(module.weight.detach())
            tensor = QuantizedTensor.from_weight(weight, LinearFormat(FloatGrid("float32")), torch.float32)
            module.weight = nn.Parameter(tensor, requires_grad=False)
    runner, cache = GraphLlama(model, Again()), KVCache(model.config, 2, 40, torch.float32, "cpu")
    with record_usage() as usage:
        for position in range(3):
            runner(text(1), cache, position)
    assert usage.linears() == {"reference": 15}
    assert usage.calls == {"reference": 45}


def test_what_does_not_fit_is_refused(model: Llama) -> None:
    runner, cache = GraphLlama(model, Again()), KVCache(model.config, 2, 40, torch.float32, "cpu")
    with pytest.raises(UsageError, match="1 tokens at position 40 do not fit"):
        runner(text(1), cache, 40)
    with pytest.raises(UsageError, match="the KV cache is for 2 sequences, got 1"):
        runner(text(1, 1), cache, 0)


def test_a_recording_that_fails_is_a_sentence(model: Llama) -> None:
    cache = KVCache(model.config, 2, 40, torch.float32, "cpu")
    with pytest.raises(KernelError, match="cannot hold the decode step: operation not permitted when stream is capturing; use"):
        GraphLlama(model, Refuses())(text(1), cache, 0)


@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.int8], ids=str)
def test_a_step_asks_for_no_value(tiny_config: LlamaConfig, kv_dtype: torch.dtype) -> None:
    """What Python wants to see cannot be recorded; tensors without values raise where one is asked for."""
    config = dataclasses.replace(tiny_config, max_position_embeddings=600, sliding_window=6, sliding_layers=(1,))
    with FakeTensorMode():
        model = Llama(config).requires_grad_(False)
        cache = KVCache(config, 2, 600, kv_dtype, "cpu")
        tokens, unknown = torch.zeros(2, 1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        for start in (3, 200, unknown):
            logits = GraphLlama(model, Again())(tokens, cache, start)
            assert (logits.shape, logits.dtype) == ((2, 1, 61), torch.float32)
        with pytest.raises(DataDependentOutputException):
            model(tokens, cache, int(unknown))


class FakeCuda:
    """The part of torch.cuda that a recording needs; it writes down what it is asked."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def graph_pool_handle(self) -> str:
        return "pool"

    def current_stream(self) -> FakeStream:
        return FakeStream("main", self.events)

    def Stream(self) -> FakeStream:  # noqa: N802 - torch's name
        return FakeStream("side", self.events)

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        self.events.append(f"device {device}")
        yield

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        self.events.append(f"on {stream.name}")
        yield
        self.events.append(f"off {stream.name}")

    def CUDAGraph(self) -> FakeCuda:  # noqa: N802 - torch's name
        return self

    def replay(self) -> None:
        self.events.append("replay")

    @contextmanager
    def graph(self, graph: FakeCuda, pool: str) -> Iterator[None]:
        self.events.append(f"begin {pool}")
        yield
        self.events.append("end")


@dataclasses.dataclass
class FakeStream:
    name: str
    events: list[str]

    def wait_stream(self, other: FakeStream) -> None:
        self.events.append(f"{self.name} waits for {other.name}")


def test_a_recording_warms_up_beside_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda()
    monkeypatch.setattr(cuda_graph.torch, "cuda", fake)
    output = torch.zeros(1)

    def step() -> Tensor:
        fake.events.append("step")
        return output

    recording = CudaCapture(torch.device("cuda", 1)).record(step)
    assert recording.output is output
    recording.replay()
    warm = ["side waits for main", "on side", "step", "step", "off side", "main waits for side"]
    assert fake.events == ["device cuda:1", *warm, "begin pool", "step", "end", "replay"]


def test_the_choice_on_a_cpu(model: Llama) -> None:
    with pytest.raises(KernelError, match="the graph runtime cannot run this model: CUDA graphs are for NVIDIA GPUs, and the"):
        choose_runtime(model, "graph")
    assert choose_runtime(model).runner is model  # plain tensors: not native either
    assert choose_runtime(model, "compile").name == "compile"
    with pytest.raises(UsageError, match=r"unknown runtime 'grahp'.*graph"):
        choose_runtime(model, "grahp")


def test_the_choice_on_a_gpu(model: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Llama, "device", property(lambda self: torch.device("cuda")))
    monkeypatch.setattr(cuda_graph, "CudaCapture", lambda device: Again())
    tried: list[torch.dtype] = []
    monkeypatch.setattr(cuda_graph, "trial", lambda runner, kv_dtype: tried.append(kv_dtype))
    chosen = choose_runtime(model, kv_dtype=torch.int8)
    assert (chosen.describe(), chosen.fell_back) == ("graph", False)
    assert isinstance(chosen.runner, GraphLlama)
    assert tried == [torch.int8]
    reason = "a CUDA graph cannot hold the decode step: it waits"
    monkeypatch.setattr(cuda_graph, "trial", lambda runner, kv_dtype: reason)
    fallen = choose_runtime(model)
    assert (fallen.runner, fallen.note, fallen.fell_back) == (model, f"runtime: torch: {reason}", True)
    with pytest.raises(KernelError, match=f"the graph runtime cannot run this model: {reason}; use --runtime auto or torch"):
        choose_runtime(model, "graph")


def test_a_trial_says_what_cannot_be_recorded(model: Llama) -> None:
    assert cuda_graph.trial(GraphLlama(model, Again()), torch.int8) is None
    assert cuda_graph.trial(GraphLlama(model, Refuses()), torch.int8) == (
        "a CUDA graph cannot hold the decode step: operation not permitted when stream is capturing"
    )
