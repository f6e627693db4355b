"""Measure llmq beside other engines: the same checkpoint, the same prompt tokens, the same threads, in turns.

    python scripts/bench_peers.py --model MODEL --env-dir DIR --setup --output records.jsonl
    python scripts/bench_peers.py --model MODEL --env-dir DIR --engines llmq-int4,llama.cpp-q4_0

`--setup` makes an environment for each engine from the package registry, with the versions of configs/peers. Each engine's own
converter makes its weights from the checkpoint. An engine that cannot be set up, cannot run, or computes another model is
listed with its reason. Run it on a machine that does nothing else. docs/performance.md says how it measures.
"""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from peers.catalogue import VARIANTS, Variant, choose
from peers.environments import Environments
from peers.report import Reporter
from peers.rounds import Measurement, Outcome, Task, compare_logits, obstacle
from peers.table import peers_table
from peers.weights import WeightStore
from peers.workers import Worker, WorkerError, worker_command

from llmq.benchmark.machine import measure_bandwidth
from llmq.checkpoint import open_checkpoint
from llmq.cli.options import names
from llmq.errors import InputError, LlmqError, UsageError
from llmq.model.config import LlamaConfig
from llmq.results.environment import available_cores, capture
from llmq.results.markdown import to_markdown
from llmq.results.store import append_records

CHECK_PROMPTS, CHECK_TOKENS = 8, 32
BATCH_ROWS = 8
OPERATIONS = ("prefill", "decode", "batch", "score")


def say(text: str) -> None:
    """Tell the user what happens."""
    print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked: tasks by operation, lengths in tokens."""

    prompt_lengths: tuple[int, ...]
    context: int
    new_tokens: int
    operations: tuple[str, ...]
    seed: int

    def check(self, config: LlamaConfig) -> None:
        """Raise UsageError when it cannot be run on a model of this shape."""
        strange = [name for name in self.operations if name not in OPERATIONS]
        if strange or not self.operations:
            raise UsageError(f"--ops takes some of {', '.join(OPERATIONS)}; got {', '.join(strange) or 'none'}.")
        if min(self.prompt_lengths, default=0) < 2:
            raise UsageError(f"--prompt-lengths takes numbers from 2 on; got {list(self.prompt_lengths)}.")
        limit = config.max_position_embeddings
        if self.longest > limit:
            raise UsageError(
                f"prompts of up to {max(self.prompt_lengths)} tokens and {self.new_tokens} new ones after {self.context} are "
                f"beyond the model's context of {limit} tokens; choose smaller --prompt-lengths, --context or --new-tokens."
            )

    @property
    def longest(self) -> int:
        """Tokens that the longest sequence has."""
        return max(*self.prompt_lengths, self.context + self.new_tokens + 1)

    def prompt(self, length: int, config: LlamaConfig, seed: int) -> list[int]:
        """Return random tokens after BOS: of speed, the text does not matter."""
        generator = random.Random(seed)
        start = [] if config.bos_token_id is None else [config.bos_token_id]
        return start + [generator.randrange(config.vocab_size) for _ in range(length - len(start))]

    def tasks(self, config: LlamaConfig) -> list[Task]:
        """Return what is timed."""
        context = self.prompt(self.context, config, self.seed)
        window = self.prompt(max(self.prompt_lengths), config, self.seed)
        steps = {"tokens": context, "new_tokens": self.new_tokens}
        by_operation = {
            "prefill": [
                Task(f"prefill-{length}", {"op": "prefill", "tokens": self.prompt(length, config, self.seed)}, length)
                for length in self.prompt_lengths
            ],
            "decode": [Task("decode", {"op": "decode", **steps}, 1)],
            "batch": [Task(f"batch-{BATCH_ROWS}", {"op": "batch", **steps, "rows": BATCH_ROWS}, BATCH_ROWS)],
            "score": [Task(f"score-{len(window)}", {"op": "score", "tokens": window}, len(window) - 1)],
        }
        return [task for name in OPERATIONS if name in self.operations for task in by_operation[name]]

    def check_prompts(self, config: LlamaConfig) -> list[list[int]]:
        """Return the prompts after which logits are compared."""
        length = min(CHECK_TOKENS, self.longest)
        return [self.prompt(length, config, self.seed + 1 + index) for index in range(CHECK_PROMPTS)]


@dataclass
class Run:
    """One run of the script."""

    config: LlamaConfig
    plan: Plan
    store: WeightStore
    threads: int
    measurement: Measurement
    reference: list[np.ndarray] | None = None

    def start(self, variant: Variant) -> Worker:
        """Start a variant's worker; raises WorkerError or InputError."""
        reason = self.store.environments.obstacle(variant.environment)
        if reason is not None:
            raise WorkerError(reason)
        weights = self.store.path(variant)
        order = {
            "weights": weights,
            "threads": self.threads,
            "context": self.plan.longest,
            "options": {**variant.options, "bits": variant.bits, "head": variant.head, **shape_options(self.config)},
        }
        say(f"loading {variant.name}")
        return Worker(worker_command(self.store.environments.python(variant.environment), variant.worker, order))

    def logits(self, worker: Worker) -> list[np.ndarray]:
        """Return the last logits of the check's prompts."""
        prompts = self.plan.check_prompts(self.config)
        return [np.array(worker.ask({"op": "logits", "tokens": prompt})["logits"], dtype=np.float32) for prompt in prompts]

    def prepare_reference(self) -> None:
        """Compute the logits of llmq in bf16, which everybody is checked against."""
        worker = self.start(VARIANTS["llmq-bf16"])
        try:
            self.reference = self.logits(worker)
        finally:
            worker.close()

    def group(self, variants: list[Variant]) -> dict[str, Outcome]:
        """Measure variants of one bit width, all of them loaded at once."""
        outcomes = {variant.name: Outcome(variant.name) for variant in variants}
        workers: dict[str, Worker] = {}
        try:
            for variant in variants:
                outcome = outcomes[variant.name]
                try:
                    worker = self.start(variant)
                    workers[variant.name] = worker
                    outcome.info = worker.info
                    if self.reference is not None:
                        outcome.check = compare_logits(self.logits(worker), self.reference)
                        outcome.failure = obstacle(outcome.check, variant.bits)
                except (WorkerError, InputError) as error:
                    outcome.failure = str(error)
                if outcome.failure is not None:
                    say(f"{variant.name} is left out: {outcome.failure}")
                    if variant.name in workers:
                        workers.pop(variant.name).close()
            self.measurement.run(workers, outcomes)
        finally:
            for worker in workers.values():
                worker.close()
        return outcomes


