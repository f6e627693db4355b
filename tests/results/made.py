"""Records that nobody measured."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
from somewhere import HERE

from llmq.results.record import Kind, Metric, Protocol, ResultRecord, Subject
from llmq.results.tokens import TokenFigures

START = datetime(2026, 1, 1, 12, tzinfo=UTC)


def made(
    scheme: str = "int4",
    value: float = 5.0,
    *,
    kind: Kind = "perplexity",
    metric: str = "perplexity",
    day: int = 0,
    model: str = "tiny",
    params: dict[str, Any] | None = None,
) -> ResultRecord:
    """One record with one metric, `day` days after `START`."""
    return ResultRecord(
        created_at=START + timedelta(days=day),
        kind=kind,
        subject=Subject(model=model, checkpoint_sha256="ab", scheme=scheme, options={}, bits_per_weight=4.5, size_bytes=100),
        protocol=Protocol(name="windows", version=1, params={"window": 256} if params is None else params),
        metrics={metric: Metric(value=value, unit="1", stderr=0.25)},
        environment=HERE,
    )


def tokens(n: int = 8, seed: int = 0) -> TokenFigures:
    """Figures of n tokens in one window."""
    return TokenFigures(np.random.default_rng(seed).random(n, np.float32), np.array([n], np.int32))
