"""A llmq model as lm-eval sees one. Only `harness` imports this module, because it imports lm_eval.

BOS: a request with a context, and a prompt to continue, begin with one BOS where the tokenizer has one. Whole documents
(`loglikelihood_rolling`) are conditioned on the prefix token, BOS or else EOS, which is not scored; so is a continuation
without context. A request that is too long loses tokens on its left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from torch import Tensor

from llmq.errors import UsageError
from llmq.evaluation.protocols import Window, prefix_token, rolling_windows
from llmq.evaluation.scoring import Batching, batches, head_slabs, hidden_rows, token_losses
from llmq.evaluation.through_cache import scored_with
from llmq.model.generate import Sampling, generate
from llmq.model.runtime import Runner
from llmq.model.tokenizer import StreamDecoder, Tokenizer
from llmq.progress import SILENT, Progress

_MOST_NEW_TOKENS = 256
"""What lm-eval's own models generate where a task does not say how much."""
_LENGTH_OPTIONS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING_OPTIONS = ("do_sample", "temperature", "top_k", "top_p")

_Request = tuple[Any, list[int], list[int]]
"""(the strings, tokens of the context, tokens of the continuation)."""


@dataclass(frozen=True, slots=True)
class _Generation:
    """What a task asks of `generate_until`."""

    until: tuple[str, ...]
    max_new_tokens: int
    sampling: Sampling


