"""bench_peers.py: the real script on the bundled model, with llmq and with engines that the tests write."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

from llmq.results.record import ResultRecord
from llmq.results.store import read_records

SCRIPTS = Path(__file__).parent.parent.parent / "scripts"
SHORT = ["--prompt-lengths", "8,16", "--context", "8", "--new-tokens", "3", "--rounds", "2", "--threads", "1"]
FAKE = '''
import sys, time
import numpy as np
from peers.protocol import Order, StepEngine, serve

def broken(order):
    raise RuntimeError("no such processor")

if Order.parse().options["kind"] == "breaks at once":
    serve(broken)
    sys.exit()
from peers.llmq_engine import Llmq  # takes long to load

class Fake(Llmq):
    """llmq itself, five times as slow to step, and for the rest what the test asks for."""

    def __init__(self, order):
        print("a library that prints on stdout")
        super().__init__(order)
        self.kind = order.options["kind"]

    def start(self, tokens, room):
        if self.kind == "dies" and len(tokens) == 8:  # the check of the logits takes 16
            print("Segmentation fault (told by the test)", file=sys.stderr, flush=True)
            import os
            os._exit(11)
        logits = super().start(tokens, room)
        return np.random.default_rng(0).permutation(logits) if self.kind == "another model" else logits

    def step(self, token):
        time.sleep(0.05)
        return super().step(token)

    batch = StepEngine.batch
    score = StepEngine.score

if __name__ == "__main__":
    serve(Fake)
'''


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    """The script as a module; only its own folder makes it one."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import bench_peers

    return bench_peers


