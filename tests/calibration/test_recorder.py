"""InputRecorder: the same windows from every kind of source, packed, hashed and refused where they do not belong."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llmq.calibration.corpus import resolve_text, text_from_string
from llmq.calibration.recorder import CalibrationSet, InputRecorder
from llmq.errors import OutputError, TextError, TokenizerError
from llmq.files import sha256_file
from llmq.model.tokenizer import Tokenizer, load_tokenizer

SENTENCES = [f"the number {index} was found in the north of the town ." for index in range(60)]


@pytest.fixture(scope="module")
def tokenizer(wt2_8m: Path) -> Tokenizer:
    return load_tokenizer(wt2_8m)


@pytest.fixture
def recorder(tokenizer: Tokenizer) -> InputRecorder:
    return InputRecorder(tokenizer, windows=6, length=32, seed=5)


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": text, "id": i}) for i, text in enumerate(SENTENCES)) + "\n\n")
    return path


def check(recorded: CalibrationSet, tokenizer: Tokenizer) -> None:
    assert recorded.tokens.shape == (6, 32)
    assert recorded.tokens.dtype == torch.int32
    assert recorded.info.tokenizer_sha256 == tokenizer.sha256
    assert recorded.info.short_sequences == "packed"
    assert recorded.info.tokens_seen >= 6 * 32
    assert recorded.tokens.min() > 0  # id 0 is the unknown token, which padding would leave behind
    assert int(recorded.tokens.max()) < tokenizer.vocab_size


def test_text(recorder: InputRecorder, tokenizer: Tokenizer) -> None:
    text = resolve_text(Path(__file__).parents[2] / "llmq" / "assets" / "sample" / "calibration.txt", split="train")
    recorded = recorder.record_text(text)
    check(recorded, tokenizer)
    assert (recorded.info.kind, recorded.info.source_sha256) == ("text", text.sha256)
    assert torch.equal(recorded.tokens, recorder.record_text(text.origin).tokens)
    other = InputRecorder(tokenizer, windows=6, length=32, seed=6).record_text(text)
    assert not torch.equal(recorded.tokens, other.tokens)
    words = recorded.text(tokenizer).split("\n")[0].split()
    assert " ".join(words[2:6]) in " ".join(text.raw().split())


def test_every_kind_of_dataset_gives_the_same_windows(
    recorder: InputRecorder, tokenizer: Tokenizer, jsonl: Path, tmp_path: Path
) -> None:
    import datasets

    rows = [{"text": text} for text in SENTENCES]
    dataset = datasets.Dataset.from_list(rows)
    dataset.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": dataset}).save_to_disk(tmp_path / "splits")
    sets = [recorder.record_dataset(source) for source in (rows, dataset, jsonl, tmp_path / "saved", str(tmp_path / "splits"))]
    check(sets[0], tokenizer)
    assert sets[0].info.kind == "dataset"
    assert sets[2].info.source == "rows.jsonl"
    assert sets[0].info.bos
    assert (sets[0].tokens == tokenizer.bos_id).sum() >= 6  # sentences are shorter than windows, and packed
    for other in sets[1:]:
        assert torch.equal(other.tokens, sets[0].tokens)
        assert other.info.source_sha256 == sets[0].info.source_sha256


def test_errors_of_datasets(recorder: InputRecorder, jsonl: Path, tmp_path: Path) -> None:
    with pytest.raises(TextError, match="has no column 'words'; it has id, text"):
        recorder.record_dataset(jsonl, column="words")
    with pytest.raises(TextError, match="holds int, not text"):
        recorder.record_dataset(jsonl, column="id")
    with pytest.raises(TextError, match=r"dataset .*/there cannot be loaded"):
        recorder.record_dataset(tmp_path / "not" / "there")
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n{"text": \n')
    with pytest.raises(TextError, match=r"line 2 of .* is not JSON"):
        recorder.record_dataset(tmp_path / "bad.jsonl")
    (tmp_path / "list.jsonl").write_text("[1]\n")
    with pytest.raises(TextError, match="is not a JSON object"):
        recorder.record_dataset(tmp_path / "list.jsonl")
    with pytest.raises(TextError, match=r"windows of 32, but 6 are asked for"):
        recorder.record_dataset([{"text": "too short"}])


def test_save_and_load(recorder: InputRecorder, tokenizer: Tokenizer, stories260k: Path, tmp_path: Path) -> None:
    recorded = recorder.record_dataset([{"text": text} for text in SENTENCES])
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    recorded.save(first)
    recorded.save(second)
    assert sha256_file(first) == sha256_file(second)
    loaded = CalibrationSet.load(first, tokenizer=tokenizer)
    assert loaded.info == recorded.info
    assert torch.equal(loaded.tokens, recorded.tokens)
    with pytest.raises(OutputError, match="exists already"):
        recorded.save(first)
    recorded.save(first, force=True)
    with pytest.raises(TokenizerError, match="was recorded with another tokenizer"):
        CalibrationSet.load(first, tokenizer=load_tokenizer(stories260k))


def test_files_that_are_no_calibration_set(tokenizer: Tokenizer, tmp_path: Path, wt2_8m: Path) -> None:
    (tmp_path / "text.safetensors").write_text("not safetensors at all")
    for path in (tmp_path / "text.safetensors", wt2_8m / "model.safetensors", tmp_path / "absent.safetensors"):
        with pytest.raises(TextError, match=r"is not a calibration set .*llmq calibrate"):
            CalibrationSet.load(path, tokenizer=tokenizer)


TASKS = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}} The answer is",
        "doc_to_choice": ["yes", "no"],
        "doc_to_target": 0,
    },
    "rolling": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"},
    "generate": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}} Then",
        "doc_to_target": "x",
        "generation_kwargs": {"until": ["."]},
    },
}


@pytest.fixture
def tasks(jsonl: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    metrics = {"choice": "acc", "rolling": "word_perplexity", "generate": "exact_match"}
    for name, body in TASKS.items():
        task = {
            "task": f"llmq_test_{name}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(jsonl)}},
            "test_split": "test",
            "metric_list": [{"metric": metrics[name]}],
            **body,
        }
        (folder / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML
    return folder


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # lm-eval's own
def test_tasks_of_every_kind(tokenizer: Tokenizer, tasks: Path) -> None:
    recorder = InputRecorder(tokenizer, windows=6, length=32)
    recorded = recorder.record_tasks([f"llmq_test_{name}" for name in TASKS], limit=20, include_path=tasks)
    check(recorded, tokenizer)
    assert recorded.info.kind == "tasks"
    assert recorded.info.source == "lm-eval llmq_test_choice,llmq_test_rolling,llmq_test_generate"
    assert recorded.info.sequences == 20 * (2 + 1 + 1)  # a question is fed once with each of its two choices
    text = InputRecorder(tokenizer, windows=1, length=recorded.info.tokens_seen)
    everything = text.record_tasks([f"llmq_test_{name}" for name in TASKS], limit=20, include_path=tasks).text(tokenizer)
    for ending in (" The answer is yes", " The answer is no", "town .", " Then"):
        assert everything.count(ending) >= 20


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_tasks_that_cannot_be(tokenizer: Tokenizer, tasks: Path) -> None:
    (tasks / "gone.yaml").write_text(
        (tasks / "choice.yaml").read_text().replace("test_choice", "test_gone").replace("rows.jsonl", "gone.jsonl")
    )
    recorder = InputRecorder(tokenizer, windows=6, length=32)
    with pytest.raises(TextError, match="lm-eval cannot run llmq_test_gone here"):
        recorder.record_tasks(["llmq_test_gone"], include_path=tasks)
    with pytest.raises(TextError, match="no lm-eval task is named"):
        recorder.record_tasks([])


def test_unknown_tasks_get_a_suggestion(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    # lm-eval reads 14,000 files to know its names, which takes ten seconds
    known = SimpleNamespace(all_tasks=["arc_easy", "hellaswag", "piqa"])
    monkeypatch.setattr("llmq.calibration.task_recorder.TaskManager", lambda include_path: known)
    with pytest.raises(TextError, match=r"unknown lm-eval task 'hellaswog'. Did you mean 'hellaswag'"):
        InputRecorder(tokenizer).record_tasks(["hellaswog"])


def test_short_texts_are_packed_in_order(tokenizer: Tokenizer) -> None:
    text = text_from_string(" = A = \n some words \n = B = \n more words here \n", name="n", origin="o")
    stream = [token for page in text.documents() for token in tokenizer.encode(page, bos=True)]
    recorded = InputRecorder(tokenizer, windows=1, length=len(stream)).record_text(text)
    assert recorded.tokens[0].tolist() == stream
