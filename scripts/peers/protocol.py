"""The conversation between bench_peers.py and a worker: one JSON object a line, on stdin and stdout.

A worker is one process that holds one engine with one set of weights. It says `{"ready": true, "info": {…}}` when it is loaded,
then answers each request, and blocks on stdin in between, so that it takes no time from the others. Requests:

    {"op": "prefill", "tokens": […]}                           -> {"seconds": s}
    {"op": "decode", "tokens": […], "new_tokens": n}           -> {"seconds": [s, …], "tokens": […]}  one a new token
    {"op": "batch", "tokens": […], "new_tokens": n, "rows": b} -> {"seconds": [s, …]}                 one a step of b tokens
    {"op": "score", "tokens": […]}                             -> {"seconds": s, "loss": nats per token}
    {"op": "logits", "tokens": […]}                            -> {"logits": […]}                     after the last token
    {"op": "quit"}

A prompt is read into an empty cache each time. Decoding is greedy; a step's time is that of choosing a token and of appending
it. What an engine cannot do is answered `{"unsupported": reason}`, and what failed `{"error": message}`. Standard library and
numpy alone: this file runs in every engine's own environment.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np


class Unsupported(Exception):  # noqa: N818 - not an error: an answer
    """The engine has no way to do this."""


@dataclass(frozen=True, slots=True)
class Order:
    """What a worker is started with."""

    weights: Path
    threads: int
    context: int
    """Tokens of a sequence at most, prompt and new ones together."""
    options: dict[str, Any]
    """The variant's own, from the catalogue."""

    @classmethod
    def parse(cls) -> Order:
        """Read the command line."""
        parser = argparse.ArgumentParser(description="A worker of bench_peers.py.")
        parser.add_argument("--weights", type=Path, required=True)
        parser.add_argument("--threads", type=int, required=True)
        parser.add_argument("--context", type=int, required=True)
        parser.add_argument("--options", type=json.loads, default={})
        return cls(**vars(parser.parse_args()))


class Engine(ABC):
    """What a worker does with its model."""

    @abstractmethod
    def info(self) -> dict[str, Any]:
        """Return what records say: version, settings, head, bytes (all weights), step_bytes (what one decode step reads)."""

    @abstractmethod
    def prefill(self, tokens: list[int]) -> float:
        """Return the seconds that reading the prompt takes, up to the last token's logits."""

    @abstractmethod
    def decode(self, tokens: list[int], new_tokens: int) -> tuple[list[float], list[int]]:
        """Return the seconds of each new token after the prompt, and the tokens."""

    @abstractmethod
    def logits(self, tokens: list[int]) -> np.ndarray:
        """Return the logits [vocab] after the prompt."""

    def batch(self, tokens: list[int], new_tokens: int, rows: int) -> list[float]:
        """Return the seconds of each step of `rows` sequences, all of which begin with the prompt."""
        del tokens, new_tokens, rows
        raise Unsupported(f"{type(self).__name__} is measured with one sequence only")

    def score(self, tokens: list[int]) -> float:
        """Return the mean loss of all tokens but the first, in nats, as a perplexity evaluation takes it."""
        del tokens
        raise Unsupported(f"{type(self).__name__} gives the last token's logits only")


class StepEngine(Engine):
    """An engine that is driven one step at a time; prompts and steps return logits that may be overwritten by the next."""

    @abstractmethod
    def start(self, tokens: list[int], room: int) -> np.ndarray:
        """Empty the cache, read a prompt, leave room for `room` more tokens; returns the last logits [vocab]."""

    @abstractmethod
    def step(self, token: int) -> np.ndarray:
        """Append one token; returns its logits [vocab]."""

    def prefill(self, tokens: list[int]) -> float:
        """See `Engine.prefill`."""
        begin = time.perf_counter()
        self.start(tokens, 1)
        return time.perf_counter() - begin

    def logits(self, tokens: list[int]) -> np.ndarray:
        """See `Engine.logits`."""
        return np.array(self.start(tokens, 1), dtype=np.float32)

    def decode(self, tokens: list[int], new_tokens: int) -> tuple[list[float], list[int]]:
        """See `Engine.decode`."""
        logits = self.start(tokens, new_tokens)
        seconds, chosen = [], []
        for _ in range(new_tokens):
            begin = time.perf_counter()
            chosen.append(int(logits.argmax()))
            logits = self.step(chosen[-1])
            seconds.append(time.perf_counter() - begin)
        return seconds, chosen


def mean_loss(logits: np.ndarray, tokens: list[int], threads: int) -> float:
    """Return the mean loss of `tokens[1:]` under `logits` [T, vocab], computed in fp32 by `threads` threads."""
    following = np.array(tokens[1:])

    def part(rows: np.ndarray) -> float:
        values = logits[rows]
        top = values.max(-1, keepdims=True)
        sums = np.exp(values - top).sum(-1)
        return float((np.log(sums) + top[:, 0] - values[np.arange(len(rows)), following[rows]]).sum(dtype=np.float64))

    pieces = [piece for piece in np.array_split(np.arange(len(following)), 8 * threads) if len(piece)]
    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(part, pieces)) / len(following)


def answer(engine: Engine, request: dict[str, Any]) -> dict[str, Any]:
    """Do what one request asks."""
    op, tokens = request["op"], request["tokens"]
    if op == "prefill":
        return {"seconds": engine.prefill(tokens)}
    if op == "decode":
        seconds, chosen = engine.decode(tokens, request["new_tokens"])
        return {"seconds": seconds, "tokens": chosen}
    if op == "batch":
        return {"seconds": engine.batch(tokens, request["new_tokens"], request["rows"])}
    if op == "score":
        begin = time.perf_counter()
        loss = engine.score(tokens)
        return {"seconds": time.perf_counter() - begin, "loss": loss}
    if op == "logits":
        return {"logits": [float(value) for value in engine.logits(tokens)]}
    raise ValueError(f"unknown op {op!r}.")


def take_stdout() -> TextIO:
    """Return the real stdout, and send everything that libraries print to stderr instead."""
    channel = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)
    return channel


def serve(load: Callable[[Order], Engine]) -> None:
    """Load the engine and answer until stdin ends or asks to quit."""
    order = Order.parse()
    channel = take_stdout()

    def say(make: Callable[[], dict[str, Any]]) -> bool:
        try:
            message = make()
        except Unsupported as reason:
            message = {"unsupported": str(reason)}
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the engine's, and its reason travels to the table
            traceback.print_exc()
            message = {"error": f"{type(error).__name__}: {error}"}
        channel.write(json.dumps(message) + "\n")
        return "error" not in message

    engines: list[Engine] = []

    def begin() -> dict[str, Any]:
        engines.append(load(order))
        return {"ready": True, "info": engines[0].info()}

    if not say(begin):
        return
    for line in sys.stdin:
        request = json.loads(line)
        if request["op"] == "quit":
            return
        say(lambda request=request: answer(engines[0], request))  # type: ignore[misc]
