"""Calibration data on the command line: mixtures, chats with a template, recorded sets, and overlap with what is evaluated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cli_runs import run_llmq

from llmq.files import sha256_file

SMALL = ("--calibration-windows", 5, "--calibration-length", 32)
QUICK = ("-s", "int4-gptq", "-S", "sweeps=0", "--skip", "model.layers.[1-7].*")


@pytest.fixture
def chats(calibration_text: Path, tmp_path: Path) -> Path:
    lines = [line.strip() for line in calibration_text.read_text().splitlines() if len(line) > 200]
    path = tmp_path / "chats.jsonl"
    pairs = zip(lines[::2], lines[1::2], strict=False)
    messages = ([{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in pairs)
    path.write_text("\n".join(json.dumps({"messages": each}) for each in messages))
    return path


@pytest.fixture
def template(tmp_path: Path) -> Path:
    path = tmp_path / "template.jinja"
    path.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}")
    return path


def calibration_of(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "llmq.json").read_text())["calibration"]
    return found


def test_calibrate_records_a_mixture_with_chats(
    wt2_8m: Path, calibration_text: Path, chats: Path, template: Path, tmp_path: Path
) -> None:
    sources = ("--calibration", f"{calibration_text}=0.6", "--calibration", f"{chats}=0.4")
    refused = run_llmq("calibrate", wt2_8m, *sources, *SMALL, "-o", tmp_path / "set", code=3)
    assert "--chat-template FILE" in refused.output
    arguments = ("calibrate", wt2_8m, *sources, "--chat-template", template, *SMALL)
    shown = run_llmq(*arguments, "-o", tmp_path / "set").output
    assert "3/5 calibration.txt + 2/5 chats.jsonl" in shown
    run_llmq(*arguments, "-o", tmp_path / "again")
    assert (tmp_path / "set").read_bytes() == (tmp_path / "again").read_bytes()
    alone = ("--calibration", tmp_path / "set")
    with_other = run_llmq("calibrate", wt2_8m, *alone, "--calibration", chats, "-o", tmp_path / "x", code=2)
    assert "recorded calibration set; name it alone" in with_other.output
    other_size = run_llmq("calibrate", wt2_8m, *alone, *SMALL[:1], 7, "-o", tmp_path / "x", code=2)
    assert "has windows 5" in other_size.output
    two_kinds = run_llmq("calibrate", wt2_8m, *sources, "--text", chats, "-o", tmp_path / "x", code=2)
    assert "--calibration and --text" in two_kinds.output
    assert "weight above 0" in run_llmq("calibrate", wt2_8m, "--calibration", "x=0", "-o", tmp_path / "x", code=2).output
    assert "does not exist" in run_llmq("calibrate", wt2_8m, "--calibration", "nowhere", "-o", tmp_path / "x", code=3).output
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_quantize_with_a_mixture_records_every_part(
    wt2_8m: Path, calibration_text: Path, evaluation_text: Path, chats: Path, template: Path, tmp_path: Path
) -> None:
    sources = ("--calibration", f"{calibration_text}=3", "--calibration", f"{chats}=2", "--chat-template", template)
    quantize = ("quantize", wt2_8m, *QUICK, "--eval-text", evaluation_text)
    run_llmq(*quantize, *sources, *SMALL, "-o", tmp_path / "mixed")
    run_llmq("calibrate", wt2_8m, *sources, *SMALL, "-o", tmp_path / "set")
    run_llmq(*quantize, "--calibration", tmp_path / "set", "-o", tmp_path / "recorded")
    found = calibration_of(tmp_path / "mixed")
    assert found == calibration_of(tmp_path / "recorded")  # the set remembers everything
    assert [(part["name"], part["weight"], part["windows"]) for part in found["parts"]] == [
        ("calibration.txt", 3.0, 3),
        ("chats.jsonl", 2.0, 2),
    ]
    assert [part["sha256"] for part in found["parts"]] == [sha256_file(calibration_text), sha256_file(chats)]
    assert found["parts"][1]["template_sha256"] == sha256_file(template)
    assert (found["overlap"]["text"], found["overlap"]["n_words"]) == ("evaluation.txt", 13)
    assert found["overlap"]["share"] < 0.01
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("mixed", "recorded")]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_calibrating_on_the_evaluation_text_is_warned_of(wt2_8m: Path, evaluation_text: Path, tmp_path: Path) -> None:
    quantize = ("quantize", wt2_8m, *QUICK, "--eval-text", evaluation_text)
    warned = run_llmq(*quantize, "--calibration", evaluation_text, *SMALL[:1], 20, *SMALL[2:], "-o", tmp_path / "out")
    assert "calibrate on another text" in " ".join(warned.output.split())
    found = calibration_of(tmp_path / "out")["overlap"]
    assert found["shared"] / found["total"] == found["share"] > 0.01
    assert len(found["examples"][0].split()) == 13
