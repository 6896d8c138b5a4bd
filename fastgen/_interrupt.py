"""Ctrl-C while `fastgen COMMAND` is still importing, before it can catch anything itself."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path


@contextmanager
def one_line_for_commands() -> Iterator[None]:
    """Turn a KeyboardInterrupt inside into a line and exit status 130, in a fastgen program alone.

    Raises:
        SystemExit: in the place of the interrupt.
    """
    try:
        yield
    except KeyboardInterrupt:
        if not _is_command():
            raise
        print("fastgen: error: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def _is_command() -> bool:
    """Whether the process is the script `fastgen` or `python -m fastgen.SOMETHING`."""
    if Path(sys.argv[0]).name == "fastgen":
        return True
    return any(
        flag == "-m" and name.startswith("fastgen.") for flag, name in pairwise(sys.orig_argv)
    )
