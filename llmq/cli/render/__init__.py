"""Everything that llmq prints."""

from llmq.cli.render.console import records_or_json, reporting, save_records
from llmq.cli.render.diff import diff, gate
from llmq.cli.render.facts import calibration_set, description, environment, kernels, plan, quantized, schemes, stream
from llmq.cli.render.history import done, exported, imported, plotted, run_list, stored_run
from llmq.cli.render.kernel_choices import kernel_choices
from llmq.cli.render.layers import explanation
from llmq.cli.render.matrix import matrix
from llmq.cli.render.mixing import mixture, sensitivities
from llmq.cli.render.pages import pages_written
from llmq.cli.render.tables import (
    bandwidth,
    comparison,
    demo_closing,
    demo_opening,
    evaluation,
    kernel_speeds,
    speed,
    stored_table,
    task_results,
)

__all__ = [
    "bandwidth",
    "calibration_set",
    "comparison",
    "demo_closing",
    "demo_opening",
    "description",
    "diff",
    "done",
    "environment",
    "evaluation",
    "explanation",
    "exported",
    "gate",
    "imported",
    "kernel_choices",
    "kernel_speeds",
    "kernels",
    "matrix",
    "mixture",
    "pages_written",
    "plan",
    "plotted",
    "quantized",
    "records_or_json",
    "reporting",
    "run_list",
    "save_records",
    "schemes",
    "sensitivities",
    "speed",
    "stored_run",
    "stored_table",
    "stream",
    "task_results",
]
