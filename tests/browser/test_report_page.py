"""The page in a browser: it sorts, turns dark, fits a phone, and can be used without a mouse."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from playwright.sync_api import Locator, Page
from report_runs import LAYERS, SCHEMES

from llmq.results.palette import DARK, LIGHT

pytestmark = pytest.mark.slow  # a browser takes seconds to start

Open = Callable[..., Page]

BY_SIZE = ["int4-gptq group_size=32", "int8-weight-only", "int8-dynamic", "bf16"]
BY_NAME = ["bf16", "int4-gptq group_size=32", "int8-dynamic", "int8-weight-only"]


def table(page: Page) -> Locator:
    return page.locator("#section-1 table.sortable")


def heading(page: Page, name: str) -> Locator:
    return table(page).get_by_role("button", name=name, exact=True)


def schemes(page: Page) -> list[str]:
    return [text.strip() for text in table(page).locator("tbody th span:last-child").all_inner_texts()]


def sorting(page: Page) -> list[str | None]:
    return [cell.get_attribute("aria-sort") for cell in table(page).locator("thead th").all() if cell.get_attribute("aria-sort")]


def rgb(colour: str) -> str:
    return f"rgb({int(colour[1:3], 16)}, {int(colour[3:5], 16)}, {int(colour[5:7], 16)})"


def background(page: Page) -> str:
    return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))


def test_it_opens_without_a_request_or_a_complaint(opened: Open) -> None:
    page = opened()
    assert page.title() == "llmq report: tiny"
    assert page.get_by_role("heading", level=2).all_inner_texts() == ["tiny: 4 schemes", "tiny: 1 scheme", "Other records"]


def test_headings_sort_by_numbers_both_ways(opened: Open) -> None:
    page = opened()
    assert schemes(page) == list(BY_SIZE[3:] + BY_SIZE[1:3] + BY_SIZE[:1])
    heading(page, "size").click()
    assert schemes(page) == BY_SIZE
    assert sorting(page) == ["ascending"]
    heading(page, "size").click()
    assert schemes(page) == BY_SIZE[::-1]
    assert sorting(page) == ["descending"]
    assert page.get_by_role("status").inner_text() == "Sorted by size, descending"
    # as texts, 310 would come first and 95 last
    heading(page, "decode tok/s").click()
    assert schemes(page) == ["bf16", "int8-dynamic", "int8-weight-only", "int4-gptq group_size=32"]
    assert sorting(page) == ["ascending"]


def test_headings_sort_by_keyboard(opened: Open) -> None:
    page = opened()
    heading(page, "scheme").focus()
    page.keyboard.press("Enter")
    assert schemes(page) == BY_NAME
    page.keyboard.press("Space")
    assert schemes(page) == BY_NAME[::-1]
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "perplexity"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "standard error of perplexity"


def test_errors_can_be_sorted_by(opened: Open) -> None:
    page = opened()
    heading(page, "standard error of KL (nats/token)").click()
    assert schemes(page) == ["bf16", "int8-weight-only", "int8-dynamic", "int4-gptq group_size=32"]


def test_what_was_not_measured_stays_last(opened: Open) -> None:
    page = opened()
    page.evaluate("document.querySelector('#section-1 tbody tr:nth-child(2) td:last-child').dataset.sort = ''")
    for _ in range(2):
        heading(page, "size").click()
        assert schemes(page)[-1] == "int8-weight-only"


def test_plots_hold_the_points_of_the_records(opened: Open) -> None:
    page = opened()
    points = page.locator("#section-1 svg[data-plot=size] .point")
    found = points.evaluate_all("points => points.map(({dataset: d}) => [d.label.split(' ')[0], Number(d.x), Number(d.y)])")
    assert found == [[scheme, known["size"], known["kl"]] for scheme, known in SCHEMES.items()]
    boxes = [box for point in points.all() if (box := point.bounding_box())]
    assert len(boxes) == len(SCHEMES)
    assert all(box["width"] > 4 and box["height"] > 4 for box in boxes)  # and they are really drawn
    sizes = sorted((known["size"], place) for place, known in enumerate(SCHEMES.values()))
    assert [place for _, place in sizes] == sorted(range(len(boxes)), key=lambda place: boxes[place]["x"])
    assert page.locator("#section-1 svg[data-plot=sqnr] .cell").count() == 3 * 3 * LAYERS


def test_a_point_is_drawn_in_the_colour_of_its_row(opened: Open) -> None:
    page = opened()
    use = page.locator("#section-1 svg[data-plot=size] .point use").first
    assert use.evaluate("element => getComputedStyle(element).stroke") == rgb(LIGHT["series-1"])
    mark = table(page).locator("tbody .mark").first
    assert mark.evaluate("element => getComputedStyle(element).color") == rgb(LIGHT["series-1"])


@pytest.mark.parametrize(("preferred", "first", "second"), [("light", LIGHT, DARK), ("dark", DARK, LIGHT)])
def test_dark_is_what_the_system_prefers_or_the_button_says(
    opened: Open, preferred: str, first: dict[str, str], second: dict[str, str]
) -> None:
    page = opened(scheme=preferred)
    toggle = page.get_by_role("button", name="Dark")
    text = page.locator("#section-1 svg[data-plot=size] text").first
    for colours in (first, second, first):
        assert background(page) == rgb(colours["paper"])
        assert toggle.get_attribute("aria-pressed") == str(colours is DARK).lower()
        fill = text.evaluate("element => getComputedStyle(element).fill")
        assert fill in (rgb(colours["ink"]), rgb(colours["muted"]))
        toggle.click()


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_nothing_but_tables_and_plots_scrolls_sideways(opened: Open, width: int) -> None:
    page = opened(width=width)
    page.evaluate("document.querySelectorAll('details').forEach(details => { details.open = true })")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    outside = """() => [...document.querySelectorAll('body *')].filter(element =>
        !element.closest('.scroll, .hidden, .skip, svg') && element.getBoundingClientRect().right > innerWidth + 0.5)
        .map(element => element.outerHTML.slice(0, 80))"""
    assert page.evaluate(outside) == []


def test_on_a_phone_what_is_wide_scrolls_by_keyboard(opened: Open) -> None:
    page = opened(width=360, height=740)
    region = page.get_by_role("region", name="Comparison table of section 1")
    assert region.evaluate("element => element.scrollWidth > element.clientWidth")
    assert region.get_attribute("tabindex") == "0"
    region.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("element => element.scrollLeft > 0", arg=region.element_handle())
    # the names of the rows stay
    box = table(page).locator("tbody th").first.bounding_box()
    assert box is not None
    assert box["x"] >= 0


def test_every_picture_has_a_text(opened: Open) -> None:
    page = opened()
    pictures = page.get_by_role("img")
    assert pictures.count() == page.locator("svg").count() == 11
    for picture in pictures.all():
        assert picture.evaluate(
            "element => document.getElementById(element.getAttribute('aria-labelledby').split(' ')[1]).textContent"
        )
    assert page.locator("img, image, canvas, video").count() == 0
    assert page.get_by_role("img", name="What the size costs").count() == 2 - 1  # one row makes no scatter


def test_the_first_tab_skips_to_the_figures(opened: Open) -> None:
    page = opened()
    page.keyboard.press("Tab")
    skip = page.get_by_role("link", name="Skip to the figures")
    assert skip.evaluate("element => element === document.activeElement && element.getBoundingClientRect().top >= 0")
    assert skip.evaluate("element => getComputedStyle(element).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"


def test_details_open_by_keyboard(opened: Open) -> None:
    page = opened()
    record = page.locator("#record-1-1")
    record.locator("summary").focus()
    page.keyboard.press("Enter")
    assert record.get_by_text("Fast 9000").is_visible()


def test_paper_is_light_and_has_no_buttons(opened: Open) -> None:
    page = opened(scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert background(page) == rgb(LIGHT["paper"])
    assert not page.get_by_role("button", name="Dark").is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_of_a_plot_are_within_it_and_apart(opened: Open, scheme: str) -> None:
    """With the page's own font, which no plot was laid out for."""
    page = opened(scheme=scheme)
    outside = """() => [...document.querySelectorAll('svg')].flatMap(svg => {
        const own = svg.getBoundingClientRect();
        return [...svg.querySelectorAll('text')].filter(text => {
            const box = text.getBoundingClientRect();
            return box.left < own.left - 1 || box.right > own.right + 1 || box.top < own.top - 1 || box.bottom > own.bottom + 1;
        }).map(text => `${svg.dataset.plot}: ${text.textContent}`);
    })"""
    assert page.evaluate(outside) == []
