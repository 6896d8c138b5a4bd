#!/bin/sh
# run_asan.sh PYTHON BUILD [pytest arguments]: builds the CPU kernels with the address and undefined-behaviour sanitizers
# in the folder BUILD, which leaves the working tree's own build alone, and runs the op tests against that copy.
set -eu
root=$PWD
python=$root/$1
build=$root/$2
shift 2

FASTGEN_SANITIZE=1 FASTGEN_CUDA=0 "$python" setup.py -q build --build-lib "$build/lib" --build-temp "$build/temp"

# The sanitizer must be the first library of the process, and libstdc++ must be there for it to see exceptions.
LD_PRELOAD="$(c++ -print-file-name=libasan.so):$(c++ -print-file-name=libstdc++.so)"
# PyTorch and Python keep memory until the process ends: leaks would only be theirs.
ASAN_OPTIONS=detect_leaks=0
UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
export LD_PRELOAD ASAN_OPTIONS UBSAN_OPTIONS PYTHONPATH="$build/lib" FASTGEN_STRICT=1

cd "$build/lib"
"$python" -c '
import sys, fastgen._build
record = fastgen._build.info()
sys.exit(0 if record.get("sanitized") else f"not the sanitized build: {fastgen.__file__} {record}")
'
exec "$python" -m pytest -c "$root/pyproject.toml" --rootdir "$root" -p no:cacheprovider \
  -m 'not slow and not gpu' "$root/tests/test_ops.py" "$root/tests/ops" "$@"
