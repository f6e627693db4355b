"""A model for lm-eval that answers nothing and remembers what it was asked: the token sequences of a task's requests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager

from llmq.errors import TextError, suggest
from llmq.model.tokenizer import Tokenizer


class TaskRecorder(TemplateLM):  # type: ignore[misc]  # lm-eval has no types
    """Records each distinct sequence once, in the order of the requests; the contexts of a question's choices recur."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.own_tokenizer = tokenizer
        self.sequences: dict[tuple[int, ...], None] = {}

    @property
    def eot_token_id(self) -> int:
        """What lm-eval puts where a context is empty."""
        for token in (self.own_tokenizer.bos_id, self.own_tokenizer.eos_id):
            if token is not None:
                return token
        return 0

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:  # noqa: ARG002, FBT001
        """Encode without special tokens."""
        return self.own_tokenizer.encode(string)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        **kwargs: Any,  # noqa: ARG002 - lm-eval's bars
    ) -> list[tuple[float, bool]]:
        for _, context, continuation in requests:
            self._record([*context, *continuation])
        return [(-1.0, False)] * len(requests)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:  # noqa: ARG002, FBT001, FBT002
        """Record whole documents."""
        for request in requests:
            self._record(self.tok_encode(request.args[0]))
        return [-1.0] * len(requests)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:  # noqa: ARG002, FBT001, FBT002
        """Record prompts."""
        for request in requests:
            self._record(self.tok_encode(request.args[0]))
        return [""] * len(requests)

    def _record(self, tokens: list[int]) -> None:
        if tokens:
            self.sequences.setdefault(tuple(tokens))


def record_requests(
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    *,
    limit: int | None,
    num_fewshot: int | None,
    include_path: Path | None,
    seed: int,
) -> list[list[int]]:
    """Return the token sequences that lm-eval would feed a model for these tasks.

    Raises:
        TextError: a task is unknown, or its data cannot be loaded.
    """
    if not tasks:
        raise TextError("no lm-eval task is named; `lm-eval ls tasks` lists them.")
    manager = _find_tasks(tasks, include_path)
    recorder = TaskRecorder(tokenizer)
    try:
        simple_evaluate(
            model=recorder,
            tasks=list(tasks),
            limit=limit,
            num_fewshot=num_fewshot,
            task_manager=manager,
            bootstrap_iters=0,
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    except (OSError, ValueError) as error:
        raise TextError(
            f"lm-eval cannot run {', '.join(tasks)} here ({error}); is the tasks' dataset on this machine?"
        ) from error
    return [list(sequence) for sequence in recorder.sequences]


def _find_tasks(tasks: Sequence[str], include_path: Path | None) -> TaskManager:
    """Index the tasks; lm-eval's own ones (14,000 files, some seconds) only when the user's folder does not hold them all."""
    if include_path is not None:
        manager = TaskManager(include_path=str(include_path), include_defaults=False)
        if set(tasks) <= set(manager.all_tasks):
            return manager
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    unknown = [name for name in tasks if name not in manager.all_tasks]
    if unknown:
        nearest = suggest(unknown[0], manager.all_tasks).split("Available")[0].strip()
        raise TextError(f"unknown lm-eval task {unknown[0]!r}. {nearest} `lm-eval ls tasks` lists them.".replace("  ", " "))
    return manager
