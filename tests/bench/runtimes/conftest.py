"""A second virtual environment with the packages of this one."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made without pip; it reads this environment's site-packages."""
    folder = tmp_path_factory.mktemp("environments") / "other"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (packages,) = folder.glob("lib/python3*/site-packages")
    (packages / "parent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder
