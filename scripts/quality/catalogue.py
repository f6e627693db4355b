"""What is measured: rows of llmq's schemes and of other tools, in sections of comparable bits, and suites of them.

A row says how weights are made; a suite says on which model, with which calibration windows and text. Rows of schemes that this
llmq does not have are skipped, and the record says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

from llmq.errors import UsageError, suggest

LLMQ = "llmq"


@dataclass(frozen=True, slots=True)
class Row:
    """One way to make weights.

    Attributes:
        name: as `--rows` takes it, and as the table shows it.
        section: heading of the table that it stands in.
        environment: whose Python makes it: `LLMQ`, or a name in configs/peers.
        maker: module of this package.
        settings: the maker's own.
        windows: calibration windows; 0 for what needs none.
        about: what a reader of the table should know.
        base: row of another section that leads this one's table, for comparison.
    """

    name: str
    section: str
    environment: str
    maker: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    windows: int = 128
    about: str = ""
    base: str = ""

    @property
    def is_llmq(self) -> bool:
        """Whether it is ours."""
        return self.environment == LLMQ

    @property
    def tool(self) -> str:
        """Who made it, for the plot's legend: 'llmq', or the first word of the row's name."""
        return LLMQ if self.is_llmq else self.name.split()[0]


@dataclass(frozen=True, slots=True)
class Suite:
    """Rows measured on one model with one draw of calibration windows.

    Attributes:
        name: of its records: configs/quality/NAME.jsonl.
        text: 'wikitext' (calibrated on its training split, evaluated on its test split), or 'own', which the model itself
            writes at temperature 1.
        seed: of the draw of calibration windows.
        rows: patterns of row names.
        extra: options of `llmq quantize` that the model asks for.
        about: for the page.
    """

    name: str
    text: Literal["wikitext", "own"]
    seed: int
    rows: tuple[str, ...]
    extra: tuple[str, ...] = ()
    about: str = ""


def _ours(section: str, name: str, scheme: str, windows: int, *words: str, **options: Any) -> Row:
    """Return a row of llmq: a scheme, options of the scheme, and further words of `llmq quantize`."""
    return Row(name, section, LLMQ, "llmq_maker", {"scheme": scheme, "set": options, "words": list(words)}, windows)


def _autoround(section: str, name: str, windows: int = 128, **settings: Any) -> Row:
    return Row(name, section, "autoround", "autoround_maker", {"bits": 4, "iters": 200, **settings}, windows)


def _gptqmodel(section: str, name: str, **settings: Any) -> Row:
    return Row(name, section, "gptqmodel", "gptqmodel_maker", {"bits": 4, "sym": True, **settings})


def _compressor(section: str, name: str, **settings: Any) -> Row:
    return Row(name, section, "llmcompressor", "llmcompressor_maker", {"bits": 4, **settings})


def _hqq(section: str, group_size: int, bits: int = 4) -> Row:
    name = f"HQQ int{bits} g={group_size}"
    return Row(name, section, "hqq", "hqq_maker", {"nbits": bits, "group_size": group_size}, 0, about="data-free")


def _llama_cpp(section: str, kind: str) -> Row:
    return Row(f"llama.cpp {kind}", section, "llama_cpp", "llama_cpp_maker", {"kind": kind}, about="with imatrix")


G128, G32, CHANNEL = "int4, groups of 128", "int4, groups of 32, and others of 4.5 to 5 bits", "int4, one scale a row"
INT3, INT2, INT8, MIXED = "About 3 bits", "About 2 bits", "8 bits, activations too", "Mixed precision"
ROTATIONS, INT8_PARTS = "Rotations folded into the weights", "What each part of int8-smoothquant gives"
GPTQ_PARTS, YAQA_PARTS, BEST_PARTS, OTHER_PARTS = (
    f"What each part of {name} gives, groups of 128"
    for name in ("int4-gptq", "int4-yaqa", "int4-best", "int4-awq and int4-autoround")
)


def _of_group(section: str, group: int) -> Iterator[Row]:
    """Yield llmq's int4 rows of one group size."""
    for grid, options in GRIDS.items():
        yield _ours(section, f"int4 RTN {grid} g={group}", "int4", 0, group_size=group, search="range", **options)
    for grid, options in GRIDS.items():
        yield _ours(section, f"int4 {grid} g={group}", "int4", 0, group_size=group, **options)
    for grid, options in GRIDS.items():
        yield _ours(section, f"int4-gptq {grid} g={group}", "int4-gptq", 128, group_size=group, **options)
    yield _ours(section, f"int4-awq g={group}", "int4-awq", 128, group_size=group)
    yield _ours(section, f"int4-autoround g={group}", "int4-autoround", 128, group_size=group)
    for scheme in ("int4-yaqa", "int4-best"):
        for windows in (128, 512):
            yield _ours(section, f"{scheme} g={group} {windows}w", scheme, windows, group_size=group)
    yield _ours(section, f"int4-best sym g={group} 512w", "int4-best", 512, group_size=group, symmetric=True)