class LlmqLM(TemplateLM):  # type: ignore[misc]
    """lm-eval's interface over a llmq model and tokenizer."""

    def __init__(
        self,
        model: Runner,
        tokenizer: Tokenizer,
        *,
        max_length: int | None = None,
        kv_dtype: torch.dtype | None = None,
        batching: Batching | None = None,
        seed: int = 0,
        progress: Progress = SILENT,
    ) -> None:
        """Wrap `model`, ready to run, and `tokenizer`.

        Args:
            model: the model; it is used as it is.
            tokenizer: the checkpoint's.
            max_length: most tokens of a request; None: the model's context.
            kv_dtype: of the KV cache that requests are scored and continued through; None: the model's.
            batching: how much is computed at once.
            seed: of sampled generation; request i uses seed + i.
            progress: is told of every request.

        Raises:
            UsageError: `max_length` is beyond the model's context.
            TokenizerError: the tokenizer has neither BOS nor EOS.
        """
        super().__init__()
        context = model.config.max_position_embeddings
        if max_length is not None and not 2 <= max_length <= context:
            raise UsageError(f"max_length must be from 2 to the model's context of {context}, got {max_length}.")
        self.model = model
        self.kv_dtype = kv_dtype or model.dtype
        self.scorer = scored_with(model, self.kv_dtype)
        self.llmq_tokenizer = tokenizer
        self.max_length = max_length or context
        self.batching = batching or Batching()
        self.seed = seed
        self.progress = progress
        self._prefix = prefix_token(tokenizer)[0]

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text; the prefix token where the tokenizer has none."""
        eos = self.llmq_tokenizer.eos_id
        return self._prefix if eos is None else eos

    @property
    def prefix_token_id(self) -> int:
        """What a text without context is conditioned on: BOS, or else EOS."""
        return self._prefix

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:  # noqa: FBT001 - lm-eval's signature
        """Encode `string`, with BOS where the tokenizer has one, unless `add_special_tokens` is False."""
        bos = self.llmq_tokenizer.bos_id is not None and add_special_tokens is not False
        return self.llmq_tokenizer.encode(string, bos=bos)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:  # noqa: FBT001, FBT002
        """Score continuations; see lm-eval. The progress bar is llmq's, so lm-eval's own is off."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return found

    def _loglikelihood_tokens(self, requests: list[_Request], **_: Any) -> list[tuple[float, bool]]:
        """Return (ln p of the continuation, whether greedy decoding would give it) of every request."""
        windows: list[Window] = []
        for strings, context, continuation in requests:
            if not continuation:
                raise UsageError(f"a task asks to score the continuation {strings[1]!r}, which has no tokens; mend the task.")
            if len(continuation) > self.max_length:
                raise UsageError(
                    f"a task asks to score a continuation of {len(continuation)} tokens, but the model reads at most "
                    f"{self.max_length}; choose a task with shorter answers, or a model with a longer context."
                )
            tokens = torch.tensor((context + continuation)[-(self.max_length + 1) :])
            windows.append(Window(tokens[:-1], tokens[-len(continuation) :], 0))
        return self._score(windows, "lm-eval: log-likelihoods")

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:  # noqa: ARG002, FBT001, FBT002
        """Return ln p of whole documents, in the windows of the protocol lmeval-word."""
        windows = [
            Window(torch.tensor(inputs), torch.tensor(targets), number)
            for number, request in enumerate(requests)
            for inputs, targets in rolling_windows(
                self.tok_encode(request.args[0], add_special_tokens=False), self._prefix, self.max_length
            )
        ]
        totals = [0.0] * len(requests)
        for window, (score, _) in zip(windows, self._score(windows, "lm-eval: documents"), strict=True):
            totals[window.document] += score
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:  # noqa: ARG002, FBT001, FBT002
        """Continue prompts until a stop string, EOS, or the most tokens that the task allows."""
        texts: list[str] = []
        with self.progress.task("lm-eval: generation", len(requests)) as advance:
            for number, request in enumerate(requests):
                prompt, options = request.args
                wanted = self._generation(options, self.seed + number)
                tokens = self.tok_encode(prompt)[-(self.max_length - wanted.max_new_tokens) :]
                texts.append(self._continue(tokens or [self._prefix], wanted))
                self.cache_hook.add_partial("generate_until", request.args, texts[-1])
                advance(1)
        return texts

    def _score(self, windows: list[Window], description: str) -> list[tuple[float, bool]]:
        # Requests that read the same tokens (answers of one token to one question) share a forward pass. Sorted by length,
        # windows of one length are neighbours and share a batch.
        readers: dict[tuple[int, ...], list[int]] = {}
        for index, window in enumerate(windows):
            readers.setdefault((window.targets.numel(), *window.inputs.tolist()), []).append(index)
        groups = sorted(readers.values(), key=lambda group: windows[group[0]].inputs.numel(), reverse=True)
        scores: dict[int, tuple[float, bool]] = {}
        remaining = iter(groups)
        with self.progress.task(description, len(windows)) as advance, torch.no_grad():
            for batch in batches([windows[group[0]] for group in groups], self.batching):
                members = list(islice(remaining, len(batch)))
                scores |= self._score_batch(batch, members, windows)
                advance(sum(len(group) for group in members))
        return [scores[index] for index in range(len(windows))]

    def _score_batch(
        self, batch: Sequence[Window], members: Sequence[Sequence[int]], windows: Sequence[Window]
    ) -> dict[int, tuple[float, bool]]:
        """Score every window of `windows` whose index is in `members`, where members[i] all read what batch[i] reads."""
        h, _ = hidden_rows(self.scorer, batch)
        rows: list[Tensor] = []
        order: list[int] = []
        first = 0
        for window, group in zip(batch, members, strict=True):
            last = first + window.targets.numel()
            rows += [torch.arange(first, last)] * len(group)
            order += group
            first = last
        targets = torch.cat([windows[index].targets for index in order]).to(h.device)
        losses: list[Tensor] = []
        greedy: list[Tensor] = []
        for slab in head_slabs(self.scorer, h[torch.cat(rows).to(h.device)], targets, self.batching):
            losses.append(token_losses(slab))
            greedy.append((slab.logits.argmax(-1) == slab.targets).cpu())
        sizes = [windows[index].targets.numel() for index in order]
        parts = zip(order, torch.split(torch.cat(losses), sizes), torch.split(torch.cat(greedy), sizes), strict=True)
        return {index: (-float(loss.double().sum()), bool(hit.all())) for index, loss, hit in parts}

    def _generation(self, options: dict[str, Any], seed: int) -> _Generation:
        """Read a task's generation options; UsageError names one that llmq does not have."""
        given = dict(options)
        until = given.pop("until", None) or ()
        lengths = [int(given.pop(name)) for name in _LENGTH_OPTIONS if given.get(name) is not None]
        # A task that does not say how much gets lm-eval's default, or half of the context where that is less.
        most = lengths[0] if lengths else min(_MOST_NEW_TOKENS, self.max_length // 2)
        if not 1 <= most < self.max_length:
            raise UsageError(
                f"a task asks to generate {most} tokens, but the model's context of {self.max_length} has to hold them and a "
                "prompt; choose a task with shorter answers, or a model with a longer context."
            )
        temperature = float(given.pop("temperature", None) or 0.0)
        if given.pop("do_sample", temperature > 0) is False:
            temperature = 0.0
        top_k, top_p = given.pop("top_k", None), given.pop("top_p", None)
        for name in (*_LENGTH_OPTIONS, "seed"):
            given.pop(name, None)
        if given:
            raise UsageError(
                f"a task sets the generation option {min(given)!r}, which llmq does not have; it has until, "
                f"{', '.join((*_LENGTH_OPTIONS, *_SAMPLING_OPTIONS))}."
            )
        sampling = Sampling(temperature, top_k, top_p, seed)
        return _Generation((until,) if isinstance(until, str) else tuple(until), most, sampling)

    def _continue(self, prompt: list[int], wanted: _Generation) -> str:
        """Generate until one of the stop strings appears; it is not part of the result."""
        decoder = StreamDecoder(self.llmq_tokenizer)
        text = ""
        tokens = generate(
            self.model, prompt, max_new_tokens=wanted.max_new_tokens, sampling=wanted.sampling, kv_dtype=self.kv_dtype
        )
        for token in tokens:
            text += decoder.push(token)
            if any(stop in text for stop in wanted.until if stop):
                break
        text += decoder.flush()
        ends = [text.find(stop) for stop in wanted.until if stop and stop in text]
        return text[: min(ends)] if ends else text
