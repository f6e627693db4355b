"""int4-autoround, int3-autoround, int2-autoround: rounding learned block by block (AutoRound, arXiv:2309.05516)."""

from __future__ import annotations

import time
from typing import Literal

from pydantic import Field
from torch import Tensor

from llmq.algorithms.autoround import TuneOptions, Tuning, tune
from llmq.algorithms.report import LayerReport, sqnr_db
from llmq.algorithms.rounding import RoundingOptions, round_linear
from llmq.algorithms.statistics import Needs, Statistics
from llmq.errors import SchemeError
from llmq.numerics.affine import MappingType
from llmq.numerics.grid import LinearFormat
from llmq.numerics.weight import QuantizedWeight
from llmq.schemes.base import Scheme
from llmq.schemes.block import BlockWork
from llmq.schemes.group_options import CalibratedOptions
from llmq.schemes.int4_gptq import IntGptq

_DEFAULTS = TuneOptions()


class AutoRoundOptions(CalibratedOptions):
    """Options of the AutoRound schemes: where learning starts, and how it runs."""

    start: Literal["nearest", "gptq"] = Field(
        "gptq", description="codes that learning starts from: nearest to the weights, as in the paper, or chosen by GPTQ"
    )
    steps: int = Field(_DEFAULTS.steps, ge=1, description="updates of each block", json_schema_extra={"unit": "updates"})
    batch: int = Field(
        _DEFAULTS.batch, ge=1, description="windows that an update looks at", json_schema_extra={"unit": "windows"}
    )
    optimizer: Literal["sign", "adam"] = Field(_DEFAULTS.optimizer, description="SignSGD, as in the paper, or Adam")
    relative: bool = Field(
        _DEFAULTS.relative, description="weigh a token's error by the size of its residual stream, as the next norm will"
    )
    seed: int = Field(_DEFAULTS.seed, ge=0, description="of the order of windows")

    def idle(self) -> set[str]:
        """See `SchemeOptions.idle`."""
        unused = {"search", "metric", "correction", "refit", "sweeps", "damping", "act_order", "block_size"}
        return super().idle() | unused if self.start == "nearest" else super().idle()


class IntAutoRound(Scheme[AutoRoundOptions]):
    """Integers of `bits` bits by group, with rounding and ranges learned from each block's output."""

    Options = AutoRoundOptions

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.name = f"int{bits}-autoround"  # type: ignore[misc]  # one class, a scheme for each width
        self.summary = f"int{bits} weights by group, rounding learned with calibration text (W{bits}A16)"  # type: ignore[misc]
        self._gptq = IntGptq(bits)

    def needs(self, options: AutoRoundOptions) -> Needs:
        """See `Scheme.needs`."""
        return Needs.TARGETS | (Needs.INPUTS if options.start == "nearest" else options.rounding_needs())

    def format(self, options: AutoRoundOptions) -> LinearFormat:
        """See `Scheme.format`."""
        return options.format(self.bits)

    def mapping(self, options: AutoRoundOptions) -> MappingType:
        """See `Scheme.mapping`."""
        return options.range_mapping()

    def quantize_weight(
        self, weight: Tensor, statistics: Statistics | None, options: AutoRoundOptions, fqn: str = "weight"
    ) -> tuple[QuantizedWeight, LayerReport]:
        """See `Scheme.quantize_weight`: what learning starts from."""
        if statistics is None:
            raise SchemeError(
                f"{self.name} needs statistics of the inputs of {fqn}; calibrate (llmq.calibration.quantize_sequential), or pass "
                "its Hessian in `statistics`."
            )
        if options.start == "gptq":
            return self._gptq.quantize_weight(weight, statistics, options, fqn)
        started = time.perf_counter()
        nearest = RoundingOptions(search="range", gptq=False, refit=False, sweeps=0, mapping=options.range_mapping())
        quantized, done = round_linear(weight, statistics, options.grid(self.bits), nearest)
        noise = sqnr_db(weight, quantized.dequantize())
        seconds = time.perf_counter() - started
        report = LayerReport(fqn, quantized.shape, noise, loss=done.loss, rtn_loss=done.rtn_loss, seconds=seconds)
        return quantized, report

    def tunes(self, options: AutoRoundOptions) -> bool:  # noqa: ARG002
        """See `Scheme.tunes`."""
        return True

    def tune_block(
        self, work: BlockWork, weights: dict[str, QuantizedWeight], options: AutoRoundOptions
    ) -> dict[str, QuantizedWeight]:
        """See `Scheme.tune_block`."""
        if work.targets is None:
            raise SchemeError(f"{self.name} learns from the original block's outputs, and there are none; ask for Needs.TARGETS.")
        how = TuneOptions(options.steps, options.batch, optimizer=options.optimizer, seed=options.seed, relative=options.relative)
        return tune(Tuning(work, weights, work.targets), how)[0]


SCHEMES = (IntAutoRound(4), IntAutoRound(3), IntAutoRound(2))
