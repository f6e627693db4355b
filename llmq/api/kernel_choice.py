"""Which kernels a model runs on: one by name, the first that fits, or the fastest of those that do."""

from __future__ import annotations

from torch import nn

from llmq.benchmark.choosing import KernelTimer
from llmq.ops.choice_file import KeptTimes, choices_path, this_machine
from llmq.ops.select import KernelChoice, prepare
from llmq.ops.table import kernel_named
from llmq.progress import SILENT, Progress

FIXED, MEASURED = "fixed", "measured"
"""Two ways of choosing, where a kernel's name could stand."""


def check_kernel(kernel: str | None) -> None:
    """Raise KernelError when nothing can be chosen by that name."""
    if kernel not in (None, FIXED, MEASURED):
        kernel_named(kernel)


def lay_out(model: nn.Module, kernel: str | None, device: str, progress: Progress = SILENT) -> list[KernelChoice]:
    """Lay the weights of `model` out for their kernels, in place.

    Args:
        model: on `device`.
        kernel: a kernel's name; `FIXED`: the first of the table that fits; `MEASURED`: the fastest here, timed once a machine;
            None: measured on a GPU, where the fastest depends on shapes and driver, and fixed on a CPU, so that no record and no
            gate depends on a stopwatch.
        device: 'cpu' or 'cuda'.
        progress: is told of what is timed.

    Raises:
        KernelError: the kernel is unknown, or can run none of the weights.
    """
    if kernel == MEASURED or (kernel is None and device == "cuda"):
        times = KeptTimes(choices_path(), this_machine(device), KernelTimer(progress), progress)
        return prepare(model, timer=times)
    return prepare(model, prefer=None if kernel == FIXED else kernel)