@pytest.fixture
def fake(script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A function that adds an engine of a kind to the catalogue, in an environment that is ready."""
    from peers import catalogue, environments

    pins = tmp_path / "pins"
    pins.mkdir()
    monkeypatch.setattr(environments, "REQUIREMENTS", pins)
    worker = tmp_path / "fake.py"
    worker.write_text(FAKE)

    def add(name: str, kind: str, *, ready: bool = True) -> None:
        (pins / f"{name}.txt").write_text("# nothing\n")
        place = tmp_path / "envs" / name / "bin"
        place.mkdir(parents=True)
        # not a link: a virtual environment's interpreter finds its packages by where it is called from
        (place / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        (place / "python").chmod(0o755)
        if ready:
            (place.parent / environments.STAMP).write_text(hashlib.sha256(b"# nothing\n").hexdigest())
        options = {"scheme": "int4", "set": {"group_size": 128}, "kind": kind}
        variant = catalogue.Variant(name, name, str(worker), 4, options=options, head="int4", about=f"made by a test: {kind}")
        monkeypatch.setitem(catalogue.VARIANTS, name, variant)

    return add


@pytest.fixture
def run(script, short_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A function that runs the script and returns (exit code, what it printed, records)."""
    import typer

    # measured in tests/benchmark/test_machine.py, and twice a run
    monkeypatch.setattr(script, "measure_bandwidth", lambda *, threads: SimpleNamespace(best_gbps=20.0))
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # of the workers: on a busy machine spinning threads wait for each other
    application = typer.Typer()
    application.command()(script.main)
    records = tmp_path / "records.jsonl"

    def call(engines: str, *more: str) -> tuple[int, str, list[ResultRecord]]:
        arguments = ["--model", short_model, "--env-dir", tmp_path / "envs", "--engines", engines, "--output", records]
        done = CliRunner().invoke(application, [*map(str, arguments), *SHORT, *more])
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        return done.exit_code, done.output, read_records(records) if records.exists() else []

    return call


@pytest.mark.slow
def test_llmq_alone(run) -> None:
    code, output, records = run("llmq-int4,llmq-int8-weight-only")
    assert code == 0, output
    assert [(record.subject.scheme, record.protocol.params["task"]) for record in records] == [
        (scheme, task)
        for scheme in ("llmq-int8-weight-only", "llmq-int4")
        for task in ("prefill-8", "prefill-16", "decode", "batch-8", "score-16")
    ]
    for record in records:
        assert record.subject.model == "wt2-short"
        assert record.environment.threads == 1
        assert len(record.metrics["seconds"].samples) == 2
        tokens = {"prefill-8": 8, "prefill-16": 16, "decode": 1, "batch-8": 8, "score-16": 15}[record.protocol.params["task"]]
        assert record.metrics["tokens_per_s"].value == pytest.approx(tokens / record.metrics["seconds"].value)
        assert record.metrics["check_correlation"].value > 0.9
        assert not any(name.startswith("speedup") for name in record.metrics)
    decode = next(record for record in records if record.protocol.params["task"] == "decode")
    share = decode.metrics["floor_s"].value / decode.metrics["seconds"].value
    assert decode.metrics["bandwidth_share"].value == pytest.approx(share)
    assert decode.metrics["floor_s"].value == pytest.approx(decode.metrics["bytes_per_step"].value / 20e9)
    assert decode.metrics["bytes_per_step"].value == pytest.approx(3.41e6, rel=0.03)  # 3.41 M weights in bytes, and their scales
    assert decode.subject.options["head"] == "int8-weight-only"
    assert "| llmq-int4" in output


@pytest.mark.slow
def test_a_peer_is_compared_and_failures_are_listed(run, fake) -> None:
    for name, kind in (("slow", "slow"), ("wrong", "another model"), ("broken", "breaks at once"), ("mortal", "dies")):
        fake(name, kind)
    fake("absent", "not set up", ready=False)
    code, output, records = run("llmq-int4,slow,wrong,broken,mortal,absent")
    assert code == 0, output
    by_name = {
        name: [record for record in records if record.subject.scheme == name]
        for name in ("slow", "wrong", "broken", "mortal", "absent")
    }
    decode = next(record for record in by_name["slow"] if record.protocol.params["task"] == "decode")
    assert decode.metrics["seconds"].value >= 0.05
    assert len(decode.metrics["speedup_of_llmq-int4"].samples) == 2
    assert decode.metrics["speedup_of_llmq-int4"].value > 1.2
    assert decode.metrics["check_max_difference"].value > 0  # int4 beside bf16
    assert {record.protocol.params["task"] for record in by_name["slow"]} == {"prefill-8", "prefill-16", "decode"}
    assert "score-16: Fake gives the last token's logits only" in decode.notes
    reasons = {name: found[-1].notes[-1] for name, found in by_name.items() if name != "slow"}
    assert "its logits are not this model's: correlation" in reasons["wrong"]
    assert "RuntimeError: no such processor" in reasons["broken"]
    assert "prefill-8: the worker has ended: Segmentation fault (told by the test) (exit code 11)" in reasons["mortal"]
    assert "run again with --setup" in reasons["absent"]
    for name, reason in reasons.items():
        assert f"| {name} " in output
        assert reason.removeprefix("not measured: ") in output


def test_engines_that_are_unknown_or_alone(run) -> None:
    code, output, records = run("llmq-int4,lama.cpp-q4_0")
    assert code == 2
    assert "unknown engine 'lama.cpp-q4_0'" in output
    assert "llama.cpp-q4_0" in output.replace("'lama.cpp-q4_0'", "")
    assert run("llama.cpp-q4_0")[0] == 2
    assert "add one of llmq-bf16" in run("llama.cpp-q4_0")[1]
    assert records == []


def test_lengths_beyond_the_context(run) -> None:
    code, output, _ = run("llmq-int4", "--prompt-lengths", "300")
    assert code == 2
    assert "beyond the model's context of 256" in " ".join(output.split())
    assert run("llmq-int4", "--ops", "decode,swim")[0] == 2


@pytest.mark.slow
def test_an_environment_that_cannot_be_made(script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peers import environments

    from llmq.errors import InputError

    monkeypatch.setattr(environments, "REQUIREMENTS", tmp_path)
    (tmp_path / "ghost.txt").write_text("#env PIP_NO_INDEX=1\n#env PIP_DISABLE_PIP_VERSION_CHECK=1\nno-such-package-of-llmq==1\n")
    said: list[str] = []
    with pytest.raises(InputError, match=r"the environment ghost cannot be set up: ERROR: .*no-such-package-of-llmq==1; mend"):
        environments.Environments(tmp_path / "envs").set_up("ghost", said.append)
    assert said == ["setting up ghost from ghost.txt"]
    assert environments.Environments(tmp_path / "envs").obstacle("ghost") is not None


def test_requirements_are_pinned_and_read_in_steps(script) -> None:
    from peers.environments import REQUIREMENTS, read_steps

    names = {path.stem for path in REQUIREMENTS.glob("*.txt")}
    assert {"llama_cpp", "openvino", "onnx", "transformers"} <= names
    for name in names:
        _, steps = read_steps(REQUIREMENTS / f"{name}.txt")
        words = [word for step in steps for line in step for word in line.split() if not word.startswith("--")]
        assert all("==" in word for word in words), words
    assert read_steps(REQUIREMENTS / "openvino.txt")[1][0] == ["torch==2.13.0"]


def test_weights_in_bf16_round_to_even(script) -> None:
    import torch
    from peers.checkpoint_files import to_bf16, to_float32

    numbers = torch.cat([torch.randn(1000) * 3, torch.tensor([1.00390625, 1.01171875, -1.00390625, 0.0, -0.0])])
    expected = numbers.to(torch.bfloat16)
    found = to_bf16("F32", numbers.numpy())
    assert np.array_equal(found, expected.view(torch.uint16).numpy())
    assert np.array_equal(to_float32("BF16", found), expected.float().numpy())


@pytest.mark.slow
def test_llama_cpp_computes_the_same_model(script, run, tmp_path: Path) -> None:
    place = os.environ.get("LLMQ_PEERS_DIR")
    if place is None:
        pytest.skip("no environment of llama.cpp (set LLMQ_PEERS_DIR to a folder that bench_peers.py --setup has filled)")
    code, output, records = run("llmq-bf16,llama.cpp-bf16", "--env-dir", place)
    assert code == 0, output
    found = [record for record in records if record.subject.scheme == "llama.cpp-bf16"]
    assert {record.protocol.params["task"] for record in found} == {"prefill-8", "prefill-16", "decode", "batch-8", "score-16"}
    ours = {record.protocol.params["task"]: record for record in records if record.subject.scheme == "llmq-bf16"}
    assert found[0].metrics["check_correlation"].value > 0.999
    assert found[0].metrics["check_top1_agreement"].value == 1
    theirs = next(record for record in found if record.protocol.params["task"] == "score-16").metrics["loss"].value
    assert theirs == pytest.approx(ours["score-16"].metrics["loss"].value, rel=0.01)
