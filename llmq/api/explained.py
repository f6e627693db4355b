"""What explaining a quantized model's loss found, as values and as a result record."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from llmq.api.candidates import Candidate
from llmq.api.loading import Loaded
from llmq.evaluation.divergence import CandidateResult
from llmq.evaluation.estimates import Estimate
from llmq.evaluation.layer_errors import OutputError
from llmq.evaluation.leave_one_out import Change
from llmq.results.record import Details, Metric, Protocol, ResultRecord


@dataclass(frozen=True, eq=False)
class LinearLoss:
    """What one quantized linear contributes.

    Attributes:
        fqn: its name.
        shape: (N, K) of its weight.
        format: in a few words.
        nbytes: what its weight takes, scales and zero points included.
        sqnr_db: signal to quantization noise of the weight; None for an exact one.
        error: what its quantization does to its outputs.
        cost: what the model loses less with the original's linear in its place.
        alone: what the original loses more with only this linear quantized; None: it was not asked for.
    """

    fqn: str
    shape: tuple[int, int]
    format: str
    nbytes: int
    sqnr_db: float | None
    error: OutputError
    cost: Change
    alone: Change | None = None

    def metrics(self) -> dict[str, Metric]:
        """The figures for a result record."""
        found = {
            "nbytes": Metric(value=self.nbytes, unit="bytes"),
            "bits_per_weight": Metric(value=8 * self.nbytes / (self.shape[0] * self.shape[1]), unit="bits"),
        }
        if self.sqnr_db is not None:
            found["sqnr"] = Metric(value=self.sqnr_db, unit="dB")
        found["weight_error"] = Metric(value=self.error.weight, unit="1")
        if self.error.inputs:
            found["input_error"] = Metric(value=self.error.inputs, unit="1")
        found |= _changes("cost", self.cost)
        return found if self.alone is None else found | _changes("alone", self.alone)


@dataclass(frozen=True, eq=False)
class Pick:
    """An override that is worth its bytes.

    Attributes:
        fqn: the linear.
        candidate: what it would be given.
        extra_bytes: what that takes more; below zero: less.
        left: share of the error of the linear's outputs that would be left.
        predicted: what the model would lose less: the linear's cost times what would be gone of its error.
        make: makes the linear's new weight, ready to run.
    """

    fqn: str
    candidate: Candidate
    extra_bytes: int
    left: float
    predicted: Change
    make: Callable[[], nn.Parameter]

    @property
    def argument(self) -> str:
        """What to paste."""
        return self.candidate.argument(self.fqn)

    @property
    def rank(self) -> tuple[bool, float]:
        """Larger is better: what costs no byte comes first, then divergence per byte."""
        gain = self.predicted.mean_kl.value
        return (True, gain) if self.extra_bytes <= 0 else (False, gain / self.extra_bytes)


@dataclass(frozen=True, eq=False)
class Verification:
    """All picks together, predicted and measured.

    Attributes:
        predicted: the sum of the picks' predictions.
        measured: on the windows that they were chosen by.
        fresh: on further windows of the text, by which nothing was chosen; None: it has none.
    """

    predicted: Change
    measured: Change
    fresh: Change | None

    def metrics(self) -> dict[str, Metric]:
        """The figures for a result record."""
        found = _changes("predicted", self.predicted) | _changes("measured", self.measured)
        return found if self.fresh is None else found | _changes("fresh", self.fresh)


@dataclass(frozen=True, eq=False)
class Explanation:
    """Everything that was found.

    Attributes:
        record: for a file, and for tables.
        linears: the quantized linears, in the model's order.
        picks: the best overrides first.
        verification: of all picks together; None: there are none.
        sought: whether overrides were looked for.
    """

    record: ResultRecord
    linears: tuple[LinearLoss, ...]
    picks: tuple[Pick, ...] = ()
    verification: Verification | None = None
    sought: bool = True


@dataclass
class Found:
    """What a record is made of."""

    model: Loaded
    original: Loaded
    whole: CandidateResult
    linears: tuple[LinearLoss, ...]
    picks: tuple[Pick, ...]
    verification: Verification | None
    kernels: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    sought: bool = True


def explanation_of(found: Found) -> Explanation:
    """Put everything into a record."""
    divergence, original = found.whole.divergence, found.original
    reference = {
        "reference": f"{original.name} {original.scheme}",
        "reference_sha256": original.checkpoint.sha256,
        "reference_dtype": original.setup.dtype,
    }
    params = {"windows": divergence.protocol.name, **divergence.protocol.params, **reference}
    metrics = {
        "kl_mean": _metric(divergence.kl_mean),
        "delta_ln_perplexity": _metric(divergence.delta_ln_perplexity),
        "perplexity": _metric(found.whole.perplexity.perplexity, "1"),
    }
    layers = {each.fqn: each.metrics() for each in found.linears}
    size = found.model.size.bytes
    for number, pick in enumerate(found.picks, start=1):
        layers[pick.fqn] |= {
            "pick": Metric(value=number, unit="1"),
            "pick_bytes": Metric(value=pick.extra_bytes, unit="bytes"),
            "pick_size_share": Metric(value=pick.extra_bytes / size, unit="1"),
            "pick_error_left": Metric(value=pick.left, unit="1"),
            **_changes("pick", pick.predicted),
        }
    if found.verification is not None:
        total = sum(pick.extra_bytes for pick in found.picks)
        metrics |= {"picks_bytes": Metric(value=total, unit="bytes")} | found.verification.metrics()
    record = ResultRecord(
        kind="layers",
        subject=found.model.subject(with_cache=False),
        protocol=Protocol(name="layers", version=1, params=params),
        metrics=metrics,
        kernels=found.kernels,
        environment=found.model.setup.environment(),
        notes=[*found.notes, *(f"pick {number}: {pick.argument}" for number, pick in enumerate(found.picks, start=1))],
        details=Details(layers=layers),
    )
    return Explanation(record, found.linears, found.picks, found.verification, found.sought)


def _changes(name: str, change: Change) -> dict[str, Metric]:
    return {f"{name}_kl": _metric(change.mean_kl), f"{name}_ln_perplexity": _metric(change.ln_perplexity)}


def _metric(estimate: Estimate, unit: str = "nats/token") -> Metric:
    return Metric(value=estimate.value, unit=unit, stderr=estimate.stderr)
