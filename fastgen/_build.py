"""What was compiled when the package was built: the record that setup.py wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def info() -> dict[str, Any]:
    """Returns the build record; where there is none (sources that were never built) it says so."""
    record = Path(__file__).with_name("_build.json")
    if not record.exists():
        reason = "the package was imported from sources that were never built (run: make dev)"
        return {
            "torch": None,
            "torch_target": None,
            "cpu": True,
            "cpu_reason": reason,
            "cuda": False,
            "cuda_reason": reason,
            "cuda_archs": "",
        }
    return json.loads(record.read_text())
