"""The root of the errors of ``reports``, which imports nothing of the other packages."""

from __future__ import annotations


class ReportError(Exception):
    """What the user can mend; names the file and the remedy. ``exit_code`` is what the command line returns."""

    exit_code = 2


class RecordError(ReportError):
    """A file that is not the document it should be, or not of this schema; names the place."""
