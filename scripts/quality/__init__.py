"""The parts of bench_quality.py: what is measured, how each tool makes its weights, one evaluation for all of them, the report.

The driver's side runs with llmq: catalogue, making, evaluation, corpus, records, report, plot. Each `*_maker` runs in its tool's
own environment and hands over plain float weights through `exchange`, so that everything is evaluated by the same code.
"""
