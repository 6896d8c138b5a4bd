"""Sanitized programs of tests/cpp/emulation."""

import os
import shutil
import subprocess

import pytest

#: The builds: flags, the environment to run under, and the library that the compiler must have.
BUILDS = {
    "plain": (("-O1",), {}, None),
    "asan": (
        ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
        {"ASAN_OPTIONS": "detect_leaks=0"},
        "libasan.so",
    ),
    "tsan": (
        ("-O1", "-g1", "-fsanitize=thread", "-DFASTGEN_EMULATION_THREADS"),
        {"TSAN_OPTIONS": "halt_on_error=1"},
        "libtsan.so",
    ),
}


def has_library(name):
    """gcc answers with a path where it has the library, and with the bare name where not."""
    compiler = shutil.which("c++") or shutil.which("g++")
    asked = [compiler, f"-print-file-name={name}"]
    found = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    return os.path.isabs(found)


@pytest.fixture(scope="session")
def run_program(compiled):
    """run_program(build, program, *arguments): the finished process."""

    def run(build, program, *arguments):
        flags, environment, library = BUILDS[build]
        if library is not None and not has_library(library):
            pytest.skip(f"the compiler has no {library}")
        path = compiled(f"emulation/{program}.cpp", f".{build}", *flags)
        return subprocess.run(
            [path, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, **environment},
        )

    return run
