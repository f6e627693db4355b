"""int4-best, int3-best, int2-best: the strongest combination that the ablations support, whatever it costs in time.

`int4-yaqa`, then a short distillation of scales, zero points and norms against the original model's predictions.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from llmq.schemes.group_options import CalibratedOptions
from llmq.schemes.int4_yaqa import FisherOptions, IntYaqa


class BestOptions(FisherOptions):
    """As `FisherOptions`, and how the model is distilled at the end."""

    distill_epochs: int = Field(
        4,
        ge=0,
        le=1000,
        description="times that distillation goes over the calibration windows; 0: the model is not distilled",
        json_schema_extra={"unit": "epochs"},
    )
    distill_rate: float = Field(
        4e-3,
        gt=0,
        le=1,
        description="largest learning rate of the relative changes of scales and norms",
        json_schema_extra={"unit": "relative change a step"},
    )

    def idle(self) -> set[str]:
        """See `SchemeOptions.idle`."""
        return super().idle() | ({"distill_rate"} if self.distill_epochs == 0 else set())


class IntBest(IntYaqa):
    """Integers of `bits` bits by group, with everything that was found to help."""

    Options = BestOptions
    kind = "best"
    words = "the strongest combination, distilled at the end"

    def distillation(self, options: CalibratedOptions) -> dict[str, Any] | None:
        """See `Scheme.distillation`."""
        if not isinstance(options, BestOptions) or options.distill_epochs == 0:
            return None
        return {"epochs": options.distill_epochs, "rate": options.distill_rate}


SCHEMES = (IntBest(4), IntBest(3), IntBest(2))
