"""The scheme that docs/adding-a-scheme.md shows is found, applied and described."""

import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import llmq.schemes
from llmq.schemes import registry
from llmq.schemes.apply import quantize_

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-scheme.md"


def test_the_page_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / "int5.py").write_text(code)
    monkeypatch.setattr(llmq.schemes, "__path__", [*llmq.schemes.__path__, str(tmp_path)])
    registry._schemes.cache_clear()
    try:
        assert "int5" in registry.scheme_names()
        assert registry.describe_schemes("int5")[0]["bits_per_weight"] == 5.5
        module = nn.Linear(128, 8)
        weight = module.weight.detach().clone()
        coverage = quantize_(module, "int5", options={"group_size": "64"})
        assert coverage.rows[0].target == "int5 g64 float zero"
        assert coverage.bits_per_weight == 5.5
        step = module.weight.weight.scale.float().repeat_interleave(64, 1)
        assert ((module.weight.dequantize() - weight).abs() <= 0.55 * step).all()
        assert module(torch.randn(2, 128)).shape == (2, 8)
    finally:
        registry._schemes.cache_clear()
        sys.modules.pop("llmq.schemes.int5", None)
