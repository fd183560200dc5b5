"""``junit.xml``: the same run for the test viewers of CI systems.

One suite for the tests that ran and one for parity, with a test case per check and task metric.

Try: ``python -c "import pathlib, reports.record as r, reports.render.junit as j;
print(j.render_junit(r.RunRecord.read(pathlib.Path('reports/out/record.json'))))"``.
"""

from __future__ import annotations

import re
from xml.etree import ElementTree as ET

from reports.record import Outcome, RunRecord
from reports.render import words
from reports.validation import CheckResult, Status, TaskMetric, Validation
from reports.verdict import other_outcomes

# Characters that XML 1.0 cannot hold even as entities.
_FORBIDDEN = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def render_junit(record: RunRecord) -> str:
    """JUnit XML of a record (the Jenkins dialect that GitHub, GitLab and Jenkins viewers read)."""
    root = ET.Element("testsuites", name="llama-onnx-bench")
    suites = [suite_of(root, "bench", [_outcome(o) for o in other_outcomes(record)], record.created_utc)]
    if record.validation is not None:
        suites.append(suite_of(root, "parity", parity_cases(record.validation), record.created_utc))
    return finished(root, suites, sum(o.seconds for o in record.outcomes))


def finished(root: ET.Element, suites: list[ET.Element], seconds: float) -> str:
    """The document's text, with the suites' counts added up at its root."""
    for name in ("tests", "failures", "errors", "skipped"):
        root.set(name, str(sum(int(s.get(name, "0")) for s in suites)))
    root.set("time", f"{seconds:.3f}")
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def parity_cases(validation: Validation) -> list[ET.Element]:
    """One test case a check and a task metric."""
    return [*map(_check, validation.results), *map(_task, validation.tasks)]


def clean(text: str) -> str:
    """Text without the characters that XML cannot hold; each becomes U+FFFD."""
    return _FORBIDDEN.sub("\ufffd", text)


def suite_of(root: ET.Element, name: str, cases: list[ET.Element], created_utc: str) -> ET.Element:
    """A suite under the root with its test cases and their counts."""
    suite = ET.SubElement(root, "testsuite", name=name)
    counts = {tag: sum(1 for c in cases if c.find(tag) is not None) for tag in ("failure", "error", "skipped")}
    suite.set("tests", str(len(cases)))
    suite.set("failures", str(counts["failure"]))
    suite.set("errors", str(counts["error"]))
    suite.set("skipped", str(counts["skipped"]))
    suite.set("time", f"{sum(float(c.get('time', '0')) for c in cases):.3f}")
    suite.set("timestamp", clean(created_utc))
    suite.extend(cases)
    return suite


def case_of(classname: str, name: str, seconds: float = 0.0) -> ET.Element:
    """One test case; a name is never empty."""
    return ET.Element("testcase", classname=clean(classname), name=clean(name) or "unnamed", time=f"{seconds:.3f}")


def add(case: ET.Element, tag: str, kind: str, message: str) -> None:
    """Put a failure, an error or a skip with its message into a test case."""
    child = ET.SubElement(case, tag, message=clean(message.partition("\n")[0]), type=kind)
    child.text = clean(message)


def _outcome(outcome: Outcome) -> ET.Element:
    path, _, name = outcome.test.partition("::")
    classname = path.removesuffix(".py").replace("/", ".") if name else "bench"
    case = case_of(classname, name or path, outcome.seconds)
    if outcome.outcome == "failed":
        add(case, "failure", "failed", outcome.message or "failed")
    elif outcome.outcome == "error":
        add(case, "error", "error", outcome.message or "error")
    elif outcome.outcome == "skipped":
        add(case, "skipped", "skipped", outcome.message or "skipped")
    return case


def _judged(case: ET.Element, status: Status, message: str) -> ET.Element:
    if status == "FAIL":
        add(case, "failure", "parity", message)
    elif status == "INCONCLUSIVE":
        add(case, "failure", "inconclusive", message)
    else:
        ET.SubElement(case, "system-out").text = clean(message)
    return case


def _check(r: CheckResult) -> ET.Element:
    case = case_of("parity.checks", r.name, r.seconds)
    more = "".join(f"\n{words.finding(f)}" for f in r.findings)
    if r.status == "SKIPPED":
        add(case, "skipped", "skipped", r.summary)
        return case
    return _judged(case, r.status, f"{r.status}: {r.summary}{more}")


def _task(task: TaskMetric) -> ET.Element:
    message = (
        f"{task.status}: candidate {words.score(task.candidate)}, baseline {words.score(task.baseline)}, "
        f"bound of the difference {words.difference(task.difference_bound)}, "
        f"limit {words.difference(task.limit)}, "
        f"{', '.join(filter(None, (f'{task.items} items', task.would_decide)))}. {task.settings}"
    )
    return _judged(case_of("parity.tasks", f"{task.task}: {task.metric}"), task.status, message)
