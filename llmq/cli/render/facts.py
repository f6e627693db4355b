"""How checkpoints, plans, kernels, schemes and the environment are shown."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmq.cli.render.console import duration, grid, print_json, show, stdout
from llmq.results.figures import plain, size

if TYPE_CHECKING:
    from llmq.algorithms.report import LayerReport
    from llmq.api.planning import Plan
    from llmq.api.quantizing import Quantized
    from llmq.calibration.recorder import CalibrationSet
    from llmq.checkpoint import Description
    from llmq.model.config import LlamaConfig
    from llmq.ops.select import KernelRow
    from llmq.results.coverage import Coverage


def stream(prompt: str, pieces: Iterator[str]) -> None:
    """Print a prompt and its completion as it comes."""
    sys.stdout.write(prompt)
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


def calibration_set(recorded: CalibrationSet, out: Path) -> None:
    """Say what was recorded."""
    n, length = recorded.tokens.shape
    stdout().print(f"{n} windows of {length} tokens written to {out}", soft_wrap=True)
    facts = recorded.info.to_json()
    parts = facts.pop("parts")
    for key, value in facts.items():
        stdout().print(f"  [dim]{key:<18}[/dim] {value}", soft_wrap=True)
    columns = [("part", "left"), ("kind", "left"), ("weight", "right"), ("windows", "right"), ("sequences", "right")]
    columns += [("sha256", "left"), ("template", "left")]
    cells = [
        [
            part["name"],
            part["kind"],
            f"{part['weight']:g}",
            str(part["windows"]),
            str(part["sequences"]),
            part["sha256"][:12],
            (part["template_sha256"] or "–")[:12],
        ]
        for part in parts
    ]
    show(grid(columns, cells), title="Sources")


def coverage(rows: Coverage) -> None:
    """Show what became of every weight: one line for all those alike."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for row in rows.rows:
        kind = ".".join("*" if part.isdigit() else part for part in row.fqn.removeprefix("model.").split("."))
        key = (kind, "x".join(map(str, row.shape)), _short(row.dtype), row.reason or "covered")
        entry = groups.setdefault(key, [0, 0])
        entry[0] += 1
        entry[1] += row.nbytes
    columns = [
        ("weights", "left"),
        ("count", "right"),
        ("shape", "right"),
        ("stored as", "left"),
        ("size", "right"),
        ("why", "left"),
    ]
    cells = [[key[0], str(count), key[1], key[2], size(nbytes), key[3]] for key, (count, nbytes) in groups.items()]
    show(grid(columns, cells), title="Coverage", notes=[rows.summary()])


def _short(text: str) -> str:
    """Write dtypes as schemes are called."""
    for long, short in (("bfloat16", "bf16"), ("float16", "fp16"), ("float32", "fp32")):
        text = text.replace(long, short)
    return text


def layers(reports: list[LayerReport]) -> None:
    """Show what quantizing each linear cost."""
    if not any(report.loss is not None for report in reports):
        return
    columns = [("linear", "left"), ("SQNR", "right"), ("loss", "right"), ("of RTN's", "right"), ("damping", "right")]
    columns += [("dead", "right"), ("time", "right"), ("fallback", "left")]
    cells = []
    for report in reports:
        share = f"{report.loss / report.rtn_loss:.0%}" if report.loss is not None and report.rtn_loss else "–"
        cells.append(
            [
                report.fqn,
                f"{report.sqnr_db:.1f} dB" if report.sqnr_db is not None else "–",
                plain(report.loss, 3) if report.loss is not None else "–",
                share,
                plain(report.damping, 2) if report.damping is not None else "–",
                str(report.dead_columns),
                f"{report.seconds:.2f} s",
                report.fallback or "",
            ]
        )
    show(grid(columns, cells), title="Layers (loss: Hessian-weighted, as GPTQ minimises it)")


