"""The command line on real files: the bundled checkpoint and text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_runs import run_llmq
from jobs import shortened

SAMPLE = Path(__file__).parent.parent.parent / "llmq" / "assets" / "sample"


@pytest.fixture(scope="session", autouse=True)
def _one_core() -> Iterator[None]:
    """`llmq` uses all cores unless told; here it finds one, as the other tests do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.sched_getaffinity", lambda _: {0})
        yield


@pytest.fixture(scope="session")
def evaluation_text() -> Path:
    return SAMPLE / "evaluation.txt"


@pytest.fixture(scope="session")
def calibration_text() -> Path:
    return SAMPLE / "calibration.txt"


@pytest.fixture(scope="session")
def int4_artefact(wt2_8m: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled checkpoint as int4, group 32, written once for all tests that read it."""
    out = tmp_path_factory.mktemp("artefact") / "int4"
    run_llmq("quantize", wt2_8m, "--scheme", "int4", "-S", "group_size=32", "-o", out)
    return out


@pytest.fixture(scope="session")
def short_model(wt2_8m: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first blocks of the bundled checkpoint."""
    return shortened(wt2_8m, tmp_path_factory.mktemp("short") / "wt2-short")
