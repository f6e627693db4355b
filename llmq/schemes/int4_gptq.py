"""int4-gptq, int3-gptq, int2-gptq: the grids and kernels of `int4` …, with codes and scales chosen by `algorithms.rounding`."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import ClassVar

from torch import Tensor

from llmq.algorithms.report import LayerReport
from llmq.algorithms.rounding import round_linear
from llmq.algorithms.statistics import Needs, Statistics
from llmq.errors import SchemeError
from llmq.numerics.affine import MappingType
from llmq.numerics.grid import LinearFormat
from llmq.numerics.weight import QuantizedWeight
from llmq.schemes.base import Scheme
from llmq.schemes.group_options import CalibratedOptions


class IntGptq(Scheme[CalibratedOptions]):
    """Integers of `bits` bits by group; each column's rounding errors are made up for by the columns after it, then polished."""

    Options: type[CalibratedOptions] = CalibratedOptions
    kind: ClassVar[str] = "gptq"
    """What comes after the width in the name."""
    words: ClassVar[str] = "GPTQ with calibration text"
    """What the summary says of the algorithm."""

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.name = f"int{bits}-{self.kind}"  # type: ignore[misc]  # one class, a scheme for each width
        self.summary = f"int{bits} weights by group, {self.words} (W{bits}A16)"  # type: ignore[misc]

    def needs(self, options: CalibratedOptions) -> Needs:
        """See `Scheme.needs`."""
        return options.rounding_needs()

    def format(self, options: CalibratedOptions) -> LinearFormat:
        """See `Scheme.format`."""
        return options.format(self.bits)

    def mapping(self, options: CalibratedOptions) -> MappingType:
        """See `Scheme.mapping`."""
        return options.range_mapping()

    def quantize_weight(
        self, weight: Tensor, statistics: Statistics | None, options: CalibratedOptions, fqn: str = "weight"
    ) -> tuple[QuantizedWeight, LayerReport]:
        """See `Scheme.quantize_weight`."""
        if statistics is None:
            raise SchemeError(
                f"{self.name} needs statistics of the inputs of {fqn}; calibrate (llmq.calibration.quantize_sequential), or pass "
                "its Hessian in `statistics`."
            )
        started = time.perf_counter()
        how = options.rounding()
        if statistics.upstream is None:  # a Hessian alone was given, as to `quantize_`
            how = replace(how, correction=0.0)
        quantized, done = round_linear(weight, statistics, options.grid(self.bits), how)
        return quantized, done.of_layer(fqn, weight, quantized, seconds=time.perf_counter() - started)


SCHEMES = (IntGptq(4), IntGptq(3), IntGptq(2))
