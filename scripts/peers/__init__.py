"""The workers and tables of bench_peers.py.

The driver's side runs with llmq: catalogue (what can be measured), environments (one a peer, from the package registry), weights
(made once from the checkpoint), workers (processes), rounds (what is timed), report (records and the table). Each `*_engine` and
`*_weights` runs in its peer's own environment, with nothing of llmq: `protocol` and `checkpoint_files` are all they share.
"""
