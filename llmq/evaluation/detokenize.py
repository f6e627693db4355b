"""WikiText's written form back to ordinary text, by the rules of lm-eval's `wikitext` task (version 2.0).

WikiText separates punctuation by spaces (`a guest @-@ starring role ,`). lm-eval scores the text with that undone, but counts
the words and bytes of the original, so the rules are part of the protocol `lmeval-word`: changing one changes every figure.
They are applied in order, over the whole page.
"""

from __future__ import annotations

import re
from collections.abc import Callable

_Rule = Callable[[str], str]


def _literal(old: str, new: str) -> _Rule:
    return lambda text: text.replace(old, new)


def _trim_inside(opening: str, closing: str) -> _Rule:
    """A rule that removes white space just inside a pair; for quotation marks the first one opens, the next one closes."""
    left, right = re.escape(opening), re.escape(closing)
    pattern = re.compile(rf"{left}\s*([^{right}]*?)\s*{right}")
    return lambda text: pattern.sub(lambda match: f"{opening}{match[1]}{closing}", text)


_RULES: tuple[_Rule, ...] = (
    _literal("s '", "s'"),
    # lm-eval has a regex for "/' 3/" here, slashes included (they were meant as delimiters); what it does is kept
    lambda text: re.sub(r"/' [0-9]/", "/'[0-9]/", text),
    *(_literal(f" @{mark}@ ", mark) for mark in "-,."),
    *(_literal(f" {mark} ", f"{mark} ") for mark in ":;.!?,"),
    *(_trim_inside(opening, closing) for opening, closing in ("()", "[]", "{}", '""', "''")),
    *(_literal(" ".join("=" * count), "=" * count) for count in (4, 3, 2)),
    _literal(" ° ", "°"),
    _literal(" \n", "\n"),
    _literal("\n ", "\n"),
    _literal(" N ", " 1 "),
    _literal(" 's", "'s"),
)


def detokenize_wikitext(page: str) -> str:
    """Return `page` with WikiText's spacing undone."""
    for rule in _RULES:
        page = rule(page)
    return page
