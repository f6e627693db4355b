"""What stands behind the figures of an evaluation: every token, the histogram, single linears; on the fly and of an artefact."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llmq.api.calibrating import CalibrationSource
from llmq.api.evaluating import Evaluation, Question, evaluate_model
from llmq.api.loading import Setup
from llmq.api.quantizing import quantize_checkpoint
from llmq.api.recipes import Recipe
from llmq.results.store import append_records, read_records, read_tokens

QUESTION = Question(limit=2)
RECIPE = Recipe("int4", {"group_size": "64"}, skip=("*.mlp.*",))


@pytest.fixture(scope="module")
def evaluation(wt2_8m: Path) -> Evaluation:
    return evaluate_model(str(wt2_8m), RECIPE, Setup(threads=1), QUESTION, reference=str(wt2_8m))


@pytest.mark.slow
def test_figures_of_tokens_are_those_of_the_metrics(evaluation: Evaluation, tmp_path: Path) -> None:
    perplexity, divergence = evaluation.records
    assert perplexity.tokens_sha256 == divergence.tokens_sha256
    append_records(tmp_path / "runs.jsonl", evaluation.records)
    read = read_records(tmp_path / "runs.jsonl")
    tokens = read_tokens(tmp_path / "runs.jsonl", read[0])
    assert tokens is not None
    assert tokens.kl is not None
    assert tokens.same_top is not None
    assert tokens.nll.size == perplexity.protocol.params["n_scored_tokens"]
    assert tokens.nll.mean(dtype=np.float64) == pytest.approx(perplexity.metrics["nll"].value, rel=1e-12)
    assert tokens.kl.mean(dtype=np.float64) == pytest.approx(divergence.metrics["kl_mean"].value, rel=1e-6)  # stored in fp32
    assert tokens.same_top.mean() == pytest.approx(divergence.metrics["top1_agreement"].value, rel=1e-12)
    assert divergence.details.histograms["kl"].total == tokens.nll.size


def test_linears_have_their_figures(evaluation: Evaluation) -> None:
    layers = evaluation.records[0].details.layers
    assert len(layers) == 8 * 4  # what was left alone has none
    for fqn, figures in layers.items():
        assert ".self_attn." in fqn
        assert figures["bits_per_weight"].value == 4.5
        assert 15 < figures["sqnr"].value < 30


@pytest.mark.slow
def test_an_artefact_says_what_its_manifest_knows(wt2_8m: Path, tmp_path: Path) -> None:
    few = CalibrationSource(windows=2)
    recipe = Recipe("int4-gptq", {"sweeps": "0"}, calibration=few, skip=("*.mlp.*", "*.layers.[1-7].*"))
    made = quantize_checkpoint(str(wt2_8m), recipe, Setup(threads=1), tmp_path / "out")
    assert made is not None
    loss = {layer["fqn"]: layer["loss"] for layer in made.manifest.layers}
    found = evaluate_model(str(tmp_path / "out"), None, Setup(threads=1), QUESTION).records[0].details.layers
    assert {fqn: figures["loss"].value for fqn, figures in found.items()} == loss
    assert len(loss) == 4
    assert all(figures["loss"].value <= figures["rtn_loss"].value for figures in found.values())
