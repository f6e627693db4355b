"""int8-smoothquant through the walk: the formats it makes, what its options do, and that it is nearer to the original."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmq.api.loading import open_model
from llmq.calibration.corpus import resolve_text
from llmq.calibration.recorder import CalibrationSet, InputRecorder
from llmq.calibration.sequential import quantize_sequential
from llmq.errors import SchemeError, UsageError
from llmq.numerics.grid import ActivationGrid
from llmq.ops.tensor import QuantizedTensor
from llmq.schemes.apply import quantize_
from llmq.schemes.registry import resolve


def calibration(path: Path, windows: int) -> tuple[Any, CalibrationSet]:
    loaded = open_model(str(path))
    text = resolve_text(None, split="train")
    return loaded.model.float(), InputRecorder(loaded.tokenizer, windows=windows, length=128).record_text(text)


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
def test_walk_is_nearer_than_without(wt2_8m: Path, activations: str) -> None:
    model, windows = calibration(wt2_8m, 12)
    tokens = InputRecorder(open_model(str(wt2_8m)).tokenizer, windows=4, length=128, seed=9).record_text(
        resolve_text(None, split="validation")
    )
    with torch.no_grad():
        original = model(tokens.tokens.long())
        results = {}
        for name, options in (
            ("plain", {"smoothing": "none", "compensate": "false"}),
            ("whole", {"alpha_step": "0.5"}),
        ):
            quantized, _ = calibration(wt2_8m, 1)
            resolved = resolve("int8-smoothquant", {"activations": activations, **options})
            _, reports = quantize_sequential(quantized, resolved, windows)
            assert len(reports) == 7 * 8
            weight = quantized.blocks[0].mlp.down_proj.weight
            assert isinstance(weight, QuantizedTensor)
            results[name] = kl(original, quantized(tokens.tokens.long()))
        dynamic, _ = calibration(wt2_8m, 1)
        quantize_(dynamic, resolve("int8-dynamic"))
        results["int8-dynamic"] = kl(original, dynamic(tokens.tokens.long()))
    assert results["whole"] < 0.9 * results["plain"]
    if activations == "dynamic":
        assert results["plain"] == pytest.approx(results["int8-dynamic"], rel=0.05)
