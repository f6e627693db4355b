"""Every kernel that can run here, on the shapes of real models, each checked before it is timed.

For one format, shape and number of rows all kernels run in the same rounds, one after the other, so that whatever the machine
does meanwhile happens to all of them. Weights come from memory, as in a decode step where a whole model lies between two uses of
a weight: each kernel goes round copies of its weight that together are several times larger than the last-level cache.

    GB/s     bytes of the weight as stored, of x and of y, over the median time
    GOP/s    2 M N K multiplications and additions, over the median time
    shares   of the bandwidth that was measured before, and of the peak of square products: int8 (fastest kernel there is) for
             kernels that multiply integers, fp32 (torch) for the others. int4 kernels can exceed the former
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from llmq.benchmark.contender import Contender
from llmq.benchmark.machine import Bandwidth, Peak
from llmq.benchmark.order_statistics import Summary, median, paired_ratios, summarize
from llmq.benchmark.random_weights import random_weight
from llmq.benchmark.speed import rate_metric, time_metric
from llmq.benchmark.timing import TimingPlan, stopwatch_for, thread_count, time_rounds
from llmq.benchmark.traffic import linear_shapes
from llmq.errors import UsageError
from llmq.model.config import LlamaConfig
from llmq.numerics.grid import ActivationGrid, IntGrid, LinearFormat
from llmq.numerics.weight import QuantizedWeight
from llmq.ops.check import exact_for, worst_element
from llmq.ops.schema import Case
from llmq.ops.select import candidates, prepare
from llmq.ops.table import REFERENCE
from llmq.ops.tensor import QuantizedTensor
from llmq.progress import SILENT, Progress
from llmq.results.record import Metric, Protocol

PROTOCOL_VERSION = 1
"""Raised when the meaning of a figure of `kernel` records changes."""

_THROUGH_FP32 = frozenset({REFERENCE, "dequant-gemm"})
"""Kernels that multiply int8 codes as fp32 numbers: what they reach is not a peak of integer arithmetic."""

INTEGER_KERNELS = frozenset(
    {
        "native-int8-dynamic",
        "native-int8-dynamic-int4",
        "native-int8",
        "native-int4",
        "aten-int-mm",
        "triton-int8-dynamic",
        "triton-int8-dynamic-int4",
        "cuda-int-mm",
    }
)
"""Kernels that multiply integers: their wall is the peak of int8 products, that of the others the peak of fp32 products."""

_CHECKED_ROWS = 1024
"""Outputs that are checked at a time: the exact result needs several fp64 copies of their weights."""


@dataclass(frozen=True)
class KernelPlan:
    """What to time: every kernel x format x shape x number of rows.

    Attributes:
        formats: by the name that results carry, such as the scheme's.
        shapes: (N, K) of the weights.
        rows: numbers of rows of x.
        dtype: of x and y.
        timing: of each format, shape and number of rows.
        seed: of the random weights and inputs.
    """

    formats: Mapping[str, LinearFormat]
    shapes: tuple[tuple[int, int], ...]
    rows: tuple[int, ...] = (1, 4, 16, 128)
    dtype: torch.dtype = torch.bfloat16
    timing: TimingPlan = field(default_factory=lambda: TimingPlan(repeats=20, warmup=2, budget_s=2.0))
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.formats and self.shapes and self.rows):
            raise UsageError("timing kernels needs at least one format, one shape and one number of rows.")
        if min(min(shape) for shape in self.shapes) < 1 or min(self.rows) < 1:
            raise UsageError(f"shapes and rows must be positive, got {list(self.shapes)} and {list(self.rows)}.")


@dataclass(frozen=True)
class KernelResult:
    """One kernel on one format, shape and number of rows; it has passed the check."""

    kernel: str
    format: str
    n: int
    k: int
    rows: int
    dtype: str
    seconds: tuple[float, ...]
    moved_bytes: int
    chosen: bool
    """It is the kernel that `ops.select` takes for this case and number of rows."""
    ratio_to_chosen: Summary | None
    """Its time over the chosen kernel's, round by round; None when the chosen one did not pass the check."""

    @property
    def gbps(self) -> float:
        """Bytes of weight, x and y over the median time, in GB/s."""
        return self.moved_bytes / median(self.seconds) / 1e9

    @property
    def gops(self) -> float:
        """10⁹ multiplications and additions a second."""
        return 2 * self.rows * self.n * self.k / median(self.seconds) / 1e9

    def metrics(self, bandwidth: Bandwidth | None = None, peak: Peak | None = None) -> dict[str, Metric]:
        """Return the metrics of a `kernel` record, with shares of what the machine can do where that is known."""
        found = {
            "call_s": time_metric(self.seconds),
            "bandwidth_gbps": rate_metric(self.seconds, self.moved_bytes / 1e9, "GB/s", keep_samples=False),
            "gops": rate_metric(self.seconds, 2 * self.rows * self.n * self.k / 1e9, "GOP/s", keep_samples=False),
        }
        if self.ratio_to_chosen is not None:
            found["ratio_to_chosen"] = Metric(value=self.ratio_to_chosen.median, unit="1", stderr=self.ratio_to_chosen.stderr)
        if bandwidth is not None:
            found["bandwidth_share"] = Metric(value=self.gbps / bandwidth.best_gbps, unit="1")
        if peak is not None:
            found[f"{peak.dtype}_peak_share"] = Metric(value=self.gops / peak.best_gflops, unit="1")
        return found

    def protocol(self) -> Protocol:
        """Return how it was measured."""
        params = {"format": self.format, "n": self.n, "k": self.k, "rows": self.rows, "dtype": self.dtype}
        return Protocol(name="kernel", version=PROTOCOL_VERSION, params=params)


