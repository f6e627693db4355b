"""Every error llmq raises on purpose, and the exit code each one ends the command line with.

    LlmqError                        exit 1   (never raised itself)
    ├── UsageError                   exit 2   an option, name or combination that cannot be
    ├── InputError                   exit 3   a file that cannot be used
    │   ├── CheckpointError                   weights: truncated, missing, wrong shape, NaN, unknown
    │   ├── TokenizerError                    tokenizer: unreadable, or not the checkpoint's
    │   └── TextError                         calibration or evaluation text
    ├── SchemeError                  exit 4   a scheme cannot be applied to this model
    │   └── ShapeError                        a layer does not fit the grid; names the layers and what would fit
    ├── KernelError                  exit 5   a kernel that was asked for cannot run here
    ├── OutputError                  exit 6   the output exists, or cannot be written
    ├── PeerError                    exit 7   another process of several has ended
    ├── GateError                    exit 3   `llmq report diff` or `llmq ci` could not run; their 1 and 2 are verdicts
    └── Interrupted                  exit 130 the user stopped it; says what is kept and how to go on

A message is one sentence that says what is wrong, what was got, what is allowed and what to do about it.
"""

from __future__ import annotations


class LlmqError(Exception):
    """Base of every error that is the user's to mend; `exit_code` is the process's."""

    exit_code = 1
    everywhere = False
    """Every process of several has raised the same."""


class UsageError(LlmqError):
    """An option, a name or a combination of them that cannot be."""

    exit_code = 2


class InputError(LlmqError):
    """A file that cannot be used."""

    exit_code = 3


class CheckpointError(InputError):
    """A checkpoint is truncated, incomplete, misshapen, not finite, or of an unknown kind."""


class TokenizerError(InputError):
    """A tokenizer cannot be read, or does not belong to the checkpoint."""


class TextError(InputError):
    """A calibration or evaluation text is missing, empty, too short or not UTF-8."""


class SchemeError(LlmqError):
    """A scheme cannot be applied to this model."""

    exit_code = 4


class ShapeError(SchemeError):
    """A layer's shape does not fit the grid."""


class KernelError(LlmqError):
    """A kernel that was asked for cannot run on this machine or for this weight."""

    exit_code = 5


class OutputError(LlmqError):
    """The output exists already, or cannot be written."""

    exit_code = 6


class PeerError(LlmqError):
    """Another process of several has ended, and this one cannot go on alone."""

    exit_code = 7


class GateError(LlmqError):
    """A gate could not run. Its exit code is that of any reason, because its 1 and 2 are verdicts."""

    exit_code = 3


class Interrupted(LlmqError):  # noqa: N818 - what happened, and no fault
    """The user stopped a long job; what was finished is kept."""

    exit_code = 130


def suggest(name: str, known: list[str]) -> str:
    """Return ' Did you mean …? Available: …' for an unknown `name`; starts with a space, ends with a full stop."""
    import difflib

    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"{hint} Available: {', '.join(sorted(known))}."
