#!/bin/sh
# Builds the CPU kernels with the address and undefined-behaviour sanitizers, beside the working tree (in $BUILD), and
# runs the op tests against that copy. Called by make test-asan; arguments go to pytest.
set -eu
: "${BUILD:=build/asan}" "${PYTHON:=.venv/bin/python}"

FASTGEN_SANITIZE=1 FASTGEN_CUDA=0 "$PYTHON" setup.py -q build \
  --build-lib "$BUILD/lib" --build-temp "$BUILD/temp"

# The sanitizer must be the first library of the process, and libstdc++ must be there for it to see exceptions.
preload="$(c++ -print-file-name=libasan.so):$(c++ -print-file-name=libstdc++.so)"
export PYTHONPATH="$PWD/$BUILD/lib"
# PyTorch and Python keep memory until the process ends: leaks would only be theirs.
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
export FASTGEN_STRICT=1

LD_PRELOAD="$preload" "$PYTHON" -P -c '
import os, sys, fastgen
from fastgen import _build
inside = os.path.samefile(os.path.dirname(fastgen.__file__), sys.argv[1] + "/fastgen")
sys.exit(0 if inside and _build.info()["sanitized"] else "the sanitized build is not the one that Python imports")
' "$PYTHONPATH"

LD_PRELOAD="$preload" "$PYTHON" "$(dirname "$PYTHON")/pytest" -p no:cacheprovider -m 'not slow and not gpu' "$@"
