"""JUnit XML as the parsers of CI systems read it."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree as ET

from gate_runs import decode, quality, run, tokens

from llmq.api.diffing import diff_runs
from llmq.results.junit import junit_xml, write_junit
from llmq.results.tolerances import read_tolerances


def test_a_test_case_a_comparison_with_its_reason(tmp_path: Path) -> None:
    before = run("main\x1b<1>", *quality(tokens()), decode())
    after = run("a & b", *quality(tokens(worse=0.5)), decode(threads=1))
    diff = diff_runs(before, after, read_tolerances())
    write_junit(diff, tmp_path / "junit.xml")
    root = ET.fromstring((tmp_path / "junit.xml").read_bytes())
    (suite,) = root
    cases = suite.findall("testcase")
    assert root.tag == "testsuites"
    assert (suite.tag, suite.get("name")) == ("testsuite", "llmq a & b")
    assert int(suite.get("tests", "")) == len(cases) == len(diff.findings)
    for counted, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        assert int(suite.get(counted, "")) == int(root.get(counted, "")) == len(suite.findall(f"testcase/{tag}"))
    (failed,) = [case for case in cases if case.find("failure") is not None]
    assert (failed.get("classname"), failed.get("name")) == ("llmq.int4 group_size=32", "ln perplexity")
    failure = failed.find("failure")
    assert failure is not None
    assert failure.get("type") == "regression"
    assert "nats/token at the least" in failure.get("message", "")
    assert len({(case.get("classname"), case.get("name")) for case in cases}) == len(cases)  # parsers merge namesakes
    (property_,) = [each for each in suite.iter("property") if each.get("name") == "baseline"]
    assert property_.get("value") == "main<1>"  # an escape character is not XML


def test_what_cannot_be_compared_is_an_error() -> None:
    diff = diff_runs(run("a", *quality(tokens())), run("b", *quality(tokens(), length=7)), read_tolerances())
    suite = ET.fromstring(junit_xml(diff).encode())[0]
    assert (suite.get("errors"), suite.get("failures")) == ("2", "0")
    errors = suite.findall("testcase/error")
    assert all("length is 51" in (error.get("message") or "") for error in errors)
