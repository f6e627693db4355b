"""int4-gptq (W4A16): the same grid and kernels as `int4`, with the codes chosen by GPTQ (arXiv:2210.17323)."""

from __future__ import annotations

import time

from pydantic import Field
from torch import Tensor

from llmq.algorithms.gptq import GptqOptions, gptq
from llmq.algorithms.report import LayerReport, sqnr_db
from llmq.algorithms.statistics import Needs, Statistics
from llmq.errors import SchemeError
from llmq.numerics.affine import MappingType
from llmq.numerics.grid import IntGrid, LinearFormat
from llmq.numerics.weight import QuantizedWeight
from llmq.schemes.base import Scheme
from llmq.schemes.int4 import Int4Options, int4_format, int4_mapping

_DEFAULTS = GptqOptions()


class Int4GptqOptions(Int4Options):
    """Options of `int4-gptq`: those of `int4`, and how GPTQ runs."""

    damping: float = Field(
        _DEFAULTS.damping,
        ge=0,
        le=1,
        description="added to the Hessian's diagonal; ten times more where it cannot be factorised",
        json_schema_extra={"unit": "fraction of the mean diagonal"},
    )
    act_order: bool = Field(_DEFAULTS.act_order, description="round the columns by falling activation energy")
    block_size: int = Field(
        _DEFAULTS.block_size,
        ge=1,
        description="columns between two large matrix products; changes the speed, not the codes",
        json_schema_extra={"unit": "columns"},
    )


class Int4Gptq(Scheme[Int4GptqOptions]):
    """int4 by group, with each column's rounding errors made up for by the columns after it."""

    name = "int4-gptq"
    summary = "int4 weights by group, GPTQ with calibration text (W4A16)"
    Options = Int4GptqOptions

    def needs(self, options: Int4GptqOptions) -> Needs:  # noqa: ARG002
        """See `Scheme.needs`."""
        return Needs.INPUTS

    def format(self, options: Int4GptqOptions) -> LinearFormat:
        """See `Scheme.format`."""
        return int4_format(options)

    def mapping(self, options: Int4GptqOptions) -> MappingType:
        """See `Scheme.mapping`."""
        return int4_mapping(options)

    def quantize_weight(
        self, weight: Tensor, statistics: Statistics | None, options: Int4GptqOptions, fqn: str = "weight"
    ) -> tuple[QuantizedWeight, LayerReport]:
        """See `Scheme.quantize_weight`."""
        if statistics is None:
            raise SchemeError(
                f"{self.name} needs statistics of the inputs of {fqn}; calibrate (llmq.calibration.quantize_sequential), or pass "
                "its Hessian in `statistics`."
            )
        grid = self.format(options).weight
        assert isinstance(grid, IntGrid)  # int4_format makes no other
        started = time.perf_counter()
        how = GptqOptions(options.damping, options.act_order, options.block_size, self.mapping(options))
        quantized, done = gptq(weight, statistics.hessian, grid, how)
        report = LayerReport(
            fqn,
            (weight.shape[0], weight.shape[1]),
            sqnr_db(weight, quantized.dequantize()),
            loss=done.loss,
            rtn_loss=done.rtn_loss,
            damping=done.damping,
            dead_columns=done.dead_columns,
            rtn_rows=done.rtn_rows,
            fallback=done.fallback,
            seconds=time.perf_counter() - started,
        )
        return quantized, report


SCHEMES = (Int4Gptq(),)
