"""lm-eval tasks on any llmq model; lm_eval is imported when a task is run, not before.

Tasks, prompts, metrics and their standard errors are lm-eval's (github.com/EleutherAI/lm-evaluation-harness); the model's side
is `lm_adapter.LlmqLM`. Results come back as plain data.
"""

from __future__ import annotations

import contextlib
import difflib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmq.calibration.corpus import hub_problem
from llmq.errors import TextError, UsageError
from llmq.evaluation.scoring import Batching
from llmq.model.runtime import Runner
from llmq.model.tokenizer import Tokenizer
from llmq.progress import SILENT, Progress
from llmq.results.record import Metric

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

_BOOTSTRAP = 1000
"""Resamples for the standard errors that have no formula: enough for 2 % of the error, at a hundredth of lm-eval's time."""


@dataclass(frozen=True, slots=True)
class TaskOptions:
    """How tasks are run. Every one of them changes what a score means."""

    limit: int | None = None
    """Only the first so many documents of each task."""
    num_fewshot: int | None = None
    """Examples before each question; None: the task's own number."""
    include_path: Path | None = None
    """Folder with more task definitions; a name that is found there is taken from there."""
    max_length: int | None = None
    """Most tokens of a request; None: the model's context."""
    seed: int = 0
    """Of the choice of few-shot examples, and of sampled generation."""
    kv_dtype: torch.dtype | None = None
    """Of the KV cache; None: the model's."""


@dataclass(frozen=True, slots=True)
class TaskScore:
    """One metric of one task or group of tasks."""

    task: str
    task_version: str
    metric: str
    filter: str
    """Which of the task's ways to read an answer, 'none' where it has one only."""
    value: float
    stderr: float | None
    higher_is_better: bool | None
    num_fewshot: int | None
    n_documents: int | None

    def metric_record(self) -> Metric:
        """The score for a result record."""
        return Metric(value=self.value, unit="1", stderr=self.stderr)


@dataclass(frozen=True, slots=True)
class TaskResults:
    """Scores of all tasks that were run, and what they depend on besides the model."""

    scores: tuple[TaskScore, ...]
    options: TaskOptions
    max_length: int
    bos: str
    """The BOS policy, in words."""
    lm_eval_version: str


def run_tasks(
    model: Runner,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    *,
    options: TaskOptions | None = None,
    batching: Batching | None = None,
    progress: Progress = SILENT,
) -> TaskResults:
    """Run lm-eval tasks.

    lm-eval seeds Python's, numpy's and torch's global generators with `options.seed`.

    Args:
        model: ready to run; used as it is.
        tokenizer: the checkpoint's.
        tasks: names of tasks, groups or tags.
        options: how they are run.
        batching: how much is computed at once.
        progress: is told of every request.

    Raises:
        UsageError: a task is unknown, broken, or asks for what the model cannot do.
        TextError: a task's data are neither cached nor to be had.
    """
    if not tasks:
        raise UsageError("no task is named; name at least one, such as arc_easy.")
    options = options or TaskOptions()
    from lm_eval.evaluator import simple_evaluate

    from llmq.evaluation.lm_adapter import LlmqLM

    lm = LlmqLM(
        model,
        tokenizer,
        max_length=options.max_length,
        kv_dtype=options.kv_dtype,
        batching=batching,
        seed=options.seed,
        progress=progress,
    )
    # lm-eval prints as it goes; stdout belongs to the caller's results
    with contextlib.redirect_stdout(sys.stderr), _data_or_sentence(tasks):
        manager = _manager(tasks, options.include_path)
        results: dict[str, Any] = simple_evaluate(
            lm,
            tasks=list(tasks),
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            bootstrap_iters=_BOOTSTRAP,
            log_samples=False,
            task_manager=manager,
            random_seed=options.seed,
            numpy_random_seed=options.seed,
            torch_random_seed=options.seed,
            fewshot_random_seed=options.seed,
        )
    has_bos = tokenizer.bos_id is not None
    return TaskResults(
        scores=tuple(_scores(results)),
        options=options,
        max_length=lm.max_length,
        bos="before every request" if has_bos else "none: the tokenizer has no BOS; EOS before a text without context",
        lm_eval_version=version("lm_eval"),
    )


def _manager(tasks: Sequence[str], include_path: Path | None) -> TaskManager:
    """Index task definitions and check that every name is among them."""
    from lm_eval.tasks import TaskManager

    if include_path is not None:
        if not include_path.is_dir():
            raise UsageError(
                f"the folder of task definitions {include_path} does not exist; name a folder with lm-eval's YAML files."
            )
        # lm-eval's own definitions take a quarter of a minute to index, and single tasks do not refer to others
        own = TaskManager(include_path=str(include_path), include_defaults=False)
        if set(tasks) <= set(own.all_subtasks):
            return own
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    check_task_names(tasks, manager.all_tasks)
    return manager


def check_task_names(tasks: Sequence[str], known: Sequence[str]) -> None:
    """Raise UsageError, with the names that come close, when one of `tasks` is not among the `known`."""
    for name in tasks:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
            raise UsageError(
                f"unknown lm-eval task {name!r}: {hint}There are {len(known):,} names, which `lm-eval ls tasks` prints; "
                "more come from a folder of definitions (--include-path)."
            )


@contextlib.contextmanager
def _data_or_sentence(tasks: Sequence[str]) -> Iterator[None]:
    """Ask an unreachable hub once instead of for a minute, and turn what lm-eval raises for missing data into a sentence."""
    import datasets.config
    import huggingface_hub.constants as hub
    from datasets.exceptions import DatasetsError

    problem = "HF_HUB_OFFLINE is set" if hub.HF_HUB_OFFLINE else hub_problem()
    before = hub.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    if problem:
        hub.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    names = ", ".join(tasks)
    try:
        yield
    except (OSError, DatasetsError) as error:
        why = f"; {problem}" if problem else ""
        raise TextError(
            f"the data of task {names} cannot be had ({_first_line(error)}{why}); "
            "connect to the network, or put them into the cache of `datasets`."
        ) from error
    except (ValueError, ImportError) as error:
        # offline, `datasets` says ValueError for a configuration that is not in its cache
        raise UsageError(f"lm-eval cannot run task {names}: {_first_line(error)}") from error
    finally:
        hub.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def _scores(results: dict[str, Any]) -> Iterator[TaskScore]:
    """Turn lm-eval's nested results into rows; a group of tasks is a row beside its members."""
    for task, found in {**results["results"], **results.get("groups", {})}.items():
        for key, value in found.items():
            metric, _, name = key.partition(",")
            if not name or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = found.get(f"{metric}_stderr,{name}")
            yield TaskScore(
                task=task,
                task_version=str(results["versions"].get(task)),
                metric=metric,
                filter=name,
                value=float(value),
                stderr=float(stderr) if isinstance(stderr, int | float) else None,
                higher_is_better=results["higher_is_better"].get(task, {}).get(metric),
                num_fewshot=results["n-shot"].get(task),
                n_documents=results["n-samples"].get(task, {}).get("effective"),
            )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].removesuffix(".")