GRIDS: Mapping[str, Mapping[str, Any]] = {"asym": {}, "asym-int": {"zero_point": "int"}, "sym": {"symmetric": True}}
"""Grids of int4: a floating zero point (4.25 bits at g = 128), an integer one, none."""


def _rows() -> Iterator[Row]:
    yield from _of_group(G128, 128)
    yield _autoround(G128, "AutoRound asym g=128", group_size=128, sym=False)
    yield _autoround(G128, "AutoRound sym g=128", group_size=128, sym=True)
    yield _autoround(G128, "AutoRound alg-ext sym g=128", group_size=128, sym=True, enable_alg_ext=True)
    yield _autoround(G128, "AutoRound best sym g=128 512w", 512, group_size=128, sym=True, iters=1000)
    yield _gptqmodel(G128, "GPTQModel sym g=128", group_size=128)
    yield _gptqmodel(G128, "GPTQModel desc_act sym g=128", group_size=128, desc_act=True, act_group_aware=False)
    yield _gptqmodel(G128, "GPTQModel GPTAQ sym g=128", group_size=128, gptaq=0.25)
    yield _compressor(G128, "llm-compressor GPTQ asym g=128", method="gptq", group_size=128, sym=False, actorder="static")
    yield _compressor(G128, "llm-compressor AWQ asym g=128", method="awq", group_size=128, sym=False)
    yield _hqq(G128, 128)
    yield _llama_cpp(G128, "IQ4_XS")
    yield from _of_group(G32, 32)
    yield _autoround(G32, "AutoRound asym g=32", group_size=32, sym=False)
    yield _gptqmodel(G32, "GPTQModel sym g=32", group_size=32)
    yield _hqq(G32, 32)
    for kind in ("Q4_0", "Q4_1", "Q4_K_S", "IQ4_NL"):
        yield _llama_cpp(G32, kind)
    yield _ours(MIXED, "mixed 4.55 bpw", "int4-best", 512, "--target-bpw", "4.55")
    yield _ours(CHANNEL, "int4 RTN per channel", "int4", 0, group_size="channel", search="range")
    for scheme, windows in (("int4", 0), ("int4-gptq", 128), ("int4-best", 512)):
        yield _ours(CHANNEL, f"{scheme} per channel", scheme, windows, group_size="channel")
    for bits, section in ((3, INT3), (2, INT2)):
        for group in (128,) if bits == 3 else (128, 64):
            yield _ours(section, f"int{bits} RTN g={group}", f"int{bits}", 0, group_size=group, search="range")
            for scheme, windows in ((f"int{bits}", 0), (f"int{bits}-gptq", 128), (f"int{bits}-best", 512)):
                yield _ours(section, f"{scheme} g={group}", scheme, windows, group_size=group)
    yield _autoround(INT3, "AutoRound int3 asym g=128", group_size=128, sym=False, bits=3)
    yield _llama_cpp(INT3, "Q3_K_M")
    yield _llama_cpp(INT3, "Q3_K_S")
    yield _autoround(INT2, "AutoRound int2 asym g=128", group_size=128, sym=False, bits=2)
    yield _llama_cpp(INT2, "Q2_K")
    yield _ours(INT8, "int8-dynamic", "int8-dynamic", 0)
    yield _ours(INT8, "int8-smoothquant", "int8-smoothquant", 128)
    yield _ours(INT8, "int8-smoothquant static", "int8-smoothquant", 128, activations="static")
    yield _ours(INT8, "int8-smoothquant static unsmoothed", "int8-smoothquant", 128, activations="static", smoothing="none")
    yield from _ablations()
    yield from _rotated()


def _rotated() -> Iterator[Row]:
    """Yield rows with rotations folded into the weights, beside the row without."""
    for base, scheme, windows, options in ROTATED:
        for kind in ("heads", "residual", "both"):
            row = _ours(ROTATIONS, f"{base} rotated: {kind}", scheme, windows, "--rotate", kind, **options)
            yield replace(row, base="int4 RTN asym g=128")
    for base, options in (("", {}), ("unsmoothed ", {"smoothing": "none"}), ("inputs ", {"metric": "inputs"})):
        for kind in ("none", "both"):
            row = _ours(
                INT8_PARTS, f"int8-smoothquant {base}rotated: {kind}", "int8-smoothquant", 128, "--rotate", kind, **options
            )
            yield replace(row, base="int8-dynamic")
    yield replace(_ours(INT8_PARTS, "int8-dynamic rotated: both", "int8-dynamic", 0, "--rotate", "both"), base="int8-dynamic")


