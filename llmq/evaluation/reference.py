"""The reference's logits, computed once and kept for every candidate that is compared with it.

All logits of an evaluation are large (for WikiText-2's test split with a vocabulary of 128k some 70 GB), so they are kept in a
temporary file, in the dtype they were computed in and therefore without loss, as long as they fit into a byte budget and on
the disk. Otherwise the reference runs again beside every candidate, which costs time but changes no figure. Which of the two
happens is decided before anything runs, and `storage` says it.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from llmq.calibration.corpus import TextSource
from llmq.errors import OutputError, TextError, UsageError
from llmq.evaluation.perplexity import PerplexityResult, Plan, check_plan, dtype_name, plan_evaluation, summarize
from llmq.evaluation.protocols import PerplexityProtocol, Window
from llmq.evaluation.scoring import Batching, LanguageModel, Slab, batches, slab_rows, slabs, token_losses
from llmq.model.tokenizer import Tokenizer
from llmq.progress import SILENT, Progress

DEFAULT_BUDGET = 8 << 30
"""Bytes of temporary disk space that kept logits may take."""
_DISK_RESERVE = 1 << 30
"""Bytes of the temporary disk that are left free."""


@dataclass(frozen=True, slots=True)
class Storage:
    """Whether the reference's logits are kept, and why."""

    kept: bool
    reason: str
    nbytes: int
    """Size of all logits, kept or not."""