def quantized(result: Quantized) -> None:
    """Show what was written."""
    loaded = result.loaded
    assert loaded.coverage is not None
    coverage(loaded.coverage)
    layers(loaded.reports)
    subject = result.record.subject
    stdout().print(
        f"\n[bold]{result.out}[/bold] written: {subject.scheme}, {size(subject.size_bytes or 0)}, "
        f"{subject.bits_per_weight:.3f} bits per weight in quantized linears, {subject.file_bits_per_weight:.3f} over all. "
        "Every stored tensor was read back and is bit for bit what was computed.",
        soft_wrap=True,
    )


def plan(planned: Plan, *, json: bool) -> None:
    """Show what a quantization would do."""
    if json:
        print_json(planned.to_json())
        return
    coverage(planned.coverage)
    for title, parts in (("Memory while quantizing", planned.peak_parts), ("Memory of the GPU", planned.device_parts)):
        rows = [[what, size(nbytes)] for what, nbytes in (parts or {}).items()]
        if parts is not None:
            show(
                grid([("what", "left"), ("peak memory", "right")], [*rows, ["together, about", size(sum(parts.values()))]]),
                title=title,
            )
    bits = planned.coverage.bits_per_weight
    options = ", ".join(f"{key} {value}" for key, value in planned.options.items())
    stdout().print(
        f"\n[bold]{planned.model}[/bold] with {planned.scheme}{f' ({options})' if options else ''}: "
        f"{size(planned.source_bytes)} now, {size(planned.coverage.nbytes)} then"
        f"{f', {bits:.3f} bits per weight in quantized linears' if bits else ''}.",
        soft_wrap=True,
    )
    timing = planned.timing
    stdout().print(
        f"Time: about {duration(timing.total)}, {timing.start:.1f} s to begin and to end and {timing.block:.1f} s for each of "
        f"{timing.blocks} blocks, as measured on the first."
        if timing is not None
        else "No weight was read; `llmq plan --measure` times the first block.",
        soft_wrap=True,
    )
    caches = [
        f"{size(nbytes * planned.context_tokens)} in {name} ({size(nbytes)} a token)"
        for name, nbytes in planned.kv_bytes_per_token.items()
    ]
    stdout().print(
        f"To run it, the KV cache of a sequence of {planned.context_tokens:,} tokens, the context's limit, takes "
        f"{' or '.join(caches)}.",
        soft_wrap=True,
    )


def description(facts: Description, *, layers: bool, json: bool) -> None:
    """Explain a checkpoint."""
    if json:
        print_json(facts.to_json())
        return
    config = facts.config
    lines = {
        "kind": facts.format,
        "files": ", ".join(f"{file.name} ({size(file.nbytes)})" for file in facts.files),
        "shape": _shape(config),
        "parameters": f"{facts.total_parameters:,} ({', '.join(f'{kind} {count:,}' for kind, count in facts.counts.items())})",
        "stored": ", ".join(f"{row.dtype}: {row.tensors} tensors, {size(row.nbytes)}" for row in facts.dtypes),
        "bits": f"{facts.matrix_bits_per_weight:.3f} a weight in linears, {facts.file_bits_per_weight:.3f} over all",
        "tokenizer": facts.tokenizer_problem or _tokenizer(facts),
    }
    if facts.artefact is not None:
        artefact = facts.artefact
        lines |= {
            "scheme": f"{artefact.scheme} {artefact.options or ''}",
            "source": ", ".join(f"{key} {value}" for key, value in artefact.source.items()),
            "calibrated": ", ".join(f"{key} {value}" for key, value in (artefact.calibration or {"with": "nothing"}).items()),
            "made with": ", ".join(f"{name} {version}" for name, version in artefact.versions.items())
            + f", seed {artefact.seed}, {artefact.threads} threads",
        }
    console = stdout()
    console.print(f"\n[bold]{facts.path}[/bold]", soft_wrap=True)
    for key, value in lines.items():
        console.print(f"  [dim]{key:<11}[/dim]{value}", soft_wrap=True)
    for note in facts.notes:
        console.print(f"  [dim]note[/dim]       {note}", soft_wrap=True)
    if layers:
        columns = [("parameter", "left"), ("shape", "right"), ("stored as", "left"), ("bits/weight", "right"), ("size", "right")]
        rows = [
            [row.name, "x".join(map(str, row.shape)), row.dtype, f"{row.bits_per_weight:.3f}", size(row.nbytes)]
            for row in facts.parameters
        ]
        show(grid(columns, rows), title="Parameters")


