"""What every room's tests share: the bundled checkpoint, and the real data where this machine has it."""

from __future__ import annotations

import gc
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from filelock import FileLock

# Two OpenMP threads that spin for each other on a busy machine make a test of tiny models a hundred times slower.
# It has to be said before torch is loaded, and the process that only hands out tests need not load it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Without a GPU, Triton's kernels run in its interpreter, which has to be said before the first `import triton`, whoever does it.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ["LLMQ_HISTORY"] = "off"  # nothing is written into the user's own

# Shells start what runs in the background deaf to Ctrl-C, and so would be the processes that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Collecting thousands of tests makes millions of objects that all stay: a third of the time went to looking for garbage there.
GC_THRESHOLD = gc.get_threshold()
gc.set_threshold(100_000, 50, 50)

REPO = Path(__file__).parent.parent


def _beside(variable: str, *default: str) -> Path | None:
    """The folder that `variable` names, else the one beside the checkout, else None."""
    named = os.environ.get(variable)
    path = Path(named) if named else REPO.parent.joinpath(*default)
    return path if path.is_dir() else None


WIKITEXT = _beside("LLMQ_WIKITEXT_DIR", "shared", "data", "wikitext-2")
MODELS = _beside("LLMQ_TEST_MODELS", "shared", "models")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for the network is a mistake: let it fail at once


MEMORY_OF_A_PROCESS = 3 << 30
"""Bytes; about twice what a process that runs the whole suite comes to hold."""


def pytest_collection_finish() -> None:
    """What was collected stays to the end; see above."""
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLD)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """What `-n auto` means: a process a core that this one may use, and fewer where the memory does not hold them."""
    return max(1, min(len(os.sched_getaffinity(0)), psutil.virtual_memory().available // MEMORY_OF_A_PROCESS))


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """Return a function that calls `make(folder)` in one process of the run, and gives all of them the same folder.

    The folder is new and its parent exists. It is for what takes seconds to make and is only read.
    """
    own = tmp_path_factory.getbasetemp()
    place = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "made-once"
    place.mkdir(exist_ok=True)

    def folder_of(name: str, make: Callable[[Path], object]) -> Path:
        folder, made = place / name, place / f"{name}.made"
        with FileLock(place / f"{name}.lock"):
            if not made.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a process that failed
                make(folder)
                made.touch()
        return folder

    return folder_of


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny models run on one thread, unless a test asks for more; see above."""
    import torch

    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def wt2_8m() -> Path:
    """The bundled checkpoint: a trained Llama of 8.4 M parameters in Hugging Face layout."""
    return REPO / "llmq" / "assets" / "wt2-8m"


@pytest.fixture(scope="session")
def short_model(wt2_8m: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first blocks of the bundled checkpoint: what it says is nonsense, and how it quantizes is not."""
    from shortening import shortened

    return shortened(wt2_8m, tmp_path_factory.mktemp("short") / "wt2-short")


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
