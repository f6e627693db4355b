"""int4-awq, int3-awq, int2-awq: activation-aware scales folded into the block, then narrower ranges (AWQ, arXiv:2306.00978)."""

from __future__ import annotations

import time
from typing import Literal

from pydantic import Field
from torch import Tensor

from llmq.algorithms.awq import AwqOptions, awq_, may_clip, search_clip
from llmq.algorithms.report import LayerReport, sqnr_db
from llmq.algorithms.rtn import quantize_rtn
from llmq.algorithms.statistics import Needs, Statistics
from llmq.errors import SchemeError
from llmq.numerics.affine import MappingType
from llmq.numerics.grid import LinearFormat
from llmq.numerics.weight import QuantizedWeight
from llmq.schemes.base import Scheme
from llmq.schemes.block import BlockWork
from llmq.schemes.group_options import CalibratedOptions
from llmq.schemes.int4_gptq import IntGptq

_DEFAULTS = AwqOptions()


class AwqSchemeOptions(CalibratedOptions):
    """Options of the AWQ schemes: how scales are found, and what rounds the scaled weights."""

    scales: Literal["none", "inputs", "both"] = Field(
        _DEFAULTS.scales,
        description="of input channels: powers of their mean size ('inputs'), over powers of the weights' too ('both'), or none",
    )
    exponents: int = Field(
        _DEFAULTS.candidates, ge=1, le=1000, description="powers that are tried, from 0 to 1", json_schema_extra={"unit": "1"}
    )
    rounding_by: Literal["clip", "gptq"] = Field(
        "clip", description="what rounds scaled weights: narrower ranges and the nearest codes as in the paper, or GPTQ"
    )

    def idle(self) -> set[str]:
        """See `SchemeOptions.idle`."""
        idle = super().idle() | ({"exponents"} if self.scales == "none" else set())
        unused = {"search", "metric", "correction", "refit", "sweeps", "damping", "act_order", "block_size"}
        return idle | unused if self.rounding_by == "clip" else idle


class IntAwq(Scheme[AwqSchemeOptions]):
    """Integers of `bits` bits by group, after scaling the channels that matter."""

    Options = AwqSchemeOptions

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.name = f"int{bits}-awq"  # type: ignore[misc]  # one class, a scheme for each width
        self.summary = f"int{bits} weights by group, AWQ with calibration text (W{bits}A16)"  # type: ignore[misc]
        self._gptq = IntGptq(bits)

    def needs(self, options: AwqSchemeOptions) -> Needs:
        """See `Scheme.needs`."""
        return Needs.INPUTS if options.rounding_by == "clip" else options.rounding_needs()

    def format(self, options: AwqSchemeOptions) -> LinearFormat:
        """See `Scheme.format`."""
        return options.format(self.bits)

    def mapping(self, options: AwqSchemeOptions) -> MappingType:
        """See `Scheme.mapping`."""
        return options.range_mapping()

    def prepares(self, options: AwqSchemeOptions) -> bool:
        """See `Scheme.prepares`."""
        return options.scales != "none"

    def prepare_block(self, work: BlockWork, options: AwqSchemeOptions) -> None:
        """See `Scheme.prepare_block`: fold scales."""
        if options.scales != "none":
            awq_(work, options.grid(self.bits), options.range_mapping(), AwqOptions(options.exponents, options.scales))

    def quantize_weight(
        self, weight: Tensor, statistics: Statistics | None, options: AwqSchemeOptions, fqn: str = "weight"
    ) -> tuple[QuantizedWeight, LayerReport]:
        """See `Scheme.quantize_weight`."""
        if statistics is None:
            raise SchemeError(
                f"{self.name} needs statistics of the inputs of {fqn}; calibrate (llmq.calibration.quantize_sequential), or pass "
                "its Hessian in `statistics`."
            )
        started = time.perf_counter()
        shape = (weight.shape[0], weight.shape[1])
        grid, mapping = options.grid(self.bits), options.range_mapping()
        if options.rounding_by == "gptq":
            return self._gptq.quantize_weight(weight, statistics, options, fqn)
        nearest = quantize_rtn(weight, grid, mapping=mapping)
        rtn_loss = loss = _loss(weight, nearest, statistics)
        if may_clip(fqn):
            clipped = quantize_rtn(search_clip(weight, statistics.hessian, grid, mapping=mapping), grid, mapping=mapping)
            loss = _loss(weight, clipped, statistics)
            # every group's own error fell, but groups of a row also add up
            nearest, loss = (clipped, loss) if loss < rtn_loss else (nearest, rtn_loss)
        noise = sqnr_db(weight, nearest.dequantize())
        return nearest, LayerReport(fqn, shape, noise, loss=loss, rtn_loss=rtn_loss, seconds=time.perf_counter() - started)


def _loss(weight: Tensor, quantized: QuantizedWeight, statistics: Statistics) -> float:
    error = weight.detach().float() - quantized.dequantize()
    return float(((error @ statistics.hessian.float()) * error).double().sum())


SCHEMES = (IntAwq(4), IntAwq(3), IntAwq(2))
