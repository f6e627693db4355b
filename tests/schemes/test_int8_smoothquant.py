"""int8-smoothquant through the walk: the formats it makes, what its options do, and that it is nearer to the original."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmq.calibration.corpus import resolve_text
from llmq.calibration.recorder import CalibrationSet, InputRecorder
from llmq.calibration.sequential import quantize_sequential
from llmq.checkpoint import load_model, load_tokenizer_for, open_checkpoint
from llmq.errors import SchemeError, UsageError
from llmq.numerics.grid import ActivationGrid
from llmq.ops.tensor import QuantizedTensor
from llmq.schemes.apply import quantize_
from llmq.schemes.registry import resolve


def calibration(path: Path, windows: int) -> tuple[Any, CalibrationSet]:
    checkpoint = open_checkpoint(path)
    recorder = InputRecorder(load_tokenizer_for(checkpoint), windows=windows, length=128)
    return load_model(checkpoint, dtype=torch.float32), recorder.record_text(resolve_text(None, split="train"))


def kl(original: Tensor, other: Tensor) -> float:
    p, q = original.double().log_softmax(-1), other.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_formats() -> None:
    dynamic, static = resolve("int8-smoothquant"), resolve("int8-smoothquant", {"activations": "static"})
    assert dynamic.format == resolve("int8-dynamic").format
    assert static.format.activation == ActivationGrid(symmetric=True, static=True)
    assert dynamic.needs_calibration
    assert (dynamic.prepares, dynamic.tunes) == (True, True)
    plain = resolve("int8-smoothquant", {"smoothing": "none", "compensate": "false"})
    assert (plain.prepares, plain.tunes) == (False, False)
    assert {"alpha_step", "damping"}.isdisjoint(plain.options_json())
    assert resolve("int8-smoothquant", {"compensate": "false", "activations": "static"}).tunes
    with pytest.raises(UsageError):
        resolve("int8-smoothquant", {"alpha_step": 0})
    with pytest.raises(SchemeError, match="use int8-dynamic"):
        dynamic.quantize_weight(torch.randn(4, 8), None, "some.linear")


@pytest.mark.slow
@pytest.mark.parametrize("activations", ["dynamic", "static"])
def test_the_walk_without_smoothing_is_int8_dynamic(wt2_8m: Path, activations: str) -> None:
    model, windows = calibration(wt2_8m, 12)
    tokens = InputRecorder(load_tokenizer_for(open_checkpoint(wt2_8m)), windows=4, length=128, seed=9).record_text(
        resolve_text(None, split="test")
    )
    with torch.no_grad():
        original = model(tokens.tokens.long())
        quantized, _ = calibration(wt2_8m, 1)
        resolved = resolve("int8-smoothquant", {"activations": activations, "smoothing": "none", "compensate": "false"})
        _, reports = quantize_sequential(quantized, resolved, windows, skip=["lm_head"])
        assert len(reports) == 7 * 8
        weight = quantized.blocks[0].mlp.down_proj.weight
        assert isinstance(weight, QuantizedTensor)
        plain = kl(original, quantized(tokens.tokens.long()))
        dynamic, _ = calibration(wt2_8m, 1)
        quantize_(dynamic, resolve("int8-dynamic"), skip=["lm_head"])
        nearest = kl(original, dynamic(tokens.tokens.long()))
    assert plain < 20 * nearest  # one scale for all tokens costs some, and breaks nothing
    if activations == "dynamic":
        assert plain == pytest.approx(nearest, rel=0.05)
