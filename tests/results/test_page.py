"""The page as text: it needs nothing but itself, says what must not be compared, and lets no mark-up in."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from report_runs import SCHEMES, bandwidth_record, example_run, layers_record

from llmq.errors import UsageError
from llmq.results.page import render_page
from llmq.results.run import run_in_memory

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """Elements of a page in their order, each with its attributes and the text in it; refuses tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str], list[str]]] = []
        self._open: list[tuple[str, list[str]]] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        words: list[str] = []
        self.elements.append((tag, {name: value or "" for name, value in attrs}, words))
        if tag not in VOID:
            self._open.append((tag, words))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}, []))

    def handle_endtag(self, tag: str) -> None:
        name, _ = self._open.pop()
        assert name == tag

    def handle_data(self, data: str) -> None:
        for _, words in self._open:
            words.append(data)

    def all(self, tag: str, **attributes: str) -> list[tuple[dict[str, str], str]]:
        """Attributes and text of every element of a name that has these attributes."""
        return [
            (found, " ".join(" ".join(words).split()))
            for name, found, words in self.elements
            if name == tag and all(found.get(key.rstrip("_")) == value for key, value in attributes.items())
        ]


@pytest.fixture(scope="module")
def text() -> str:
    other = run_in_memory("more.jsonl", [layers_record(), bandwidth_record()])
    return render_page([example_run("first.jsonl"), example_run("second.jsonl", {"bf16": SCHEMES["bf16"]}, length=512), other])


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def test_it_reaches_for_nothing(page: Page, text: str) -> None:
    for _, attributes, _ in page.elements:
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
                assert value.startswith("#") or value == "data:,", (name, value)
    assert not re.search(r"@import|url\((?!#)", text)
    assert not page.all("img")
    assert not page.all("image")
    (policy,) = [attributes["content"] for attributes, _ in page.all("meta") if "http-equiv" in attributes]
    assert policy.startswith("default-src 'none';")