def _ablations() -> Iterator[Row]:
    """Yield rows that differ from a scheme's defaults in the options that their names say."""
    for section, base, scheme, changes in ABLATIONS:
        for change in changes:
            what = " ".join(f"{option}={value}" for option, value in change.items())
            yield replace(_ours(section, f"{scheme}: {what}", scheme, 128, group_size=128, **change), base=base)


_PARTS: tuple[Mapping[str, Any], ...] = (
    {"search": "range"},
    {"search": "error"},
    {"correction": 0},
    {"refit": "false"},
    {"sweeps": 0},
    {"act_order": "false"},
)
ROTATED: tuple[tuple[str, str, int, Mapping[str, Any]], ...] = (
    ("int4 RTN asym g=128", "int4", 0, {"group_size": 128, "search": "range"}),
    ("int4-gptq asym g=128", "int4-gptq", 128, {"group_size": 128}),
    ("int4 RTN per channel", "int4", 0, {"group_size": "channel", "search": "range"}),
    ("int4-gptq per channel", "int4-gptq", 128, {"group_size": "channel"}),
    ("int3 RTN g=128", "int3", 0, {"group_size": 128, "search": "range"}),
    ("int3-gptq g=128", "int3-gptq", 128, {"group_size": 128}),
)
"""Row without rotations, scheme, windows and options of it."""
ABLATIONS: tuple[tuple[str, str, str, tuple[Mapping[str, Any], ...]], ...] = (
    (
        GPTQ_PARTS,
        "int4-gptq asym g=128",
        "int4-gptq",
        (
            {"search": "range"},
            {"search": "error"},
            {"refit": "false"},
            {"sweeps": 0},
            {"sweeps": 2},
            {"correction": 0.5},
            {"correction": 0.5, "sweeps": 2},
            {"act_order": "false"},
            {"search": "range", "refit": "false", "sweeps": 0},
        ),
    ),
    (YAQA_PARTS, "int4-yaqa g=128 128w", "int4-yaqa", (*_PARTS, {"metric": "outputs"}, {"metric": "inputs"})),
    (BEST_PARTS, "int4-best g=128 128w", "int4-best", ({"distill_epochs": 0}, {"metric": "inputs"}, {"sweeps": 0})),
    (OTHER_PARTS, "int4-awq g=128", "int4-awq", ({"rounding_by": "gptq"}, {"scales": "inputs"}, {"scales": "none"})),
    (OTHER_PARTS, "int4-awq g=128", "int4-autoround", ({"start": "nearest"}, {"relative": "false"})),
)
"""Section, the row that leads its table, scheme, and the changes, each a row calibrated on 128 windows."""

ROWS: Mapping[str, Row] = {row.name: row for row in _rows()}

_HELD_OUT = (
    "int4 RTN asym g=128",
    "int4 asym g=128",
    "int4-gptq asym g=128",
    "int4-awq g=128",
    "int4-autoround g=128",
    "int4-yaqa g=128 128w",
    "int4-best g=128 128w",
    "AutoRound asym g=128",
)
SUITES: Mapping[str, Suite] = {
    suite.name: suite
    for suite in (
        Suite("wt2-8m", "wikitext", 0, ("*",), about="every row"),
        Suite("wt2-8m-seed1", "wikitext", 1, _HELD_OUT, about="other calibration windows of the same text"),
        Suite(
            "stories260K",
            "own",
            0,
            tuple(name.replace("g=128", "g=32") for name in _HELD_OUT),
            ("--skip-unfit",),
            about="another model, on stories that it wrote itself; its down_proj has 172 inputs, which groups of 32 do not fit: "
            "llmq leaves that one alone",
        ),
    )
}


def choose(patterns: Iterable[str], suite: Suite) -> list[Row]:
    """Return the suite's rows that match one of the patterns, in the catalogue's order.

    Raises:
        UsageError: a pattern matches no row.
    """
    found: dict[str, None] = {}
    for pattern in patterns:
        matching = [name for name in ROWS if fnmatchcase(name, pattern)]
        if not matching:
            raise UsageError(f"no row is called {pattern!r}.{suggest(pattern, list(ROWS))}")
        found |= dict.fromkeys(matching)
    return [row for row in ROWS.values() if row.name in found and any(fnmatchcase(row.name, own) for own in suite.rows)]
