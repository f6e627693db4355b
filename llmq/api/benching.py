"""Speed: tokens/s of a model, the machine's walls, single kernels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch

from llmq.api.loading import Setup, open_model
from llmq.api.recipes import Recipe
from llmq.benchmark.decode import bench_model
from llmq.benchmark.kernels import INTEGER_KERNELS, KernelPlan, bench_kernels, measure_int8_peak, shapes_of
from llmq.benchmark.machine import Bandwidth, measured_bandwidth, measured_peak
from llmq.benchmark.speed import BenchPlan
from llmq.checkpoint import open_checkpoint
from llmq.errors import UsageError
from llmq.numerics.grid import LinearFormat
from llmq.progress import SILENT, Progress
from llmq.results.record import Protocol, ResultRecord, Subject
from llmq.schemes.registry import resolve, scheme_names


def bench_tokens(
    path: str,
    recipe: Recipe | None = None,
    setup: Setup | None = None,
    plan: BenchPlan | None = None,
    *,
    progress: Progress = SILENT,
) -> list[ResultRecord]:
    """Measure prefill and decode of a checkpoint, for every combination that `plan` asks for.

    Raises:
        UsageError: a prompt or context does not fit the model's context.
    """
    setup, plan = setup or Setup(), plan or BenchPlan()
    loaded = open_model(path, recipe, setup, progress=progress)
    plan.check(loaded.model.config.max_position_embeddings)
    bandwidth = machine_bandwidth(setup, progress)
    plan = replace(plan, seed=setup.seed)
    report = bench_model(loaded.runner, plan, kv_dtype=loaded.kv_dtype, bandwidth=bandwidth, progress=progress)
    return report.records(loaded.subject(with_tokenizer=False), loaded.setup.environment(), notes=[loaded.runtime.note])


def machine_bandwidth(setup: Setup, progress: Progress = SILENT) -> Bandwidth:
    """Measure what this machine can read, once a process."""
    with progress.task("measuring the machine's read bandwidth", 1) as advance:
        bandwidth = measured_bandwidth(setup.device, torch.get_num_threads())
        advance(1)
    return bandwidth


def bench_machine(setup: Setup, *, progress: Progress = SILENT) -> ResultRecord:
    """Measure the machine's walls: sequential read bandwidth and the fp32 matmul rate."""
    setup.apply()
    bandwidth = machine_bandwidth(setup, progress)
    with progress.task("measuring the matmul peaks", 2) as advance:
        peak = measured_peak(setup.device, torch.get_num_threads())
        advance(1)
        int8_peak = measure_int8_peak(setup.device)
        advance(1)
    environment = setup.environment()
    return ResultRecord(
        kind="bandwidth",
        subject=Subject(model=environment.cpu, checkpoint_sha256="", scheme="machine"),
        protocol=Protocol(name="bandwidth", version=1, params={"method": bandwidth.method, "matmul_size": peak.size}),
        metrics=bandwidth.metrics() | peak.metrics() | (int8_peak.metrics() if int8_peak else {}),
        environment=environment,
    )


@dataclass(frozen=True, slots=True)
class KernelRequest:
    """Which kernels to time on which weights: `shapes` 'NxK,…' or names of `MODEL_SHAPES`, or those of the checkpoint `model`."""

    shapes: str | None = None
    model: str | None = None
    rows: tuple[int, ...] = (1, 4, 16, 128)
    schemes: tuple[str, ...] | None = None

    def settle(self) -> tuple[tuple[int, int], ...]:
        """Return the shapes (N, K)."""
        if self.shapes and self.model:
            raise UsageError("name shapes or a model, not both.")
        if self.model:
            return shapes_of(open_checkpoint(self.model).config)
        return tuple(dict.fromkeys(parse_shapes(self.shapes or "1.1b")))


MODEL_SHAPES: Mapping[str, tuple[tuple[int, int], ...]] = MappingProxyType(
    {
        "1.1b": ((2048, 2048), (256, 2048), (5632, 2048), (2048, 5632)),
        "7b": ((4096, 4096), (11008, 4096), (4096, 11008)),
        "8b": ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)),
    }
)
"""(N, K) of the projections of TinyLlama 1.1 B, Llama 2 7 B and Llama 3 8 B."""


def parse_shapes(text: str) -> list[tuple[int, int]]:
    """Parse '2048x2048,5632x2048' or '1.1b,7b' into [(N, K), …].

    Raises:
        UsageError: a part is neither a shape nor a name of `MODEL_SHAPES`.
    """
    shapes: list[tuple[int, int]] = []
    for part in text.split(","):
        if part.strip().lower() in MODEL_SHAPES:
            shapes += MODEL_SHAPES[part.strip().lower()]
            continue
        n, x, k = part.strip().lower().partition("x")
        if not (x and n.isdecimal() and k.isdecimal() and int(n) and int(k)):
            raise UsageError(
                f"--shapes takes NxK,… (outputs x inputs), such as 2048x2048,5632x2048, or names of models "
                f"({', '.join(MODEL_SHAPES)}); got {part.strip()!r}."
            )
        shapes.append((int(n), int(k)))
    return shapes


def bench_all_kernels(request: KernelRequest, setup: Setup, *, progress: Progress = SILENT) -> list[ResultRecord]:
    """Check every kernel that can run here against the exact result, then time it; one record each.

    Raises:
        UsageError: shapes cannot be read, or a scheme is unknown.
        ShapeError: a shape does not fit a scheme's grid.
    """
    setup.apply()
    names = request.schemes or tuple(name for name in scheme_names() if name not in ("fp16", "fp32"))
    formats: dict[str, LinearFormat] = {}
    for name in names:
        form = resolve(name).format
        if form not in formats.values():  # schemes that differ in their codes only run the same kernels
            formats[name] = form
    plan = KernelPlan(formats, request.settle(), request.rows, setup.torch_dtype, seed=setup.seed)
    bandwidth = machine_bandwidth(setup, progress)
    with progress.task("measuring the machine's matmul peaks", 2) as advance:
        fp32_peak = measured_peak(setup.device)
        advance(1)
        int8_peak = measure_int8_peak(setup.device)
        advance(1)
    report = bench_kernels(plan, device=setup.device, progress=progress)
    environment = setup.environment()
    for refusal in report.refusals:
        if "it is wrong" in refusal.reason:
            progress.note(f"{refusal.kernel} on {refusal.format} [{refusal.n}, {refusal.k}] was not timed: {refusal.reason}")
    return [
        ResultRecord(
            kind="kernel",
            subject=Subject(model=f"random weight {result.n}x{result.k}", checkpoint_sha256="", scheme=result.format),
            protocol=result.protocol(),
            metrics=result.metrics(bandwidth, int8_peak if int8_peak and result.kernel in INTEGER_KERNELS else fp32_peak),
            kernels={result.kernel: 1},
            environment=environment,
            notes=["chosen by default for this case"] if result.chosen else [],
        )
        for result in report.results
    ]
