"""What stands for a CUDA graph where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from llmq.model.cuda_graph import Recording


class Again:
    """Replays by running the recorded call once more into the recorded output; counts recordings and replays."""

    def __init__(self) -> None:
        self.recorded = 0
        self.replayed = 0

    def record(self, step: Callable[[], Tensor]) -> Recording:
        """Run `step` as a warm-up, then keep it."""
        self.recorded += 1
        step()
        output = step()

        def replay() -> None:
            self.replayed += 1
            output.copy_(step())

        return Recording(replay, output)


class Refuses:
    """A device that cannot record."""

    def record(self, step: Callable[[], Tensor]) -> Recording:
        """See `Capture.record`."""
        raise RuntimeError("operation not permitted when stream is capturing\nlong story")
