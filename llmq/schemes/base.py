"""What a scheme is. A file in this folder that defines `SCHEMES` adds what is in it to the registry."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Generic, Literal, TypeVar

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from torch import Tensor

from llmq.algorithms.report import LayerReport, sqnr_db
from llmq.algorithms.rtn import quantize_rtn
from llmq.algorithms.statistics import Needs, Statistics
from llmq.errors import UsageError
from llmq.numerics.affine import MappingType
from llmq.numerics.grid import FloatGrid, LinearFormat
from llmq.numerics.weight import QuantizedWeight
from llmq.schemes.block import BlockWork


class SchemeOptions(BaseModel):
    """Base of every scheme's options: each has a description, and a unit where it has one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def idle(self) -> set[str]:
        """Return the options that mean nothing under the others; they are not part of a resolved scheme's description."""
        return set()


class NoOptions(SchemeOptions):
    """For schemes that leave nothing to choose."""


def number(value: object) -> object:
    """Read an integer that came as text, as `-S group_size=64` gives it; anything else is left for the type to refuse."""
    return int(value) if isinstance(value, str) and value.strip().isdecimal() else value


GroupSize = Annotated[Literal[32, 64, 128, 256], BeforeValidator(number)]
"""The group sizes for which every int4 kernel of the field is written."""

Mapping = Literal["symmetric", "symmetric_no_clipping_err"]
MAPPING_FIELD: Any = Field(
    "symmetric",
    description="how a symmetric grid is laid over a group's range: 'symmetric' puts max|w| half a step beyond the largest "
    "code (scale = max|w| / 127.5 or 7.5), 'symmetric_no_clipping_err' on a code",
)

OptionsT = TypeVar("OptionsT", bound=SchemeOptions)


class Scheme(ABC, Generic[OptionsT]):
    """A named recipe for one linear: what its weight becomes, and how."""

    name: ClassVar[str]
    summary: ClassVar[str]
    """One line for `llmq schemes`."""
    Options: type[OptionsT]
    baseline_dtype: ClassVar[torch.dtype | None] = None
    """For a baseline, which casts the whole model instead of quantizing its linears: the dtype."""

    @abstractmethod
    def format(self, options: OptionsT) -> LinearFormat:
        """Return what a linear computes under these options."""

    def mapping(self, options: OptionsT) -> MappingType | None:  # noqa: ARG002 - for subclasses to use
        """Return how ranges are laid over codes; None: the usual way of the grid."""
        return None

    def needs(self, options: OptionsT) -> Needs:  # noqa: ARG002
        """Return what has to be gathered with calibration text; a scheme that needs nothing is data-free."""
        return Needs.NONE

    def fisher_rounds(self, options: OptionsT) -> int:  # noqa: ARG002
        """Return the rounds of power iteration for Fisher factors, where `needs` has them."""
        return 1

    def distillation(self, options: OptionsT) -> dict[str, Any] | None:  # noqa: ARG002
        """Return how the quantized model is distilled at the end (fields of `calibration.distill.DistillSettings`), or None."""
        return None

    def rotates(self, options: OptionsT) -> bool:  # noqa: ARG002
        """Return whether the model is rotated first where the user leaves that open, see `algorithms.rotation`."""
        return False

    def prepares(self, options: OptionsT) -> bool:  # noqa: ARG002
        """Return whether `prepare_block` does something under these options."""
        return False

    def tunes(self, options: OptionsT) -> bool:  # noqa: ARG002
        """Return whether `tune_block` does something under these options."""
        return False

    def prepare_block(self, work: BlockWork, options: OptionsT) -> None:
        """Change the block's float weights before statistics are gathered, so that it computes the same function.

        Only parameters of `work.module` may change, norms included.
        """

    def tune_block(
        self,
        work: BlockWork,  # noqa: ARG002
        weights: dict[str, QuantizedWeight],
        options: OptionsT,  # noqa: ARG002
    ) -> dict[str, QuantizedWeight]:
        """Improve the weights of a block together, after each was quantized.

        Args:
            work: the block; its linears still have their float weights.
            weights: the quantized weights, by the names of `work.linears`.
            options: of this scheme.

        Returns:
            The weights to keep, by the same names; those of another grid than the scheme's have another format, too.
        """
        return weights

    def format_of(self, weight: QuantizedWeight, options: OptionsT) -> LinearFormat:  # noqa: ARG002 - most have one only
        """Return what a linear becomes that has got this weight from `quantize_weight` or `tune_block`."""
        return self.format(options)

    def quantize_weight(
        self,
        weight: Tensor,
        statistics: Statistics | None,  # noqa: ARG002 - round to nearest needs none
        options: OptionsT,
        fqn: str = "weight",
    ) -> tuple[QuantizedWeight, LayerReport]:
        """Quantize one weight; unless a scheme says otherwise, by rounding to nearest.

        Args:
            weight: [N, K], floating point; not changed.
            statistics: of the linear, for schemes that need calibration, else None.
            options: of this scheme.
            fqn: name of the linear, for the report.

        Returns:
            The quantized weight, and what that cost.

        Raises:
            ShapeError: the weight does not fit the grid.
            SchemeError: statistics are needed and are missing.
        """
        started = time.perf_counter()
        grid = self.format(options).weight
        if isinstance(grid, FloatGrid):
            return QuantizedWeight.from_float(weight.detach().to(getattr(torch, grid.dtype))), _report(fqn, weight, None, started)
        quantized = quantize_rtn(weight, grid, mapping=self.mapping(options))
        return quantized, _report(fqn, weight, quantized, started)


