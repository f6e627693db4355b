"""Processes that work together: who does what, what travels between them, and how a failure of one reaches all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmq.errors import OutputError, UsageError
from llmq.ranks import Ranks, assign, default_threads, join_ranks

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [0, 1, 4, 17])
def test_shares_are_all_things_once_in_order_and_as_equal_as_can_be(size: int, count: int) -> None:
    shares = [Ranks(rank, size).share(count) for rank in range(size)]
    assert [thing for share in shares for thing in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert [Ranks(0, size).share_of(rank, count) for rank in range(size)] == shares


def test_jobs_go_to_who_has_least_to_do() -> None:
    assert assign([1, 1, 1, 1], 2) == [0, 1, 0, 1]
    assert assign([1, 2, 9, 3], 2) == [1, 1, 0, 1]
    assert assign([5, 4, 3, 3, 3], 2) == [0, 1, 1, 0, 1]
    assert assign([7, 1, 2], 1) == [0, 0, 0]
    assert assign([], 4) == []
    costs = [float((7 * i) % 11 + 1) for i in range(40)]
    owners = assign(costs, 3)
    load = [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(3)]
    assert max(load) - min(load) <= max(costs)  # of largest first: never further apart than one job


def test_one_process_needs_nobody() -> None:
    ranks = Ranks()
    tensor = torch.arange(3)
    assert ranks.first
    assert ranks.sum_(tensor) is tensor
    assert ranks.tensor_from(tensor, 0) is tensor
    assert ranks.gather_json({"ä": 1}) == [{"ä": 1}]
    assert ranks.json_from([None], 0) == [None]
    ranks.check_same({"model": "x"})
    ranks.wait()
    with pytest.raises(OutputError, match="full"), ranks.together():
        raise OutputError("the disk is full.")


def test_threads_are_the_cores_shared_by_the_processes_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # which torchrun sets, and which would leave cores idle
    assert default_threads() == 8
    monkeypatch.setenv("WORLD_SIZE", "6")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert default_threads() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert default_threads() == 1


def test_half_of_what_torchrun_says_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert join_ranks().size == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UsageError, match=r"WORLD_SIZE is 2 and MASTER_ADDR, MASTER_PORT not set.*torchrun"):
        join_ranks()


SCRIPT = """
import json, os, sys
import torch
from llmq.errors import LlmqError, OutputError, PeerError, UsageError
from llmq.ranks import Ranks, join_ranks, leave_ranks

ranks = join_ranks()
told = {"size": ranks.size}
torch.manual_seed(ranks.rank)
told["sum"] = ranks.sum_(torch.full((2, 2), float(ranks.rank + 1))).tolist()
told["from"] = ranks.tensor_from(torch.full((3,), ranks.rank, dtype=torch.uint8), 1).tolist()
told["json"] = ranks.gather_json({"rank": ranks.rank, "text": "ä" * (5 * ranks.rank)})
told["one"] = ranks.json_from({"rank": ranks.rank}, 2)

def caught(step):
    try:
        with ranks.together():
            step()
    except LlmqError as error:
        return [type(error).__name__, str(error), error.everywhere]
    return None

def fail_in(rank, kind, message):
    def step():
        if ranks.rank in rank:
            raise kind(message + str(ranks.rank))
    return step

told["nothing"] = caught(lambda: None)
told["in 1"] = caught(fail_in([1], OutputError, "disk of "))
told["in 1 and 2"] = caught(fail_in([1, 2], UsageError, "wrong in "))
try:
    ranks.check_same({"model": "x", "threads": 1 + (ranks.rank == 2)})
except UsageError as error:
    told["differs"] = str(error)
with open(os.path.join(sys.argv[1], str(ranks.rank)), "w") as file:
    json.dump(told, file)
if ranks.rank == 1:
    os._exit(0)  # gone without a word
try:
    ranks.wait()
    raise SystemExit("nobody noticed")
except PeerError as error:
    with open(os.path.join(sys.argv[1], f"lost{ranks.rank}"), "w") as file:
        file.write(str(error))
leave_ranks()
"""


@pytest.mark.slow
def test_three_processes_hear_the_same(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [*LAUNCH, str(tmp_path / "script.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    told = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(3)]
    assert told[0] == told[1] == told[2]
    assert told[0]["size"] == 3
    assert told[0]["sum"] == [[6.0, 6.0], [6.0, 6.0]]
    assert told[0]["from"] == [1, 1, 1]
    assert told[0]["json"] == [{"rank": rank, "text": "ä" * (5 * rank)} for rank in range(3)]
    assert told[0]["one"] == {"rank": 2}
    assert told[0]["nothing"] is None
    assert told[0]["in 1"] == ["OutputError", "disk of 1", True]
    assert told[0]["in 1 and 2"] == ["UsageError", "wrong in 1", True]
    assert told[0]["differs"] == (
        "process 2 of 3 differs: threads is 1 in process 0, 2 there. Give every process the same files, options and versions."
    )
    for rank in (0, 2):
        assert (tmp_path / f"lost{rank}").read_text().startswith("another process of this run ended, or cannot be reached (")
