"""Rotations folded into the weights: the same function, from disk to disk, after a kill too, and refused where they cannot be."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import pytest
import torch
from cli_runs import run_llmq
from jobs import GPTQ, content, finish, finished_parts, start, stop_when

import llmq
from llmq.algorithms.rotation import Rotation
from llmq.api.keeping import JobKeeper
from llmq.calibration.fisher import FisherSettings, fisher_factors
from llmq.checkpoint import load_model, open_checkpoint
from llmq.checkpoint.parts import PartwiseModel
from llmq.checkpoint.rotated import RotatedModel
from llmq.model.llama import Llama
from llmq.ops.tensor import QuantizedTensor
from llmq.ranks import Ranks

TOKENS = torch.arange(48).reshape(2, 24) * 7 + 3


@pytest.fixture(scope="module")
def tied_model(tmp_path_factory: pytest.TempPathFactory, wt2_8m: Path) -> Path:
    """A two-layer model whose head is its embedding."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
    import make_random_checkpoint

    folder = tmp_path_factory.mktemp("random") / "tied"
    shape = "--hidden-size 64 --intermediate-size 96 --layers 2 --heads 4 --kv-heads 2 --context 64 --vocab-size 4096 --tied"
    make_random_checkpoint.main([str(folder), *shape.split(), "--tokenizer-from", str(wt2_8m)])
    return folder


def logits(path: Path) -> torch.Tensor:
    with torch.no_grad():
        return load_model(open_checkpoint(path), dtype=torch.float32)(TOKENS)


def numbers(model: Llama) -> dict[str, torch.Tensor]:
    """What a model's parameters mean, by their names."""
    return {
        name: parameter.dequantize() if isinstance(parameter, QuantizedTensor) else parameter.detach()
        for name, parameter in model.named_parameters()
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["heads", "residual", "both"])
def test_the_written_model_computes_the_same(short_model: Path, tmp_path: Path, kind: str) -> None:
    expected = logits(short_model)
    for scheme, tolerance in (("fp32", 2e-5), ("bf16", 0.03)):
        out = tmp_path / scheme
        run_llmq("quantize", short_model, "-s", scheme, "--rotate", kind, "--seed", 4, "-o", out)
        error = (logits(out) - expected).abs().max() / expected.abs().max()
        assert 0 < error < tolerance
        assert json.loads((out / "llmq.json").read_text())["rotation"] == {"kind": kind, "seed": 4}
    before, after = (numbers(load_model(open_checkpoint(path))) for path in (short_model, tmp_path / "bf16"))
    changed = {name for name, parameter in after.items() if not torch.equal(parameter, before[name])}
    residual = kind != "heads"
    assert ("model.embed_tokens.weight" in changed, "lm_head.weight" in changed) == (residual, residual)
    assert ("model.layers.1.self_attn.v_proj.weight" in changed) is True
    norms = [parameter for name, parameter in after.items() if "norm" in name]
    assert all(bool((norm == 1).all()) for norm in norms) == residual


@pytest.mark.slow
def test_without_rotations_nothing_is_said_or_changed(short_model: Path, tmp_path: Path) -> None:
    run_llmq("quantize", short_model, "-s", "int8-dynamic", "--rotate", "none", "-o", tmp_path / "none")
    run_llmq("quantize", short_model, "-s", "int8-dynamic", "-o", tmp_path / "plain")
    assert content(tmp_path / "none") == content(tmp_path / "plain")
    assert json.loads((tmp_path / "plain" / "llmq.json").read_text())["rotation"] is None


@pytest.mark.slow
def test_a_killed_run_goes_on_with_its_rotations_and_no_others(short_model: Path, tmp_path: Path) -> None:
    rotated = (*GPTQ, "--rotate", "both")
    run_llmq("quantize", short_model, *rotated, "-o", tmp_path / "undisturbed")
    out = tmp_path / "out"
    process = start("quantize", short_model, *rotated, "-o", out)
    assert stop_when(process, lambda: finished_parts(out) >= 2)
    finish(process, code=-signal.SIGKILL)
    refused = run_llmq("quantize", short_model, *GPTQ, "--rotate", "heads", "-o", out, code=2)
    assert "rotation" in refused.output
    result = run_llmq("quantize", short_model, *rotated, "-o", out)
    assert "going on after" in result.output
    assert content(out) == content(tmp_path / "undisturbed")


@pytest.mark.slow
def test_in_memory_and_on_disk_agree(short_model: Path, tmp_path: Path) -> None:
    run_llmq("quantize", short_model, "-s", "int8-dynamic", "--rotate", "both", "-o", tmp_path / "out")
    loaded = llmq.load(str(short_model), llmq.Recipe("int8-dynamic", rotate="both"), llmq.Setup(runtime="torch"))
    mine, theirs = numbers(loaded.model), numbers(load_model(open_checkpoint(tmp_path / "out")))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())


def test_fisher_factors_are_those_of_the_rotated_model(short_model: Path) -> None:
    """What writes the residual stream has outputs y R1, so that its output factor becomes R1^T H_O R1."""
    rotation = Rotation(256, 32, 5)
    checkpoint = open_checkpoint(short_model)
    found: list[dict[str, tuple[torch.Tensor, torch.Tensor]]] = []
    for parts in (PartwiseModel(checkpoint, torch.float32), RotatedModel(checkpoint, torch.float32, rotation)):
        found.append({})
        keeper = JobKeeper(parts, None, ranks=Ranks(), strict=False)
        fisher_factors(
            parts.model,
            TOKENS,
            ["model.layers.1.mlp.down_proj"],
            lambda fqn, inputs, outputs: found[-1].update({fqn: (inputs, outputs)}),
            settings=FisherSettings(activations="fp32", gradients="fp32"),
            keeper=keeper,
        )
    (inputs, outputs), (rotated_inputs, rotated_outputs) = (each["model.layers.1.mlp.down_proj"] for each in found)
    r1 = rotation.r1
    assert r1 is not None
    expected = r1.T @ outputs.double() @ r1
    assert (rotated_outputs - expected).abs().max() < 1e-3 * expected.abs().max()
    assert (rotated_outputs - outputs).abs().max() > 0.1 * outputs.abs().max()
    assert (rotated_inputs - inputs).abs().max() < 1e-3 * inputs.abs().max()


@pytest.mark.slow
def test_refusals(short_model: Path, tied_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for kind in ("residual", "both"):
        refused = run_llmq("quantize", tied_model, "-s", "int8-dynamic", "--rotate", kind, "-o", out, code=4)
        assert "its head is its embedding" in refused.output
        assert not out.exists()
        assert not out.with_name("out.partial").exists()
    expected = logits(tied_model)
    run_llmq("quantize", tied_model, "-s", "fp32", "--rotate", "heads", "-o", out)
    torch.testing.assert_close(logits(out), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    unknown = run_llmq("quantize", short_model, "-s", "int8-dynamic", "--rotate", "all", "-o", tmp_path / "no", code=2)
    assert "one of auto, none, heads, residual, both, got 'all'" in unknown.output
    budget = ("--target-bpw", "4.5", "--rotate", "heads")
    refused = run_llmq("quantize", short_model, "-s", "int4", *budget, "-o", tmp_path / "no", code=2)
    assert "sensitivities of the model as it is" in refused.output
