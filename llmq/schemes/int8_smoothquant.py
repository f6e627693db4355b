"""int8-smoothquant (W8A8): the format and kernels of int8-dynamic, with inputs that are easier to round (arXiv:2211.10438)."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from llmq.algorithms.report import LayerReport
from llmq.algorithms.rounded_inputs import InputOptions, quantize_for_rounded_inputs
from llmq.algorithms.rounding import RoundingOptions
from llmq.algorithms.smoothquant import Smoothing, SmoothOptions, smooth_
from llmq.algorithms.statistics import Needs, Statistics
from llmq.errors import SchemeError
from llmq.numerics.affine import MappingType
from llmq.numerics.grid import ActivationGrid, IntGrid, LinearFormat
from llmq.numerics.weight import QuantizedWeight
from llmq.schemes.base import MAPPING_FIELD, Mapping, Scheme, SchemeOptions, symmetric_mapping
from llmq.schemes.block import BlockWork

_DEFAULTS = SmoothOptions()


class Int8SmoothQuantOptions(SchemeOptions):
    """Options of `int8-smoothquant`."""

    smoothing: Smoothing = Field(
        _DEFAULTS.smoothing,
        description="how scales of input channels are found: the paper's alpha searched, also learned from there, or none",
    )
    alpha_step: float = Field(
        _DEFAULTS.step, gt=0, le=1, description="between the alphas that are tried, from 0 to 1", json_schema_extra={"unit": "1"}
    )
    compensate: bool = Field(
        default=True, description="choose int8 codes for the rounded inputs (GPTQ with correction), not the nearest ones"
    )
    damping: float = Field(
        1e-3,
        ge=0,
        le=1,
        description="added to the Hessian's diagonal where codes are compensated",
        json_schema_extra={"unit": "fraction of the mean diagonal"},
    )
    activations: Literal["dynamic", "static"] = Field(
        "dynamic", description="one scale a token, found as it comes, or one a linear, found with calibration text"
    )
    mapping: Mapping = MAPPING_FIELD

    def idle(self) -> set[str]:
        """See `SchemeOptions.idle`."""
        idle = {"alpha_step"} if self.smoothing == "none" else set()
        return idle if self.compensate else idle | {"damping"}


class Int8SmoothQuant(Scheme[Int8SmoothQuantOptions]):
    """int8-dynamic, or with static activations, after smoothing; weights are chosen for the inputs that come."""

    name = "int8-smoothquant"
    summary = "int8 weights and activations, smoothed and compensated with calibration text (W8A8)"
    Options = Int8SmoothQuantOptions

    def format(self, options: Int8SmoothQuantOptions) -> LinearFormat:
        """See `Scheme.format`."""
        weight = IntGrid(8, None, symmetric=True, zero_point="none", scale_dtype="float32")
        return LinearFormat(weight, ActivationGrid(symmetric=True, static=options.activations == "static"))

    def mapping(self, options: Int8SmoothQuantOptions) -> MappingType:
        """See `Scheme.mapping`."""
        return symmetric_mapping(options.mapping)

    def needs(self, options: Int8SmoothQuantOptions) -> Needs:  # noqa: ARG002 - the block has to run whatever is asked
        """See `Scheme.needs`."""
        return Needs.INPUTS

    def prepares(self, options: Int8SmoothQuantOptions) -> bool:
        """See `Scheme.prepares`."""
        return options.smoothing != "none"

    def prepare_block(self, work: BlockWork, options: Int8SmoothQuantOptions) -> None:
        """See `Scheme.prepare_block`: fold scales.

        They are found for activations with a scale a token, whatever is asked: static ones come later, and from smoothed inputs.
        """
        form = LinearFormat(self.format(options).weight, ActivationGrid(symmetric=True))
        smooth_(work, form, self.mapping(options), SmoothOptions(options.smoothing, options.alpha_step))

    def quantize_weight(
        self, weight: Tensor, statistics: Statistics | None, options: Int8SmoothQuantOptions, fqn: str = "weight"
    ) -> tuple[QuantizedWeight, LayerReport]:
        """See `Scheme.quantize_weight`: rounds to nearest; `tune_block` knows the inputs that will come."""
        if statistics is None:
            raise SchemeError(
                f"{self.name} needs statistics of the inputs of {fqn}; calibrate (llmq.calibration.quantize_sequential), or use "
                "int8-dynamic."
            )
        quantized, report = super().quantize_weight(weight, statistics, options, fqn)
        error = weight.detach().float() - quantized.dequantize()
        loss = ((error @ statistics.hessian.to(error.dtype)) * error).sum(dtype=torch.float64).item()
        return quantized, replace(report, loss=loss, rtn_loss=loss)

    def tunes(self, options: Int8SmoothQuantOptions) -> bool:
        """See `Scheme.tunes`."""
        return options.compensate or options.activations == "static"

    def tune_block(
        self, work: BlockWork, weights: dict[str, QuantizedWeight], options: Int8SmoothQuantOptions
    ) -> dict[str, QuantizedWeight]:
        """See `Scheme.tune_block`: codes and static scales for the inputs that quantized linears produce."""
        rounding = RoundingOptions(correction=1.0, sweeps=0, damping=options.damping, mapping=self.mapping(options))
        how = InputOptions(rounding if options.compensate else None)
        return quantize_for_rounded_inputs(work, work.groups, weights, self.format(options), how)


SCHEMES = (Int8SmoothQuant(),)