@dataclass(frozen=True, slots=True)
class KernelRefusal:
    """One kernel that was not timed on one format and shape, and why."""

    kernel: str
    format: str
    n: int
    k: int
    reason: str


@dataclass(frozen=True)
class KernelReport:
    """Everything that one `bench_kernels` call found."""

    results: tuple[KernelResult, ...]
    refusals: tuple[KernelRefusal, ...]
    threads: int


def bench_kernels(
    plan: KernelPlan, *, device: str = "cpu", threads: int | None = None, progress: Progress = SILENT
) -> KernelReport:
    """Check and time every kernel that can run here; those that cannot are listed with their reason.

    Args:
        plan: what to time.
        device: "cpu" or "cuda".
        threads: CPU threads (None: as many as torch uses now); restored afterwards.
        progress: is told of every format and shape.

    Raises:
        ShapeError: a shape does not fit a format.
    """
    results: list[KernelResult] = []
    refusals: list[KernelRefusal] = []
    cases = [(name, form, n, k) for name, form in plan.formats.items() for n, k in plan.shapes]
    for name, form, n, k in cases:
        form.weight.check(n, k, f"a weight of {name}")
    with torch.no_grad(), thread_count(threads) as used, progress.task("kernels", len(cases)) as advance:
        for name, form, n, k in cases:
            case = Case(form, n, k, plan.dtype, device)
            timed, refused = _bench_case(name, case, plan)
            results += timed
            refusals += refused
            advance(1)
    return KernelReport(tuple(results), tuple(refusals), used)


def shapes_of(config: LlamaConfig) -> tuple[tuple[int, int], ...]:
    """Return the different (N, K) of a model's linears, in the model's order."""
    return tuple(dict.fromkeys(linear_shapes(config).values()))


