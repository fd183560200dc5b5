"""A validation as lines on a terminal: one a check, then the verdict and why.

Try: ``llama-onnx validate FOLDER --baseline demo --mode quick``.
"""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from reports.validation import CheckResult, Validation

STYLE = {
    "PASS": "green",
    "FAIL": "bold red",
    "INCONCLUSIVE": "yellow",
    "SUSPICIOUS": "yellow",
    "REPORTED": "dim",
    "SKIPPED": "dim",
}
_NAME = 18


def print_check(result: CheckResult, console: Console) -> None:
    """Name, status, figure and seconds; up to three findings below a failed one."""
    line = Text(f"{result.name:<{_NAME}} ")
    line.append(f"{result.status:<12} ", style=STYLE[result.status])
    line.append(f"{result.seconds:6.1f} s  ", style="dim")
    line.append(result.figure)
    console.print(line, soft_wrap=True)
    for finding in result.findings[1:4]:
        console.print(Text(f"{'':<{_NAME}} also {finding.where}: {finding.what}", style="dim"), soft_wrap=True)


def print_verdict(found: Validation, console: Console) -> None:
    """The verdict, the place, and the reasons."""
    head = Text(f"\n{found.verdict}", style=STYLE[found.verdict])
    head.append(
        f"  {found.folder} against {found.baseline}, tier {found.tier}, mode {found.mode}, {found.seconds:.0f} s",
        style="",
    )
    console.print(head, soft_wrap=True)
    for reason in found.reasons:
        console.print(Text(f"  {reason}"), soft_wrap=True)
    if found.place:
        console.print(Text(f"  leaves the baseline at {found.place.detail}"), soft_wrap=True)
    for note in found.notes:
        console.print(Text(f"  note: {note}", style="dim"), soft_wrap=True)
