"""Several processes: what they write, what they say, and how they end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cli_runs import run_llmq
from jobs import GPTQ, PARTS, SAMPLE, content, environment, finished_parts
from safetensors.torch import load_file
from torch import Tensor

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def _start(
    *arguments: object, launch: tuple[object, ...] = ("--standalone", "--nproc-per-node", 2), **named: object
) -> subprocess.Popen[str]:
    command = [*TORCHRUN, *map(str, launch), "-m", "llmq", *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(  # type: ignore[call-overload, no-any-return]
        command, env=environment(), text=True, stdout=pipe, stderr=pipe, process_group=0, **named
    )


def _start_without_torchrun(
    *arguments: object, each: tuple[tuple[object, ...], ...] = ((), ()), **named: object
) -> list[subprocess.Popen[str]]:
    """Start a process for each of `each`, its own arguments last, told what torchrun tells; one less has torch to load."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipe = subprocess.PIPE
    running = []
    for rank, own in enumerate(each):
        told = {"RANK": rank, "WORLD_SIZE": len(each), "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": len(each), "MASTER_PORT": port}
        command = [sys.executable, "-m", "llmq", *map(str, (*arguments, *own))]
        told_in_words = {name: str(value) for name, value in told.items()}
        running.append(
            subprocess.Popen(  # type: ignore[call-overload]
                command,
                env=environment(MASTER_ADDR="127.0.0.1", **told_in_words),
                text=True,
                stdout=pipe,
                stderr=pipe,
                process_group=0,
                **named,
            )
        )
    return running


def _end(process: subprocess.Popen[str], seconds: float = 300) -> tuple[int, str, list[str]]:
    """Wait, and end the whole group where it hangs; returns the exit code, stdout, and the lines of llmq's own on stderr."""
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        if process.poll() is None:
            for pid in (process.pid, *_children(process.pid)):  # torchrun's processes are in groups of their own
                os.kill(pid, signal.SIGKILL)
            process.communicate()
    own = err.split("Traceback (most recent call last)")[0].splitlines()  # the rest is torchrun's account of a failure
    return process.returncode, out, [line for line in own if line.strip() and not line.startswith(("W", "E", "["))]


def _end_all(running: list[subprocess.Popen[str]], seconds: float = 300) -> list[tuple[int, str, list[str]]]:
    """`_end` of each; none is left where one hangs."""
    try:
        return [_end(process, seconds) for process in running]
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
                process.communicate()


def _children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _codes(folder: Path) -> dict[str, Tensor]:
    tensors = load_file(folder / "model.safetensors")
    found = {name: tensor for name, tensor in tensors.items() if name.endswith(".qdata")}
    return {name: torch.cat([tensor & 15, tensor >> 4], 1) for name, tensor in found.items()}


