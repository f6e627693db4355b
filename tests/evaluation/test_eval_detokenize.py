from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

from llmq.calibration.corpus import resolve_text
from llmq.evaluation.detokenize import detokenize_wikitext


@pytest.fixture(scope="module")
def lm_eval_detokenizer() -> Callable[[dict[str, str]], str]:
    package = importlib.util.find_spec("lm_eval")
    assert package is not None
    assert package.origin is not None
    path = Path(package.origin).parent / "tasks" / "wikitext" / "preprocess_wikitext.py"
    spec = importlib.util.spec_from_file_location("preprocess_wikitext", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.wikitext_detokenizer


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        ("a guest @-@ star , 1 @,@ 000 . 5 @.@ 2", "a guest-star, 1,000. 5.2"),
        (" = = = Early years = = = \n", " === Early years ===\n"),
        ("= = = = Deep = = = =", "==== Deep ===="),
        ('he said " well , yes " ( twice )', 'he said "well, yes" (twice)'),
        ("the sailors ' [ own ] { words }", "the sailors' [own] {words}"),
        ("12 ° C ; Moon 's N miles : so ! why ? on", "12°C; Moon's 1 miles: so! why? on"),
        ("odd /' 3/ case", "odd /'[0-9]/ case"),
    ],
)
def test_rules(page: str, expected: str, lm_eval_detokenizer: Callable[[dict[str, str]], str]) -> None:
    assert detokenize_wikitext(page) == expected == lm_eval_detokenizer({"page": page})


def test_lines_lose_their_padding(lm_eval_detokenizer: Callable[[dict[str, str]], str]) -> None:
    page = " = Ink = \n \n Ink , of course . \n \n"
    assert detokenize_wikitext(page) == " = Ink =\n\nInk, of course.\n\n" == lm_eval_detokenizer({"page": page})


@pytest.mark.wikitext
def test_every_page_is_as_lm_eval_has_it(wikitext: Path, lm_eval_detokenizer: Callable[[dict[str, str]], str]) -> None:
    pages = resolve_text(wikitext, split="test").documents()
    assert len(pages) == 62  # the published count
    for page in pages:
        assert detokenize_wikitext(page) == lm_eval_detokenizer({"page": page})
        assert detokenize_wikitext(page) != page