def measure_int8_peak(device: str = "cpu", *, threads: int | None = None, size: int = 1536) -> Peak | None:
    """Measure int8 x int8 -> int32 products of [size, size] matrices, quantizing x included, by the fastest kernel there is.

    Returns:
        the peak, in integer operations; None where every kernel goes through fp32.
    """
    form = LinearFormat(IntGrid(8), ActivationGrid())
    plan = KernelPlan({"int8-dynamic": form}, ((size, size),), (size,), timing=TimingPlan(repeats=5, warmup=1, budget_s=4.0))
    report = bench_kernels(plan, device=device, threads=threads)
    integer = [result for result in report.results if result.kernel not in _THROUGH_FP32]
    if not integer:
        return None
    fastest = min(integer, key=lambda result: min(result.seconds))
    return Peak(device, report.threads, "int8", fastest.kernel, size, summarize(fastest.seconds))


def _bench_case(name: str, case: Case, plan: KernelPlan) -> tuple[list[KernelResult], list[KernelRefusal]]:
    generator = torch.Generator().manual_seed(plan.seed)
    weight = random_weight(case, generator)
    refusals, contenders = [], {}
    for kernel, support in candidates(case):
        if not support.ok:
            refusals.append(KernelRefusal(kernel.name, name, case.n, case.k, support.reason))
            continue
        contenders[kernel.name] = Contender(kernel, kernel.prepack(weight.to(case.device)))
    results = []
    for rows in plan.rows:
        x = torch.randn(rows, case.k, generator=generator).to(case.dtype)
        for kernel_name, wrong in _failures(contenders, x, weight, case).items():
            refusals.append(KernelRefusal(kernel_name, name, case.n, case.k, f"it is wrong for {rows} rows: {wrong}"))
            del contenders[kernel_name]
        on_device = x.to(case.device)
        calls = {kernel_name: contender.call(on_device, case) for kernel_name, contender in contenders.items()}
        samples = time_rounds(calls, plan.timing, stopwatch=stopwatch_for(case.device))
        chosen = _chosen(weight, case, rows)
        results += [
            KernelResult(
                kernel=kernel_name,
                format=name,
                n=case.n,
                k=case.k,
                rows=rows,
                dtype=str(case.dtype).removeprefix("torch."),
                seconds=tuple(seconds),
                moved_bytes=contenders[kernel_name].nbytes + rows * (case.k + case.n) * case.dtype.itemsize,
                chosen=kernel_name == chosen,
                ratio_to_chosen=summarize(paired_ratios(seconds, samples[chosen])) if chosen in samples else None,
            )
            for kernel_name, seconds in samples.items()
        ]
    return results, refusals


def _failures(contenders: Mapping[str, Contender], x: Tensor, weight: QuantizedWeight, case: Case) -> dict[str, str]:
    """Return, for each kernel whose result is further from the exact one than rounding explains, where and how far."""
    on_cpu = Case(case.format, case.n, case.k, case.dtype, "cpu")
    got = {
        name: contender.kernel.linear(x.to(case.device), contender.tensors, None, case).cpu()
        for name, contender in contenders.items()
    }
    failures: dict[str, str] = {}
    for start in range(0, case.n, _CHECKED_ROWS):
        stop = min(start + _CHECKED_ROWS, case.n)
        for name, y in got.items():
            exact = exact_for(contenders[name].kernel, x, weight.rows(start, stop), None, on_cpu)
            wrong = worst_element(y[:, start:stop], exact)
            if wrong and name not in failures:
                failures[name] = wrong if start == 0 else f"in outputs {start} to {stop - 1}, {wrong}"
    return failures


def _chosen(weight: QuantizedWeight, case: Case, rows: int) -> str:
    """Return the kernel that a linear with this weight runs for `rows` rows."""
    holder = nn.Linear(case.k, case.n, bias=False, device="meta")
    tensor = QuantizedTensor.from_weight(weight.to(case.device), case.format, case.dtype)
    holder.weight = nn.Parameter(tensor, requires_grad=False)
    prepare(holder)
    prepared = holder.weight
    assert isinstance(prepared, QuantizedTensor)
    return prepared.pick(rows).name
