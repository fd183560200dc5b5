"""``junit.xml``: the same run for the test viewers of CI systems.

One suite for the tests that ran and one for parity, with a test case per check and task metric.

Try: ``python -c "import pathlib, reports.record as r, reports.render.junit as j;
print(j.render_junit(r.RunRecord.read(pathlib.Path('reports/out/record.json'))))"``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from xml.etree import ElementTree as ET

from reports.record import Outcome, RunRecord
from reports.render import words
from reports.validation import CheckResult, Status, TaskMetric, Validation
from reports.verdict import other_outcomes

_COUNTED = (("failures", "failure"), ("errors", "error"), ("skipped", "skipped"))


def render_junit(record: RunRecord) -> str:
    """JUnit XML of a record (the Jenkins dialect that GitHub, GitLab and Jenkins viewers read)."""
    suites = {"bench": [_outcome(o) for o in other_outcomes(record)], "parity": parity_cases(record.validation)}
    return document("llama-onnx-bench", suites, record.created_utc, sum(o.seconds for o in record.outcomes))


def document(name: str, suites: Mapping[str, list[ET.Element] | None], created_utc: str, seconds: float) -> str:
    """The text of a file: its suites with their test cases, and the counts of each and of all; None is left out."""
    root = ET.Element("testsuites", name=name)
    total: Counter[str] = Counter()
    for title, cases in suites.items():
        if cases is not None:
            counts = Counter(
                {"tests": len(cases)} | {s: sum(c.find(t) is not None for c in cases) for s, t in _COUNTED}
            )
            took = f"{sum(float(c.get('time', '0')) for c in cases):.3f}"
            told = {**{k: str(v) for k, v in counts.items()}, "time": took, "timestamp": created_utc}
            ET.SubElement(root, "testsuite", {"name": title, **told}).extend(cases)
            total += counts
    root.attrib |= {k: str(total[k]) for k in ("tests", *dict(_COUNTED))} | {"time": f"{seconds:.3f}"}
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + words.clean(ET.tostring(root, encoding="unicode")) + "\n"


def parity_cases(validation: Validation | None) -> list[ET.Element] | None:
    """One test case a check and a task metric; None where there is no validation."""
    return [*map(_check, validation.results), *map(_task, validation.tasks)] if validation else None


def case_of(classname: str, name: str, seconds: float = 0.0) -> ET.Element:
    """One test case; a name is never empty."""
    return ET.Element("testcase", classname=classname, name=name or "unnamed", time=f"{seconds:.3f}")


def add(case: ET.Element, tag: str, kind: str, message: str) -> None:
    """Put a failure, an error or a skip with its message into a test case."""
    child = ET.SubElement(case, tag, message=message.partition("\n")[0], type=kind)
    child.text = message


def told(case: ET.Element, failure: str, message: str) -> ET.Element:
    """The test case with its message: a failure of that type, or plain text where that is ""."""
    if failure:
        add(case, "failure", failure, message)
    else:
        ET.SubElement(case, "system-out").text = message
    return case


def _outcome(outcome: Outcome) -> ET.Element:
    path, _, name = outcome.test.partition("::")
    classname = path.removesuffix(".py").replace("/", ".") if name else "bench"
    case = case_of(classname, name or path, outcome.seconds)
    if outcome.outcome != "passed":
        tag = "failure" if outcome.outcome == "failed" else outcome.outcome
        add(case, tag, outcome.outcome, outcome.message or outcome.outcome)
    return case


def _judged(case: ET.Element, status: Status, message: str) -> ET.Element:
    return told(case, {"FAIL": "parity", "INCONCLUSIVE": "inconclusive"}.get(status, ""), message)


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
