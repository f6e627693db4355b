"""Runs that reports are tested with: small, with every figure known, and nothing measured."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from somewhere import HERE

from llmq.files import sha256_text
from llmq.results.record import Cache, Details, Histogram, Kind, Metric, Protocol, ResultRecord, Subject
from llmq.results.run import Run, run_in_memory

KINDS_OF_LINEAR = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
LAYERS = 3

SCHEMES: dict[str, dict[str, Any]] = {
    # scheme: size in bytes, divergence, tokens/s, bytes of a step
    "bf16": {"size": 16_800_000, "kl": 0.0, "rate": 95.0, "step": 15_300_000},
    "int8-weight-only": {"size": 10_500_000, "kl": 0.00027, "rate": 180.0, "step": 9_100_000},
    "int8-dynamic": {"size": 10_600_000, "kl": 0.00114, "rate": 170.0, "step": 9_200_000},
    "int4-gptq": {"size": 7_550_000, "kl": 0.0121, "rate": 310.0, "step": 6_100_000},
}
"""int8-dynamic is off both fronts: int8-weight-only is smaller, faster and nearer to the original."""

WALL_GBPS = 3.1


def example_records(schemes: dict[str, dict[str, Any]] = SCHEMES, **params: Any) -> list[ResultRecord]:
    """Records of all kinds of a comparison; `params` change the protocol of the quality records."""
    found = []
    for scheme, known in schemes.items():
        found += [
            perplexity_record(scheme, known, params),
            divergence_record(scheme, known, params),
            *speed_records(scheme, known),
        ]
    return found


def example_run(name: str = "example.jsonl", schemes: dict[str, dict[str, Any]] = SCHEMES, **params: Any) -> Run:
    return run_in_memory(name, example_records(schemes, **params))


def record(kind: Kind, scheme: str, metrics: dict[str, Metric], params: dict[str, Any], **fields: Any) -> ResultRecord:
    known = SCHEMES.get(scheme, {})
    subject = Subject(
        model="tiny",
        checkpoint_sha256="a" * 64,
        tokenizer_sha256="b" * 64,
        scheme=scheme,
        options={"group_size": 32} if scheme.startswith("int4") else {},
        bits_per_weight=4.5,
        size_bytes=fields.pop("size", known.get("size")),
        kv_cache=Cache(dtype="bf16", bytes_per_token=4096, context_tokens=256),
    )
    identity = sha256_text(f"{scheme} {kind} {sorted(params.items())}")[:32]
    return ResultRecord(
        id=identity,
        created_at=datetime(2026, 3, 1, tzinfo=UTC),
        kind=kind,
        subject=subject,
        protocol=Protocol(name="windows" if kind in ("perplexity", "divergence") else kind, version=1, params=params),
        metrics=metrics,
        kernels={"native-int4": 9, "native-bf16": 1},
        environment=HERE,
        notes=["runtime: native (avx512vnni)"],
        **fields,
    )


def perplexity_record(scheme: str, known: dict[str, Any], params: dict[str, Any]) -> ResultRecord:
    metrics = {"perplexity": Metric(value=24.0 + 100 * known["kl"], unit="1", stderr=0.12)}
    return record(
        "perplexity", scheme, metrics, {"length": 256} | params, size=known["size"], details=Details(layers=layers(scheme))
    )


def layers(scheme: str) -> dict[str, dict[str, Metric]]:
    """Figures of each linear: noise that differs from linear to linear, and a loss where the scheme calibrates."""
    if scheme == "bf16":
        return {}
    found = {}
    for layer in range(LAYERS):
        for place, kind in enumerate(KINDS_OF_LINEAR):
            figures = {
                "sqnr": Metric(value=20.0 + layer + place / 4, unit="dB"),
                "bits_per_weight": Metric(value=4.5, unit="bits"),
            }
            if scheme == "int4-gptq":
                figures["loss"] = Metric(value=0.01 * (1 + layer), unit="1")
                figures["rtn_loss"] = Metric(value=0.05, unit="1")
            found[f"model.layers.{layer}.{kind}"] = figures
    return found


def divergence_record(scheme: str, known: dict[str, Any], params: dict[str, Any]) -> ResultRecord:
    kl = known["kl"]
    edges = [kl * 10 ** (power / 2) for power in range(-4, 5)] if kl else []
    found = Histogram(unit="nats", edges=edges, counts=[1, 4, 30, 200, 500, 220, 40, 5] if kl else [], zeros=0 if kl else 1000)
    metrics = {
        "kl_mean": Metric(value=kl, unit="nats/token", stderr=kl / 30),
        "kl_median": Metric(value=kl / 2, unit="nats/token"),
        "top1_agreement": Metric(value=1 - 3 * kl, unit="1", stderr=0.001),
        "delta_ln_perplexity": Metric(value=kl / 3, unit="nats/token", stderr=kl / 10),
    }
    details = Details(histograms={"kl": found})
    return record("divergence", scheme, metrics, {"length": 256} | params, size=known["size"], details=details)


def speed_records(scheme: str, known: dict[str, Any]) -> list[ResultRecord]:
    rate, step = known["rate"], known["step"]
    times = Histogram(unit="s", edges=[0.9 / rate, 1.0 / rate, 1.1 / rate, 1.2 / rate], counts=[10, 50, 4])
    achieved = step * rate / 1e9
    decode = {
        "tokens_per_s": Metric(value=rate, unit="tokens/s", stderr=rate / 50, samples=[rate, rate, rate]),
        "tpot_s": Metric(value=1.05 / rate, unit="s"),
        "bytes_per_step": Metric(value=float(step), unit="bytes"),
        "bandwidth_gbps": Metric(value=achieved, unit="GB/s", stderr=achieved / 50),
        "bandwidth_share": Metric(value=achieved / WALL_GBPS, unit="1"),
        "machine_bandwidth_gbps": Metric(value=WALL_GBPS, unit="GB/s"),
    }
    speed = {"batch_size": 1, "context": 128}
    prefill = {"tokens_per_s": Metric(value=10 * rate, unit="tokens/s", stderr=rate / 5)}
    return [
        record("prefill", scheme, prefill, speed, size=known["size"]),
        record("decode", scheme, decode, speed, size=known["size"], details=Details(histograms={"step_s": times})),
    ]


def layers_record(scheme: str = "int4-gptq") -> ResultRecord:
    """A record of kind 'layers': what each linear costs by itself."""
    found = {
        f"model.layers.{layer}.{kind}": {
            "cost_kl": Metric(value=0.001 * (1 + layer + place), unit="nats/token", stderr=0.0001),
            "weight_error": Metric(value=0.01 * (1 + place), unit="1"),
            "sqnr": Metric(value=20.0, unit="dB"),
        }
        for layer in range(LAYERS)
        for place, kind in enumerate(KINDS_OF_LINEAR)
    }
    made = record("layers", scheme, {"kl_mean": Metric(value=0.01, unit="nats/token")}, {}, details=Details(layers=found))
    return made.model_copy(update={"subject": made.subject.model_copy(update={"kv_cache": None})})


def bandwidth_record() -> ResultRecord:
    """A record that belongs into no comparison."""
    metrics = {"bandwidth_gbps": Metric(value=WALL_GBPS, unit="GB/s")}
    subject = Subject(model=HERE.cpu, checkpoint_sha256="", scheme="machine")
    return record("bandwidth", "machine", metrics, {"buffer": 1}).model_copy(update={"subject": subject})
