"""Times other libraries' models before and after fastgen.patch():
`python -m benchmarks.integrations.run [LIBRARY ...]`.

Each library is a file `benchmarks/integrations/bench_<library>.py` with a list CASES, whose models
are patched ones; a peer "unpatched" is the same model put back.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.models import run

FOLDER = Path(__file__).parent


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point: 0, or 2 for a bad argument."""
    return run.main(arguments, FOLDER)


if __name__ == "__main__":
    sys.exit(main())
