"""`--kv-cache` wherever a cache is built: what it changes, what records and tables say of it, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_runs import records_of, run_llmq

import llmq
from llmq.api.comparing import CompareRequest
from llmq.api.loading import Setup
from llmq.errors import UsageError
from llmq.results.store import read_records

SMALL = ("--window", 64, "--limit", 4)
BF16 = {"dtype": "bf16", "bytes_per_token": 4096, "context_tokens": 256}  # 8 layers, 4 KV heads of 32
INT8 = {"dtype": "int8", "bytes_per_token": 2 * 8 * 4 * (32 + 4), "context_tokens": 256}


def test_perplexity_and_divergence_through_the_cache(wt2_8m: Path, evaluation_text: Path, tmp_path: Path) -> None:
    common = ("eval", "perplexity", wt2_8m, "--text", evaluation_text, *SMALL)
    losses = tmp_path / "bf16.safetensors"
    (plain,) = records_of(run_llmq(*common, "--losses", losses, "--json"))
    (named,) = records_of(run_llmq(*common, "--kv-cache", "bf16", "--json"))
    quantized, divergence = records_of(run_llmq(*common, "--kv-cache", "int8", "--reference", wt2_8m, "--json"))
    assert plain["subject"]["kv_cache"] == named["subject"]["kv_cache"] == BF16
    assert quantized["subject"]["kv_cache"] == divergence["subject"]["kv_cache"] == INT8
    values = [record["metrics"]["perplexity"]["value"] for record in (plain, named, quantized)]
    assert values[0] == values[1] != values[2]
    assert values[2] == pytest.approx(values[0], rel=0.01)
    assert 1e-5 < divergence["metrics"]["kl_mean"]["value"] < 2e-3  # the reference keeps its own cache
    text = run_llmq(*common, "--kv-cache", "int8", "--versus", losses).stdout
    assert "KV cache  int8, 2.30 kB a token, 590 kB a sequence at the context's limit of 256 tokens" in text
    assert "bit for bit the same" not in text


def test_generate_and_bench(wt2_8m: Path) -> None:
    prompt = "The ship was built in"
    for name in ("auto", "fp32", "int8"):
        assert run_llmq("generate", wt2_8m, prompt, "-n", 6, "--kv-cache", name).stdout.startswith(prompt)
    arguments = ("bench", "tokens-per-second", wt2_8m, "--prompt-lengths", 16, "--new-tokens", 2, "--repeats", 2)
    found = {name: records_of(run_llmq(*arguments, "--kv-cache", name, "--json"))[1] for name in ("auto", "int8")}
    assert [record["subject"]["kv_cache"] for record in found.values()] == [BF16, INT8]
    read = {name: record["metrics"]["kv_bytes_per_step"]["value"] for name, record in found.items()}
    assert read == {"auto": 18 * 4096, "int8": 18 * INT8["bytes_per_token"]}  # 16 tokens, and the second of two steps
    assert "KV cache  int8" in run_llmq(*arguments, "--kv-cache", "int8").stdout


@pytest.mark.slow
def test_the_context_to_its_limit_and_one_more(wt2_8m: Path) -> None:
    prompt = " = Tides = \n\n The tide is"
    tokens = len(llmq.load(str(wt2_8m)).tokenizer.encode(prompt, bos=True))
    room = 256 - tokens
    run_llmq("generate", wt2_8m, prompt, "-n", room, "--kv-cache", "int8")
    failed = run_llmq("generate", wt2_8m, prompt, "-n", room + 1, "--kv-cache", "int8", code=2)
    said = " ".join(failed.output.split())
    assert f"a prompt of {tokens} tokens and {room + 1} new ones are beyond the model's context of 256" in said
    assert f"at most {room} new tokens" in said


def test_compare_measures_every_scheme_with_every_cache(wt2_8m: Path, evaluation_text: Path, tmp_path: Path) -> None:
    records = tmp_path / "records.jsonl"
    result = run_llmq(
        *("compare", wt2_8m, "--schemes", "bf16,int8-weight-only", "--text", evaluation_text, *SMALL, "--record", records),
        *("--kv-cache", "auto,bf16,int8", "--repeats", 1, "--new-tokens", 2, "--prompt-length", 8),
    )
    for words in ("2 schemes, 2 KV caches", "bf16 kv=int8", "int8-weight-only kv=int8", "KV/token", "KV at limit", "590 kB"):
        assert words in result.stdout, words
    found = read_records(records)
    assert len(found) == 2 * 2 * 4  # auto is bf16 here, and measured once
    kl = {
        (record.subject.scheme, record.subject.kv_cache.dtype): record.metrics["kl_mean"].value
        for record in found
        if record.kind == "divergence" and record.subject.kv_cache
    }
    assert kl["bf16", "bf16"] == 0 < kl["bf16", "int8"]
    assert 0 < kl["int8-weight-only", "bf16"] < kl["int8-weight-only", "int8"]
    steps = {record.metrics["kv_bytes_per_step"].value for record in found if record.kind == "decode"}
    assert steps == {10 * 4096, 10 * 2304}
    assert "bf16 kv=int8" in run_llmq("report", "table", records, "--markdown").stdout


def test_compare_in_python_takes_the_setups_cache(wt2_8m: Path, evaluation_text: Path) -> None:
    request = CompareRequest(str(wt2_8m), ["bf16"], question=llmq.Question(str(evaluation_text), window=32, limit=1), bench=None)
    found = llmq.compare(request, Setup(kv_cache="int8")).records
    assert {record.subject.kv_cache.dtype for record in found if record.subject.kv_cache} == {"int8"}
    assert found[1].metrics["kl_mean"].value > 0
    with pytest.raises(UsageError, match="KV cache int8 is named twice"):
        CompareRequest(str(wt2_8m), ["bf16"], kv_caches=("int8", "int8")).caches(Setup())


def test_the_plan_says_what_a_cache_takes(wt2_8m: Path) -> None:
    planned = json.loads(run_llmq("quantize", wt2_8m, "-s", "int8-weight-only", "--dry-run", "--json").stdout)
    assert planned["kv_bytes_per_token"] == {"bf16": 4096, "int8": 2304}
    assert planned["context_tokens"] == 256
    text = run_llmq("quantize", wt2_8m, "-s", "int8-weight-only", "--dry-run").stdout
    assert "256 tokens, the context's limit, takes 1.05 MB in bf16 (4.10 kB a token) or 590 kB in int8" in text


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "x"),
        ("bench", "tokens-per-second"),
        ("eval", "perplexity", "--text", Path(llmq.__file__).parent / "assets" / "sample" / "evaluation.txt"),
        ("eval", "tasks", "--tasks", "arc_easy"),
        ("compare", "--schemes", "bf16"),
    ],
    ids=["generate", "bench", "perplexity", "tasks", "compare"],
)
def test_an_unknown_cache_is_refused_before_anything_is_loaded(wt2_8m: Path, arguments: tuple[object, ...]) -> None:
    group, *rest = arguments
    words = [group, wt2_8m, *rest] if group in ("generate", "compare") else [group, rest[0], wt2_8m, *rest[1:]]
    failed = run_llmq(*words, "--kv-cache", "int9", code=2)
    assert "unknown KV cache 'int9'. Did you mean 'int8'?" in failed.output


def test_a_written_artefact_does_not_speak_of_a_cache(wt2_8m: Path, tmp_path: Path) -> None:
    (record,) = records_of(run_llmq("quantize", wt2_8m, "-s", "int8-weight-only", "-o", tmp_path / "out", "--json"))
    assert record["subject"]["kv_cache"] is None
