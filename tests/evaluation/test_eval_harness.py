from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch

from llmq.calibration.corpus import resolve_text
from llmq.errors import TextError, UsageError
from llmq.evaluation.harness import TaskOptions, check_task_names, run_tasks
from llmq.evaluation.perplexity import evaluate_perplexity
from llmq.evaluation.protocols import LmEvalWord

lm_eval = pytest.importorskip("lm_eval")
TASKS = Path(lm_eval.__file__).parent / "tasks"


def _write_task(folder: Path, name: str, documents: list[dict[str, object]], body: str) -> None:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    (folder / f"{name}.yaml").write_text(
        f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder / name}.jsonl\n"
        f"  cache_dir: {folder / 'cache'}\ntest_split: test\n{body}\nmetadata:\n  version: 3.0\n"
    )


@pytest.fixture
def task_folder(tmp_path: Path) -> Path:
    _write_task(
        tmp_path,
        "colours",
        [
            {"question": f"Colour of {thing}?", "choices": ["red", "green"], "answer": i % 2}
            for i, thing in enumerate(["grass", "blood", "moss", "rust"])
        ],
        "output_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: answer\n"
        "metric_list:\n  - metric: acc\n  - metric: acc_norm",
    )
    _write_task(
        tmp_path,
        "echo",
        [{"prompt": "Once", "reply": "?"}, {"prompt": "Twice", "reply": "?"}],
        "output_type: generate_until\ndoc_to_text: '{{prompt}}'\ndoc_to_target: '{{reply}}'\n"
        'generation_kwargs:\n  until: ["."]\n  max_gen_toks: 5\n  do_sample: false\nmetric_list:\n  - metric: exact_match',
    )
    _write_task(
        tmp_path,
        "pages",
        [{"page": "Salt is a mineral ."}, {"page": "Ink is a fluid ."}],
        "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{page}}'\n"
        "metric_list:\n  - metric: word_perplexity\n  - metric: bits_per_byte",
    )
    return tmp_path


@pytest.mark.slow
def test_tasks_of_each_kind_run(llama, chars, task_folder, exact_score) -> None:
    results = run_tasks(llama, chars, ["colours", "echo", "pages"], options=TaskOptions(include_path=task_folder))
    scores = {(score.task, score.metric): score for score in results.scores}
    assert set(scores) == {
        ("colours", "acc"),
        ("colours", "acc_norm"),
        ("echo", "exact_match"),
        ("pages", "word_perplexity"),
        ("pages", "bits_per_byte"),
    }
    right = 0
    for i, thing in enumerate(["grass", "blood", "moss", "rust"]):
        question = chars.encode(f"Colour of {thing}?", bos=True)
        red, green = (
            exact_score(llama, [*question, *chars.encode(f" {c}")][:-1], chars.encode(f" {c}"))[0] for c in ("red", "green")
        )
        right += (green > red) == (i % 2)
    acc = scores["colours", "acc"]
    assert acc.value == right / 4
    p = acc.value
    assert acc.stderr == pytest.approx(math.sqrt(p * (1 - p) / 3))
    assert (acc.task_version, acc.n_documents, acc.num_fewshot, acc.higher_is_better) == ("3.0", 4, 0, True)
    total = sum(
        exact_score(llama, [126, *tokens[:-1]], tokens)[0]
        for tokens in map(chars.encode, ("Salt is a mineral .", "Ink is a fluid ."))
    )
    assert scores["pages", "bits_per_byte"].value == pytest.approx(-total / 35 / math.log(2), rel=1e-6)
    assert scores["pages", "word_perplexity"].stderr is None
    assert scores["pages", "word_perplexity"].metric_record().value == scores["pages", "word_perplexity"].value
    assert results.bos == "before every request"
    assert results.max_length == 48


@pytest.mark.slow
def test_limit_and_examples(llama, chars, task_folder, capsys) -> None:
    options = TaskOptions(include_path=task_folder, limit=2, num_fewshot=1, seed=5)
    results = run_tasks(llama, chars, ["colours"], options=options)
    assert {(score.n_documents, score.num_fewshot) for score in results.scores} == {(2, 1)}
    assert results == run_tasks(llama, chars, ["colours"], options=options)
    assert capsys.readouterr().out == ""  # stdout belongs to the caller


def test_unknown_tasks_suggest() -> None:
    with pytest.raises(UsageError, match=r"unknown lm-eval task 'arc_eazy': did you mean 'arc_easy'.*There are 3 names"):
        check_task_names(["piqa", "arc_eazy"], ["arc_easy", "piqa", "winogrande"])
    with pytest.raises(UsageError, match=r"unknown lm-eval task 'qqq': There are 1 names"):
        check_task_names(["qqq"], ["arc_easy"])


def test_no_task_and_no_folder(llama, chars, tmp_path) -> None:
    with pytest.raises(UsageError, match="no task is named"):
        run_tasks(llama, chars, [])
    with pytest.raises(UsageError, match=r"folder of task definitions .* does not exist"):
        run_tasks(llama, chars, ["x"], options=TaskOptions(include_path=tmp_path / "nowhere"))


