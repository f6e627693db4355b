"""`--runtime`: what runs is chosen, said and recorded."""

from __future__ import annotations

import functools

import pytest
from cli_runs import records_of, run_llmq

from llmq.model import runtime
from llmq.model.compiled import CompiledLlama
from llmq.ops import native

BENCH = ("--new-tokens", "2", "--repeats", "1", "--prompt-lengths", "8", "--scheme", "int8-dynamic", "--threads", "1", "--json")


@pytest.fixture(autouse=True)
def _needs_native():
    status = native.status()
    if isinstance(status, native.Unavailable) or status.isa == "generic":
        pytest.skip("the native runtime cannot run here")


@pytest.mark.parametrize(("asked", "said"), [("auto", "native ("), ("native", "native ("), ("torch", "torch: it was asked for")])
def test_records_say_what_ran(wt2_8m, asked, said):
    result = run_llmq("bench", "tokens-per-second", wt2_8m, "--runtime", asked, *BENCH)
    records = records_of(result)
    assert [record["kind"] for record in records] == ["prefill", "decode"]
    for record in records:
        assert record["notes"][0].startswith(f"runtime: {said}")
        assert record["kernels"] == {"native-int8-dynamic": 56, "native-bf16": 1}


@pytest.mark.slow
def test_a_fallback_is_said(wt2_8m):
    result = run_llmq("bench", "tokens-per-second", wt2_8m, "--kernel", "dequant-gemm", *BENCH)
    reason = "runtime: torch: model.layers.0.self_attn.q_proj is laid out for dequant-gemm"
    assert records_of(result)[0]["notes"][0] == reason
    text = run_llmq("generate", wt2_8m, "Once", "--kernel", "dequant-gemm", "-s", "int4", "-S", "group_size=32", "-n", "2")
    assert reason in text.stderr


@pytest.mark.slow
def test_compile_runs_what_torch_runs(short_model, evaluation_text, monkeypatch):
    """Traced and not compiled further, which is inductor's work and takes half a minute."""
    monkeypatch.setattr(runtime, "CompiledLlama", functools.partial(CompiledLlama, backend="eager"))
    records = records_of(run_llmq("bench", "tokens-per-second", short_model, "--compile", *BENCH))
    for record in records:
        assert record["notes"][0] == "runtime: compile"
        assert record["protocol"]["params"]["compile"]
        assert record["metrics"]["compile_s"]["value"] > 0
        assert set(record["kernels"]) == {"native-int8-dynamic", "native-bf16"}
    question = ("eval", "perplexity", short_model, "--text", evaluation_text, "--limit", "2", "--kv-cache", "int8")
    torchs, compiled = (
        records_of(run_llmq(*question, "--runtime", name, "--threads", "1", "--json"))[0] for name in ("torch", "compile")
    )
    assert compiled["metrics"]["nll"]["value"] == pytest.approx(torchs["metrics"]["nll"]["value"], abs=1e-3)
    assert compiled["kernels"] == torchs["kernels"]


def test_native_or_an_error(wt2_8m):
    refused = run_llmq("generate", wt2_8m, "Once", "--dtype", "fp16", "--runtime", "native", code=5)
    assert "the native runtime cannot run this model: it computes in float32 or bfloat16" in refused.stderr
    graph = run_llmq("generate", wt2_8m, "Once", "--runtime", "graph", code=5)
    assert "the graph runtime cannot run this model: CUDA graphs are for NVIDIA GPUs, and the model is on cpu" in graph.stderr
    compiled = run_llmq("bench", "tokens-per-second", wt2_8m, "--compile", "--runtime", "native", *BENCH, code=2)
    assert "--compile is --runtime compile, and --runtime native was asked for too" in compiled.stderr
    unknown = run_llmq("generate", wt2_8m, "Once", "--runtime", "nativ", code=2)
    assert "unknown runtime 'nativ'" in unknown.stderr
