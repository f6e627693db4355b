"""A machine that nobody has, for records that nobody measured."""

from __future__ import annotations

from llmq.results.record import Environment

HERE = Environment(
    llmq="0.1.0",
    python="3.11.7",
    packages={"torch": "2.13.0"},
    platform="Linux",
    cpu="Fast 9000",
    cpu_features=["avx2"],
    cores=2,
    threads=2,
    device="cpu",
    memory_bytes=1 << 30,
)
