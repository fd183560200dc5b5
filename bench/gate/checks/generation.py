"""Checks of what a user reads: greedy generations on both sides and the scores of four tasks.

Try: ``llama-onnx validate FOLDER --baseline demo --only greedy,tasks``.
"""

from __future__ import annotations

from dataclasses import replace

from bench.gate import judge
from bench.gate.found import Found
from bench.gate.generations import examples, task_evidence
from bench.gate.subject import Subject
from reports.validation import Evidence


def _generated(s: Subject, verdict: judge.Judge) -> Found:
    evidence = Evidence(outputs=s.generated)
    return replace(verdict(evidence, s.terms), evidence=evidence)


def greedy(s: Subject) -> Found:
    """Share of greedy generations equal token for token, and where the first one diverges."""
    return _generated(s, judge.greedy)


def length_band(s: Subject) -> Found:
    """Length of the outputs over the baseline's."""
    return _generated(s, judge.length_band)


def end_token(s: Subject) -> Found:
    """As many generations end by themselves as the baseline's do."""
    return _generated(s, judge.end_token)


def tasks(s: Subject) -> Found:
    """BLEU, ROUGE, exact match and F1 against the references and against the baseline's own outputs."""
    evidence = Evidence(tasks=task_evidence(s.outputs, s.tokenizer))
    found = judge.tasks(evidence, s.terms)
    return replace(found, evidence=evidence, examples=examples(s.outputs, s.tokenizer))
