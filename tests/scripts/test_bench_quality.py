"""bench_quality.py: the real script on the bundled model, with llmq and with a tool that the tests write."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from llmq.errors import InputError, TextError, UsageError
from llmq.results.store import append_records, read_records

REPO = Path(__file__).parent.parent.parent
SCRIPTS = REPO / "scripts"
TOOL = """
from pathlib import Path
import numpy as np
from peers.checkpoint_files import tensors, to_float32
from quality.exchange import Made, Order, group_bits, hand_over, is_handed_over, timed

order = Order.read()
weights = {name: to_float32(kind, array) for name, kind, array in tensors(Path(order.checkpoint)) if is_handed_over(name)}
with timed() as cost:
    if order.settings["kind"] == "coarse":
        weights = {name: value if value.ndim == 1 else np.round(value * 32) / 32 for name, value in weights.items()}
    if order.settings["kind"] == "breaks":
        raise SystemExit("no such processor")
    if order.settings["kind"] == "forgets":
        weights.popitem()
hand_over(Path(order.out), weights, Made(group_bits(4, 128), cost, {"fake": "1"}, notes=["made by a test"]))
"""


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    """The script as a module; only its own folder makes it one."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import bench_quality

    return bench_quality


@pytest.fixture
def run(script, wt2_8m: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A function that runs the script and returns (exit code, what it said, records); tools 'fake *' are in its catalogue."""
    import typer
    from peers import environments
    from quality import catalogue, making

    pins = tmp_path / "pins"
    pins.mkdir()
    monkeypatch.setattr(environments, "REQUIREMENTS", pins)
    (pins / "fake.txt").write_text("# nothing\n")
    place = tmp_path / "envs" / "fake"
    (place / "bin").mkdir(parents=True)
    (place / "bin" / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (place / "bin" / "python").chmod(0o755)
    (place / environments.STAMP).write_text(hashlib.sha256(b"# nothing\n").hexdigest())
    modules = tmp_path / "modules" / "quality"
    modules.mkdir(parents=True)
    for path in (SCRIPTS / "quality").glob("*.py"):
        (modules / path.name).symlink_to(path)
    (modules / "fake_maker.py").write_text(TOOL)
    (modules.parent / "peers").symlink_to(SCRIPTS / "peers")
    monkeypatch.setattr(making, "SCRIPTS", modules.parent)
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    rows = {
        f"fake {kind}": catalogue.Row(f"fake {kind}", catalogue.G128, "fake", "fake_maker", {"kind": kind}, 0, "made by a test")
        for kind in ("same", "coarse", "breaks", "forgets")
    }
    absent = catalogue.Row("absent", catalogue.G128, "absent", "fake_maker", {"kind": "same"}, 0)
    (pins / "absent.txt").write_text("# nothing\n")
    unknown = catalogue.Row("unknown", catalogue.G32, "llmq", "llmq_maker", {"scheme": "int5-magic", "set": {}, "words": []}, 0)
    for name, row in {**rows, "absent": absent, "unknown": unknown}.items():
        monkeypatch.setitem(catalogue.ROWS, name, row)
    application = typer.Typer()
    application.command()(script.main)

    def call(chosen: str, *more: str) -> tuple[int, str, dict[str, object]]:
        arguments = ["--model", str(wt2_8m), "--env-dir", str(tmp_path / "envs"), "--rows", chosen, "--limit", "4"]
        done = CliRunner().invoke(application, [*arguments, "--output", str(tmp_path), *more])
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        path = tmp_path / "wt2-8m.jsonl"
        records = {record.subject.scheme: record for record in read_records(path)} if path.exists() else {}
        return done.exit_code, done.output, records

    return call


@pytest.mark.slow
def test_one_evaluation_for_everybody(run, wt2_8m: Path, tmp_path: Path) -> None:
    code, output, records = run("int4 asym g=128,fake *,absent,unknown")
    assert code == 0, output
    same, coarse, ours = (records[name] for name in ("fake same", "fake coarse", "int4 asym g=128"))
    assert same.metrics["kl_mean"].value == 0
    assert same.metrics["top1_agreement"].value == 1
    assert same.metrics["perplexity"].value == same.metrics["reference_perplexity"].value
    assert coarse.metrics["kl_mean"].value > ours.metrics["kl_mean"].value > 0.001
    assert coarse.protocol == ours.protocol == same.protocol
    assert ours.protocol.params["n_scored_tokens"] == 4 * 255
    assert ours.subject.bits_per_weight == pytest.approx(4.25)
    assert coarse.subject.bits_per_weight == pytest.approx(4.125)
    assert coarse.notes == ["made by a test"]
    assert coarse.subject.options["versions"] == {"fake": "1"}
    assert ours.subject.options["resolved"]["options"]["group_size"] == 128
    reasons = {name: record.notes[-1] for name, record in records.items() if not record.metrics}
    assert reasons["fake breaks"] == "not measured: no such processor"
    assert "are not the model's blocks and norms: model.norm.weight" in reasons["fake forgets"]
    assert "run again with --setup" in reasons["absent"]
    assert "unknown scheme 'int5-magic'" in reasons["unknown"]

    # what llmq's artefact computes is what its handed-over weights compute
    from llmq.api.evaluating import evaluate_perplexity
    from llmq.api.loading import Setup, open_model

    artefact = next((tmp_path / "envs").glob("quality/*/wt2-8m/int4-asym-g-128-*/artefact"))
    loaded = open_model(str(artefact), None, Setup(dtype="fp32", runtime="torch"))
    from quality.evaluation import BosWindows

    from llmq.calibration.corpus import resolve_text

    protocol = BosWindows(length=256, limit=4)
    alone = evaluate_perplexity(loaded.runner, loaded.tokenizer, resolve_text(None, split="test"), protocol)
    assert alone.perplexity.value == pytest.approx(ours.metrics["perplexity"].value, rel=1e-5)

    # nothing is measured twice, unless it is asked for, and what failed is tried again
    assert "0 of 1 rows" in run("int4 asym g=128")[1]
    assert "1 of 1 rows" in run("fake breaks")[1]
    code, output, later = run("fake same", "--again")
    assert "1 of 1 rows" in output
    assert later["fake same"].id != same.id
    assert list(later) == list(records), "the order of the catalogue is kept"


def test_a_run_can_be_stopped(run) -> None:
    code, output, records = run("fake same", "--stop-after", "-1")
    assert code == 3
    assert "run again to go on" in output
    assert records == {}


def test_questions_that_cannot_be_answered(run, script) -> None:
    assert "no row is called 'int4-bets*'" in run("int4-bets*")[1]
    assert run("int4-bets*")[0] == 2
    assert "unknown suite 'wt2-8'" in run("fake same", "--suite", "wt2-8")[1]


def test_windows_begin_with_bos_and_score_every_token(script, wt2_8m: Path) -> None:
    from quality.evaluation import BosWindows

    from llmq.calibration.corpus import TextSource
    from llmq.checkpoint import load_tokenizer_for, open_checkpoint

    tokenizer = load_tokenizer_for(open_checkpoint(str(wt2_8m)))
    text = TextSource("some", "a test", tuple(f" line {number} of the text , " for number in range(40)))
    pieces = BosWindows(length=16).cut(tokenizer, text)
    tokens = tokenizer.encode(text.joined(), bos=False)
    assert len(pieces.windows) == len(tokens) // 15
    assert torch.cat([window.targets for window in pieces.windows]).tolist() == tokens[: len(pieces.windows) * 15]
    for window in pieces.windows:
        assert window.inputs.tolist() == [tokenizer.bos_id, *window.targets.tolist()[:-1]]
    assert len(BosWindows(length=16, limit=2).cut(tokenizer, text).windows) == 2
    with pytest.raises(TextError, match="too few for one window of 4999"):
        BosWindows(length=5000).cut(tokenizer, text)


def test_weights_have_to_be_the_models(script, wt2_8m: Path) -> None:
    from quality.evaluation import put_weights
    from quality.exchange import is_handed_over

    from llmq.checkpoint import load_model, open_checkpoint

    model = load_model(open_checkpoint(str(wt2_8m)), dtype=torch.float32)
    weights = {name: value.detach().clone() for name, value in model.named_parameters() if is_handed_over(name)}
    assert set(dict(model.named_parameters())) - set(weights) == {"model.embed_tokens.weight", "lm_head.weight"}
    name = "model.layers.3.mlp.down_proj.weight"
    put_weights(model, {**weights, name: weights[name] * 2})
    assert torch.equal(dict(model.named_parameters())[name], weights[name] * 2)
    with pytest.raises(InputError, match=r"lm_head\.weight"):
        put_weights(model, {**weights, "lm_head.weight": torch.zeros(1)})
    with pytest.raises(InputError, match=rf"{name} was handed over with shape \(1, 2\)"):
        put_weights(model, {**weights, name: torch.zeros(1, 2)})
    with pytest.raises(InputError, match="not finite"):
        put_weights(model, {**weights, name: weights[name] / 0})


def test_what_is_handed_over_is_read_by_safetensors(script, tmp_path: Path) -> None:
    from quality.exchange import Cost, Made, Order, group_bits, hand_over
    from safetensors.numpy import load_file

    weights = {"b": np.arange(6, dtype=np.float64).reshape(2, 3).T, "a": np.float32([-1.5])}
    made = Made(4.125, Cost(1.5, 2.5), {"tool": "1"}, {"group_size": 128}, ["so"])
    hand_over(tmp_path, weights, made)
    found = load_file(tmp_path / "weights.safetensors")
    assert {name: value.tolist() for name, value in found.items()} == {"b": [[0, 3], [1, 4], [2, 5]], "a": [-1.5]}
    assert found["b"].dtype == np.float32
    assert Made.read(tmp_path) == made
    order = Order("model", None, "out", 2, {"kind": "x"})
    order.write(tmp_path / "order.json")
    assert Order(**json.loads((tmp_path / "order.json").read_text())) == order
    assert group_bits(4, 128) == 4.125
    assert group_bits(4, 32, zero=4) == 4.625


def test_mean_squares_are_those_of_every_linears_inputs(script, wt2_8m: Path) -> None:
    from quality.corpus import mean_squares

    from llmq.checkpoint import load_model, open_checkpoint

    model = load_model(open_checkpoint(str(wt2_8m)), dtype=torch.float32)
    tokens = torch.randint(5, 4000, (9, 7), generator=torch.Generator().manual_seed(0))
    found = mean_squares(model, tokens)
    assert len(found) == 7 * model.config.num_layers
    seen: list[torch.Tensor] = []
    down = dict(model.named_modules())["model.layers.2.mlp.down_proj"]
    with torch.no_grad(), down.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])):
        model.hidden(tokens)
    expected = seen[0].double().square().mean((0, 1))
    assert torch.allclose(found["model.layers.2.mlp.down_proj"].double(), expected, rtol=1e-4)


def test_a_models_own_stories(script, wt2_8m: Path) -> None:
    from quality import corpus

    from llmq.checkpoint import load_model, load_tokenizer_for, open_checkpoint

    checkpoint = open_checkpoint(str(wt2_8m))
    model, tokenizer = load_model(checkpoint, dtype=torch.float32), load_tokenizer_for(checkpoint)
    keep = corpus.STORY_TOKENS, corpus.STORY_BATCH
    corpus.STORY_TOKENS, corpus.STORY_BATCH = 12, 3
    try:
        stories = corpus.write_stories(model, tokenizer, 4, 7)
        assert stories == corpus.write_stories(model, tokenizer, 4, 7)
        assert stories != corpus.write_stories(model, tokenizer, 4, 8)
    finally:
        corpus.STORY_TOKENS, corpus.STORY_BATCH = keep
    assert len(stories) == 4
    assert all(story and "\n" not in story for story in stories)


def test_the_catalogue_is_sound(script) -> None:
    from fnmatch import fnmatchcase

    from quality.catalogue import ROWS, SUITES, choose

    assert len({row.name for row in ROWS.values()}) == len(ROWS) > 40
    for row in ROWS.values():
        assert (SCRIPTS / "quality" / f"{row.maker}.py").is_file()
        assert row.is_llmq or (REPO / "configs" / "peers" / f"{row.environment}.txt").is_file()
        assert "," not in row.name, "rows are separated by commas on the command line"
    for suite in SUITES.values():
        for pattern in suite.rows:
            assert any(fnmatchcase(name, pattern) for name in ROWS), pattern
    with pytest.raises(UsageError, match="no row is called 'nothing'"):
        choose(["nothing"], SUITES["wt2-8m"])


def test_plots_place_points_by_bits_and_kl(script) -> None:
    from quality.plot import HEIGHT, WIDTH, Point, scatter

    points = [Point("a <b>", "llmq", 4.0, 0.01), Point("c", "other", 4.5, 0.1), Point("none", "other", 4.5, 0.0)]
    root = ElementTree.fromstring(scatter(points, "bits", "KL"))
    space = "{http://www.w3.org/2000/svg}"
    circles = root.findall(f"{space}circle")
    squares = [rect for rect in root.findall(f"{space}rect") if rect.find(f"{space}title") is not None]
    assert [circle.find(f"{space}title").text for circle in circles] == ["a <b>: 4.000 bits, KL 0.01000"]
    assert len(squares) == 1
    assert float(circles[0].get("cx")) < float(squares[0].get("x"))
    assert float(circles[0].get("cy")) > float(squares[0].get("y")) > 0
    assert float(circles[0].get("cy")) < HEIGHT
    assert float(squares[0].get("x")) < WIDTH


def test_tables_are_made_of_records_of_one_protocol(script, tmp_path: Path, run) -> None:
    from quality.report import plot_text, section_text

    from llmq.results.environment import capture
    from llmq.results.record import Metric, Protocol, ResultRecord, Subject

    def record(name: str, kl: float | None, length: int = 256, base: str = "") -> ResultRecord:
        options = {
            "section": "int4",
            "tool": "llmq",
            "calibration": None,
            "about": "",
            "base": base,
            "versions": {"llmq": "1"},
            "settings": {},
        }
        params = {"text": "T", "text_sha256": "0" * 64, "length": length, "bos": "b", "n_windows": 2, "n_scored_tokens": 510}
        figures = {"kl_mean": Metric(value=kl, unit="nats/token", stderr=kl / 100)} if kl is not None else {}
        figures |= {"reference_perplexity": Metric(value=59.0, unit="1")} if kl is not None else {}
        return ResultRecord(
            kind="divergence",
            subject=Subject(model="m", checkpoint_sha256="f" * 64, scheme=name, options=options, bits_per_weight=4.25),
            protocol=Protocol(name="bos-windows", version=1, params=params),
            metrics=figures,
            environment=capture(1),
            notes=[] if kl is not None else ["not measured: no such scheme"],
        )

    path = tmp_path / "m.jsonl"
    append_records(path, [record("first", 0.02), record("second", 0.005), record("third", None)])
    text = section_text(path)
    assert "| second (llmq) | " in text
    assert "0.25 |" in text
    assert "- third: not measured: no such scheme." in text
    assert "510 scored tokens" in text
    assert plot_text(path).count("<circle") == 2
    append_records(path, [record("other", 0.01, length=128)])
    with pytest.raises(UsageError, match="'first' and 'other' differ in their protocol"):
        section_text(path)
    assert math.isclose(record("x", 0.1).metrics["kl_mean"].stderr, 0.001)


def test_two_processes_keep_each_others_records(script, tmp_path: Path, run) -> None:
    from types import SimpleNamespace

    from quality.catalogue import ROWS, SUITES
    from quality.records import RecordFile, refused

    from llmq.results.environment import capture

    checkpoint = SimpleNamespace(sha256="0" * 64)
    corpus = SimpleNamespace(name="m", checkpoint=checkpoint, tokenizer=SimpleNamespace(sha256="1" * 64))
    one, other = (RecordFile(tmp_path / "x" / "records.jsonl", SUITES["wt2-8m"]) for _ in range(2))
    one.put(refused(ROWS["fake same"], corpus, "first", capture(1)))
    other.put(refused(ROWS["fake coarse"], corpus, "second", capture(1)))
    one.put(refused(ROWS["fake same"], corpus, "third", capture(1)))
    found = {record.subject.scheme: record.notes for record in read_records(one.path)}
    assert found == {"fake same": ["not measured: third"], "fake coarse": ["not measured: second"]}
    assert not one.has(ROWS["fake same"]), "what was refused is tried again"


def test_the_last_words_of_a_log(script) -> None:
    from quality.making import last_words

    assert last_words("") == "no message"
    assert last_words("one\n\nValueError: two three\n----\n") == "ValueError: two three"
    assert last_words("a\nllmq.errors.UsageError: unknown scheme 'x'.\n") == "unknown scheme 'x'."


@pytest.mark.slow
def test_llama_cpp_hands_over_its_weights(run, wt2_8m: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = os.environ.get("LLMQ_PEERS_DIR")
    if place is None:
        pytest.skip("no environment of llama.cpp (set LLMQ_PEERS_DIR to a folder that bench_peers.py --setup has filled)")
    from peers import environments
    from quality import making

    monkeypatch.setattr(environments, "REQUIREMENTS", REPO / "configs" / "peers")
    monkeypatch.setattr(making, "SCRIPTS", SCRIPTS)
    (tmp_path / "envs" / "llama_cpp").symlink_to(Path(place) / "llama_cpp")
    code, output, records = run("llama.cpp Q4_0,llama.cpp Q4_K_S")
    assert code == 0, output
    plain, mixed = records["llama.cpp Q4_0"], records["llama.cpp Q4_K_S"]
    assert 4.5 <= plain.subject.bits_per_weight < 4.6, "some matrices get Q4_1"
    assert 4.5 < mixed.subject.bits_per_weight < 4.7, "some matrices get Q5_K"
    assert 0.002 < mixed.metrics["kl_mean"].value < plain.metrics["kl_mean"].value < 0.03