class ReferenceLogits:
    """The reference model's side of every comparison; use it as a context manager, so that its temporary file is removed.

    The first pass, whichever call causes it, computes the logits and keeps them where `storage.kept`.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        text: TextSource,
        protocol: PerplexityProtocol,
        *,
        batching: Batching | None = None,
        budget_bytes: int = DEFAULT_BUDGET,
        skip: int = 0,
    ) -> None:
        """Plan the evaluation; nothing runs yet.

        Args:
            model: the reference, ready to run.
            tokenizer: the checkpoint's; every candidate has to have the same.
            text: what is scored.
            protocol: how.
            batching: how much is computed at once, for the reference and for all candidates.
            budget_bytes: most bytes of temporary disk space; 0 keeps nothing, which is best when there is one candidate only.
            skip: windows at the start of the text that are left out, because something was chosen by them already.

        Raises:
            TextError: the text is too short for one window, or for one more than are left out.
            UsageError: the windows are longer than the model's context.
            TokenizerError: the tokenizer does not fit the model.
        """
        plan = plan_evaluation(tokenizer, text, protocol)
        if skip >= len(plan.windows):
            raise TextError(f"text {text.name} has {len(plan.windows)} windows, and {skip} of them are left out; take fewer.")
        self.plan: Plan = replace(plan, windows=plan.windows[skip:])
        check_plan(self.plan, model)
        self.vocabulary = model.config.vocab_size
        self._model: LanguageModel | None = model
        self._device = model.device
        self.batching = batching or Batching()
        self._batches = list(batches(self.plan.windows, self.batching))
        self._losses: list[Tensor | None] = [None] * len(self._batches)
        self._dtype: torch.dtype | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._offsets = [0]  # of every batch's logits in the file, in elements
        for batch in self._batches:
            scored = sum(window.targets.numel() for window in batch)
            self._offsets.append(self._offsets[-1] + scored * self.vocabulary)
        self._written = 0  # batches that are in the file
        self.storage: Storage = self._decide(budget_bytes, model)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def release_model(self) -> bool:
        """Let go of the reference model where nothing needs it any more, so that its memory is free for candidates.

        Returns:
            whether it was let go: every window has run, and all logits are kept.
        """
        if self._written == len(self._batches):
            self._model = None
        return self._model is None

    def close(self) -> None:
        """Remove the temporary file."""
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
            self._written = 0

    @property
    def batches(self) -> Sequence[Sequence[Window]]:
        """The plan's windows in the order and grouping in which every model runs."""
        return self._batches

    def slabs(self, index: int) -> Iterator[Slab]:
        """Yield the reference's logits for batch `index`, from the file or from the model; the same slabs either way."""
        if index < self._written:
            yield from self._read(index)
            return
        found: list[Tensor] = []
        keep = self.storage.kept and index == self._written
        offset = self._offsets[index]
        assert self._model is not None, "the model is only released when every batch is in the file"
        for slab in slabs(self._model, self._batches[index], self.batching):
            self._dtype = slab.logits.dtype
            if self._losses[index] is None:
                found.append(token_losses(slab))
            if keep:
                self._write(slab.logits, offset)
                offset += slab.logits.numel()
            yield slab
        if found:
            self._losses[index] = torch.cat(found)
        if keep:
            self._written += 1

    def losses(self, index: int) -> Tensor:
        """Return the reference's losses float32 for batch `index`, whose slabs have been taken."""
        losses = self._losses[index]
        assert losses is not None, "slabs(index) comes first"
        return losses

    @property
    def complete(self) -> bool:
        """The reference has run on every window."""
        return all(losses is not None for losses in self._losses)

    def perplexity(self, *, progress: Progress = SILENT) -> PerplexityResult:
        """Return the reference's own perplexity; runs it on the windows that it has not seen yet."""
        if not self.complete:
            with progress.task("perplexity of the reference", len(self.plan.windows)) as advance, torch.no_grad():
                for index, batch in enumerate(self._batches):
                    if self._losses[index] is None:
                        for _ in self.slabs(index):
                            pass
                    advance(len(batch))
        assert self._dtype is not None
        return summarize(
            self.plan, torch.cat([self.losses(index) for index in range(len(self._batches))]), dtype_name(self._dtype)
        )

    def check(self, tokenizer: Tokenizer, text: TextSource, protocol: PerplexityProtocol) -> None:
        """Raise UsageError, naming what differs, when a candidate would not be evaluated as the reference is."""
        for what, mine, theirs in (
            ("tokenizer (SHA-256)", self.plan.tokenizer_sha256, tokenizer.sha256),
            ("text (SHA-256)", self.plan.text_sha256, text.sha256),
            ("protocol", self.plan.protocol.describe(), protocol.describe()),
        ):
            if mine != theirs:
                raise UsageError(
                    f"the candidate cannot be compared with the reference: its {what} is {theirs}, the reference's is {mine}; "
                    "evaluate both with the same."
                )

    def _decide(self, budget_bytes: int, model: LanguageModel) -> Storage:
        nbytes = self._offsets[-1] * _itemsize(model, self.plan.windows[0])
        folder = tempfile.gettempdir()
        free = shutil.disk_usage(folder).free
        again = f"the reference runs again beside every candidate: its logits take {nbytes:,} bytes"
        if nbytes > budget_bytes:
            return Storage(kept=False, reason=f"{again}, more than the {budget_bytes:,} that may be kept", nbytes=nbytes)
        if nbytes + _DISK_RESERVE > free:
            return Storage(kept=False, reason=f"{again}, and {folder} has {free:,} free", nbytes=nbytes)
        return Storage(
            kept=True,
            reason=f"the reference's logits are kept without loss in a temporary file of {nbytes:,} bytes",
            nbytes=nbytes,
        )

    def _file(self) -> Path:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="llmq-reference-")
        return Path(self._folder.name) / "logits"

    def _write(self, logits: Tensor, offset: int) -> None:
        path = self._file()
        try:
            with path.open("r+b" if path.exists() else "wb") as file:
                file.seek(offset * logits.element_size())
                file.write(logits.contiguous().cpu().view(torch.uint8).numpy().data)
        except OSError as error:
            self.close()
            raise OutputError(
                f"cannot write the reference's logits to {path} ({error.strerror}); free space there, set TMPDIR, or keep fewer."
            ) from error

    def _read(self, index: int) -> Iterator[Slab]:
        assert self._dtype is not None
        start, stop = self._offsets[index], self._offsets[index + 1]
        # a private map of the file up to this batch's end: pages are read when they are used
        logits = torch.from_file(str(self._file()), shared=False, size=stop, dtype=self._dtype)[start:].view(-1, self.vocabulary)
        targets = torch.cat([window.targets for window in self._batches[index]])
        rows, device = slab_rows(self.vocabulary, self.batching), self._device
        for first in range(0, targets.numel(), rows):
            yield Slab(logits[first : first + rows].to(device), targets[first : first + rows].to(device))


def _itemsize(model: LanguageModel, window: Window) -> int:
    """Bytes of one logit: what dtype a model computes them in is known only by computing one."""
    with torch.no_grad():
        return model.head(model.hidden(window.inputs[None, :1].to(model.device))).element_size()