@pytest.fixture(scope="module")
def alone(short_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of one process."""
    out = tmp_path_factory.mktemp("alone") / "out"
    run_llmq("quantize", short_model, *GPTQ, "-o", out)
    return out


@pytest.fixture(scope="module")
def shared(short_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, list[str]]:
    """The result of two processes, and what they said."""
    out = tmp_path_factory.mktemp("shared") / "out"
    code, said, told = _end(_start("quantize", short_model, *GPTQ, "-o", out))
    assert code == 0, told
    return out, said, told


@pytest.mark.slow
def test_two_processes_write_what_one_writes_within_the_tolerance(
    short_model: Path, alone: Path, shared: tuple[Path, str, list[str]]
) -> None:
    one, two = _codes(alone), _codes(shared[0])
    assert one.keys() == two.keys()
    differ = {name: (one[name] != two[name]).double().mean().item() for name in one}
    # the sums of the first block differ in the order of their terms alone: only codes at a tie may change
    assert max(share for name, share in differ.items() if ".layers.0." in name) < 1e-3, differ
    assert sum(differ.values()) / len(differ) < 0.15, differ  # later blocks see what such changes make of their inputs
    layers = [json.loads((folder / "llmq.json").read_text())["layers"] for folder in (alone, shared[0])]
    for mine, theirs in zip(*layers, strict=True):
        assert mine["fqn"] == theirs["fqn"]
        assert theirs["loss"] == pytest.approx(mine["loss"], rel=0.05)
    common = ("--text", SAMPLE / "evaluation.txt", "--limit", 16, "--window", 64, "--reference", short_model, "--threads", 1)
    kl = []
    for folder in (alone, shared[0]):
        found = json.loads(run_llmq("eval", "perplexity", folder, *common, "--json").stdout)["records"]
        kl.append(found[1]["metrics"]["kl_mean"]["value"])
    assert kl[0] > 1e-4
    assert kl[1] == pytest.approx(kl[0], rel=0.1)


@pytest.mark.slow
def test_only_the_first_process_prints(shared: tuple[Path, str, list[str]]) -> None:
    _, said, told = shared
    assert said.count("written: int4-gptq") == 1
    assert sum("2 processes, 1 threads each" in line for line in told) == 1
    assert sum("overlap with the evaluation text" in line for line in told) == 1


@pytest.mark.slow
def test_the_same_processes_write_the_same_bytes_also_after_a_kill(
    short_model: Path, shared: tuple[Path, str, list[str]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = _start("quantize", short_model, *GPTQ, "-o", out)
    while finished_parts(out) < 3 and process.poll() is None:
        time.sleep(0.01)
    for worker in _workers(out):  # torchrun among them: nothing of the run is left
        os.kill(worker, signal.SIGKILL)
    process.communicate()
    assert _workers(out) == []
    assert finished_parts(out) >= 3
    assert not out.exists()
    refused = run_llmq("quantize", short_model, *GPTQ, "-o", out, code=2)
    assert "processes was 2, is 1" in refused.output
    code, _, told = _end(_start("quantize", short_model, *GPTQ, "-o", out))
    assert code == 0, told
    assert any(f"of {PARTS} parts" in line for line in told)
    assert content(out) == content(shared[0])


def _workers(out: Path) -> list[int]:
    """Processes whose command line names this output."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if str(out) in (folder / "cmdline").read_text().split("\0"):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


@pytest.mark.slow
def test_the_death_of_one_process_ends_all(short_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = _start("quantize", short_model, *GPTQ, "-o", out)
    while finished_parts(out) < 2 and process.poll() is None:
        time.sleep(0.01)
    second = [pid for pid in _workers(out) if b"\0RANK=1\0" in b"\0" + Path(f"/proc/{pid}/environ").read_bytes()]
    assert len(second) == 1
    os.kill(second[0], signal.SIGKILL)
    code, _, told = _end(process)
    assert code == 1
    assert not any("Traceback" in line for line in told)
    assert _workers(out) == []
    assert finished_parts(out) >= 2
    assert not out.exists()


@pytest.mark.slow
@pytest.mark.parametrize("case", ["unknown option", "output exists", "disk too small", "too few windows"])
def test_an_error_is_told_once_and_ends_all(short_model: Path, tmp_path: Path, case: str) -> None:
    out = tmp_path / "out"
    more: tuple[object, ...] = ()
    named: dict[str, object] = {}
    expected = ""
    if case == "unknown option":
        more, expected = ("-S", "groupsize=64"), "groupsize"
    elif case == "output exists":
        out.mkdir()
        expected = "exists already"
    elif case == "too few windows":
        more, expected = ("--calibration-windows", 1), "1 calibration windows cannot be shared by 2 processes"
    else:
        import resource

        named["preexec_fn"] = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
        expected = "File too large"
    ends = _end_all(_start_without_torchrun("quantize", short_model, *GPTQ, *more, "-o", out, **named))
    errors = [line for _, _, told in ends for line in told if line.startswith("error:")]
    assert all(code > 0 for code, _, _ in ends)
    assert len(errors) == 1, ends
    assert expected in errors[0]
    assert not any("written" in said for _, said, _ in ends)


@pytest.mark.slow
def test_perplexity_of_two_processes_has_the_bits_of_one(alone: Path, short_model: Path, tmp_path: Path) -> None:
    common = ("--text", SAMPLE / "evaluation.txt", "--window", 128, "--limit", 33, "--threads", 1, "--reference", short_model)
    own = ("--losses", tmp_path / "one", "--record", tmp_path / "one.jsonl")
    expected = run_llmq("eval", "perplexity", alone, *common, *own).stdout
    shared = ("eval", "perplexity", alone, *common, "--losses", tmp_path / "two", "--record", tmp_path / "two.jsonl")
    (code, said, told), (code_of_other, said_of_other, _) = _end_all(_start_without_torchrun(*shared))
    assert (code, code_of_other, said_of_other) == (0, 0, ""), told
    assert said.count("perplexity") == expected.count("perplexity")
    one, two = ([json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()] for name in ("one", "two"))
    assert [record["kind"] for record in two] == ["perplexity", "divergence"]
    for mine, theirs in zip(one, two, strict=True):
        assert mine["metrics"] == theirs["metrics"]  # every figure and its standard error, to the last bit
        assert mine["protocol"] == theirs["protocol"]
        assert mine["kernels"] == theirs["kernels"]
        assert theirs["notes"][-1] == "the windows were shared by 2 processes, which changes no figure"
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.slow
def test_more_processes_than_batches_still_give_the_figures_of_one(alone: Path, tmp_path: Path) -> None:
    common = ("--text", SAMPLE / "evaluation.txt", "--window", 64, "--limit", 2, "--threads", 1)
    run_llmq("eval", "perplexity", alone, *common, "--losses", tmp_path / "one")
    arguments = ("eval", "perplexity", alone, *common, "--losses", tmp_path / "two", "--json")
    (code, said, told), (code_of_other, said_of_other, _) = _end_all(_start_without_torchrun(*arguments))
    assert (code, code_of_other, said_of_other) == (0, 0, ""), told
    assert json.loads(said)["records"][0]["kernels"]
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.slow
def test_other_commands_refuse_several_processes(short_model: Path) -> None:
    code, said, told = _end(_start("generate", short_model, "The", "-n", 2))
    assert code == 1
    assert not said
    assert [line for line in told if line.startswith("error:")] == [
        "error: only `llmq quantize` and `llmq eval perplexity` share their work between processes, and 2 were started; run this "
        "one without torchrun."
    ]


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def two_hosts() -> Iterator[tuple[str, str]]:
    """Two network namespaces, joined by a cable: as far as the processes can tell, two machines."""
    if shutil.which("ip") is None:
        pytest.skip("there is no `ip` here to make network namespaces with")
    names = tuple(f"llmq-{os.getpid()}-{side}" for side in "ab")
    try:
        for name in names:
            _ip("netns", "add", name)
        _ip("link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0", "netns", names[1])
        for number, name in enumerate(names, 1):
            _ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
            _ip("-n", name, "link", "set", "lo", "up")
    except subprocess.CalledProcessError as error:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
        pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
    yield names[0], names[1]
    for name in names:
        _ip("netns", "del", name)


@pytest.mark.slow
def test_two_hosts_write_what_two_processes_write(
    short_model: Path, shared: tuple[Path, str, list[str]], two_hosts: tuple[str, str], tmp_path: Path
) -> None:
    running = []
    for number, host in enumerate(two_hosts):
        launch = (
            "--nnodes",
            2,
            "--node-rank",
            number,
            "--nproc-per-node",
            1,
            "--master-addr",
            "10.77.0.1",
            "--master-port",
            29511,
        )
        folder = tmp_path / f"host{number}"  # nothing is shared but the network
        shutil.copytree(short_model, folder / "wt2-short")
        command = ["ip", "netns", "exec", host, *TORCHRUN, *map(str, launch), "-m", "llmq", "quantize"]
        command += [str(folder / "wt2-short"), *map(str, GPTQ), "-o", str(folder / "out")]
        pipe = subprocess.PIPE
        alone = environment(GLOO_SOCKET_IFNAME="eth0")
        running.append(subprocess.Popen(command, env=alone, text=True, stdout=pipe, stderr=pipe, process_group=0))
    ends = _end_all(running)
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert "written: int4-gptq" in ends[0][1]
    assert not ends[1][1]
    assert content(tmp_path / "host0" / "out") == content(shared[0])
    assert {path.name for path in (tmp_path / "host1").iterdir()} == {"wt2-short"}


@pytest.mark.slow
def test_processes_with_different_models_are_refused(wt2_8m: Path, short_model: Path, tmp_path: Path) -> None:
    each = tuple((model, "-o", tmp_path / f"out{number}") for number, model in enumerate((wt2_8m, short_model)))
    ends = _end_all(_start_without_torchrun("quantize", *GPTQ, each=each))
    assert [code for code, _, _ in ends] == [2, 2]
    errors = [line for _, _, told in ends for line in told if line.startswith("error:")]
    assert len(errors) == 1
    assert "process 1 of 2 differs: model is" in errors[0]