def _report(fqn: str, weight: Tensor, quantized: QuantizedWeight | None, started: float) -> LayerReport:
    noise = sqnr_db(weight, quantized) if quantized is not None else None
    return LayerReport(fqn, (weight.shape[0], weight.shape[1]), noise, seconds=time.perf_counter() - started)


@dataclass(frozen=True)
class ResolvedScheme:
    """A scheme with every option settled: what `registry.resolve` returns and everything else takes."""

    scheme: Scheme[Any]
    options: SchemeOptions

    @property
    def name(self) -> str:
        """The scheme's name."""
        return self.scheme.name

    @property
    def format(self) -> LinearFormat:
        """What a linear becomes."""
        return self.scheme.format(self.options)

    @property
    def needs(self) -> Needs:
        """What has to be gathered with calibration text."""
        return self.scheme.needs(self.options)

    @property
    def fisher_rounds(self) -> int:
        """See `Scheme.fisher_rounds`."""
        return self.scheme.fisher_rounds(self.options)

    @property
    def distillation(self) -> dict[str, Any] | None:
        """See `Scheme.distillation`."""
        return self.scheme.distillation(self.options)

    @property
    def rotates(self) -> bool:
        """See `Scheme.rotates`."""
        return self.scheme.rotates(self.options)

    @property
    def prepares(self) -> bool:
        """See `Scheme.prepares`."""
        return self.scheme.prepares(self.options)

    @property
    def tunes(self) -> bool:
        """See `Scheme.tunes`."""
        return self.scheme.tunes(self.options)

    @property
    def needs_calibration(self) -> bool:
        """Whether calibration text is needed."""
        return self.needs.calibration

    @property
    def baseline_dtype(self) -> torch.dtype | None:
        """See `Scheme.baseline_dtype`."""
        return self.scheme.baseline_dtype

    def options_json(self) -> dict[str, Any]:
        """Every option that applies, resolved, as plain data; `registry.resolve` reads it back."""
        return self.options.model_dump(mode="json", exclude=self.options.idle())

    def quantize_weight(self, weight: Tensor, statistics: Statistics | None, fqn: str) -> tuple[QuantizedWeight, LayerReport]:
        """See `Scheme.quantize_weight`."""
        quantized, report = self.scheme.quantize_weight(weight, statistics, self.options, fqn)
        return quantized, replace(report, fqn=fqn)


def symmetric_mapping(mapping: Mapping) -> MappingType:
    """Return the mapping of an option's value."""
    kinds = {kind.value: kind for kind in (MappingType.SYMMETRIC, MappingType.SYMMETRIC_NO_CLIPPING_ERR)}
    if mapping not in kinds:
        raise UsageError(f"mapping is one of {', '.join(kinds)}, got {mapping!r}.")
    return kinds[mapping]
