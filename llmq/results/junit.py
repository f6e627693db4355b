"""Verdicts as JUnit XML, which continuous integration systems show as tests: one test case a comparison.

failed            <failure>      regressions, and what else is configured to fail
not comparable    <error>
only noted        <skipped>      another machine, something new
passed, warned    nothing; a warning says why in <system-out>
"""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree as ET

from llmq.files import atomic_path
from llmq.results.diff import Diff
from llmq.results.verdict import Finding, Outcome

_TAGS: dict[Outcome, str] = {"fail": "failure", "incomparable": "error", "note": "skipped"}
_NOT_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit_xml(diff: Diff) -> str:
    """Return the document, with its declaration."""
    counts = {
        "tests": len(diff.findings),
        "failures": diff.count("fail"),
        "errors": diff.count("incomparable"),
        "skipped": diff.count("note"),
    }
    numbers = {name: str(count) for name, count in counts.items()} | {"time": "0"}
    root = ET.Element("testsuites", {"name": "llmq"} | numbers)
    started = diff.created_at.strftime("%Y-%m-%dT%H:%M:%S")
    suite = ET.SubElement(root, "testsuite", {"name": _clean(f"llmq {diff.candidate}"), "timestamp": started} | numbers)
    properties = ET.SubElement(suite, "properties")
    for name, value in {"baseline": diff.baseline, **{f"machine.{side}": text for side, text in diff.machines.items()}}.items():
        ET.SubElement(properties, "property", {"name": name, "value": _clean(value)})
    for finding in diff.findings:
        _add_case(suite, finding)
    ET.indent(root)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{ET.tostring(root, encoding="unicode")}\n'


def write_junit(diff: Diff, path: Path) -> None:
    """Write the document whole, over an earlier one.

    Raises:
        OutputError: it cannot be written.
    """
    with atomic_path(path, force=True) as temporary:
        temporary.write_text(junit_xml(diff), encoding="utf-8")


def _add_case(suite: ET.Element, finding: Finding) -> None:
    names = {"classname": _clean(f"llmq.{finding.subject}"), "name": _clean(finding.metric), "time": "0"}
    case = ET.SubElement(suite, "testcase", names)
    said = _clean(f"{finding.verdict}: {finding.reason}")
    tag = _TAGS.get(finding.outcome)
    if tag is None:
        ET.SubElement(case, "system-out").text = said
        return
    kind = {} if tag == "skipped" else {"type": finding.verdict.value}
    ET.SubElement(case, tag, {"message": said} | kind).text = said


def _clean(text: str) -> str:
    """Drop what XML 1.0 cannot hold, such as control characters in a folder's name."""
    return _NOT_XML.sub("", text)
