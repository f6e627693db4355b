"""int8-smoothquant (W8A8): the format and kernels of int8-dynamic, with inputs that are easier to round (arXiv:2211.10438)."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from llmq.algorithms.report import LayerReport
from llmq.algorithms.rounded_inputs import SAMPLE_TOKENS, InputOptions, quantize_for_rounded_inputs, rounding_cost
from llmq.algorithms.rounding import RoundingOptions, round_linear
from llmq.algorithms.simulate import record
from llmq.algorithms.smoothquant import Smoothing, SmoothOptions, smooth_
from llmq.algorithms.statistics import Needs, Statistics
from llmq.errors import SchemeError
from llmq.numerics.affine import MappingType
from llmq.numerics.grid import ActivationGrid, IntGrid, LinearFormat
from llmq.numerics.weight import QuantizedWeight
from llmq.schemes.base import MAPPING_FIELD, Mapping, Scheme, SchemeOptions, symmetric_mapping
from llmq.schemes.block import BlockWork

_DEFAULTS = SmoothOptions()
WEIGHT_ONLY = LinearFormat(IntGrid(8, None, symmetric=True, zero_point="none", scale_dtype="bfloat16"))
"""What a linear becomes that keeps its inputs: the format of int8-weight-only."""
SWEEPS = 1
"""Of coordinate descent under the Fisher information: at 8 bits a second one changes next to nothing."""


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
        default=True, description="choose int8 codes by what they do to the outputs (GPTQ), not the nearest ones"
    )
    metric: Literal["inputs", "fisher"] = Field(
        "fisher",
        description="the error that codes are chosen by: of each linear's outputs for the rounded inputs ('inputs'), or the "
        "whole model's Fisher information ('fisher', YAQA)",
    )
    damping: float = Field(
        1e-3,
        ge=0,
        le=1,
        description="added to the Hessian's diagonal where codes are compensated",
        json_schema_extra={"unit": "fraction of the mean diagonal"},
    )
    most_input_cost: float = Field(
        1e-4,
        ge=0,
        description="a linear whose inputs are estimated to cost more than this to round keeps them (int8-weight-only, as many "
        "bits)",
        json_schema_extra={"unit": "nats/token"},
    )
    activations: Literal["dynamic", "static"] = Field(
        "dynamic", description="one scale a token, found as it comes, or one a linear, found with calibration text"
    )
    mapping: Mapping = MAPPING_FIELD

    def idle(self) -> set[str]:
        """See `SchemeOptions.idle`."""
        idle = {"alpha_step"} if self.smoothing == "none" else set()
        idle |= set() if self.by_fisher() else {"most_input_cost"}
        return idle if self.compensate else idle | {"damping", "metric"}

    def by_fisher(self) -> bool:
        """Whether codes are chosen under the Fisher information."""
        return self.compensate and self.metric == "fisher"


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

    def needs(self, options: Int8SmoothQuantOptions) -> Needs:
        """See `Scheme.needs`: the block has to run whatever is asked."""
        return Needs.INPUTS | Needs.FISHER if options.by_fisher() else Needs.INPUTS

    def rotates(self, options: Int8SmoothQuantOptions) -> bool:  # noqa: ARG002 - they lower the largest of a token's inputs
        """See `Scheme.rotates`."""
        return True

    def prepares(self, options: Int8SmoothQuantOptions) -> bool:
        """See `Scheme.prepares`."""
        return options.smoothing != "none"

    def prepare_block(self, work: BlockWork, options: Int8SmoothQuantOptions) -> None:
        """See `Scheme.prepare_block`: fold scales."""
        smooth_(work, self.format(options), self.mapping(options), SmoothOptions(options.smoothing, options.alpha_step))

    def quantize_weight(
        self, weight: Tensor, statistics: Statistics | None, options: Int8SmoothQuantOptions, fqn: str = "weight"
    ) -> tuple[QuantizedWeight, LayerReport]:
        """See `Scheme.quantize_weight`: chooses codes by the Fisher information, or the nearest until `tune_block` runs."""
        if statistics is None:
            raise SchemeError(
                f"{self.name} needs statistics of the inputs of {fqn}; calibrate (llmq.calibration.quantize_sequential), or use "
                "int8-dynamic."
            )
        if options.by_fisher():
            return self._by_fisher(weight, statistics, options, fqn)
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
        """See `Scheme.tune_block`: codes and static scales for the inputs that come, and inputs that cost too much to round."""
        changed: dict[str, QuantizedWeight] = {}
        if not options.by_fisher() or options.activations == "static":
            rounding = RoundingOptions(correction=1.0, sweeps=0, damping=options.damping, mapping=self.mapping(options))
            how = InputOptions(rounding if options.compensate and not options.by_fisher() else None)
            changed = quantize_for_rounded_inputs(work, work.groups, weights, self.format(options), how)
        return changed | self._keeping_inputs(work, weights | changed, options) if options.by_fisher() else changed

    def format_of(self, weight: QuantizedWeight, options: Int8SmoothQuantOptions) -> LinearFormat:
        """See `Scheme.format_of`: a weight with the scales of a weight-only kernel keeps its inputs."""
        own = self.format(options)
        return own if weight.grid == own.weight else WEIGHT_ONLY

    def _keeping_inputs(
        self, work: BlockWork, weights: dict[str, QuantizedWeight], options: Int8SmoothQuantOptions
    ) -> dict[str, QuantizedWeight]:
        """Return the weights of linears that keep their inputs."""
        assert work.fisher is not None
        activation, grid = self.format(options).activation, WEIGHT_ONLY.weight
        assert activation is not None
        assert isinstance(grid, IntGrid)
        seen = record(work, [], inputs_of=[group[0] for group in work.groups], tokens=SAMPLE_TOKENS)
        kept = {}
        for group in work.groups:
            for name in group:
                inputs, outputs = work.fisher(name)
                if rounding_cost(weights[name], activation, seen.inputs[group[0]], inputs, outputs) > options.most_input_cost:
                    statistics = Statistics(inputs, None, inputs, outputs)
                    kept[name], _ = round_linear(work.linears[name].weight.detach(), statistics, grid, self._rounding(options))
        return kept

    def _rounding(self, options: Int8SmoothQuantOptions) -> RoundingOptions:
        return RoundingOptions(metric="fisher", sweeps=SWEEPS, damping=options.damping, mapping=self.mapping(options))

    def _by_fisher(
        self, weight: Tensor, statistics: Statistics, options: Int8SmoothQuantOptions, fqn: str
    ) -> tuple[QuantizedWeight, LayerReport]:
        started = time.perf_counter()
        grid = self.format(options).weight
        assert isinstance(grid, IntGrid)
        quantized, done = round_linear(weight, statistics, grid, self._rounding(options))
        return quantized, done.of_layer(fqn, weight, quantized, seconds=time.perf_counter() - started)


SCHEMES = (Int8SmoothQuant(),)