def test_data_that_cannot_be_had_are_a_sentence(llama, chars, tmp_path, monkeypatch) -> None:
    import datasets.config
    import huggingface_hub.constants as hub

    (tmp_path / "far.yaml").write_text(
        "task: far\ndataset_path: nobody/nothing-of-this-name\noutput_type: loglikelihood_rolling\ntest_split: test\n"
    )
    options = TaskOptions(include_path=tmp_path)
    with pytest.raises(
        TextError, match=r"the data of task far cannot be had \(.*nobody/nothing-of-this-name.*HF_HUB_OFFLINE is set\)"
    ):
        run_tasks(llama, chars, ["far"], options=options)
    # without that variable the hub is asked once, and `datasets` not at all
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(TextError, match=r"the data of task far cannot be had .*http://127\.0\.0\.1:9 cannot be reached"):
        run_tasks(llama, chars, ["far"], options=options)
    assert hub.HF_HUB_OFFLINE is datasets.config.HF_HUB_OFFLINE is False


def test_a_broken_task_is_a_sentence(llama, chars, tmp_path) -> None:
    _write_task(tmp_path, "odd", [{"a": "b"}], "output_type: telepathy\ndoc_to_text: '{{a}}'\ndoc_to_target: '{{a}}'")
    with pytest.raises(UsageError, match=r"lm-eval cannot run task odd: .*telepathy"):
        run_tasks(llama, chars, ["odd"], options=TaskOptions(include_path=tmp_path))


@pytest.fixture
def wikitext_task(tmp_path: Path, wikitext: Path) -> Path:
    """lm-eval's own wikitext task, with its own code, on the first documents of the local text."""
    shutil.copy(TASKS / "wikitext" / "preprocess_wikitext.py", tmp_path)
    original = (TASKS / "wikitext" / "wikitext.yaml").read_text()
    pages = resolve_text(wikitext, split="test").documents()
    (tmp_path / "pages.jsonl").write_text("".join(json.dumps({"page": page}) + "\n" for page in pages))
    local = re.sub(
        r"dataset_path: .*\ndataset_name: .*\n",
        f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path}/pages.jsonl\n  cache_dir: {tmp_path}/cache\n",
        original,
    )
    assert local != original
    (tmp_path / "wikitext.yaml").write_text(re.sub(r"(training|validation)_split: .*\n", "", local))
    return tmp_path


@pytest.mark.slow
@pytest.mark.wikitext
def test_lmeval_word_is_lm_evals_wikitext_task(demo, wikitext, wikitext_task) -> None:
    model, tokenizer = demo
    results = run_tasks(model, tokenizer, ["wikitext"], options=TaskOptions(include_path=wikitext_task, limit=2))
    theirs = {score.metric: score.value for score in results.scores}
    mine = evaluate_perplexity(model, tokenizer, resolve_text(wikitext, split="test"), LmEvalWord(length=256, limit=2))
    assert mine.original is not None
    assert theirs["word_perplexity"] == pytest.approx(mine.original.word_perplexity.value, rel=1e-6)
    assert theirs["byte_perplexity"] == pytest.approx(mine.original.byte_perplexity.value, rel=1e-7)
    assert theirs["bits_per_byte"] == pytest.approx(mine.original.bits_per_byte.value, rel=1e-7)
    assert {score.task_version for score in results.scores} == {"2.0"}


@pytest.mark.slow
@pytest.mark.wikitext
def test_lmeval_word_is_what_lm_eval_gives_for_transformers(demo, wikitext, wikitext_task, wt2_8m) -> None:
    """The other side has nothing of llmq: lm-eval's HFLM over transformers' Llama and a transformers tokenizer."""
    pytest.importorskip("accelerate", reason="lm-eval's HFLM needs accelerate")
    transformers = pytest.importorskip("transformers")
    import sentencepiece
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    class Pieces(transformers.PreTrainedTokenizer):
        def __init__(self) -> None:
            self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(wt2_8m / "tokenizer.model"))
            super().__init__(bos_token="<s>", eos_token="</s>", unk_token="<unk>")

        @property
        def vocab_size(self) -> int:
            return self.pieces.vocab_size()

        def get_vocab(self) -> dict[str, int]:
            return {self.pieces.id_to_piece(i): i for i in range(self.vocab_size)}

        def _tokenize(self, text: str, **_: object) -> list[str]:
            return self.pieces.encode(text, out_type=str)

        def _convert_token_to_id(self, token: str) -> int:
            return self.pieces.piece_to_id(token)

        def _convert_id_to_token(self, index: int) -> str:
            return self.pieces.id_to_piece(index)

    model, tokenizer = demo
    theirs_model = transformers.LlamaForCausalLM.from_pretrained(wt2_8m, dtype=torch.float32)
    theirs = simple_evaluate(
        HFLM(pretrained=theirs_model, tokenizer=Pieces(), batch_size=4, max_length=256, add_bos_token=False),
        tasks=["wikitext"],
        limit=2,
        bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(wikitext_task), include_defaults=False),
    )["results"]["wikitext"]
    mine = evaluate_perplexity(model, tokenizer, resolve_text(wikitext, split="test"), LmEvalWord(length=256, limit=2)).original
    assert mine is not None
    assert theirs["word_perplexity,none"] == pytest.approx(mine.word_perplexity.value, rel=1e-6)
    assert theirs["byte_perplexity,none"] == pytest.approx(mine.byte_perplexity.value, rel=1e-6)
    assert theirs["bits_per_byte,none"] == pytest.approx(mine.bits_per_byte.value, rel=1e-6)
