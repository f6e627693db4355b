"""How kernels are chosen follows from the device, and from the wish."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from llmq.api import kernel_choice
from llmq.api.kernel_choice import FIXED, MEASURED, lay_out
from llmq.api.loading import Setup, open_model
from llmq.errors import KernelError
from llmq.ops.choice_file import KeptTimes, Machine


@pytest.mark.parametrize(
    ("kernel", "device", "prefer", "measured"),
    [
        (None, "cpu", None, False),
        (None, "cuda", None, True),
        (MEASURED, "cpu", None, True),
        (FIXED, "cuda", None, False),
        ("tinygemm", "cuda", "tinygemm", False),
        ("native-int8", "cpu", "native-int8", False),
    ],
)
def test_the_way_of_choosing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kernel: str | None, device: str, prefer: str | None, measured: bool
):
    asked: dict[str, Any] = {}
    machine = Machine(device=device, driver="", torch="", triton="", llmq="", threads=0)
    monkeypatch.setattr(kernel_choice, "prepare", lambda model, **how: asked.update(how) or [])
    monkeypatch.setattr(kernel_choice, "this_machine", lambda name: machine)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert lay_out(nn.Linear(4, 4), kernel, device) == []
    assert asked.get("prefer") == prefer
    assert isinstance(asked.get("timer"), KeptTimes) == measured
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_kernel_is_refused_before_anything_is_opened():
    with pytest.raises(KernelError, match="unknown kernel 'native-in4'"):
        open_model("no such checkpoint", None, Setup(kernel="native-in4"))
