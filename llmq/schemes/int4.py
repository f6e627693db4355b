"""int4, int3 and int2 (W4A16, …): weights in groups, with scales searched without data; the activations stay as they are."""

from __future__ import annotations

import time

from torch import Tensor

from llmq.algorithms.report import LayerReport, sqnr_db
from llmq.algorithms.rtn import quantize_rtn, round_to_grid
from llmq.algorithms.scale_search import SearchOptions, search_scales
from llmq.algorithms.statistics import Statistics
from llmq.numerics.affine import MappingType
from llmq.numerics.grid import LinearFormat
from llmq.numerics.weight import QuantizedWeight
from llmq.schemes.base import Scheme
from llmq.schemes.group_options import GroupOptions


class IntGroups(Scheme[GroupOptions]):
    """Integers of `bits` bits by group, asymmetric with a floating zero point as tinygemm has it, unless asked otherwise."""

    Options = GroupOptions

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.name = f"int{bits}"  # type: ignore[misc]  # one class, a scheme for each width
        self.summary = f"int{bits} weights by group, scales searched without data (W{bits}A16)"  # type: ignore[misc]

    def format(self, options: GroupOptions) -> LinearFormat:
        """See `Scheme.format`."""
        return options.format(self.bits)

    def mapping(self, options: GroupOptions) -> MappingType:
        """See `Scheme.mapping`."""
        return options.range_mapping()

    def quantize_weight(
        self, weight: Tensor, statistics: Statistics | None, options: GroupOptions, fqn: str = "weight"
    ) -> tuple[QuantizedWeight, LayerReport]:
        """See `Scheme.quantize_weight`; statistics are used where there are some and `search` is 'weighted'."""
        started = time.perf_counter()
        grid = options.grid(self.bits)
        if options.search == "range":
            quantized = quantize_rtn(weight, grid, mapping=self.mapping(options))
        else:
            known = statistics if options.search == "weighted" else None
            importance = None if known is None else known.hessian.diagonal()
            scales = search_scales(weight, grid, importance, SearchOptions(mapping=self.mapping(options)))
            codes = round_to_grid(weight, grid, *scales)
            quantized = QuantizedWeight.from_codes(grid, codes, *scales)
        noise = sqnr_db(weight, quantized)
        return quantized, LayerReport(fqn, (weight.shape[0], weight.shape[1]), noise, seconds=time.perf_counter() - started)


SCHEMES = (IntGroups(4), IntGroups(3), IntGroups(2))
