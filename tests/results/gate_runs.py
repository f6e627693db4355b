"""Runs that are made up: two schemes, their quality with figures of single tokens, their speed."""

from __future__ import annotations

from typing import Any

import numpy as np
from somewhere import HERE

from llmq.results.record import Metric, Protocol, ResultRecord, Subject
from llmq.results.run import Run, run_in_memory
from llmq.results.tokens import TokenFigures

WINDOWS, SIZE = 20, 50
INT4 = Subject(
    model="tiny",
    checkpoint_sha256="a" * 64,
    tokenizer_sha256="b" * 64,
    scheme="int4",
    options={"group_size": 32},
    bits_per_weight=4.5,
    size_bytes=6_900_000,
)
WINDOWED = {"length": SIZE + 1, "text": "wiki", "text_sha256": "f" * 64, "n_windows": WINDOWS}
NOISE = np.random.default_rng(0).normal(0, 0.01, (3, WINDOWS * SIZE))


def tokens(*, worse: float = 0.0, kl: float = 0.02, agreement: float = 0.9, jitter: int | None = None) -> TokenFigures:
    """Figures of 1,000 tokens: losses around 3 nats, raised by `worse`; `jitter` 0 to 2 adds some of the fixed noise."""
    generator = np.random.default_rng(1)
    n = WINDOWS * SIZE
    noise = NOISE[jitter] if jitter is not None else np.zeros(n)
    nll = generator.gamma(2, 1.5, n) + worse + noise
    divergence = generator.exponential(kl, n) * (1 + np.abs(noise))
    same = generator.random(n) < agreement
    return TokenFigures(
        nll.astype(np.float32), np.full(WINDOWS, SIZE, np.int32), divergence.astype(np.float32), same.astype(np.bool_)
    )


def quality(figures: TokenFigures, *, keep: bool = True, subject: Subject = INT4, **changes: Any) -> list[ResultRecord]:
    """A perplexity and a divergence record; `changes` go into the protocol, `keep` False forgets the single tokens."""
    assert figures.kl is not None
    assert figures.same_top is not None
    n = figures.nll.size**0.5

    def metric(values: Any, unit: str) -> Metric:
        return Metric(value=float(values.mean()), unit=unit, stderr=float(values.std()) / n)

    params = WINDOWED | changes
    of_kind = {
        "perplexity": {"nll": metric(figures.nll.astype(float), "nats/token")},
        "divergence": {
            "kl_mean": metric(figures.kl.astype(float), "nats/token"),
            "top1_agreement": metric(figures.same_top.astype(float), "1"),
        },
    }
    found = [
        ResultRecord(
            kind=kind,
            subject=subject,
            protocol=Protocol(name="windows", version=1, params=params),
            metrics=metrics,
            kernels={"native-int4": 56},
            environment=HERE,
        )
        for kind, metrics in of_kind.items()
    ]
    return [record.with_tokens(figures) for record in found] if keep else found


def decode(
    rate: float = 100.0, *, spread: float = 0.01, seed: int = 0, kernel: str = "native-int4", against: bool = False, **here: Any
) -> ResultRecord:
    """Tokens/s of 21 repeats around `rate`; `against` adds the ratio to bf16 at 50 tokens/s, and that of bf16 to itself."""
    samples = rate * np.random.default_rng(seed).normal(1, spread, 21)
    itself = np.random.default_rng(seed + 100).normal(1, spread, 21)
    metrics = {"tokens_per_s": _speed(samples, "tokens/s")}
    if against:
        metrics |= {"ratio_to bf16": _speed(samples / 50, "1"), "ratio_of_itself bf16": _speed(itself, "1")}
    return ResultRecord(
        kind="decode",
        subject=INT4.model_copy(update={"tokenizer_sha256": None}),
        protocol=Protocol(name="decode", version=1, params={"batch_size": 1, "context": 128}),
        metrics=metrics,
        kernels={kernel: 56},
        environment=HERE.model_copy(update=here),
    )


def run(name: str, *records: ResultRecord) -> Run:
    """A run of these records."""
    return run_in_memory(name, list(records))


def _speed(samples: Any, unit: str) -> Metric:
    return Metric(value=float(np.median(samples)), unit=unit, samples=[float(sample) for sample in samples])
