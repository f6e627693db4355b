"""int4-yaqa, int3-yaqa, int2-yaqa: rounding against the whole model's KL (Tseng et al., arXiv:2505.22988).

The steps are those of `int4-gptq`; what they make small is not a linear's own error but tr(H_O E H_I E^T), with the Kronecker
factors of the linear's Fisher information from samples that are back-propagated through the original model.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmq.schemes.group_options import CalibratedOptions
from llmq.schemes.int4_gptq import IntGptq


class FisherOptions(CalibratedOptions):
    """As `CalibratedOptions`, with the defaults that the ablations in docs/quality.md support."""

    metric: Literal["inputs", "outputs", "fisher"] = Field(
        "fisher",
        description="the error that is made small: of each linear's outputs ('inputs'), the same with outputs weighted and "
        "coupled by the whole model's Fisher information ('outputs'), or the Fisher information on both sides ('fisher', YAQA)",
    )
    correction: float = Field(
        0.5,
        ge=0,
        le=1,
        description="how much of the error that reaches a linear from quantized blocks before it is corrected, where the walk "
        "knows the original model's inputs",
        json_schema_extra={"unit": "fraction"},
    )
    sweeps: int = Field(
        1, ge=0, le=100, description="times that coordinate descent goes over all codes", json_schema_extra={"unit": "sweeps"}
    )
    fisher_rounds: int = Field(
        1,
        ge=1,
        le=10,
        description="rounds of power iteration for the Kronecker factors",
        json_schema_extra={"unit": "rounds"},
    )

    def idle(self) -> set[str]:
        """See `SchemeOptions.idle`."""
        return super().idle() | ({"fisher_rounds"} if self.metric == "inputs" else set())


class IntYaqa(IntGptq):
    """Integers of `bits` bits by group, rounded two-sided under the Fisher information."""

    Options = FisherOptions
    kind = "yaqa"
    words = "rounded against the model's KL"

    def fisher_rounds(self, options: CalibratedOptions) -> int:
        """See `Scheme.fisher_rounds`."""
        return options.fisher_rounds if isinstance(options, FisherOptions) else 1


SCHEMES = (IntYaqa(4), IntYaqa(3), IntYaqa(2))