def shape_options(config: LlamaConfig) -> dict[str, object]:
    """Return the parameters that a model has, and that a decode step reads: all but the embedding table, unless it is tied."""
    attention = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim * config.hidden_size
    layer = attention + 3 * config.hidden_size * config.intermediate_size + 2 * config.hidden_size
    table = config.vocab_size * config.hidden_size
    step = config.num_layers * layer + table + config.hidden_size
    everything = step if config.tie_word_embeddings else step + table
    return {"parameters": {"all": everything, "step": step}, "vocab": config.vocab_size}


def measure(run: Run, engines: list[str], *, setup: bool) -> dict[str, Outcome]:
    """Measure the named engines, one bit width after the other; returns what became of each."""
    chosen = choose(engines)
    environments = run.store.environments
    failures: dict[str, str] = {}
    for name in dict.fromkeys(variant.environment for variant in chosen if setup):
        try:
            environments.set_up(name, say)
        except InputError as error:
            failures[name] = str(error)
            say(failures[name])
    outcomes = {variant.name: Outcome(variant.name, failure=failures.get(variant.environment)) for variant in chosen}
    run.prepare_reference()
    for bits in dict.fromkeys(variant.bits for variant in chosen):
        group = [variant for variant in chosen if variant.bits == bits and outcomes[variant.name].failure is None]
        outcomes |= run.group(group)
    return outcomes


def main(  # noqa: PLR0913, PLR0917 - one for each option
    model: Annotated[Path, typer.Option("--model", help="A checkpoint's folder in Hugging Face layout.")],
    env_dir: Annotated[Path, typer.Option("--env-dir", help="Folder of the environments and of the weights.")],
    engines: Annotated[str, typer.Option("--engines", metavar="A,B,…", help="What to measure.")] = ",".join(VARIANTS),
    setup: Annotated[bool, typer.Option("--setup", help="Make the environments that are not there.")] = False,
    threads: Annotated[int, typer.Option("--threads", min=1, help="Threads of every engine.")] = available_cores(),
    prompt_lengths: Annotated[str, typer.Option("--prompt-lengths", metavar="A,B,…", help="Tokens.")] = "128,512",
    context: Annotated[int, typer.Option("--context", min=2, help="Tokens before decoding.")] = 128,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=1, help="Steps of decoding.")] = 32,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Rounds that count.")] = 6,
    ops: Annotated[str, typer.Option("--ops", metavar="A,B,…", help="What to time.")] = ",".join(OPERATIONS),
    seed: Annotated[int, typer.Option("--seed", help="Of the prompts.")] = 0,
    output: Annotated[Path | None, typer.Option("--output", help="Append the records to this file.")] = None,
) -> None:
    """Measure engines in turns, write records, print the table."""
    try:
        lengths = tuple(int(length) for length in names(prompt_lengths))
    except ValueError as error:
        raise typer.BadParameter(f"--prompt-lengths takes numbers with commas between them; got {prompt_lengths!r}.") from error
    try:
        checkpoint = open_checkpoint(str(model))
        plan = Plan(lengths, context, new_tokens, tuple(names(ops)), seed)
        plan.check(checkpoint.config)
        store = WeightStore(Environments(env_dir.resolve()), model.resolve(), checkpoint.sha256, say)
        tasks = plan.tasks(checkpoint.config)
        run = Run(checkpoint.config, plan, store, threads, Measurement(tasks, rounds, say))
        # before and after: of what a shared machine gives, the best is what it can do
        walls = [measure_bandwidth(threads=threads).best_gbps]
        outcomes = measure(run, list(names(engines)), setup=setup)
        walls.append(measure_bandwidth(threads=threads).best_gbps)
        reporter = Reporter(model.resolve().name, checkpoint.sha256, capture(threads), tasks, max(walls))
        records = reporter.records(outcomes)
        if output is not None:
            append_records(output, records)
        print(to_markdown(peers_table(records)))
    except (LlmqError, WorkerError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(error.exit_code if isinstance(error, LlmqError) else 1) from error


if __name__ == "__main__":
    typer.run(main)
