"""Fisher factors on disk: what is written comes back, and a full disk is told in one sentence."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from llmq.calibration.factors import FactorFiles
from llmq.errors import OutputError


def test_factors_come_back_and_are_complete_when_that_was_said(tmp_path: Path) -> None:
    files = FactorFiles(tmp_path / "factors")
    inputs, outputs = torch.randn(6, 6, generator=torch.Generator().manual_seed(1)), torch.eye(4) * -2
    files.write("model.layers.0.mlp.up_proj", inputs.t(), outputs)
    assert not files.complete
    files.finish()
    again = FactorFiles(tmp_path / "factors")
    assert again.complete
    read = again.read("model.layers.0.mlp.up_proj")
    assert torch.equal(read[0], inputs.t())
    assert torch.equal(read[1], outputs)


def test_a_full_disk_is_told_in_one_sentence_and_leaves_no_half_file(tmp_path: Path) -> None:
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False) if shutil.which("mount") else None
    if mounted is None or mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.strip() if mounted else 'no mount'}")
    try:
        files = FactorFiles(tmp_path / "factors")
        files.write("small", torch.eye(4), torch.eye(4))
        with pytest.raises(OutputError, match=r"Fisher factors of large .*No space left on device.*; free some space") as caught:
            files.write("large", torch.eye(1024), torch.eye(4))
        assert "\n" not in str(caught.value)
        assert [path.name for path in (tmp_path / "factors").iterdir()] == ["small.safetensors"]
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)
