"""Checks of what a user reads: greedy generations on both sides and the scores of four tasks.

Try: ``llama-onnx validate FOLDER --baseline demo --only greedy,tasks``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from bench.gate import judge
from bench.gate.found import Found
from bench.gate.generations import examples, task_evidence
from bench.gate.subject import Subject
from reports.validation import Evidence


def judged(by: judge.Judge) -> Callable[[Subject], Found]:
    """The check of greedy generations that a judge decides."""

    def run(s: Subject) -> Found:
        evidence = Evidence(outputs=s.generated)
        return replace(by(evidence, s.terms), evidence=evidence)

    return run


def tasks(s: Subject) -> Found:
    """BLEU, ROUGE, exact match and F1 against the references and against the baseline's own outputs."""
    evidence = Evidence(tasks=task_evidence(s.outputs, s.tokenizer))
    found = judge.tasks(evidence, s.terms)
    return replace(found, evidence=evidence, examples=examples(s.outputs, s.tokenizer))
