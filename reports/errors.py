"""The root of the errors of ``reports``, which imports nothing of the other packages."""

from __future__ import annotations


class ReportError(Exception):
    """What the user can mend; names the file and the remedy. ``exit_code`` is what the command line returns."""

    exit_code = 2
