"""scripts/gpu_check.py without a GPU: it runs with few packages, tells right from wrong, and its records are records."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmq.results.record import SCHEMA_VERSION, ResultRecord

REPO = Path(__file__).parents[2]
SCRIPT = REPO / "scripts" / "gpu_check.py"
ALLOWED = ("torch", "triton", "safetensors", "sentencepiece", "typer", "rich", "numpy")
FEW = f"""
import builtins, importlib.metadata, re, runpy, sys
from importlib.machinery import PathFinder

allowed = {ALLOWED!r}
packages = importlib.metadata.packages_distributions()
needed, left = set(), list(allowed)
while left:  # what the allowed ones need themselves
    name = left.pop()
    key = name.lower().replace("_", "-")
    if key in needed:
        continue
    needed.add(key)
    try:
        texts = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        continue
    left += [re.match("[A-Za-z0-9._-]+", text)[0] for text in texts if "extra ==" not in text]

class Few(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        owners = {{owner.lower().replace("_", "-") for owner in packages.get(name.partition(".")[0], [])}}
        return super().find_spec(name, path, target) if not owners or owners & (needed | {{"llmq"}}) else None

sys.meta_path[sys.meta_path.index(PathFinder)] = Few
original = builtins.__import__

def plain_import(name, globals=None, *rest):  # newer versions of typer bring pydantic, older ones do not: llmq must not need it
    if name.partition(".")[0] == "pydantic" and (globals or {{}}).get("__name__", "").partition(".")[0] in {{"llmq", "gpu"}}:
        raise ImportError("pydantic is not installed", name="pydantic")
    return original(name, globals, *rest)

builtins.__import__ = plain_import
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(*words: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the script where nothing but the few packages that it names can be imported."""
    command = [sys.executable, "-c", FEW, str(SCRIPT), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What a run of everything on the CPU prints, and its records."""
    out = tmp_path_factory.mktemp("gpu") / "gpu.jsonl"
    done = run("--device", "cpu", "--small", "--minutes", 3, "--out", out)
    return done.stdout, out


@pytest.mark.slow
def test_it_runs_with_few_packages_and_says_what_it_leaves_out(measured: tuple[str, Path]) -> None:
    printed, _ = measured
    assert "0 findings wrong" in printed
    assert "pydantic is not installed" in printed
    for title in ("Right?", "Ceilings", "Kernels", "Llama-2-7B", "GPTQ", "prefill: int8-dynamic's speed over bf16's"):
        assert title in printed


@pytest.mark.slow
def test_its_records_are_records_and_give_the_same_tables(measured: tuple[str, Path]) -> None:
    printed, out = measured
    records = [ResultRecord.model_validate(json.loads(line)) for line in out.read_text().splitlines()]
    assert {record.subject.options["part"] for record in records} == {"verify", "walls", "kernels", "model", "block", "quantize"}
    assert {record.schema_version for record in records} == {SCHEMA_VERSION}
    assert run("--report", out).stdout == printed


@pytest.mark.slow
def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPO / "scripts"))
    from gpu.verify import verify

    from llmq.ops import select
    from llmq.ops.dense import DequantGemm

    linear = DequantGemm.linear
    select._self_test.cache_clear()  # what the kernel was once does not count
    # what a kernel does that forgets the last inputs of one row
    monkeypatch.setattr(DequantGemm, "linear", lambda self, x, *rest: linear(self, _without_the_end(x), *rest))
    found = list(verify("cpu", small=True, until=float("inf")))
    wrong = {each.who for each in found if each.wrong}
    assert wrong == {"dequant-gemm"}
    assert any("was expected" in each.wrong for each in found)
    select._self_test.cache_clear()


def _without_the_end(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x[-1:, -8:] = 0
    return x


@pytest.mark.slow
def test_it_refuses_in_one_sentence(tmp_path: Path) -> None:
    assert "unknown part 'walsl'. Did you mean 'walls'" in run("--parts", "walsl", code=2).stderr
    if not torch.cuda.is_available():
        assert "torch sees no CUDA device" in run(code=2).stderr
    (tmp_path / "there.jsonl").write_text("")
    done = run("--device", "cpu", "--out", tmp_path / "there.jsonl", code=2)
    assert "exists already" in done.stderr
    assert "holds no records" in run("--report", tmp_path / "there.jsonl", code=2).stderr


def test_what_is_wrong_is_kept_and_ratios_are_of_speeds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(REPO / "scripts"))
    from gpu.findings import Finding, read_findings, write_records
    from gpu.table import ratios

    what = "int4 g=128, 4096 x 11008 (7B), rows: 1"
    found = [
        Finding("verify", "int4 g=32", "triton-int4", 3.5, "of the bound", wrong="element (0, 1) is off", note="seen twice"),
        Finding("kernels", what, "triton-int4", 20.0, "us", "copy", 0.5, more={"gbps": (1200.0, "GB/s")}),
        Finding("kernels", what, "tinygemm", 30.0, "us", "copy", 0.3),
        Finding("model", "bf16: prefill of 2048", "torch-dense", 60.0, "ms"),
        Finding("model", "int8-dynamic: prefill of 2048", "triton-int8-dynamic", 40.0, "ms"),
    ]
    write_records(tmp_path / "found.jsonl", found, "cpu")
    again, _ = read_findings(tmp_path / "found.jsonl")
    assert again == found
    assert [value for _, value in ratios(again)] == [1.5, 1.5]
