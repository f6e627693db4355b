"""AWQ and AutoRound schemes: their options, and that a walk with them ends nearer to the original than rounding to nearest."""

from pathlib import Path
from typing import Any

import pytest
import torch

from llmq.algorithms.statistics import Needs, Statistics
from llmq.calibration.corpus import resolve_text
from llmq.calibration.recorder import InputRecorder
from llmq.calibration.sequential import quantize_sequential
from llmq.checkpoint import load_model, load_tokenizer_for, open_checkpoint
from llmq.errors import SchemeError, UsageError
from llmq.schemes.apply import quantize_
from llmq.schemes.registry import resolve

SCHEMES = [f"int{bits}-{method}" for bits in (4, 3, 2) for method in ("awq", "autoround")]


@pytest.mark.parametrize("name", SCHEMES)
def test_what_they_need_and_do(name: str) -> None:
    scheme = resolve(name)
    bits, method = int(name[3]), name[5:]
    assert scheme.format == resolve(f"int{bits}").format
    assert (scheme.prepares, scheme.tunes) == ((True, False) if method == "awq" else (False, True))
    assert (Needs.TARGETS in scheme.needs) == (method == "autoround")
    with pytest.raises(SchemeError, match=r"needs statistics of the inputs of some\.linear"):
        scheme.quantize_weight(torch.randn(4, 256), None, "some.linear")


def test_options_that_mean_nothing_are_left_out() -> None:
    assert {"sweeps", "refit"}.isdisjoint(resolve("int4-awq").options_json())
    assert "sweeps" in resolve("int4-awq", {"rounding_by": "gptq"}).options_json()
    assert not resolve("int4-awq", {"scales": "none"}).prepares
    assert "exponents" not in resolve("int4-awq", {"scales": "none"}).options_json()
    assert "sweeps" in resolve("int4-autoround").options_json()
    assert "sweeps" not in resolve("int4-autoround", {"start": "nearest"}).options_json()
    with pytest.raises(UsageError):
        resolve("int4-autoround", {"steps": 0})


def test_starts_and_clips() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 256, generator=generator) ** 3
    x = torch.randn(600, 256, generator=generator)
    statistics = Statistics(2 / 600 * x.T @ x)
    nearest, report = resolve("int4-autoround", {"start": "nearest"}).quantize_weight(weight, statistics, "a.v_proj")
    plain, _ = resolve("int4", {"search": "range"}).quantize_weight(weight, None, "a.v_proj")
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(nearest.tensors, plain.tensors, strict=True))
    assert report.loss == report.rtn_loss
    _, gptq = resolve("int4-autoround").quantize_weight(weight, statistics, "a.v_proj")
    _, clipped = resolve("int4-awq").quantize_weight(weight, statistics, "a.v_proj")
    _, kept = resolve("int4-awq").quantize_weight(weight, statistics, "a.q_proj")
    assert gptq.loss is not None
    assert clipped.loss is not None
    assert report.loss is not None
    assert gptq.loss < clipped.loss < report.loss
    assert kept.loss == pytest.approx(report.loss, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [("int3-awq", {"exponents": "5"}), ("int3-autoround", {"start": "nearest", "steps": "12", "batch": "4"})],
    ids=["awq", "autoround"],
)
def test_walk_is_nearer_than_rounding_to_nearest(short_model: Path, name: str, options: dict[str, str]) -> None:
    checkpoint = open_checkpoint(short_model)

    def fresh() -> Any:
        return load_model(checkpoint, dtype=torch.float32)

    model, tokenizer = fresh(), load_tokenizer_for(checkpoint)
    text = resolve_text(None, split="train")
    windows = InputRecorder(tokenizer, windows=12, length=128).record_text(text)
    other = InputRecorder(tokenizer, windows=4, length=128, seed=5).record_text(resolve_text(None, split="test"))
    with torch.no_grad():
        p = model(other.tokens.long()).double().log_softmax(-1)
        results = []
        for scheme in (resolve(name, options), None):
            quantized = fresh()
            if scheme is None:
                quantize_(quantized, resolve("int3", {"search": "range"}), skip=["lm_head"])
            else:
                quantize_sequential(quantized, scheme, windows, skip=["lm_head"])
            q = quantized(other.tokens.long()).double().log_softmax(-1)
            results.append(float((p.exp() * (p - q)).sum(-1).mean()))
    assert results[0] < 0.9 * results[1]
