"""What can go wrong while exporting. Each error names the thing and the remedy, in one or two lines."""

from __future__ import annotations

from export.manifest import UserError


class ExportError(UserError):
    """Base of all export errors."""


class ModelNotFoundError(ExportError):
    """No checkpoint under that name, path or hub id."""


class UnsupportedModelError(ExportError):
    """A checkpoint that cannot be exported right, refused by name."""


class BrokenCheckpointError(ExportError):
    """A checkpoint whose files are damaged or incomplete."""


class MissingOptimumError(ExportError):
    """Asked for what only optimum does, where it cannot be imported (under transformers 5)."""


class DestinationError(ExportError):
    """OUT exists and is something else, or the disk is too small."""


class GraphCheckError(ExportError):
    """The exported graph is not what the configuration demands."""

    exit_code = 1


class DemoModelError(ExportError):
    """The demo model could not be fetched or is not what was pinned."""
