"""The packages ``export`` and ``runtime`` for a child in another environment, and nothing that lies beside them.

Where the suite is installed they lie in site-packages, beside this environment's onnxruntime and numpy: that folder on
the child's path would put these in place of the child's own.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


def load(root: Path) -> None:
    """Import both from ``root``; whatever else they import comes from the running environment."""
    for name in ("export", "runtime"):
        spec = importlib.util.spec_from_file_location(name, root / name / "__init__.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
