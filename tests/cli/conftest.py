"""The command line on real files: the bundled checkpoint and text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cli_runs import run_llmq

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
def int4_artefact(wt2_8m: Path, made_once: Callable[..., Path]) -> Path:
    """The bundled checkpoint as int4, group 32, written once for all tests that read it."""

    def quantize(out: Path) -> None:
        run_llmq("quantize", wt2_8m, "--scheme", "int4", "-S", "group_size=32", "-o", out)

    return made_once("wt2-8m-int4", quantize)
