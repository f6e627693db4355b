"""What every room's tests share: the bundled checkpoint, and the real data where this machine has it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# Two OpenMP threads that spin for each other on a busy machine make a test of tiny models a hundred times slower.
# It has to be said before torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["LLMQ_HISTORY"] = "off"  # nothing is written into the user's own

import pytest
import torch

REPO = Path(__file__).parent.parent


def _beside(variable: str, *default: str) -> Path | None:
    """The folder that `variable` names, else the one beside the checkout, else None."""
    named = os.environ.get(variable)
    path = Path(named) if named else REPO.parent.joinpath(*default)
    return path if path.is_dir() else None


WIKITEXT = _beside("LLMQ_WIKITEXT_DIR", "shared", "data", "wikitext-2")
MODELS = _beside("LLMQ_TEST_MODELS", "shared", "models")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for the network is a mistake: let it fail at once


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny models run on one thread, unless a test asks for more; see above."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def wt2_8m() -> Path:
    """The bundled checkpoint: a trained Llama of 8.4 M parameters in Hugging Face layout."""
    return REPO / "llmq" / "assets" / "wt2-8m"


@pytest.fixture(scope="session")
def stories260k() -> Path:
    """A third party's real llama2.c checkpoint; tests that need it are skipped where it is not."""
    if MODELS is None or not (MODELS / "stories260K").is_dir():
        pytest.skip("stories260K is not on this machine (set LLMQ_TEST_MODELS to the folder that holds it)")
    return MODELS / "stories260K"


@pytest.fixture(scope="session")
def wikitext() -> Path:
    """The folder of the real WikiText-2; tests that need it are skipped where it is not."""
    if WIKITEXT is None:
        pytest.skip("WikiText-2 is not on this machine (set LLMQ_WIKITEXT_DIR)")
    return WIKITEXT