def test_ids_are_unique_and_what_refers_to_them_finds_them(page: Page) -> None:
    ids = [attributes["id"] for _, attributes, _ in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes, _ in page.elements:
        for name in ("aria-labelledby", "aria-describedby"):
            assert set(attributes.get(name, "").split()) <= set(ids)
        for name in ("href", "xlink:href"):
            if attributes.get(name, "").startswith("#"):
                assert attributes[name][1:] in ids


def test_the_table_has_the_records_figures_to_sort_by(page: Page) -> None:
    values = [attributes["data-sort"] for attributes, _ in page.all("td") if "data-sort" in attributes]
    for known in SCHEMES.values():
        for figure in ("kl", "rate", "size"):
            assert known[figure] in [float(value) for value in values if value]
    labels = [words for attributes, words in page.all("th", scope="row") if "data-sort" in attributes]
    assert labels[:4] == ["● bf16", "■ int8-weight-only", "▲ int8-dynamic", "◆ int4-gptq group_size=32"]


def test_errors_are_columns_of_their_own_and_say_whose(page: Page) -> None:
    buttons = [(attributes.get("aria-label"), words) for attributes, words in page.all("button", type="button")]
    assert ("standard error of KL (nats/token)", "±") in buttons
    assert (None, "KL (nats/token)") in buttons
    cells = [words for attributes, words in page.all("td") if "error" in attributes.get("class", "")]
    assert "0.0004" in cells  # of 0.0121


def test_every_plot_has_a_name_and_a_caption(page: Page) -> None:
    plots = [attributes for attributes, _ in page.all("svg")]
    assert len(plots) == 11
    assert all(plot["role"] == "img" and plot["aria-labelledby"] for plot in plots)
    assert len(page.all("figure")) == len(page.all("figcaption")) == len(plots)
    assert all(words for _, words in page.all("figcaption"))


def test_sections_that_must_not_be_compared_say_why(page: Page) -> None:
    assert [words for _, words in page.all("h2")] == ["tiny: 4 schemes", "tiny: 1 scheme", "Other records"]
    (warning,) = [words for _, words in page.all("p", class_="warning")]
    assert warning == "Not to be compared with section 1: its records of perplexity have length 512, those of section 1 have 256."
    assert "Do not compare figures of one section with those of another." in " ".join(words for _, words in page.all("aside"))


def test_one_section_warns_of_nothing() -> None:
    page = Page(render_page([example_run()]))
    assert not page.all("aside")
    assert not page.all("nav")


def test_every_record_is_there_with_how_and_where_it_was_measured(page: Page, text: str) -> None:
    details = [words for attributes, words in page.all("details") if attributes.get("class") == "record"]
    assert len(details) == 16 + 4 + 1 + 1
    (decode,) = [words for words in details if words.startswith("int4-gptq group_size=32 decode")]
    for said in ("tokens per s", "310", "batch size 1", "native-int4 for 9 linears", "Fast 9000", "2 threads", "avx512vnni"):
        assert said in decode
    assert "torch 2.13.0" in decode
    assert "b" * 10 not in text  # the tokenizer's hash is nobody's business here


def test_records_have_the_labels_of_their_rows(page: Page) -> None:
    """A record without a KV cache, as of single linears, makes nobody else say which one theirs is."""
    names = [words for _, words in page.all("strong") if words != "Do not compare figures of one section with those of another."]
    assert names[::4][:4] == ["bf16", "int8-weight-only", "int8-dynamic", "int4-gptq group_size=32"]
    assert not [name for name in names if "kv=" in name]


def test_it_can_be_used_by_keyboard_and_screen_reader(page: Page) -> None:
    (skip,) = page.all("a", class_="skip")
    assert skip[0]["href"] == "#main"
    assert page.all("main", id="main")
    assert page.all("html", lang="en")
    assert len(page.all("h1")) == 1
    levels = [int(name[1]) for name, _, _ in page.elements if re.fullmatch(r"h[1-6]", name)]
    assert all(after - before <= 1 for before, after in pairwise(levels))
    (toggle,) = page.all("button", id="theme")
    assert toggle[0]["aria-pressed"] == "false"


@pytest.mark.slow
def test_the_same_records_give_the_same_page() -> None:
    assert render_page([example_run()]) == render_page([example_run()])


@pytest.mark.parametrize("evil", ['<script>alert("x")</script>', "</title><b>", "'\"><svg onload=alert(1)>", "{{ 7 * 7 }}"])
def test_names_let_no_mark_up_in(evil: str) -> None:
    (record,) = [record for record in example_run().records if (record.kind, record.subject.scheme) == ("decode", "bf16")]
    changed = {
        "subject": record.subject.model_copy(update={"scheme": evil, "model": evil, "options": {evil: evil}}),
        "kernels": {evil: 1},
        "notes": [evil],
        "protocol": record.protocol.model_copy(update={"name": evil, "params": {evil: evil}}),
        "environment": record.environment.model_copy(update={"cpu": evil, "packages": {evil: evil}}),
    }
    text = render_page([run_in_memory(evil, [record.model_copy(update=changed)])])
    page = Page(text)
    assert len(page.all("script")) == 1
    assert not page.all("b")
    assert not [name for _, attributes, _ in page.elements for name in attributes if name.startswith("on")]
    assert evil in [words for _, words in page.all("li")]
    assert "49" not in [words for _, words in page.all("li")]


def test_records_of_no_comparison_are_listed_alone() -> None:
    page = Page(render_page([run_in_memory("machine.jsonl", [bandwidth_record()])]))
    assert [words for _, words in page.all("h1")] == ["Records"]
    assert [words for _, words in page.all("h2")] == ["Other records"]
    assert not page.all("table", class_="sortable")


def test_records_of_single_linears_alone_have_plots_and_no_table() -> None:
    page = Page(render_page([run_in_memory("layers.jsonl", [layers_record()])]))
    assert [words for _, words in page.all("h2")] == ["tiny: one linear at a time"]
    assert not page.all("table", class_="sortable")
    assert [attributes["data-plot"] for attributes, _ in page.all("svg")] == ["cost", "output-error"]


def test_no_records_are_refused() -> None:
    with pytest.raises(UsageError, match=r"^there is no record in empty\.jsonl; name runs that hold some\.$"):
        render_page([run_in_memory("empty.jsonl", [])])