def _shape(config: LlamaConfig) -> str:
    parts = [
        f"{config.num_layers} layers, {config.hidden_size} wide, FFN {config.intermediate_size}",
        f"{config.num_heads} heads of {config.head_dim}, {config.num_kv_heads} KV heads",
        f"vocabulary {config.vocab_size:,}, context {config.max_position_embeddings:,}",
    ]
    return ", ".join([*parts, *(["tied head"] if config.tie_word_embeddings else [])])


def _tokenizer(facts: Description) -> str:
    found = facts.tokenizer
    if found is None:
        return "none"
    return f"{found.file}: {found.kind}, {found.vocab_size:,} tokens, BOS {found.bos_id}, EOS {found.eos_id}"


def environment(data: dict[str, Any], *, json: bool) -> None:
    """Show what this machine and installation offer."""
    if json:
        print_json(data)
        return
    native = data["native"]
    lines = {
        "llmq": f"{data['llmq']} on Python {data['python']}, {data['platform']}",
        "CPU": f"{data['cpu']}, {data['cores']} cores, {data['threads']} threads, {size(data['memory_bytes'])} of memory",
        "features": ", ".join(data["cpu_features"]) or "none of those that matter",
        "torch": f"{data['packages'].get('torch', 'missing')}, CPU capability {data['torch_cpu_capability']}",
        "CUDA": data["cuda"],
        "native": f"{native['path']} ({native['isa']})" if native["available"] else f"missing: {native['reason']}",
        "WikiText-2": data["wikitext_dir"],
        "packages": ", ".join(f"{name} {version}" for name, version in data["packages"].items() if name != "torch"),
    }
    for key, value in lines.items():
        stdout().print(f"[bold]{key:<11}[/bold]{value}", soft_wrap=True)


def kernels(rows: list[KernelRow], *, json: bool) -> None:
    """List the kernels, fastest first."""
    if json:
        print_json([dataclasses.asdict(row) for row in rows])
        return
    columns = [("kernel", "left"), ("here", "left"), ("rows", "left"), ("layout", "left"), ("for", "left")]
    cells = [[row.name, "yes" if row.available else "no", row.rows, row.layout, row.formats] for row in rows]
    notes = [f"{row.name}: {row.reason}" for row in rows if not row.available]
    show(grid(columns, cells), title="Kernels, in the order in which they are tried", notes=notes)


def schemes(described: list[dict[str, Any]], *, json: bool) -> None:
    """List the schemes; for a single one, its options too."""
    if json:
        print_json(described)
        return
    columns = [("scheme", "left"), ("bits/weight", "right"), ("calibration", "left"), ("what it is", "left")]
    cells = [
        [row["name"], f"{row['bits_per_weight']:.3f}", "needed" if row["needs_calibration"] else "no", row["summary"]]
        for row in described
    ]
    show(grid(columns, cells), title="Schemes (bits per weight: defaults, 4,096 inputs)")
    if len(described) == 1 and described[0]["options"]:
        columns = [("option", "left"), ("default", "left"), ("allowed", "left"), ("what it does", "left")]
        cells = [
            [
                row["name"],
                str(row["default"]),
                str(row["type"]),
                f"{row['description']}{' (' + row['unit'] + ')' if row['unit'] else ''}",
            ]
            for row in described[0]["options"]
        ]
        show(grid(columns, cells), title="Options (-S option=value)")
